"""Malformed and odd inputs by the thousand, through whole runs: each has its outcome and leaves its neighbours alone.

    python benchmarks/hostile.py --json benchmarks/results/hostile.json

Inputs are drawn from all kinds of `tests/hostile*.py`, the seed of a draw being its number, and go through
`memfilter.run` in batches, each in a process of its own under a time limit.  Expected of every one is its exact
outcome: the code of the bad sample, the words of the refusal, or nothing wrong.  The neighbours' manifest rows and
bytes equal those of a run without it, counts reconcile, `verify` finds nothing, nothing is printed.  A batch that hangs
or dies is halved until the draw is found.  Beside it stands a shard of a million empty members.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hostile_images  # noqa: F401  (enters its kinds)
import hostile_samples  # noqa: F401
import hostile_shards  # noqa: F401
from environment import run_measured, write_result
from hostile import SAMPLES, SHARDS, Draw, block, run_on
from tqdm import tqdm

KINDS = [*SAMPLES, *SHARDS]


def draw(number: int) -> Draw:
    return Draw(KINDS[number % len(KINDS)], number)


def content(one: Draw) -> str:
    """Return a digest of what the draw plants or lays down."""
    made: Any = SHARDS[one.kind](one.random) if one.kind in SHARDS else SAMPLES[one.kind](one.random, "key")
    parts = [made.data, *made.side_cars.values()] if one.kind in SHARDS else [data for data, _ in made.members]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def child(start: int, stop: int) -> None:
    """Run one batch and print its faults."""
    draws = [draw(n) for n in range(start, stop)]
    with tempfile.TemporaryDirectory() as work:
        faults = run_on(draws, Path(work) / "inside" / "work")
    told = [[d and d.kind, d and d.seed, text[:1000]] for d, text in faults]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"faults": told, "contents": [content(d) for d in draws], "peak_mib": peak}))


def batch(start: int, stop: int, limit: float) -> dict[str, Any]:
    """Return what came of these draws; of a batch that hangs, dies or prints, which draw it was."""
    command = [sys.executable, __file__, "--child", str(start), str(stop)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        cause = done.stderr[-1000:] or (done.returncode and f"exit code {done.returncode}")
    except subprocess.TimeoutExpired:
        cause = f"no end after {limit} seconds"
    if not cause:
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    if stop - start == 1:
        return {"faults": [[draw(start).kind, start, cause]], "contents": [], "peak_mib": 0}
    middle = (start + stop) // 2
    halves = batch(start, middle, limit), batch(middle, stop, limit)
    found = {name: halves[0][name] + halves[1][name] for name in ("faults", "contents")}
    if not found["faults"]:  # only the two halves together do it
        found["faults"] = [[None, start, cause]]
    return {**found, "peak_mib": max(half["peak_mib"] for half in halves)}


def million_members(work: Path) -> dict[str, Any]:
    """Return time and peak memory of a run on a million empty members, of as many keys and of one."""
    results: dict[str, Any] = {}
    for name, keys in (("of a million keys", 1_000_000), ("of one key", 1)):
        (work / name).mkdir()
        with gzip.open(work / name / "0.tar.gz", "wb", 1) as f:
            for i in range(1_000_000):
                f.write(block(f"{i % keys:07}.jpg"))
            f.write(bytes(1024))
        done = run_measured(["run", str(work / name), "--out", str(work / f"{name}, out"), "--workers", "1"])
        results[name] = {**{k: done[k] for k in ("seconds", "peak_mib")}, "reconciled": done["lines"][-1]}
    return results


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--draws", type=int, default=10_000)
    arguments.add_argument("--batch", type=int, default=500)
    arguments.add_argument("--limit", type=float, default=300, help="seconds for a batch")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(*given.child)
        return
    started = time.perf_counter()
    faults: list[Any] = []
    contents: set[str] = set()
    slowest, peak = 0.0, 0
    with tqdm(total=given.draws, unit="draw", disable=None) as bar:
        for start in range(0, given.draws, given.batch):
            stop, before = min(start + given.batch, given.draws), time.perf_counter()
            result = batch(start, stop, given.limit)
            faults += result["faults"]
            contents.update(result["contents"])
            slowest, peak = max(slowest, time.perf_counter() - before), max(peak, result["peak_mib"])
            bar.set_postfix_str(f"{len(faults)} faults", refresh=False)
            bar.update(stop - start)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as work:
        million = million_members(Path(work))
    drawn = Counter(draw(n).kind for n in range(given.draws))
    write_result(
        {
            "draws": given.draws,
            "distinct_inputs": len(contents),
            "kinds": len(KINDS),
            "failures": len(faults),
            "faults": faults,
            "seconds": round(seconds, 1),
            "slowest_batch_seconds": round(slowest, 1),
            "draws_in_a_batch": given.batch,
            "peak_mib": peak,
            "a million empty members": million,
            "draws_of_kind": {kind: drawn[kind] for kind in KINDS},
            "target": "no failure in 10,000 draws",
        },
        given.json,
    )


if __name__ == "__main__":
    main()
