"""Pairs of thumbnails -> how well one, cropped, mirrored, shifted, stretched or turned, lies on the other.

An embedding finds candidates; what makes one a copy at a rate that matters among millions is that its pixels can be
laid upon the other's.  The smaller picture is searched in the larger at 16 x 16, at many sizes and every place, both
ways round and in the mirror; the likeliest places are refined at full size by robust Gauss-Newton steps on an affine
map (Baker and Matthews 2004, forward compositional) that let text and borders go, and judged by correlation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .compiled import kernel

_COARSE = 16
_REFINED = 3  # places that are refined, beside lying as they are and in the mirror
_STEPS, _LAST_STEPS = 8, 5  # of a refinement at 16 x 16, and of the best one's at full size
_ROBUST = 1.4  # width of trust at which text and borders are left out
_HOPELESS = 0.1  # evidence at 16 x 16 under which full size would not help

_ENOUGH = 3.0  # evidence beyond which more says no more
_FIRST = 1e9  # more than any evidence
_NOTHING = -2.0  # for a correlation of less than half of the pixels

_Float = npt.NDArray[np.float32]
_compiled: Any = partial(kernel, fastmath=True)


def _sizes() -> npt.NDArray[np.int64]:
    """Return the heights and widths at which a picture is searched in another, of 16: squares, stretches and halves."""
    square = [(k, k) for k in range(16, 5, -1)]
    stretched = [(k, round(0.78 * k)) for k in (15, 13, 11, 9)]
    halves = [(16, 8), (16, 12), (14, 7)]
    return np.array(square + [s for h, w in stretched + halves for s in ((h, w), (w, h))])


def _turns_and_shifts() -> npt.NDArray[np.float64]:
    """Return what else is tried at full size: (down, right) as shares of the side, and degrees."""
    turns = [(0.0, 0.0, degrees) for degrees in (-15.0, -8.0, 8.0, 15.0)]
    return np.array(turns + [s for d in (-0.45, -0.25, 0.25, 0.45) for s in ((d, 0.0, 0.0), (0.0, d, 0.0))])


_SIZES, _OTHERS = _sizes(), _turns_and_shifts()


METHOD = "alignment-2"
"""Names how evidence is found."""


@dataclass(frozen=True)
class Alignment:
    """How the pictures of some pairs (a, b) lie on each other best, and the evidence of it from 0 to 1.

    `affine` (pairs, 6) takes a place (y, x) of the smaller picture, from -1/2 to 1/2, to the larger one's, from 0 to 1:
    y' = affine[0] + affine[1] y + affine[2] x, and x' likewise.  The smaller one is b, or a where `turned`; b is taken
    as its mirror image where `mirrored`.
    """

    evidence: _Float
    affine: npt.NDArray[np.float64]
    mirrored: npt.NDArray[np.bool_]
    turned: npt.NDArray[np.bool_]

    def of(self, pairs: npt.NDArray[np.int64]) -> Alignment:
        """Return the alignments of some of the pairs."""
        return Alignment(self.evidence[pairs], self.affine[pairs], self.mirrored[pairs], self.turned[pairs])


def align(thumbnails: npt.NDArray[np.uint8], a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> Alignment:
    """Return the best alignment of each pair (a, b) of the (N, 32, 32) grey thumbnails.

    The evidence is (e(f) + 0.4 e(m)) t sqrt(s) / 3, at most 1, with e(r) = -ln(1 - r^2), where f is the correlation of
    the two's fine structure where they lie upon each other, m the median of the correlations of their levels in 4 x 4
    cells, t the share of the cells with any texture (simple things on plain ground lie on one another), and s that
    part's share of the larger.  Weights are those of a logistic regression on edited photos and unlike ones.
    """
    n = len(a)
    found = Alignment(np.zeros(n, np.float32), np.zeros((n, 6)), np.zeros(n, np.bool_), np.zeros(n, np.bool_))
    if n:
        _align_all(thumbnails, a, b, _SIZES, _OTHERS, found.evidence, found.affine, found.mirrored, found.turned)
    return found


@_compiled
def _align_all(thumbnails, a, b, sizes, others, found, affine, mirrored, turned):  # type: ignore[no-untyped-def]
    side = thumbnails.shape[1]
    one, other = np.empty((side, side), np.float32), np.empty((side, side), np.float32)
    for i in range(len(a)):
        for y in range(side):
            for x in range(side):
                one[y, x], other[y, x] = thumbnails[a[i], y, x], thumbnails[b[i], y, x]
        evidence, kind = _align(one, other, sizes, others, affine[i])
        found[i] = min(evidence / _ENOUGH, 1.0)
        mirrored[i], turned[i] = kind % 2, kind in (2, 3)


@_compiled
def _align(one, other, sizes, others, affine):  # type: ignore[no-untyped-def]
    """Fill in the map of the best alignment of two pictures; return its evidence and its number.

    The even maps take the pictures as they are, the odd ones the other's mirror image, 2 and 3 the one as the smaller.
    """
    _lay(affine, 0.0, 0.0, 0.0)
    at_once = _refined(other, one, affine, _STEPS)
    if at_once >= _ENOUGH:  # they lie on each other as they are, as most candidates by hash do
        return at_once, 4
    mirrored = _mirrored(other)
    small, small_other = _resized(one, _COARSE, _COARSE), _resized(other, _COARSE, _COARSE)
    small_mirrored = _mirrored(small_other)
    maps, weights = np.zeros((6 + 2 * len(others), 6)), np.empty(6 + 2 * len(others))
    weights[0], weights[1] = _search(small_other, small, sizes, maps[0], maps[1])
    weights[2], weights[3] = _search(small, small_other, sizes, maps[2], maps[3])
    maps[3, 3] = 1 - maps[3, 3]  # the one lies in the mirrored other as its mirror image does in the other
    for k in range(4, len(maps) - 2):
        _lay(maps[k], others[k // 2 - 2, 0], others[k // 2 - 2, 1], others[k // 2 - 2, 2])
        weights[k] = _weight(small_mirrored if k % 2 else small_other, small, maps[k])
    for k in range(len(maps) - 2, len(maps)):
        _lay(maps[k], 0.0, 0.0, 0.0)
        weights[k] = _FIRST
    best, first = -1.0, 0
    for _ in range(_REFINED + 2):
        k = 0
        for i in range(1, len(maps)):
            if weights[i] > weights[k]:
                k = i
        weights[k] = -_FIRST
        second = small_mirrored if k % 2 else small_other
        evidence = _refined(small if k in (2, 3) else second, second if k in (2, 3) else small, maps[k], _STEPS)
        if evidence > best:
            best, first = evidence, k
    if best >= _HOPELESS:
        second = mirrored if first % 2 else other
        needle, hay = (one, second) if first in (2, 3) else (second, one)
        best = _refined(needle, hay, maps[first], _LAST_STEPS)
    affine[:] = maps[first]
    return best, first


@_compiled
def _refined(needle, hay, affine, steps):  # type: ignore[no-untyped-def]
    """Return the evidence of the alignment that refining this map leads to."""
    height = max(4, min(len(needle), round(abs(affine[1]) * len(needle))))
    width = max(4, min(len(needle), round(abs(affine[5]) * len(needle))))
    pattern = _resized(needle, height, width)
    _refine(pattern, hay, affine, steps, _ROBUST)
    return _judge(pattern, hay, affine)


@_compiled
def _resized(picture, height, width):  # type: ignore[no-untyped-def]
    """Return a picture, made no larger, as means over the areas of its new pixels; itself if it has that size."""
    if picture.shape == (height, width):
        return picture
    return _shrunk(_shrunk(picture, height), width)


@_compiled
def _shrunk(lines, height):  # type: ignore[no-untyped-def]
    """Return the lines as means over so many equal parts of them, turned: those of the first come as a column."""
    width = lines.shape[1]
    shrunk, mean = np.empty((width, height), np.float32), np.empty(width, np.float32)
    step = len(lines) / height
    for i in range(height):
        first, last = i * step, (i + 1) * step
        mean[:] = 0
        for p in range(int(first), min(int(last - 1e-9) + 1, len(lines))):
            share, line = np.float32((min(last, p + 1) - max(first, p)) / step), lines[p]
            for j in range(width):
                mean[j] += share * line[j]
        for j in range(width):
            shrunk[j, i] = mean[j]
    return shrunk


@_compiled
def _mirrored(picture):  # type: ignore[no-untyped-def]
    mirrored = np.empty_like(picture)
    for i in range(picture.shape[0]):
        for j in range(picture.shape[1]):
            mirrored[i, j] = picture[i, picture.shape[1] - 1 - j]
    return mirrored


@_compiled
def _sums(picture):  # type: ignore[no-untyped-def]
    """Return the sums of all levels above and left of each corner of the pixels."""
    height, width = picture.shape
    sums = np.zeros((height + 1, width + 1))
    for i in range(height):
        above, levels, line = sums[i, 1:], picture[i], sums[i + 1, 1:]
        for j in range(width):
            line[j] = above[j] + levels[j]
    for j in range(width):  # along the lines, all of them at once: each sum waits for the one before it
        for i in range(height + 1):
            sums[i, j + 1] += sums[i, j]
    return sums


@_compiled
def _means(sums, reach):  # type: ignore[no-untyped-def]
    """Return means over squares of 2 * reach + 1 pixels on a side, cut at the edges, of a picture with these sums."""
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    means, line = np.empty((height, width), np.float32), np.empty(width + 1)
    for i in range(height):
        top, end = max(i - reach, 0), min(i + reach + 1, height)
        above, below, mean = sums[top], sums[end], means[i]
        for j in range(width + 1):
            line[j] = below[j] - above[j]
        left, right, inner = line, line[2 * reach + 1 :], mean[reach:]
        share = 1.0 / ((end - top) * (2 * reach + 1))
        for j in range(width - 2 * reach):
            inner[j] = (right[j] - left[j]) * share
        for k in range(min(2 * reach, width)):
            j = k if k < reach else max(width - 2 * reach, 0) + k
            first, last = max(j - reach, 0), min(j + reach + 1, width)
            mean[j] = (line[last] - line[first]) / ((end - top) * (last - first))
    return means


@_compiled
def _search(needle, hay, sizes, affine, mirrored):  # type: ignore[no-untyped-def]
    """Find size and place at which the needle, and its mirror image, correlate best with the hay; return the weights
    of that evidence.
    """
    side = hay.shape[0]
    levels, squares, shifted = _sums(hay), _sums(hay * hay), _shifted(hay)
    patterns, products = np.empty((2, side * side), np.float32), np.empty((2, side))
    best = np.array([-1.0, -1.0])
    for k in range(len(sizes)):
        height, width = sizes[k]
        n = height * width
        own = max(_put(_resized(needle, height, width), side, patterns[0], patterns[1]), _FLOOR * n)
        top, y, x = np.array([-1.0, -1.0]), np.zeros(2, np.int64), np.zeros(2, np.int64)
        for i in range(side - height + 1):
            for j in range(side - width + 1):
                window = shifted[j, i * side : (i + height) * side]
                products[0, j], products[1, j] = _dots(patterns[0], patterns[1], window)
            above, below = levels[i], levels[i + height]
            for m in range(2):
                _divide(products[m], own, n, width, above, below, squares[i], squares[i + height])
                for j in range(side - width + 1):
                    if products[m, j] > top[m]:
                        top[m], y[m], x[m] = products[m, j], i, j
        for m, found in enumerate((affine, mirrored)):
            weight = _evidence(top[m], n)
            if weight > best[m]:
                best[m] = weight
                found[0], found[1] = (y[m] + height / 2) / side, height / side
                found[3], found[5] = (x[m] + width / 2) / side, width / side
    return best[0], best[1]


@_compiled
def _dots(one, other, window):  # type: ignore[no-untyped-def]
    first, second = np.float32(0), np.float32(0)
    for p in range(len(window)):
        first, second = first + one[p] * window[p], second + other[p] * window[p]
    return first, second


@_compiled
def _shifted(hay):  # type: ignore[no-untyped-def]
    """Return the hay, flat, shifted to the left by each number of pixels: all windows at a place lie in one stretch."""
    side = hay.shape[0]
    shifted = np.zeros((side, side * side), np.float32)
    for k in range(side):
        for i in range(side):
            shifted[k, i * side : (i + 1) * side - k] = hay[i, k:]
    return shifted


@_compiled
def _put(picture, side, pattern, mirrored):  # type: ignore[no-untyped-def]
    """Put a picture less its mean, and its mirror image, in lines of this length; return what its squares sum up to."""
    height, width = picture.shape
    mean, squares = np.float32(0), np.float32(0)
    for value in picture.flat:
        mean += value
    mean /= picture.size
    pattern[:], mirrored[:] = 0, 0
    for i in range(height):
        for j in range(width):
            value = picture[i, j] - mean
            pattern[i * side + j] = mirrored[i * side + width - 1 - j] = value
            squares += value * value
    return squares


@_compiled
def _divide(products, own, n, width, above, below, squares, squares_below):  # type: ignore[no-untyped-def]
    """Divide each window's product by the deviations, given the sums above and below a line of windows."""
    above_, below_, squares_, squares_below_ = above[width:], below[width:], squares[width:], squares_below[width:]
    for j in range(len(above_)):
        s = below_[j] - above_[j] - below[j] + above[j]
        ss = squares_below_[j] - squares_[j] - squares_below[j] + squares[j]
        products[j] = products[j] / np.sqrt(own * max(ss - s * s / n, _FLOOR * n))


