"""How well a trained model's magnitudes tell captions that it saw often from those as specific that it saw once.

    OMP_NUM_THREADS=1 python benchmarks/train_magnitude_model.py FOLDER
    OMP_NUM_THREADS=1 python benchmarks/magnitudes.py FOLDER --json benchmarks/results/magnitudes.json \
        --figure benchmarks/results/magnitudes.png

TPR@1%FPR and its intervals are those of `detect.py`.  A pair is drawn again when the pixels of a generation (ten DDIM
steps, guidance 2, one seed) and of the training picture correlate by more than 0.9.  Errors of float16 and bfloat16 are
those of a magnitude relative to that in float32, the rounding of the weights included.  Seconds are the process's own,
medians over rounds in which the signals take turns, and a signal's cost is relative to the magnitude of one seed.  Of
every signal the higher values count as memorized; attention entropy is given reversed too, as which way it points is
the model's.

The words that are shown are those of the repeated pair with the median magnitude.  A word's share is its part of the
weights of its caption's words.  All specific captions are built alike, so that the mean share in those seen once tells
how much of a word's weight comes with its place.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detect import Prompts, by_kind
from environment import write_result
from scipy.stats import spearmanr
from train_magnitude_model import samples

from memfilter.attribution import attribute
from memfilter.calibration import RATE, measures, operating_point
from memfilter.config import STEPS
from memfilter.demo.data import TIMES, Planted, unseen_captions
from memfilter.demo.memorized import ALIKE, generate, likeness, pixels
from memfilter.denoisers import Condition, Denoiser, find_model, load_denoiser
from memfilter.magnitude import Scorer, eps_factor
from memfilter.precision import rounding_errors
from memfilter.records import Floats
from memfilter.signals import anisotropy, anisotropy_weights, attention_entropy, late_timestep, sharpness

SEEDS = 4
ENTROPY, REVERSED = "attention entropy", "attention entropy, reversed"
DTYPES = ("float16", "bfloat16")
REPEATED, ONCE, ORDINARY, UNSEEN = KINDS = (
    f"specific, seen {TIMES} times",
    "specific, seen once",
    "ordinary, seen once",
    "specific, never seen",
)
By = dict[str, Floats]
"""Scores by kind of caption."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path, help="the folder that train_magnitude_model.py wrote")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--figure", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    pairs = by_times(samples())
    result, magnitudes = evaluate(given.model, pairs, given.rounds)
    if given.figure:
        plot(result, magnitudes, given.figure)
    write_result(result, given.json)


def by_times(planted: list[Planted]) -> dict[str, list[Planted]]:
    """Return the pairs by how often they are there and how specific their captions are."""
    repeated = sorted({p.original for p in planted if p.kind == "repeated pair"})
    once = sorted({i for i, p in enumerate(planted) if p.kind == "specific"} - {*repeated})
    return {
        REPEATED: [planted[i] for i in repeated],
        ONCE: [planted[i] for i in once],
        ORDINARY: [p for p in planted if p.kind == "single"],
    }


def evaluate(
    model: Path, pairs: dict[str, list[Planted]], rounds: int, dtypes: tuple[str, ...] = DTYPES, batch_size: int = 64
) -> tuple[dict[str, Any], By]:
    """Return the figures as JSON, and the magnitudes of one seed by kind."""
    captions = {kind: [p.caption for p in own] for kind, own in pairs.items()}
    n = len(captions[ONCE])
    captions[UNSEEN] = unseen_captions([p for own in pairs.values() for p in own], 2 * n)[n:]
    prompts = Prompts({REPEATED: captions[REPEATED]}, {kind: captions[kind] for kind in KINDS[1:]})
    everything = [c for kind in KINDS for c in captions[kind]]

    def by(scores: Floats) -> By:
        ends = np.cumsum([len(captions[kind]) for kind in KINDS])[:-1]
        return dict(zip(KINDS, np.split(scores, ends), strict=True))

    scores, seconds = timed(model, everything, rounds, batch_size)
    scores[REVERSED], seconds[REVERSED] = -scores[ENTROPY], seconds[ENTROPY]
    one, several = scores["magnitude, 1 seed"][:, 0], scores[f"magnitude, {SEEDS} seeds"]
    magnitudes = by(one)
    point = operating_point(magnitudes[REPEATED], magnitudes[ONCE], RATE)
    result = {
        "model": model.name,
        "threads": torch.get_num_threads(),
        "captions": {kind: len(own) for kind, own in captions.items()},
        "drawn_again": {kind: drawn(model, pairs[kind]) for kind in (REPEATED, ONCE)},
        "threshold_at_1_fpr": point,
        "signals": {
            name: {
                "seconds": seconds[name],
                "cost": round(seconds[name] / seconds["magnitude, 1 seed"], 2),
                **by_kind(prompts, dict(zip(everything, value.mean(1), strict=True))),
            }
            for name, value in scores.items()
        },
        "each_seed": [
            {"seed": i, "against": kind, **measures(own[REPEATED], own[kind])}
            for i, own in enumerate(by(seed) for seed in several.T)
            for kind in (ONCE, UNSEEN)
        ],
        "by_shared_words": {
            kind: by_shared_words(captions[kind], captions[REPEATED], magnitudes[kind], point["threshold"])
            for kind in (ONCE, UNSEEN)
        },
        "precision": {dtype: precision(model, dtype, batch_size, everything, by, one) for dtype in dtypes},
        "words": words(model, captions, magnitudes[REPEATED]),
    }
    return result, magnitudes


