"""The summary: blank images and placeholders apart from copies of pictures, and the largest groups."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import encoded, picture, sample, words, write_tar
from PIL import Image, ImageDraw

import memfilter
from memfilter import Manifest
from memfilter.summary import embedding_line, lines


def flat(level: int, side: int, quality: int = 90) -> bytes:
    return encoded(Image.new("RGB", (side, side), (level,) * 3), quality=quality)


def placeholder(side: int) -> bytes:
    image = Image.new("RGB", (280, 280), (238,) * 3)
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 275, 275), outline=(120,) * 3, width=3)
    draw.text((35, 140), "IMAGE NOT AVAILABLE", fill=(120,) * 3, font_size=23)
    return encoded(image.resize((side, side), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five white images, two black, one grey; four renditions of a placeholder; thirteen pictures, once or more."""
    folder = tmp_path_factory.mktemp("summary")
    members = []
    for i, side in enumerate((50, 60, 70, 80, 90)):
        members += sample(f"white{i}", flat(255, side), words(i))
    members += sample("black0", flat(0, 64), "a night") + sample("black1", flat(3, 48), "a night")
    members += sample("grey", flat(128, 64), "fog")
    for i, side in enumerate((160, 200, 240, 280)):
        members += sample(f"missing{i}", placeholder(side), words(10 + i))
    # the same plain picture under one caption is no placeholder
    for i, side in enumerate((160, 200, 240)):
        image = Image.open(io.BytesIO(placeholder(side))).transpose(Image.Transpose.ROTATE_90)
        members += sample(f"sign{i}", encoded(image), "the sign")
    for i in range(13):
        for copy in range(1 + i):
            data = encoded(picture(i, 160, 120), quality=95 - copy)
            members += sample(f"picture{i:02}-{copy:02}", data, f"\x1b[31m{words(20 + i)}\nof a series")
    write_tar(folder / "data" / "00000.tar", members)
    return memfilter.run([str(folder / "data")], folder / "out", workers=1)


def test_blank_images_are_grouped_by_their_look(manifest: Manifest) -> None:
    rows = {r["key"]: r for r in manifest.table().to_pylist()}
    white = [rows[f"white{i}"] for i in range(5)]
    assert [r["action"] for r in white] == ["drop"] * 4 + ["keep"]
    assert [r["reasons"] for r in white] == [["blank_duplicate"]] * 4 + [[]]
    assert {r["match_method"] for r in white} == {"blank", None}
    assert rows["black0"]["action"] == "keep"
    assert rows["black1"]["reasons"] == ["blank_duplicate", "caption_duplicate"]
    assert rows["black1"]["match_distance"] == 3
    assert rows["grey"]["image_count"] == 1


def test_blank_images_and_placeholders_are_counted_apart(manifest: Manifest) -> None:
    found = manifest.info["found"]
    assert (found["blank"], found["blank_groups"]) == (8, 2)
    assert (found["placeholders"], found["placeholder_groups"]) == (4, 1)
    assert found["image_groups"] == 12 + 1
    assert sum(found["image_copies"].values()) == sum(range(13)) + 2
    text = lines(manifest.info, "out")
    assert text[0].startswith("images    80 copies of 13 pictures (0 exact, ")
    assert text[1] == "apart     8 blank images, in 2 groups, and 4 placeholders, in 1"


def test_the_recall_of_the_embedding_join_is_told_in_one_line_and_stands_in_the_manifest(manifest: Manifest) -> None:
    join = manifest.info["embedding_join"]
    rows = 91 + 3 + 4  # pictures, signs and placeholders
    assert (join["rows"], join["cells"], join["recall"]["rows"]) == (rows, 1, rows)
    assert join["recall"]["share"] == join["recall"]["high"] == 1
    assert join["recall"]["pairs"] == 2 * join["pairs"] > 0
    (line,) = [line for line in lines(manifest.info, "out") if line.startswith("embedding ")]
    assert line.startswith(f"embedding {join['pairs']:,} pairs, recall 1.000 (0.")
    assert line.endswith(f"-1.000, from {rows} sampled rows); every row compared with every other")


