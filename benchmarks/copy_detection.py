"""Copy detection against its peers, in one run: 180 photos, 45 kinds of edits at three strengths, 10,000 distractors.

    python benchmarks/copy_detection.py --fastdup ENV/bin/python --json benchmarks/results/copy_detection.json

Recall is the share of the pairs (photo, its copy) that are found; a collage is a copy of both its photos, and two
copies of one photo are no pair.  It is quoted at two thresholds: where 99 of 100 pairs that a method calls copies among
all (photo, copy) are, and where it calls at most one pair in 10^7 a copy among 10,000 photos of which no two are, but
for the pairs in natural_duplicates.csv.  Beside the JSON come a table (.md) and a plot (.png).

The images are written once to --cache (3 GB, 4 minutes of one core), signatures too, and read from there by later
runs; --methods measures some again and takes the others from their cached signatures.  Times are of one core.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from copy_report import markdown, plot
from copy_set import CopySet, ImageSet, copy_set, distractor_set
from detectors import METHODS, SPARSE, Signed, combined, fastdup, signature_file, signatures
from environment import write_result
from scoring import (
    Edges,
    Pairs,
    Scores,
    average_precision,
    blocks,
    highest,
    matrix,
    precision,
    recall,
    threshold_at_edges,
    threshold_at_precision,
    without,
)
from transformations import KINDS, STRENGTHS

DATA = Path("../shared/data")
PER_PAIRS = 10_000_000
_KEPT = 2000  # pairs of highest score among the distractors
_ROWS = 500


@dataclass(frozen=True)
class Found:
    """What one method makes of both sets: scores (originals, copies), and the likeliest pairs of distractors."""

    scores: Scores
    false: Scores
    default: float
    false_at_default: int
    milliseconds: float
    decode: float


@dataclass(frozen=True)
class Bench:
    """Both sets of images, the natural duplicates among the distractors, and where fastdup is."""

    copies: CopySet
    distractors: ImageSet
    duplicates: Pairs
    fastdup: Path | None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--photos", type=Path, nargs="+", default=[DATA / "photos/00002.tar", DATA / "coco/00000.tar"]
    )
    distractors = [DATA / "unlabelled/00002.tar", DATA / "unlabelled/00003.tar"]
    arguments.add_argument("--distractors", type=Path, nargs="+", default=distractors)
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/copy_detection"))
    arguments.add_argument("--methods", nargs="+", default=[], choices=[*METHODS, *SPARSE], help="to measure again")
    arguments.add_argument(
        "--fastdup", type=Path, help="the Python of an environment with fastdup; without, it is left out"
    )
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    logging.disable(logging.INFO)
    images = distractor_set(given.distractors, given.cache)
    bench = Bench(copy_set(given.photos, given.cache), images, natural_duplicates(images), given.fastdup)
    forget(bench, given.methods)
    result = measure(bench)
    write_result(result, given.json)
    if given.json:
        given.json.with_suffix(".md").write_text(markdown(result))
        plot(result, given.json.with_suffix(".png"))


def natural_duplicates(images: ImageSet) -> Pairs:
    """Return the listed pairs by place, the smaller first."""
    place = {key: i for i, key in enumerate(images.keys)}
    with Path(__file__).with_name("natural_duplicates.csv").open(newline="") as file:
        rows = [(place[row["one"]], place[row["other"]]) for row in csv.DictReader(file)]
    return {(min(pair), max(pair)) for pair in rows}


def measure(bench: Bench) -> dict[str, Any]:
    found, versions = {}, {"pdqhash": version("pdqhash")}
    sets = (bench.copies.images, bench.distractors)
    for name in METHODS:
        if METHODS[name].signature != "fastdup":
            found[name] = _dense(bench, name, *(signatures(s, METHODS[name].signature) for s in sets))
    if bench.fastdup:
        parts = [fastdup(s, bench.fastdup) for s in sets]
        found["fastdup"] = _dense(bench, "fastdup", parts[0][0], parts[1][0])
        found["fastdup_own_edges"] = _sparse(bench, parts[0][1], parts[1][1], 0.9, parts[0][0].milliseconds)
        versions["fastdup"] = parts[0][2]
    theirs, _, lowest = _combined(bench.distractors, None, 0.0)
    ours, milliseconds, _ = _combined(bench.copies.images, bench.copies.originals, lowest)
    found["memfilter"] = _sparse(bench, ours, theirs, 0.0, milliseconds)
    n = len(bench.distractors.files)
    return {
        "photos": bench.copies.originals,
        "copies": bench.copies.truth.shape[1],
        "true_pairs": int(bench.copies.truth.sum()),
        "distractors": n,
        "pairs_of_distractors": n * (n - 1) // 2,
        "natural_duplicates_taken_out": len(bench.duplicates),
        "peers": versions,
        "training_has_seen": {name: kind.training for name, kind in KINDS.items()},
        "methods": {name: _judged(bench, f) for name, f in found.items()},
    }


# -- the cache --------------------------------------------------------------------------------------------------------


def forget(bench: Bench, methods: list[str]) -> None:
    """Remove the cached signatures of these methods."""
    for method in methods:
        signature = METHODS[method].signature if method in METHODS else method.removesuffix("_own_edges")
        for image_set in (bench.copies.images, bench.distractors):
            signature_file(image_set, signature).unlink(missing_ok=True)


def _combined(image_set: ImageSet, among: int | None, lowest: float) -> tuple[Edges, float, float]:
    path = signature_file(image_set, "memfilter")
    if not path.exists():
        edges, milliseconds, lowest = combined(image_set, among, lowest)
        np.savez(path, **asdict(edges), milliseconds=milliseconds, lowest=lowest)
    stored = np.load(path)
    edges = Edges(stored["first"], stored["second"], stored["score"])
    return edges, float(stored["milliseconds"]), float(stored["lowest"])


# -- scores and measures ----------------------------------------------------------------------------------------------


def _dense(bench: Bench, name: str, ours: Signed, theirs: Signed) -> Found:
    method, n = METHODS[name], bench.copies.originals
    pairs = blocks(method.score, theirs.rows, _ROWS)
    edges, false = highest(pairs, _KEPT, method.default, bench.duplicates)
    scores = method.score(ours.rows[:n], ours.rows[n:])
    return Found(scores, edges.score, method.default, false, ours.milliseconds, ours.decode)


def _sparse(bench: Bench, ours: Edges, theirs: Edges, default: float, milliseconds: float) -> Found:
    scores = matrix(ours, bench.copies.truth.shape)
    false = without(theirs, bench.duplicates).score
    return Found(scores, false, default, int((false >= default).sum()), milliseconds, float("nan"))


def _judged(bench: Bench, found: Found) -> dict[str, Any]:
    truth = bench.copies.truth
    n = len(bench.distractors.files)
    pairs = n * (n - 1) / 2
    allowed = round(pairs / PER_PAIRS)
    thresholds = {
        "at_precision_0.99": threshold_at_precision(found.scores, truth, 0.99),
        "at_1_false_in_1e7": threshold_at_edges(found.false, allowed),
        "as_it_comes": found.default,
    }
    decode = None if np.isnan(found.decode) else round(found.decode, 2)
    return {
        "average_precision": round(average_precision(found.scores, truth), 4),
        **{
            name: {
                "recall": round(recall(found.scores, truth, at), 4),
                "precision": _rounded(precision(found.scores, truth, at)),
                "threshold": _raised(at),
            }
            for name, at in thresholds.items()
        },
        "false_in_1e7_as_it_comes": round(found.false_at_default / pairs * PER_PAIRS, 1),
        "milliseconds_per_image": round(found.milliseconds, 2),
        "of_which_decode": decode,
        "images_per_second": round(1000 / found.milliseconds),
        "recall_of_unseen_kinds": {
            name: round(recall(found.scores[:, chosen], truth[:, chosen], at), 4)
            for name, at in thresholds.items()
            for chosen in [_of_kinds(bench, [k for k, kind in KINDS.items() if kind.training == "no"])]
        },
        "recall_by_kind": {
            name: _by_kind(bench, found.scores, thresholds[name]) for name in ("at_precision_0.99", "at_1_false_in_1e7")
        },
    }


def _of_kinds(bench: Bench, kinds: list[str]) -> Any:
    return np.isin(bench.copies.kind, [list(KINDS).index(kind) for kind in kinds])


def _by_kind(bench: Bench, scores: Scores, threshold: float) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        of_kind = _of_kinds(bench, [kind])
        table[kind] = {}
        for level, strength in enumerate(STRENGTHS):
            chosen = of_kind & (bench.copies.strength == level)
            table[kind][strength] = round(recall(scores[:, chosen], bench.copies.truth[:, chosen], threshold), 3)
    return table


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def _raised(threshold: float) -> float | None:
    """Return a threshold for a JSON, rounded so that no further pair reaches it; None where it takes all or nothing."""
    return math.ceil(1e6 * threshold) / 1e6 if abs(threshold) < 1e9 else None


if __name__ == "__main__":
    main()