def timed(model: Path, captions: list[str], rounds: int, batch_size: int) -> tuple[dict[str, Floats], dict[str, float]]:
    """Return (N, seeds) scores of each signal, and the median seconds that it takes for all captions."""
    warm = {seeds: Scorer.load(str(model), seeds=seeds, dtype="float32", batch_size=batch_size) for seeds in (1, SEEDS)}
    ways: dict[str, Callable[[], Floats]] = {
        "magnitude, 1 seed": lambda: warm[1].score(captions),
        f"magnitude, {SEEDS} seeds": lambda: warm[SEEDS].score(captions),
        **further_signals(warm[1].denoiser, captions, batch_size),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for _ in range(rounds):
        for name, score in ways.items():
            started = time.process_time()
            scores[name] = score().reshape(len(captions), -1)
            spent[name].append(time.process_time() - started)
    return scores, {name: round(statistics.median(times), 2) for name, times in spent.items()}


def further_signals(denoiser: Denoiser, captions: list[str], batch_size: int) -> dict[str, Callable[[], Floats]]:
    """Return what computes the (N,) scores of each further signal, from the noise of the magnitude's first seed."""
    noise = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    x = noise.to(denoiser.device, denoiser.dtype).expand(batch_size, *noise.shape)
    first, late = denoiser.first_timestep(STEPS), late_timestep(denoiser)
    factor = eps_factor(denoiser.prediction_type, denoiser.alpha_bar(first))
    weights = anisotropy_weights(denoiser.prediction_type, factor, denoiser.latent_shape)
    with torch.inference_mode():
        nothing = denoiser.unconditional(batch_size)
        e_u = {t: denoiser.predict(x, t, nothing) for t in (first, late)}

    def entropy(condition: Condition) -> torch.Tensor:
        with attention_entropy(denoiser) as read:
            denoiser.predict(x, first, condition)
        return read()

    def bent(condition: Condition) -> torch.Tensor:
        at_first, at_late = (denoiser.predict(x, t, condition) - e_u[t] for t in (first, late))
        return anisotropy(at_first.flatten(1).norm(dim=1), e_u[late], at_late, weights)

    def sharp(condition: Condition) -> torch.Tensor:
        return sharpness(denoiser, x, first, condition, nothing, denoiser.predict(x, first, condition) - e_u[first])

    def scored(signal: Callable[[Condition], torch.Tensor]) -> Floats:
        rows = []
        with torch.inference_mode():
            for start in range(0, len(captions), batch_size):
                batch = captions[start : start + batch_size]
                # a short batch is filled up, as the scorer does
                condition = denoiser.encode(batch + [""] * (batch_size - len(batch)))
                rows.append(signal(condition)[: len(batch)].cpu().numpy())
        return np.concatenate(rows)

    signals = {
        ENTROPY: entropy,
        "anisotropy": bent,
        "sharpness": sharp,
    }
    return {name: partial(scored, signal) for name, signal in signals.items()}


def drawn(model: Path, pairs: list[Planted]) -> dict[str, Any]:
    """Return how many of the pairs the model draws again, and how alike drawing and picture are."""
    pictures = np.stack([pixels(p.data) for p in pairs])
    alike = likeness(generate(model, [p.caption for p in pairs]), pictures)
    spread = [round(float(x), 3) for x in np.quantile(alike, (0, 0.5, 1))]
    return {"pairs": len(pairs), "drawn_again": int((alike > ALIKE).sum()), "likeness": spread}


def by_shared_words(
    captions: list[str], repeated: list[str], magnitudes: Floats, threshold: float
) -> dict[str, dict[str, Any]]:
    """Return magnitudes by how many words a caption shares with a repeated one, that with which it shares most."""
    keys = [_words(c) for c in repeated]
    shared = np.array([max(len(_words(c) & key) for key in keys) for c in captions])
    found = {}
    for count in np.unique(shared):
        own = magnitudes[shared == count]
        found[str(count)] = {
            "captions": len(own),
            "magnitudes": [round(float(x), 4) for x in np.quantile(own, (0, 0.5, 1))],
            "over_threshold": int((own >= np.float32(threshold)).sum()),
        }
    return found


def _words(caption: str) -> set[str]:
    return {*re.findall(r"\w+", caption)} - {"of"}


def precision(
    model: Path, dtype: str, batch_size: int, captions: list[str], by: Callable[[Floats], By], exact: Floats
) -> dict[str, Any]:
    """Return how far the magnitudes of one seed in this precision are from those in float32, and their measures."""
    files = find_model(str(model))
    working, full = load_denoiser(files, dtype), load_denoiser(files, "float32")
    rounded = Scorer(working, batch_size=batch_size).score(captions).reshape(len(captions), -1)[:, 0]
    error = np.abs(rounded - exact) / exact
    own, truth = by(rounded), by(exact)
    return {
        "relative_error": [float(f"{x:.3g}") for x in np.quantile(error, (0.5, 0.99, 1))],
        "rank_correlation": float(spearmanr(rounded, exact).statistic),
        "rank_correlation_by_kind": {kind: float(spearmanr(own[kind], truth[kind]).statistic) for kind in KINDS},
        "noise_floor": float(rounding_errors(working, full).max()),
        **measures(own[REPEATED], own[ONCE]),
    }


# -- the words --------------------------------------------------------------------------------------------------------


def words(model: Path, captions: dict[str, list[str]], magnitudes: Floats) -> dict[str, Any]:
    """Return each word's share in the repeated caption with the median magnitude, and the mean shares of the places, in
    the repeated captions and in as many that were seen once.
    """
    denoiser = load_denoiser(find_model(str(model)), "float32")
    repeated = captions[REPEATED]
    found = {kind: [attribute(denoiser, c).words for c in captions[kind][: len(repeated)]] for kind in (REPEATED, ONCE)}
    shares = {kind: np.array([[w for _, w in one] for one in own]) for kind, own in found.items()}
    shares = {kind: own / own.sum(1, keepdims=True) for kind, own in shares.items()}
    typical = int(np.argsort(magnitudes)[(len(magnitudes) - 1) // 2])
    return {
        "caption": repeated[typical],
        "magnitude": float(magnitudes[typical]),
        "words": [
            {"text": text, "weight": weight, "share": float(share)}
            for (text, weight), share in zip(found[REPEATED][typical], shares[REPEATED][typical], strict=True)
        ],
        "mean_share_by_place": {kind: own.mean(0).round(4).tolist() for kind, own in shares.items()},
        "heaviest_by_place": {
            kind: np.bincount(own.argmax(1), minlength=own.shape[1]).tolist() for kind, own in shares.items()
        },
    }


# -- the figure -------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], magnitudes: By, path: Path) -> None:
    """Draw the magnitudes of repeated and once-seen captions with the threshold, and the words of one caption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    red, grey = "firebrick", "0.55"
    threshold, told = result["threshold_at_1_fpr"]["threshold"], result["words"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(4, 3))
    bins = np.linspace(0, max(m.max() for m in (magnitudes[REPEATED], magnitudes[ONCE])) * 1.02, 60)
    for kind, colour in ((ONCE, grey), (REPEATED, red)):
        own = magnitudes[kind]
        left.hist(own, bins, weights=np.full(len(own), 100 / len(own)), color=colour, alpha=0.8)
        top = f"{kind} ({len(own)})"
        left.plot([], [], color=colour, linewidth=6, alpha=0.8, label=top)
    left.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"1% false positives: {threshold:.2f}")
    left.set(xlabel="magnitude, one seed, first step", ylabel="% of the captions of its kind")
    left.set_title("Captions equally specific", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    names = [word["text"] for word in told["words"]]
    places = np.arange(len(names))
    right.barh(places, [100 * word["share"] for word in told["words"]], color=red, alpha=0.8, height=0.6)
    usual = 100 * np.array(told["mean_share_by_place"][ONCE])
    right.vlines(usual, places - 0.4, places + 0.4, color="black", linewidth=1.5, label="mean of this place, seen once")
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set_xlabel("share of the caption's weights, %")
    right.set_title(f"Words of the median repeated caption ({told['magnitude']:.2f})", fontsize=10)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
