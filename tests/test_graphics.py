"""The drawn documents, the copies that are planted, and the judging of the graphics benchmark on a tiny real set."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import scene
from PIL import Image, ImageDraw
from tars import tar_of

import memfilter

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import graphics_set
from documents import HELD_OUT, TUNING, Kind, documents, look, on_white
from graphics import PAIRS, SETS, Row, Verdicts, dropped, grouped, over_all, recalled, rows_of
from graphics_peers import found
from graphics_report import markdown, sheet
from graphics_set import KINDS, Pictures, planted

ALL = TUNING | HELD_OUT


# -- the documents ----------------------------------------------------------------------------------------------------


def test_what_is_tuned_on_a_kind_is_not_proved_on_it() -> None:
    assert len(TUNING) + len(HELD_OUT) == len(ALL) >= 12
    assert len(HELD_OUT) >= 8
    assert {"product", "meme", "comic", "map"} <= HELD_OUT.keys()


@pytest.mark.parametrize("kind", ALL)
def test_every_two_documents_look_different_and_a_draw_is_the_same_each_time(kind: str) -> None:
    drawn = list(documents({kind: ALL[kind]}, 5))
    again = list(documents({kind: ALL[kind]}, 3))
    assert [(k, p.mode, p.size, p.tobytes(), c) for k, p, c in drawn[:3]] == [
        (k, p.mode, p.size, p.tobytes(), c) for k, p, c in again
    ]
    assert len({key for key, _, _ in drawn}) == len({look(picture) for _, picture, _ in drawn}) == 5
    other = next(documents({kind: ALL[kind]}, 1, seed=1))[1]
    assert look(other) not in {look(picture) for _, picture, _ in drawn}


def test_two_documents_that_look_the_same_are_refused() -> None:
    def twice(random: Random, shared: Random, place: int) -> tuple[Image.Image, str]:
        return Image.new("RGB", (40, 30), "red" if place else "blue"), "a colour"

    assert len(list(documents({"twice": Kind(twice, 2)}, 2))) == 2
    with pytest.raises(AssertionError, match="twice-002 looks like twice-000"):
        list(documents({"twice": Kind(twice, 2)}, 3))


def test_a_product_keeps_its_shape_and_changes_its_colour() -> None:
    drawn = [HELD_OUT["product"].draw(Random(k), Random(0), k)[0] for k in range(8)]
    shapes = [np.asarray(on_white(picture).convert("L")) < 245 for picture in drawn]
    for one in range(4):
        assert (shapes[one] == shapes[0]).mean() > 0.99
        assert (shapes[4 + one] == shapes[4]).mean() > 0.99
    colours = [tuple(np.asarray(p)[s].mean(0).astype(int)) for p, s in zip(drawn[:4], shapes[:4], strict=True)]
    assert all(np.abs(np.subtract(a, b)).max() > 20 for a in colours for b in colours if a != b)


# -- the copies -------------------------------------------------------------------------------------------------------


def cut_out() -> Image.Image:
    """Return a disc on transparent ground, 100 x 60."""
    picture = Image.new("RGBA", (100, 60))
    ImageDraw.Draw(picture).ellipse((20, 10, 80, 50), (200, 30, 30, 255))
    return picture


def copy(kind: str, picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(KINDS[kind](picture, Random(0))[0]))


def test_the_copies_are_what_their_names_say() -> None:
    disc = cut_out()
    white = np.asarray(on_white(disc))
    assert copy("jpeg60", disc).format == "JPEG"
    assert np.abs(np.asarray(copy("jpeg60", disc)).astype(int) - white).mean() < 6
    assert copy("half", disc).size == (50, 30)
    assert (copy("webp", disc).format, copy("webp", disc).mode) == ("WEBP", "RGBA")
    assert np.array_equal(np.asarray(copy("on_white", disc)), white)
    assert copy("crop", disc).size == (85, 51)
    for kind, level in (("border_black", 0), ("border_white", 255)):
        bordered = np.asarray(copy(kind, disc))
        assert bordered.shape == (60 + 2 * 4, 100 + 2 * 4, 3)  # 6% of 60 pixels
        assert np.array_equal(bordered[4:-4, 4:-4], white)
        assert set(bordered[:4].ravel().tolist()) == set(bordered[:, -4:].ravel().tolist()) == {level}


def test_only_what_is_transparent_is_planted_on_white(tmp_path: Path) -> None:
    originals = tiny_set(tmp_path)
    assert set(planted(originals, "on_white").original.values()) == {"disc"}
    assert set(planted(originals, "half").original.values()) == set(originals.files)
    # on white, white art on transparent ground is no picture
    assert set(planted(originals, "jpeg60").original.values()) == originals.files.keys() - {"white"}
    assert {file.suffix for file in planted(originals, "webp").pictures.files.values()} == {".webp"}


# -- the judging ------------------------------------------------------------------------------------------------------


def test_copies_of_copies_are_copies_and_pairs_have_no_order(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = ["s,a,b,copy,", "s,c,d,copy,", "s,c,b,copy,", "s,a,x,different,a note", "other,x,y,copy,"]
    pairs.write_text("\n".join(["set,one,other,verdict,note", *rows]) + "\n")
    verdicts = Verdicts.read("s", pairs)
    assert {verdicts.of(one, other) for one in "abcd" for other in "abcd"} == {"copy"}
    assert verdicts.of("x", "a") == verdicts.of("a", "x") == "different"
    assert verdicts.of("x", "y") == verdicts.of("x", "b") == "unjudged"
    assert Verdicts.read("held_out", pairs).of("x", "y") == "different"  # of a drawn set all are judged


def test_the_committed_list_says_of_each_pair_once_what_it_is() -> None:
    with PAIRS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} == {"copy", "different"}
    assert {row["set"] for row in rows} <= set(SETS)
    assert max(Counter((row["set"], frozenset((row["one"], row["other"]))) for row in rows).values()) == 1
    for row in rows:  # nor is a pair different whose pictures are copies of a third
        assert Verdicts.read(row["set"]).of(row["one"], row["other"]) == row["verdict"]


def test_a_dropped_pair_that_nobody_judged_counts_as_different() -> None:
    verdicts = Verdicts({"a": "a", "b": "a"}, frozenset({frozenset("ac")}))
    assert dropped([("a", "b"), ("c", "a"), ("d", "a")], 200, verdicts) == {
        **{"dropped": 3, "copies": 1, "different": 2, "unjudged": 1},
        "different_share": 0.01,
    }


def test_an_edge_is_told_with_its_score_where_there_is_one() -> None:
    assert Row("a", "drop", 0, "b", "hash", 2.0).edge == "hash 2"
    assert Row("a", "drop", 0, "b", "embedding", 0.25, 0.9, 0.5).edge == "embedding 0.25 0.900 >= 0.500"


def test_recall_is_of_all_copies_and_apart_for_small_originals() -> None:
    copies = {"a1": "a", "b1": "b", "c1": "c", "d1": "d"}
    assert recalled(copies, {"a1", "c1"}, {"c", "d"}) == {"recall": 0.5, "recall_small": 0.5}
    assert recalled(copies, {"a1"}, set()) == {"recall": 0.25, "recall_small": None}


def test_recall_over_all_sets_weighs_each_by_its_copies() -> None:
    sets = {
        name: {"dropped": {"tool": {}}, "planted": {"half": {"copies": n, "tool": {"recall": recall}}}}
        for name, n, recall in (("one", 30, 0.5), ("other", 10, 1.0), ("small ones alone", 0, None))
    }
    assert over_all(sets) == {"half": {"tool": 25 / 40}}


def test_a_group_is_false_if_it_shows_two_pictures_and_listed_copies_are_one() -> None:
    copies = {"a1": "a", "b1": "b", "c1": "c"}
    groups = {"a": 0, "a1": 0, "b": 1, "b1": 2, "c": 2, "c1": 2, "d": 3, "e": 3}
    rows = [Row(key, "keep", group) for key, group in groups.items()]
    assert grouped(rows, copies, Verdicts()) == ({"a1", "c1"}, {2, 3})
    assert grouped(rows, copies, Verdicts({"d": "d", "e": "d"})) == ({"a1", "c1"}, {2})


# -- a tiny real set --------------------------------------------------------------------------------------------------


def tiny_set(folder: Path) -> Pictures:
    """Return a set as in ../shared/data: three scenes, one under two names, a cut-out, white on transparent ground."""
    members = {"disc": cut_out(), **{f"scene{k}": scene(k) for k in range(3)}, "again": scene(0)}
    members["white"] = Image.new("RGBA", (80, 80), "white")
    members["white"].putalpha(scene(5, 80))
    shard = folder / "data" / "graphics" / "clipart" / "00000.tar"
    shard.parent.mkdir(parents=True)
    entries = [
        entry
        for key, picture in members.items()
        for entry in ((f"{key}.png", graphics_set.png(picture)), (f"{key}.txt", f"picture {key}".encode()))
    ]
    shard.write_bytes(tar_of(entries))
    return graphics_set.pictures("clipart", folder / "data", folder / "cache")


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_set_is_run_judged_and_reported(tmp_path: Path) -> None:
    originals = tiny_set(tmp_path)
    halves = planted(originals, "half")
    tars = [str(originals.tar), str(halves.pictures.tar)]
    rows = rows_of(memfilter.run(tars, tmp_path / "out", workers=1))
    assert [row.key for row in rows if row.key in originals.files] == list(originals.files)
    gone = {row.key: row.kept for row in rows if row.action == "drop"}
    assert {f"scene{k}-half" for k in range(3)} <= gone.keys()
    assert gone["scene1-half"] == "scene1"
    hits, false = grouped(rows, halves.original, Verdicts({"scene0": "scene0", "again": "scene0"}))
    assert {"scene0-half", "scene1-half", "scene2-half", "again-half"} <= hits
    assert not false
    assert grouped(rows, halves.original, Verdicts())[1]  # the scene that is there twice is not listed now

    peer = found("imagededup phash", originals, halves, None)
    assert {"scene1-half", "scene2-half"} <= peer.copies
    assert peer == found("imagededup phash", originals, halves, None)  # from the cache
    verdicts = Verdicts({"scene0": "scene0", "again": "scene0"})
    alone = found("imagededup phash", originals, None, None)
    assert dropped(alone.removed, 6, verdicts)["copies"] == 1
    assert not alone.copies

    files = originals.files | halves.pictures.files
    sheet(rows, files, verdicts.of, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[1] > 100
    measured = {"recall": 1.0, "recall_small": None, "false_groups": 0}
    result: dict[str, Any] = {
        "target": {"different_share": 0.005, "recall": 0.95},
        "small_below": 48,
        "sets": {
            "clipart": {
                "images": 5,
                "dropped": {"memfilter": dropped([("scene0", "scene1")], 5, verdicts)},
                "planted": {"half": {"copies": 5, "copies_small": 0, "memfilter": measured}},
            }
        },
    }
    result["recall_of_all_sets"] = over_all(result["sets"])
    assert "| clipart | 5 | 1 (1), 20.0% |" in markdown(result)
    assert "| clipart | half | 5 | 1.000 | 0 |" in markdown(result)
    assert "| all | half | | 1.000 | |" in markdown(result)
