"""The compiled inner loops of the hash join: partition rows by a mask, divide what is crowded, compare what is left.

Hashes are rows of uint64 words, (n, words), with a number (uint32) each; a mask is one such row.  A pair found is one
uint64: the smaller number in the upper half, the larger in the lower.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from .compiled import kernel

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]
Ends = npt.NDArray[np.int64]
Found = tuple[Words, int]


_PARTITION = 40  # what it costs to put a row into its bucket, in comparisons of two rows
_SAMPLE = 96  # rows by which the bits of a bucket are judged
_BLOCK = 4096  # rows in which near ones are counted before any is looked for
_MOST_BITS = 13  # of a bucket's number: with more buckets, each write would miss the processor's caches


@intrinsic  # type: ignore[untyped-decorator]
def _popcount(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@kernel
def divide(rows: Words, agreed: Words, parts: int, sample: int) -> Words:
    """Return `parts` disjoint masks of all bits outside `agreed`, which tell the rows apart about equally well."""
    n, words = rows.shape
    sample = min(sample, n)
    ones = np.zeros(64 * words, np.int64)
    for i in range(sample):
        for word in range(words):
            value = rows[i * n // sample, word]
            for bit in range(64):
                ones[64 * word + bit] += np.int64(value >> np.uint64(bit) & np.uint64(1))
    # the chance that two rows differ in this bit, and a little, so that even bits that no row tells apart are spread
    weight = ones * (sample - ones) / (sample * sample) + 1e-3
    masks = np.zeros((parts, words), np.uint64)
    load = np.zeros(parts)
    for _ in range(64 * words):  # the most telling bit that is left goes to the part that has the least
        bit = int(np.argmax(weight))
        one = np.uint64(1) << np.uint64(bit & 63)
        if agreed[bit >> 6] & one == 0:
            part = np.argmin(load)
            masks[part, bit >> 6] |= one
            load[part] += weight[bit]
        weight[bit] = -1
    return masks


@kernel
def _factors(words: int) -> Words:
    """Return odd numbers that spread the bits of a masked row over the upper bits of the sum of its products."""
    factors = np.empty(words, np.uint64)
    factor = np.uint64(0x9E3779B97F4A7C15)
    for word in range(words):
        factors[word] = factor
        factor *= np.uint64(0xD1342543DE82EF95)
    return factors


@kernel
def _bucket(row: Words, mask: Words, factors: Words, shift: int) -> int:
    key = np.uint64(0)
    for word in range(len(mask)):
        key += (row[word] & mask[word]) * factors[word]
    return np.int64(key >> np.uint64(shift))  # type: ignore[return-value]


@kernel
def _shift(n: int, mask: Words) -> int:
    """Return by how many bits a key is cut, so that n rows lie by fours, or as the mask's values tell them apart."""
    bits, values = 1, 2  # two more than the mask's own bits, as its values may meet in a bucket by chance
    while bits < _MOST_BITS and 4 << bits < n:
        bits += 1
    for word in mask:
        values += _popcount(word)
    return 64 - min(bits, values)


@kernel
def buckets(rows: Words, mask: Words) -> Ends:
    """Return where each bucket begins and the last ends; rows that are equal under the mask share one."""
    shift, factors = _shift(len(rows), mask), _factors(len(mask))
    ends = np.zeros((1 << (64 - shift)) + 1, np.int64)
    for i in range(len(rows)):
        ends[_bucket(rows[i], mask, factors, shift) + 1] += 1
    for i in range(len(ends) - 1):
        ends[i + 1] += ends[i]
    return ends


@kernel
def partition(rows: Words, ids: Numbers, mask: Words, to_rows: Words, to_ids: Numbers) -> Ends:
    """Write rows and numbers, bucket by bucket, to `to_rows` and `to_ids`; return where each bucket begins and ends."""
    shift, factors = _shift(len(rows), mask), _factors(len(mask))
    ends = buckets(rows, mask)
    place = ends[:-1].copy()
    for i in range(len(rows)):
        bucket = _bucket(rows[i], mask, factors, shift)
        at = place[bucket]
        place[bucket] = at + 1
        to_ids[at] = ids[i]
        for word in range(len(mask)):
            to_rows[at, word] = rows[i, word]
    return ends


@kernel
def pays(rows: Words, masks: Words) -> bool:
    """Tell whether comparing within the buckets of all these masks costs less than comparing all rows."""
    every = float(len(rows)) ** 2
    cost = 2.0 * _PARTITION * len(masks) * len(rows)
    for mask in masks:
        if cost >= every:
            return False
        ends = buckets(rows, mask)
        for i in range(len(ends) - 1):
            cost += float(ends[i + 1] - ends[i]) ** 2
    return cost < every


