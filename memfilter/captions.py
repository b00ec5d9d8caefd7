"""Captions compared by content: normal forms and their fingerprints."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import cache


def normalise(caption: str) -> str:
    """Return the caption with NFKC forms, case folded, punctuation as white space, and white space collapsed.

    A caption of punctuation alone keeps it, so that it does not equal every other such caption.
    """
    caption = caption if caption.isascii() else _long_runs().sub("\\1\u034f", caption)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    words = " ".join(folded.translate(_punctuation()).split())
    return words if any(map(str.isalnum, words)) else " ".join(folded.split())


def fingerprint(caption: str) -> bytes | None:
    """Return the 16-byte blake2b digest of the normalised caption; None for a caption that is only white space."""
    text = normalise(caption)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else None


@cache
def _long_runs() -> re.Pattern[str]:
    """Match 30 combining marks before another, where UAX 15 puts a joiner: sorting a run takes its length squared."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{30}})(?=[{marks}])")


@cache
def _punctuation() -> dict[int, str]:
    return {c: " " for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("P")}
