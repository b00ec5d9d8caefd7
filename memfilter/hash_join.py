"""Self-join of perceptual hashes: all pairs of rows within a Hamming distance.

After Manku et al. 2007, *Detecting Near-Duplicates for Web Crawling*: of radius + 1 disjoint blocks of their bits, two
hashes at most `radius` bits apart agree in one.  A *table* brings together the rows that agree in one block, and each
of its buckets is a smaller join, divided again by the bits that are left for as long as that costs less than comparing
all its rows.  The blocks are chosen by the rows at hand, so that each tells them apart as well as it can.

The radius of 256-bit hashes is too wide for that to be quick.  Their tables are keyed by bits drawn at random, so many
that `recall` is close to one; no pair is returned that is not near.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, comb, log
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from .config import digest_of
from .errors import InputError
from .records import Pairs
from .store import done, read_table, reserve, write_table

MEMORY = 4 << 30
"""Bytes that a table may take in memory; a larger one lies in a file."""

_Words = npt.NDArray[np.uint64]

_RECALL = 0.99  # of pairs at the radius, where the tables are drawn
_EXACT = 20_000  # hashes of 256 bits up to this number are all compared
_PARTITION = 40  # what it costs to put 256 bits into a bucket, in comparisons of two rows
_SAMPLE = 4096  # rows by which the bits are judged
_SEED = 1


def hash_join(hashes: _Words, radius: int, directory: Path | None = None, memory: int = MEMORY) -> Pairs:
    """Return the pairs (a < b) of distinct hashes at most `radius` bits apart, with their Hamming distance.

    `hashes` holds 64-bit hashes, (n,), or 256-bit ones, (n, 4), none twice.  Pairs come sorted by (a, b), each once.
    Of 64-bit hashes none is missed, nor of up to 20,000 of 256 bits; of more, `recall` tells the chance that a pair is
    found, at least 0.99 at the radius and more below it.  The same hashes give the same pairs, anywhere.

    Each finished table is kept in `directory`, so that the same call continues a join that was interrupted; it is
    removed at the end.  Beside the pairs it takes 12 bytes a 64-bit hash and 36 a 256-bit one, in a file (in
    `directory`, else the system's for temporary files) where that is more than `memory` bytes.
    Raises InputError for 2^32 hashes or more.
    """
    n = len(hashes)
    if n >= 1 << 32:
        raise InputError(f"{n:,} distinct hashes are more than one join takes, {(1 << 32) - 1:,}; split the input")
    rows = np.require(hashes, np.uint64, ["C", "W"]).reshape(n, 1 if hashes.ndim == 1 else hashes.shape[1])
    masks = _exact_masks(rows, radius) if rows.shape[1] == 1 else _drawn_masks(n, radius)
    key = hashlib.blake2b(rows.data, digest_size=16).hexdigest() if directory else ""
    found: list[_Words] = []
    for j in tqdm(range(len(masks)), desc="hash join", unit="table", disable=None, leave=False):
        part = directory and directory / f"{j:03}.parquet"
        digest = digest_of(["hash-table-1", key, rows.shape[1], radius, j])
        if part and done(part, digest):
            found.append(read_table(part)["pair"].to_numpy())
            continue
        found.append(_join_table(rows, masks, j, radius, directory, memory))
        if part:
            write_table(part, pa.table({"pair": found[-1]}), digest)
    pairs = np.concatenate(found)
    del found
    pairs.sort()
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    a, b = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return a, b, distances(hashes, a, b).astype(np.float32)


def distances(hashes: _Words, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the number of bits in which the hashes at `a` and `b` differ."""
    found = np.empty(len(a), np.int64)
    for i in range(0, len(a), 1 << 20):
        bits = np.bitwise_count(hashes[a[i : i + (1 << 20)]] ^ hashes[b[i : i + (1 << 20)]])
        found[i : i + (1 << 20)] = bits if bits.ndim == 1 else bits.sum(1)
    return found


def recall(n: int, radius: int, distance: int) -> float:
    """Return the chance that `hash_join` finds a pair `distance` <= `radius` apart among n hashes of 256 bits.

    It is over the draw of the keys, and so holds for any pair.  A shuffle of the 256 bits is cut into keys of `bits`;
    by inclusion and exclusion over those that the pair's differing bits leave untouched, it finds the pair or not.
    """
    if n <= _EXACT:
        return 1.0
    bits, shuffles = _draw(n, radius)
    return float(1 - _missed(bits, distance) ** shuffles)


def _missed(bits: int, distance: int) -> float:
    keys = 256 // bits
    ways = sum((-1 if i % 2 else 1) * comb(keys, i) * comb(256 - i * bits, distance) for i in range(keys + 1))
    return ways / comb(256, distance)


def _draw(n: int, radius: int) -> tuple[int, int]:
    """Return bits of a key and number of shuffles that reach the recall at the least cost on n random hashes."""

    def shuffles(bits: int) -> int:
        missed = _missed(bits, radius)
        return 1 if missed <= 0 else ceil(log(1 - _RECALL) / log(missed))

    def cost(bits: int) -> float:
        return shuffles(bits) * (256 // bits) * (_PARTITION * n + n * n / float(2 << bits))

    best = min(range(8, 33), key=cost)
    return best, shuffles(best)


def _drawn_masks(n: int, radius: int) -> _Words:
    """Return the (tables, 4) masks of 256-bit hashes, one of no bits where all are compared."""
    if n <= _EXACT:
        return np.zeros((1, 4), np.uint64)
    bits, shuffles = _draw(n, radius)
    masks = []
    for shuffle in range(shuffles):
        # by digest, not by a generator whose stream its library may change
        order = sorted(range(256), key=lambda bit: hashlib.blake2b(bytes([_SEED, shuffle, bit])).digest())
        for key in range(256 // bits):
            mask = sum(1 << bit for bit in order[key * bits : (key + 1) * bits])
            masks.append([mask >> (64 * word) & 0xFFFFFFFFFFFFFFFF for word in range(4)])
    return np.array(masks, np.uint64)


def _exact_masks(rows: _Words, radius: int) -> _Words:
    """Return radius + 1 disjoint masks of 64-bit hashes, or one of no bits where it is cheaper to compare all."""
    from . import hash_kernels as kernels  # it takes a second to import, and many more to compile for the first time

    none = np.zeros((1, 1), np.uint64)
    if len(rows) < 2:
        return none
    masks: _Words = kernels.divide(rows, none[0], radius + 1, _SAMPLE)
    return masks if kernels.pays(rows, masks) else none


def _join_table(rows: _Words, masks: _Words, j: int, radius: int, directory: Path | None, memory: int) -> _Words:
    """Return, sorted, the near pairs that agree under mask j and under none before it."""
    from . import hash_kernels as kernels

    with _room(len(rows), rows.shape[1], directory, memory) as (table, ids):
        ends = kernels.partition(rows, np.arange(len(rows), dtype=np.uint32), masks[j], table, ids)
        out, found = kernels.join_buckets(table, ids, ends, radius, masks[j], masks[:j], np.empty(1024, np.uint64), 0)
    pairs: _Words = out[:found].copy()
    pairs.sort()
    return pairs


@contextmanager
def _room(n: int, words: int, directory: Path | None, memory: int) -> Iterator[tuple[Any, Any]]:
    """Yield arrays for n rows and their numbers, in memory or in a file that vanishes with the process."""
    size = n * (8 * words + 4)
    if size <= memory:
        yield np.empty((n, words), np.uint64), np.empty(n, np.uint32)
        return
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        os.truncate(file.fileno(), size)
        reserve(file.fileno(), size)
        whole = np.asarray(np.memmap(file, np.uint8, shape=(size,)))
        yield whole[: 8 * words * n].view(np.uint64).reshape(n, words), whole[8 * words * n :].view(np.uint32)
