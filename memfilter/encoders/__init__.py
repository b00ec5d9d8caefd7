"""Image encoders by spec string: uint8 images -> L2-normalised embeddings whose cosine is their likeness."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..images import Frame

UNCALIBRATED = 0.95
"""The cosine at which images are copies for an encoder with which nobody has measured it: a cautious one."""


class Encoder(Protocol):
    """What a stage needs of an image encoder; each of the properties may be a plain attribute."""

    side: int
    """Pixels on a side of the square images that it takes."""

    identity: str
    """Names everything that shapes its numbers."""

    @property
    def dim(self) -> int:
        """The number of components of an embedding."""
        ...

    @property
    def frame(self) -> Frame | None:
        """How an image becomes the RGB square that it takes; None for one that takes it whole and in grey."""
        ...

    @property
    def similarity(self) -> float | None:
        """The cosine at or above which two images are copies, None where nobody has measured it."""
        ...

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length for (N, side, side) grey or (N, side, side, 3) RGB images."""
        ...


class Builtin:
    """A classical descriptor: gradient orientations in a 4x4 grid of cells, beside a coarse thumbnail.

    Both parts have their mean over the components removed, so that unlike images are near orthogonal.  Brightness,
    contrast, resolution and compression hardly move it; crops over a few per cent, rotations and mirror images do.
    """

    side = 32
    frame = None
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
    """Return the encoder that a spec string names, None for None; cheap: no weights are read, but for their digest.

    Raises ConfigError for a spec that is unknown or needs a library that is not installed, ModelError for weights that
    are not here and cannot be had.
    """
    if spec is None:
        return None
    if spec == "builtin":
        return Builtin()
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise ConfigError(f"images.encoder = {spec!r}: unknown; it is {_FORMS}, or null for no embeddings")
    if kind not in _KINDS:
        from .own import own_encoder

        return own_encoder(spec)
    from .pretrained import Pretrained

    encoder = Pretrained(_recipe(kind, rest))
    if encoder.identity not in _warm:
        _warm.clear()  # one network at a time
        _warm[encoder.identity] = encoder
    warm: Encoder = _warm[encoder.identity]
    return warm


_warm: dict[str, Any] = {}
_KINDS = ("sscd", "timm", "open_clip", "hf-hub", "local-dir")
_FORMS = (
    "'builtin', 'sscd:FILE', 'timm:NAME', 'open_clip:ARCH/TAG', 'hf-hub:ORG/NAME', 'local-dir:FOLDER' or "
    "'package.module:function'"
)


def _recipe(kind: str, rest: str) -> Any:
    from . import libraries, sscd  # only now: they import torch

    if kind == "sscd":
        return sscd.recipe(Path(rest))
    if kind in ("timm", "open_clip") and rest.startswith(("hf-hub:", "local-dir:")):
        kind, _, rest = rest.partition(":")
    named = {"timm": libraries.timm_named, "open_clip": libraries.open_clip_named, "hf-hub": libraries.on_hub}
    return named[kind](rest) if kind in named else libraries.in_folder(Path(rest))


def public_name(spec: str | None) -> str | None:
    """Return a spec without the folders of this machine, as the manifest tells it."""
    if spec is None:
        return None
    kind, colon, rest = spec.rpartition(":")
    if kind == "sscd" or kind.endswith("local-dir") or (kind == "open_clip" and Path(rest).is_absolute()):
        rest = Path(rest).resolve().name
    return kind + colon + rest


def described(encoder: Encoder, similarity: float) -> dict[str, Any]:
    """Return what the manifest tells of an encoder and of the threshold in use."""
    preprocessing = getattr(encoder, "preprocessing", {"side": encoder.side, "colour": encoder.frame is not None})
    return {
        "identity": encoder.identity,
        "weights": getattr(encoder, "weights", None),  # sha256, of those that have a file of them
        "preprocessing": preprocessing,
        "similarity": similarity,
    }
