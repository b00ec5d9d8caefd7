"""An encoder of the user's own, by the name of a function that returns it."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError, in_one_line
from ..images import Frame


@lru_cache(4)
def own_encoder(spec: str) -> Own:
    """Return what `package.module:function` returns; raises ConfigError where it is no encoder."""
    module, _, name = spec.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        made = factory()
    except Exception as e:  # the user's code raises what it likes
        cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
        raise ConfigError(f"images.encoder = {spec!r}: cannot be imported and called ({cause})") from e
    return Own(spec, made)


class Own:
    """The user's encoder, with what it says and what it returns checked."""

    def __init__(self, spec: str, encoder: Any) -> None:
        self._spec, self._encoder = spec, encoder
        self.side: int = self._get("side", lambda v: type(v) is int and v > 0, "an int over 0")
        self.dim: int = self._get("dim", lambda v: type(v) is int and v > 0, "an int over 0")
        self.frame: Frame | None = self._get("frame", lambda v: v is None or isinstance(v, Frame), "a Frame or None")
        self.similarity: float | None = self._get(
            "similarity", lambda v: v is None or (isinstance(v, float) and 0 < v <= 1), "a float to 1, over 0, or None"
        )
        self.identity: str = self._get("identity", lambda v: isinstance(v, str) and v, "a text that is not empty")
        self._get("encode", callable, "a method")

    def _get(self, name: str, fits: Any, what: str) -> Any:
        value = getattr(self._encoder, name, Ellipsis)
        if value is Ellipsis or not fits(value):
            got = "is missing" if value is Ellipsis else f"is {value!r}"
            raise ConfigError(f"images.encoder = {self._spec!r}: {name} {got}; an encoder's is {what}")
        return value

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the rows that the user's encoder returns; raises ModelError unless they are of unit length."""
        rows = np.asarray(self._encoder.encode(images))
        wanted = (len(images), self.dim)
        if rows.shape != wanted or rows.dtype.kind != "f":
            raise ModelError(f"{self._spec}: encode returned {rows.dtype} {rows.shape}, not float32 {wanted}")
        lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
        if not (abs(lengths - 1) < 0.01).all():
            wrong = lengths[~(abs(lengths - 1) < 0.01)][0]
            raise ModelError(f"{self._spec}: encode returned a row of length {wrong:.3g}; rows are of length 1")
        return rows.astype(np.float32)
