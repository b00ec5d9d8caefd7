"""Decode an image once, at the size that its comparison needs."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from .details import Box, resized
from .records import LOOK_SIDE, THUMBNAIL_SIDE

_MAX_SCANS = 100  # a progressive JPEG has about ten
_SLOW_PIXELS = 1 << 24  # a second or two of a decoder that Pillow has in Python

HASH_SIDE = 40
"""Pixels on the shorter side that a perceptual hash needs: its grid of 32, and room to filter."""

PDQ_SIDE = 256
"""Pixels on the shorter side that PDQ is given: its filters take their width from the size, and so its bits do.

On 90 photos these pixels move its hash by 8 bits of 256 in the median and 20 at most against the full decode, about
what its own reduction to 512 pixels moves (20 at most); 128 pixels move up to 38, and 512 take twice the time.
"""

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jfif")
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP")


class BadImage(Exception):
    """An image that cannot be used: a code of `records.BAD_CODES` and the cause in words."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail


@dataclass(frozen=True)
class Decoded:
    """An image's own size in pixels, upright, and its pixels.

    `pixels` is uint8: grey (H, W) of a fast decode, or RGB (H, W, 3) at full size.  `colour` is uint8 RGB (H, W, 3),
    None where it was not asked for.
    """

    width: int
    height: int
    pixels: npt.NDArray[np.uint8]
    colour: npt.NDArray[np.uint8] | None = None


def decode(
    data: bytes, full: bool, max_pixels: int, side: int = HASH_SIDE, colour: int = 0, ground: str | None = "white"
) -> Decoded:
    """Return the image decoded to its end and turned upright; the header is checked before any pixel is decoded.

    A fast decode has at least `side` pixels on the shorter side, or the image's own; with `colour`, a number of pixels,
    there are RGB pixels too, of at least so many.  With `full`, the pixels are those that imagededup itself would hash,
    but for the turn, and for images that are transparent or have more than 8 bits a channel.

    Transparency is composed on `ground`, a colour that Pillow knows, at full size, and deep pixels are scaled to 8
    bits.  Without a ground both are as in Pillow's `convert("RGB")`: the alpha channel is dropped, and what is above
    255 is white.  Raises BadImage.
    """
    if not data:
        raise BadImage("empty_image", "the image member has 0 bytes")
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    if is_jpeg and not _is_one_scan(data) and _scans(data) > _MAX_SCANS:
        raise BadImage("unreadable_image", f"the JPEG has more than {_MAX_SCANS} scans, each over all its pixels")
    if is_jpeg and not full:
        try:
            return _decode_jpeg(data, max_pixels, side, colour)
        except ValueError:  # Pillow is asked before an image is called unreadable
            pass
    return _decode_with_pillow(data, full, max_pixels, side, colour, ground)


