"""Signatures against imagededup's `encode_images` on the same real photos, on one core, in one run.

    python benchmarks/throughput.py ../shared/data/photos --json benchmarks/results/throughput.json

Both sides start from files on a warm disk cache: imagededup from a folder of images, memfilter from the tars.
imagededup is called as its users call it, with one encoding process, and as a plain loop over `encode_image`, which
spares it its process pool.  The four take turns; quoted are medians over the rounds of ratios within a round.
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
from memfilter.shards import find_shards
from memfilter.signatures import hasher, sign


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
        "imagededup encode_images": lambda: theirs.encode_images(str(work / "images"), num_enc_workers=1),
        "imagededup encode_image in a loop": lambda: [theirs.encode_image(image_file=f) for f in files],
        "memfilter digest + hash + caption": ours(None),
        "memfilter with the embedding": ours("builtin"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    timed = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    ratios = {
        f"{name}, against {peer}": statistics.median(t / o for t, o in zip(timed[peer], timed[name], strict=True))
        for name in arms
        for peer in arms
        if name.startswith("memfilter") and peer.startswith("imagededup")
    }
    return {
        "images": count,
        "rounds": rounds,
        "cores": 1,
        "milliseconds_per_image": {n: round(1000 * statistics.median(t) / count, 3) for n, t in timed.items()},
        "times_faster": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "target": "3.0 without and 1.5 with the embedding, against encode_images",
    }


if __name__ == "__main__":
    main()
