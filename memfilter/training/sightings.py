"""How often each sample was seen and masked while training: what an online mask learned, to be kept in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

_SCHEMA = pa.schema([("shard", pa.string()), ("key", pa.string()), ("seen", pa.int64()), ("masked", pa.int64())])
_PENDING = 1 << 16  # rows, before they are added up


class Sightings:
    """Counts of each sample, for `Manifest.with_online`; each process has its own and writes a file of its own."""

    def __init__(self) -> None:
        self._table = _SCHEMA.empty_table()
        self._shards: list[str] = []
        self._keys: list[str] = []
        self._weights: list[torch.Tensor] = []

    def add(self, shards: Sequence[str], keys: Sequence[str], weights: torch.Tensor) -> None:
        """Count a batch: its samples' shards (names or URLs), keys, and online weights (B,), 0 for masked.

        The weights stay on their device until some ten thousand samples, or a table, are due.  Raises ValueError for
        lengths that differ.
        """
        if not len(shards) == len(keys) == len(weights):
            raise ValueError(f"{len(shards)} shards, {len(keys)} keys and {len(weights)} weights: one a sample of each")
        self._shards += shards
        self._keys += keys
        self._weights.append(weights.detach())
        if len(self._keys) >= max(_PENDING, len(self._table)):
            self.table()

    def table(self) -> pa.Table:
        """Return one row a sample, sorted by shard and key: `shard`, `key`, `seen` and `masked`."""
        if self._keys:
            masked = (torch.cat(self._weights) == 0).long().cpu().numpy()
            new = [self._shards, self._keys, [1] * len(self._keys), masked]
            rows = pa.concat_tables([self._table, pa.table(new, schema=_SCHEMA)])
            counts = rows.group_by(["shard", "key"]).aggregate([("seen", "sum"), ("masked", "sum")])
            columns = [counts[name] for name in ("shard", "key", "seen_sum", "masked_sum")]
            table = pa.table(columns, schema=_SCHEMA).sort_by([("shard", "ascending"), ("key", "ascending")])
            self._table, self._shards, self._keys, self._weights = table, [], [], []
        return self._table

    def save(self, path: str | Path) -> None:
        """Write the table as parquet; what stands there is replaced when it is whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        pq.write_table(self.table(), unfinished)
        os.replace(unfinished, path)
