"""Core-seconds and memory a sample of the steps that see all samples at once, for `benchmarks/scale.md`.

    python benchmarks/scale.py --json benchmarks/results/scale.json

Signature parts without pixels are made up: random digests and hashes, no embeddings, captions of ten words of which one
in five comes back.  Each step is timed on them; `mib` is what the process has grown by at its peak, once all is held.
It takes half a minute.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from environment import write_result

from memfilter import Config, manifest
from memfilter.caption_groups import caption_keepers
from memfilter.captions import fingerprint
from memfilter.decisions import decide
from memfilter.edges import find_candidates
from memfilter.groups import distinct_captions, group, load_samples
from memfilter.records import Shard, signature_schema
from memfilter.store import Store, write_table

T = TypeVar("T")

PICTURE = 3500
"""Bytes of a stored picture: the mean of 60 photos."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=200_000)
    arguments.add_argument("--shard", type=int, default=10_000, help="samples in a shard")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    count = given.samples // given.shard
    shards = [Shard(f"{i:05}.tar", "", None) for i in range(count)]
    config = Config.parse({"images": {"encoder": None}})
    steps: dict[str, float] = {}

    def timed(name: str, step: Callable[[], T]) -> T:
        started = time.process_time()
        result = step()
        steps[name] = round((time.process_time() - started) / (count * given.shard) * 1e6, 2)
        return result

    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for i, shard in enumerate(shards):
            write_table(store.signatures(shard.name), signatures(given.shard, i), f"part {i}")
        parts = sum(p.stat().st_size for p in Path(folder).rglob("*.parquet"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        samples = timed("load", lambda: load_samples(shards, store))
        candidates = timed("hash join", lambda: find_candidates(samples, store, config))
        captions, caption = timed("captions", lambda: distinct_captions(samples, store))
        keepers = timed("caption groups", lambda: caption_keepers(samples, captions, caption, store, config))
        groups = timed("grouping", lambda: group(samples, candidates, caption, keepers, store, config))
        decisions = timed("decisions", lambda: decide(samples, groups, captions, None, None, config.policy))
        timed("manifest", lambda: manifest.write_parts(store, samples, groups, decisions, None, None, False))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        written = sum(p.stat().st_size for p in store.manifest.rglob("*") if p.is_file())
    result = {
        "samples": count * given.shard,
        "core_microseconds_a_sample": steps,
        "bytes_a_sample": {
            "memory": round(1024 * grown / (count * given.shard)),
            "signature part without embedding": round(parts / (count * given.shard)),
            "manifest and look-up file": round(written / (count * given.shard)),
        },
    }
    write_result(result, given.json)


def signatures(n: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    words = np.array([f"word{i}" for i in range(5000)])
    captions = [" ".join(words[w]) for w in random.integers(0, 5000, (n, 10))]
    captions = [f"a photo of a {words[i % 50]}" if i % 5 == 0 else c for i, c in enumerate(captions)]
    noise = random.bytes(n * (32 + PICTURE))
    side = 32 + PICTURE
    columns = {
        "uid": [noise[i * side : i * side + 16] for i in range(n)],
        "index": np.arange(n, dtype=np.int32),
        "key": [f"{seed:05}{i:06}" for i in range(n)],
        "bad": [None] * n,
        "detail": [None] * n,
        "digest": [noise[i * side + 16 : i * side + 32] for i in range(n)],
        "hash": random.integers(0, 2**64, n, np.uint64),
        "width": random.integers(200, 2000, n).astype(np.int32),
        "height": random.integers(200, 2000, n).astype(np.int32),
        "bytes": random.integers(10_000, 300_000, n),
        "blank": np.zeros(n, bool),
        "look": [None] * n,
        "picture": [noise[i * side + 32 : (i + 1) * side] for i in range(n)],
        "caption": captions,
        "fingerprint": [fingerprint(c) for c in captions],
        "captions": [None] * n,
    }
    return pa.table(columns, schema=signature_schema(0))


if __name__ == "__main__":
    main()
