"""Loops over numpy arrays, compiled where they are long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_WORTH = 100_000  # steps that take as long as importing numba and compiling


def compiled(function: Callable[P, R], steps: int) -> Callable[P, R]:
    """Return the function, compiled by numba where it takes so many steps that this is quicker."""
    return _compile(function) if steps > _WORTH else function


@cache
def _compile(function: Callable[P, R]) -> Callable[P, R]:
    from numba import njit

    found: Callable[P, R] = njit(nogil=True)(function)
    return found
