"""The noun hierarchy of WordNet, read from the files that an installation has: how broad a noun is, and how deep."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from .config import digest_of
from .errors import ConfigError, ModelError
from .store import file_digest

FILES = ("index.noun", "data.noun", "noun.exc")

_EVERYDAY_WORDS = 30_000  # the reference divides all hyponyms by so many words "used in daily life"
_SUFFIXES = {"s": "", "ses": "s", "xes": "x", "zes": "z", "ches": "ch", "shes": "sh", "men": "man", "ies": "y"}
_POINTER = re.compile(r" (~|@i?) (\d{8}) n(?= )")


class Place(NamedTuple):
    """Where a noun's first sense stands in a hierarchy."""

    hyponyms: int
    """Its direct hyponyms, without instances."""

    depth: int
    """Steps up to a root by the shortest way, over hypernyms and those of instances."""


class Nouns(Protocol):
    """A noun hierarchy."""

    @property
    def identity(self) -> str:
        """Names everything that shapes its numbers."""
        ...

    @property
    def typical_hyponyms(self) -> float:
        """The hyponyms of an ordinary word, over 0."""
        ...

    @property
    def mean_depth(self) -> float:
        """The mean depth of all senses, over 0."""
        ...

    def find(self, noun: str) -> Place | None:
        """Return the place of a noun as it stands in a text, plural or not; None for one that is unknown."""
        ...


class WordNet:
    """WordNet's nouns, from a folder with index.noun, data.noun and noun.exc; read when they are first needed.

    Raises ConfigError where a file is missing.  What is damaged is told when it is read, as a ModelError.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        for name in FILES:
            if not (self._folder / name).is_file():
                raise ConfigError(
                    f"generality.wordnet = {str(folder)!r}: has no {name}; install WordNet (Debian: "
                    "'apt install wordnet-base') or name the folder that has its files"
                )
        self.identity = f"wordnet/{digest_of([file_digest(self._folder / name) for name in FILES])}"

    @property
    def typical_hyponyms(self) -> float:
        """All hyponyms of nouns over 30,000, the reference's number of everyday words: 2.53 for WordNet 3.0."""
        return self._means[0]

    @property
    def mean_depth(self) -> float:
        """The mean depth of all noun senses: 7.96 for WordNet 3.0."""
        return self._means[1]

    def find(self, noun: str) -> Place | None:
        """Return the place of the first sense of a noun in any case, None for one that WordNet lacks.

        The word itself comes first, then its base forms by WordNet's own rules (morphy): the exceptions where it is
        one of them, else the suffixes.
        """
        word = noun.lower()
        if (found := self._lemmas.get(word)) is not None:
            return found
        bases = self._exceptions[word] if word in self._exceptions else _bases(word)
        return next((self._lemmas[base] for base in bases if base in self._lemmas), None)

    @cached_property
    def _means(self) -> tuple[float, float]:
        hyponyms, depths = map(sum, zip(*self._senses.values(), strict=True))
        return hyponyms / _EVERYDAY_WORDS, depths / len(self._senses)

    @cached_property
    def _senses(self) -> dict[str, Place]:
        """The place of every sense, by its offset."""
        hyponyms: dict[str, int] = {}
        above: dict[str, list[str]] = {}
        below: defaultdict[str, list[str]] = defaultdict(list)
        depth: dict[str, int] = {}
        for number, line in self._lines("data.noun"):
            sense = line[:8]
            if not re.match(r"\d{8} \d\d n ", line):
                raise ModelError(f"{self._folder / 'data.noun'}: line {number} is no noun sense; install WordNet again")
            pointers = _POINTER.findall(line.partition(" | ")[0])
            hyponyms[sense] = sum(kind == "~" for kind, _ in pointers)
            above[sense] = [other for kind, other in pointers if kind != "~"]
            for other in above[sense]:
                below[other].append(sense)
        level, steps = {sense for sense, parents in above.items() if not parents}, 0
        while level:
            depth.update(dict.fromkeys(level, steps))
            level, steps = {sense for parent in level for sense in below[parent]} - depth.keys(), steps + 1
        if len(depth) < len(above) or not any(depth.values()) or not any(hyponyms.values()):
            raise ModelError(f"{self._folder / 'data.noun'}: its nouns are no hierarchy; install WordNet again")
        return {sense: Place(hyponyms[sense], depth[sense]) for sense in above}

    @cached_property
    def _lemmas(self) -> dict[str, Place]:
        """The place of every lemma's first sense."""
        found = {}
        for number, line in self._lines("index.noun"):
            try:
                lemma, _, senses, *rest = line.split()
                found[lemma] = self._senses[rest[-int(senses)]]
            except (ValueError, IndexError, KeyError):
                raise ModelError(
                    f"{self._folder / 'index.noun'}: line {number} names no noun sense; install WordNet again"
                ) from None
        return found

    @cached_property
    def _exceptions(self) -> dict[str, list[str]]:
        """The base forms of irregular plurals, of which some have several lines."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for _, line in self._lines("noun.exc"):
            form, *bases = line.split()
            found[form] += bases
        return dict(found)

    def _lines(self, name: str) -> list[tuple[int, str]]:
        """Return the numbered lines of a file, without its licence, whose lines are indented."""
        lines = (self._folder / name).read_text(encoding="latin-1").split("\n")
        return [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("  ")]


def _bases(word: str) -> list[str]:
    """Return the base forms that WordNet's suffix rules make of a noun, those of boxesful too."""
    stem, full = (word[:-3], "ful") if word.endswith("ful") else (word, "")
    if not full and (word.endswith("ss") or len(word) <= 2):
        return []
    return [stem[: -len(old)] + new + full for old, new in _SUFFIXES.items() if stem.endswith(old)]
