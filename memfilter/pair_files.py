"""Pairs of rows on the disk: written in runs that are sorted, then merged a bounded number at a time.

So a join holds few of its pairs in memory, though one heavy group has millions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .records import Indices
from .store import replacing

PAIR = np.dtype([("key", "<u8"), ("distance", "<f4")])
"""The key of rows a < b is a << 32 | b."""

_RUN = 1 << 21  # pairs that are sorted together


def pair_keys(a: Indices, b: Indices) -> npt.NDArray[np.uint64]:
    """Return the keys of pairs of rows, which need not be in order."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    key: npt.NDArray[np.uint64] = np.minimum(a, b) << np.uint64(32) | np.maximum(a, b)
    return key


def write_runs(path: Path, batches: Iterable[npt.NDArray[Any]]) -> None:
    """Write pairs as runs of one length, the last shorter, each of them sorted."""
    held, count = [np.empty(0, PAIR)], 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for pairs in batches:
            held.append(pairs)
            count += len(pairs)
            while count >= _RUN:
                joined = np.concatenate(held)
                run = joined[:_RUN]
                run[np.argsort(run["key"], kind="stable")].tofile(file)
                held, count = [joined[_RUN:]], count - _RUN
        _sorted(np.concatenate(held)).tofile(file)
        reach_disk(file)


def merge(paths: list[Path], rows: int, folder: Path) -> None:
    """Write the keys of all pairs, sorted and each once, and their distances, a bounded number at a time."""
    sizes = [path.stat().st_size // PAIR.itemsize for path in paths]
    runs = [(p, i, min(i + _RUN, n)) for p, n in zip(paths, sizes, strict=True) for i in range(0, n, _RUN)]
    # pairs whose first rows share their upper 16 bits are always sorted together
    shift = np.uint64(32 + max((rows - 1).bit_length() - 16, 0))
    counts = np.zeros(1 << 16, np.int64)
    for run in runs:
        counts += np.bincount((_read(*run)["key"] >> shift).astype(np.int64), minlength=1 << 16)
    cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _RUN)) + 1
    edges = cuts.astype(np.uint64) << shift
    places = [
        np.r_[start, start + np.searchsorted(_read(path, start, end)["key"], edges), end] for path, start, end in runs
    ]
    with (
        replacing(folder / "keys.u8") as keys,
        replacing(folder / "distance.f4") as distances,
        open(keys, "wb") as keys_file,
        open(distances, "wb") as distances_file,
    ):
        for i in range(len(cuts) + 1):
            held = [_read(path, p[i], p[i + 1]) for (path, _, _), p in zip(runs, places, strict=True)]
            part = _sorted(np.concatenate([np.empty(0, PAIR), *held]))
            np.ascontiguousarray(part["key"]).tofile(keys_file)
            np.ascontiguousarray(part["distance"]).tofile(distances_file)
        reach_disk(keys_file)
        reach_disk(distances_file)


def _read(path: Path, start: int, end: int) -> npt.NDArray[Any]:
    pairs: npt.NDArray[Any] = np.fromfile(path, PAIR, end - start, offset=start * PAIR.itemsize)
    return pairs


def mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    """Return a file of numbers, memory-mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def reach_disk(file: IO[bytes]) -> None:
    """Return when the file is on the disk: pairs do not tell that some are missing, so that a name must mean all."""
    file.flush()
    os.fsync(file.fileno())


def _sorted(pairs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return pairs in the order of their keys, each once."""
    keys = pairs["key"].copy()
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    distinct: npt.NDArray[Any] = pairs[order[np.r_[True, keys[1:] != keys[:-1]][: len(keys)]]]
    return distinct
