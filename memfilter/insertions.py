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
    """Return the texts of a tokenizer's tokens that are whole text, sorted by id: no special ones, no lone bytes."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special]
    texts = (text.strip() for text in tokenizer.batch_decode([[i] for i in ids]))
    return [text for text in texts if text and "\ufffd" not in text]


def insert_tokens(caption: str, tokens: Sequence[str], random: np.random.Generator, count: int = 2) -> str:
    """Return the caption with so many of a `vocabulary`, each drawn uniformly, in it (RT)."""
    return _insert(caption, lambda: tokens[int(random.integers(len(tokens)))], random, count)


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
    """Return so many of a `vocabulary`, each drawn uniformly, as a caption (RC)."""
    return " ".join(tokens[i] for i in random.integers(len(tokens), size=count))


def _insert(caption: str, draw: Callable[[], str], random: np.random.Generator, count: int) -> str:
    words = caption.split()
    for _ in range(count):
        words.insert(int(random.integers(len(words) + 1)), draw())
    return " ".join(words)
