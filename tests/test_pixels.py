"""Transparency on its ground and deep pixels in 8 bits: exact levels by every decode, and whole runs."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import encoded, picture, sample, words, write_tar
from hostile_images import chunk, grey_tiff, tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageColor, ImageDraw

import memfilter
from memfilter import Config, ConfigError, OnlineFilter
from memfilter.images import BadImage, decode, thumbnail
from memfilter.signatures import Signer

MAX_PIXELS = 178_956_970
GROUNDS = ("#ffffff", "#000000", "#1e90ff")
Pixels = npt.NDArray[np.uint8]
Deep = npt.NDArray[Any]


def png(samples: Deep, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of samples (H, W, channels) with this many bits each, as Pillow itself writes few of."""
    height, width, _ = samples.shape
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[:, :, None] >> np.arange(depth)[::-1]) & 1
        packed = [np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in bits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    between = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + between + body + chunk(b"IEND", b"")


def grey_of(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def blended(rgb: Deep, alpha: Deep, ground: str) -> Pixels:
    """Return colours on a ground by floats, each rounded to the nearest level."""
    share = alpha.astype(np.float64)[:, :, None] / 255
    mixed = rgb.astype(np.float64) * share + np.array(ImageColor.getrgb(ground)) * (1 - share)
    return np.floor(mixed + 0.5).astype(np.uint8)


def all_decodes(data: bytes, ground: str) -> tuple[Pixels, Pixels, Pixels, Pixels]:
    """Return the RGB pixels of three decodes, and the grey ones of the fast one."""
    full = decode(data, True, MAX_PIXELS, ground=ground)
    both = decode(data, True, MAX_PIXELS, colour=64, ground=ground)
    fast = decode(data, False, MAX_PIXELS, colour=64, ground=ground)
    assert both.colour is not None
    assert fast.colour is not None
    if data[:3] != b"\xff\xd8\xff":  # a JPEG is decoded at the size that the colours need
        np.testing.assert_array_equal(decode(data, False, MAX_PIXELS, ground=ground).pixels, fast.pixels)
    return full.pixels, both.colour, fast.colour, fast.pixels


# -- transparency -----------------------------------------------------------------------------------------------------

RGB = np.asarray(picture(1, 64, 48))
GREY = np.asarray(picture(1, 64, 48).convert("L"))
ALPHA = np.linspace(0, 255.99, GREY.size).astype(np.uint8).reshape(GREY.shape)  # of all levels
HOLE = np.where(np.asarray(picture(2, 64, 48).convert("L")) < 128, 0, 255)
TRIPLE = np.repeat(GREY[:, :, None], 3, 2)

Kind = tuple[bytes, Deep, Deep]
"""A file, its colours (H, W, 3) and its alpha (H, W), each from 0 to 255."""


def rgba(format: str, **options: object) -> Kind:
    return encoded(Image.fromarray(np.dstack([RGB, ALPHA])), format, **options), RGB, ALPHA


def grey_alpha(format: str, **options: object) -> Kind:
    return encoded(Image.fromarray(np.dstack([GREY, ALPHA])), format, **options), TRIPLE, ALPHA


def animated(format: str, **options: object) -> Kind:
    later = [picture(seed, 64, 48).convert("RGBA") for seed in (5, 6)]
    return rgba(format, save_all=True, append_images=later, **options)


def associated(colours: Deep, mode: str) -> Kind:
    """Return a TIFF whose colours are multiplied with its alpha; they can be told again but for rounding."""
    multiplied = np.rint(colours.astype(float) * ALPHA[:, :, None] / 255).astype(np.uint8)
    levels = np.dstack([multiplied if mode == "RGBA" else multiplied[:, :, :1], ALPHA])
    data = encoded(Image.fromarray(levels.squeeze(), mode), "TIFF")
    extra = data.index(struct.pack("<HHI", 338, 3, 1)) + 8
    return data[:extra] + struct.pack("<H", 1) + data[extra + 2 :], colours, ALPHA


def palette(*transparency: int, bits: int = 8) -> Kind:
    """Return a PNG of a palette, its first colours with these alphas and the others opaque."""
    number = 1 << bits
    image = Image.fromarray(RGB).quantize(number)
    colours = np.array(image.getpalette(), np.uint8)[: 3 * number].reshape(-1, 3)
    at = np.asarray(image)
    alphas = np.full(number, 255)
    alphas[: len(transparency)] = transparency
    chunks = (b"PLTE", colours.tobytes()), (b"tRNS", bytes(transparency))
    return png(at[:, :, None], bits, 3, *chunks), colours[at], alphas[at]


def grey_key(bits: int) -> Kind:
    levels = GREY.astype(int) * ((1 << bits) - 1) // 255
    key = levels[20, 20]
    data = png(levels[:, :, None], bits, 0, (b"tRNS", struct.pack(">H", key)))
    spread = levels * 255 // ((1 << bits) - 1)
    return data, np.repeat(spread[:, :, None], 3, 2), np.where(levels == key, 0, 255)


def deep_grey_key() -> Kind:
    """Return 12 bits in 16, of two levels that share their upper 8 bits one transparent."""
    levels = GREY.astype(int) * 16 + HOLE // 255
    data = png(levels[:, :, None], 16, 0, (b"tRNS", struct.pack(">H", levels[20, 20])))
    return data, TRIPLE, np.where(levels == levels[20, 20], 0, 255)


def colour_key() -> Kind:
    holed = np.where(HOLE[:, :, None] == 255, RGB, RGB[20, 20])
    data = encoded(Image.fromarray(holed), "PNG", transparency=tuple(RGB[20, 20].tolist()))
    return data, holed, np.where((holed == RGB[20, 20]).all(2), 0, 255)


def deep_colour_key(bits: int) -> Kind:
    """Return colours of 16 bits, some in use, of which one is transparent and not those with the same upper bytes."""
    low = np.random.default_rng(0).integers(0, 2, GREY.shape)
    holed = np.where(HOLE[:, :, None] == 255, RGB, RGB[20, 20]).astype(int) << (bits - 8)
    holed[:, :, 1] |= low
    key = holed[20, 20]
    data = png(holed, 16, 2, (b"tRNS", struct.pack(">3H", *key)))
    return data, holed >> (bits - 8), np.where((holed == key).all(2), 0, 255)


def gif(frames: int = 1) -> Kind:
    image = Image.fromarray(RGB).quantize(100)
    indices = np.where(HOLE == 255, np.asarray(image), 120).astype(np.uint8)
    holed = Image.fromarray(indices, "P")
    colours = [*image.getpalette()[:300], *range(60), 9, 8, 7]  # type: ignore[index]
    holed.putpalette(colours)
    more = {"save_all": True, "append_images": [picture(9, 64, 48).quantize(9)] * (frames - 1)} if frames > 1 else {}
    data = encoded(holed, "GIF", transparency=120, optimize=False, **more)
    return data, np.array(colours).reshape(-1, 3)[indices], HOLE


def bmp_rgba() -> Kind:
    """Return a BMP whose header says that its fourth byte is alpha; Pillow writes none."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    body = np.dstack([RGB[:, :, ::-1], ALPHA])[::-1].tobytes()
    info = struct.pack("<IiiHHIIiiII", 108, 64, 48, 1, 32, 3, len(body), 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + len(body), 0, 0, 122) + info + body, RGB, ALPHA


def grey_gif() -> Kind:
    """Return a GIF whose palette is a ramp of greys, which Pillow opens as grey."""
    data = encoded(Image.fromarray(GREY), "GIF", transparency=int(GREY[20, 20]))
    return data, TRIPLE, np.where(GREY[20, 20] == GREY, 0, 255)


KINDS: dict[str, Callable[[], Kind]] = {
    "png-rgba": lambda: rgba("PNG"),
    "png-rgba-animated": lambda: animated("PNG"),
    "png-rgba-16-bit": lambda: (png(np.dstack([RGB, ALPHA]).astype(int) * 257, 16, 6), RGB, ALPHA),
    "png-grey-alpha": lambda: grey_alpha("PNG"),
    "png-grey-alpha-16-bit": lambda: (png(np.dstack([GREY, ALPHA]).astype(int) * 257, 16, 4), TRIPLE, ALPHA),
    "png-palette-one": lambda: palette(255, 255, 0),
    "png-palette-bytes": lambda: palette(*range(0, 256, 2)),
    "png-palette-of-4": lambda: palette(0, 77, 200, bits=2),
    "png-palette-too-many": lambda: (
        palette(*range(256))[0].replace(
            chunk(b"tRNS", bytes(range(256))), chunk(b"tRNS", bytes(range(256)) + b"\1\2\3")
        ),
        *palette(*range(256))[1:],
    ),
    "png-1-bit-key": lambda: grey_key(1),
    "png-2-bit-key": lambda: grey_key(2),
    "png-4-bit-key": lambda: grey_key(4),
    "png-8-bit-key": lambda: grey_key(8),
    "png-16-bit-key": deep_grey_key,
    "png-rgb-key": colour_key,
    "png-rgb-16-bit-key": lambda: deep_colour_key(16),
    "png-rgb-12-of-16-bit-key": lambda: deep_colour_key(12),
    "webp-rgba": lambda: rgba("WEBP", lossless=True, exact=True),
    "webp-rgba-animated": lambda: animated("WEBP", lossless=True, exact=True),
    "gif": gif,
    "gif-animated": lambda: gif(3),
    "gif-grey": grey_gif,
    "bmp-rgba": bmp_rgba,
    "tiff-rgba": lambda: rgba("TIFF"),
    "tiff-rgba-lzw": lambda: rgba("TIFF", compression="tiff_lzw"),
    "tiff-grey-alpha": lambda: grey_alpha("TIFF"),
    "tiff-rgba-associated": lambda: associated(RGB, "RGBA"),
    "tiff-grey-alpha-associated": lambda: associated(TRIPLE, "LA"),
}
HARD = ("png-palette-one", "gif", "gif-animated", "gif-grey", *(kind for kind in KINDS if kind.endswith("key")))
"""Kinds that have holes and no levels between."""


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_transparency_is_blended_with_the_ground_to_the_nearest_level(kind: str, ground: str) -> None:
    data, rgb, alpha = KINDS[kind]()
    assert (alpha == 0).any()
    assert ((alpha > 0) & (alpha < 255)).any() != (kind in HARD)
    expected = blended(rgb, alpha, ground)
    *found, grey = all_decodes(data, ground)
    for pixels in found:
        if kind.endswith("associated"):
            assert np.abs(pixels.astype(int) - expected).max() <= 1
        else:
            np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(grey, grey_of(found[0]))


@settings(max_examples=60, deadline=None)
@given(
    pixels=arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(4))),
    ground=st.tuples(*[st.integers(0, 255)] * 3).map(lambda levels: f"#{bytes(levels).hex()}"),
    format=st.sampled_from(["PNG", "TIFF", "WEBP"]),
)
def test_any_pixels_on_any_ground_equal_those_blended_by_floats(pixels: Pixels, ground: str, format: str) -> None:
    data = encoded(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    expected = blended(pixels[:, :, :3], pixels[:, :, 3], ground)
    if np.ptp(expected, (0, 1)).max() <= 16 < np.ptp(pixels[:, :, 3]):
        seen_on = "black" if grey_of(expected).min() >= 128 else "white"
        expected = blended(pixels[:, :, :3], pixels[:, :, 3], seen_on)
    *found, grey = all_decodes(data, ground)
    for each in found:
        np.testing.assert_array_equal(each, expected)
    np.testing.assert_array_equal(grey, grey_of(expected))


def test_a_turned_picture_is_composed_too() -> None:
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = np.rot90(blended(RGB, ALPHA, "#1e90ff"), -1)
    for format in ("PNG", "TIFF"):
        *found, grey = all_decodes(encoded(image, format, exif=exif), "#1e90ff")
        for pixels in found:
            np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(grey, grey_of(expected.copy()))


OPAQUE: dict[str, tuple[str, str, dict[str, object]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg-grey": ("L", "JPEG", {}),
    "jpeg-cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png-grey": ("L", "PNG", {}),
    "png-1-bit": ("1", "PNG", {}),
    "png-palette": ("P", "PNG", {}),
    "png-opaque-alpha": ("RGBA", "PNG", {}),
    "gif": ("P", "GIF", {}),
    "webp": ("RGB", "WEBP", {"lossless": True}),
    "bmp": ("RGB", "BMP", {}),
    "tiff-cmyk": ("CMYK", "TIFF", {}),
    "tiff-lab": ("LAB", "TIFF", {}),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_a_picture_without_transparency_is_the_same_on_any_ground_and_on_none(kind: str) -> None:
    mode, format, options = OPAQUE[kind]
    data = encoded(picture(3, 64, 48).convert(mode), format, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for ground in GROUNDS:
        full, both, _, grey = all_decodes(data, ground)
        np.testing.assert_array_equal(full, expected)
        np.testing.assert_array_equal(both, expected)
        np.testing.assert_array_equal(grey, decode(data, False, MAX_PIXELS, colour=64, ground=None).pixels)


@pytest.mark.parametrize("kind", ["png-rgba", "png-palette-bytes", "png-16-bit-key", "png-rgb-key", "tiff-rgba"])
def test_without_a_ground_a_picture_is_as_convert_rgb_shows_it(kind: str) -> None:
    data = KINDS[kind]()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Pillow drops a palette's transparency
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, True, MAX_PIXELS, ground=None).pixels, expected)


def test_what_pillow_does_not_convert_is_a_bad_image_and_no_crash() -> None:
    data = KINDS["tiff-grey-alpha-associated"]()[0]
    with pytest.raises(BadImage, match="unreadable_image: ValueError: conversion from La"):
        decode(data, True, MAX_PIXELS, ground=None)


@pytest.mark.parametrize("images", [{}, {"decode": "full"}, {"hash": "pdq"}, {"hash": "whash"}], ids=str)
def test_a_cut_out_has_the_signature_of_the_same_on_its_ground(images: dict[str, Any]) -> None:
    shape = cut_out(4)
    for ground in GROUNDS:
        signer = Signer(Config.parse({"images": {**images, "ground": ground}}))
        flat = Image.alpha_composite(Image.new("RGBA", shape.size, ground), shape)
        files = [encoded(image, "PNG") for image in (shape, flat, flat.convert("RGB"))]
        assert_same_signatures(signer, files)


def assert_same_signatures(signer: Signer, files: list[bytes]) -> None:
    """Check that these files differ in nothing that is signed, but for their bytes."""
    rows = [{"uid": bytes(16), "index": i, "key": str(i)} | signer._image(data) for i, data in enumerate(files)]
    table = signer.table(rows).drop_columns(["index", "key", "digest", "bytes"])
    first, *others = table.to_pylist()
    assert first["picture"]
    assert all(other == first for other in others)


# -- deep pixels ------------------------------------------------------------------------------------------------------

FLOATS = GREY.astype(np.float32)
DOUBT = np.array([0x7FA00000, 0x7F800000, 0xFF800000], np.uint32).view(np.float32)  # a signalling NaN, +inf, -inf


def deep(levels: Deep, format: str = "PNG", **options: object) -> bytes:
    return encoded(Image.fromarray(levels), format, **options)


def shorts(bits: int) -> npt.NDArray[np.uint16]:
    """Return GREY in the upper 8 of these bits, and noise in those below; its maximum is in the upper half."""
    noise = np.random.default_rng(1).integers(0, 1 << (bits - 8), GREY.shape)
    return ((GREY.astype(int) << (bits - 8)) | noise).astype(np.uint16)


def odd_floats() -> Deep:
    """Return floats with three that are no numbers in the upper left."""
    found = FLOATS * 3 - 100
    found[0, :3] = DOUBT
    return found


def odd_levels() -> Pixels:
    """Return what becomes of them: the minimum, the maximum, the minimum."""
    found = stretched(np.delete(odd_floats().ravel(), [0, 1, 2]))
    return np.concatenate([np.uint8([0, 255, 0]), found]).reshape(GREY.shape)


def stretched(values: Deep) -> Pixels:
    """Return levels from the minimum to the maximum."""
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) * 255 / (high - low)).astype(np.uint8)


def big_endian_tiff(levels: Deep, tags: dict[int, int]) -> bytes:
    """Return a grey TIFF of these levels with the most significant byte first."""
    height, width = levels.shape
    body = levels.astype(levels.dtype.newbyteorder(">")).tobytes()
    tags = {256: width, 257: height, 259: 1, 262: 1, 277: 1, 278: height, 279: len(body), 273: -1, **tags}
    place = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack(">HHII", t, 4, 1, place if v < 0 else v) for t, v in sorted(tags.items())]
    return b"MM\0*" + struct.pack(">IH", 8, len(tags)) + b"".join(entries) + bytes(4) + body


def signed_16_bit_tiff() -> bytes:
    body = (GREY.astype(np.int16) * 2 - 255).tobytes()
    tags = {**grey_tiff(64, 48), 258: (3, 1, 16), 273: (4, 1, -1), 278: (4, 1, 48), 279: (4, 1, len(body))}
    return tiff({**tags, 339: (3, 1, 2)}, body)


DEEP: dict[str, tuple[Callable[[], bytes], Callable[[], Pixels]]] = {
    "png-8-of-16": (lambda: deep(GREY.astype(np.uint16)), lambda: GREY),
    "png-10-of-16": (lambda: deep(shorts(10)), lambda: GREY),
    "png-12-of-16": (lambda: deep(shorts(12)), lambda: GREY),
    "png-14-of-16": (lambda: deep(shorts(14)), lambda: GREY),
    "png-16": (lambda: deep(shorts(16)), lambda: GREY),
    "png-16-exported": (lambda: deep(GREY.astype(np.uint16) * 257), lambda: GREY),
    "png-9-bits-are-10": (lambda: deep(GREY.astype(np.uint16) * 2), lambda: GREY // 2),
    "tiff-12-of-16": (lambda: deep(shorts(12), "TIFF"), lambda: GREY),
    "tiff-16-lzw": (lambda: deep(shorts(16), "TIFF", compression="tiff_lzw"), lambda: GREY),
    "tiff-16-most-significant-first": (lambda: big_endian_tiff(shorts(12), {258: 16}), lambda: GREY),
    "pgm-16": (lambda: b"P5\n64 48\n65535\n" + shorts(16).astype(">u2").tobytes(), lambda: GREY),
    "tiff-int16": (signed_16_bit_tiff, lambda: stretched(GREY)),
    "tiff-int32": (lambda: deep(GREY.astype(np.int32) * 7_000_000 - 900_000_000, "TIFF"), lambda: stretched(GREY)),
    "tiff-int32-all-bits": (
        lambda: deep(np.where(HOLE, -(2**31), 2**31 - 1).astype(np.int32), "TIFF"),
        lambda: np.where(HOLE, 0, 255).astype(np.uint8),
    ),
    "tiff-float-0-to-1": (lambda: deep(FLOATS / 255, "TIFF"), lambda: GREY),
    "tiff-float-within-0-to-1": (
        lambda: deep(FLOATS / 510 + 0.25, "TIFF"),
        lambda: np.rint((FLOATS / 510 + 0.25) * 255).astype(np.uint8),
    ),
    "tiff-float-0-to-255": (lambda: deep(FLOATS, "TIFF"), lambda: stretched(GREY)),
    "tiff-float-negative": (lambda: deep(FLOATS / 255 - 0.5, "TIFF"), lambda: stretched(FLOATS / 255 - 0.5)),
    "tiff-float-huge": (lambda: deep((FLOATS - 128) * 2.6e36, "TIFF"), lambda: stretched((FLOATS - 128) * 2.6e36)),
    "tiff-float-most-significant-first": (lambda: big_endian_tiff(FLOATS / 255, {258: 32, 339: 3}), lambda: GREY),
    "tiff-float-not-a-number": (lambda: deep(odd_floats(), "TIFF"), odd_levels),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_to_8_bits_by_every_decode(kind: str) -> None:
    data, expected = DEEP[kind][0](), DEEP[kind][1]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *found, grey = all_decodes(data, "#1e90ff")
    np.testing.assert_array_equal(grey, expected)
    for pixels in found:
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, 2))


def deep_rgb_tiff(levels: Deep, channels: int = 3) -> bytes:
    """Return a TIFF of 16 bits a channel, uncompressed; with 4 channels the last is alpha."""
    body = levels.astype("<u2").tobytes()
    height, width, _ = levels.shape
    place = 8 + 2 + 12 * (10 + (channels == 4)) + 4
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, channels, place),
        259: (3, 1, 1),
        262: (3, 1, 2),
        273: (4, 1, place + 8),
        277: (3, 1, channels),
        278: (4, 1, height),
        279: (4, 1, len(body)),
        284: (3, 1, 1),
    } | ({338: (3, 1, 2)} if channels == 4 else {})
    entries = [struct.pack("<HHII", t, *rest) for t, rest in sorted(tags.items())]
    depths = struct.pack("<4H", 16, 16, 16, 16)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + depths + body


@pytest.mark.parametrize("format", ["png", "png-alpha", "tiff", "tiff-alpha"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_colours_are_scaled_by_the_bits_in_use(bits: int, format: str) -> None:
    noise = np.random.default_rng(2).integers(0, 1 << (bits - 8), RGB.shape)
    levels = (RGB.astype(int) << (bits - 8)) | noise
    with_alpha = np.dstack([levels, ALPHA.astype(int) * 257])
    files = {
        "png": lambda: png(levels, 16, 2),
        "png-alpha": lambda: png(with_alpha, 16, 6),
        "tiff": lambda: deep_rgb_tiff(levels),
        "tiff-alpha": lambda: deep_rgb_tiff(with_alpha, 4),
    }
    expected = blended(RGB, ALPHA, "#1e90ff") if format.endswith("alpha") else RGB
    *found, grey = all_decodes(files[format](), "#1e90ff")
    for pixels in found:
        np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(grey, grey_of(expected))


@pytest.mark.parametrize(
    "levels",
    [
        np.full((48, 64), 0, np.uint16),
        np.full((48, 64), 700, np.uint16),
        np.full((48, 64), 65_535, np.uint16),
        np.full((48, 64), -5, np.int32),
        np.full((48, 64), 0.5, np.float32),
        np.full((48, 64), 1e30, np.float32),
        np.full((48, 64), np.nan, np.float32),
        np.full((48, 64), -np.inf, np.float32),
        np.where(HOLE, np.float32(np.inf), np.float32(7)),
    ],
    ids=lambda levels: f"{levels.dtype}-{levels[0, 0]}",
)
def test_a_constant_is_blank(levels: Deep, capfd: pytest.CaptureFixture[str]) -> None:
    data = deep(levels, "PNG" if levels.dtype == np.uint16 else "TIFF")
    for full in (False, True):
        small = thumbnail(decode(data, full, MAX_PIXELS).pixels)
        assert small.min() == small.max()
        assert np.ptp(small) == 0
    assert capfd.readouterr() == ("", "")


def test_pixels_are_scaled_alike_in_all_parts_of_a_large_image() -> None:
    for shape in [(1, 700_000), (700_000, 1), (900, 700)]:
        levels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = decode(deep(levels, "TIFF"), False, MAX_PIXELS).pixels
        np.testing.assert_array_equal(found, stretched(levels))


@pytest.mark.parametrize("images", [{}, {"decode": "full"}, {"hash": "pdq"}, {"hash": "dhash"}], ids=str)
def test_a_deep_picture_has_the_signature_of_its_8_bit_export(images: dict[str, Any]) -> None:
    grey = np.asarray(picture(7, 320, 240).convert("L"))
    low, high = int(grey.min()), int(grey.max())
    grey = ((grey.astype(int) - low) * 255 // (high - low)).astype(np.uint8)  # from 0 to 255, as it is exported
    files = [
        deep(grey),
        deep(grey.astype(np.uint16) << 4),
        deep(grey.astype(np.uint16) * 257),
        deep(grey.astype(np.int32) * 1000 - 90_000, "TIFF"),
        deep(grey.astype(np.float32) / 255, "TIFF"),
        deep(grey.astype(np.float32) - 128, "TIFF"),
    ]
    assert_same_signatures(Signer(Config.parse({"images": images})), files)


MEMORY = """
import sys
from memfilter.images import decode

def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))