_FLOOR = 4.0  # of a variance: what lies under is no structure


@_compiled
def _evidence(correlation, pixels):  # type: ignore[no-untyped-def]
    """Return how much a correlation over so many pixels says: the logarithm of a likelihood ratio."""
    return 0.5 * pixels * _surprise(correlation)


@_compiled
def _lay(affine, down, right, degrees):  # type: ignore[no-untyped-def]
    cosine, sine = np.cos(degrees * np.pi / 180), np.sin(degrees * np.pi / 180)
    affine[0], affine[1], affine[2] = 0.5 + down, cosine, -sine
    affine[3], affine[4], affine[5] = 0.5 + right, sine, cosine


@_compiled
def _weight(needle, hay, affine):  # type: ignore[no-untyped-def]
    height, width = needle.shape
    laid, inside = np.empty_like(needle), np.empty(needle.shape, np.bool_)
    n = _warp(hay, affine, laid, inside)
    correlation = _correlation(needle, laid, inside, 0, height, 0, width, _FLOOR)
    return _evidence(correlation, n) if n * 4 >= needle.size else 0.0


@_compiled
def _warp(hay, affine, laid, inside):  # type: ignore[no-untyped-def]
    return _warp_planes(hay.reshape(1, *hay.shape), affine, laid.reshape(1, *laid.shape), inside)


