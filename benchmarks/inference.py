"""What each mitigation while sampling does to pairs that a trained model draws again, and to captions seen once.

    OMP_NUM_THREADS=1 python benchmarks/train_magnitude_model.py FOLDER
    OMP_NUM_THREADS=1 python benchmarks/inference.py FOLDER --json benchmarks/results/inference.json

Sampling, and when a pair counts as drawn again, are those of `magnitudes.py`: ten DDIM steps, guidance 2, one image a
caption, and a correlation of more than 0.9 with the training picture.  Magnitudes are those of the first of these
steps.  The target is the threshold at 1% false positives, the second one the median, of other captions seen once, and
of other noise, than those shown.

AdamW changes each number of an embedding by about the learning rate.  Of a linear function with a gradient of given
norm such a step changes the value by an amount that grows with the root of the numbers: Stable Diffusion 1 has 77 x 768
of them, this model 32 x 96, and 0.05 there is 0.22 here.  So 0.2 stands beside the paper's 0.05.

`likeness_to_plain` is the correlation with the image that the same noise gives without mitigation.  A mitigation's cost
is its time by that of none, the process's own: the median over rounds in which all take turns on the same few captions,
after one that warms up.  The model takes 32 tokens, and each digit is one: some insertions push a caption's end beyond
them.  This model needs no guidance to draw its pairs again, as "never guided" shows: its images tell nothing of delayed
guidance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import write_result
from magnitudes import ONCE, REPEATED, by_times
from train_magnitude_model import samples

from memfilter import inference
from memfilter.calibration import RATE, threshold_at_fpr
from memfilter.demo.data import Planted
from memfilter.demo.memorized import ALIKE, Pixels, likeness, load_pipeline, pixels, sampling
from memfilter.inference import Mitigated
from memfilter.records import Floats, Ints

CAPTIONS = 50
"""Of each kind."""
ROUNDS, TIMED = 5, 16
"""Of costs, and the captions of each kind that they are measured on."""
REFERENCE = 200
"""Further captions seen once, from which the targets are taken."""
NONE = "none"
Mitigation = Callable[..., Mitigated]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path, help="the folder that train_magnitude_model.py wrote")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    pairs = by_times(samples())
    reference = [p.caption for p in pairs[ONCE][CAPTIONS:][:REFERENCE]]
    result = evaluate(given.model, {kind: pairs[kind][:CAPTIONS] for kind in (REPEATED, ONCE)}, reference)
    write_result(result, given.json)


def mitigations(target: float, median: float) -> dict[str, Mitigation]:
    """Return each mitigation under its name."""
    optimised = partial(inference.with_optimised_embeddings, target=target)
    return {
        NONE: plainly,
        **{f"random tokens, {n}": partial(inference.with_random_tokens, count=n) for n in (2, 4)},
        **{f"repeated words, {n}": partial(inference.with_repeated_words, count=n) for n in (2, 4)},
        **{f"random numbers, {n}": partial(inference.with_random_numbers, count=n) for n in (2, 4)},
        "embedding noise, 0.1": inference.with_embedding_noise,
        "optimised, learning rate 0.05": optimised,
        "optimised, learning rate 0.2": partial(optimised, learning_rate=0.2),
        "optimised, learning rate 0.2, to the median": partial(optimised, learning_rate=0.2, target=median),
        "delayed guidance, to the first minimum": inference.with_delayed_guidance,
        "never guided": partial(inference.with_delayed_guidance, below=0),
        "delayed guidance, to timestep 650": partial(inference.with_delayed_guidance, below=650),
    }


def plainly(pipe: Any, captions: list[str], **call: Any) -> Mitigated:
    """Draw images with no mitigation: guidance is never late."""
    return inference.with_delayed_guidance(pipe, captions, below=float("inf"), **call)


def evaluate(
    model: Path,
    pairs: dict[str, list[Planted]],
    reference: list[str],
    only: tuple[str, ...] | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Return the figures as JSON, of all the mitigations or of some beside none."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    unmemorized = inference.magnitudes(pipe, reference, **sampling(len(reference), seed=1))
    target, median = threshold_at_fpr(unmemorized, RATE), float(np.median(unmemorized))
    captions = {kind: [p.caption for p in own] for kind, own in pairs.items()}
    pictures = {kind: np.stack([pixels(p.data) for p in own]) for kind, own in pairs.items()}
    wanted = {n: m for n, m in mitigations(target, median).items() if n == NONE or only is None or n in only}
    cost = costs(pipe, wanted, [c for own in captions.values() for c in own[:TIMED]], rounds)
    plain: dict[str, Pixels] = {}
    figures: dict[str, Any] = {}
    for name, mitigation in wanted.items():
        drawn = {kind: mitigation(pipe, own, **sampling(len(own))) for kind, own in captions.items()}
        images = {kind: one.output.images.clamp(-1, 1).numpy() for kind, one in drawn.items()}
        plain = plain or images
        limit = median if name.endswith("median") else target
        figures[name] = {
            "cost": cost[name],
            "kinds": {
                kind: {
                    "drawn_again": int((likeness(images[kind], pictures[kind]) > ALIKE).sum()),
                    "likeness_to_picture": spread(likeness(images[kind], pictures[kind])),
                    "likeness_to_plain": spread(likeness(images[kind], plain[kind])),
                    "magnitude_before": spread(one.before),
                    "magnitude_after": spread(one.after),
                    "under_target": {
                        "before": int((one.before < limit).sum()),
                        "after": int((one.after < limit).sum()),
                    },
                    "steps": spread(one.steps),
                }
                for kind, one in drawn.items()
            },
        }
    return {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "images": {kind: len(own) for kind, own in pairs.items()},
        "reference": {"captions": len(reference), "target": target, "median": median},
        "mitigations": figures,
    }


def costs(pipe: Any, wanted: dict[str, Mitigation], captions: list[str], rounds: int) -> dict[str, list[float] | None]:
    """Return of each mitigation's time by that of none the least, the median and the greatest over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(rounds + 1):
        for name, mitigation in wanted.items():
            started = time.process_time()
            mitigation(pipe, captions, **sampling(len(captions)))
            seconds[name].append(time.process_time() - started)
    none = np.array(seconds[NONE][1:])
    return {name: spread(np.array(own[1:]) / none) for name, own in seconds.items()}


def spread(values: Floats | Ints) -> list[float] | None:
    """Return the least, the median and the greatest; None where there is none."""
    if np.isnan(values).all():
        return None
    return [round(float(x), 3) for x in np.quantile(values, (0, 0.5, 1))]


if __name__ == "__main__":
    main()