def cropped(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return the middle of an image at this size, uint8 RGB (height, width, 3): scaled to cover it and then cut.

    As diffusers' training scripts prepare an image: bilinear, the ratio of its sides kept.
    """
    image = Image.fromarray(pixels).convert("RGB")
    scale = max(height / image.height, width / image.width)
    size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    scaled = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height)))


def _decode_jpeg(data: bytes, max_pixels: int, side: int, colour: int) -> Decoded:
    """Return a JPEG's pixels from the smallest scaled decode that is large enough; raises ValueError."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "Gray", "RGB"):
        raise ValueError(f"{colours} has no fast path to grey")
    _check_size(width, height, max_pixels)
    side = max(side, colour)
    space = "RGB" if colour else "GRAY"
    found = simplejpeg.decode_jpeg(data, space, fastdct=True, fastupsample=True, min_height=side, min_width=side)
    if not colour:
        return _upright(width, height, found[:, :, 0], _jpeg_orientation(data), None)
    size = found.shape[1::-1]
    grey = Image.frombuffer("RGB", size, found, "raw", "RGB", 0, 1).convert("L")
    pixels = np.frombuffer(grey.tobytes(), np.uint8).reshape(found.shape[:2])
    return _upright(width, height, pixels, _jpeg_orientation(data), found)


def _jpeg_orientation(data: bytes) -> object:
    """Return the orientation in a JPEG's EXIF segment, None where there is none."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] in _BEFORE_PIXELS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(partial(_exif, data[at + 4 : end]))
        at = end
    return None


def _exif(segment: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(segment)
    return exif


_BEFORE_PIXELS = [bytes([marker]) for marker in (*range(0xE0, 0xF0), 0xFE)]  # APPn and comments


def _orientation(read: Callable[[], Image.Exif]) -> object:
    """Return the orientation, None for metadata that cannot be read: they are no defect of the pixels."""
    try:
        with _quiet_pillow():
            return read().get(0x0112)
    except Exception:  # Pillow's parser raises what it likes on damaged bytes
        return None


def _decode_with_pillow(
    data: bytes, full: bool, max_pixels: int, side: int, colour: int, ground: str | None
) -> Decoded:
    image, width, height = _load(data, max_pixels, None if full else ("L", side))
    orientation = _orientation(image.getexif)  # only now: loading a TIFF turns it
    is_drafted = image.format == "JPEG" and not full
    try:
        if ground is not None:
            image = _in_8_bits(image, data, max_pixels)
            image = _composed(image, data, ground)
        if full:
            pixels = np.asarray(_plain(image, "RGB"))
            return _upright(width, height, pixels, orientation, pixels if colour else None)
        rgb = None
        if colour:
            rgb = np.asarray(_plain(_load(data, max_pixels, ("RGB", colour))[0] if is_drafted else image, "RGB"))
        return _upright(width, height, np.asarray(_plain(image, "L")), orientation, rgb)
    except ValueError as e:  # some modes that Pillow opens it does not convert
        raise BadImage("unreadable_image", f"{type(e).__name__}: {e}"[:200]) from e


def _load(
    data: bytes, max_pixels: int, draft: tuple[str, int] | None, lower: bool = False
) -> tuple[Image.Image, int, int]:
    """Return the decoded image, scaled down as far as `draft`, a mode and a side, allows, and its own size.

    Of colours of 16 bits it has the upper bytes, as Pillow gives them, or with `lower` the lower ones.
    """
    try:
        with _quiet_pillow():
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = image.size
            _check_work(image, max_pixels)
            if draft:
                image.draft(draft[0], (draft[1], draft[1]))
            if lower and isinstance(image, ImageFile.ImageFile):
                image.tile = [ImageFile._Tile(*tile[:3], _other_byte(tile[3])) for tile in image.tile]
            with _quiet_libtiff() if image.format == "TIFF" else nullcontext():
                image.load()
    except (BadImage, MemoryError):  # that memory is short is no defect of the image
        raise
    except Image.DecompressionBombError as e:
        raise BadImage("too_many_pixels", str(e)) from e
    except UnidentifiedImageError as e:  # its own words hold an address in memory
        raise BadImage("unreadable_image", "the bytes are of no image format that is read") from e
    except Exception as e:  # Pillow's decoders raise what they like on damaged bytes
        raise BadImage("unreadable_image", f"{type(e).__name__}: {e}"[:200]) from e
    return image, width, height


def _composed(image: Image.Image, data: bytes, ground: str) -> Image.Image:
    """Return the image on the ground, blended to the nearest level; one without transparency as it is.

    What would not be seen on it, as white drawings on white, lies on black or on white, whichever is further away.
    """
    if not image.has_transparency_data:
        return image
    key = image.info.get("transparency")
    if isinstance(key, int) and image.format == "PNG" and image.mode != "P":  # Pillow spread the levels, not the key
        image.info["transparency"] = min(key * _SPREAD.get(data[24], 1), 255)
    elif isinstance(key, bytes):  # more than a palette holds
        image.info["transparency"] = key[:256]
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, ground)
    canvas.paste(image, mask=image)
    if _spreads(canvas).max() <= _UNSEEN < _spreads(image)[-1]:
        is_light = canvas.convert("L").getextrema()[0] >= 128  # type: ignore[operator]
        canvas = Image.new("RGB", image.size, "black" if is_light else "white")
        canvas.paste(image, mask=image)
    return canvas


_UNSEEN = 16  # levels by which pixels differ that count as one colour


def _spreads(image: Image.Image) -> npt.NDArray[np.int64]:
    """Return the largest difference of two pixels' levels in each of several channels."""
    found: npt.NDArray[np.int64] = np.ptp(np.array(image.getextrema(), np.int64), 1)
    return found


_SPREAD = {1: 255, 2: 85, 4: 17}
"""By the bits a channel of a PNG, its 25th byte: the distance of two grey levels in 8 bits."""


def _in_8_bits(image: Image.Image, data: bytes, max_pixels: int) -> Image.Image:
    """Return the image with 8 bits a channel, and with an alpha channel where one of its deep colours is transparent.

    Of 16 bits unsigned, the smallest of 8, 10, 12, 14 and 16 that holds the maximum are in use, and the upper 8 of
    these are kept.  Floats are scaled from 0 to 1 if all are within, other floats and integers from their minimum to
    their maximum; where these are equal, all become 0.  NaN becomes the minimum, infinity the nearer end.
    """
    is_grey = image.mode[0] in "IF"
    if not is_grey and not _has_deep_colours(image, data):
        return image
    lower = None if is_grey else _load(data, max_pixels, None, lower=True)[0]
    boxes = list(_boxes(*image.size))
    levels = _levels(_deep_pixels(image, lower, box) for box in boxes)
    key = image.info.get("transparency")
    is_transparent = key is not None or image.mode == "RGBA"
    found = Image.new(("L" if is_grey else "RGB") + "A" * is_transparent, image.size)
    for box in boxes:
        pixels = _deep_pixels(image, lower, box)
        tile = Image.fromarray(levels(pixels))
        if key is not None:
            shown = pixels != np.array(key)
            tile.putalpha(Image.fromarray(shown if is_grey else shown.any(2)))
        elif is_transparent:
            tile.putalpha(image.crop(box).getchannel("A"))
        found.paste(tile, box)
    return found


_Box = tuple[int, int, int, int]
_TILE = 1 << 18  # pixels: as floats they take 2 MiB


def _boxes(width: int, height: int) -> Iterator[_Box]:
    """Yield boxes of a bounded number of pixels that cover an image."""
    across = min(width, _TILE)
    down = _TILE // across
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _has_deep_colours(image: Image.Image, data: bytes) -> bool:
    """Whether the pixels are colours of 16 bits, and the upper bytes, which Pillow gives, are not enough."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    tags: Any = getattr(image, "tag_v2", {})
    if (data[24] if image.format == "PNG" else tags.get(258, (8,))[0]) != 16:
        return False
    extrema: Any = image.getextrema()
    return "transparency" in image.info or max(high for _, high in extrema[:3]) < 64


def _other_byte(args: Any) -> Any:
    """Return the arguments of a decoder for the other byte of each 16 bits; it has none for grey with alpha."""
    raw, *more = (args,) if isinstance(args, str) else args
    if raw.startswith(("RGB;16", "RGBA;16", "RGBX;16")):
        native = "L" if sys.byteorder == "little" else "B"
        raw = raw[:-1] + ("B" if raw[-1].replace("N", native) == "L" else "L")
    return raw if isinstance(args, str) else (raw, *more)


def _deep_pixels(image: Image.Image, lower: Image.Image | None, box: _Box) -> npt.NDArray[Any]:
    """Return the pixels in a box: uint16, float32 or int32 grey (H, W), or with their lower bytes uint16 (H, W, 3)."""
    pixels: npt.NDArray[Any] = np.asarray(image.crop(box))
    if lower is not None:
        both = np.stack([np.asarray(lower.crop(box)), pixels], 3)
        return both.view("<u2")[:, :, :3, 0]
    return pixels.astype(np.uint16) if image.mode == "I" and image.format == "PPM" else pixels


def _levels(tiles: Iterable[npt.NDArray[Any]]) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]]:
    """Return the function that brings an image's pixels to 8 bits; these tiles, the whole image, give its range."""
    low, high, kind = np.inf, -np.inf, ""
    for pixels in tiles:
        finite, kind = pixels[np.isfinite(pixels)], pixels.dtype.kind
        if finite.size:
            low, high = min(low, finite.min().item()), max(high, finite.max().item())
    if kind == "u":
        shift = next(bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits) - 8
        return lambda pixels: (pixels >> shift).astype(np.uint8)
    if (kind == "f" and low >= 0 and high <= 1) or low > high:
        low, high = 0.0, 1.0
    span = (high - low) or 1.0

    def scaled(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        numbers: npt.NDArray[Any] = np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
        return np.rint((numbers.astype(np.float64) - low) * 255 / span).astype(np.uint8)

    return scaled


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode without transparency."""
    if image.mode not in ("RGB", mode):
        image = image.convert("RGBA").convert("RGB")
    return image.convert(mode)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    logger = logging.getLogger("PIL.TiffImagePlugin")
    before, logger.disabled = logger.disabled, True  # what it tells of a damaged image it raises as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ours is the limit on pixels; odd metadata is no defect of the image
            yield
    finally:
        logger.disabled = before


@contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """Keep from the process's standard error what libtiff writes there of a damaged image."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _upright(
    width: int,
    height: int,
    pixels: npt.NDArray[np.uint8],
    orientation: object,
    colour: npt.NDArray[np.uint8] | None,
) -> Decoded:
    turn = _TURNS.get(orientation)
    if turn is None:
        return Decoded(width, height, pixels, colour)
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    if colour is not None:
        colour = np.asarray(Image.fromarray(colour).transpose(turn))
    return Decoded(width, height, pixels, colour)


_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _check_work(image: Image.Image, max_pixels: int) -> None:
    """Raise BadImage where decoding would take more than `max_pixels` allows, by the header alone."""
    _check_size(*image.size, max_pixels)
    if image.format == "TIFF":  # libtiff decodes whole tiles, however small the image
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        _check_size(tags.get(322, 0), tags.get(323, 0), max_pixels)
    codec = image.tile[0][0] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    if codec in Image.DECODERS and image.width * image.height > _SLOW_PIXELS:
        slow = f"{image.width}x{image.height} is over the {_SLOW_PIXELS:,} that are decoded of {codec}, in Python"
        raise BadImage("too_many_pixels", slow)


def _is_one_scan(jpeg: bytes) -> bool:
    """Tell whether a JPEG is sequential with all its components in one scan, as nearly all are: no other is decoded."""
    at, components = 2, 0
    while jpeg[at : at + 1] == b"\xff" and at + 9 < len(jpeg):
        marker = jpeg[at + 1]
        if marker in (0xC0, 0xC1):
            components = jpeg[at + 9]
        elif marker == 0xDA:
            return jpeg[at + 4] == components
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _scans(jpeg: bytes) -> int:
    """Return the number of scans in a JPEG, those of its thumbnail and of what follows it left out."""
    at, scans = 2, 0
    while (marker := _MARKER.search(jpeg, at)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height} is over input.max_pixels = {max_pixels:,}")


def thumbnail(
    pixels: npt.NDArray[np.uint8], side: int = THUMBNAIL_SIDE, box: Box | None = None
) -> npt.NDArray[np.uint8]:
    """Return grey or RGB pixels as grey (side, side), filtered; of a box in 128ths if given."""
    small = resized(pixels, side, box)
    return small if small.ndim == 2 else np.asarray(Image.fromarray(small).convert("L"))


@dataclass(frozen=True)
class Frame:
    """How an RGB image is brought to the square that a network takes: one resize, then its middle.

    Both edges are resized to `edge` pixels ("squash"), or the shorter or the longer one with the other in proportion.
    What is larger than the square is cut, what is smaller gets a border of the colour `fill`.
    """

    edge: int
    mode: Literal["squash", "shortest", "longest"] = "squash"
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)


