"""Groups of blank images, which are compared by their looks: grey levels of 8 x 8 cells, and the mean colour.

A look is 66 numbers: the mean grey level of each cell, and the mean blue and red difference of the image.  Two looks
are alike where no number differs by more than some levels.  Then the darkest and the lightest cell of any square of
cells differ by no more either.  A tree splits the looks by single numbers and by such values, and so finds what may be
alike among hundreds of thousands of looks that are not.
"""

from __future__ import annotations

from math import floor

import numpy as np
import numpy.typing as npt

from .compiled import compiled
from .records import LOOK_SIDE, Ints

ALIKE = 6
"""Levels of 255 by which two like looks may differ, where the configuration asks for no other score."""

DISTANT = 12
"""Levels by which two looks differ whose score is 0; like ones of 6 levels come to the score 0.5."""

Looks = npt.NDArray[np.int16]

_ONE_BY_ONE = 2000  # up to this number comparing each keeper with all is quicker than compiling
_LEAF = 32  # looks that are not split further
_PRUNED = 0.05  # share of all pairs that a split must keep apart


def most_levels(threshold: float) -> int:
    """Return by how many levels two looks may differ whose score, 1 - levels / 12, reaches the threshold."""
    return floor(DISTANT * (1 - threshold) + 1e-9)


def join_looks(looks: Looks, alike: int = ALIKE) -> Ints:
    """Return of each look, the best first, the place of the first one like it that itself joins none."""
    return join_one_by_one(looks, alike) if len(looks) <= _ONE_BY_ONE else join_by_tree(looks, alike)


def join_one_by_one(looks: Looks, alike: int = ALIKE) -> Ints:
    """Do as `join_looks`, in time that grows with the number of keepers times that of looks."""
    joined = np.empty(len(looks), np.int64)
    left = np.arange(len(looks))
    while len(left):
        near = np.abs(looks[left] - looks[left[0]]).max(1) <= alike
        joined[left[near]] = left[0]
        left = left[~near]
    return joined


def join_by_tree(looks: Looks, alike: int = ALIKE) -> Ints:
    """Do as `join_looks`, comparing each look only with keepers in those leaves that could hold one like it."""
    if not len(looks):
        return np.empty(0, np.int64)
    values = _values(looks)
    steps = values.size
    tree = compiled(_split, steps)(values, alike, _LEAF, _PRUNED)
    joined: Ints = compiled(_join, steps)(values, looks.shape[1], alike, *tree)
    return joined


def _values(looks: Looks) -> Looks:
    """Return the levels of each look, then the darkest and the lightest cell of its squares of 2, 4 and 8 cells."""
    found = [looks]
    for side in (2, 4, 8):
        squares = looks[:, : LOOK_SIDE**2].reshape(-1, LOOK_SIDE // side, side, LOOK_SIDE // side, side)
        found += [squares.min((2, 4)).reshape(len(looks), -1), squares.max((2, 4)).reshape(len(looks), -1)]
    return np.concatenate(found, axis=1)


def _split(values: Looks, alike: int, leaf: int, pruned: float) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints]:
    """Return a tree over the rows: of each row its leaf; of each node its first place among the rows, its column (-1 in
    a leaf), the greatest value on its left, the least on its right, and its left child, which the right one follows.
    """
    n, columns = values.shape
    rows, leaf_of = np.arange(n), np.zeros(n, np.int64)
    start, end, child = np.zeros(2 * n, np.int64), np.zeros(2 * n, np.int64), np.zeros(2 * n, np.int64)
    column, low, high = np.full(2 * n, -1), np.zeros(2 * n, np.int64), np.zeros(2 * n, np.int64)
    below = np.zeros((columns, 257), np.int64)  # of each column, how many values are less than 0, 1, ... 256
    end[0], node, nodes = n, 0, 1
    while node < nodes:
        first, last = start[node], end[node]
        size = last - first
        gain = size * size * pruned
        if size > leaf:
            below[:] = 0
            for at in range(first, last):
                for k in range(columns):
                    below[k, values[rows[at], k] + 1] += 1
            for k in range(columns):
                v = -1  # the greatest value so far, of which `w` is the next one
                for w in range(256):
                    below[k, w + 1] += below[k, w]
                for w in range(256):
                    left = below[k, w]
                    if below[k, w + 1] == left:
                        continue
                    # pairs across that are seen to be unlike from the left one, and from the right one
                    apart = below[k, max(w - alike, 0)] * (size - left)
                    apart += (size - below[k, min(v + alike + 1, 256)]) * left
                    if apart > gain:
                        gain, column[node], low[node], high[node] = apart, k, v, w
                    v = w
        i, j = first, last
        if column[node] < 0:
            for at in range(first, last):
                leaf_of[rows[at]] = node
        else:
            while i < j:
                if values[rows[i], column[node]] <= low[node]:
                    i += 1
                else:
                    j -= 1
                    rows[i], rows[j] = rows[j], rows[i]
            child[node] = nodes
            start[nodes], end[nodes], start[nodes + 1], end[nodes + 1] = first, i, i, last
            nodes += 2
        node += 1
    return leaf_of, start[:nodes], column[:nodes], low[:nodes], high[:nodes], child[:nodes]


def _join(
    values: Looks, cells: int, alike: int, leaf_of: Ints, start: Ints, column: Ints, low: Ints, high: Ints, child: Ints
) -> Ints:
    """Visit the rows one by one, and keep in each leaf the list of its keepers."""
    n = len(values)
    joined, kept, count = np.arange(n), np.zeros(n, np.int64), np.zeros(len(start), np.int64)
    stack = np.zeros(len(start), np.int64)
    for row in range(n):
        best, depth = n, 1
        stack[0] = 0
        while depth:
            depth -= 1
            node = stack[depth]
            if column[node] >= 0:
                value = values[row, column[node]]
                if value - alike <= low[node]:
                    stack[depth] = child[node]
                    depth += 1
                if value + alike >= high[node]:
                    stack[depth] = child[node] + 1
                    depth += 1
                continue
            for at in range(start[node], start[node] + count[node]):
                keeper = kept[at]
                if keeper >= best:
                    break
                k = 0
                while k < cells and abs(values[row, k] - values[keeper, k]) <= alike:
                    k += 1
                if k == cells:
                    best = keeper
        if best < n:
            joined[row] = best
        else:
            kept[start[leaf_of[row]] + count[leaf_of[row]]] = row
            count[leaf_of[row]] += 1
    return joined
