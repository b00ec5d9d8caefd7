"""Perceptual hashes of many images at once against imagededup's own function, bit for bit."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from memfilter.images import decode, thumbnail
from memfilter.phash import phash_bits
from memfilter.signatures import hasher

Small = npt.NDArray[np.uint8]
exact = hasher("phash")._hash_algo


def own_bits(small: Small) -> npt.NDArray[np.bool_]:
    return np.stack([np.ravel(exact(image)) for image in small])


def thumbnails_of(shard: Path) -> Small:
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith(".jpg")]
        return np.stack([thumbnail(decode(f.read(), False, 10**9).pixels) for f in files if f])


@pytest.mark.parametrize("folder", ["coco", "photos", "tiny"])
def test_all_photos_have_imagededups_bits(folder: str, shared_data: Path) -> None:
    for shard in sorted((shared_data / folder).glob("*.tar")):
        small = thumbnails_of(shard)
        np.testing.assert_array_equal(phash_bits(small, exact), own_bits(small))


@settings(max_examples=200, deadline=None)
@given(
    images=arrays(
        np.uint8, st.tuples(st.integers(1, 5), st.just(32), st.just(32)), elements=st.sampled_from([0, 9, 255])
    )
)
def test_images_of_few_levels_have_imagededups_bits(images: Small) -> None:
    np.testing.assert_array_equal(phash_bits(images, exact), own_bits(images))


def test_flat_and_symmetrical_images_whose_coefficients_tie_have_imagededups_bits() -> None:
    ramp = np.tile(np.arange(32, dtype=np.uint8), (32, 1))
    squares = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((4, 4))).astype(np.uint8) * 255
    cross = np.minimum(ramp, ramp[:, ::-1]) + np.minimum(ramp, ramp[:, ::-1]).T
    images = np.stack([ramp * 0, ramp * 0 + 255, ramp, ramp.T, squares, cross, cross * 3, ramp + ramp.T])
    asked: list[Small] = []

    def counted(image: Small) -> npt.NDArray[np.bool_]:
        asked.append(image)
        bits: npt.NDArray[np.bool_] = exact(image)
        return bits

    np.testing.assert_array_equal(phash_bits(images, counted), own_bits(images))
    assert len(asked) == len(images)


def test_imagededups_function_is_not_asked_of_a_photo_like_image() -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32), np.uint8)

    def refuse(image: Small) -> None:
        raise AssertionError("asked")

    np.testing.assert_array_equal(phash_bits(images, refuse), own_bits(images))


def test_no_image_has_no_bits() -> None:
    assert phash_bits(np.empty((0, 32, 32), np.uint8), exact).shape == (0, 64)
