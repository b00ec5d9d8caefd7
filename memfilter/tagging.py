"""Taggers by spec string: captions -> tokens with their part of speech, tense and mood, and names marked."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .config import digest_of
from .errors import ConfigError, ModelError, in_one_line
from .store import file_digest

_BATCH = 256  # captions that spaCy sees together


class Token(NamedTuple):
    """A word or a mark of a caption."""

    text: str

    pos: str
    """Its part of speech, as Universal Dependencies name it: NOUN, PROPN, VERB, AUX, NUM, ..."""

    entity: bool = False
    """Whether it belongs to a named entity."""

    tense: str = ""
    """A verb's, as Universal Dependencies name it: Pres, Past, ..., or nothing."""

    mood: str = ""
    """A verb's: Ind, Imp, ..., or nothing."""


class Tagger(Protocol):
    """What a stage needs of a tagger; the identity may be a plain attribute."""

    @property
    def identity(self) -> str:
        """Names everything that shapes its tags."""
        ...

    def tag(self, captions: list[str]) -> list[list[Token]]:
        """Return of each caption its tokens, white space left out; a caption without any has none."""
        ...


def find_tagger(spec: str) -> Tagger:
    """Return the tagger that `spacy:NAME`, `spacy:FOLDER` or `package.module:function` names.

    A pipeline of spaCy's is not read yet, but for its digest.  Raises ConfigError for a spec that is unknown, and for
    what is not installed.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not kind or not rest:
        raise ConfigError(
            f"generality.tagger = {spec!r}: unknown; it is 'spacy:NAME' of an installed pipeline, 'spacy:FOLDER', "
            "'package.module:function', or null for no generality scores"
        )
    return Spacy(rest) if kind == "spacy" else own_tagger(spec)


def public_tagger(spec: str | None) -> str | None:
    """Return a spec without the folders of this machine, as the manifest tells it."""
    kind, _, rest = (spec or "").partition(":")
    return f"spacy:{Path(rest).resolve().name}" if kind == "spacy" else spec


class Spacy:
    """A pipeline of spaCy's, from an installed package or a folder, read when it first tags.

    Everything but its lemmatizer runs: spaCy tells English auxiliaries from verbs by the parse.
    """

    def __init__(self, name: str) -> None:
        if find_spec("spacy") is None:
            raise ConfigError("generality.tagger = 'spacy:...' needs spaCy: pip install 'memfilter[generality]'")
        is_folder = Path(name).is_dir()
        self._name: str | Path = Path(name) if is_folder else name
        folder = Path(name) if is_folder else _package(name)
        if folder is None:
            raise ConfigError(
                f"generality.tagger = 'spacy:{name}': no such pipeline is installed, and no such folder is here; "
                f"python -m spacy download {'en_core_web_sm' if '/' in name else name}"
            )
        if not any(folder.glob("config.cfg" if is_folder else "*/config.cfg")):
            raise ConfigError(f"generality.tagger = 'spacy:{name}': {folder} has no config.cfg; it is no pipeline")
        files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        digests = {p.relative_to(folder).as_posix(): file_digest(p) for p in files}
        self.identity = f"spacy-{version('spacy')}/{Path(name).resolve().name}/{digest_of(digests)}"

    def tag(self, captions: list[str]) -> list[list[Token]]:
        """Return of each caption its tokens; raises ModelError for a pipeline that cannot be read or lacks tags."""
        with self._pipeline.memory_zone():  # without it every word that was ever seen stays in memory
            docs = self._pipeline.pipe(captions, batch_size=_BATCH)
            return [[_token(token) for token in doc if not token.is_space] for doc in docs]

    @cached_property
    def _pipeline(self) -> Any:
        import spacy

        try:
            with _weights_only():
                pipeline = spacy.load(self._name, exclude=["lemmatizer"])
        except Exception as e:  # spaCy raises what it likes
            cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
            raise ModelError(f"{self._name}: spaCy {version('spacy')} cannot read this pipeline ({cause})") from e
        makes = {name for component in pipeline.pipe_names for name in pipeline.get_pipe_meta(component).assigns}
        # an attribute ruler declares nothing
        if "token.pos" not in makes and "attribute_ruler" not in pipeline.pipe_factories.values():
            raise ModelError(f"{self._name}: no component of this pipeline tells parts of speech; give another")
        if "doc.ents" not in makes:
            raise ModelError(f"{self._name}: no component of this pipeline tells named entities; give another")
        return pipeline


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch unpickle nothing: spaCy's networks are read by torch.load, which before 2.6 would when not told."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({name: before} if before is not None else {})


def _package(name: str) -> Path | None:
    """Return the folder of an installed pipeline."""
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(found.origin).parent if found and found.origin else None


def _token(token: Any) -> Token:
    pos = token.pos_
    morph = token.morph if pos == "VERB" else None
    tense, mood = (",".join(morph.get(name)) for name in ("Tense", "Mood")) if morph else ("", "")
    return Token(token.text, pos, token.ent_iob_ in ("B", "I"), tense, mood)


@lru_cache(4)
def own_tagger(spec: str) -> Tagger:
    """Return what `package.module:function` returns; raises ConfigError where it is no tagger."""
    module, _, name = spec.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        made: Any = factory()
    except Exception as e:  # the user's code raises what it likes
        cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
        raise ConfigError(f"generality.tagger = {spec!r}: cannot be imported and called ({cause})") from e
    identity = getattr(made, "identity", None)
    if not isinstance(identity, str) or not identity or not callable(getattr(made, "tag", None)):
        raise ConfigError(f"generality.tagger = {spec!r}: a tagger has an identity, a text, and a method tag")
    tagger: Tagger = made
    return tagger
