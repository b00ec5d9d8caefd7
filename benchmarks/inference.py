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

`likeness_to_plain` is the correlation with the image that the same noise gives without mitigation.  Seconds are the
process's own for all images of a mitigation, in one round, and its cost is relative to none; on a busy machine a fifth
of it is chance.  The model takes 32 tokens, and each digit is one: some insertions push a caption's end beyond them.
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
) -> dict[str, Any]:
    """Return the figures as JSON, of all the mitigations or of some beside none."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    unmemorized = inference.magnitudes(pipe, reference, **sampling(len(reference), seed=1))
    target, median = threshold_at_fpr(unmemorized, RATE), float(np.median(unmemorized))
    captions = {kind: [p.caption for p in own] for kind, own in pairs.items()}
    pictures = {kind: np.stack([pixels(p.data) for p in own]) for kind, own in pairs.items()}
    plain: dict[str, Pixels] = {}
    figures: dict[str, Any] = {}
    for name, mitigation in mitigations(target, median).items():
        if name != NONE and only is not None and name not in only:
            continue
        started = time.process_time()
        drawn = {kind: mitigation(pipe, own, **sampling(len(own))) for kind, own in captions.items()}
        seconds = time.process_time() - started
        images = {kind: one.output.images.clamp(-1, 1).numpy() for kind, one in drawn.items()}
        plain = plain or images
        limit = median if name.endswith("median") else target
        figures[name] = {
            "seconds": round(seconds, 1),
            "cost": round(seconds / figures[NONE]["seconds"], 2) if figures else 1.0,
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


def spread(values: Floats | Ints) -> list[float]:
    """Return the least, the median and the greatest."""
    return [round(float(x), 3) for x in np.quantile(values, (0, 0.5, 1))]


if __name__ == "__main__":
    main()
