"""The bits of imagededup's `phash` for many small images at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .records import THUMBNAIL_SIDE

_KEPT = 8  # frequencies in each direction
_DOUBT = 1e-3  # coefficients reach 10^6: two ways of summing them differ by less than a ten-thousandth of this
_FREQUENCY, _PLACE = np.ogrid[:_KEPT, :THUMBNAIL_SIDE]
_COSINES = 2 * np.cos(np.pi * _FREQUENCY * (2 * _PLACE + 1) / (2 * THUMBNAIL_SIDE))


def phash_bits(small: npt.NDArray[np.uint8], exact: Callable[[Any], Any]) -> npt.NDArray[np.bool_]:
    """Return (N, 64) bits of (N, 32, 32) grey images: those that `exact`, imagededup's own function, gives of each.

    A bit tells whether a coefficient of the cosine transform is at least the median.  Where another one lies so near
    the median that rounding could decide, as in flat and symmetrical images, `exact` is asked.
    """
    rows = small.reshape(-1, THUMBNAIL_SIDE) @ _COSINES.T
    coefficients = (_COSINES @ rows.reshape(-1, THUMBNAIL_SIDE, _KEPT)).reshape(-1, _KEPT**2)
    middle = (_KEPT**2 - 1) // 2
    median = np.partition(coefficients[:, 1:], middle, axis=1)[:, middle]
    above = coefficients - median[:, None]
    bits: npt.NDArray[np.bool_] = above >= 0
    for i in np.flatnonzero((np.abs(above) < _DOUBT).sum(1) > 1):
        bits[i] = np.ravel(exact(small[i]))
    return bits
