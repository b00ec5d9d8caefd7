"""The look-up file: where each sample's row is and what it weighs, sorted by uid, memory-mapped by all who read it."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import RunError, in_one_line
from .records import Floats, Ints
from .store import check_file, replacing

_HALVES = Struct(">QQ")
_BITS = 16
_SHIFT = 64 - _BITS


def write_lookup(path: Path, uids: pa.Array, columns: dict[str, npt.NDArray[Any]]) -> None:
    """Write the columns sorted by uid, a fixed-size binary of 16 bytes; rows of one uid stay in their order."""
    halves = np.frombuffer(uids.buffers()[1], ">u8", 2 * len(uids), uids.offset * 16).astype(np.uint64)
    high, low = halves[::2], halves[1::2]
    order = np.lexsort((low, high))
    columns = {name: column[order] for name, column in {"high": high, "low": low, **columns}.items()}
    batch = pa.record_batch(columns)
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as writer:
        writer.write_batch(batch)


class Lookup:
    """An opened look-up file.  A sample's place is its row there; -1 is that of no sample.

    `online` are places, sorted, that training masked: their weights are 0.
    """

    def __init__(self, path: Path, online: Ints | None = None) -> None:
        try:
            check_file(path)
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, pa.ArrowException) as e:
            raise RunError(f"{path}: missing or damaged ({in_one_line(e)}); run the same command again") from e
        # to_numpy() would import pandas, 25 MB in each worker
        self.columns: dict[str, npt.NDArray[Any]] = {n: np.from_dlpack(batch[n]) for n in batch.schema.names}
        # as memory views they give Python's own numbers: bisect takes half the time that numpy needs for one value
        high = self.columns["high"]
        starts = np.searchsorted(high, np.arange(1 << _BITS, dtype=np.uint64) << np.uint64(_SHIFT))
        self._starts = np.append(starts, len(high)).data  # of the uids by their first bits
        self._high, self._low = self.columns["high"].data, self.columns["low"].data
        self._weight, self._pool_weight = self.columns["weight"].data, self.columns["pool_weight"].data
        self._online = np.empty(0, np.int64) if online is None else online

    def place(self, uid: bytes) -> int:
        """Return the place of the first sample with this uid (16 bytes)."""
        high, low = _HALVES.unpack(uid)
        start = high >> _SHIFT
        place = bisect_left(self._high, high, self._starts[start], self._starts[start + 1])
        while place < len(self._high) and self._high[place] == high:
            if self._low[place] == low:
                return place
            place += 1
        return -1

    def places(self, uids: bytes) -> Ints:
        """Return the places (N,) of the first samples with these uids, given one after another in 16 N bytes."""
        halves = np.frombuffer(uids, ">u8").astype(np.uint64)
        high, low = halves[::2], halves[1::2]
        order = np.argsort(high)  # numpy's search goes on from where the last one ended
        place, found = np.empty(len(high), np.int64), np.full(len(high), -1)
        place[order] = np.searchsorted(self.columns["high"], high[order])
        left = np.arange(len(high))
        while len(left := left[place[left] < len(self._high)]):
            left = left[self.columns["high"][place[left]] == high[left]]
            equal = self.columns["low"][place[left]] == low[left]
            found[left[equal]] = place[left[equal]]
            left = left[~equal]
            place[left] += 1
        return found

    def weight(self, place: int, pooled: bool = False) -> float:
        """Return the loss weight of the sample at a place, or that where it trains on its pooled captions."""
        if len(self._online):
            at = int(np.searchsorted(self._online, place))
            if at < len(self._online) and self._online[at] == place:
                return 0.0
        weight: float = (self._pool_weight if pooled else self._weight)[place]
        return weight

    def weights(self, places: Ints) -> Floats:
        """Return the loss weights (N,) of the samples at places, float32."""
        found: Floats = np.where(np.isin(places, self._online), np.float32(0), self.columns["weight"][places])
        return found

    def mitigate(self, place: int) -> bool:
        """Tell whether the caption of the sample at a place is handed over to mitigation in training."""
        return bool(self.columns["mitigate"][place])
