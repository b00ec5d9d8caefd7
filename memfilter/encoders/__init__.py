"""Image encoders by spec string: uint8 images -> L2-normalised embeddings whose cosine is their likeness."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..images import Frame
from .builtin import Builtin

UNCALIBRATED = 0.95
"""The cosine from which images are candidates for an encoder with which nobody has measured it: a cautious one."""


class Encoder(Protocol):
    """What a stage needs of an image encoder; each of the properties may be a plain attribute.

    One that has a `gain` besides, as the built-in one, takes the alignment of thumbnails into account: two images are
    candidates where their cosine and `gain` times the evidence of their alignment come to `similarity` or more.
    Candidates are compared in detail, which decides.
    """

    side: int
    """Pixels on a side of the square images that it takes."""

    @property
    def identity(self) -> str:
        """Names everything that shapes its numbers."""
        ...

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
        """The cosine from which two images are compared in detail, None where nobody has measured it."""
        ...

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length for (N, side, side) grey or (N, side, side, 3) RGB images."""
        ...


def image_encoder(spec: str | None) -> Encoder | None:
    """Return the encoder that a spec string names, None for None; cheap: no weights are read, but for their digest.

    Raises ConfigError for a spec that is unknown or needs a library that is not installed, ModelError for weights that
    are not here and cannot be had.
    """
    if spec is None:
        return None
    if spec == "builtin":
        return _builtin
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


_builtin = Builtin()  # its weights are read when it first encodes, once a process
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
