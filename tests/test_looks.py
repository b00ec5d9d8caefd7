"""The groups of blank images against a loop that follows the rule word by word."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.looks import ALIKE, Looks, join_by_tree, join_looks, join_one_by_one


def naive(looks: Looks) -> list[int]:
    found: list[int] = []
    for i, look in enumerate(looks.tolist()):
        keepers = [k for k in range(i) if found[k] == k]
        alike = (k for k in keepers if all(abs(a - b) <= ALIKE for a, b in zip(look, looks[k].tolist(), strict=True)))
        found.append(next(alike, i))
    return found


def looks_of(kind: str, n: int, seed: int) -> Looks:
    """Return looks of a kind of page: where most are alike, where none are, and where it hangs on a level."""
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.integers(0, 256, (n, 64)).astype(np.int16)
    if kind == "steps":  # each cell is one of levels that are just alike, or just not
        return (100 + random.choice([0, 6, 7, 13], (n, 64), p=[0.9, 0.04, 0.03, 0.03])).astype(np.int16)
    if kind == "two levels":  # which no darkest or lightest cell tells apart
        return (246 + 8 * random.integers(0, 2, (n, 64))).astype(np.int16)
    if kind == "specks":
        return np.where(random.random((n, 64)) < 0.04, random.integers(0, 250, (n, 64)), 255).astype(np.int16)
    grounds = random.integers(0, 256, (max(n // 10, 1), 64))
    return np.clip(grounds[random.integers(0, len(grounds), n)] + random.integers(-4, 5, (n, 64)), 0, 255).astype(
        np.int16
    )


KINDS = ["noise", "steps", "two levels", "specks", "grounds"]


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.integers(0, 120), seed=st.integers(0, 2**32 - 1))
def test_both_ways_give_what_the_rule_gives(kind: str, n: int, seed: int) -> None:
    looks = looks_of(kind, n, seed)
    expected = naive(looks)
    assert join_one_by_one(looks).tolist() == expected
    assert join_by_tree(looks).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_looks_are_joined_alike_by_both(kind: str) -> None:
    looks = looks_of(kind, 6000, 7)
    looks = np.concatenate([looks, np.clip(looks[::3] + 6, 0, 255), looks[::5], looks[:1] - 7 + 0 * looks[:9]])
    looks = np.clip(looks[np.random.default_rng(0).permutation(len(looks))], 0, 255).astype(np.int16)
    np.testing.assert_array_equal(join_by_tree(looks), join_one_by_one(looks))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_looks_are_joined_in_seconds(kind: str) -> None:
    looks = looks_of(kind, 100_000, 3)
    start = time.process_time()
    joined = join_looks(looks)
    assert time.process_time() - start < 20
    assert (joined[joined] == joined).all()
    assert (np.abs(looks - looks[joined]).max(1) <= ALIKE).all()
