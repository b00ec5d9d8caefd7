"""Measures of copy detection on arrays of scores, a higher score for the likelier pair and -inf for one not found.

A pair is an edge when its score is at or above a threshold, so pairs of one score stand or fall together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Truth = npt.NDArray[np.bool_]
Pairs = Set[tuple[int, int]]

EVERYTHING = float(np.finfo(np.float32).min)
"""The threshold that takes every pair that was found."""


@dataclass(frozen=True)
class Edges:
    """Pairs of images by their places, the smaller first, and the score of each."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    score: Scores


def curve(scores: Scores, truth: Truth) -> tuple[Scores, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the distinct scores found, downwards, with precision and recall where each is the threshold."""
    flat, is_true = scores.ravel(), truth.ravel()
    found = flat > -np.inf
    order = np.argsort(-flat[found], kind="stable")
    ranked, hits = flat[found][order], np.cumsum(is_true[found][order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.empty(0, np.int64)
    return ranked[last], hits[last] / (last + 1), hits[last] / max(1, is_true.sum())


def average_precision(scores: Scores, truth: Truth) -> float:
    """Return the precision averaged over the true pairs; one that was not found counts as 0."""
    _, precision, recall = curve(scores, truth)
    return float((np.diff(recall, prepend=0) * precision).sum())


def threshold_at_precision(scores: Scores, truth: Truth, precision: float) -> float:
    """Return the lowest threshold with at least this precision, inf where none has it."""
    values, reached, _ = curve(scores, truth)
    good = np.flatnonzero(reached >= precision)
    return float(values[good[-1]]) if len(good) else float("inf")


def threshold_at_edges(scores: Scores, allowed: int) -> float:
    """Return the lowest threshold that at most `allowed` of these scores reach; only the highest are needed."""
    found = scores[scores > -np.inf]
    if len(found) <= allowed:
        return EVERYTHING
    bar = np.partition(found, len(found) - 1 - allowed)[len(found) - 1 - allowed]
    return float(np.nextafter(bar, np.float32(np.inf)))


def recall(scores: Scores, truth: Truth, threshold: float) -> float:
    """Return the share of the true pairs that are edges; nan where there is none."""
    return float((scores[truth] >= np.float32(threshold)).mean()) if truth.any() else float("nan")


def precision(scores: Scores, truth: Truth, threshold: float) -> float:
    """Return the share of the edges that are true pairs; nan where there is none."""
    edges = scores >= np.float32(threshold)
    return float(truth[edges].mean()) if edges.any() else float("nan")


def highest(
    blocks: Iterator[tuple[int, Scores]], keep: int, threshold: float, excluded: Pairs = frozenset()
) -> tuple[Edges, int]:
    """Return the `keep` pairs of highest score within one set, and how many reach the threshold.

    A block is the place of its first row and the scores of some rows against all images.  Excluded pairs, the smaller
    place first, do not count.
    """
    kept = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    floor, reached = np.float32(EVERYTHING), 0
    for start, scores in blocks:
        counts = np.arange(scores.shape[1])[None] > start + np.arange(len(scores))[:, None]
        for i, j in excluded:
            if start <= i < start + len(scores):
                counts[i - start, j] = False
        reached += int(((scores >= np.float32(threshold)) & counts).sum())
        rows, columns = np.nonzero((scores >= floor) & counts)
        kept = Edges(
            np.concatenate([kept.first, start + rows]),
            np.concatenate([kept.second, columns]),
            np.concatenate([kept.score, scores[rows, columns]]),
        )
        order = np.argsort(-kept.score, kind="stable")[:keep]
        kept = Edges(kept.first[order], kept.second[order], kept.score[order])
        if len(order) == keep:
            floor = np.nextafter(kept.score[-1], np.float32(np.inf))
    return kept, reached


def blocks(
    score: Callable[[npt.NDArray[np.generic], npt.NDArray[np.generic]], Scores],
    rows: npt.NDArray[np.generic],
    size: int,
) -> Iterator[tuple[int, Scores]]:
    """Yield the scores of all rows against all, `size` rows at a time, each with the place of its first row."""
    for start in range(0, len(rows), size):
        yield start, score(rows[start : start + size], rows)


def matrix(edges: Edges, shape: tuple[int, int]) -> Scores:
    """Return the scores of edges from the first `shape[0]` images to the `shape[1]` after them; -inf for no edge."""
    scores = np.full(shape, -np.inf, np.float32)
    across = (edges.first < shape[0]) & (edges.second >= shape[0])
    place = edges.first[across], edges.second[across] - shape[0]
    np.maximum.at(scores, place, edges.score[across])
    return scores


def without(edges: Edges, pairs: Pairs) -> Edges:
    """Return the edges but those of these pairs, the smaller place first."""
    stay = np.array([pair not in pairs for pair in zip(edges.first.tolist(), edges.second.tolist(), strict=True)], bool)
    return Edges(edges.first[stay], edges.second[stay], edges.score[stay])
