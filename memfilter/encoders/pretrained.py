"""A pretrained network as an image encoder: what is known of it before its weights are read, and its embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..config import digest_of
from ..errors import ModelError, in_one_line
from ..images import Frame
from . import weights

_BATCH = {"cpu": 8, "cuda": 64}  # of one size always: a row's neighbours change it by rounding at most


@dataclass(frozen=True)
class Recipe:
    """How to make an encoder of a file of weights.

    `settings` is all else that shapes the network, and goes into the identity.  `mean` and `std` are those of RGB
    from 0 to 1.  `build` returns the network with its weights, on the CPU: (N, 3, side, side) -> (N, dim).
    """

    kind: str
    settings: Any
    file: Path
    side: int
    frame: Frame
    mean: tuple[float, ...]
    std: tuple[float, ...]
    similarity: float | None
    libraries: tuple[str, ...]
    build: Callable[[], nn.Module]


class Pretrained:
    """The embeddings of a pretrained network, on the GPU in half precision if there is one, else on the CPU.

    The weights are read when the first embedding, or its size, is asked for.
    """

    def __init__(self, recipe: Recipe) -> None:
        weights.check(recipe.file)
        self._recipe = recipe
        self.side, self.frame, self.similarity = recipe.side, recipe.frame, recipe.similarity
        self.weights = weights.digest(recipe.file)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = "float16" if self._device.type == "cuda" else "float32"
        about = [recipe.settings, self.preprocessing, [_version(name) for name in (*recipe.libraries, "torch")]]
        shape = f"{self.side}px-{self.frame.mode}-{self.frame.edge}-{self.frame.filter}"
        where = f"{self.dtype}-{self._device.type}"
        self.identity = f"{recipe.kind}/sha256-{self.weights}/{shape}/{where}/{digest_of(about)}"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done with the pixels before the network sees them, as the manifest tells it."""
        recipe = self._recipe
        return {"side": self.side, **asdict(self.frame), "mean": list(recipe.mean), "std": list(recipe.std)}

    @cached_property
    def dim(self) -> int:
        """The number of components of an embedding."""
        return int(self._rows(np.zeros((1, self.side, self.side, 3), np.uint8)).shape[1])

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length for RGB (N, side, side, 3) images.

        Raises ModelError for weights that cannot be loaded or give no finite numbers.
        """
        size = _BATCH[self._device.type]
        rows = np.empty((len(images), self.dim), np.float32)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            padded = np.zeros((size, *images.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
            rows[start : start + size] = self._rows(padded).cpu().numpy()[: len(batch)]
        if not np.isfinite(rows).all():
            raise ModelError(f"{self._recipe.file}: an embedding is not finite; its weights are damaged")
        return rows

    def _rows(self, images: npt.NDArray[np.uint8]) -> Tensor:
        mean, std = (torch.tensor(v, device=self._device)[:, None, None] for v in (self._recipe.mean, self._recipe.std))
        with torch.inference_mode(), one_thread():
            # a view of (N, H, W, C) memory: channels last, as convolutions like it
            levels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
            inputs = (levels.float() / 255 - mean) / std
            rows = self._forward(inputs, self._device.type == "cuda")
            finite = rows.isfinite().all(1, keepdim=True)
            if not finite.all():  # over the range of half precision; the others' numbers stay
                rows = torch.where(finite, rows, self._forward(inputs, False))
            return rows

    def _forward(self, inputs: Tensor, half: bool) -> Tensor:
        with torch.autocast(self._device.type, torch.float16, enabled=half):
            rows: Tensor = self._network(inputs)
        return nn.functional.normalize(rows.float())

    @cached_property
    def _network(self) -> nn.Module:
        recipe = self._recipe
        try:
            network = recipe.build()
        except ModelError:
            raise
        except Exception as e:  # the libraries raise what they like
            cause = in_one_line(e)[:300]
            raise ModelError(f"{recipe.file}: not the weights of {recipe.kind}: {type(e).__name__}: {cause}") from e
        if weights.digest(recipe.file) != self.weights:
            raise ModelError(f"{recipe.file}: has changed since the run began; run the same command again")
        # Module's own signature takes no memory format
        placed: nn.Module = network.eval().requires_grad_(False).to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed


@cache
def _version(library: str) -> str:
    return version(library)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread on the CPU: sums in another order are other numbers, and workers share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
