"""Captions compared by content: normal forms, templates and their fingerprints."""

from __future__ import annotations

import hashlib
import re
import string
import sys
import unicodedata
from functools import cache

FORMS = f"forms-2, Unicode {unicodedata.unidata_version}"
"""Names what shapes the forms beside the captions."""


def normalise(caption: str) -> str:
    """Return the caption with NFKC forms, case folded, punctuation as white space, and white space collapsed.

    Control characters are white space too, and marks that nobody sees (of direction, soft hyphens, zero-width spaces)
    are left out.  A caption of punctuation alone keeps it, so that it does not equal every other such caption.
    """
    if caption.isascii():
        words = " ".join(caption.encode().translate(_ASCII).decode("ascii").split())
        return words if any(map(str.isalnum, words)) else " ".join(caption.lower().split())
    folded = _folded(caption)
    words = " ".join(folded.translate(_punctuation()).split())
    return words if any(map(str.isalnum, words)) else " ".join(folded.split())


def fingerprint(caption: str) -> bytes | None:
    """Return the 16-byte blake2b digest of the normalised caption; None for a caption that is only white space."""
    text = normalise(caption)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else None


def template(caption: str) -> str | None:
    """Return the normal form with a sign for each number, product code, URL, file name and date.

    Of a number with a unit the unit stays ("5cm"); a code is a word of Latin letters with two digits or more
    ("img_0012", "ab-1234"), and where words hang on digits by hyphens they stay ("10-year-old").  Digits inside other
    scripts' words are numbers.  None where there is nothing to factor out, or no word beside it.
    """
    if not _FACTORED.search(caption):
        return None
    words = " ".join(map(_sign, _folded(caption).split()))
    words = _DATE.sub(_NUMBER, words)
    words = " ".join(words.translate(_punctuation()).split())
    if not any(c.isalpha() for c in words) or not any(sign in words for sign in (_NUMBER, _URL, _FILE)):
        return None
    return _REPEATED.sub(r"\1", words)


_NUMBER, _URL, _FILE = "\ue000", "\ue001", "\ue002"  # of a private use area, which no script has
_REPEATED = re.compile(f"([{_NUMBER}{_URL}{_FILE}])(?: ?\\1)+")
_FACTORED = re.compile(r"\d|[^\s.]\.[^\s.]|://")
_ENDS = string.punctuation + "“”‘’«»„…،。、"
_FILE_NAME = re.compile(
    r".*\.(?:jpe?g|png|gif|webp|tiff?|bmp|svg|heic|avif|raw|cr2|nef|dng|psd|eps|ai|pdf|mp4|mov|avi|mp3|wav|zip|html?)"
)
_LINK = re.compile(r"(?:[a-z]+://|www\.).*|[\w@.-]+\.(?:com|org|net|info|edu|gov|biz)(?:[/?#:].*)?")
_DIGITS = re.compile(r"\d+(?:[.,:/×x-]\d+)*")
_UNIT = re.compile(r"([^\W\d]*)")
_CODE = re.compile(r"[a-z0-9_.#/\\-]+")
_PARTS = re.compile(r"[-_./\\#]+")
_MONTH = (
    "(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec|january|february|march|april|june|july|august|september|"
    r"october|november|december)[.,]?"
)
# a month is part of a date beside a day or a year, which is a number by then
_DATE = re.compile(
    rf"{_NUMBER}(?:st|nd|rd|th)?[.,]? (?:of )?{_MONTH}(?: {_NUMBER})?(?![^\s,.])"
    rf"|(?<!\S){_MONTH} {_NUMBER}(?:st|nd|rd|th)?(?:,? {_NUMBER})?"
)


def _sign(word: str) -> str:
    """Return a word of a folded caption with signs for what is factored out of it."""
    bare = word.strip(_ENDS)
    if _LINK.fullmatch(bare):
        return _URL
    if _FILE_NAME.fullmatch(bare):
        return _FILE
    digits = sum(map(str.isdigit, bare))
    if not digits:
        return word
    if not _CODE.fullmatch(bare) or not any(map(str.isalpha, bare)):
        return _DIGITS.sub(_NUMBER, word)
    number = _DIGITS.match(bare)
    if number and _UNIT.fullmatch(bare, number.end()):
        return _NUMBER + bare[number.end() :]
    parts = _PARTS.split(bare)
    if any(len(part) > 3 and part.isalpha() for part in parts):
        return " ".join(_sign(part) for part in parts if part)
    return _NUMBER if digits > 1 and len(bare) > 3 else word


def _folded(caption: str) -> str:
    if caption.isascii():
        return caption.lower()
    shown = caption.translate(_UNSEEN)
    caption = shown if shown.strip() else caption
    caption = _long_runs().sub("\\1\u034f", caption)
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())


# joiners are seen: they shape letters and make one emoji of several
_UNSEEN: dict[int, str | None] = dict.fromkeys(
    map(ord, "\u00ad\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
)
# marks of class 0 whose parts are not: in their stead these, as every normal form has them
_UNSEEN |= {ord(c): unicodedata.normalize("NFKD", c) for c in "\u0f73\u0f75\u0f81\uff9e\uff9f"}
_ASCII = bytes(
    ord(" ") if unicodedata.category(c)[0] in "PC" or ord(c) > 127 else ord(c.lower()) for c in map(chr, range(256))
)


@cache
def _long_runs() -> re.Pattern[str]:
    """Match 30 combining marks before another, where UAX 15 puts a joiner: sorting a run takes its length squared."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(c))
    return re.compile(f"([{marks}]{{30}})(?=[{marks}])")


@cache
def _punctuation() -> dict[int, str]:
    separate = ("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Cc")
    return {c: " " for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in separate}
