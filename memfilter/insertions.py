"""Captions made less of a key: random tokens, numbers and words of their own put in (Somepalli et al. 2023).

Words are what white space parts.  Each insertion is at a place drawn uniformly from those before, between and after the
words that are there by then; the caption's white space becomes single spaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def seeded(seed: int, *names: int | str | bytes) -> np.random.Generator:
    """Return a generator that depends on the seed and the names alone, and is another for every other of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (seed, *names):
        if isinstance(name, bytes):
            kind, data = b"bytes", name
        elif isinstance(name, str):
            kind, data = b"str", name.encode("utf-8", "surrogateescape")
        else:
            kind, data = b"int", b"%d" % int(name)  # whatever library's integer it is
        digest.update(b"%s %d:%s" % (kind, len(data), data))
    return np.random.default_rng(int.from_bytes(digest.digest(), "big"))


def vocabulary(tokenizer: Any) -> list[str]:
    """Texts of a tokenizer's tokens that are whole text, sorted by id: no special ones, no lone bytes.

    Each comes with the space that belongs to it: behind a token that ends a word, as "cat " beside "cat" in CLIP's, or
    before one that begins a word.  Where a tokenizer shows no such space, every token is a word with one behind.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]

    def decoded(lists: list[list[int]]) -> list[str]:
        found: list[str] = tokenizer.batch_decode(lists, clean_up_tokenization_spaces=False)
        return found

    alone = decoded([[i] for i in ids])
    # between two tokens without a space of their own, a token keeps its own
    twice = decoded([[i, i] for i in ids])
    inner = [(i, t) for i, t, tt in zip(ids, alone, twice, strict=True) if t.isascii() and t.isalpha() and tt == t + t]
    texts = [f"{text.strip()} " for text in alone]
    if inner:
        fence, mark = inner[0]
        texts = [text[len(mark) : len(text) - len(mark)] for text in decoded([[fence, i, fence] for i in ids])]
    return [text for text in texts if text.strip() and "\ufffd" not in text]


def insert_tokens(caption: str, tokens: Sequence[str], random: np.random.Generator, count: int = 2) -> str:
    """Return the caption with so many of a `vocabulary`, each drawn uniformly, in it (RT).

    A text that is there with and without a space is drawn for either, as in the paper's code.
    """
    return _insert(caption, lambda: tokens[int(random.integers(len(tokens)))].strip(), random, count)


def insert_numbers(caption: str, random: np.random.Generator, count: int = 2, below: int = 100_000) -> str:
    """Return the caption with so many whole numbers in it, drawn uniformly from 0 to under `below` (RNA)."""
    return _insert(caption, lambda: str(random.integers(below)), random, count)


def repeat_words(caption: str, random: np.random.Generator, count: int = 2) -> str:
    """Return the caption with so many of its own words in it once more, each drawn uniformly (CWR).

    One without a word stays as it is.
    """
    words = caption.split()
    return _insert(caption, lambda: words[int(random.integers(len(words)))], random, count) if words else caption


def random_caption(tokens: Sequence[str], random: np.random.Generator, count: int = 4) -> str:
    """Return so many of a `vocabulary`, each drawn uniformly, as a caption (RC).

    As in the paper's code they are one text: a token that does not end a word goes on into the next, so that four of
    them are often fewer words.
    """
    return " ".join("".join(tokens[i] for i in random.integers(len(tokens), size=count)).split())


def _insert(caption: str, draw: Callable[[], str], random: np.random.Generator, count: int) -> str:
    words = caption.split()
    for _ in range(count):
        words.insert(int(random.integers(len(words) + 1)), draw())
    return " ".join(words)
