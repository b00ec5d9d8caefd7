"""Every kind of malformed and odd input through a whole run: its outcome, and its neighbours untouched."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hostile_images
import hostile_samples  # noqa: F401  (enters its kinds)
import hostile_shards  # noqa: F401
import numpy as np
import pytest
from fuzzing import Target, mutated, seeds
from hostile import (
    CONFIGS,
    MAX_BYTES,
    SAMPLES,
    SHARDS,
    Draw,
    Laid,
    block,
    find_faults,
    lay_out,
    lay_out_neighbours,
    run_on,
)

import memfilter
from memfilter import Config, ShardError
from memfilter.records import BAD_CODES

KINDS = [*SAMPLES, *SHARDS]
HEAVY = {"caption_of_10_MB", "caption_that_expands", "caption_over_max_bytes", "image_over_max_bytes"}
"""Kinds of which one seed is enough here."""


def test_there_are_kinds_of_every_outcome() -> None:
    assert len(KINDS) == len(set(KINDS)) >= 75
    draws = [Draw(kind, 0) for kind in SAMPLES]
    found = {outcome for d in draws for _, outcome in SAMPLES[d.kind](d.random, "k").rows}
    assert found - {"good", "good|unreadable_image"} == set(BAD_CODES)


def test_a_seed_gives_the_same_input_and_another_seed_another() -> None:
    for kind in set(KINDS) - HEAVY:
        make = (lambda r, k=kind: SAMPLES[k](r, "k").members) if kind in SAMPLES else (lambda r, k=kind: SHARDS[k](r))
        assert make(Draw(kind, 1).random) == make(Draw(kind, 1).random), kind
        assert any(make(Draw(kind, 1).random) != make(Draw(kind, seed).random) for seed in range(2, 9)), kind


@pytest.mark.parametrize("seeds", [[0, 1], [2]])
def test_every_kind_has_its_outcome_and_leaves_its_neighbours_as_they_are(
    seeds: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draws = [Draw(kind, seed) for seed in seeds for kind in KINDS if kind not in HEAVY or seed == 0]
    assert run_on(draws, tmp_path / "inside" / "work") == []
    assert capfd.readouterr() == ("", "")


def test_a_shard_that_is_refused_stops_the_run_in_one_line(tmp_path: Path) -> None:
    config = Config.parse({"images": {"encoder": None}, "input": {"max_bytes": MAX_BYTES}})
    for i, kind in enumerate(SHARDS):
        (laid,) = lay_out([Draw(kind, 3)], tmp_path / f"{i}")
        if laid.refusal is not None:
            with pytest.raises(ShardError) as caught:
                memfilter.run([str(tmp_path / f"{i}")], tmp_path / f"out{i}", config, workers=1)
            assert str(caught.value).startswith(f"{laid.name}: "), kind
            assert laid.refusal in str(caught.value), kind
            assert str(caught.value).isprintable(), kind


def test_what_is_not_as_expected_is_noticed(tmp_path: Path) -> None:
    draws = [Draw(kind, 0) for kind in ("exif_orientation_6", "no_image", "gzip_cut", "gzip_of_several_streams")]
    laid = lay_out(draws, tmp_path / "in")
    lay_out_neighbours(laid, tmp_path / "neighbours")
    config = CONFIGS["txt"]
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    alone = memfilter.run([str(tmp_path / "neighbours")], tmp_path / "alone", config, workers=1)
    assert find_faults(laid, manifest, alone, config) == []
    samples, cut, whole = laid
    assert samples.members
    (turned,) = samples.upright

    def is_noticed(one: Laid) -> bool:
        return bool(find_faults([one if one.name == other.name else other for other in laid], manifest, alone, config))

    assert is_noticed(replace(samples, rows=[(key, "good") for key, _ in samples.rows]))
    assert is_noticed(replace(samples, rows=samples.rows[:-1]))
    assert is_noticed(replace(samples, members=samples.members[1:]))
    assert is_noticed(replace(samples, upright={turned: hostile_images.photo(np.random.default_rng(0))}))
    assert is_noticed(replace(cut, refusal="another cause"))
    assert is_noticed(replace(cut, refusal=None))
    assert is_noticed(replace(whole, refusal=""))
    shutil.copy(tmp_path / "neighbours" / "00000.tar", tmp_path / "neighbours" / "00009.tar")
    doubled = memfilter.run([str(tmp_path / "neighbours")], tmp_path / "doubled", config, workers=1)
    assert find_faults(laid, manifest, doubled, config)


MEMORY = """
import resource, sys
from pathlib import Path
from memfilter import Config
from memfilter.signatures import Signer, sign
from memfilter.records import Shard
Signer(Config())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
signed = sign(Shard("0.tar.gz", sys.argv[1], None), Path(sys.argv[2]), Config())
print(signed.samples, signed.bad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_twenty_thousand_empty_members_of_one_key_are_signed_in_little_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "0.tar.gz", "wb", 1) as f:
        f.write(block("a.jpg") * 20_000 + bytes(1024))
    command = [sys.executable, "-c", MEMORY, tmp_path / "0.tar.gz", tmp_path / "signatures.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, bad, mebibytes = map(int, done.stdout.split())
    assert samples == bad == 20_000
    assert mebibytes < 100  # a thumbnail and an embedding for each would take 30, and be copied


def test_mutations_of_hostile_input_are_refused_or_read() -> None:
    target, corpus = Target(), seeds()
    assert sum(target(data) > 0 for data in corpus) > len(corpus) // 3
    for seed in range(1000):
        target(mutated(np.random.default_rng([7, seed]), corpus))
