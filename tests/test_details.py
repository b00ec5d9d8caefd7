"""What is kept of a picture: its content without borders, small, in colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import encoded, picture, sample, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import memfilter
from memfilter import Config
from memfilter.details import MOST_BYTES, SIDE, WHOLE, content, packed, resized, unpacked


def shown(image: Image.Image) -> np.ndarray:
    return resized(np.asarray(image.convert("RGB")), SIDE)


def test_a_picture_without_a_border_is_whole() -> None:
    assert all(content(shown(picture(seed, 200, 160))) == WHOLE for seed in range(20))


@pytest.mark.parametrize("colour", ["black", "white", "#c03060"])
def test_a_border_is_cut_off_and_another_inside_it_too(colour: str) -> None:
    image = picture(1, 200, 200)
    framed = ImageOps.expand(image, 20, colour)
    twice = ImageOps.expand(framed, 20, "white" if colour != "white" else "black")
    for bordered, border in ((framed, 20), (twice, 40)):
        expected = SIDE * border / bordered.width
        box = content(shown(bordered)) or WHOLE
        assert box == pytest.approx((expected, SIDE - expected, expected, SIDE - expected), abs=2.5)
        assert min(box[0], SIDE - box[1], box[2], SIDE - box[3]) >= expected, "a line of the border is left"


def test_a_drawing_shows_the_same_in_a_black_frame() -> None:
    image = Image.new("RGB", (300, 300), "white")
    image.paste(picture(2, 80, 60), (70, 150))
    boxes = []
    for border in (0, 18):
        top, bottom, left, right = content(shown(ImageOps.expand(image, border, "black"))) or WHOLE
        scale = (300 + 2 * border) / SIDE
        boxes.append([scale * edge - border for edge in (top, bottom, left, right)])
    np.testing.assert_allclose(boxes[0], [150, 210, 70, 150], atol=4)
    np.testing.assert_allclose(boxes[1], boxes[0], atol=6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bands", [[200, 90], [200, 255, 90], [200, 255, 200], [0, 255, 0, 255]])
def test_bands_are_a_flag_and_no_border(bands: list[int], turned: bool) -> None:
    pixels = (
        np.repeat(np.array(bands, np.uint8), SIDE // len(bands) + 1)[:SIDE, None, None].repeat(SIDE, 1).repeat(3, 2)
    )
    assert content(pixels.swapaxes(0, 1) if turned else pixels) == WHOLE


@pytest.mark.parametrize("noise", [0, 3])
def test_one_colour_has_no_content(noise: int) -> None:
    levels = 120 + np.random.default_rng(0).integers(-noise, noise + 1, (90, 70, 3))
    assert content(resized(levels.astype(np.uint8), SIDE)) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 140)] * 4, st.integers(0, 255)), max_size=6), st.integers(0, 255))
def test_a_box_lies_inside_and_has_a_least_side(rectangles: list[tuple[int, ...]], ground: int) -> None:
    pixels = np.full((SIDE, SIDE, 3), ground, np.uint8)
    for y, x, height, width, level in rectangles:
        pixels[y : y + height, x : x + width] = level
    box = content(pixels)
    if box is None:
        assert np.ptp(pixels, (0, 1)).max() <= 32
    else:
        top, bottom, left, right = box
        assert 0 <= top < bottom <= SIDE
        assert 0 <= left < right <= SIDE
        assert min(bottom - top, right - left) >= 16


@pytest.mark.parametrize("encoder", [None, "builtin"])
def test_what_averages_to_one_colour_is_not_blank(encoder: str | None, tmp_path: Path) -> None:
    members = []
    for seed in range(2):
        pixels = np.full((1200, 1800), 8, np.uint8)
        for y, x in np.random.default_rng(seed).integers(0, (1196, 1796), (60, 2)).tolist():
            pixels[y : y + 3, x : x + 3] = 250
        members += sample(f"stars{seed}", encoded(Image.fromarray(pixels), quality=95), f"sky {seed}")
    members += sample("night", encoded(Image.new("L", (600, 900), 8)), "no star")
    write_tar(tmp_path / "in" / "0.tar", members)
    run = memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config.parse({"images": {"encoder": encoder}}), 1)
    assert run.counts["keep"] == 3
    assert run.info["found"]["blank"] == 1


@pytest.mark.parametrize("size", [(128, 128), (1, 1), (2, 900)])
def test_black_and_white_noise_fits_too(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (*size, 3), np.uint8) * 255
    assert len(packed(resized(noise, SIDE))) <= MOST_BYTES


@pytest.mark.parametrize("side", [129, 5000])
def test_a_stored_picture_of_another_size_is_refused(side: int) -> None:
    data = simplejpeg.encode_jpeg(np.zeros((side, side, 3), np.uint8), 5)
    with pytest.raises(ValueError, match=rf"{side} x {side} pixels, not of 128 x 128"):
        unpacked(data)
    for damaged in (b"", data[:40], b"\xff\xd8 no picture"):
        with pytest.raises(ValueError, match=r"\S"):
            unpacked(damaged)


@pytest.mark.parametrize("kind", ["photo", "noise", "flat"])
def test_a_stored_picture_has_a_bounded_size(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    pixels = {"photo": shown(picture(1, 200, 160)), "noise": noise, "flat": np.zeros_like(noise)}[kind]
    data = packed(pixels)
    assert len(data) <= MOST_BYTES
    assert unpacked(data).shape == (SIDE, SIDE, 3)
    if kind != "noise":
        assert np.abs(unpacked(data).astype(int) - pixels).mean() < 4
    np.testing.assert_array_equal(unpacked(data.ljust(MOST_BYTES, b"\0")), unpacked(data))
