"""Edges by embedding and alignment, through whole runs and against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, sample, scene, write_tar
from PIL import Image, ImageDraw, ImageOps

import memfilter
from memfilter.config import Config
from memfilter.edges import _MOST_A_ROW, _MOST_PAIRS, _NEAREST, _PAIRS_A_ROW, _affordable
from memfilter.encoders.builtin import Builtin

pytestmark = pytest.mark.numerical


def edits(picture: Image.Image) -> dict[str, Image.Image]:
    barred = picture.copy()
    ImageDraw.Draw(barred).rectangle((0, 205, 256, 256), fill=0)
    ImageDraw.Draw(barred).text((20, 215), "SEEN ON TV", fill=255, font_size=28)
    return {
        "mirrored": ImageOps.mirror(picture),
        "cropped": picture.crop((40, 10, 246, 216)),
        "framed": ImageOps.expand(picture, 24, 0),
        "barred": barred,
        "turned": picture.rotate(8, Image.Resampling.BICUBIC, fillcolor=0),
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes, and five edited copies, smaller than they are, of each of the first eight."""
    members = []
    for i in range(40):
        members += sample(f"scene{i:02}", encoded(scene(i, 256)), f"a scene, number {i}")
        for name, copy in edits(scene(i, 256)).items() if i < 8 else ():
            small = copy.resize((200, 200), Image.Resampling.LANCZOS)
            members += sample(f"{name}{i:02}", encoded(small), f"{name} copy of scene {i}")
    return write_tar(tmp_path_factory.mktemp("planted") / "data" / "00000.tar", members)


def actions(manifest: memfilter.Manifest) -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in manifest.table().to_pylist()}


def test_edited_copies_are_found_and_no_two_scenes_are_joined(planted: Path, tmp_path: Path) -> None:
    found = actions(memfilter.run([str(planted)], tmp_path / "out", workers=1))
    uids = {row["uid"]: key for key, row in found.items()}
    scenes = {key for key in found if key.startswith("scene")}
    assert {key for key, row in found.items() if row["action"] == "keep"} >= scenes
    joined = {key: uids[row["canonical_uid"]] for key, row in found.items() if row["canonical_uid"]}
    assert all(key[-2:] == kept[-2:] for key, kept in joined.items())
    # drawings: those with another part are other pictures, their mirror images may be
    kinds = [key[:-2] for key in joined if not key.startswith("mirrored")]
    assert {*kinds} == {"cropped", "framed", "turned"}
    assert len(kinds) >= 23  # of 24
    by_embedding = [row for row in found.values() if row["reasons"][:1] == ["embedding_duplicate"]]
    assert len(by_embedding) >= 20
    assert all(0 <= row["match_distance"] <= 0.9 for row in by_embedding)
    assert all(row["match_score"] >= row["match_threshold"] == 0.5 for row in by_embedding)


def test_a_similarity_that_nothing_reaches_leaves_the_hash_alone(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text("images: {encoder_similarity: 2}")
    memfilter.run([str(planted)], tmp_path / "out", workers=1)
    found = actions(memfilter.rethreshold(tmp_path / "out", tmp_path / "strict.yaml"))
    assert not any("embedding_duplicate" in row["reasons"] for row in found.values())
    fresh = memfilter.run([str(planted)], tmp_path / "fresh", Config.load(tmp_path / "strict.yaml"), workers=2)
    assert actions(fresh) == found


@pytest.mark.parametrize("n", [2, 300, 3000])
def test_about_five_of_the_nearest_pairs_a_row_are_listed_at_most(n: int) -> None:
    random = np.random.default_rng(n)
    rows = random.standard_normal((n, 16)) + random.standard_normal(16)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    lowest = _affordable(rows, np.full(n, -1), 0.1)
    cosine = rows.astype(np.float32) @ rows.astype(np.float32).T
    others = (cosine >= lowest).sum(1) - 1
    assert others.mean() / 2 <= 1.3 * max(_MOST_A_ROW, _MOST_PAIRS / n)  # it is an estimate
    assert lowest >= 0.6 or np.minimum(others, _NEAREST).mean() / 2 <= 1.3 * _PAIRS_A_ROW
    assert 0.1 <= lowest <= 1


def test_the_builtin_descriptor_gives_unit_rows_that_their_batch_changes_by_rounding_alone() -> None:
    pictures = np.stack([np.asarray(scene(i, 64)) for i in range(70)])
    rows = Builtin().encode(pictures)
    assert rows.shape == (70, Builtin.dim)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(Builtin().encode(pictures), rows)
    np.testing.assert_allclose(Builtin().encode(pictures[69:]), rows[69:], atol=1e-5)
    np.testing.assert_allclose(Builtin().encode(pictures[::-1].copy()), rows[::-1], atol=1e-5)
    assert Builtin().encode(pictures[:0]).shape == (0, Builtin.dim)


def test_the_builtin_descriptor_knows_mirror_images_and_not_other_scenes() -> None:
    pictures = np.stack([np.asarray(scene(i, 64)) for i in range(30)])
    rows, mirrored = Builtin().encode(pictures), Builtin().encode(pictures[:, :, ::-1].copy())
    cosine = rows @ mirrored.T
    assert np.median(np.diag(cosine)) > 0.8
    assert np.median(cosine[~np.eye(30, dtype=bool)]) < 0.4


def test_what_is_repeated_often_does_not_keep_other_copies_from_being_looked_at(tmp_path: Path) -> None:
    members = []
    for i in range(6):
        buffer = scene(i, 200)
        for copy in range(30):  # nearly alike: 14 pairs a sample
            shifted = buffer.rotate(copy / 10, Image.Resampling.BICUBIC, fillcolor=128)
            members += sample(f"often{i}{copy:02}", encoded(shifted), f"often {i} {copy}")
    members += sample("scene", encoded(scene(50, 256)), "a scene")
    members += sample("cropped", encoded(scene(50, 256).crop((30, 30, 240, 240)).resize((180, 180))), "its crop")
    tar = write_tar(tmp_path / "data" / "00000.tar", members)
    found = actions(memfilter.run([str(tar)], tmp_path / "out", workers=1))
    assert found["cropped"]["canonical_uid"] == found["scene"]["uid"]
    often = [row for key, row in found.items() if key.startswith("often")]
    assert sum(row["action"] == "drop" for row in often) >= 150
