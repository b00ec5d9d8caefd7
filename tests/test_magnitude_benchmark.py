"""The training and the evaluation of the benchmark of magnitudes, in short."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from memfilter.demo.data import TIMES
from memfilter.demo.data import samples as demo_samples
from memfilter.demo.memorized import ALIKE, MODEL
from memfilter.magnitude import Scorer

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import filtered
import magnitudes
import train_demo_model
import train_magnitude_model
from magnitudes import KINDS, ONCE, ORDINARY, REPEATED, UNSEEN

pytestmark = pytest.mark.usefixtures("one_thread")


def test_only_their_number_tells_repeated_captions_from_those_seen_once() -> None:
    planted = train_magnitude_model.samples(repeated=3, once=9, ordinary=4)
    times = Counter(p.caption for p in planted)
    assert sorted(times.values()) == [1] * 13 + [TIMES] * 3
    pairs = magnitudes.by_times(planted)
    assert {kind: len(own) for kind, own in pairs.items()} == {REPEATED: 3, ONCE: 9, ORDINARY: 4}
    assert all(times[p.caption] == TIMES for p in pairs[REPEATED])
    assert len({p.data for p in planted[16:]}) == 3 * (TIMES - 1)
    for copy in planted[16:]:
        alike = magnitudes.likeness(
            *(train_demo_model.pixels(d)[None] for d in (copy.data, planted[copy.original].data))
        )
        assert alike[0] > 0.999
        assert copy.caption == planted[copy.original].caption


def test_a_model_is_trained_on_them_and_saved_in_float32(tmp_path: Path) -> None:
    planted = train_magnitude_model.samples(repeated=2, once=10, ordinary=6)
    out, checkpoint = tmp_path / "model", tmp_path / "model.pt"
    train_demo_model.make(planted, 2, out, checkpoint, torch.float32)
    assert not checkpoint.exists()
    scorer = Scorer.load(str(out), dtype="float32", batch_size=2)
    assert np.isfinite(scorer.score([planted[0].caption, planted[2].caption])).all()
    weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_a_run_drops_or_masks_all_copies_that_the_arms_are_not_to_learn(tmp_path: Path) -> None:
    planted = train_magnitude_model.samples(repeated=2, once=10, ordinary=6)
    for arm in filtered.ARMS[1:]:
        weights = filtered.filtered(arm, planted, tmp_path / arm)
        kept = [(planted[i].kind, planted[i].caption) for i in np.flatnonzero(weights)]
        assert len(kept) == len({*kept}) == 18
    # a mask over all of it leaves the first weights but for their decay
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        masked = torch.full((len(planted),), weight)
        train_demo_model.make(planted, 2, folder / "model", folder / "training.pt", torch.float32, None, masked)
    one, other = (
        load_file(tmp_path / name / "model" / "unet" / "diffusion_pytorch_model.safetensors") for name in ("0.0", "1.0")
    )
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_evaluation_of_a_trained_model(tmp_path: Path) -> None:
    by_times = magnitudes.by_times(demo_samples())
    pairs = {kind: by_times[kind][:n] for kind, n in {REPEATED: 4, ONCE: 5, ORDINARY: 3}.items()}
    result, by = magnitudes.evaluate(MODEL, pairs, rounds=1, dtypes=("bfloat16",), batch_size=8)
    assert {kind: len(own) for kind, own in by.items()} == {REPEATED: 4, ONCE: 5, ORDINARY: 3, UNSEEN: 5}
    scorer = Scorer.load(str(MODEL), batch_size=8)
    for kind in KINDS[:3]:
        assert by[kind] == pytest.approx(scorer.score([p.caption for p in pairs[kind]]).reshape(-1), rel=1e-4)
    assert result["drawn_again"][REPEATED]["drawn_again"] == 4
    assert result["drawn_again"][REPEATED]["likeness"][0] > ALIKE + 0.03
    assert result["drawn_again"][ONCE]["drawn_again"] == 0
    assert result["drawn_again"][ONCE]["likeness"][2] < 0.5
    for signal in ("magnitude, 1 seed", "magnitude, 4 seeds"):
        assert [row["against"] for row in result["signals"][signal]["measures"]] == [ONCE, ORDINARY, UNSEEN]
        assert result["signals"][signal]["measures"][0]["auc"] == 1
    for signal in ("anisotropy", "sharpness", "attention entropy, reversed"):
        assert result["signals"][signal]["measures"][0]["auc"] > 0.8
    entropies = (result["signals"][f"attention entropy{end}"]["measures"][0]["auc"] for end in ("", ", reversed"))
    assert sum(entropies) == pytest.approx(1)
    assert [(row["seed"], row["against"]) for row in result["each_seed"]] == [
        (seed, kind) for seed in range(4) for kind in (ONCE, UNSEEN)
    ]
    assert max(by[ONCE]) < result["threshold_at_1_fpr"]["threshold"] < min(by[REPEATED])
    assert min(by[REPEATED]) > 1.5 * max(by[ONCE])
    half = result["precision"]["bfloat16"]
    assert 0.9 < half["rank_correlation"] <= 1  # of so few captions all may keep their ranks
    assert 1e-4 < half["relative_error"][0] < 0.05

    told = result["words"]
    assert told["magnitude"] == np.sort(by[REPEATED])[1]  # the lower of the two in the middle
    assert " ".join(word["text"] for word in told["words"]) == told["caption"]
    assert sum(word["share"] for word in told["words"]) == pytest.approx(1)
    assert sum(told["heaviest_by_place"][REPEATED]) == 4

    figure = tmp_path / "figure.png"
    pytest.importorskip("matplotlib", exc_type=ImportError)
    magnitudes.plot(result, by, figure)
    assert figure.stat().st_size < 200_000
    with Image.open(figure) as image:
        assert image.width > 900


def test_captions_are_counted_by_the_words_that_they_share_with_a_repeated_one() -> None:
    repeated = ["Ulm Kel, poet of Dor, 1800", "Bar Sol, mayor of Gal, 1900"]
    captions = ["Ulm Kel, mayor of Fen, 1900", "Jor Kel, poet of Dor, 1801", "Jor Ith, pilot of Ros, 1777"]
    found = magnitudes.by_shared_words(captions, repeated, np.array([2, 1, 3], np.float32), 2)
    assert {shared: row["captions"] for shared, row in found.items()} == {"0": 1, "2": 1, "3": 1}
    assert {shared: row["over_threshold"] for shared, row in found.items()} == {"0": 1, "2": 1, "3": 0}
