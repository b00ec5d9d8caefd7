"""Every kind of malformed and odd input through a whole run: its outcome, and its neighbours untouched."""

from __future__ import annotations

from pathlib import Path

import hostile_images  # noqa: F401  (enters its kinds)
import hostile_samples  # noqa: F401
import hostile_shards  # noqa: F401
import pytest
from hostile import SAMPLES, SHARDS, Draw, run_on

from memfilter.records import BAD_CODES

KINDS = [*SAMPLES, *SHARDS]
HEAVY = {"caption_of_10_MB", "caption_that_expands", "caption_over_max_bytes", "image_over_max_bytes"}
"""Kinds of which one seed is enough here."""


def test_there_are_kinds_of_every_outcome() -> None:
    assert len(KINDS) == len(set(KINDS)) >= 75
    draws = [Draw(kind, 0) for kind in SAMPLES]
    found = {outcome for d in draws for _, outcome in SAMPLES[d.kind](d.random, "k").rows}
    assert found - {"good", "good|unreadable_image"} == set(BAD_CODES)


def test_no_two_seeds_of_a_kind_that_varies_give_the_same_input() -> None:
    for kind in KINDS:
        make = (lambda r, k=kind: SAMPLES[k](r, "k").members) if kind in SAMPLES else (lambda r, k=kind: SHARDS[k](r))
        if kind not in HEAVY:
            assert make(Draw(kind, 1).random) == make(Draw(kind, 1).random), kind
            assert len({str(make(Draw(kind, seed).random)) for seed in range(4)}) > 1, kind


@pytest.mark.parametrize("seeds", [[0, 1], [2]])
def test_every_kind_has_its_outcome_and_leaves_its_neighbours_as_they_are(
    seeds: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draws = [Draw(kind, seed) for seed in seeds for kind in KINDS if kind not in HEAVY or seed == 0]
    assert run_on(draws, tmp_path / "inside" / "work") == []
    assert capfd.readouterr() == ("", "")