@kernel
def _equal(one: Words, other: Words, mask: Words) -> bool:
    difference = np.uint64(0)
    for word in range(len(mask)):
        difference |= (one[word] ^ other[word]) & mask[word]
    return difference == 0  # type: ignore[no-any-return]


@kernel
def _distance(one: Words, other: Words) -> int:
    bits = 0
    for word in range(len(one)):
        bits += _popcount(one[word] ^ other[word])
    return bits


@kernel
def _note(a: int, b: int, out: Words, found: int) -> Found:
    if found == len(out):
        grown = np.empty(2 * len(out), np.uint64)
        grown[: len(out)] = out
        out = grown
    out[found] = np.uint64(min(a, b)) << np.uint64(32) | np.uint64(max(a, b))
    return out, found + 1


@kernel
def _near_64(row: Words, others: Words, radius: int) -> int:
    """Return how many of the rows are near this one, in a loop that the compiler turns into vectors."""
    one = row[0]
    near = 0
    for j in range(len(others)):
        near += _popcount(one ^ others[j, 0]) <= radius
    return near


@kernel
def _near_256(row: Words, others: Words, radius: int) -> int:
    r0, r1, r2, r3 = row[0], row[1], row[2], row[3]
    near = 0
    for j in range(len(others)):
        # two unlike rows nearly always differ in more bits of the first half already
        bits = _popcount(r0 ^ others[j, 0]) + _popcount(r1 ^ others[j, 1])
        if bits <= radius:
            near += bits + _popcount(r2 ^ others[j, 2]) + _popcount(r3 ^ others[j, 3]) <= radius
    return near


@kernel
def near(row: Words, others: Words, radius: int) -> Ends:
    """Return, in their order, the places of all rows at most `radius` bits from this one."""
    places, found = np.empty(4, np.int64), 0
    for start in range(0, len(others), _BLOCK):
        some = others[start : start + _BLOCK]
        left = _near_64(row, some, radius) if len(row) == 1 else _near_256(row, some, radius)
        j = -1
        while left:
            j += 1
            if _distance(row, some[j]) <= radius:
                left -= 1
                if found == len(places):
                    places = np.concatenate((places, np.empty_like(places)))
                places[found] = start + j
                found += 1
    return places[:found]


@kernel
def _compare(rows: Words, ids: Numbers, radius: int, agreed: Words, apart: Words, out: Words, found: int) -> Found:
    """Do what `join_buckets` does, for one bucket, by comparing all its rows."""
    for i in range(len(ids) - 1):
        others = rows[i + 1 :]
        near = _near_64(rows[i], others, radius) if rows.shape[1] == 1 else _near_256(rows[i], others, radius)
        j = i
        while near:
            j += 1
            if _distance(rows[i], rows[j]) <= radius:
                near -= 1
                first = _equal(rows[i], rows[j], agreed)  # of all buckets that hold the pair
                for k in range(len(apart)):
                    first = first and not _equal(rows[i], rows[j], apart[k])
                if first:
                    out, found = _note(ids[i], ids[j], out, found)
    return out, found


@kernel
def join_buckets(
    rows: Words, ids: Numbers, ends: Ends, radius: int, agreed: Words, apart: Words, out: Words, found: int
) -> Found:
    """Append the near pairs within each bucket to `out[:found]`; return both, `out` larger where it was full.

    A pair counts if its rows are equal under `agreed` and unequal under each mask of `apart`.  A bucket in which it
    pays is divided by radius + 1 disjoint masks of the bits outside `agreed`: a near pair is equal under one of them.
    """
    for i in range(len(ends) - 1):
        first, last = ends[i], ends[i + 1]
        if last - first < 2:
            continue
        some, some_ids = rows[first:last], ids[first:last]
        if len(some) > 2 * _PARTITION * (radius + 1):
            masks = divide(some, agreed, radius + 1, _SAMPLE)
            if pays(some, masks):
                inner, inner_ids = np.empty_like(some), np.empty_like(some_ids)
                for j in range(radius + 1):
                    inner_ends = partition(some, some_ids, masks[j], inner, inner_ids)
                    inner_apart = np.concatenate((apart, masks[:j]))
                    out, found = join_buckets(
                        inner, inner_ids, inner_ends, radius, agreed | masks[j], inner_apart, out, found
                    )
                continue
        out, found = _compare(some, some_ids, radius, agreed, apart, out, found)
    return out, found
