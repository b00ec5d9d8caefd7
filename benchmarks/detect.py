"""How well the first-step magnitude of a model tells memorized prompts from others, by type, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/detect.py --json benchmarks/results/detect.json
    python benchmarks/detect.py CompVis/stable-diffusion-v1-4 --memorized sd1_memorized_prompts.csv \
        --unmemorized sd1_unmemorized_prompts.csv --json sd14.json

The first line evaluates the demo's model on the demo's captions: the 40 that it saw 25 times against 40 equally
specific and 800 ordinary ones that it saw once, and against 400 equally specific ones that it never saw.  The second is
for any model, a folder or a hub id, on prompts in CSV files with a column `Caption` and, for the memorized, `type`.  Of
the 500 memorized prompts of Stable Diffusion 1 the 112 of type VM are copied (a greatest SSCD similarity above 0.7) and
the 388 of type TM match a template; Wen et al. 2024 report AUC 0.960 and TPR@1%FPR 0.760 for all of them and one seed.

TPR@1%FPR is the largest TPR among thresholds with an FPR below 1%; intervals are 95% percentile intervals of 1,000
resamples, stratified by label.  The two-pass loop predicts for every caption and seed with and without the caption, on
the same model and in batches of the same size.  Seconds are medians over rounds in which the ways take turns: on a CPU
those of the process, so that other work on the machine does not count, and on a GPU those of the clock.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import write_result

from memfilter.calibration import measures
from memfilter.config import STEPS
from memfilter.demo.data import TIMES, samples, unseen_captions
from memfilter.demo.memorized import MODEL
from memfilter.denoisers import Denoiser, find_model, load_denoiser
from memfilter.magnitude import Scorer
from memfilter.records import Floats

SEEDS = (1, 4)
"""Numbers of seeds; the last is the number of images a prompt from which the paper's way takes its score."""


@dataclass(frozen=True)
class Prompts:
    """Captions by their kind."""

    memorized: dict[str, list[str]]
    others: dict[str, list[str]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "model", nargs="?", default=str(MODEL), help="a pipeline's folder or hub id; else the demo's"
    )
    arguments.add_argument("--demo", action="store_true", help="the demo's captions, as without CSV files")
    arguments.add_argument("--memorized", type=Path)
    arguments.add_argument("--unmemorized", type=Path)
    arguments.add_argument("--dtype", default="auto")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    files = (given.memorized, given.unmemorized)
    if (None in files and any(files)) or (given.demo and any(files)) or (not any(files) and given.model != str(MODEL)):
        arguments.error("give --memorized and --unmemorized, or neither and the demo's own model")
    prompts = read_prompts(*files) if given.memorized else demo_prompts()
    write_result(evaluate(given.model, prompts, given.dtype, given.batch_size, given.rounds), given.json)


# -- prompts ----------------------------------------------------------------------------------------------------------


def demo_prompts() -> Prompts:
    """Return the demo's captions: repeated ones, and those that its model saw once or never."""
    planted = samples()
    repeated = {p.original for p in planted if p.kind == "repeated pair"}
    specific = [i for i, p in enumerate(planted) if p.kind == "specific"]
    return Prompts(
        {f"specific, seen {TIMES} times": [planted[i].caption for i in specific if i in repeated]},
        {
            "specific, seen once": [planted[i].caption for i in specific if i not in repeated],
            "ordinary, seen once": [p.caption for p in planted if p.kind == "single"],
            "specific, never seen": unseen_captions(planted, 800)[400:],
        },
    )


def read_prompts(memorized: Path, unmemorized: Path) -> Prompts:
    """Return the prompts of two CSV files, the memorized by their type, and all of them where there are several."""
    by_type: dict[str, list[str]] = {}
    for row in _rows(memorized):
        by_type.setdefault(row.get("type") or "memorized", []).append(row["caption"])
    everything = {"all": [c for captions in by_type.values() for c in captions]} if len(by_type) > 1 else {}
    return Prompts({**by_type, **everything}, {"unmemorized": [row["caption"] for row in _rows(unmemorized)]})


