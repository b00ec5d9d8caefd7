"""Calibrate the built-in descriptor: how much alignment counts beside the cosine, and where the threshold lies.

    python benchmarks/calibrate_descriptor.py ../shared/data --json benchmarks/results/calibrate_descriptor.json

On photos that training has not seen (and the copy-detection benchmark does not use): the threshold is where one pair
in 10^7 of distinct photos would score higher.  There are fewer pairs than that, so the tail is drawn on: the logarithm
of the rank falls in a line with the score.  The gain is the one with which most edited copies score over the threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from copies import edited
from environment import write_result
from train_descriptor import HELD_OUT, photos

from memfilter.alignment import align
from memfilter.encoders.builtin import Builtin

RATE = 1e-7
_TAIL = (5, 150)  # ranks by which the tail is drawn on
_ALIGNED = 20_000  # pairs of distinct photos of the highest cosine: others score under any threshold
_EDITS = 3  # of each photo

Floats = npt.NDArray[np.float64]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    held_out = photos([given.data / "unlabelled/00001.tar"])[-HELD_OUT:]
    held_out = np.concatenate([held_out, photos([given.data / "photos/00001.tar"])])
    n = len(held_out)
    random = np.random.default_rng(0)
    copies = np.concatenate([edited(held_out, random, crowd=0.25)[1] for _ in range(_EDITS)])
    embeddings = Builtin().encode(np.concatenate([held_out, copies]))
    thumbnails = shrunk(np.concatenate([held_out, copies]))

    cosine = (embeddings[:n] @ embeddings[:n].T)[np.triu_indices(n, 1)]
    likeliest = np.argsort(-cosine)[:_ALIGNED]
    a, b = (x[likeliest] for x in np.triu_indices(n, 1))
    false = cosine[likeliest], align(thumbnails, a, b).evidence
    original = np.tile(np.arange(n), _EDITS)
    true = (
        (embeddings[original] * embeddings[n:]).sum(1),
        align(thumbnails, original, n + np.arange(len(original))).evidence,
    )
    table = []
    for gain in np.arange(0, 1.55, 0.15):
        threshold = drawn_on(false[0] + gain * false[1], len(cosine))
        found = (true[0] + gain * true[1] >= threshold) & (true[0] >= false[0].min())
        table.append(
            {"gain": round(float(gain), 2), "threshold": round(threshold, 3), "recall": round(found.mean(), 4)}
        )
        print(table[-1], flush=True)
    score = false[0] + Builtin.gain * false[1]
    top = np.argsort(-score)[:20]
    write_result(
        {
            "photos": n,
            "pairs_of_photos": len(cosine),
            "edited_copies": len(copies),
            "lowest_cosine_aligned": round(float(false[0].min()), 3),
            "by_gain": table,
            "likeliest": [[int(a[i]), int(b[i]), *(round(float(x[i]), 3) for x in false)] for i in top],
        },
        given.json,
    )


def drawn_on(scores: Floats, pairs: int) -> float:
    """Return the score over which one pair in 10^7 is to be expected."""
    first, last = _TAIL
    tail = np.sort(scores)[::-1][first:last]
    slope, level = np.polyfit(tail, np.log(np.arange(first + 1, last + 1)), 1)
    return float((np.log(RATE * pairs) - level) / slope)


def shrunk(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return (N, 64, 64) images as thumbnails of 32 x 32."""
    return np.rint(images.reshape(len(images), 32, 2, 32, 2).mean((2, 4))).astype(np.uint8)


if __name__ == "__main__":
    main()
