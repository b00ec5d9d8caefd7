"""Image encoders by spec string: uint8 images -> L2-normalised embeddings whose cosine is their likeness."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .builtin import Builtin


class Encoder(Protocol):
    """What a stage needs of an image encoder.

    `side` is the size in pixels of the grey square images that it takes, `dim` the number of components that it
    returns, and `identity` names everything that shapes its numbers.  Two images are copies where their cosine and
    `gain` times the evidence of their alignment come to `similarity` or more.
    """

    side: int
    dim: int
    similarity: float
    gain: float
    identity: str

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length for grey (N, side, side) images."""
        ...


def image_encoder(spec: str | None) -> Encoder | None:
    """Return the encoder that a spec string names, None for None; raises ConfigError for an unknown one."""
    if spec is None:
        return None
    if spec == "builtin":
        return Builtin()
    raise ConfigError(f"images.encoder = {spec!r}: unknown; it is 'builtin', or null for no embeddings")
