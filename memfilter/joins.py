"""Self-join of hashes: exactly the pairs within a distance.

Hash join after Manku et al. 2007, *Detecting Near-Duplicates for Web Crawling*: two hashes at most `radius` bits apart
agree in at least `blocks - radius` of `blocks` blocks, so sorting by every such choice of blocks brings each pair
together at least once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]

_CHUNK = 1 << 22  # candidate pairs looked at together


def hash_join(hashes: npt.NDArray[np.uint64], radius: int) -> Pairs:
    """Return all pairs (a < b) of distinct 64-bit hashes at most `radius` bits apart, with their Hamming distance.

    `hashes` must hold no value twice.  Pairs come sorted by (a, b).
    """
    n = len(hashes)
    blocks, keyed = _plan(n, radius)
    edges = [64 * i // blocks for i in range(blocks + 1)]
    masks = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    found = []
    for choice in combinations(masks, keyed):
        key = hashes & np.uint64(sum(choice))
        order = np.argsort(key, kind="stable")
        for a, b in _pairs_within(key[order]):
            a, b = order[a], order[b]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= radius
            found.append((np.minimum(a[near], b[near]), np.maximum(a[near], b[near])))
    a, b = _distinct(found, n)
    return a, b, np.bitwise_count(hashes[a] ^ hashes[b]).astype(np.float32)


def _plan(n: int, radius: int) -> tuple[int, int]:
    """Return (blocks, blocks in a key) for which sorting and comparing cost the least on n random hashes."""

    def cost(blocks: int) -> float:
        keyed = blocks - radius
        bits = 64 * keyed // blocks
        tables = len(list(combinations(range(blocks), keyed)))
        return float(tables * (20.0 * n + n * n / 2 ** (bits + 1)))

    best = min(range(radius + 1, min(radius + 6, 64) + 1), key=cost)
    return best, best - radius


def _pairs_within(keys: npt.NDArray[np.uint64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the pairs of positions that share a key in a sorted array, a chunk of pairs at a time."""
    n = len(keys)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    ends = np.repeat(np.r_[starts[1:], n], np.diff(np.r_[starts, n]))
    partners = ends - np.arange(n) - 1  # of each position, those behind it in its run
    total = np.cumsum(partners)
    first = 0
    while first < n and total[-1]:
        last = max(int(np.searchsorted(total, (total[first - 1] if first else 0) + _CHUNK, "right")), first + 1)
        count = partners[first:last]
        if count.any():
            a = np.repeat(np.arange(first, last), count)
            step = np.arange(len(a)) - np.repeat(np.cumsum(count) - count, count)
            yield a, a + 1 + step
        first = last


def _distinct(found: list[tuple[Any, Any]], n: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the pairs sorted by (a, b), each once."""
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    key = np.concatenate([a * n + b for a, b in found])
    key.sort()  # np.unique hashes integers, which is several times slower on millions of them
    key = key[np.r_[True, key[1:] != key[:-1]]] if len(key) else key
    return key // n, key % n
