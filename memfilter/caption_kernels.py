"""The compiled inner loops of the caption join: features of a text, their MinHash, and the visit that forms groups.

Texts are normalised and lie one behind the other as UTF-8 bytes, text i from `ends[i]` to `ends[i + 1]`.  A text's
features are its character 3- to 5-grams and its word 1- and 2-grams, each a 64-bit hash; words are told apart from
characters, so that the word "cat" is another feature than the three characters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .compiled import kernel

Bytes = npt.NDArray[np.uint8]
Ints32 = npt.NDArray[np.int32]
Ints64 = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SKETCH = 128
"""MinHashes of a text of which a byte is kept, by which most unlike candidates are told without their features."""

PATIENCE = 256
"""Keepers that a text was compared with in vain after which it is compared with the likelier ones alone."""

TEMPLATE, NEAR, SEMANTIC = 1, 2, 3  # positions in records.CAPTION_METHODS


class Texts(NamedTuple):
    """Texts as bytes, where each ends, and the powers of the hashes' base for the longest."""

    bytes: Bytes
    ends: Ints64
    power: Hashes


class Given(NamedTuple):
    """What joins texts beside their features: classes numbered from 0 (-1 for none), and verified edges.

    The edges of text i lead to earlier texts, sorted, from `ends[i]` to `ends[i + 1]`.
    """

    template: Ints64
    ends: Ints64
    near: Ints64
    distance: npt.NDArray[np.float32]


class Keepers(NamedTuple):
    """The keepers so far: of each class, and in each bucket of each band, linked, the last first.

    `sizes` counts the distinct features of a text; `seen` is by which text a keeper was last compared.
    """

    of_template: Ints64
    heads: Ints32
    chain: Ints32
    sizes: Ints32
    seen: Ints32
    sketch: Bytes


class Found(NamedTuple):
    """Of each text its keeper, the position of the edge's method, its distance, and whether it ran out of patience."""

    keeper: Ints64
    method: npt.NDArray[np.int8]
    distance: npt.NDArray[np.float32]
    crowded: npt.NDArray[np.bool_]


_BASE = np.uint64(0x9E3779B97F4A7C55)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_WORD = np.uint64(0x94D049BB133111EB)
_SPACE = 32


@kernel
def _gram(prefix: Hashes, power: Hashes, start: int, end: int, kind: np.uint64) -> np.uint64:
    """Return the hash of the bytes from start to end, of which the prefixes' hashes are known."""
    value = (prefix[end] - prefix[start] * power[end - start]) ^ kind
    value = (value ^ (value >> np.uint64(31))) * _MIX
    return value ^ (value >> np.uint64(29))  # type: ignore[no-any-return]


@kernel
def powers(longest: int) -> Hashes:
    """Return the powers of the base of the hashes, for texts of so many bytes."""
    power = np.empty(longest + 1, np.uint64)
    power[0] = 1
    for i in range(longest):
        power[i + 1] = power[i] * _BASE
    return power


@kernel
def features(texts: Texts, i: int | np.int64) -> Hashes:
    """Return the hashes of a text's features, one that comes twice twice."""
    text, power = texts.bytes[texts.ends[i] : texts.ends[i + 1]], texts.power
    n = len(text)
    prefix = np.empty(n + 1, np.uint64)
    prefix[0] = 0
    starts = np.empty(n + 1, np.int32)  # of characters
    words = np.empty(n + 1, np.int32)  # of words; each but the last ends at the space before the next
    characters, count = 0, 0
    for i in range(n):
        prefix[i + 1] = prefix[i] * _BASE + np.uint64(text[i] + 1)
        if text[i] & 0xC0 != 0x80:
            starts[characters] = i
            characters += 1
        if text[i] != _SPACE and (i == 0 or text[i - 1] == _SPACE):
            words[count] = i
            count += 1
    starts[characters] = n
    words[count] = n + 1
    found = np.empty(3 * characters + 2 * count, np.uint64)
    at = 0
    for length in range(3, 6):
        for i in range(characters - length + 1):
            found[at] = _gram(prefix, power, starts[i], starts[i + length], np.uint64(0))
            at += 1
    for length in range(1, 3):
        for i in range(count - length + 1):
            found[at] = _gram(prefix, power, words[i], words[i + length] - 1, _WORD)
            at += 1
    return found[:at]


@kernel
def sign(texts: Texts, first: int, rows: int, shift: int, factors: Hashes, keys: Ints64, sketch: Bytes) -> None:
    """Write of each text from `first` on the buckets of its bands of `rows` MinHashes, and a byte of each of 128.

    `keys` (N, bands) holds numbers below 2^(64 - shift); with no rows all texts share bucket 0.
    """
    least = np.empty(len(factors), np.uint32)
    multipliers, shifts = np.empty(len(factors), np.uint32), np.empty(len(factors), np.uint32)
    for k in range(len(factors)):
        multipliers[k] = np.uint32(factors[k] | np.uint64(1))
        shifts[k] = np.uint32(factors[k] >> np.uint64(32))
    for i in range(len(keys)):
        least[:] = 0xFFFFFFFF
        for feature in features(texts, first + i):
            value = np.uint32(feature >> np.uint64(32))
            for k in range(len(least)):
                least[k] = min(least[k], np.uint32(value * multipliers[k] + shifts[k]))
        for k in range(SKETCH):
            sketch[i, k] = np.uint8(least[k] >> np.uint32(7))
        for band in range(keys.shape[1]):
            key = np.uint64(band)
            for k in range(band * rows, band * rows + rows):
                key = (key ^ np.uint64(least[k])) * _MIX
                key ^= key >> np.uint64(32)
            keys[i, band] = np.int64((key * _BASE) >> np.uint64(shift)) if rows else 0