@_compiled
def _warp_planes(hay, affine, laid, inside):  # type: ignore[no-untyped-def]
    """Sample planes of the hay where each pixel of the needle lies; return how many lie inside.

    The map takes the needle's places, from -1/2 to 1/2, to the hay's, from 0 to 1.
    """
    planes, rows, columns = hay.shape
    height, width = inside.shape
    flat = hay.reshape(planes, rows * columns)
    corner = np.empty(width, np.uint32)
    down, across = np.empty(width, np.float32), np.empty(width, np.float32)
    y_right, x_right = affine[2] * rows / width, affine[5] * columns / width
    n = 0
    for i in range(height):
        u = (i + 0.5) / height - 0.5
        y_left = (affine[0] + affine[1] * u - 0.5 * affine[2]) * rows - 0.5
        x_left = (affine[3] + affine[4] * u - 0.5 * affine[5]) * columns - 0.5
        within = inside[i]
        for j in range(width):
            y, x = y_left + y_right * (j + 0.5), x_left + x_right * (j + 0.5)
            within[j] = (y >= -0.5) & (y <= rows - 0.5) & (x >= -0.5) & (x <= columns - 0.5)
            n += within[j]
            y, x = min(max(y, 0.0), rows - 1.0), min(max(x, 0.0), columns - 1.0)
            p, q = min(np.int32(y), np.int32(rows - 2)), min(np.int32(x), np.int32(columns - 2))
            corner[j], down[j], across[j] = p * columns + q, y - p, x - q
        for plane in range(planes):
            _sample(flat[plane], np.uint32(columns), corner, down, across, laid[plane, i])
    return n


