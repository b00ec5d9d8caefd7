"""Pairs of pictures -> a score from 0 to 1 that says whether one is a copy of the other: what decides every edge.

A hash, an embedding or an equal look finds candidates.  On photos that is nearly enough; on drawings, icons, pages of
text and screenshots it is not, since these lie on each other and differ in a detail or in a colour.  So the two
pictures are laid on each other as `alignment` found them to lie, moved to where they fit best, and compared at
128 x 128 in colour: how far levels, fine structure and colours agree, as a whole and in 8 x 8 cells.  Boosted trees
take these features to the score.  They were trained on copies and on unlike pairs of photos and of graphics, so that a
recoloured photo is a copy and a recoloured icon is not, and are monotone where more difference must never mean more
alike.  `benchmarks/train_comparison.py` trains them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from .alignment import (
    _FLOOR,
    _ROBUST,
    Alignment,
    _compiled,
    _correlation,
    _fine,
    _lay,
    _means,
    _mirrored,
    _refine,
    _resized,
    _sums,
    _surprise,
    _warp,
    _warp_planes,
    align,
)
from .axes import lay_by_axes
from .compiled import kernel
from .records import THUMBNAIL_SIDE, Floats, Indices

TREES = Path(__file__).with_name("comparison.safetensors")

THRESHOLD = 0.5
"""Score from which on two pictures are copies, where the configuration names none."""

FEATURES = (
    "evidence",  # of the alignment of the thumbnails
    "mirrored",  # 1 where one is laid on the other's mirror image
    "inside",  # share of the smaller picture that lies on the larger one
    "area",  # share of the larger picture that it covers
    "correlation",  # of the levels, of their fine structure and of that between 3 and 13 pixels
    "fine",
    "middle",
    "log_gain",  # absolute, of the line that takes the one's levels to the other's
    "brighter",  # difference of the mean levels
    "colour_less",  # deviation of the colours, from grey and from their mean
    "colour_more",
    "colour_correlation",
    "colour_shift",  # distance between the mean colours
    "flat_less",  # share of pixels with hardly any slope
    "flat_more",
    "difference",  # mean difference of levels, and after the line was laid through them
    "fitted",
    "unexplained",  # mean difference of levels beyond what a shift by one pixel explains
    "share_unexplained",  # share of pixels with 24 levels of it, and after the line
    "share_unfitted",
    "share_recoloured",  # share of pixels whose colours are 20 levels apart
    "cell_level",  # the largest difference of a cell: of mean levels, of mean colours, and unexplained, before and
    "cell_colour",  # after the line
    "cell_unexplained",
    "cell_unfitted",
    "disagreement",  # 1 - correlation of fine structure in cells, weighted by the weaker one's deviation
    "share_disagreeing",  # weighted share of cells where it is over one half
    "strong",  # number of cells in which both have fine structure of 6 levels
    "bad",  # how many of these correlate by less than 0.6, their share, and the least correlation
    "share_bad",
    "worst",
    "worst_both",  # the largest 1 - correlation times the weaker, and times the stronger deviation
    "worst_either",
    "one_sided",  # difference of the deviations in cells, to their larger ones
    "textured",  # number of cells with fine structure of 3 levels in either
    "median",  # quantiles of their correlations
    "quarter",
    "tenth",
    "deviation_less",  # of levels, and of fine structure
    "deviation_more",
    "fine_less",
    "fine_more",
    "grain",  # as fine, disagreement, worst, tenth and worst_both, of fine structure without that of lines and columns:
    "grain_disagreement",  # two tables have their rules in common, two pages their lines
    "grain_worst",
    "grain_tenth",
    "grain_worst_both",
    "flat_recoloured",  # share of the pixels with hardly any slope in either whose colours are 20 levels apart
    "colour_unexplained",  # mean distance of colours beyond what a shift by one pixel explains, and the largest of a
    "cell_colour_unexplained",  # cell
    "ground_less",  # share of the pixels of one level, the most frequent one: drawings have a ground, photos hardly
    "ground_more",
)

_OF_EACH = tuple((i, i + 1) for i, name in enumerate(FEATURES) if name.endswith("_less"))

_SIDE = 128
_CELLS = 8
_HALF, _STEPS, _LAST_STEPS = 64, 4, 2  # side and steps at which the map is refined
_LEAST_SQUARES = 20.0  # width of trust that leaves no pixel out
_OVERLAP = 0.6  # share of the smaller picture on the larger one under which none is a copy: two flags share a stripe
_LEAST_DEVIATION = 2.0  # levels of luma or colour under which a picture shows nothing at this size
_FULL_STEPS, _CLOSE = 3, 0.05  # steps at full size, and the change of the map that they may make
_NEAR = 0.02  # of the side, by which the search may be off
_FAR = 0.25  # change of the map beyond which it is not trusted
_WELL = 2.3  # what correlation of fine structure says, at which nothing else is tried
_SYMMETRIC = 0.1  # of this
_FEWEST = 200  # pixels on each other, under which there is nothing to compare

SHAPE = (3, _SIDE, _SIDE)
"""Planes, height and width of a picture that is compared."""

Planes = npt.NDArray[np.float32]


@cache
def identity() -> str:
    """What shapes a score: the trees, and how pictures are brought to them."""
    return f"comparison-5/{xxhash.xxh3_128_hexdigest(TREES.read_bytes())}"


def planes(colour: npt.NDArray[np.uint8], found: Planes | None = None) -> Planes:
    """Return RGB (H, W, 3) as (3, 128, 128): luma, and the blue and red differences of JPEG without their offset.

    They are put into `found` if it is given.
    """
    from PIL import Image

    if colour.shape[:2] != (_SIDE, _SIDE):
        colour = np.asarray(Image.fromarray(colour).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    found = np.empty(SHAPE, np.float32) if found is None else found
    _split(np.ascontiguousarray(colour), found)
    return found


def thumbnails(pictures: Planes) -> npt.NDArray[np.uint8]:
    """Return the grey thumbnails (N, 32, 32) of pictures (N, 3, 128, 128) that are aligned first."""
    small = np.empty((len(pictures), THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)
    _shrink(pictures, small)
    return small


@kernel
def _split(colour: npt.NDArray[np.uint8], found: Planes) -> None:
    for i in range(_SIDE):
        luma, blue, red = found[0, i], found[1, i], found[2, i]
        for j in range(_SIDE):
            r, g, b = np.float32(colour[i, j, 0]), np.float32(colour[i, j, 1]), np.float32(colour[i, j, 2])
            luma[j] = np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b
            blue[j], red[j] = np.float32(0.564) * (b - luma[j]), np.float32(0.713) * (r - luma[j])


@kernel
def _shrink(pictures: Planes, small: npt.NDArray[np.uint8]) -> None:
    """Fill in means over squares of the luma, to the nearest level."""
    side = _SIDE // THUMBNAIL_SIDE
    for k in range(len(small)):
        luma = pictures[k, 0]
        for i in range(THUMBNAIL_SIDE):
            for j in range(THUMBNAIL_SIDE):
                total = np.float32(0)  # grey pictures have means between two levels: the order of the sum decides
                for y in range(side * i, side * (i + 1)):
                    line = np.float32(0)
                    for x in range(side * j, side * (j + 1)):
                        line += luma[y, x]
                    total += line
                small[k, i, j] = min(max(np.rint(total / np.float32(side * side)), 0), 255)


def features(pictures: Planes, a: Indices, b: Indices, alignment: Alignment) -> Floats:
    """Return the features (pairs, len(FEATURES)) of these pairs (a, b) of pictures (N, 3, 128, 128), in that order."""
    found = np.zeros((len(a), len(FEATURES)), np.float32)
    found[:, 0], found[:, 1] = alignment.evidence, alignment.mirrored
    if len(a):
        _compare_all(pictures, a, b, alignment.affine, alignment.mirrored, alignment.turned, found)
    return found


def compared(pictures: Planes) -> Floats:
    """Return the score of each two pictures (2 N, 3, 128, 128) in a row."""
    a, b = np.arange(0, len(pictures), 2), np.arange(1, len(pictures), 2)
    return scores(features(pictures, a, b, align(thumbnails(pictures), a, b)))


def scores(found: Floats) -> Floats:
    """Return the score from 0 to 1 of each row of features.

    It is 0 where the pictures have too little in common, or show too little to be compared.
    """
    trees = _trees()
    score = np.empty(len(found), np.float32)
    _climb(found, trees["feature"], trees["limit"], trees["left"], trees["right"], trees["roots"], score)
    apart = found[:, FEATURES.index("inside")] < _OVERLAP
    varies = found[:, [FEATURES.index("deviation_more"), FEATURES.index("colour_more")]].max(1) >= _LEAST_DEVIATION
    return np.where(apart | ~varies, np.float32(0), score)


@cache
def _trees() -> dict[str, npt.NDArray[Any]]:
    from safetensors.numpy import load_file

    return load_file(TREES)


@_compiled
def _climb(found, feature, limit, left, right, roots, score):  # type: ignore[no-untyped-def]
    """Sum up the leaves that each row comes to; a leaf has feature -1 and its value as limit."""
    for i in range(len(found)):
        total = 0.0
        for root in roots:
            node = root
            while feature[node] >= 0:
                node = left[node] if found[i, feature[node]] <= limit[node] else right[node]
            total += limit[node]
        score[i] = 1 / (1 + np.exp(-total))


@_compiled
def _compare_all(pictures, a, b, maps, mirrored, turned, found):  # type: ignore[no-untyped-def]
    room, another = np.empty((2, _PLANES * _SIDE * _SIDE), np.float32), np.empty(6)
    for i in range(len(a)):
        one, other, affine = pictures[a[i]], pictures[b[i]], maps[i].copy()
        upright = other
        if mirrored[i]:
            other = np.empty_like(upright)
            for plane in range(3):
                other[plane] = _mirrored(upright[plane])
        needle, hay = (one, other) if turned[i] else (other, one)
        fit = _laid(needle[0], hay[0], affine)
        # a symmetric drawing lies on its copy in the mirror too, and a soft edge can lead the search astray
        is_well = fit >= _WELL and not mirrored[i]
        for by_axes in (False, True):
            if is_well or (not by_axes and not mirrored[i] and _is_as_it_is(maps[i])):
                continue
            is_hay = by_axes and _lay_by_axes(upright[0], one[0], another)
            if not by_axes:
                _lay(another, 0.0, 0.0, 0.0)
            first, second = (one, upright) if is_hay else (upright, one)
            anew = _laid(first[0], second[0], another)
            if anew >= fit - (_SYMMETRIC if found[i, 1] else 0.0):
                needle, hay, affine, fit, found[i, 1] = first, second, another.copy(), anew, 0.0
            is_well = fit >= _WELL
        _refine_in_full(needle[0], hay[0], affine)
        _compare(needle, hay, affine, found[i], room)
        found[i, 50], found[i, 51] = _ground(needle[0]), _ground(hay[0])
        for less, more in _OF_EACH:  # a pair has no order
            if found[i, less] > found[i, more]:
                found[i, less], found[i, more] = found[i, more], found[i, less]


@_compiled
def _is_as_it_is(affine):  # type: ignore[no-untyped-def]
    """Tell whether a map is so near to none that refining that one would lead to the same place."""
    away = max(abs(affine[0] - 0.5), abs(affine[3] - 0.5), abs(affine[1] - 1), abs(affine[5] - 1))
    return max(away, abs(affine[2]), abs(affine[4])) < _NEAR


@_compiled
def _lay_by_axes(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Fill in the map of the smaller picture to the larger one by rows and columns; tell whether the hay is smaller."""
    lay_by_axes(_resized(needle, _HALF, _HALF), _resized(hay, _HALF, _HALF), affine)
    y, height, x, width = affine[0], affine[1], affine[3], affine[5]
    if height * width <= 1:
        return False
    affine[0], affine[1] = 0.5 + (0.5 - y) / height, 1 / height
    affine[3], affine[5] = 0.5 + (0.5 - x) / width, 1 / width
    return True


