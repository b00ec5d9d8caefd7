"""What online filtering costs in a loader, on one core, at several sizes of its memory.

    python benchmarks/online_filter.py ../shared/data/photos ../shared/data/tiny \
        --json benchmarks/results/online_filter.json

For each folder and each size: a webdataset pipeline alone, which reads and decodes to RGB; the same again, whose ratio
to the first is 1 but for noise, and tells what the others can resolve; the same with `OnlineFilter`, whose memory is
full of that many random images, captions and samples, so that every sample is compared with all of them and evicts one;
its second epoch, in which it knows every sample; and, up to `--most` images, the loop that one would write with
imagededup: its `PHash` of the decoded picture, searched in and put into its `BKTree`; and that hash alone.

The order is drawn in each round, but that a second epoch follows a first; a round before the first is not counted.
Seconds are CPU time of the process; quoted are medians over the rounds, and of ratios within a round with the least and
the greatest.  Garbage is collected before each loop, and those without the filter do not walk its objects.  Look-ups
are timed alone, of images that are nowhere near, near, and there; the bytes of an entry are the growth of the process's
memory.  It takes about five minutes.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset as wds
from environment import write_result
from imagededup.handlers.search.bktree import BKTree
from imagededup.methods import PHash

from memfilter import OnlineFilter, recent
from memfilter.shards import find_shards

SIZES = (10_000, 100_000, 1_000_000)
RADIUS = 4


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folders", type=Path, nargs="+")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--samples", type=int, default=300, help="of a folder")
    arguments.add_argument("--most", type=int, default=10_000, help="images up to which imagededup is measured")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    result: dict[str, Any] = {"rounds": given.rounds, "samples": given.samples, "radius": RADIUS, "sizes": {}}
    for size in SIZES:
        found: dict[str, Any] = {}
        before = psutil.Process().memory_info().rss
        stage = OnlineFilter(capacity=size)
        fill(stage)
        found["bytes_per_entry"] = round((psutil.Process().memory_info().rss - before) / size)
        found["look_up_us"] = look_ups(stage, given.rounds)
        for folder in given.folders:
            urls = [shard.url for shard in find_shards([str(folder)])[0]]
            found[folder.name] = loops(urls, stage, given.samples, given.rounds, size <= given.most)
        result["sizes"][f"{size}"] = found
    write_result(result, given.json)


def fill(stage: OnlineFilter) -> None:
    """Fill a filter's memory with random images, each of one sample with a caption of its own."""
    draw = random.Random(0)
    for i in range(stage.capacity):
        place = f"s3://bucket/folder/{i // 10_000:05}.tar/{i:09}"
        image = recent.add_image(stage._images, signature(draw), place)
        caption = stage._captions.add(draw.randbytes(16), count=1, place=place, image=i)
        stage._samples.add(draw.randbytes(16), image=image, caption=caption, method=-1)


def signature(draw: random.Random) -> dict[str, Any]:
    return {"digest": draw.randbytes(16), "hash": draw.getrandbits(64), "blank": False}


def look_ups(stage: OnlineFilter, rounds: int) -> dict[str, float]:
    """Return the microseconds of a look-up of an image that is new, near one that is there, and there."""
    draw, table = random.Random(1), stage._images
    rows = [draw.randrange(stage.capacity) for _ in range(200)]
    near = [{**signature(draw), "hash": int(table["hash"][row, 0]) ^ 0b11} for row in rows]
    there = [{**signature(draw), "digest": table._keys[row]} for row in rows]
    found = {}
    for name, asked in {"new": [signature(draw) for _ in rows], "near": near, "there": there}.items():
        seconds = [timed(lambda a=asked: [recent.find_image(table, s, RADIUS) for s in a]) for _ in range(rounds + 1)]
        found[name] = round(statistics.median(seconds[1:]) / len(rows) * 1e6, 1)
    return found


def loops(urls: list[str], stage: OnlineFilter, samples: int, rounds: int, with_peer: bool) -> dict[str, Any]:
    full = stage.state_dict()
    seconds: dict[str, list[float]] = {}
    hasher = PHash(verbose=False)
    known = {f"{i}": f"{int(hash):016x}" for i, hash in enumerate(stage._images["hash"][:, 0])} if with_peer else {}
    order = random.Random(0)
    for n in range(rounds + 1):
        stage.load_state_dict(full)
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: drain(pipeline(urls, samples)),
            "plain again": lambda: drain(pipeline(urls, samples)),
            "filtered": lambda: drain(pipeline(urls, samples, stage)),
            "second epoch": lambda: drain(pipeline(urls, samples, stage)),
        }
        if with_peer:
            tree = BKTree(known, PHash.hamming_distance)
            works["imagededup hash"] = lambda: peer(pipeline(urls, samples), hasher, None)
            works["imagededup"] = lambda tree=tree: peer(pipeline(urls, samples), hasher, tree)
        names = order.sample(list(works), len(works))
        epochs = iter(("filtered", "second epoch"))
        for name in [next(epochs) if name in ("filtered", "second epoch") else name for name in names]:
            gc.collect()
            if name not in ("filtered", "second epoch"):
                gc.freeze()
            taken = timed(works[name])
            gc.unfreeze()
            if n:
                seconds.setdefault(name, []).append(taken)
    plain = seconds["plain"]
    ratios = {name: [a / b for a, b in zip(values, plain, strict=True)] for name, values in seconds.items()}
    added = {name: [a - b for a, b in zip(values, plain, strict=True)] for name, values in seconds.items()}
    return {
        "samples_per_second": {name: round(samples / statistics.median(v), 1) for name, v in seconds.items()},
        "time_by_that_of_the_plain_loop": {
            name: [round(f(values), 3) for f in (statistics.median, min, max)]
            for name, values in ratios.items()
            if name != "plain"
        },
        "added_ms_per_sample": {
            name: round(statistics.median(v) / samples * 1e3, 3) for name, v in added.items() if name != "plain"
        },
    }


def pipeline(urls: list[str], samples: int, *stages: Any) -> Any:
    data = wds.WebDataset(urls, shardshuffle=False, empty_check=False).compose(First(samples), *stages)
    return data.decode("pilrgb", partial=True)


class First:
    """The stage that passes so many samples on."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, samples: Iterable[Any]) -> Iterable[Any]:
        """Return them."""
        real = (s for s in samples if "__key__" in s)
        return (s for _, s in zip(range(self.count), real, strict=False))


def drain(samples: Iterable[Any]) -> None:
    for _ in samples:
        pass


def peer(samples: Iterable[Any], hasher: PHash, tree: BKTree | None) -> None:
    """Do what one would do with imagededup: hash each picture, look for near ones, and add it to the tree."""
    for n, sample in enumerate(samples):
        hash = hasher.encode_image(image_array=np.asarray(sample["jpg"]))
        if tree and not tree.search(hash, tol=RADIUS):
            tree.hash_dict[f"new {n}"] = hash
            tree._insert_in_tree(f"new {n}", tree.ROOT)


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
