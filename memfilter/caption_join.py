"""Groups of captions around keepers, by template, by MinHash with the true Jaccard index, and by given edges.

Texts are visited in their order.  One that is near earlier keepers joins the first of them, any other becomes a keeper;
so only keepers are ever compared with, and ten thousand variants of one caption cost ten thousand comparisons, not the
square.  MinHash (Broder 1997) and banding (Indyk and Motwani 1998) find the keepers that a text is compared with; every
edge is verified by the Jaccard index of the two sets of features (`caption_kernels.features`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, floor, log, sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from .records import Floats, Ints, Pairs
from .store import replacing

_EXACT = 1024  # texts up to which each is compared with every keeper
_RECALL = 0.995  # the chance that two texts just at the threshold share a band
_MOST_BANDS = 32
_MOST_ROWS = 8
_CHUNK = 1 << 14
_PART = 16  # chunks in one file
_AHEAD = 8  # chunks that are signed, or being signed, before the visit takes them

NO_EDGES: Pairs = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

METHOD = "minhash-1"
"""Names what decides which keepers are found, beside texts and arguments."""


@dataclass(frozen=True)
class Banding:
    """Bands of so many MinHashes each; none where all are compared."""

    bands: int
    rows: int

    def recall(self, jaccard: float) -> float:
        """Return the chance that two texts of this Jaccard index share a band."""
        return 1.0 if not self.rows else float(1 - (1 - jaccard**self.rows) ** self.bands)


def banding(texts: int, jaccard: float | None) -> Banding:
    """Return the banding that meets the fewest unlike texts at 0.995 recall at the threshold, with 32 bands or less."""
    if jaccard is None:
        return Banding(0, 0)
    if texts <= _EXACT:
        return Banding(1, 0)
    for rows in range(_MOST_ROWS, 1, -1):
        share = jaccard**rows
        bands = ceil(log(1 - _RECALL) / log(1 - share)) if share < 1 else 1
        if bands <= _MOST_BANDS:
            return Banding(bands, rows)
    return Banding(ceil(log(1 - _RECALL) / log(1 - jaccard)), 1)


@dataclass(frozen=True)
class Joined:
    """Of each text its keeper, itself for one, and method (a position in CAPTION_METHODS) and distance of the edge."""

    keeper: Ints
    method: npt.NDArray[np.int8]
    distance: Floats  # 1 - Jaccard index, or as the given edges have it; 0 by template
    crowded: npt.NDArray[np.bool_]  # compared with the likelier keepers alone, as hundreds were alike but not near


def caption_join(
    texts: pa.LargeStringArray,
    template: Ints,
    jaccard: float | None,
    edges: Pairs,
    folder: Path | None = None,
    threads: int | None = None,
) -> Joined:
    """Return the groups of these normalised texts, which come in the order in which they are to be visited.

    `template` numbers the class of each text from 0, -1 for none.  Texts are near from this Jaccard index on, and where
    `edges` (a < b) says so; None compares nothing.  Up to 1,024 texts every keeper is compared with; beyond, one at the
    threshold is found with the chance `banding(n, jaccard).recall(jaccard)`, at least 0.995, and about every other one
    by texts that are `crowded`, whose time would otherwise grow as the square.  It takes about 400 bytes a text beside
    the texts.  The parts that are finished are kept in `folder`, from which the same call goes on, to the same result.
    """
    n = len(texts)
    visitor = _Visitor(texts, template, jaccard, edges)
    parts = [(start, min(start + _CHUNK * _PART, n)) for start in range(0, n, _CHUNK * _PART)]
    with (
        ThreadPoolExecutor(threads or _cores()) as pool,
        tqdm(total=n, desc="captions", unit="caption", unit_scale=True, disable=None) as bar,
    ):
        try:
            for number, (first, end) in enumerate(parts):
                path = folder and folder / f"{number:05}.npy"
                known = path is not None and visitor.take(first, end, path)
                for start, keys in visitor.signed(first, end, pool):
                    visitor.visit(start, keys, known)
                    bar.update(len(keys))
                if path is not None and not known:
                    visitor.leave(first, end, path)
        finally:
            pool.shutdown(cancel_futures=True)
    return Joined(*visitor.found)


def buckets(texts: pa.LargeStringArray, jaccard: float) -> Ints:
    """Return the bucket of each text in each band, (N, bands): texts that share one are compared."""
    visitor = _Visitor(texts, np.full(len(texts), -1), jaccard, NO_EDGES)
    return visitor.sign(0, len(texts))


class _Visitor:
    """What a visit knows of the texts behind it."""

    def __init__(self, texts: pa.LargeStringArray, template: Ints, jaccard: float | None, edges: Pairs) -> None:
        from . import caption_kernels as kernels  # only now: it brings a compiler along

        n = len(texts)
        self.kernels, self.jaccard, self.banding = kernels, jaccard or 0.0, banding(n, jaccard)
        data, ends = _text_bytes(texts)
        self.texts = kernels.Texts(data, ends, kernels.powers(int(np.diff(ends).max(initial=0))))
        order = np.lexsort((edges[0], edges[1]))
        near_ends = np.r_[0, np.cumsum(np.bincount(edges[1], minlength=n))].astype(np.int64)
        near, apart = edges[0][order].astype(np.int64), edges[2][order].astype(np.float32)
        self.given = kernels.Given(template, near_ends, near, apart)
        bands, rows = self.banding.bands, self.banding.rows
        bits = max((n - 1).bit_length(), 1) if rows else 1
        self.shift = 64 - bits
        hashes = max(bands * rows, kernels.SKETCH)
        self.factors = np.random.default_rng(1).integers(0, 1 << 64, hashes, np.uint64)
        # texts at the threshold agree in so many places, but for one in 10^5, or in 10^9 where all are compared
        spread = (4.3 if rows else 6) * sqrt(self.jaccard * (1 - self.jaccard) / kernels.SKETCH)
        least = floor(kernels.SKETCH * (self.jaccard - spread))
        self.agreeing = (least, floor(kernels.SKETCH * self.jaccard) if rows else least)
        self.keepers = kernels.Keepers(
            of_template=np.full(int(template.max(initial=-1)) + 1, -1, np.int64),
            heads=np.full((bands, 1 << bits), -1, np.int32),
            chain=np.empty((n, bands), np.int32),
            sizes=np.zeros(n, np.int32),
            seen=np.full(n, -1, np.int32),
            sketch=np.zeros((n if bands else 0, kernels.SKETCH), np.uint8),
        )
        keeper, method, distance = np.full(n, -1, np.int64), np.zeros(n, np.int8), np.zeros(n, np.float32)
        self.found = kernels.Found(keeper, method, distance, np.zeros(n, np.bool_))

    def signed(self, first: int, end: int, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Ints]]:
        """Yield chunks of buckets in their order, signed by some threads ahead of the visit."""
        ahead: deque[tuple[int, Future[Ints]]] = deque()
        for start in range(first, end, _CHUNK):
            ahead.append((start, pool.submit(self.sign, start, min(start + _CHUNK, end))))
            if len(ahead) > _AHEAD:
                begun, keys = ahead.popleft()
                yield begun, keys.result()
        for begun, keys in ahead:
            yield begun, keys.result()

    def sign(self, start: int, end: int) -> Ints:
        keys = np.zeros((end - start, self.banding.bands), np.int64)
        if self.banding.bands:
            sketch = self.keepers.sketch[start:end]
            self.kernels.sign(self.texts, start, self.banding.rows, self.shift, self.factors, keys, sketch)
        return keys

    def visit(self, start: int, keys: Ints, known: bool) -> None:
        """Visit the texts from `start` on, or, where their keepers are known, put these into their buckets."""
        self.kernels.visit(
            *(self.texts, start, keys, self.jaccard, self.agreeing), self.given, self.keepers, self.found, known
        )

    def take(self, first: int, end: int, path: Path) -> bool:
        """Take over what an earlier visit found of these texts, and tell whether there was any."""
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        for name, column in self.found._asdict().items():
            column[first:end] = part[name]
        return True

    def leave(self, first: int, end: int, path: Path) -> None:
        """Write what was found of these texts, whole or not at all."""
        columns = self.found._asdict()
        part = np.empty(end - first, [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            part[name] = column[first:end]
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, part)


def _text_bytes(texts: pa.LargeStringArray) -> tuple[npt.NDArray[np.uint8], Ints]:
    """Return the bytes of the texts one behind the other, and where each ends; no copy is made."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * 8)
    return np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8), ends


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
