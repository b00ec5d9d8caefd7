"""Candidates for natural duplicates among photos of which none was planted, as contact sheets to be judged by eye.

    python benchmarks/natural_duplicates.py ../shared/data/unlabelled/0000{2,3}.tar --out SHEETS

Pairs are proposed by pHash and PDQ (also mirrored), by the cosine of the built-in encoder, and by the correlation of
colour thumbnails, whole and of crops, also mirrored.  SHEETS/candidates.csv numbers them as the sheets do, those that
most methods propose first.  Those that show one picture twice are then listed by hand in natural_duplicates.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from copy_set import ImageSet, distractor_set
from detectors import METHODS, sign
from PIL import Image, ImageDraw, ImageOps
from scoring import Scores, blocks, highest

_WINDOWS = (1.0, 0.9, 0.8, 0.68)
_SIDE = 12
_PER_ROW, _PER_SHEET, _PIXELS = 7, 77, 96


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shards", type=Path, nargs="+")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--each", type=int, default=150, help="the most pairs that one method proposes")
    given = arguments.parse_args()
    image_set = distractor_set(given.shards, given.out)
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
    widest = {"phash": -10.0, "pdq_mirror": -40.0, "builtin": 0.8}
    signed = sign(image_set, sorted({METHODS[name].signature for name in widest}))
    for name, threshold in widest.items():
        rows = signed[METHODS[name].signature].rows
        edges, _ = highest(blocks(METHODS[name].score, rows, 500), each, threshold)
        yield name, _over(edges.first, edges.second, edges.score, threshold)
    pictures = [Image.open(file).convert("RGB") for file in image_set.files]
    whole = _thumbnails(pictures, (0, 0, 1, 1))
    for side in _WINDOWS:
        places = [(0.5, 0.5)] if side == 1 else [(0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)]
        for x, y in places:
            left, top = x * (1 - side), y * (1 - side)
            for mirrored in (False, True):
                cut = _thumbnails(pictures, (left, top, left + side, top + side), mirrored)
                edges, _ = highest(_correlations(cut, whole), each, 0.9)
                yield f"crop{side}{'m' * mirrored}", _over(edges.first, edges.second, edges.score, 0.9)


def _over(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], score: Scores, threshold: float) -> list[tuple[int, int]]:
    near = score >= threshold
    return list(zip(a[near].tolist(), b[near].tolist(), strict=True))


def _correlations(cut: Scores, whole: Scores) -> Iterator[tuple[int, Scores]]:
    """Yield the higher correlation of each pair: of the one's crop with the other, or the other way round."""
    for start in range(0, len(cut), 500):
        rows = slice(start, start + 500)
        yield start, np.maximum(cut[rows] @ whole.T, whole[rows] @ cut.T)


def _thumbnails(pictures: list[Image.Image], box: tuple[float, float, float, float], mirrored: bool = False) -> Scores:
    """Return the thumbnails of a window of each picture as rows of mean 0 and length 1."""
    rows = []
    for picture in pictures:
        window = (box[0] * picture.width, box[1] * picture.height, box[2] * picture.width, box[3] * picture.height)
        small = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX, window)
        rows.append(np.asarray(ImageOps.mirror(small) if mirrored else small, np.float32).ravel())
    levels = np.stack(rows)
    levels -= levels.mean(1, keepdims=True)
    # a picture with hardly any contrast is like no other
    correlated: Scores = levels / np.maximum(
        np.linalg.norm(levels, axis=1, keepdims=True), 12.0 * levels.shape[1] ** 0.5
    )
    return correlated


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