@kernel
def _fill(found: Hashes, slots: Hashes, owner: Ints64, me: int) -> int:
    """Put features into a table of slots that are empty unless they are owned by `me`; return how many are distinct."""
    mask = np.uint64(len(slots) - 1)
    distinct = 0
    for feature in found:
        at = feature & mask
        while owner[at] == me and slots[at] != feature:
            at = (at + np.uint64(1)) & mask
        if owner[at] != me:
            owner[at] = me
            slots[at] = feature
            distinct += 1
    return distinct


@kernel
def _shared(found: Hashes, slots: Hashes, owner: Ints64, me: int, counted: Ints64, turn: int, least: float) -> int:
    """Return how many distinct features are among those in the slots owned by `me`, or that they are under `least`."""
    mask = np.uint64(len(slots) - 1)
    shared, left = 0, len(found)
    for feature in found:
        if shared + left < least:
            break
        left -= 1
        at = feature & mask
        while owner[at] == me:
            if slots[at] == feature:
                shared += counted[at] != turn
                counted[at] = turn
                break
            at = (at + np.uint64(1)) & mask
    return shared


@kernel
def _agree(sketch: Bytes, one: int, other: np.int64) -> int:
    agree = 0
    for k in range(SKETCH):
        agree += sketch[one, k] == sketch[other, k]
    return agree


@kernel
def _table(texts: Texts, first: int, last: int) -> tuple[Hashes, Ints64, Ints64]:
    """Return an empty table with room for the features of each of these texts."""
    most = 0
    for i in range(first, last):
        most = max(most, texts.ends[i + 1] - texts.ends[i])
    room = 64
    while room < 10 * most:
        room *= 2
    return np.zeros(room, np.uint64), np.full(room, -1, np.int64), np.full(room, -1, np.int64)


@kernel
def _best_given(me: int, given: Given, keepers: Keepers, found: Found) -> tuple[int, int, float]:
    """Return the first keeper that class or edges join a text to, with method and distance; none is past the last."""
    best, method, distance = len(found.keeper), 0, 0.0
    if given.template[me] >= 0 and keepers.of_template[given.template[me]] >= 0:
        best, method = keepers.of_template[given.template[me]], TEMPLATE
    for at in range(given.ends[me], given.ends[me + 1]):
        other = given.near[at]
        if other >= best:
            break
        if found.keeper[other] == other:
            best, method, distance = other, SEMANTIC, np.float64(given.distance[at])
    return best, method, distance


@kernel
def visit(
    texts: Texts,
    first: int,
    keys: Ints64,
    jaccard: float,
    agreeing: tuple[int, int],
    given: Given,
    keepers: Keepers,
    found: Found,
    known: bool,
) -> None:
    """Visit the texts from `first` on, one a row of `keys`, in their order: each joins its best keeper, or is one.

    The best is the first in the order.  Keepers in a text's buckets whose sketch agrees with its own in so many places
    are compared by the true Jaccard index: the first of `agreeing`, the second once patience is at its end.  With
    `known`, keepers are only put into their buckets, as an earlier visit found them.
    """
    bands = keys.shape[1]
    slots, owner, counted = _table(texts, first, first + len(keys))
    buckets = np.empty(bands, np.int32)
    turn = 0
    for me in range(first, first + len(keys)):
        if known and found.keeper[me] != me:
            continue
        best, method, distance = len(found.keeper), 0, 0.0
        in_vain, least_agree = 0, agreeing[0]
        if not known:
            best, method, distance = _best_given(me, given, keepers, found)
        if bands:
            keepers.sizes[me] = _fill(features(texts, me), slots, owner, me)
        for band in range(bands if not known else 0):  # all at once: each waits for the memory
            buckets[band] = keepers.heads[band, keys[me - first, band]]
        for band in range(bands if not known else 0):
            other: Any = np.int64(buckets[band])
            while other >= 0:
                if (other < best or (other == best and method == SEMANTIC)) and keepers.seen[other] != me:
                    keepers.seen[other] = me
                    few, many = keepers.sizes[me], keepers.sizes[other]
                    near = min(few, many) >= jaccard * max(few, many) * 0.999999
                    if near and _agree(keepers.sketch, me, other) >= least_agree:
                        turn += 1
                        least = jaccard / (1 + jaccard) * (few + many) - 0.001
                        shared = _shared(features(texts, other), slots, owner, me, counted, turn, least)
                        index = shared / (few + many - shared)
                        if index >= jaccard:
                            best, method, distance = other, NEAR, 1 - index
                        else:
                            in_vain += 1
                            if in_vain == PATIENCE:
                                least_agree = agreeing[1]
                                found.crowded[me] = least_agree > agreeing[0]
                other = np.int64(keepers.chain[other, band])
        if best < len(found.keeper):
            found.keeper[me], found.method[me], found.distance[me] = best, method, distance
            continue
        found.keeper[me] = me
        if given.template[me] >= 0 and keepers.of_template[given.template[me]] < 0:
            keepers.of_template[given.template[me]] = me
        for band in range(bands):
            keepers.chain[me, band] = keepers.heads[band, keys[me - first, band]]
            keepers.heads[band, keys[me - first, band]] = me
