"""What a model trained on filtered data draws again, beside one trained on all of it and one under the loss mask.

    python benchmarks/filtered.py FOLDER --train unfiltered    # about half an hour each on one core; resumable
    python benchmarks/filtered.py FOLDER --train filtered
    python benchmarks/filtered.py FOLDER --train masked
    python benchmarks/filtered.py FOLDER --json benchmarks/results/filtered.json

The data are those of `train_magnitude_model.py`: of 550 equally specific pairs 50 are there 25 times, re-encoded, and
the others once, beside 400 ordinary ones.  `memfilter run` with its defaults drops the copies, or masks them with
`policy.image_duplicate: mask`; nothing of what was planted is told to it.  The arms have the same tokenizer, first
weights, number of steps and batches of 64 drawn without replacement; under the mask the copies stay in the batches,
which then train on fewer pairs a step.  A pair is drawn again as in `magnitudes.py`, over several seeds of noise.
`loss` is the mean square error of the noise predicted for ordinary pairs that no arm has seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import write_result
from magnitudes import by_times
from train_demo_model import make
from train_magnitude_model import STEPS, samples

import memfilter
from memfilter import Config, Manifest
from memfilter.demo.data import SEED, Planted, jpeg, ordinary_captions, picture, write_shards
from memfilter.demo.memorized import ALIKE, generate, likeness, load_pipeline, pixels
from memfilter.magnitude import Scorer

ARMS = ("unfiltered", "filtered", "masked")
SEEDS = 4
SHOWN = 100
"""Pairs that are drawn of each kind, at most."""
UNSEEN = 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--train", choices=ARMS, help="train this arm; without it, evaluate all")
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)  # sums in one order
    planted = samples()
    if given.train:
        train(given.train, planted, given.steps, given.folder)
    else:
        write_result({"steps": given.steps, **evaluate(given.folder, planted)}, given.json)


def train(arm: str, planted: list[Planted], steps: int, folder: Path) -> None:
    kept = weights = None
    if arm != "unfiltered":
        found = torch.from_numpy(filtered(arm, planted, folder / arm).copy())
        kept, weights = (found > 0, None) if arm == "filtered" else (None, found)
    make(planted, steps, folder / arm / "model", folder / arm / "training.pt", torch.float32, kept, weights)


def filtered(arm: str, planted: list[Planted], folder: Path) -> np.ndarray:
    """Return the loss weights (N,) of the samples by a run on their shards."""
    if not (folder / "data").is_dir():
        write_shards(planted, folder / "data")
    policy = {"image_duplicate": "mask" if arm == "masked" else "drop"}
    config = Config.parse({"policy": policy, "output": {"shards": False}})
    table = memfilter.run([str(folder / "data")], folder / "run", config).table(["key", "loss_weight"])
    weights = np.empty(len(table), np.float32)
    weights[[int(key) for key in table["key"].to_pylist()]] = table["loss_weight"].to_numpy()
    return weights


def evaluate(folder: Path, planted: list[Planted]) -> dict[str, Any]:
    pairs = {kind: some[:SHOWN] for kind, some in by_times(planted).items()}
    counts = {arm: Manifest.load(folder / arm / "run").counts for arm in ARMS[1:]}
    return {
        "pairs": {kind: len(some) for kind, some in pairs.items()},
        "seeds": SEEDS,
        "runs": counts,
        "arms": {arm: of_model(folder / arm / "model", pairs) for arm in ARMS},
    }


def of_model(model: Path, pairs: dict[str, list[Planted]]) -> dict[str, Any]:
    """Return what a model draws again of each kind of pairs, in how many of its drawings and of how many pairs."""
    result: dict[str, Any] = {"loss": round(loss(model), 4)}
    scorer = Scorer.load(str(model))
    for kind, some in pairs.items():
        captions = [p.caption for p in some]
        truth = np.stack([pixels(p.data) for p in some])
        alike = np.stack([likeness(generate(model, captions, seed), truth) for seed in range(SEEDS)])
        result[kind] = {
            "drawn_again": int((alike > ALIKE).any(0).sum()),
            "share_of_drawings": round(float((alike > ALIKE).mean()), 4),
            "likeness": np.quantile(alike, [0.1, 0.5, 0.9]).round(3).tolist(),
            "magnitude": np.quantile(scorer.score(captions)[:, 0, 0], [0.1, 0.5, 0.9]).round(3).tolist(),
        }
    return result


def loss(model: Path) -> float:
    """Return the mean square error of the noise, at timesteps spread evenly, for ordinary pairs of another seed."""
    random = np.random.default_rng(SEED + 3)
    captions = ordinary_captions(random)
    unseen = [(jpeg(picture(random)), next(captions)) for _ in range(UNSEEN)]
    pipe, draw = load_pipeline(model), torch.Generator().manual_seed(0)
    images = torch.from_numpy(np.stack([pixels(data) for data, _ in unseen]))
    noise, t = torch.randn(images.shape, generator=draw), torch.linspace(0, 999, UNSEEN).long()
    states = pipe.encode_prompt([caption for _, caption in unseen], "cpu", 1, False)[0]
    with torch.no_grad():
        prediction = pipe.unet(pipe.scheduler.add_noise(images, noise, t), t, states).sample
    return float((prediction - noise).square().mean())


if __name__ == "__main__":
    main()