def _rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8-sig")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
    if "caption" not in names:
        raise SystemExit(f"{path}: the header has no column 'Caption': {header.strip()}")
    return list(csv.DictReader(io.StringIO(text.partition("\n")[2]), names, delimiter=delimiter))


# -- the evaluation ---------------------------------------------------------------------------------------------------


def evaluate(spec: str, prompts: Prompts, dtype: str, batch_size: int, rounds: int) -> dict[str, object]:
    """Return measures by kind and seconds by number of seeds, as JSON."""
    import torch

    denoiser = load_denoiser(model := find_model(spec), dtype)
    captions = sorted({c for kinds in (prompts.memorized, prompts.others) for kind in kinds.values() for c in kind})
    Scorer(denoiser, 1, batch_size).score(captions[:batch_size])  # warms up
    ways: dict[tuple[str, int], Callable[[], Floats]] = {}
    for n in SEEDS:
        ways["cached", n] = lambda n=n: Scorer(denoiser, n, batch_size).score(captions)
        ways["two-pass", n] = lambda n=n: two_passes(denoiser, captions, n, batch_size)
    scores: dict[tuple[str, int], Floats] = {}
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    clock = time.process_time if denoiser.device.type == "cpu" else time.perf_counter
    for _ in range(rounds):
        for way, score in ways.items():
            started = clock()
            scores[way] = score()
            seconds[way].append(clock() - started)
    spent = {way: statistics.median(times) for way, times in seconds.items()}
    of_all = {n: dict(zip(captions, scores["cached", n].mean(1), strict=True)) for n in SEEDS}
    return {
        "model": model.name,
        "device": denoiser.device.type,
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "rounds": rounds,
        "distinct_captions": len(captions),
        "seeds": {str(n): {**costs(spent, n, len(captions)), **by_kind(prompts, of_all[n])} for n in SEEDS},
        "largest_relative_difference_from_two_pass": max(
            float((np.abs(scores["cached", n] - scores["two-pass", n]) / scores["two-pass", n]).max()) for n in SEEDS
        ),
        "one_seed_faster_than_two_passes_for_four_images": round(
            spent["two-pass", SEEDS[-1]] / spent["cached", SEEDS[0]], 2
        ),
    }


def two_passes(denoiser: Denoiser, captions: list[str], seeds: int, batch_size: int) -> Floats:
    """Return (N, seeds) magnitudes, of which every one costs a prediction with its caption and one without."""
    import torch

    timestep = denoiser.first_timestep(STEPS)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            conditional, unconditional = denoiser.encode(batch), denoiser.unconditional(len(batch))
            columns = []
            for seed in range(seeds):
                x = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))
                x = x.to(denoiser.device, denoiser.dtype).expand(len(batch), *x.shape)
                with_caption = denoiser.predict(x, timestep, conditional).float()
                without = denoiser.predict(x, timestep, unconditional).float()
                columns.append((with_caption - without).flatten(1).norm(dim=1))
            rows.append(torch.stack(columns, dim=1).cpu().numpy())
    return np.concatenate(rows)


def costs(spent: dict[tuple[str, int], float], seeds: int, captions: int) -> dict[str, Any]:
    cached, plain = spent["cached", seeds], spent["two-pass", seeds]
    return {
        "seconds": round(cached, 2),
        "captions_per_second": round(captions / cached, 1),
        "two_pass_seconds": round(plain, 2),
        "faster_than_two_pass": round(plain / cached, 2),
    }


def by_kind(prompts: Prompts, score: dict[str, Any]) -> dict[str, Any]:
    """Return least, median and greatest magnitude of each kind, and the measures of every two kinds."""
    memorized, others = (
        {name: np.array([score[c] for c in captions], np.float32) for name, captions in kinds.items()}
        for kinds in (prompts.memorized, prompts.others)
    )
    spread = {
        name: [round(float(x), 4) for x in np.quantile(values, (0, 0.5, 1))]
        for name, values in (memorized | others).items()
    }
    return {
        "magnitudes": spread,
        "measures": [
            {"kind": kind, "against": other, **measures(high, low)}
            for kind, high in memorized.items()
            for other, low in others.items()
        ],
    }


if __name__ == "__main__":
    main()
