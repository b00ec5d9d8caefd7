"""What bad samples cost: signing a shard of real photos, against the same shard with one sample in a hundred bad.

    python benchmarks/bad_samples.py ../shared/data/photos --json benchmarks/results/bad_samples.json

A thousand JPEG photos at natural size (those of the folder, repeated with another last byte).  The bad ones, ten of as
many kinds, take the places of good ones: one photo is cut in half, the others are drawn from the hostile corpus.
The two shards take turns on one core; quoted is the ratio of the medians of the process time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from environment import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hostile_images  # noqa: F401  (enters its kinds)
import hostile_samples  # noqa: F401
from hostile import SAMPLES, Draw, member
from tars import ended

from memfilter import Config
from memfilter.records import Shard
from memfilter.signatures import sign

COUNT, EVERY = 1000, 100
BAD = (
    *("image_is_an_html_error_page", "image_empty", "no_image", "caption_invalid_utf_8", "json_cut"),
    *("symbolic_link", "jpeg_bomb", "png_zTXt_bomb", "jpeg_with_bogus_huffman_tables"),
)


def photos(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for one in tar:
                if one.name.endswith(".jpg") and (file := tar.extractfile(one)):
                    found.append(file.read())
    return found


def write(path: Path, images: list[bytes], bad: bool) -> Shard:
    """Write the shard; where `bad`, every hundredth sample is cut or one of the hostile corpus."""
    parts = []
    for i in range(COUNT):
        image, caption = images[i % len(images)] + bytes([i // len(images)]), f"photo {i}".encode()
        kind = i // EVERY
        chosen = bad and i % EVERY == 37 * kind % EVERY  # no two of one photo
        if chosen and kind < len(BAD):
            planted = SAMPLES[BAD[kind]](Draw(BAD[kind], i).random, f"{i:06}")
            parts += [data for data, _ in planted.members]
        else:
            parts += [
                member(f"{i:06}.jpg", image[: len(image) // 2] if chosen else image),
                member(f"{i:06}.txt", caption),
            ]
    path.write_bytes(ended(b"".join(parts)))
    return Shard(path.name, str(path), path.stat().st_size)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("photos", type=Path)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as work:
        images = photos(given.photos)
        shards = {bad: write(Path(work) / f"bad-{bad}.tar", images, bad) for bad in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        found: dict[bool, int] = {}
        for turn in range(given.rounds + 1):
            for bad in (False, True) if turn % 2 else (True, False):
                started = time.process_time()
                found[bad] = sign(shards[bad], Path(work) / "signatures.parquet", Config()).bad
                seconds[bad].append(time.process_time() - started)
    clean, mixed = (statistics.median(seconds[bad][1:]) for bad in (False, True))  # the first round warms up
    write_result(
        {
            "samples": COUNT,
            "mean_bytes_of_a_photo": round(sum(map(len, images)) / len(images)),
            "bad": {"clean": found[False], "mixed": found[True]},
            "kinds": [*BAD, "photo cut in half"],
            "rounds": given.rounds,
            "median_process_seconds": {"clean": round(clean, 3), "mixed": round(mixed, 3)},
            "ratio_mixed_to_clean": round(mixed / clean, 4),
            "target": "within 5%",
        },
        given.json,
    )


if __name__ == "__main__":
    main()