@_compiled
def _sample(flat, columns, corner, down, across, line):  # type: ignore[no-untyped-def]
    """Fill in a line of levels between four pixels each, of which the first is the corner."""
    one = np.float32(1)
    below = flat[columns:]
    for j in range(len(line)):
        at, f, g = corner[j], down[j], across[j]
        above_ = (one - g) * flat[at] + g * flat[at + np.uint32(1)]
        below_ = (one - g) * below[at] + g * below[at + np.uint32(1)]
        line[j] = (one - f) * above_ + f * below_


@_compiled
def _correlation(one, other, inside, top, bottom, left, right, floor):  # type: ignore[no-untyped-def]
    """Return the correlation of the pixels between these rows and columns, where at least half of them lie inside."""
    n, a, b, aa, bb, ab = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(top, bottom):
        first, second, within = one[i, left:right], other[i, left:right], inside[i, left:right]
        for j in range(right - left):
            w: Any = np.float32(within[j])
            p, q = w * first[j], w * second[j]
            n, a, b, aa, bb, ab = n + w, a + p, b + q, aa + p * p, bb + q * q, ab + p * q
    if n < 4 or 2 * n < (bottom - top) * (right - left):
        return _NOTHING
    return (ab - a * b / n) / np.sqrt((max(aa - a * a / n, 0.0) + floor * n) * (max(bb - b * b / n, 0.0) + floor * n))


