"""The measures of copy detection against planted scores and naive counts, and the edits that make its copies."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scoring
from scoring import Edges
from transformations import KINDS, STRENGTHS, copy_of

INF = float("inf")


def photo(seed: int) -> Image.Image:
    """Return a smooth picture with some detail, 97 x 71."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((97, 71), Image.Resampling.BICUBIC)
    fine = random.normal(0, 6, (71, 97, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8))


# -- the copies -------------------------------------------------------------------------------------------------------


def test_there_are_many_kinds_at_three_strengths_and_some_that_no_training_has_seen() -> None:
    assert len(KINDS) >= 24
    assert len(STRENGTHS) == 3
    assert sum(kind.training == "no" for kind in KINDS.values()) >= 8
    assert {kind.training for kind in KINDS.values()} == {"yes", "in part", "no"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_each_time_and_another_at_each_strength(kind: str) -> None:
    one, other = photo(0), photo(1)
    before = one.tobytes(), other.tobytes()
    copies = [copy_of(one, other, kind, strength, "name") for strength in STRENGTHS]
    assert copies == [copy_of(one, other, kind, strength, "name") for strength in STRENGTHS]
    assert len({one.tobytes(), *copies}) == 4
    assert (one.tobytes(), other.tobytes()) == before


def test_a_collage_shows_a_second_photo_and_no_other_kind_does() -> None:
    for kind, made in KINDS.items():
        copies = [copy_of(photo(0), photo(other), kind, "weak", "name") for other in (1, 2)]
        assert (copies[0] != copies[1]) == made.collage, kind


# -- the measures -----------------------------------------------------------------------------------------------------

SCORES = np.array([[9, 8, 8], [7, 5, -INF]], np.float32)
TRUTH = np.array([[1, 1, 0], [0, 1, 1]], bool)


def test_pairs_of_one_score_stand_or_fall_together() -> None:
    values, precision, recall = scoring.curve(SCORES, TRUTH)
    assert values.tolist() == [9, 8, 7, 5]
    assert precision == pytest.approx([1, 2 / 3, 2 / 4, 3 / 5])
    assert recall == pytest.approx([1 / 4, 2 / 4, 2 / 4, 3 / 4])


def test_a_true_pair_without_a_score_is_never_found() -> None:
    assert scoring.recall(SCORES, TRUTH, scoring.EVERYTHING) == 3 / 4
    assert scoring.average_precision(SCORES, TRUTH) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)


def test_the_threshold_is_the_lowest_with_the_precision() -> None:
    assert scoring.threshold_at_precision(SCORES, TRUTH, 0.6) == 5
    assert scoring.threshold_at_precision(SCORES, TRUTH, 0.65) == 8
    assert scoring.threshold_at_precision(SCORES, TRUTH, 0.99) == 9
    assert scoring.threshold_at_precision(SCORES, ~TRUTH, 0.99) == INF
    assert scoring.recall(SCORES, ~TRUTH, INF) == 0
    assert scoring.precision(SCORES, TRUTH, 8) == pytest.approx(2 / 3)


@pytest.mark.parametrize("levels", [5, 1000])
def test_average_precision_equals_a_naive_count(levels: int) -> None:
    random = np.random.default_rng(levels)
    scores = random.integers(0, levels, (6, 50)).astype(np.float32)
    truth = random.random((6, 50)) < 0.2
    expected, before = 0.0, 0.0
    for value in sorted(set(scores.ravel().tolist()), reverse=True):
        edges = scores >= value
        recall = (edges & truth).sum() / truth.sum()
        expected += (recall - before) * (edges & truth).sum() / edges.sum()
        before = recall
    assert scoring.average_precision(scores, truth) == pytest.approx(expected)


def test_at_most_the_allowed_number_of_scores_reaches_the_threshold() -> None:
    scores = np.array([3, 9, 7, 7, 5, -INF], np.float32)
    reached = [int((scores >= np.float32(scoring.threshold_at_edges(scores, k))).sum()) for k in range(7)]
    assert reached == [0, 1, 1, 3, 4, 5, 5]  # the two of 7 are one step


def test_the_highest_pairs_of_a_set_are_those_of_all_its_pairs() -> None:
    random = np.random.default_rng(3)
    rows = random.standard_normal((60, 8)).astype(np.float32)
    full = rows @ rows.T
    excluded = {(3, 40), (10, 11)}
    pairs = [(i, j) for i in range(60) for j in range(i + 1, 60) if (i, j) not in excluded]
    expected = sorted(pairs, key=lambda pair: -full[pair])
    edges, reached = scoring.highest(scoring.blocks(lambda a, b: a @ b.T, rows, 7), 20, 2.0, excluded)
    assert list(zip(edges.first.tolist(), edges.second.tolist(), strict=True)) == expected[:20]
    assert reached == sum(full[pair] >= 2 for pair in pairs)


def test_sparse_edges_fill_a_matrix_with_the_best_score_of_each_pair() -> None:
    first, second = np.array([0, 0, 1, 2, 0]), np.array([2, 2, 4, 3, 1])
    edges = Edges(first, second, np.array([0.5, 0.75, 0.25, 1, 1], np.float32))
    # of the images 0 and 1 to the copies 2, 3 and 4; 2-3 and 0-1 are no such pairs
    assert scoring.matrix(edges, (2, 3)).tolist() == [[0.75, -INF, -INF], [-INF, -INF, 0.25]]
    assert scoring.without(edges, {(0, 2), (0, 1)}).score.tolist() == [0.25, 1]
