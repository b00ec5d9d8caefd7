"""Rows on rows and columns on columns: crops and frames of lined pictures are laid where they were cut from."""

import numpy as np
import numpy.typing as npt
import pytest

from memfilter.axes import lay_by_axes

SIDE = 64


def page(seed: int) -> npt.NDArray[np.float32]:
    """Return a page (192, 192) of paragraphs: lines of dark strokes of many lengths, as print is at that size."""
    random = np.random.default_rng(seed)
    levels = np.full((192, 192), 250, np.float32)
    top = 8
    while top < 180:
        x, end = 10, random.integers(90, 182)
        while x < end:
            width = int(random.integers(3, 17))
            levels[top : top + 5, x : min(x + width, end)] = random.uniform(20, 120)
            x += width + 3
        top += 9 if random.random() < 0.7 else 16
    return levels


def shrunk(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return a picture as (64, 64), the mean over areas."""
    height, width = levels.shape
    rows = np.add.reduceat(levels, np.arange(SIDE) * height // SIDE, 0)
    rows /= np.diff(np.append(np.arange(SIDE) * height // SIDE, height))[:, None]
    columns = np.add.reduceat(rows, np.arange(SIDE) * width // SIDE, 1)
    return (columns / np.diff(np.append(np.arange(SIDE) * width // SIDE, width))[None]).astype(np.float32)


def laid(needle: npt.NDArray[np.float32], hay: npt.NDArray[np.float32]) -> list[float]:
    """Return centre and scale of the rows, and of the columns."""
    affine = np.empty(6)
    lay_by_axes(shrunk(needle), shrunk(hay), affine)
    assert affine[2] == affine[4] == 0
    return [affine[0], affine[1], affine[3], affine[5]]


@pytest.mark.parametrize("seed", range(12))
def test_a_crop_lies_where_it_was_cut(seed: int) -> None:
    random, whole = np.random.default_rng(seed), page(seed)
    top, left = random.integers(0, 28, 2)
    tall, wide = random.integers(160, 192 - 27, 2)
    expected = [(top + tall / 2) / 192, tall / 192, (left + wide / 2) / 192, wide / 192]
    part = whole[top : top + tall, left : left + wide]
    assert laid(part, whole) == pytest.approx(expected, abs=1.5 / SIDE)
    # the other way round, the whole reaches beyond its part
    (y, height), (x, width) = expected[:2], expected[2:]
    inverse = [0.5 + (0.5 - y) / height, 1 / height, 0.5 + (0.5 - x) / width, 1 / width]
    assert laid(whole, part) == pytest.approx(inverse, abs=2 / SIDE)


@pytest.mark.parametrize("seed", range(6))
def test_a_page_in_a_frame_is_found_in_it(seed: int) -> None:
    whole = page(seed)
    framed = np.pad(whole, 16, constant_values=0)
    assert laid(whole, framed) == pytest.approx([0.5, 192 / 224, 0.5, 192 / 224], abs=1.5 / SIDE)


def test_the_same_page_lies_on_itself() -> None:
    assert laid(page(0), page(0)) == pytest.approx([0.5, 1, 0.5, 1], abs=1e-6)


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_one_colour_gives_a_finite_map(level: float) -> None:
    flat = np.full((192, 192), level, np.float32)
    for pair in ((flat, page(1)), (page(1), flat), (flat, flat)):
        assert np.isfinite(laid(*pair)).all()
