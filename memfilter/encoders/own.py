"""An encoder of the user's own, of images or of captions, by the name of a function that returns it."""

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
    return Own(spec, _made("images.encoder", spec))


@lru_cache(4)
def own_caption_encoder(spec: str) -> OwnCaptions:
    """Return what `package.module:function` returns; raises ConfigError where it is no encoder of captions."""
    return OwnCaptions(spec, _made("captions.encoder", spec))


def _made(key: str, spec: str) -> Any:
    module, _, name = spec.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
        return factory()
    except Exception as e:  # the user's code raises what it likes
        cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
        raise ConfigError(f"{key} = {spec!r}: cannot be imported and called ({cause})") from e


class _Checked:
    """An encoder of the user's, with what it says and what it returns checked."""

    key: str

    def __init__(self, spec: str, encoder: Any) -> None:
        self._spec, self._encoder = spec, encoder
        self.dim: int = self._get("dim", lambda v: type(v) is int and v > 0, "an int over 0")
        self.similarity: float | None = self._get(
            "similarity", lambda v: v is None or (isinstance(v, float) and 0 < v <= 1), "a float to 1, over 0, or None"
        )
        self.identity: str = self._get("identity", lambda v: isinstance(v, str) and v, "a text that is not empty")
        self._get("encode", callable, "a method")

    def _get(self, name: str, fits: Any, what: str) -> Any:
        value = getattr(self._encoder, name, Ellipsis)
        if value is Ellipsis or not fits(value):
            got = "is missing" if value is Ellipsis else f"is {value!r}"
            raise ConfigError(f"{self.key} = {self._spec!r}: {name} {got}; an encoder's is {what}")
        return value

    def _rows(self, inputs: Any, zeros: bool) -> npt.NDArray[np.float32]:
        rows = np.asarray(self._encoder.encode(inputs))
        wanted = (len(inputs), self.dim)
        if rows.shape != wanted or rows.dtype.kind != "f":
            raise ModelError(f"{self._spec}: encode returned {rows.dtype} {rows.shape}, not float32 {wanted}")
        lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
        wrong = ~((abs(lengths - 1) < 0.01) | (zeros & (lengths == 0)))
        if wrong.any():
            raise ModelError(
                f"{self._spec}: encode returned a row of length {lengths[wrong][0]:.3g}; rows are of length 1"
            )
        return rows.astype(np.float32)


class Own(_Checked):
    """The user's encoder of images."""

    key = "images.encoder"

    def __init__(self, spec: str, encoder: Any) -> None:
        self._spec, self._encoder = spec, encoder
        self.side: int = self._get("side", lambda v: type(v) is int and v > 0, "an int over 0")
        self.frame: Frame | None = self._get("frame", lambda v: v is None or isinstance(v, Frame), "a Frame or None")
        super().__init__(spec, encoder)

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the rows that the user's encoder returns; raises ModelError unless they are of unit length."""
        return self._rows(images, zeros=False)


class OwnCaptions(_Checked):
    """The user's encoder of captions."""

    key = "captions.encoder"

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Return the rows that the user's encoder returns; raises ModelError unless of unit length, or zeros."""
        return self._rows(texts, zeros=True)
