"""Pairs of pictures -> where the rows of one lie in the other, and where its columns do.

Pages, charts, code and tables are all lines: at 32 x 32, where `alignment` searches, a page lies on itself as well one
line further down, and a crop of it is not found again.  What makes them hard makes them easy: whoever crops, scales or
frames them moves rows along one axis and columns along the other.  So rows are laid on rows first, by what each shows
as a whole; then columns on columns, in rows that lie so; then rows once more.  Each is a search in one dimension, over
all scales and places.
"""

from __future__ import annotations

import numpy as np

from .alignment import _compiled, _fine

_WIDEST, _STEP = 16, 0.0175  # scales to either side of 1, and the logarithm of the distance of two
_SCALES = np.exp(np.arange(-_WIDEST, _WIDEST + 1) * _STEP)
_REACH = 26  # of 64 pixels, by which a centre may lie off the other's
_COVERED = 0.6  # share of either axis that must lie on the other's


@_compiled
def lay_by_axes(needle, hay, affine):  # type: ignore[no-untyped-def]
    """Fill in the map of rows and columns of a picture to those of another, both squares of one size."""
    down, across = np.zeros(2), np.zeros(2)
    one, other = _fine(needle), _fine(hay)
    turned, other_turned = np.ascontiguousarray(one.T), np.ascontiguousarray(other.T)
    if _alone(one, other, down) < _alone(turned, other_turned, across):
        _given(turned, other_turned, across, down)
    _given(one, other, down, across)
    _given(turned, other_turned, across, down)
    affine[:] = 0
    affine[0], affine[1], affine[3], affine[5] = down[0], down[1], across[0], across[1]


@_compiled
def _alone(one, other, found):  # type: ignore[no-untyped-def]
    """Find how rows lie on rows by their means and their texture; return how much that says."""
    own, its = _signs(one), _signs(other)
    return _search(_products(own, its), _squares(own), _squares(its), found)


@_compiled
def _given(one, other, down, found):  # type: ignore[no-untyped-def]
    """Find how columns lie on columns, where the rows lie so."""
    side = len(one)
    own, its = np.zeros_like(one), np.zeros_like(other)
    for i in range(side):
        row = int(np.floor(side * (down[0] + down[1] * ((i + 0.5) / side - 0.5))))
        if 0 <= row < side:
            own[i], its[i] = one[i], other[row]
    _search(_products(own, its), _squares(own), _squares(its), found)


@_compiled
def _signs(picture):  # type: ignore[no-untyped-def]
    """Return (2, side) the mean and the mean absolute level of each row, each of mean 0 and deviation 1."""
    side = len(picture)
    signs = np.zeros((2, side), np.float32)
    for i in range(side):
        for value in picture[i]:
            signs[0, i] += value
            signs[1, i] += abs(value)
    for k in range(2):
        signs[k] -= signs[k].mean()
        signs[k] /= np.sqrt((signs[k] * signs[k]).mean()) + np.float32(1e-3)
    return signs


@_compiled
def _products(own, its):  # type: ignore[no-untyped-def]
    """Return the products, summed over the rows, of each column with each of the other's, with room on both sides."""
    side = own.shape[1]
    products = np.zeros((side, side + 4 * _REACH), np.float32)
    for i in range(len(own)):
        for j in range(side):
            value, line, row = own[i, j], products[j, 2 * _REACH :], its[i]
            for k in range(side):
                line[k] += value * row[k]
    return products


@_compiled
def _squares(picture):  # type: ignore[no-untyped-def]
    """Return the sums of the squares of each column."""
    squares = np.zeros(picture.shape[1], np.float32)
    for row in picture:
        for j in range(len(row)):
            squares[j] += row[j] * row[j]
    return squares


@_compiled
def _search(products, own, its, found):  # type: ignore[no-untyped-def]
    """Find centre and scale at which the products along a line say most of a correlation; return how much."""
    side, places = len(own), 2 * _REACH + 1
    squares, padded, rows = _summed(own), np.zeros(products.shape[1], np.float32), np.empty(side, np.int64)
    padded[2 * _REACH : 2 * _REACH + side] = its
    along, its_squares = np.empty(places, np.float32), np.empty(places, np.float32)
    best = -1.0
    for scale in _SCALES:
        along[:], its_squares[:] = 0, 0
        for i in range(side):
            rows[i] = int(np.floor(side * (0.5 + scale * ((i + 0.5) / side - 0.5)))) + _REACH
            line, others = products[i, rows[i] :], padded[rows[i] :]
            for m in range(places):
                along[m] += line[m]
                its_squares[m] += others[m]
        first, end = side, side
        for m in range(places):  # the rows that lie on the other's are those from the first one on, up to the end
            while first and rows[first - 1] + m >= 2 * _REACH:
                first -= 1
            while end and rows[end - 1] + m >= 2 * _REACH + side:
                end -= 1
            if along[m] > 0 and min(1.0, scale) * (end - first) >= _COVERED * side:
                square = (squares[end] - squares[first]) * its_squares[m]
                says = (end - first) * -np.log(max(1 - along[m] * along[m] / (square + 1e-6), 1e-4))
                if says > best:
                    best, found[0], found[1] = says, 0.5 + (m - _REACH) / side, scale
    return best


@_compiled
def _summed(values):  # type: ignore[no-untyped-def]
    """Return the sums of all values before each place."""
    sums = np.zeros(len(values) + 1)
    for i in range(len(values)):
        sums[i + 1] = sums[i] + values[i]
    return sums