@_compiled
def _refine(needle, hay, affine, steps, width_of_trust):  # type: ignore[no-untyped-def]
    """Move the affine map to where needle and hay agree best.

    Pixels that differ by several times this width times the mean difference are left out.
    """
    height, width = needle.shape
    laid, inside = np.empty_like(needle), np.empty(needle.shape, np.bool_)
    trust = np.ones_like(needle)
    normal, right = np.empty((6, 6)), np.empty(6)
    for _ in range(steps):
        if _warp(hay, affine, laid, inside) < 16:
            return
        n, a, b, aa, bb = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(height):
            first, second, within, weight = needle[i], laid[i], inside[i], trust[i]
            for j in range(width):
                t, p, q = weight[j] * np.float32(within[j]), first[j], second[j]
                n, a, b, aa, bb = n + t, a + t * p, b + t * q, aa + t * p * p, bb + t * q * q
        a, b = a / n, b / n
        own, its = np.sqrt(max(aa / n - a * a, _FLOOR)), np.sqrt(max(bb / n - b * b, _FLOOR))
        spread = 0.0
        for i in range(height):
            first, second, within, weight = needle[i], laid[i], inside[i], trust[i]
            for j in range(width):
                t = weight[j] * np.float32(within[j])
                spread += t * abs((first[j] - a) / own - (second[j] - b) / its)
        _equations(needle, laid, inside, trust, a, b, own, its, width_of_trust * spread / n + 0.1, normal, right)
        if not _solve(normal, right):
            return
        y, down, across = affine[0], affine[1], affine[2]
        affine[0] = y + down * right[0] + across * right[3]
        affine[1] = down * (1 + right[1]) + across * right[4]
        affine[2] = down * right[2] + across * (1 + right[5])
        x, down, across = affine[3], affine[4], affine[5]
        affine[3] = x + down * right[0] + across * right[3]
        affine[4] = down * (1 + right[1]) + across * right[4]
        affine[5] = down * right[2] + across * (1 + right[5])
        step = 0.0
        for i in range(6):
            step = max(step, abs(right[i]))
        if step < 2e-3:  # of the side
            return


