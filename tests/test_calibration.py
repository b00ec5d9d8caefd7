"""The measures of a score against their definitions, labelled lists, and thresholds that are measured in a run."""

from __future__ import annotations

import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encoded, picture, sample, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import write_pipeline

import memfilter
from memfilter import Config, ConfigError
from memfilter.calibration import (
    bootstrap_interval,
    measures,
    operating_point,
    read_labelled,
    roc_auc,
    threshold_at_fpr,
    tpr_at_fpr,
)
from memfilter.denoisers import find_model, load_denoiser
from memfilter.magnitude import Scorer
from memfilter.precision import rounding_errors
from memfilter.records import Floats
from memfilter.store import file_digest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import detect

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

CAPTIONS = [f"{'a dog ' * (i % 5)}on a mat, number {i}" for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "0.tar"
    members = [m for i, c in enumerate(CAPTIONS) for m in sample(f"{i:03}", encoded(picture(i)), c)]
    return write_tar(path, members)


# -- the measures -----------------------------------------------------------------------------------------------------

few_values = st.integers(0, 5).map(float)  # many ties
some = st.lists(few_values | st.floats(0, 9, width=32), min_size=1, max_size=40).map(lambda x: np.array(x, np.float32))
rates = st.integers(0, 99).map(lambda i: i / 100)


@settings(deadline=None, max_examples=200)
@given(memorized=some, others=some)
def test_auc_is_the_share_of_all_pairs_in_order_with_ties_as_halves(memorized: Floats, others: Floats) -> None:
    points = [(a > b) + (a == b) / 2 for a in memorized for b in others]
    assert roc_auc(memorized, others) == pytest.approx(np.mean(points), abs=1e-12)
    assert roc_auc(others, memorized) == pytest.approx(1 - np.mean(points), abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(memorized=some, others=some, rate=rates)
def test_tpr_is_the_largest_of_all_thresholds_whose_fpr_lies_below_the_rate(
    memorized: Floats, others: Floats, rate: float
) -> None:
    shares = [0.0]
    for threshold in {*memorized.tolist(), *others.tolist()}:
        if Fraction(int((others >= threshold).sum()), len(others)) < Fraction(str(rate)):
            shares.append(float((memorized >= threshold).mean()))
    assert tpr_at_fpr(memorized, others, rate) == max(shares)


def test_one_false_positive_of_a_hundred_is_not_below_one_percent() -> None:
    others = np.arange(100, dtype=np.float32)
    memorized = np.array([98.5, 99.5], np.float32)
    assert tpr_at_fpr(memorized, others) == 0.5
    assert tpr_at_fpr(memorized, np.arange(-1, 100, dtype=np.float32)) == 1


@settings(deadline=None, max_examples=200)
@given(memorized=some, others=some, rate=rates)
def test_a_threshold_lets_pass_what_its_rate_allows_and_is_the_lowest_that_does(
    memorized: Floats, others: Floats, rate: float
) -> None:
    allowed = Fraction(str(rate)) * len(others)
    lowest = np.float32(threshold_at_fpr(others, rate))
    assert (others >= lowest).sum() <= allowed < (others >= np.nextafter(lowest, np.float32(-1))).sum()
    point = operating_point(memorized, others, rate)
    assert point == {
        "threshold": float(lowest),
        "found": (memorized >= lowest).sum(),
        "false_positives": (others >= lowest).sum(),
    }


def test_intervals_hold_the_value_and_are_the_same_for_the_same_seed() -> None:
    random = np.random.default_rng(0)
    memorized, others = (random.normal(mean, 1, n).astype(np.float32) for mean, n in ((1.5, 80), (0, 300)))
    found = measures(memorized, others, seed=3)
    assert found == measures(memorized, others, seed=3) == json.loads(json.dumps(found))
    assert found["auc_interval"] != measures(memorized, others, seed=4)["auc_interval"]
    for key in ("auc", "tpr_at_1_fpr"):
        low, high = found[f"{key}_interval"]
        assert low < found[key] < high
    low, high = found["auc_interval"]
    # the standard error of Hanley and McNeil 1982
    auc = found["auc"]
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = ((auc * (1 - auc) + 79 * (q1 - auc**2) + 299 * (q2 - auc**2)) / (80 * 300)) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert (found["memorized"], found["others"]) == (80, 300)


def test_a_resample_has_as_many_of_either_kind() -> None:
    sizes = set()

    def noted(memorized: Floats, others: Floats) -> float:
        sizes.add((len(memorized), len(others)))
        assert memorized.min() > 10 > others.max()
        return 1.0

    assert bootstrap_interval(noted, np.arange(11, 14, dtype=np.float32), np.arange(7, dtype=np.float32)) == (1, 1)
    assert sizes == {(3, 7)}


# -- labelled lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'caption,label\n"a cat, asleep",1\nein Hund,0\n',
        ';Caption;URL;Memorized\r\n0;"a cat, asleep";x;1\r\n1;ein Hund;y; 0\r\n',
        "\ufefflabel\tprompt\n1\ta cat, asleep\n\n0\tein Hund",
    ],
)
def test_a_labelled_list_is_read_whatever_separates_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", newline="")
    found = read_labelled(tmp_path / "list.csv")
    assert found.captions == ["a cat, asleep", "ein Hund"]
    assert found.is_memorized.tolist() == [True, False]


