"""The compact residual network behind the built-in descriptor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SIDE = 64
DIM = 256
_WIDTHS = (24, 48, 96, 256)


class Descriptor(nn.Module):
    """Grey images of 64 x 64 -> unit vectors of 256 components whose cosine is high for copies.

    Takes (N, 1, 64, 64) float32 of mean 0 and deviation 1 each.  Three residual blocks halve the resolution in turn;
    generalised-mean pooling (exponent 3) and a linear layer follow, as in SSCD (Pizzi et al. 2022).
    """

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = _WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in zip(_WIDTHS[:-1], widths, strict=True)))
        self.head = nn.Linear(widths[-1], DIM)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 256) float32 rows of unit length."""
        maps = self.blocks(self.stem(images))
        pooled = maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
        return nn.functional.normalize(self.head(pooled))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.two(self.one(maps)) + self.skip(maps))


def standardised(grey: Tensor) -> Tensor:
    """Return (N, side, side) grey levels as (N, 1, side, side) of mean 0 and deviation 1 each; flat ones become 0."""
    levels = grey.float()
    levels = levels - levels.mean((1, 2), keepdim=True)
    return (levels / levels.std((1, 2), keepdim=True).clamp(min=1.0))[:, None]


def load(path: Path) -> Descriptor:
    """Return the network with the weights in a safetensors file, ready to encode on the processor."""
    network = Descriptor()
    weights = {name: value.float() for name, value in load_file(path).items()}
    network.load_state_dict(weights, strict=False)  # all but the counters of batches, which training alone uses
    return network.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(network: Descriptor, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return (N, 256) float32 rows of unit length for grey (N, 64, 64) images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # shards are what runs side by side
    try:
        inputs = standardised(torch.from_numpy(images)).contiguous(memory_format=torch.channels_last)
        found: npt.NDArray[np.float32] = network(inputs).numpy()
        return found
    finally:
        torch.set_num_threads(threads)
