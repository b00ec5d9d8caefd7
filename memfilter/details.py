"""What a picture shows, at 128 x 128 in colour: its content without a border of one colour, kept in at most 4 kB.

Borders and grounds of one colour are cut off, so that a copy in a frame, and a drawing with a wider margin, show what
the original shows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

SIDE = 128
"""Side in pixels of the square that a picture is brought to, whatever the ratio of its own sides."""

MOST_BYTES = 4080
"""Bytes that a stored picture may take."""

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

WHOLE: Box = (0, SIDE, 0, SIDE)

_ALIKE = 16  # levels by which pixels of one colour may differ, after lossy compression
_LEAST = 16  # pixels of 128 on a side that are left, however small the content
_MIXED = 2  # lines beside a frame that have something of its colour
_NARROW = 16  # lines of a frame from which these are left out
_AT_ONCE = 8  # lines that are looked at together
_FRAMES = 3  # frames within each other that are cut off: a black one, say, and a white margin inside
_QUALITIES = (85, 70, 50, 30, 15, 5)


def resized(pixels: Pixels, side: int, box: Box | None = None) -> Pixels:
    """Return grey (H, W) or RGB (H, W, 3) pixels as a square of this side, filtered; of a box in 128ths if given."""
    # Pillow's fromarray and __array_interface__ take as long as the filter
    height, width = pixels.shape[:2]
    mode = "L" if pixels.ndim == 2 else "RGB"
    image = Image.frombuffer(mode, (width, height), np.ascontiguousarray(pixels), "raw", mode, 0, 1)
    part = None
    if box:
        top, bottom, left, right = box
        part = (left * width / SIDE, top * height / SIDE, right * width / SIDE, bottom * height / SIDE)
    small = image.resize((side, side), Image.Resampling.BICUBIC, part, 2.0)
    return np.frombuffer(small.tobytes(), np.uint8).reshape(side, side, *pixels.shape[2:])


def content(picture: Pixels) -> Box | None:
    """Return where the content of a picture (128, 128, 3) is: top, bottom, left and right; None if it is one colour.

    A border is lines of one colour, up to 16 levels, from the outside in, on one side or on opposite ones.  Where there
    was one on all four sides, another is looked for inside it.  Bands with nothing inside are no border but a flag.
    """
    if is_one_colour(picture):
        return None
    box, inner = WHOLE, WHOLE
    for _ in range(_FRAMES):
        border = _border(picture[inner[0] : inner[1], inner[2] : inner[3]])
        cut = inner[0] + border[0], inner[1] - border[1], inner[2] + border[2], inner[3] - border[3]
        if not any(border):
            break
        # the next lines are mixed of the border's colour and of what comes behind it
        within = cut[0] + _MIXED, cut[1] - _MIXED, cut[2] + _MIXED, cut[3] - _MIXED
        left = picture[within[0] : within[1], within[2] : within[3]]
        if not left.size or is_one_colour(left):
            break
        # a margin may be wide, and what stands in it small
        box, inner = within if 0 < min(border) <= max(border) <= _NARROW else cut, within
        if not all(border):
            break
    return _widened(box)


def _border(picture: Pixels) -> Box:
    """Return how many lines of one colour there are above, below, left and right."""
    above, below = _opposite(picture)
    return above, below, *_opposite(picture[above : len(picture) - below].swapaxes(0, 1))


def _opposite(picture: Pixels) -> tuple[int, int]:
    """Return how many lines of one colour there are above, and how many of the same below; none where all are."""
    above, below = _lines(picture), _lines(picture[::-1])
    if not (above or below):  # as of most photos, and their colours take time
        return 0, 0
    same = np.abs(_colour(picture[0]) - _colour(picture[-1])).max() <= 2 * _ALIKE
    return (above, below) if above + below < len(picture) and (same or not (above and below)) else (0, 0)


def _lines(picture: Pixels) -> int:
    """Return how many lines from the first one on have the first one's colour."""
    if np.ptp(picture[0], 0).max() > 2 * _ALIKE:  # as of most photos
        return 0
    colour = _colour(picture[0])
    for start in range(0, len(picture), _AT_ONCE):  # most borders are narrow
        same = np.abs(picture[start : start + _AT_ONCE] - colour).max((1, 2)) <= _ALIKE
        if not same.all():
            return start + int(same.argmin())
    return len(picture)


def _colour(pixels: Pixels) -> npt.NDArray[np.int16]:
    """Return the median colour of pixels (N, 3)."""
    middle: npt.NDArray[np.int16] = np.sort(pixels.astype(np.int16), axis=0)[len(pixels) // 2]
    return middle


def is_one_colour(picture: Pixels) -> bool:
    """Tell whether no two pixels of a picture (H, W, 3) differ by more than 32 levels in a channel."""
    some = picture[::16, ::16]  # tell of most pictures, in little time
    return all(bool(np.ptp(of.reshape(-1, 3), 0).max() <= 2 * _ALIKE) for of in (some, picture))


def _widened(box: Box) -> Box:
    """Return the box with at least 16 pixels on each side."""
    found: list[int] = []
    for first, end in (box[:2], box[2:]):
        missing = max(_LEAST - (end - first), 0)
        start = min(max(first - missing // 2, 0), SIDE - _LEAST) if missing else first
        found += [start, start + _LEAST if missing else end]
    return found[0], found[1], found[2], found[3]


def packed(picture: Pixels) -> bytes:
    """Return a picture (H, W, 3) as a JPEG of at most 4,080 bytes, of the best quality that fits; noise, smaller."""
    for quality in _QUALITIES:
        data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality, "RGB", "420")
        if len(data) <= MOST_BYTES:
            return data
    return packed(resized(picture, len(picture) // 2))


def unpacked(data: bytes) -> Pixels:
    """Return the picture (H, W, 3) that `packed` stored; raises ValueError for anything else."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if not 0 < height <= SIDE or not 0 < width <= SIDE:
        raise ValueError(f"a picture of {width} x {height} pixels, not of {SIDE} x {SIDE}")
    picture: Pixels = simplejpeg.decode_jpeg(data)
    return picture
