"""Candidates for natural duplicates among photos of which none was planted, as contact sheets to be judged by eye.

    python benchmarks/natural_duplicates.py ../shared/data/unlabelled/0000{2,3}.tar --out SHEETS

Pairs are proposed by pHash and PDQ (also mirrored), by the cosine of the built-in encoder, and by the correlation of
the details of thumbnails, whole and of crops, also mirrored.  SHEETS/candidates.csv numbers them as the sheets do,
those that most methods propose first.  Those that show one picture twice are then listed by hand in
natural_duplicates.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from copy_set import ImageSet, distractor_set
from detectors import METHODS, signatures
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scoring import Scores, blocks

_WINDOWS = (1.0, 0.85)
_SIDE = 16
_PER_ROW, _PER_SHEET, _PIXELS = 7, 77, 96


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shards", type=Path, nargs="+")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/copy_detection"))
    arguments.add_argument("--each", type=int, default=150, help="the most pairs that one method proposes")
    given = arguments.parse_args()
    image_set = distractor_set(given.shards, given.cache)
    given.out.mkdir(parents=True, exist_ok=True)
    proposed: dict[tuple[int, int], list[str]] = {}
    rank: dict[tuple[int, int], int] = {}
    for name, pairs in _proposals(image_set, given.each):
        for at, pair in enumerate(pairs):
            proposed.setdefault(pair, []).append(name)
            rank[pair] = min(at, rank.get(pair, at))
    ordered = sorted(proposed, key=lambda pair: (-len(proposed[pair]), rank[pair], pair))
    _sheets(image_set, ordered, given.out)
    with (given.out / "candidates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        for number, (i, j) in enumerate(ordered):
            writer.writerow([number, image_set.keys[i], image_set.keys[j], " ".join(sorted(set(proposed[i, j])))])


def _proposals(image_set: ImageSet, each: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield the pairs that each method proposes, the likeliest first."""
    for name, threshold in {"phash": -10.0, "pdq_mirror": -40.0, "builtin": 0.8}.items():
        rows = signatures(image_set, METHODS[name].signature).rows
        yield name, _likeliest(blocks(METHODS[name].score, rows, 500), each, threshold)
    pictures = [Image.open(file).convert("L") for file in image_set.files]
    whole = _thumbnails(pictures, (0, 0, 1, 1))
    for side in _WINDOWS:
        for x, y in [(0.5, 0.5)] if side == 1 else [(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)]:
            left, top = x * (1 - side), y * (1 - side)
            for mirrored in (False, True):
                cut = _thumbnails(pictures, (left, top, left + side, top + side), mirrored)
                # of the one's crop with the other, and the other way round
                both = blocks(lambda a, b, cut=cut: a @ cut.T, whole, 500)  # type: ignore[misc]
                yield f"crop {side}{' mirrored' * mirrored}", _likeliest(both, each, 0.6)


def _likeliest(blocks: Iterator[tuple[int, Scores]], each: int, threshold: float) -> list[tuple[int, int]]:
    """Return the pairs of the highest scores at or over the threshold, the smaller place first."""
    found: dict[tuple[int, int], float] = {}
    for start, scores in blocks:
        for i, j in zip(*(axis.tolist() for axis in np.nonzero(scores >= threshold)), strict=True):
            if start + i != j:
                pair = min(start + i, j), max(start + i, j)
                found[pair] = max(float(scores[i, j]), found.get(pair, threshold))
    return sorted(found, key=lambda pair: (-found[pair], pair))[:each]


def _thumbnails(pictures: list[Image.Image], box: tuple[float, float, float, float], mirrored: bool = False) -> Scores:
    """Return the details of a window of each grey picture, without its broad light and dark, as rows of length 1."""
    rows = []
    for picture in pictures:
        window = (box[0] * picture.width, box[1] * picture.height, box[2] * picture.width, box[3] * picture.height)
        small = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX, window)
        small = ImageOps.mirror(small) if mirrored else small
        broad = small.filter(ImageFilter.BoxBlur(2))
        rows.append((np.asarray(small, np.float32) - np.asarray(broad, np.float32)).ravel())
    levels = np.stack(rows)
    # a picture with hardly any detail is like no other
    details: Scores = levels / np.maximum(np.linalg.norm(levels, axis=1, keepdims=True), 3.0 * _SIDE)
    return details


def _sheets(image_set: ImageSet, pairs: list[tuple[int, int]], out: Path) -> None:
    across, down = 2 * _PIXELS + 8, _PIXELS + 16
    for first in range(0, len(pairs), _PER_SHEET):
        here = pairs[first : first + _PER_SHEET]
        sheet = Image.new("RGB", (_PER_ROW * across, -(-len(here) // _PER_ROW) * down), "white")
        draw = ImageDraw.Draw(sheet)
        for k, pair in enumerate(here):
            left, top = k % _PER_ROW * across, k // _PER_ROW * down
            draw.text((left, top), str(first + k), "black")
            for side, place in enumerate(pair):
                picture = Image.open(image_set.files[place]).convert("RGB").resize((_PIXELS, _PIXELS))
                sheet.paste(picture, (left + side * _PIXELS, top + 14))
        sheet.save(out / f"sheet-{first // _PER_SHEET:02}.png")


if __name__ == "__main__":
    main()