@_compiled
def _equations(needle, laid, inside, trust, a, b, own, its, scale, normal, right):  # type: ignore[no-untyped-def]
    """Fill in the weighted normal equations of one step, and each pixel's trust (Geman-McClure)."""
    height, width = needle.shape
    down, across, place = np.empty(width), np.empty(width), np.empty(width)
    error, weight = np.empty(width), np.empty(width)
    for j in range(width):
        place[j] = (j + 0.5) / width - 0.5
    normal[:], right[:] = 0, 0
    for i in range(height):
        above, below = max(i - 1, 0), min(i + 1, height - 1)
        _slopes(laid[above], laid[i], laid[below], height / its / (below - above), width / its, down, across)
        _errors(needle[i], laid[i], inside[i], a, b, 1 / own, 1 / its, 1 / scale, error, weight, trust[i])
        _add_line((i + 0.5) / height - 0.5, place, down, across, error, weight, normal, right)
    for p in range(6):
        for q in range(p):
            normal[p, q] = normal[q, p]
        normal[p, p] = normal[p, p] * 1.01 + 1.0


@_compiled
def _slopes(above, line, below, by_height, by_width, down, across):  # type: ignore[no-untyped-def]
    """Fill in the slopes of a line's pixels, one-sided at its ends."""
    last = len(line) - 1
    for j in range(last + 1):
        down[j] = (below[j] - above[j]) * by_height
    left, right, inner = line, line[2:], across[1:]
    for j in range(last - 1):
        inner[j] = (right[j] - left[j]) * (by_width / 2)
    across[0], across[last] = (line[1] - line[0]) * by_width, (line[last] - line[last - 1]) * by_width


@_compiled
def _errors(needle, laid, inside, a, b, own, its, scale, error, weight, trust):  # type: ignore[no-untyped-def]
    """Fill in by how much a line's pixels differ and, of those inside, their weight and trust."""
    for j in range(len(needle)):
        error[j] = (needle[j] - a) * own - (laid[j] - b) * its
        t = 1 / (1 + (error[j] * scale) ** 2)
        t *= t
        weight[j] = t if inside[j] else 0.0
        trust[j] = t if inside[j] else trust[j]


@_compiled
def _add_line(u, place, down, across, error, weight, normal, right):  # type: ignore[no-untyped-def]
    """Add to the equations what a line at place u gives."""
    yy, yy1, yy2, xx, xx1, xx2, xy, xy1, xy2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    ye, ye1, xe, xe1 = 0.0, 0.0, 0.0, 0.0
    for j in range(len(place)):  # apart from what fills its arrays, or it would not be vectorised
        v, dy, dx, e = place[j], down[j], across[j], error[j]
        y, x = weight[j] * dy, weight[j] * dx
        yy, yy1, yy2 = yy + y * dy, yy1 + y * dy * v, yy2 + y * dy * v * v
        xx, xx1, xx2 = xx + x * dx, xx1 + x * dx * v, xx2 + x * dx * v * v
        xy, xy1, xy2 = xy + y * dx, xy1 + y * dx * v, xy2 + y * dx * v * v
        ye, ye1, xe, xe1 = ye + y * e, ye1 + y * e * v, xe + x * e, xe1 + x * e * v
    _add(normal[:3, :3], u, yy, yy1, yy2)
    _add(normal[:3, 3:], u, xy, xy1, xy2)
    _add(normal[3:, 3:], u, xx, xx1, xx2)
    right[0], right[1], right[2] = right[0] + ye, right[1] + u * ye, right[2] + ye1
    right[3], right[4], right[5] = right[3] + xe, right[4] + u * xe, right[5] + xe1


