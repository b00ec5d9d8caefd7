"""Captions in whole runs: tiers, kinds of duplication and the policy of each, odd captions, a loader that mitigates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
import yaml
from conftest import encoded, picture, sample, words, write_tar

import memfilter
from memfilter import Config, ConfigError, Manifest

# one caption of every tier beside the one that most samples use
TIERS = {
    "a red car of 1967 on a gravel road in Tuscany": "keeper",
    "A Red Car of 1967, on a gravel road in Tuscany!": "exact",
    "a red car of 1971 on a gravel road in Tuscany": "template",
    "a red car of 1967 on a gravel road in old Tuscany": "near",
}


def rows(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {r["key"]: r for r in manifest.table().to_pylist()}


def run(folder: Path, texts: list[str], name: str = "out", **config: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a run over unlike pictures with these captions."""
    members = [m for i, text in enumerate(texts) for m in sample(f"{i}", encoded(picture(i)), text)]
    write_tar(folder / "in" / "0.tar", members)
    return rows(memfilter.run([str(folder / "in")], folder / name, Config.parse(config), workers=1))


def test_every_tier_joins_its_own_and_is_named(tmp_path: Path) -> None:
    captions = [*TIERS, next(iter(TIERS)), words(1), ""]
    found = run(tmp_path, captions)
    assert [found[str(i)]["caption_match"] for i in range(1, 4)] == ["exact", "template", "near"]
    assert {found[str(i)]["caption_count"] for i in range(5)} == {5}
    assert 0 < found["3"]["caption_distance"] <= 0.3
    assert (found["5"]["caption_match"], found["5"]["caption_count"]) == (None, 1)
    assert (found["6"]["caption_match"], found["6"]["caption_count"]) == (None, 1)
    found = memfilter.Manifest.load(tmp_path / "out").info["found"]
    assert found["caption_copies"] == {"exact": 2, "template": 1, "near": 1, "semantic": 0}
    assert found["images_a_caption"] == {"mean": 5, "most": 5}


@pytest.mark.parametrize(
    ("tiers", "joined"),
    [(["exact"], {1, 4}), (["exact", "template"], {1, 2, 4}), (["exact", "near"], {1, 3, 4}), (["near"], {1, 3, 4})],
    ids=str,
)
def test_each_tier_can_be_switched(tiers: list[str], joined: set[int], tmp_path: Path) -> None:
    captions = [*TIERS, next(iter(TIERS))]
    found = run(tmp_path, captions, captions={"tiers": tiers, "near_jaccard": 0.75})
    keeper = found["0"]["caption_group"]
    assert {i for i in range(1, 5) if found[str(i)]["caption_group"] == keeper} >= joined
    assert {found[str(i)]["caption_match"] for i in range(5)} <= {*tiers, "exact", None}


@pytest.mark.parametrize(
    "change",
    [
        {"captions": {"tiers": ["exact"]}},
        {"captions": {"near_jaccard": 0.95}, "policy": {"caption_duplicate": "down_weight"}},
        {"policy": {"full_duplicate": "mask", "partial_duplicate": "mitigate", "caption_duplicate": "drop"}},
    ],
    ids=str,
)
def test_rethreshold_equals_a_fresh_run(change: dict[str, Any], tmp_path: Path) -> None:
    captions = [*TIERS, next(iter(TIERS)), words(1)]
    run(tmp_path, captions)
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(change))
    memfilter.rethreshold(tmp_path / "out", tmp_path / "new.yaml", workers=1)
    run(tmp_path, captions, "fresh", **change)
    old, new = (tmp_path / name / "manifest" for name in ("out", "fresh"))
    for path in (p for p in old.rglob("*") if p.is_file()):
        assert path.read_bytes() == (new / path.relative_to(old)).read_bytes()
    assert memfilter.verify(tmp_path / "out") == []


def test_a_template_in_one_script_after_another(tmp_path: Path) -> None:
    captions = [
        "第3张照片在海边",
        "第77张照片在海边",
        "صورة ٣ من البيت",
        "صورة ٢٢ من البيت",
        "תמונה 5 מהבית",
        "תמונה 6 מהבית",
    ]
    found = run(tmp_path, captions)
    assert [found[str(i)]["caption_match"] for i in range(6)].count("template") == 3
    assert [found[str(i)]["caption_count"] for i in range(6)] == [2] * 6