_MAX_ELONGATION = 8  # of an image of which the middle alone is wanted


def framed(pixels: npt.NDArray[np.uint8], side: int, frame: Frame) -> npt.NDArray[np.uint8]:
    """Return RGB pixels as RGB (side, side, 3)."""
    image = Image.fromarray(pixels)
    if frame.mode == "shortest" and max(image.size) > _MAX_ELONGATION * min(image.size):
        reach = _MAX_ELONGATION * min(image.size)  # resized whole, a line of pixels could take all memory
        image = _middle(image, min(image.width, reach), min(image.height, reach), frame.fill)
    width, height = image.size
    if frame.mode == "squash":
        size = (frame.edge, frame.edge)
    elif frame.mode == "shortest":
        shorter = min(width, height)
        size = (int(frame.edge * width / shorter), int(frame.edge * height / shorter))
    else:
        ratio = max(width, height) / frame.edge
        size = (max(round(width / ratio), 1), max(round(height / ratio), 1))
    image = image.resize(size, Image.Resampling[frame.filter.upper()])
    return np.asarray(_middle(image, side, side, frame.fill))


def _middle(image: Image.Image, width: int, height: int, fill: tuple[int, int, int]) -> Image.Image:
    if image.size == (width, height):
        return image
    spare = (width - image.width, height - image.height)
    left, top = (pad // 2 if pad > 0 else -round(-pad / 2) for pad in spare)
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, (left, top))
    return canvas