@_compiled
def _ground(luma):  # type: ignore[no-untyped-def]
    """Return the share of the pixels in the 8 levels that most pixels have."""
    levels = np.zeros(65, np.int64)
    for level in luma.flat:
        levels[min(max(int(level), 0), 255) // 4] += 1
    most = 0
    for i in range(64):  # JPEG may spread a level over two bins
        most = max(most, levels[i] + levels[i + 1])
    return most / luma.size


@_compiled
def _laid(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Refine how the needle lies on the hay; return the correlation of their fine structure.

    Least squares come from further away; leaving pixels out comes closer where text or a border was added.
    """
    height = max(8, min(_HALF, round(abs(affine[1]) * _HALF)))
    width = max(8, min(_HALF, round(abs(affine[5]) * _HALF)))
    pattern, ground = _resized(_resized(needle, _HALF, _HALF), height, width), _resized(hay, _HALF, _HALF)
    start, near = affine.copy(), affine.copy()
    _refine(pattern, ground, near, _STEPS, _ROBUST)
    _refine(pattern, ground, affine, _STEPS, _LEAST_SQUARES)
    _refine(pattern, ground, affine, _LAST_STEPS, _ROBUST)
    for moved in (near, affine):  # far from where the search led there is another picture, or an upside-down one
        if np.abs(moved - start).max() > _FAR:
            moved[:] = start
    says, nearer = _says(pattern, ground, affine), _says(pattern, ground, near)
    if nearer > says:
        affine[:] = near
    return max(says, nearer)


@_compiled
def _refine_in_full(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Refine how the needle lies on the hay at full size: a tenth of a pixel shows in small print."""
    height = max(16, min(_SIDE, round(abs(affine[1]) * _SIDE)))
    width = max(16, min(_SIDE, round(abs(affine[5]) * _SIDE)))
    pattern, better = _resized(needle, height, width), affine.copy()
    _refine(pattern, hay, better, _FULL_STEPS, _ROBUST)
    if np.abs(better - affine).max() <= _CLOSE and _says(pattern, hay, better) > _says(pattern, hay, affine):
        affine[:] = better


@_compiled
def _says(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Return how much it says that fine structure correlates so: more on a larger part."""
    laid, inside = np.empty_like(needle), np.empty(needle.shape, np.bool_)
    n = _warp(hay, affine, laid, inside)
    correlation = _correlation(_fine(needle), _fine(laid), inside, 0, len(needle), 0, needle.shape[1], 2.0)
    share = abs(affine[1] * affine[5] - affine[2] * affine[4]) * n / needle.size
    return _surprise(correlation) * min(share, 1.0)


@_compiled
def _compare(needle, hay, affine, found, room):  # type: ignore[no-untyped-def]
    """Fill in all features but the first two of a picture, the needle, that lies so on another, the hay."""
    height = max(16, min(_SIDE, round(abs(affine[1]) * _SIDE)))
    width = max(16, min(_SIDE, round(abs(affine[5]) * _SIDE)))
    seen = room[0, : _PLANES * height * width].reshape(_PLANES, height, width)
    inside = np.empty((height, width), np.bool_)
    for plane in range(3):
        seen[plane] = _resized(needle[plane], height, width)
    n = _warp_planes(hay, affine, seen[3:6], inside)
    found[2] = n / (height * width)
    found[3] = abs(affine[1] * affine[5] - affine[2] * affine[4]) * found[2]
    if n < _FEWEST:
        return
    seen[_SLOPE:] = 0
    for k in range(2):
        _structure(seen[3 * k], seen[_FINE + k], seen[_MIDDLE + k])
        _add_slopes(seen[3 * k], seen[_SLOPE + k])
        _add_slopes(seen[3 * k + 1], seen[_TINT + k])
        _add_slopes(seen[3 * k + 2], seen[_TINT + k])
    pixels = room[1, : _PLANES * n].reshape(_PLANES, n)
    ends = _by_cell(seen, inside, pixels)
    sums = _summed(pixels, ends)
    gain, offset = _as_a_whole(sums, n, found)
    unfitted = _unfitted(pixels, ends, gain, offset, n, found)
    in_a_cell = height * width / (_CELLS * _CELLS)
    _in_cells(sums, unfitted, in_a_cell, found)
    _grained(sums, _grain(seen[_FINE], seen[_FINE + 1], inside, sums), in_a_cell, found)


# planes of the pixels that are compared: levels and colours of the needle and of the hay, and of both fine structure,
# that between 3 and 13 pixels, and slopes of levels and of colours
_P, _U, _V, _Q, _W, _X, _FINE, _MIDDLE, _SLOPE, _TINT = 0, 1, 2, 3, 4, 5, 6, 8, 10, 12
_PLANES = 14

# of a cell: pixels; levels, their squares and product; colours, their squares and products; fine and middle structure,
# squares and products; flat pixels; differences, unexplained ones, and how many are large
_N, _A, _B, _AA, _BB, _AB = 0, 1, 2, 3, 4, 5
_UA, _VA, _UB, _VB, _CAA, _CBB, _CAB = 6, 7, 8, 9, 10, 11, 12
_FAA, _FBB, _FAB, _MAA, _MBB, _MAB = 13, 14, 15, 16, 17, 18
_FLAT_A, _FLAT_B, _DIFFERENCE, _UNEXPLAINED, _LARGE, _RECOLOURED = 19, 20, 21, 22, 23, 24
_BOTH_FLAT, _FLAT_RECOLOURED, _COLOUR_UNEXPLAINED = 25, 26, 27
_SUMS = 28


@_compiled
def _structure(picture, fine, middle):  # type: ignore[no-untyped-def]
    """Fill in a picture's fine and middle structure."""
    sums = _sums(picture)
    fine[:] = picture - _means(sums, 2)
    middle[:] = _means(sums, 1) - _means(sums, 6)


@_compiled
def _add_slopes(picture, slopes):  # type: ignore[no-untyped-def]
    """Add by how many levels the picture changes from each pixel to the next."""
    height, width = picture.shape
    half = np.float32(0.5)
    for i in range(height):
        above, line, below, slope = picture[max(i - 1, 0)], picture[i], picture[min(i + 1, height - 1)], slopes[i]
        for j in range(width):
            slope[j] += abs(below[j] - above[j]) * half
        right, inner = line[2:], slope[1:]
        for j in range(width - 2):
            inner[j] += abs(right[j] - line[j]) * half
        slope[0] += abs(line[1] - line[0]) * half
        slope[width - 1] += abs(line[width - 1] - line[width - 2]) * half


@_compiled
def _begins(length):  # type: ignore[no-untyped-def]
    """Return where the cells begin along a side, and its length."""
    begins = np.empty(_CELLS + 1, np.int64)
    for cell in range(_CELLS + 1):
        begins[cell] = (cell * length + _CELLS - 1) // _CELLS
    return begins


@_compiled
def _by_cell(seen, inside, pixels):  # type: ignore[no-untyped-def]
    """Fill in the pixels inside, one cell's after the other's; return where each cell's end, from 0 on."""
    rows, columns = _begins(inside.shape[0]), _begins(inside.shape[1])
    ends, n = np.zeros(_CELLS * _CELLS + 1, np.int64), 0
    for cell in range(_CELLS * _CELLS):
        left, right = columns[cell % _CELLS], columns[cell % _CELLS + 1]
        for i in range(rows[cell // _CELLS], rows[cell // _CELLS + 1]):
            within = inside[i, left:right]
            if within.all():
                for plane in range(_PLANES):
                    source, target = seen[plane, i, left:right], pixels[plane, n:]
                    for j in range(right - left):
                        target[j] = source[j]
                n += right - left
                continue
            for j in range(right - left):
                if within[j]:
                    for plane in range(_PLANES):
                        pixels[plane, n] = seen[plane, i, left + j]
                    n += 1
        ends[cell + 1] = n
    return ends


@_compiled
def _summed(pixels, ends):  # type: ignore[no-untyped-def]
    """Return the sums of each cell, (cells, cells, _SUMS)."""
    sums = np.zeros((_CELLS, _CELLS, _SUMS))
    for cell in range(_CELLS * _CELLS):
        s, first, last = sums[cell // _CELLS, cell % _CELLS], ends[cell], ends[cell + 1]
        p, q, u, v = _planes_of(pixels, first, last, _P, _Q, _U, _V)
        w, x, fine_p, fine_q = _planes_of(pixels, first, last, _W, _X, _FINE, _FINE + 1)
        middle_p, middle_q, slope_p, slope_q = _planes_of(pixels, first, last, _MIDDLE, _MIDDLE + 1, _SLOPE, _SLOPE + 1)
        s[_N] = last - first
        s[_A], s[_B], s[_AA], s[_BB], s[_AB] = _moments(p, q)
        _, _, s[_FAA], s[_FBB], s[_FAB] = _moments(fine_p, fine_q)
        _, _, s[_MAA], s[_MBB], s[_MAB] = _moments(middle_p, middle_q)
        s[_UA], s[_UB], uu, ww, uw = _moments(u, w)
        s[_VA], s[_VB], vv, xx, vx = _moments(v, x)
        s[_CAA], s[_CBB], s[_CAB] = uu + vv, ww + xx, uw + vx
        _differences(p, q, slope_p, slope_q, s)
        tint_p, tint_q = pixels[_TINT, first:last], pixels[_TINT + 1, first:last]
        _recoloured(u, v, w, x, slope_p, slope_q, tint_p, tint_q, s)
    return sums


@_compiled
def _planes_of(pixels, first, last, a, b, c, d):  # type: ignore[no-untyped-def]
    return pixels[a, first:last], pixels[b, first:last], pixels[c, first:last], pixels[d, first:last]


@_compiled
def _moments(one, other):  # type: ignore[no-untyped-def]
    """Return the sums of two planes, of their squares and of their products."""
    a, b, aa, bb, ab = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(one)):
        p, q = one[i], other[i]
        a, b, aa, bb, ab = a + p, b + q, aa + p * p, bb + q * q, ab + p * q
    return a, b, aa, bb, ab


@_compiled
def _differences(one, other, slope_one, slope_other, s):  # type: ignore[no-untyped-def]
    flat_a, flat_b, total, rest, large = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(one)):
        difference = abs(one[i] - other[i])
        unexplained = max(difference - max(slope_one[i], slope_other[i]), np.float32(0))
        flat_a, flat_b = flat_a + (slope_one[i] < 4), flat_b + (slope_other[i] < 4)
        total, rest, large = total + difference, rest + unexplained, large + (unexplained > 24)
    s[_FLAT_A], s[_FLAT_B], s[_DIFFERENCE], s[_UNEXPLAINED], s[_LARGE] = flat_a, flat_b, total, rest, large


@_compiled
def _recoloured(u, v, w, x, slope_one, slope_other, tint_one, tint_other, s):  # type: ignore[no-untyped-def]
    recoloured, flats, both, rest = 0.0, 0.0, 0.0, 0.0
    for i in range(len(u)):
        distance = np.sqrt((u[i] - w[i]) ** 2 + (v[i] - x[i]) ** 2)
        tint, far = max(tint_one[i], tint_other[i]), distance > 20
        flat = (max(slope_one[i], slope_other[i]) < 4) & (tint < 8)
        recoloured, flats, both = recoloured + far, flats + flat, both + (flat & far)
        rest += max(distance - tint, np.float32(0))
    s[_RECOLOURED], s[_BOTH_FLAT], s[_FLAT_RECOLOURED], s[_COLOUR_UNEXPLAINED] = recoloured, flats, both, rest


@_compiled
def _alike(aa, bb, ab, floor):  # type: ignore[no-untyped-def]
    """Return the correlation of centred sums, with this much added to each square as noise."""
    return ab / np.sqrt((max(aa, 0.0) + floor) * (max(bb, 0.0) + floor))


@_compiled
def _as_a_whole(sums, n, found):  # type: ignore[no-untyped-def]
    """Fill in what all pixels tell; return gain and offset of the line from the needle's levels to the hay's."""
    s = np.zeros(_SUMS)
    for i in range(_CELLS):
        for j in range(_CELLS):
            s += sums[i, j]
    s /= n
    aa, bb, ab = max(s[_AA] - s[_A] ** 2, 0.0), max(s[_BB] - s[_B] ** 2, 0.0), s[_AB] - s[_A] * s[_B]
    # the line is taken through the one that varies more, or noise would flatten it
    gain = ab / (aa + _FLOOR) if aa > bb else (bb + _FLOOR) / max(ab, 1.0)
    gain = min(max(gain, 0.2), 5.0)
    found[4] = _alike(aa, bb, ab, _FLOOR)
    found[5] = _alike(s[_FAA], s[_FBB], s[_FAB], 2.0)
    found[6] = _alike(s[_MAA], s[_MBB], s[_MAB], 2.0)
    found[7], found[8] = abs(np.log(gain)), abs(s[_A] - s[_B])
    colour_a = max(s[_CAA] - s[_UA] ** 2 - s[_VA] ** 2, 0.0)
    colour_b = max(s[_CBB] - s[_UB] ** 2 - s[_VB] ** 2, 0.0)
    found[9], found[10] = np.sqrt(colour_a), np.sqrt(colour_b)
    found[11] = _alike(colour_a, colour_b, s[_CAB] - s[_UA] * s[_UB] - s[_VA] * s[_VB], 8.0)
    found[12] = np.sqrt((s[_UA] - s[_UB]) ** 2 + (s[_VA] - s[_VB]) ** 2)
    found[13], found[14], found[15], found[17] = s[_FLAT_A], s[_FLAT_B], s[_DIFFERENCE], s[_UNEXPLAINED]
    found[18], found[20] = s[_LARGE], s[_RECOLOURED]
    found[47], found[48] = s[_FLAT_RECOLOURED] / (s[_BOTH_FLAT] + 0.01), s[_COLOUR_UNEXPLAINED]
    found[38], found[39], found[40], found[41] = np.sqrt(aa), np.sqrt(bb), np.sqrt(s[_FAA]), np.sqrt(s[_FBB])
    return gain, s[_B] - gain * s[_A]


@_compiled
def _unfitted(pixels, ends, gain, offset, n, found):  # type: ignore[no-untyped-def]
    """Fill in what differs once the line was laid through the levels; return the unexplained part in each cell."""
    in_cells = np.zeros((_CELLS, _CELLS))
    total, large = 0.0, 0.0
    for cell in range(_CELLS * _CELLS):
        first, last, rest = ends[cell], ends[cell + 1], 0.0
        one, other, slope_one, slope_other = _planes_of(pixels, first, last, _P, _Q, _SLOPE, _SLOPE + 1)
        for i in range(len(one)):
            difference = abs(gain * one[i] + offset - other[i])
            unexplained = max(difference - max(slope_one[i], slope_other[i]), 0.0)
            total, rest, large = total + difference, rest + unexplained, large + (unexplained > 24)
        in_cells[cell // _CELLS, cell % _CELLS] = rest
    found[16], found[19] = total / n, large / n
    return in_cells


@_compiled
def _in_cells(sums, unfitted, pixels, found):  # type: ignore[no-untyped-def]
    """Fill in what the cells tell of which at least half lies on the other picture."""
    correlations, k = np.empty(_CELLS * _CELLS), 0
    weights, disagreement, disagreeing, stronger, one_sided = 0.0, 0.0, 0.0, 0.0, 0.0
    strong, bad, worst = 0, 0, 1.0
    for i in range(_CELLS):
        for j in range(_CELLS):
            s, m = sums[i, j], sums[i, j, _N]
            if m < 0.5 * pixels:
                continue
            colour = np.sqrt((s[_UA] - s[_UB]) ** 2 + (s[_VA] - s[_VB]) ** 2) / m
            found[21] = max(found[21], abs(s[_A] - s[_B]) / m)
            found[22], found[23] = max(found[22], colour), max(found[23], s[_UNEXPLAINED] / m)
            found[24] = max(found[24], unfitted[i, j] / m)
            found[49] = max(found[49], s[_COLOUR_UNEXPLAINED] / m)
            a, b = np.sqrt(s[_FAA] / m), np.sqrt(s[_FBB] / m)
            c = _alike(s[_FAA], s[_FBB], s[_FAB], 2.0 * m)
            less, more = min(a, b), max(a, b)
            weights, stronger, one_sided = weights + less, stronger + more, one_sided + abs(a - b)
            disagreement, disagreeing = disagreement + less * (1 - c), disagreeing + less * (c < 0.5)
            if less > 6:
                strong, bad, worst = strong + 1, bad + (c < 0.6), min(worst, c)
            found[31], found[32] = max(found[31], less * (1 - c)), max(found[32], more * (1 - c))
            if more > 3:
                correlations[k] = c
                k += 1
    found[25], found[26] = disagreement / (weights + 1e-3), disagreeing / (weights + 1e-3)
    found[27], found[28], found[29], found[30] = strong, bad, bad / max(strong, 1), worst
    found[33], found[34] = one_sided / (stronger + 1e-3), k
    found[35], found[36], found[37] = 1.0, 1.0, 1.0
    if k:
        ordered = np.sort(correlations[:k])
        found[35], found[36], found[37] = ordered[k // 2], ordered[k // 4], ordered[k // 10]


@_compiled
def _grain(fine_a, fine_b, inside, sums):  # type: ignore[no-untyped-def]
    """Return squares and product of each cell's fine structure less the means of its lines and of its columns."""
    height, width = inside.shape
    lines, columns = np.zeros((2, height, _CELLS)), np.zeros((2, _CELLS, width))
    _add_up(fine_a, inside, lines[0], columns[0])
    _add_up(fine_b, inside, lines[1], columns[1])
    grain, total = np.zeros((_CELLS, _CELLS, 3)), np.zeros((_CELLS, _CELLS, 2))
    for y in range(_CELLS):
        for x in range(_CELLS):
            g, s = grain[y, x], sums[y, x]
            g[0], g[1], g[2] = s[_FAA], s[_FBB], s[_FAB]
    for i in range(height):
        total[i * _CELLS // height] += lines[:, i].T
    across, down = _CELLS / width, _CELLS / height  # one by the number of pixels in a line, and in a column
    for i in range(height):
        for x in range(_CELLS):
            _less(grain[i * _CELLS // height, x], lines[0, i, x], lines[1, i, x], across)
    for y in range(_CELLS):
        for j in range(width):
            _less(grain[y, j * _CELLS // width], columns[0, y, j], columns[1, y, j], down)
        for x in range(_CELLS):
            _less(grain[y, x], total[y, x, 0], total[y, x, 1], -across * down)
    return grain


@_compiled
def _add_up(fine, inside, lines, columns):  # type: ignore[no-untyped-def]
    """Fill in the sums of the pixels inside along each cell's lines and columns."""
    height, width = inside.shape
    begins = _begins(width)
    line = np.empty(width, np.float32)
    for i in range(height):
        column, within, levels = columns[i * _CELLS // height], inside[i], fine[i]
        for j in range(width):
            line[j] = levels[j] * np.float32(within[j])
            column[j] += line[j]
        for cell in range(_CELLS):
            total = 0.0
            for j in range(begins[cell], begins[cell + 1]):
                total += line[j]
            lines[i, cell] = total


@_compiled
def _less(sums, a, b, share):  # type: ignore[no-untyped-def]
    sums[0], sums[1], sums[2] = sums[0] - share * a * a, sums[1] - share * b * b, sums[2] - share * a * b


@_compiled
def _grained(sums, grain, pixels, found):  # type: ignore[no-untyped-def]
    """Fill in what the grain tells of the cells of which at least half lies on the other picture."""
    correlations, k = np.empty(_CELLS * _CELLS), 0
    aa, bb, ab, n, weights, disagreement, worst = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0
    for i in range(_CELLS):
        for j in range(_CELLS):
            g, m = grain[i, j], sums[i, j, _N]
            if m < 0.5 * pixels:
                continue
            a, b = np.sqrt(max(g[0], 0.0) / m), np.sqrt(max(g[1], 0.0) / m)
            c = _alike(g[0], g[1], g[2], 2.0 * m)
            aa, bb, ab, n = aa + g[0], bb + g[1], ab + g[2], n + m
            less = min(a, b)
            weights, disagreement = weights + less, disagreement + less * (1 - c)
            found[46] = max(found[46], less * (1 - c))
            if less > 4:
                worst = min(worst, c)
            if max(a, b) > 3:
                correlations[k] = c
                k += 1
    found[42], found[43], found[44] = _alike(aa, bb, ab, 2.0 * n + 1e-3), disagreement / (weights + 1e-3), worst
    found[45] = np.sort(correlations[:k])[k // 10] if k else 1.0
