"""Loops over numpy arrays, compiled where they are long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

F = TypeVar("F", bound=Callable[..., Any])

_WORTH = 100_000  # steps that take as long as importing numba and compiling


def compiled(function: Callable[P, R], steps: int) -> Callable[P, R]:
    """Return the function, compiled by numba where it takes so many steps that this is quicker."""
    return _compile(function) if steps > _WORTH else function


@cache
def _compile(function: Callable[P, R]) -> Callable[P, R]:
    from numba import njit

    found: Callable[P, R] = njit(nogil=True)(function)
    return found


def kernel(function: F, fastmath: bool = False) -> F:
    """Return the function, always compiled, free of the interpreter's lock, its machine code kept where it may be.

    Never in a run directory: machine code is unpickled when it is read.
    """
    from numba import njit

    try:
        return njit(cache=True, nogil=True, fastmath=fastmath)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder to keep the machine code in
        return njit(nogil=True, fastmath=fastmath)(function)  # type: ignore[no-any-return]
