"""The built-in descriptor: a compact network trained to know a photo's edited copies, on 64 x 64 grey pixels."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from .network import Descriptor

WEIGHTS = Path(__file__).with_name("builtin.safetensors")

_BATCH = 64  # always of this shape: other shapes may come with other sums, and so may other places in it


class Builtin:
    """Edited copies of a photo, mirrored ones too, have a high cosine; see the model card beside the weights."""

    side = 64
    frame = None
    dim = 256
    similarity = 0.7  # with what alignment adds, from which two images are compared in detail
    gain = 0.9

    @cached_property
    def weights(self) -> str:
        """The xxh3-128 digest of the weights file."""
        return xxhash.xxh3_128_hexdigest(WEIGHTS.read_bytes())

    @property
    def identity(self) -> str:
        """What shapes the numbers: the weights and how pixels are brought to them."""
        return f"builtin/{self.weights}/grey {self.side}x{self.side}, standardised"

    @cached_property
    def _network(self) -> Descriptor:
        # torch takes seconds to import: processes that never encode do without
        from .network import load

        return load(WEIGHTS)

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, 256) float32 rows of unit length for grey (N, 64, 64) images."""
        from .network import encode

        found = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            padded = np.concatenate([batch, np.zeros((_BATCH - len(batch), *batch.shape[1:]), np.uint8)])
            found[start : start + len(batch)] = encode(self._network, padded)[: len(batch)]
        return found