ODD = {
    "empty": b"",
    "white": b" \t\r\n\xe2\x80\x83 ",
    "long": b"word " * 20_000,
    "one long word": b"x" * 100_000,
    "control": b"a\x00b\x07c\x1b[31m d",
    "emoji": "🐕🐕🎉".encode(),
    "mixed": "a dog שלום \u202bعالم\u202c end".encode(),
    "marks alone": "\u200f\u200e".encode(),
    "invalid": b"a cat \xff\xfe",
    "one word": b"dog",
    "two": b"a dog",
}


def test_odd_captions_are_rows_with_a_cause_or_samples_like_any_other(tmp_path: Path) -> None:
    members = [m for i, (k, data) in enumerate(ODD.items()) for m in sample(k, encoded(picture(i)), txt=data)]
    write_tar(tmp_path / "in" / "0.tar", members)
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    found = rows(manifest)
    assert {k for k, r in found.items() if r["action"] == "bad"} == {"invalid"}
    assert found["invalid"]["reasons"] == ["bad_caption"]
    assert {k: r["caption_count"] for k, r in found.items()} == dict.fromkeys(ODD, 1)
    assert manifest.info["found"]["without_caption"] == 2
    assert manifest.counts["read"] == len(ODD) == manifest.counts["keep"] + 1


@pytest.mark.parametrize("value", [3, ["a cat"], {"en": "a cat"}, True])
def test_a_caption_in_the_json_that_is_no_text_is_a_bad_row(value: object, tmp_path: Path) -> None:
    members = sample("0", encoded(picture(0)), json=json.dumps({"caption": value}).encode())
    members += sample("1", encoded(picture(1)), json=json.dumps({"caption": "a cat"}).encode())
    write_tar(tmp_path / "in" / "0.tar", members)
    config = Config.parse({"input": {"caption": "json"}})
    found = rows(memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1))
    assert found["0"]["reasons"] == ["bad_caption"]
    assert "caption in the json is a " in found["0"]["detail"]
    assert found["1"]["action"] == "keep"


class Lengths:
    """A caption encoder of the tests: captions of one length say the same."""

    identity, dim, similarity = "lengths-1", 64, 0.99

    def encode(self, texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        found = np.zeros((len(texts), 64), np.float32)
        found[np.arange(len(texts)), [len(t) % 64 for t in texts]] = 1
        return found


def test_the_semantic_tier_joins_by_the_encoder_it_is_given(tmp_path: Path) -> None:
    captions = ["a dog at sea", "one red boat", "two cats", words(3)]
    semantic = {"tiers": ["exact", "semantic"], "encoder": "test_caption_run:Lengths"}
    found = run(tmp_path, captions, captions=semantic)
    assert [found[str(i)]["caption_count"] for i in range(4)] == [2, 2, 1, 1]
    assert [found[str(i)]["caption_match"] for i in range(4)].count("semantic") == 1
    assert memfilter.verify(tmp_path / "out") == []
    about = Manifest.load(tmp_path / "out").info["caption_join"]["encoder"]
    assert ("lengths-1" in about["identity"], about["similarity"]) == (True, 0.99)


def test_an_encoder_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"captions\.encoder = 'nowhere'"):
        run(tmp_path, ["a"], captions={"tiers": ["semantic"], "encoder": "nowhere"})
    assert not (tmp_path / "out").exists()


def test_a_loader_is_told_what_is_handed_over_and_how_much_a_sample_weighs(tmp_path: Path) -> None:
    policy = {"image_duplicate": "record", "full_duplicate": "mitigate", "caption_duplicate": "down_weight"}
    members = sample("0", encoded(picture(0)), words(0)) + sample("1", encoded(picture(0)), words(0))
    members += sample("2", encoded(picture(2)), words(2)) + sample("3", encoded(picture(3)), words(2))
    write_tar(tmp_path / "in" / "0.tar", members)
    config = Config.parse({"policy": policy})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    data = wds.WebDataset(str(tmp_path / "in" / "0.tar"), shardshuffle=False).compose(manifest.attach())
    assert [(s["__key__"], s["loss_weight"], s["mitigate"]) for s in data] == [
        *(("0", 0.5, True), ("1", 0.5, True), ("2", 0.5, False), ("3", 0.5, False)),
    ]
    found = manifest.info["found"]
    assert (found["down_weighted"], found["mitigated"]) == (4, 2)


def test_a_loader_without_such_a_policy_sees_no_such_key(tmp_path: Path) -> None:
    run(tmp_path, ["a", "b"])
    data = wds.WebDataset(str(tmp_path / "in" / "0.tar"), shardshuffle=False)
    assert all("mitigate" not in s for s in data.compose(Manifest.load(tmp_path / "out").attach()))
