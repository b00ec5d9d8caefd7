"""What a shard's signatures cost beside the bare decode of the same JPEGs, on one core, without embeddings.

    python benchmarks/signing.py ../shared/data/photos ../shared/data/tiny --json benchmarks/results/signing.json

For each folder, in turn: simplejpeg's scaled grey decode alone, at the least size that a hash needs; its colour decode,
at the size that the comparison in detail needs; our decode and hash (header checks, colours, turn, thumbnail, hash in
batches of 256); the same with content digest, border, stored picture and look; and `sign`, which also reads the
tar, its captions and jsons, and writes the table.  Seconds are those of the CPU time of the process; quoted are medians
over the rounds, of ratios within a round.  It takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simplejpeg
from environment import write_result

from memfilter import Config, images
from memfilter.shards import find_shards
from memfilter.signatures import Signer, sign

BATCH = 256
CONFIG = Config.parse({"images": {"encoder": None}})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folders", type=Path, nargs="+")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--images", type=int, default=1000, help="of a folder, as many whole shards as hold these")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = {folder.name: measure(folder, Path(work), given.rounds, given.images) for folder in given.folders}
    write_result({"rounds": given.rounds, "cores": 1, **found, "target": "0.8 for decode + hash of photos"}, given.json)


def measure(folder: Path, work: Path, rounds: int, least: int) -> dict[str, Any]:
    shards, files = [], []
    for shard in find_shards([str(folder)])[0]:
        if len(files) < least:
            shards.append(shard)
            with tarfile.open(shard.url) as tar:
                files += [f.read() for m in tar if m.name.endswith(".jpg") and (f := tar.extractfile(m))]
    signer, limit = Signer(CONFIG), CONFIG.input.max_pixels
    batches = [files[i : i + BATCH] for i in range(0, len(files), BATCH)]

    def bare(space: str, side: int) -> None:
        for data in files:
            simplejpeg.decode_jpeg(data, space, fastdct=True, fastupsample=True, min_height=side, min_width=side)

    def hashed() -> None:
        for batch in batches:
            decoded = (images.decode(data, False, limit, signer.side, signer.colour) for data in batch)
            signer._hashes([images.thumbnail(image.pixels) for image in decoded])

    def described() -> None:
        for batch in batches:
            signer.finish([signer._image(data) for data in batch])

    def signed() -> None:
        for shard in shards:
            sign(shard, work / folder.name / f"{shard.name}.parquet", CONFIG)

    arms: dict[str, Callable[[], None]] = {
        "bare decode": lambda: bare("GRAY", signer.side),
        "bare colour decode": lambda: bare("RGB", signer.colour),
        "decode + hash": hashed,
        "decode + hash + digest + picture + look": described,
        "sign": signed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            seconds[name].append(time.process_time() - started)
    timed = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    ratios = {
        name: statistics.median(b / t for b, t in zip(timed["bare decode"], times, strict=True))
        for name, times in timed.items()
    }
    return {
        "images": len(files),
        "kilobytes_per_image": round(sum(map(len, files)) / len(files) / 1000, 1),
        "images_per_second": {name: round(len(files) / statistics.median(times)) for name, times in timed.items()},
        "of_the_bare_decode": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


if __name__ == "__main__":
    main()