with open(sys.argv[1], "rb") as f:
    data = f.read()
before = peak()
decode(data, sys.argv[2] == "True", 178_956_970, colour=64)
print(1024 * (peak() - before) / 4000**2)
"""


def large(kind: str) -> bytes:
    """Return 4000 x 4000 pixels of a kind, of one colour."""
    zeros = np.zeros((4000, 4000), np.uint16)
    if kind == "rgb-12-of-16":
        rows = zlib.compress((b"\0" + bytes(6 * 4000)) * 4000, 1)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4000, 4000, 16, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    if kind == "float":
        return deep(zeros.astype(np.float32), "TIFF", compression="tiff_lzw")
    if kind == "16-bit-key":
        return deep(zeros, transparency=0, compress_level=1)
    image = Image.fromarray(zeros.astype(np.uint8)).convert(kind)
    return encoded(image, "PNG", compress_level=1, **({"transparency": 0} if kind == "P" else {}))


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_no_kind_takes_more_memory_than_opaque_colours(full: bool, tmp_path: Path) -> None:
    taken = {}
    for kind in ("RGB", "RGBA", "LA", "P", "16-bit-key", "rgb-12-of-16", "float"):
        (tmp_path / kind).write_bytes(large(kind))
        command = [sys.executable, "-c", MEMORY, tmp_path / kind, str(full)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        taken[kind] = float(done.stdout)
    assert taken["RGB"] > 10  # bytes a pixel: the image, a copy and its RGB
    assert max(taken.values()) < taken["RGB"] + 0.5, taken


# -- whole runs -------------------------------------------------------------------------------------------------------


def icon(seed: int) -> Image.Image:
    """Return black shapes on a transparent ground, unlike those of any other seed: all of it is in the alpha."""
    random = np.random.default_rng(seed)
    alpha = Image.new("L", (256, 256), 0)
    draw = ImageDraw.Draw(alpha)
    for _ in range(7):
        x, y, width, height = (int(v) for v in random.integers((0, 0, 30, 30), (220, 220, 150, 150)))
        shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
        shape((x, y, x + width, y + height), fill=255)
    image = Image.new("RGBA", alpha.size, (0, 0, 0, 0))
    image.putalpha(alpha)
    return image


def cut_out(seed: int) -> Image.Image:
    """Return an ellipse of a picture, with a soft border, on a transparent ground."""
    mask = Image.new("L", (1024, 1024), 0)
    ImageDraw.Draw(mask).ellipse((120, 40, 904, 984), fill=255)
    found = picture(seed, 256, 256).convert("RGBA")
    found.putalpha(mask.resize(found.size, Image.Resampling.BOX))
    return found


def tar_of(path: Path, files: list[bytes]) -> Path:
    members = [m for i, data in enumerate(files) for m in sample(f"{i:02}", data, words(i))]
    return write_tar(path, members)


def run(shard: Path, out: Path, update: bool = False, **images: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        memfilter.run([str(shard)], out, Config.parse({"images": images}), 1, update=update).table().to_pylist()
    )
    return found


def actions(rows: list[dict[str, Any]]) -> list[str]:
    return [row["action"] for row in rows]


@pytest.mark.parametrize("encoder", [None, "builtin"])
def test_different_icons_that_are_all_in_their_alpha_are_kept(encoder: str | None, tmp_path: Path) -> None:
    files = [encoded(icon(seed), format) for seed in range(12) for format in ("PNG", "WEBP")[seed % 2 :][:1]]
    shard = tar_of(tmp_path / "in" / "0.tar", files)
    assert actions(run(shard, tmp_path / "out", encoder=encoder)) == ["keep"] * 12
    # on black, as they are, they would not be seen
    assert actions(run(shard, tmp_path / "black", encoder=encoder, ground="black")) == ["keep"] * 12


@pytest.mark.parametrize("encoder", [None, "builtin"])
@pytest.mark.parametrize("ground", ["white", "#204060"])
def test_a_cut_out_and_the_same_on_the_ground_are_joined(ground: str, encoder: str | None, tmp_path: Path) -> None:
    shapes = [cut_out(seed) for seed in range(4)]
    flat = [Image.alpha_composite(Image.new("RGBA", shape.size, ground), shape).convert("RGB") for shape in shapes]
    files = [data for pair in zip(shapes, flat, strict=True) for data in (encoded(pair[0], "PNG"), encoded(pair[1]))]
    shard = tar_of(tmp_path / "in" / "0.tar", files)
    groups = [row["image_group"] for row in run(shard, tmp_path / "out", encoder=encoder, ground=ground)]
    assert groups[::2] == groups[1::2]
    if encoder is None:
        assert len({*groups}) == 4
        other = run(shard, tmp_path / "other", encoder=None, ground="black" if ground == "white" else "white")
        assert actions(other) == ["keep"] * 8


def test_another_ground_signs_again_and_is_refused_without_the_pixels(tmp_path: Path) -> None:
    shard = tar_of(tmp_path / "in" / "0.tar", [encoded(icon(seed), "PNG") for seed in range(3)])
    assert actions(run(shard, tmp_path / "out", encoder=None)) == ["keep"] * 3
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"images": {"ground": "black"}}))
    with pytest.raises(ConfigError, match=r"keys of 'input', images.hash, decode, ground and encoder, .* need"):
        memfilter.rethreshold(tmp_path / "out", path, 1)
    path.write_text(yaml.safe_dump({"images": {"ground": "#FFF"}}))
    assert memfilter.rethreshold(tmp_path / "out", path, 1).counts["keep"] == 3
    (signatures,) = (tmp_path / "out").glob("**/signatures/*.parquet")
    before = pq.read_table(signatures, columns=["picture"]).column(0).to_pylist()
    assert actions(run(shard, tmp_path / "out", True, encoder=None, ground="#808080")) == ["keep"] * 3
    after = pq.read_table(signatures, columns=["picture"]).column(0).to_pylist()
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_an_online_filter_composes_alike() -> None:
    shape = cut_out(1)
    flat = Image.alpha_composite(Image.new("RGBA", shape.size, "white"), shape).convert("RGB")
    files = [encoded(shape, "PNG"), encoded(flat), *(encoded(icon(seed), "PNG") for seed in range(3))]
    samples = [{"__key__": str(i), "__url__": "0.tar", "png": data, "txt": b"a"} for i, data in enumerate(files)]
    found = list(OnlineFilter(Config.parse({"captions": {"tiers": ["exact"]}}))(samples))
    assert [s["reasons"] for s in found][:2] == [[], ["hash_duplicate", "caption_duplicate"]]
    assert [s["image_count"] for s in found] == [1, 2, 1, 1, 1]
    state = OnlineFilter(Config.parse({"images": {"ground": "black"}}), capacity=10).state_dict()
    with pytest.raises(ConfigError, match=r"saved with images\.ground = \"#000000\", and here it is \"#ffffff\""):
        OnlineFilter(capacity=10).load_state_dict(state)