def test_a_caption_may_hold_line_breaks_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('caption,label\n"one\ntwo",1\nthree\u2028four,0\n', encoding="utf-8")
    assert read_labelled(tmp_path / "list.csv").captions == ["one\ntwo", "three\u2028four"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "cannot be read"),
        (b"caption,label\n\xff,1\n", "cannot be read"),
        ("", "line 1, the header, has 0 columns named caption or prompt or text"),
        ("a cat,1\na dog,0\n", "line 1, the header, has 0 columns"),
        ("caption,text,label\na,b,1\n", "line 1, the header, has 2 columns"),
        ("caption,url\na,b\n", "line 1, the header, has 0 columns named label or memorized"),
        ("caption,label\na cat,1\na cat, asleep,0\n", "line 3 has 3 fields and the header 2"),
        ("caption,label\n\n ,1\n", "line 3 has no caption"),
        ("caption,label\na cat,1\na dog,no\n", "line 3: label is 'no'; give 1 for memorized, else 0"),
        ("caption,label\na cat,\n", "line 2: label is ''"),
        ('caption,label\na cat,1\n"a dog,0\n', "line 3 is not CSV"),
        ("caption,label\na cat,1\na dog,1\n", "of 2 captions 2 are labelled 1; give some of either kind"),
        ("caption,label\n", "of 0 captions 0 are labelled 1"),
    ],
)
def test_a_broken_list_is_refused_in_one_line_before_anything_is_read(
    content: str | bytes | None, cause: str, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    wanted = {"model": str(tmp_path), "threshold": {"false_positive_rate": 0.1, "labelled": str(path)}}
    with pytest.raises(ConfigError) as caught:
        memfilter.run([str(shards)], tmp_path / "out", Config.parse({"magnitude": wanted}))
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert cause in message
    assert "\n" not in message


# -- a run ------------------------------------------------------------------------------------------------------------


def config(model: Path, **magnitude: Any) -> Config:
    settings = {"model": str(model), "batch_size": 8, **magnitude}
    return Config.parse({"images": {"encoder": None}, "magnitude": settings, "output": {"shards": False}})


def write_list(path: Path, memorized: list[str], others: list[str]) -> Path:
    rows = [f'"{c}",{label}' for label, captions in ((1, memorized), (0, others)) for c in captions]
    path.write_text("\n".join(["caption,label", *rows]) + "\n")
    return path


def test_a_run_is_calibrated_by_a_labelled_list_and_tells_how_well(model: Path, shards: Path, tmp_path: Path) -> None:
    memorized = [f"a memorized caption {i}, the van gogh cafe" for i in range(6)]
    others = [f"number {i} on a mat" for i in range(10)]
    labelled = write_list(tmp_path / "list.csv", memorized, others)
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    wanted = {"false_positive_rate": 0.2, "labelled": str(labelled)}
    manifest = memfilter.run([str(shards)], tmp_path / "out", config(folder, threshold=wanted), workers=1)
    scorer = Scorer.load(str(model), batch_size=8)
    own, labels = (scorer.score(captions)[:, 0, 0] for captions in (CAPTIONS, [*memorized, *others]))
    high, low = labels[: len(memorized)], labels[len(memorized) :]

    found = manifest.info["magnitude"]["calibration"]
    assert found == {
        "digest": file_digest(labelled),
        **measures(high, low),
        **operating_point(high, low, 0.2),
    }
    assert found["false_positives"] == 2
    assert manifest.info["magnitude"]["noise_floor"] is None
    assert manifest.info["threshold"] == found["threshold"]
    assert manifest.info["config"]["magnitude"]["threshold"] == {**wanted, "labelled": "list.csv"}
    rows = manifest.table(["key", "action"]).to_pylist()
    assert {int(row["key"]) for row in rows if row["action"] == "mask"} == {*np.flatnonzero(own >= found["threshold"])}
    (line,) = (x for x in memfilter.summary.lines(manifest.info, "out") if x.startswith("magnitude "))
    assert f"of the labelled captions {found['found']} of 6 memorized and 2 of 10 others are, AUC" in line
    assert "scores/labelled.parquet" in manifest.info["files"]
    assert memfilter.verify(tmp_path / "out") == []

    # other labels of the same captions need no model
    shutil.rmtree(folder)
    write_list(labelled, [*memorized, *others[:5]], others[5:])
    again = memfilter.rethreshold(tmp_path / "out", None, workers=1, trust=True)
    calibration = again.info["magnitude"]["calibration"]
    assert (calibration["memorized"], calibration["others"]) == (11, 5)
    assert calibration["digest"] != found["digest"]


def test_a_threshold_below_the_noise_floor_of_the_precision_is_refused(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    small, exact = (load_denoiser(find_model(str(model)), dtype) for dtype in ("bfloat16", "float32"))
    floor = float(rounding_errors(small, exact).max())
    assert 0 < float(rounding_errors(load_denoiser(find_model(str(model)), "float16"), exact).max()) < floor / 3
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=rf"noise floor of bfloat16, {floor:.4g}, [^\n]*magnitude.dtype: float32$"):
        memfilter.run([str(shards)], out, config(model, dtype="bfloat16", threshold=floor * 0.9), workers=1)
    over = memfilter.run([str(shards)], out, config(model, dtype="bfloat16", threshold=floor * 1.1), workers=1)
    assert over.info["magnitude"]["noise_floor"] == pytest.approx(floor)
    assert f"; noise floor of bfloat16 {floor:.2g}; " in "\n".join(memfilter.summary.lines(over.info, "out"))
    assert "scores/noise_floor.parquet" in over.info["files"]


def test_the_rounding_error_bounds_how_far_a_magnitude_is_off(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = CAPTIONS[:8]
    monkeypatch.setattr("memfilter.precision._CAPTIONS", captions)
    files = find_model(str(model))
    small, exact = load_denoiser(files, "bfloat16"), load_denoiser(files, "float32")
    errors = rounding_errors(small, exact)
    off = np.abs(Scorer(small, batch_size=8).score(captions) - Scorer(exact, batch_size=8).score(captions))[:, 0, 0]
    assert (off <= errors * 1.01).all()
    assert not rounding_errors(exact, exact).any()


# -- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_demo_is_evaluated_on_what_was_seen_often_once_and_never() -> None:
    prompts = detect.demo_prompts()
    assert [len(kind) for kind in prompts.memorized.values()] == [40]
    assert [len(kind) for kind in prompts.others.values()] == [40, 800, 400]
    everything = [c for kinds in (prompts.memorized, prompts.others) for kind in kinds.values() for c in kind]
    assert len(set(everything)) == 40 + 40 + 800 + 400
    assert all(c.endswith(tuple("0123456789")) for c in prompts.others["specific, never seen"])


def test_any_model_is_evaluated_on_two_files_by_type(model: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "memorized.csv", tmp_path / "unmemorized.csv"
    one.write_text(';Caption;type;max_sscd\n0;"a ""dog""; twice";VM;0.9\n1;the van gogh cafe;TM;0.1\n2;a cat;TM;0.2\n')
    other.write_text(";Caption;URL\n0;number 1;x\n1;number 2, on a mat;y\n")
    prompts = detect.read_prompts(one, other)
    assert prompts.memorized == {
        "VM": ['a "dog"; twice'],
        "TM": ["the van gogh cafe", "a cat"],
        "all": ['a "dog"; twice', "the van gogh cafe", "a cat"],
    }
    assert prompts.others == {"unmemorized": ["number 1", "number 2, on a mat"]}
    found: Any = detect.evaluate(str(model), prompts, "float32", 4, 1)
    assert found["largest_relative_difference_from_two_pass"] < 1e-5
    for seeds in ("1", "4"):
        scorer = Scorer.load(str(model), seeds=int(seeds), batch_size=4)
        low = scorer.score(prompts.others["unmemorized"]).mean((1, 2))
        rows = found["seeds"][seeds]["measures"]
        assert [(row["kind"], row["against"]) for row in rows] == [(k, "unmemorized") for k in ("VM", "TM", "all")]
        for row in rows:
            high = scorer.score(prompts.memorized[row["kind"]]).mean((1, 2))
            assert {"kind": row["kind"], "against": "unmemorized", **measures(high, low)} == row


def test_the_shared_prompts_are_read_whole_and_by_type(shared_data: Path) -> None:
    files = (shared_data / "captions" / f"sd1_{kind}_prompts.csv" for kind in ("memorized", "unmemorized"))
    prompts = detect.read_prompts(*files)
    assert {kind: len(captions) for kind, captions in prompts.memorized.items()} == {"VM": 112, "TM": 388, "all": 500}
    assert len(set(prompts.others["unmemorized"])) == 500
