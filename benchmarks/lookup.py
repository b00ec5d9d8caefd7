"""Look-ups of weights in a manifest of ten million samples: how many a second, and what they take of memory.

    python benchmarks/lookup.py --json benchmarks/results/lookup.json

The look-up file is written by the function that a run writes it with.  One and two worker processes, which start with
nothing of it, look samples up in it: one by one in the stage of `Manifest.attach`, in the order of shards and in random
order, and in batches of 1,000 by `Manifest.weigh`.  Only the stage is timed, not the making of samples, by the clock
and by the processor's time: where others keep the machine busy, as `load_average` tells, the clock measures them.  The
private memory is what a worker's unique set size has grown by when all is done; this process has read the file too and
keeps it mapped, so that its pages count as the shared ones that they are.  Beside it stands a Python dictionary with
the same weights, read from a parquet file of shards, keys and weights.  It takes some minutes and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from environment import write_result

from memfilter import Config, Manifest
from memfilter.lookup import write_lookup
from memfilter.source import sample_uid

ROOT = "/data"  # where the shards are said to lie
DIGEST = "of no run"
PER_SHARD = 10_000  # samples
LOOKUPS = 500_000  # a worker and order
CHUNK = 10_000  # samples that are made at once
BATCH = 1000  # rows, as datasets' map takes them


def shard_name(shard: int) -> str:
    return f"{shard // 100:05}/{shard:05}.tar"


def name(sample: int) -> tuple[str, str]:
    """Return shard and key as img2dataset names them."""
    shard, index = divmod(sample, PER_SHARD)
    return shard_name(shard), f"{shard:05}{index:04}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write(path, given.rows)
        manifest = opened(path, given.rows)
        for column in manifest.lookup.columns.values():
            column.max()  # the pages are in memory, and this process maps them
        result: dict[str, object] = {
            "rows": given.rows,
            "lookup_mib": mib((path / "manifest" / "lookup.arrow").stat().st_size),
            "lookups": LOOKUPS,
            "load_average": os.getloadavg()[0],
            "1 worker": measure(path, given.rows, 1),
            "2 workers": measure(path, given.rows, 2),
            "dictionary": measure(path, given.rows, 1, with_dictionary)[0],
        }
    write_result(result, given.json)


def mib(size: float) -> float:
    return round(size / 2**20, 1)


def write(path: Path, rows: int) -> None:
    """Write the look-up file and the parquet file."""
    weights = np.random.default_rng(0).integers(0, 2, rows).astype(np.float32)
    uids = b"".join(sample_uid(shard, key.encode()) for shard, key in map(name, range(rows)))
    columns = {
        "weight": weights,
        "pool_weight": weights,
        "mitigate": np.zeros(rows, np.uint8),
        "shard": (np.arange(rows) // PER_SHARD).astype(np.int32),
        "row": (np.arange(rows) % PER_SHARD).astype(np.int32),
    }
    array = pa.Array.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(uids)])
    write_lookup(path / "manifest" / "lookup.arrow", array, columns)
    (path / "manifest" / "manifest.json").write_text(DIGEST)
    shards, keys = zip(*map(name, range(rows)), strict=True)
    table = pa.table({"shard": pa.array(shards).dictionary_encode(), "key": keys, "weight": weights})
    pq.write_table(table, path / "table.parquet")


def opened(path: Path, rows: int) -> Manifest:
    shards = [{"name": shard_name(i), "bytes": None} for i in range(-(-rows // PER_SHARD))]
    return Manifest(path, {"config": Config().model_dump(mode="json"), "shards": shards, "digest": DIGEST}, ROOT)


def measure(path: Path, rows: int, workers: int, work: Callable[..., Any] | None = None) -> list[dict[str, Any]]:
    """Return what each of some worker processes found, all at work at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=work or with_manifest, args=(path, rows, seed, barrier, found))
        for seed in range(workers)
    ]
    for process in processes:
        process.start()
    results = [found.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return results


def with_manifest(path: Path, rows: int, seed: int, barrier: Any, found: Any) -> None:
    in_order, at_random = orders(rows, seed)
    empty = private()
    barrier.wait()
    manifest = opened(path, rows)
    stage, weigh = manifest.attach(), manifest.weigh()
    rates = {
        "attach, in order": rate(partial(attached, stage), in_order),
        "attach, at random": rate(partial(attached, stage), at_random),
        "batches, in order": rate(partial(batched, weigh), in_order),
        "batches, at random": rate(partial(batched, weigh), at_random),
    }
    found.put({"keys_per_second": rates, "private_mib": mib(private() - empty)})
    barrier.wait()


def with_dictionary(path: Path, rows: int, seed: int, barrier: Any, found: Any) -> None:
    in_order, at_random = orders(rows, seed)
    empty, started = private(), time.perf_counter()
    weights: dict[tuple[str, str], float] = {}
    names: dict[str, str] = {}  # each shard's URL once
    for batch in pq.ParquetFile(path / "table.parquet").iter_batches(100_000):
        shards, keys, values = (column.to_pylist() for column in batch.columns)
        shards = [names.setdefault(shard, f"{ROOT}/{shard}") for shard in shards]
        weights.update(zip(zip(shards, keys, strict=True), values, strict=True))
    loaded = time.perf_counter() - started

    def looked_up(samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            sample["loss_weight"] = weights[sample["__url__"], sample["__key__"]]

    rates = {"in order": rate(looked_up, in_order), "at random": rate(looked_up, at_random)}
    found.put({"seconds_to_load": round(loaded, 1), "keys_per_second": rates, "private_mib": mib(private() - empty)})


def orders(rows: int, seed: int) -> tuple[Any, Any]:
    """Return samples as they stand in the shards, another worker's elsewhere, and samples at random."""
    first = seed * LOOKUPS % rows
    return np.arange(first, first + LOOKUPS) % rows, np.random.default_rng(seed).integers(0, rows, LOOKUPS)


def private() -> int:
    """Return the bytes that this process alone holds."""
    return int(psutil.Process(os.getpid()).memory_full_info().uss)


def attached(stage: Any, samples: list[dict[str, Any]]) -> None:
    for _ in stage(samples):
        pass


def batched(weigh: Any, samples: list[dict[str, Any]]) -> None:
    for start in range(0, len(samples), BATCH):
        rows = samples[start : start + BATCH]
        weigh({"__url__": [row["__url__"] for row in rows], "__key__": [row["__key__"] for row in rows]})


def rate(work: Callable[[list[dict[str, Any]]], None], order: Any) -> dict[str, int]:
    """Return the keys a second by the processor's time and by the clock."""
    seconds = processor = 0.0
    for samples in chunks(order):
        started, used = time.perf_counter(), time.process_time()
        work(samples)
        seconds, processor = seconds + time.perf_counter() - started, processor + time.process_time() - used
    return {"processor": round(len(order) / processor), "clock": round(len(order) / seconds)}


def chunks(order: Any) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(order), CHUNK):
        names = map(name, order[start : start + CHUNK].tolist())
        yield [{"__key__": key, "__url__": f"{ROOT}/{shard}", "jpg": b""} for shard, key in names]


if __name__ == "__main__":
    main()