def test_without_an_encoder_nothing_is_told_of_a_join(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", sample("a", encoded(picture(1))))
    config = memfilter.Config.parse({"images": {"encoder": None}})
    info = memfilter.run([str(tmp_path / "data")], tmp_path / "out", config, workers=1).info
    assert info["embedding_join"] is None
    assert not [line for line in lines(info, "out") if line.startswith("embedding ")]


def test_the_line_of_a_join_by_cells_tells_their_number_and_what_no_pair_tells() -> None:
    recall = {"rows": 512, "pairs": 900, "found": 898, "share": 898 / 900, "low": 0.9951, "high": 0.9999}
    join = {"rows": 10**6, "pairs": 1203, "cells": 4000, "probes": 16, "recall": recall}
    assert embedding_line(join) == (
        "embedding 1,203 pairs, recall 0.998 (0.995-1.000, from 512 sampled rows); 16 of 4,000 cells probed for each"
    )
    join["recall"] = recall | {"pairs": 0, "found": 0, "share": None, "low": 0.0, "high": 1.0}
    assert embedding_line(join) == (
        "embedding 1,203 pairs; recall unknown: no true pair of 512 sampled rows; 16 of 4,000 cells probed for each"
    )


def test_the_ten_largest_groups_are_told_and_no_control_code_with_them(manifest: Manifest) -> None:
    groups = manifest.info["found"]["largest_groups"]
    assert [g["count"] for g in groups] == [13, 12, 11, 10, 9, 8, 7, 6, 5, 5]
    assert [g["kind"] for g in groups] == ["picture"] * 8 + ["blank", "picture"]
    assert (groups[8]["key"], groups[8]["captions"]) == ("white4", 5)
    text = "\n".join(lines(manifest.info, "out"))
    assert f"largest   13 x 00000.tar picture12-00 (1 caption) [31m{words(32)} of a series\n" in text
    assert f"\n          5 x blank 00000.tar white4 (5 captions) {words(4)}\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("copies", [2, 3])
def test_many_copies_that_are_not_byte_for_byte_equal_are_doubted(copies: int, tmp_path: Path) -> None:
    members = [*sample("exact", encoded(picture(0)), "a")]
    for i in range(9):
        members += sample(f"p{i}", encoded(picture(i)), "a")
    for i in range(copies):
        members += sample(f"c{i}", encoded(picture(i), quality=70), "a")
    write_tar(tmp_path / "data" / "0.tar", members)
    info = memfilter.run([str(tmp_path / "data")], tmp_path / "out", workers=1).info
    assert info["found"]["inexact_dropped"] == copies
    found = [line for line in lines(info, "out") if line.startswith("look ")]
    # 2 of 12 are under a fifth, 3 of 13 are over it
    assert found == ["look      3 of 13 samples (23%) are dropped as copies of other files"][: copies - 2]


@pytest.mark.parametrize(("captions", "doubted"), [(30, True), (20, False)])
def test_a_large_group_of_many_captions_is_doubted(captions: int, doubted: bool, tmp_path: Path) -> None:
    members = [sample(f"{i:03}", encoded(picture(1), quality=40 + i), words(i % captions)) for i in range(52)]
    members += [sample(f"other{i:03}", encoded(picture(2 + i)), words(60 + i)) for i in range(210)]
    write_tar(tmp_path / "data" / "0.tar", [member for each in members for member in each])
    info = memfilter.run([str(tmp_path / "data")], tmp_path / "out", workers=1).info
    found = [line for line in lines(info, "out") if line.startswith("look ")]
    keeper = info["found"]["largest_groups"][0]["key"]
    assert found == [f"look      52 samples joined 0.tar {keeper} with 30 different captions"][: int(doubted)]


@pytest.mark.parametrize("captions", [0, 1])
def test_a_large_group_without_captions_is_not_doubted(captions: int, tmp_path: Path) -> None:
    members = [sample(f"{i:03}", encoded(picture(1), quality=40 + i), "a" if i < captions else None) for i in range(52)]
    members += [sample(f"other{i:03}", encoded(picture(2 + i)), None) for i in range(210)]
    write_tar(tmp_path / "data" / "0.tar", [member for each in members for member in each])
    info = memfilter.run([str(tmp_path / "data")], tmp_path / "out", workers=1).info
    assert info["found"]["largest_groups"][0]["count"] == 52
    assert info["found"]["doubtful_groups"] == []
    assert not [line for line in lines(info, "out") if line.startswith("look ")]


def test_without_copies_there_is_no_largest_group(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", sample("a", encoded(picture(1))) + sample("b", None))
    info = memfilter.run([str(tmp_path / "data")], tmp_path / "out", workers=1).info
    assert info["found"]["largest_groups"] == []
    assert info["found"]["image_copies"] == {"exact": 0, "hash": 0, "embedding": 0}
    assert info["found"]["image_groups"] == 0
    write_tar(tmp_path / "none" / "0.tar", [])
    assert (
        memfilter.run([str(tmp_path / "none")], tmp_path / "nothing", workers=1).info["found"]["largest_groups"] == []
    )
