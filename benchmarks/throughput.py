"""Signatures against imagededup's `encode_images` on the same real photos, on one core, in one run.

    python benchmarks/throughput.py ../shared/data/photos --json benchmarks/results/throughput.json

Both sides start from files on a warm disk cache: imagededup from a folder of images, memfilter from the tars.  Rounds
alternate, and the medians are compared.  imagededup is called as its users call it, with one encoding process, and as
a plain loop over `encode_image`, without its process pool; the ratio quoted is against the faster of the two.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from environment import write_result

from memfilter import Config
from memfilter.signatures import hasher, sign
from memfilter.source import find_shards


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shards", type=Path)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    logging.disable(logging.INFO)
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as work:
        result = measure(given.shards, Path(work), given.rounds)
    write_result(result, given.json)


def measure(folder: Path, work: Path, rounds: int) -> dict[str, object]:
    shards, _ = find_shards([str(folder)])
    (work / "images").mkdir()
    count = 0
    for shard in shards:
        with tarfile.open(shard.url) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    source = tar.extractfile(member)
                    assert source
                    (work / "images" / f"{count:06}.jpg").write_bytes(source.read())
                    count += 1
    files = sorted((work / "images").iterdir())
    theirs = hasher("phash")

    def ours(encoder: str | None) -> Callable[[], None]:
        config = Config.parse({"images": {"encoder": encoder}})
        return lambda: [sign(s, work / "signatures" / s.name, config) for s in shards] and None

    arms: dict[str, Callable[[], object]] = {
        "imagededup encode_images": lambda: theirs.encode_images(str(work / "images"), num_enc_workers=1),  # type: ignore[attr-defined]
        "imagededup encode_image in a loop": lambda: [theirs.encode_image(image_file=f) for f in files],  # type: ignore[call-arg]
        "memfilter digest + hash + caption": ours(None),
        "memfilter with the embedding": ours("builtin"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    # the first round warms up; each round's ratio is of times taken next to one another
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    theirs_best = [
        min(times) for times in zip(*(t for n, t in seconds.items() if n.startswith("imagededup")), strict=True)
    ]
    ratios = {
        name: [theirs / ours for theirs, ours in zip(theirs_best[1:], times[1:], strict=True)]
        for name, times in seconds.items()
        if name.startswith("memfilter")
    }
    return {
        "images": count,
        "rounds": rounds,
        "cores": 1,
        "milliseconds_per_image": {name: round(1000 * m / count, 3) for name, m in medians.items()},
        "times_faster_than_the_faster_imagededup": {n: round(statistics.median(r), 2) for n, r in ratios.items()},
        "range_over_rounds": {n: [round(min(r), 2), round(max(r), 2)] for n, r in ratios.items()},
        "target": {"memfilter digest + hash + caption": 3.0, "memfilter with the embedding": 1.5},
    }


if __name__ == "__main__":
    main()
