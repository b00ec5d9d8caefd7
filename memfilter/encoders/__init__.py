"""Image encoders by spec string: uint8 images -> L2-normalised embeddings whose cosine is their likeness."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError


class Encoder(Protocol):
    """What a stage needs of an image encoder.

    `side` is the size in pixels of the grey square images that it takes, `dim` the number of components that it
    returns, `similarity` the cosine at or above which two images are copies, and `identity` names everything that
    shapes its numbers.
    """

    side: int
    dim: int
    similarity: float
    identity: str

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length for grey (N, side, side) images."""
        ...


class Builtin:
    """A classical descriptor: gradient orientations in a 4x4 grid of cells, beside a coarse thumbnail.

    Both parts have their mean over the components removed, so that unlike images are near orthogonal.  Brightness,
    contrast, resolution and compression hardly move it; crops over a few per cent, rotations and mirror images do.
    """

    side = 32
    cells = 4
    orientations = 8
    dim = cells * cells * orientations + 64
    similarity = 0.95
    identity = "builtin/gradients-1"

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length."""
        n = len(images)
        grey = images.astype(np.float32)
        grey -= grey.mean((1, 2), keepdims=True)
        dy, dx = np.gradient(grey, axis=(1, 2))
        strength = np.hypot(dx, dy)
        angle = np.arctan2(dy, dx) % np.float32(np.pi) * np.float32(self.orientations / np.pi)
        low = np.floor(angle)
        share = angle - low
        cell = self.side // self.cells
        histogram = np.zeros((n, self.cells, self.cells, self.orientations), np.float32)
        for k in range(self.orientations):
            # each gradient is divided between its two nearest orientations
            part = strength * (
                (low % self.orientations == k) * (1 - share) + ((low + 1) % self.orientations == k) * share
            )
            histogram[..., k] = part.reshape(n, self.cells, cell, self.cells, cell).sum((2, 4))
        gradients = np.sqrt(histogram.reshape(n, -1))
        coarse = grey.reshape(n, 8, self.side // 8, 8, self.side // 8).mean((2, 4)).reshape(n, -1)
        return _unit(np.concatenate([_unit(gradients - gradients.mean(1, keepdims=True)), _unit(coarse)], axis=1))


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    length = np.sqrt((rows * rows).sum(1, keepdims=True))
    unit: npt.NDArray[np.float32] = rows / np.maximum(length, np.float32(1e-6))
    return unit


def image_encoder(spec: str | None) -> Encoder | None:
    """Return the encoder that a spec string names, None for None; raises ConfigError for an unknown one."""
    if spec is None:
        return None
    if spec == "builtin":
        return Builtin()
    raise ConfigError(f"images.encoder = {spec!r}: unknown; it is 'builtin', or null for no embeddings")