def are_plain(small: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether each of (N, H, W) grey thumbnails has hardly any structure: less than two bits of entropy in 32 levels.

    Drawings and lettering on one ground are plain, and about one photo in 200.
    """
    if not len(small):
        return np.empty(0, bool)
    plain: npt.NDArray[np.bool_] = _entropy(small) < 2
    return plain


def look(small: npt.NDArray[np.uint8], colour: npt.NDArray[np.uint8]) -> bytes:
    """Return the mean grey levels of 8 x 8 cells of a thumbnail, row by row, and the mean colour of an RGB picture.

    The colour is JPEG's blue and red difference.
    """
    cell = len(small) // LOOK_SIDE
    means = small.reshape(LOOK_SIDE, cell, LOOK_SIDE, cell).mean((1, 3)).ravel()
    red, green, blue = colour.reshape(-1, 3).mean(0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    differences = [128 + 0.564 * (blue - luma), 128 + 0.713 * (red - luma)]
    return bytes(np.clip(np.rint([*means, *differences]), 0, 255).astype(np.uint8))


def _entropy(small: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the entropy in bits of each thumbnail's histogram of 32 levels."""
    flat = small.reshape(len(small), -1)
    levels = (flat >> 3) + 32 * np.arange(len(flat))[:, None]
    counts = np.bincount(levels.ravel(), minlength=32 * len(flat)).reshape(-1, 32)
    share = counts / flat.shape[1]
    entropy: npt.NDArray[np.float64] = -(share * np.log2(np.where(share > 0, share, 1))).sum(1)
    return entropy
