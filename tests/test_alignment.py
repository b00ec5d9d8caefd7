"""The evidence that one thumbnail lies on another, with edits whose truth is known."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import scene
from PIL import Image, ImageDraw, ImageOps

from memfilter.alignment import align
from memfilter.images import thumbnail

Thumbnails = npt.NDArray[np.uint8]

SURE = 0.3
"""Evidence that hardly any pair of unlike photos has."""


def small(picture: Image.Image) -> Thumbnails:
    return thumbnail(np.asarray(picture.convert("L")))


def with_text_bar(picture: Image.Image) -> Image.Image:
    edited = picture.copy()
    ImageDraw.Draw(edited).rectangle((0, 200, 256, 256), fill=0)
    ImageDraw.Draw(edited).text((20, 215), "A CAPTION IN A BAR", fill=255, font_size=24)
    return edited


def compressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=10)
    return Image.open(buffer)


def beside(picture: Image.Image) -> Image.Image:
    canvas = scene(999)
    canvas.paste(picture.resize((128, 256)), (0, 0))
    return canvas


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "the same": lambda p: p,
    "mirrored": ImageOps.mirror,
    "cropped to 80% of its area": lambda p: p.crop((15, 5, 244, 234)),
    "cropped to 60%": lambda p: p.crop((58, 0, 256, 198)),
    "cropped to 40%": lambda p: p.crop((90, 90, 252, 252)),
    "cropped and mirrored": lambda p: ImageOps.mirror(p.crop((58, 0, 256, 198))),
    "cropped to a strip": lambda p: p.crop((0, 40, 256, 220)),
    "with a border": lambda p: ImageOps.expand(p, 32, 0),
    "turned by 8 degrees": lambda p: p.rotate(8, Image.Resampling.BICUBIC, fillcolor=0),
    "turned by 15 degrees": lambda p: p.rotate(-15, Image.Resampling.BICUBIC, fillcolor=255),
    "darkened": lambda p: p.point([int(v * 0.6) for v in range(256)]),
    "of less contrast": lambda p: p.point([int(80 + v * 0.4) for v in range(256)]),
    "of quality 10": compressed,
    "with a bar of text": with_text_bar,
    "on the left half of a collage": beside,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_lies_on_its_original(edit: str) -> None:
    originals = [scene(i) for i in range(12)]
    pictures = np.stack([small(p) for p in originals] + [small(EDITS[edit](p)) for p in originals])
    a = np.arange(12)
    evidence = align(pictures, a, a + 12).evidence
    assert evidence.dtype == np.float32
    assert (evidence >= SURE).sum() >= 11, np.sort(evidence).round(2)
    # whichever is named first
    assert (align(pictures, a + 12, a).evidence >= SURE).sum() >= 11


def test_unlike_scenes_do_not_lie_on_each_other() -> None:
    pictures = np.stack([small(scene(i)) for i in range(40)])
    a, b = np.triu_indices(40, 1)
    evidence = align(pictures, a, b).evidence
    assert (evidence >= 0).all()
    assert (evidence >= SURE).sum() <= 1
    assert np.median(evidence) < 0.2


def test_unlike_photos_do_not_lie_on_each_other(shared_data: Path) -> None:
    import tarfile

    with tarfile.open(shared_data / "photos" / "00000.tar") as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith(".jpg")][:60]
        pictures = np.stack([small(Image.open(io.BytesIO(f.read()))) for f in files if f])
    a, b = np.triu_indices(len(pictures), 1)
    assert (align(pictures, a, b).evidence >= SURE).mean() < 0.005


@pytest.mark.parametrize("other", [np.zeros((32, 32), np.uint8), np.full((32, 32), 255, np.uint8), small(scene(1))])
def test_flat_pictures_are_no_evidence(other: Thumbnails) -> None:
    flat = np.full((32, 32), 128, np.uint8)
    assert align(np.stack([flat, other]), np.array([0, 1]), np.array([1, 0])).evidence.tolist() == [0, 0]


def test_a_pair_s_evidence_depends_on_the_pair_alone() -> None:
    pictures = np.stack([small(scene(i)) for i in range(10)] + [small(ImageOps.mirror(scene(i))) for i in range(10)])
    a, b = np.triu_indices(20, 1)
    together = align(pictures, a, b).evidence
    alone = [align(pictures[[i, j]], np.array([0]), np.array([1])).evidence[0] for i, j in zip(a, b, strict=True)]
    assert together.tolist() == alone


def test_no_pairs_have_no_evidence() -> None:
    none = np.empty(0, np.int64)
    assert align(np.zeros((3, 32, 32), np.uint8), none, none).evidence.shape == (0,)


@pytest.mark.parametrize("seed", range(3))
def test_noise_neither_crashes_nor_convinces(seed: int) -> None:
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, (30, 32, 32), np.uint8)
    pictures[:5] = np.where(random.random((5, 32, 32)) < 0.02, 255, 0)  # a few specks
    pictures[5:10] = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None]  # ramps
    a, b = np.triu_indices(30, 1)
    evidence = align(pictures, a, b).evidence
    assert np.isfinite(evidence).all()
    assert ((evidence >= 0) & (evidence <= 1)).all()
    assert (evidence[(a >= 10) & (b >= 10)] < SURE).all()
