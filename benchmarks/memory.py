"""Peak memory against the number of shards, and against the length of one shard.

    python benchmarks/memory.py ../shared/data --json benchmarks/results/memory.json

Shards of 600 real photos of 64x64, 3 of them against 30, and one shard of 100 photos at natural size against one of
1,000 (the photos repeated with another last byte).  One process, so that its peak is the run's.  Beside the difference
stands the size of the tables that the extra samples fill.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from environment import run_measured, write_result

from memfilter.store import read_table


def photos(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                    yield file.read()


def write(path: Path, images: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            for suffix, content in (("jpg", data), ("txt", f"photo {path.stem} {i}".encode())):
                member = tarfile.TarInfo(f"{path.stem}{i:06}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def measure(folder: Path, out: Path) -> dict[str, object]:
    done = run_measured(["run", str(folder), "--out", str(out), "--workers", "1"])
    tables = sum(read_table(path).nbytes for path in out.glob("signatures/**/*.parquet"))
    return {
        "seconds": done["seconds"],
        "peak_mib": done["peak_mib"],
        "tables_mib": round(tables / 2**20, 1),
        "input_mib": round(sum(p.stat().st_size for p in folder.glob("*.tar")) / 2**20, 1),
        "reconciled": done["lines"][-1],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        small = list(photos(given.data / "unlabelled"))
        for count in (3, 30):
            for i in range(count):
                write(work / f"{count}" / f"{i:05}.tar", small[600 * i : 600 * (i + 1)])
            result[f"{count} shards of 600 small photos"] = measure(work / f"{count}", work / f"out{count}")
        large = list(photos(given.data / "photos"))
        for count in (100, 1000):
            images = [large[i % len(large)] + bytes([i // len(large)]) for i in range(count)]
            write(work / f"large{count}" / "00000.tar", images)
            result[f"one shard of {count} large photos"] = measure(work / f"large{count}", work / f"out-large{count}")
    write_result(result, given.json)


if __name__ == "__main__":
    main()