@_compiled
def _add(block, u, plain, by_place, by_square):  # type: ignore[no-untyped-def]
    """Add the products of 1, u and the places in a line to those of other lines."""
    block[0, 0] += plain
    block[0, 1] += u * plain
    block[1, 0] += u * plain
    block[1, 1] += u * u * plain
    block[0, 2] += by_place
    block[2, 0] += by_place
    block[1, 2] += u * by_place
    block[2, 1] += u * by_place
    block[2, 2] += by_square


@_compiled
def _solve(normal, right):  # type: ignore[no-untyped-def]
    """Solve the six equations in place by Gaussian elimination; tell whether they have a solution."""
    n = len(right)
    for i in range(n):
        if normal[i, i] < 1e-9:  # symmetric and positive: no pivoting
            return False
        for r in range(i + 1, n):
            share = normal[r, i] / normal[i, i]
            for c in range(i, n):
                normal[r, c] -= share * normal[i, c]
            right[r] -= share * right[i]
    for i in range(n - 1, -1, -1):
        for c in range(i + 1, n):
            right[i] -= normal[i, c] * right[c]
        right[i] /= normal[i, i]
    return True


@_compiled
def _fine(picture):  # type: ignore[no-untyped-def]
    """Return the picture less its blur: two passes of 5 x 5 means."""
    return picture - _means(_sums(_means(_sums(picture), 2)), 2)


@_compiled
def _judge(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Return the evidence of an alignment, 0 where less than half of the needle lies on the hay."""
    height, width = needle.shape
    laid, inside = np.empty_like(needle), np.empty(needle.shape, np.bool_)
    n = _warp(hay, affine, laid, inside)
    if n < 16 or 2 * n < height * width:
        return 0.0
    fine = _correlation(_fine(needle), _fine(laid), inside, 0, height, 0, width, 2.0)
    cells, k, textured = np.empty(16), 0, 0
    for i in range(4):
        for j in range(4):
            rows, columns = (i * height // 4, (i + 1) * height // 4), (j * width // 4, (j + 1) * width // 4)
            c = _correlation(needle, laid, inside, rows[0], rows[1], columns[0], columns[1], 9.0)
            if c != _NOTHING:
                textured += _varies(needle, rows[0], rows[1], columns[0], columns[1])
                place = k
                while place and cells[place - 1] > c:
                    cells[place] = cells[place - 1]
                    place -= 1
                cells[place] = c
                k += 1
    median = cells[k // 2] if k > 3 else 0.0
    share = abs(affine[1] * affine[5] - affine[2] * affine[4]) * n / (height * width)
    return (_surprise(fine) + 0.4 * _surprise(median)) * np.sqrt(min(share, 1.0)) * textured / max(k, 1)


@_compiled
def _varies(picture, top, bottom, left, right):  # type: ignore[no-untyped-def]
    """Tell whether the levels between these rows and columns deviate by 8 of 255 or more."""
    total, squares = 0.0, 0.0
    for i in range(top, bottom):
        for j in range(left, right):
            total, squares = total + picture[i, j], squares + picture[i, j] * picture[i, j]
    n = (bottom - top) * (right - left)
    return squares / n - (total / n) ** 2 >= 64.0


@_compiled
def _surprise(correlation):  # type: ignore[no-untyped-def]
    return -np.log(max(1 - max(correlation, 0.0) ** 2, 1e-3))
