"""Train a small text-to-image model for the evaluation of memorization scores, with many pairs that it sees once.

    OMP_NUM_THREADS=1 python benchmarks/train_magnitude_model.py FOLDER     # 25 minutes on one core; resumable

The model is the demo's, on samples of the same kinds: 550 specific pairs from one generator, of which 50, drawn by
chance, are there 25 times and the others once, and 400 ordinary pairs.  Nothing tells a repeated caption from one seen
once but how often it is there.  `benchmarks/magnitudes.py FOLDER` evaluates it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from train_demo_model import make

from memfilter.demo.data import SEED, TIMES, Planted, jpeg, ordinary_captions, picture, specific_captions

REPEATED, ONCE, ORDINARY = 50, 500, 400
STEPS = 1200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path, help="where the pipeline is saved, in float32")
    arguments.add_argument("--steps", type=int, default=STEPS)
    given = arguments.parse_args()
    torch.set_num_threads(1)  # sums in one order
    checkpoint = given.out.with_name(f"{given.out.name}.pt")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    make(samples(), given.steps, given.out, checkpoint, torch.float32)


def samples(repeated: int = REPEATED, once: int = ONCE, ordinary: int = ORDINARY) -> list[Planted]:
    """Return so many specific pairs that are repeated, specific ones and ordinary ones that are there once, in this
    order, and last the further copies of the repeated ones, each of another JPEG quality.
    """
    random = np.random.default_rng(SEED + 2)
    specific, plain = specific_captions(random), ordinary_captions(random)
    pairs = [(picture(random), next(specific)) for _ in range(repeated + once)]
    pairs = [pairs[i] for i in random.permutation(len(pairs))]
    planted = [Planted(jpeg(image), caption, "specific") for image, caption in pairs]
    planted += [Planted(jpeg(picture(random)), next(plain)) for _ in range(ordinary)]
    for original, (image, caption) in enumerate(pairs[:repeated]):
        for i in range(TIMES - 1):
            planted.append(Planted(jpeg(image, 50 + 2 * i), caption, "repeated pair", original))
    return planted


if __name__ == "__main__":
    main()
