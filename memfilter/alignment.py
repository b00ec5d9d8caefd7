"""Pairs of thumbnails -> how well one, cropped, mirrored, shifted, stretched or turned, lies on the other.

An embedding finds candidates; what makes one a copy at a rate that matters among millions is that its pixels can be
laid upon the other's.  The smaller picture is searched in the larger at 16 x 16, at many sizes and every place, both
ways round and in the mirror; the likeliest places are refined at full size by robust Gauss-Newton steps on an affine
map (Baker and Matthews 2004, forward compositional) that let text and borders go, and judged by correlation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

_COARSE = 16
_REFINED = 3  # places that are refined, beside lying as they are and in the mirror
_STEPS, _LAST_STEPS = 8, 5  # of a refinement at 16 x 16, and of the best one's at full size
_ROBUST = 1.4  # width of trust at which text and borders are left out
_HOPELESS = 0.1  # evidence at 16 x 16 under which full size would not help

_ENOUGH = 3.0  # evidence beyond which more says no more
_FIRST = 1e9  # more than any evidence
_NOTHING = -2.0  # for a correlation of less than half of the pixels

_Float = npt.NDArray[np.float32]
_compiled: Any = njit(cache=True, fastmath=True, nogil=True)


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
    weights[0] = _search(small_other, small, sizes, maps[0])
    weights[1] = _search(small_mirrored, small, sizes, maps[1])
    weights[2] = _search(small, small_other, sizes, maps[2])
    weights[3] = _search(small, small_mirrored, sizes, maps[3])
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
    """Return a picture, made no larger, as means over the areas of its new pixels."""
    return _shrunk(_shrunk(picture, height), width)


@_compiled
def _shrunk(lines, height):  # type: ignore[no-untyped-def]
    """Return the lines as means over so many equal parts of them, turned: those of the first come as a column."""
    width = lines.shape[1]
    shrunk = np.zeros((width, height), np.float32)
    step = len(lines) / height
    for i in range(height):
        first, last = i * step, (i + 1) * step
        for p in range(int(first), min(int(last - 1e-9) + 1, len(lines))):
            share = np.float32((min(last, p + 1) - max(first, p)) / step)
            for j in range(width):
                shrunk[j, i] += share * lines[p, j]
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
    sums = np.zeros((picture.shape[0] + 1, picture.shape[1] + 1))
    for i in range(picture.shape[0]):
        line = 0.0
        for j in range(picture.shape[1]):
            line += picture[i, j]
            sums[i + 1, j + 1] = sums[i, j + 1] + line
    return sums


@_compiled
def _search(needle, hay, sizes, affine):  # type: ignore[no-untyped-def]
    """Find size and place at which the needle correlates best with the hay; return the weight of that evidence."""
    side = hay.shape[0]
    squared = np.empty_like(hay)
    for i in range(side):
        for j in range(side):
            squared[i, j] = hay[i, j] * hay[i, j]
    levels, squares = _sums(hay), _sums(squared)
    best = -1.0
    for k in range(len(sizes)):
        height, width = sizes[k]
        n = height * width
        pattern = _resized(needle, height, width)
        own = max(_centre(pattern), _FLOOR * n)
        top, y, x = -1.0, 0, 0
        for i in range(side - height + 1):
            for j in range(side - width + 1):
                product = np.float32(0)
                for p in range(height):
                    for q in range(width):
                        product += pattern[p, q] * hay[i + p, j + q]
                s = levels[i + height, j + width] - levels[i, j + width] - levels[i + height, j] + levels[i, j]
                ss = squares[i + height, j + width] - squares[i, j + width] - squares[i + height, j] + squares[i, j]
                correlation = product / np.sqrt(own * max(ss - s * s / n, _FLOOR * n))
                if correlation > top:
                    top, y, x = correlation, i, j
        weight = _evidence(top, n)
        if weight > best:
            best = weight
            affine[0], affine[1] = (y + height / 2) / side, height / side
            affine[3], affine[5] = (x + width / 2) / side, width / side
    return best


@_compiled
def _centre(picture):  # type: ignore[no-untyped-def]
    """Take the mean from a picture; return what its squares then sum up to."""
    mean, squares = np.float32(0), np.float32(0)
    for value in picture.flat:
        mean += value
    mean /= picture.size
    for i in range(picture.shape[0]):
        for j in range(picture.shape[1]):
            picture[i, j] -= mean
            squares += picture[i, j] * picture[i, j]
    return squares


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
    laid, inside = np.empty_like(needle), np.empty(needle.shape, np.bool_)
    n = _warp(hay, affine, laid, inside)
    correlation = _correlation(needle, laid, inside, 0, needle.shape[0], 0, needle.shape[1], _FLOOR)
    return _evidence(correlation, n) if n * 4 >= needle.size else 0.0


@_compiled
def _warp(hay, affine, laid, inside):  # type: ignore[no-untyped-def]
    """Sample the hay where each pixel of the needle lies; return how many lie inside.

    The map takes the needle's places, from -1/2 to 1/2, to the hay's, from 0 to 1.
    """
    rows, columns = hay.shape
    height, width = laid.shape
    n = 0
    for i in range(height):
        for j in range(width):
            u, v = (i + 0.5) / height - 0.5, (j + 0.5) / width - 0.5
            y = (affine[0] + affine[1] * u + affine[2] * v) * rows - 0.5
            x = (affine[3] + affine[4] * u + affine[5] * v) * columns - 0.5
            inside[i, j] = -0.5 <= y <= rows - 0.5 and -0.5 <= x <= columns - 0.5
            n += inside[i, j]
            y, x = min(max(y, 0.0), rows - 1.0), min(max(x, 0.0), columns - 1.0)
            p, q = min(int(y), rows - 2), min(int(x), columns - 2)
            f, g = y - p, x - q
            laid[i, j] = (1 - f) * ((1 - g) * hay[p, q] + g * hay[p, q + 1]) + f * (
                (1 - g) * hay[p + 1, q] + g * hay[p + 1, q + 1]
            )
    return n


@_compiled
def _correlation(one, other, inside, top, bottom, left, right, floor):  # type: ignore[no-untyped-def]
    """Return the correlation of the pixels between these rows and columns, where at least half of them lie inside."""
    n, a, b, aa, bb, ab = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(top, bottom):
        for j in range(left, right):
            if inside[i, j]:
                n += 1
                p, q = one[i, j], other[i, j]
                a, b, aa, bb, ab = a + p, b + q, aa + p * p, bb + q * q, ab + p * q
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
            for j in range(width):
                if inside[i, j]:
                    t, p, q = trust[i, j], needle[i, j], laid[i, j]
                    n, a, b, aa, bb = n + t, a + t * p, b + t * q, aa + t * p * p, bb + t * q * q
        a, b = a / n, b / n
        own, its = np.sqrt(max(aa / n - a * a, _FLOOR)), np.sqrt(max(bb / n - b * b, _FLOOR))
        spread = 0.0
        for i in range(height):
            for j in range(width):
                if inside[i, j]:
                    spread += trust[i, j] * abs((needle[i, j] - a) / own - (laid[i, j] - b) / its)
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
    slope = np.empty(6)
    for p in range(6):
        right[p] = 0
        for q in range(6):
            normal[p, q] = 0
    for i in range(height):
        for j in range(width):
            if not inside[i, j]:
                continue
            error = (needle[i, j] - a) / own - (laid[i, j] - b) / its
            t = 1 / (1 + (error / scale) ** 2)
            t *= t
            trust[i, j] = t
            above, below = max(i - 1, 0), min(i + 1, height - 1)
            before, after = max(j - 1, 0), min(j + 1, width - 1)
            dy = (laid[below, j] - laid[above, j]) / (below - above) * height / its
            dx = (laid[i, after] - laid[i, before]) / (after - before) * width / its
            u, v = (i + 0.5) / height - 0.5, (j + 0.5) / width - 0.5
            slope[0], slope[1], slope[2] = dy, dy * u, dy * v
            slope[3], slope[4], slope[5] = dx, dx * u, dx * v
            for p in range(6):
                right[p] += t * slope[p] * error
                for q in range(p, 6):
                    normal[p, q] += t * slope[p] * slope[q]
    for p in range(6):
        for q in range(p):
            normal[p, q] = normal[q, p]
        normal[p, p] = normal[p, p] * 1.01 + 1.0


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
    height, width = picture.shape
    blurred = picture
    for _ in range(2):
        sums = _sums(blurred)
        blurred = np.empty_like(picture)
        for i in range(height):
            for j in range(width):
                y, x = max(i - 2, 0), max(j - 2, 0)
                last, end = min(i + 3, height), min(j + 3, width)
                total = sums[last, end] - sums[y, end] - sums[last, x] + sums[y, x]
                blurred[i, j] = total / ((last - y) * (end - x))
    for i in range(height):
        for j in range(width):
            blurred[i, j] = picture[i, j] - blurred[i, j]
    return blurred


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
