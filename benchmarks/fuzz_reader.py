"""Fuzz the reader and the signer: arbitrary bytes are refused as a shard, or come to good rows and bad ones.

    python benchmarks/fuzz_reader.py --json benchmarks/results/fuzz_reader.json

The engine `atheris` (`pip install atheris`) lets libFuzzer look for inputs that reach new lines of memfilter and of
Pillow's parsers; `mutations` changes inputs of the hostile corpus by seed.  Both start from
`tests/fuzzing.py`.
A finding is any exception but ShardError, a row without image or cause, an input that takes over 20 seconds, or memory
over 4 GiB.  Findings are kept in `--keep`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SECONDS, MEBIBYTES = 20, 4096


def kept(data: bytes, cause: str, folder: Path) -> None:
    """Keep an input that should not have done this, once for each cause."""
    name = re.sub(r"\W+", "-", cause)[:80]
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
        (folder / f"{name}.txt").write_text(traceback.format_exc())


def guarded(target: Any, folder: Path) -> Any:
    """Return the target, which keeps what raises instead of ending there."""

    def run(data: bytes) -> None:
        try:
            target(data)
        except Exception as e:
            place = traceback.extract_tb(e.__traceback__)[-1]
            kept(data, f"{type(e).__name__} {Path(place.filename).name} {place.lineno}", folder)

    return run


def by_atheris(folder: Path, corpus: Path, seconds: int) -> None:
    """Fuzz until the time is over; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["memfilter", "PIL"], enable_loader_override=False):
        from fuzzing import LARGEST, Target
    limits = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEBIBYTES}", f"-max_len={LARGEST}"]
    places = [f"-artifact_prefix={folder}/", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", "-seed=1", *places], guarded(Target(), folder))
    atheris.Fuzz()


def by_mutations(folder: Path, corpus: Path, seconds: int) -> None:
    """Fuzz until the time is over, and print the number of executions as libFuzzer does."""
    import numpy as np
    from fuzzing import Target, mutated

    run, inputs = guarded(Target(), folder), [path.read_bytes() for path in sorted(corpus.iterdir())]
    started = time.monotonic()
    count = 0
    while (before := time.monotonic()) - started < seconds:
        data = mutated(np.random.default_rng(count), inputs)
        run(data)
        count += 1
        if time.monotonic() - before > SECONDS:
            kept(data, f"hang {count}", folder)
    print(f"stat::number_of_executed_units: {count}", file=sys.stderr)


def fuzz(engine: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Return what an engine came to, in a process of its own."""
    from fuzzing import seeds

    started_from, before = seeds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(started_from):
            (Path(corpus) / f"{i:04}").write_bytes(data)
        command = [sys.executable, __file__, "--engines", engine, "--seconds", str(seconds)]
        done = subprocess.run([*command, "--child", folder, corpus], stderr=subprocess.PIPE, text=True, check=False)
        at_the_end = len(list(Path(corpus).iterdir()))
    stats = dict(re.findall(r"^stat::(\w+): *(\d+)", done.stderr, re.MULTILINE))
    if not stats:
        raise SystemExit(done.stderr[-3000:])
    covered = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)
    return {
        "executions": int(stats["number_of_executed_units"]),
        "seconds": round(time.perf_counter() - before, 1),
        "inputs_started_from": len(started_from),
        "inputs_at_the_end": at_the_end,
        "coverage_and_features": [int(n) for n in covered[-1]] if covered else None,
    }


def main() -> None:
    engines = ["atheris", "mutations"] if importlib.util.find_spec("atheris") else ["mutations"]
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--engines", nargs="+", choices=["atheris", "mutations"], default=engines)
    arguments.add_argument("--seconds", type=int, default=300, help="of each engine")
    arguments.add_argument("--keep", type=Path, help="a folder for inputs that are findings")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        {"atheris": by_atheris, "mutations": by_mutations}[given.engines[0]](*given.child, given.seconds)
        return
    from environment import write_result

    with tempfile.TemporaryDirectory() as work:
        folder = given.keep or Path(work)
        folder.mkdir(parents=True, exist_ok=True)
        found = {engine: fuzz(engine, given.seconds, folder) for engine in given.engines}
        findings = sorted(p.name for p in folder.iterdir() if p.suffix != ".txt")
    result: dict[str, object] = {
        "executions": sum(one["executions"] for one in found.values()),
        "engines": found,
        "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "findings": findings,
        "target": "no finding in 100,000 executions",
    }
    write_result(result, given.json)


if __name__ == "__main__":
    main()
