"""What each mitigation costs: microseconds a sample, and the share of a training step of a small real UNet.

    python benchmarks/mitigations.py --json benchmarks/results/mitigations.json

One CPU thread, CPU time, medians.  The step is the plain one of `benchmarks/training.py`, with a batch of 8 latents of
side 16 and 77 text states of width 64.  What the embeddings' mitigations take at Stable Diffusion's size, side 64 and
width 768, stands beside.  Captions are changed with probability 1, so that every sample bears the whole cost.  It takes
about a minute.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import write_result
from training import BATCH, SIDE, WIDTH, make_steps, measure, small_unet

from memfilter.training import (
    GeneralCaption,
    Mitigation,
    MultipleCaptions,
    RandomCaption,
    RandomTokens,
    RepeatedWords,
    add_noise,
    dual_fusion,
    mix_up,
    sample_seed,
)

TOKENS = [f"token{i} " for i in range(49_000)]
CAPTION = "a photo of a small brown dog that runs along the beach at sunset"
POOL = [CAPTION, *(f"another caption of the picture, number {i}" for i in range(4)), "an animal on a beach"]
CHANGES: dict[str, list[Any]] = {
    "the seed alone": [],
    "multiple captions": [MultipleCaptions()],
    "general caption": [GeneralCaption(["an animal on a beach"])],
    "random caption": [RandomCaption(TOKENS, 1)],
    "random tokens": [RandomTokens(TOKENS, 1)],
    "random tokens, of a tenth": [RandomTokens(TOKENS)],
    "repeated words": [RepeatedWords(1)],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step = make_steps(small_unet())["plain"]
    captions = {name: stage_of(changes) for name, changes in CHANGES.items()}
    small, large = works(SIDE, WIDTH), works(64, 768)
    seconds = medians({"step": step, **captions, **small}, given.rounds)
    at_scale = medians(large, given.rounds)
    plain = seconds["step"]
    result = {
        "batch": BATCH,
        "rounds": given.rounds,
        "step_ms": round(plain * 1e3, 2),
        "captions_us_a_sample": {name: round(seconds[name] / BATCH * 1e6, 1) for name in captions},
        "captions_share_of_a_step": {name: round(seconds[name] / plain, 5) for name in captions},
        "embeddings_share_of_a_step": {name: round(seconds[name] / plain, 5) for name in small},
        "embeddings_us_a_sample_at_stable_diffusions_size": {
            name: round(at_scale[name] / BATCH * 1e6, 1) for name in large
        },
    }
    write_result(result, given.json)


def stage_of(changes: list[Any]) -> Callable[[], object]:
    """Return a pass of the stage over a batch's samples."""
    stage = Mitigation(*changes)

    def run() -> object:
        samples = [
            {"__key__": f"{i:09}", "__url__": "data/00000.tar", "txt": CAPTION, "captions": POOL} for i in range(BATCH)
        ]
        return list(stage(samples))

    return run


def works(side: int, width: int) -> dict[str, Callable[[], object]]:
    seeds = torch.tensor([sample_seed(0, 0, i) for i in range(BATCH)])
    latents, others = torch.randn(2, BATCH, 4, side, side)
    states, texts = torch.randn(2, BATCH, 77, width)
    weight = torch.tensor([1.0] * (BATCH - 2) + [0.0] * 2)
    return {
        "noise": lambda: add_noise(states, seeds),
        "mix-up": lambda: mix_up(states, seeds, 1.0, weight),
        "dual fusion without its encoders": lambda: dual_fusion(latents, states, others, texts),
    }


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each call over the rounds, in which all are taken in turn, in drawn order."""
    for call in calls.values():
        call()
    return {name: statistics.median(values) for name, values in measure(calls, rounds).items()}


if __name__ == "__main__":
    main()
