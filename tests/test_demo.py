"""The demo: what it plants, what its model has memorized, and the table that it prints."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import memfilter
from memfilter import demo
from memfilter.demo.data import PAIRS, TIMES, samples, unseen_captions
from memfilter.demo.memorized import ALIKE, MODEL, Pair, contact_sheet, generate, likeness, pixels
from memfilter.magnitude import Scorer


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(out, workers=1)


def figures(lines: list[str], start: str) -> list[int]:
    """Return the numbers in the line that starts so."""
    (line,) = (one for one in lines if one.startswith(start))
    return [int(word.replace(",", "")) for word in line[len(start) :].split() if word.replace(",", "").isdigit()]


def test_the_samples_are_what_the_table_says() -> None:
    planted = samples()
    kinds = Counter(p.kind for p in planted)
    assert kinds["repeated pair"] == PAIRS * (TIMES - 1)
    assert (kinds["single"], kinds["specific"], kinds["corrupt"]) == (800, 2 * PAIRS, 2)
    copies: dict[int, set[bytes]] = {}
    for one in planted:
        if one.kind == "repeated pair":
            assert (planted[one.original].kind, planted[one.original].caption) == ("specific", one.caption)
            copies.setdefault(one.original, set()).add(one.data)
    assert [len(files) for files in copies.values()] == [TIMES - 1] * PAIRS
    assert planted == samples()


def test_captions_for_calibration_are_of_both_kinds_and_unseen() -> None:
    planted = samples()
    unseen = unseen_captions(planted, 200)
    assert len(set(unseen)) == 200
    assert not {p.caption for p in planted} & set(unseen)
    assert sum(caption[0].isupper() for caption in unseen) == 100


def test_every_planted_copy_is_found_and_nothing_else_joined(shown: tuple[Path, list[str]]) -> None:
    _, lines = shown
    edits = ("re-encoded at quality 40", "resized to half", "cropped by 2% a side", "in a black frame")
    for kind in ("exact copy", *edits, "corrupt"):
        planted, found, *_ = figures(lines, kind)
        assert planted == found
    assert figures(lines, "repeated pair")[:2] == [960, 960]
    assert figures(lines, "joined wrongly") == [0, 0]
    assert lines[-1].startswith("1962 read = ")
    assert lines[-1].endswith(" dropped + 2 bad")


def test_repeated_pairs_are_drawn_again_and_masked_and_others_are_not(shown: tuple[Path, list[str]]) -> None:
    out, lines = shown
    pairs, drawn, masked = figures(lines, "  seen 25 times")
    assert pairs == PAIRS
    assert drawn >= 0.9 * pairs
    assert masked >= 0.95 * pairs
    pairs, drawn, masked = figures(lines, "  seen once")
    assert (pairs, drawn) == (PAIRS, 0)
    assert masked <= 1
    singles, masked = figures(lines, "ordinary captions")
    assert masked <= 0.01 * singles
    manifest = memfilter.Manifest.load(out / "run")
    assert manifest.counts["mask"] >= 0.95 * PAIRS
    assert memfilter.verify(out / "run") == []


def test_the_contact_sheet_shows_every_pair_beside_its_drawing(shown: tuple[Path, list[str]], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pairs = [
        Pair("a caption", *random.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32), 0.5, i / 10, i > 5)
        for i in range(2 * PAIRS)
    ]
    contact_sheet(pairs[:PAIRS], pairs[PAIRS:], 0.55, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for pair in pairs:
        assert holds(sheet, pair)
    out, _ = shown
    with Image.open(out / "contact_sheet.png") as image:
        assert (image.format, image.height, image.width) == ("PNG", *sheet.shape[:2])


def holds(sheet: np.ndarray, pair: Pair) -> bool:
    """Tell whether picture and drawing, each pixel as 4 x 4, stand side by side on the sheet."""
    picture, drawing = (
        np.kron(np.rint((p.transpose(1, 2, 0) + 1) * 127.5), np.ones((4, 4, 1))).astype(np.uint8)
        for p in (pair.picture, pair.drawing)
    )
    starts = np.argwhere((sheet == picture[0, 0]).all(2))
    both = ((sheet[y : y + 64, x : x + 64], sheet[y : y + 64, x + 66 : x + 130]) for y, x in starts)
    return any(np.array_equal(left, picture) and np.array_equal(right, drawing) for left, right in both)


def test_likeness_is_the_correlation_of_the_pixels() -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(5, 3, 16, 16)).astype(np.float32)
    b = random.normal(size=(5, 3, 16, 16)).astype(np.float32)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(likeness(a, b), expected, atol=1e-5)
    np.testing.assert_allclose(likeness(a, 2 * a + 1), 1, atol=1e-5)


def test_a_drawing_is_far_from_where_one_counts_as_drawn_again() -> None:
    planted = samples()
    repeated = {p.original for p in planted if p.kind == "repeated pair"}
    specific = [i for i, p in enumerate(planted) if p.kind == "specific"]
    drawn = generate(MODEL, [planted[i].caption for i in specific])
    alike = likeness(drawn, np.stack([pixels(planted[i].data) for i in specific]))
    again = np.isin(specific, [*repeated])
    assert alike[again].min() > ALIKE + 0.02
    assert alike[~again].max() < ALIKE - 0.4


def test_a_copy_is_the_same_to_the_model() -> None:
    planted = samples()
    copies = [p for p in planted if p.kind == "repeated pair"][:50]
    alike = likeness(
        *(np.stack([pixels(p.data) for p in ps]) for ps in (copies, [planted[p.original] for p in copies]))
    )
    assert alike.min() > 0.98


def test_the_model_is_small_and_of_real_diffusers_classes() -> None:
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 6_000_000
    assert {p.suffix for p in files} <= {".json", ".md", ".safetensors", ".txt"}
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_one_seed_and_one_step_tell_repeated_pairs_from_equally_specific_ones() -> None:
    planted = samples()
    repeated = {p.original for p in planted if p.kind == "repeated pair"}
    specific = [i for i, p in enumerate(planted) if p.kind == "specific"]
    score = dict(
        zip(specific, Scorer.load(str(MODEL)).score([planted[i].caption for i in specific])[:, 0, 0], strict=True)
    )
    memorized, others = ([score[i] for i in specific if (i in repeated) == wanted] for wanted in (True, False))
    assert np.mean([a > b for a in memorized for b in others]) >= 0.99
