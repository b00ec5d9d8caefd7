"""Text embeddings and latents changed in a training step: Gaussian noise, mix-up, dual fusion.

`seeds` are the samples' `sample["seed"]`, a tensor (B,) or a list, best on the CPU: all draws are made there, in
float32, so that they are the same on every device.  Every change keeps shape, dtype, device and gradient.  NaN stays in
its own row, so masked samples may be made `harmless` after or before; `mix_up` needs their `loss_weight` for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import ConfigError, InputError, in_one_line
from ..insertions import seeded

if TYPE_CHECKING:
    from PIL import Image

Seeds = Sequence[int] | torch.Tensor

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def add_noise(embeddings: torch.Tensor, seeds: Seeds, scale: float = 0.1) -> torch.Tensor:
    """Return embeddings (B, ...) plus `scale` times noise from N(0, 1) in every element (GN, Somepalli et al. 2023).

    A sample's noise depends on its seed and its embedding's shape: that of token states and of a pooled embedding are
    independent.  Raises ConfigError for a negative scale or another number of seeds.
    """
    if not scale >= 0:
        raise ConfigError(f"add_noise(scale={scale}): 0 or more")
    shape = tuple(embeddings.shape[1:])
    drawn = [seeded(seed, "noise", str(shape)).standard_normal(shape, np.float32) for seed in _seeds(seeds, embeddings)]
    noise = torch.from_numpy(np.stack(drawn)).to(embeddings.device)
    return (embeddings.float() + scale * noise).to(embeddings.dtype)


def mix_up(
    embeddings: torch.Tensor, seeds: Seeds, alpha: float, loss_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return embeddings (B, ...), each mixed with another sample's: m e_i + (1 - m) e_j.

    m is drawn once for the batch from Beta(alpha, 1), whose mean is alpha / (alpha + 1), and the j are a random
    permutation, in which a sample may be its own partner.  So it is in Somepalli et al.'s code; their paper names no
    alpha, and neither is there a default here.  The draws depend on the seeds in the batch, not on their order, and are
    the same for every tensor of one batch.  A sample of weight 0 in `loss_weight` keeps its own embedding and is
    nobody's partner, as if it were not there.  Raises ConfigError for an alpha of 0 or less and shapes that do not fit.
    """
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"mix_up(alpha={alpha}): above 0, and finite")
    listed = _seeds(seeds, embeddings)
    kept = np.ones(len(listed), bool)
    if loss_weight is not None:
        if len(loss_weight) != len(listed):
            raise ConfigError(f"{len(loss_weight)} weights for {len(listed)} embeddings: one each")
        kept = (loss_weight != 0).reshape(len(listed), -1).any(1).cpu().numpy()
    places = np.array(sorted(np.flatnonzero(kept), key=listed.__getitem__), np.int64)
    random = seeded(0, "mix-up", *(listed[i] for i in places))
    share, partner = random.beta(alpha, 1), np.arange(len(listed))
    partner[places] = random.permutation(places)
    return torch.lerp(embeddings[torch.from_numpy(partner).to(embeddings.device)], embeddings, share)


def dual_fusion(
    latents: torch.Tensor,
    states: torch.Tensor,
    object_latents: torch.Tensor,
    object_states: torch.Tensor,
    latent_weight: float = 0.1,
    text_weight: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and text states fused with those of object images: (1 - w) own + w object (Li et al.).

    Take noised latents and the target from the fused latents, as `MaskedLoss` does when it is given them.  The object's
    text is " with " and its class, as `ObjectPool.draw` returns it, through the same text encoder; a pooled embedding
    is fused by `torch.lerp(pooled, object_pooled, text_weight)`.  Raises ConfigError for weights outside of 0 to 1, and
    for shapes that differ.
    """
    for name, weight in (("latent_weight", latent_weight), ("text_weight", text_weight)):
        if not 0 <= weight <= 1:
            raise ConfigError(f"dual_fusion({name}={weight}): from 0 to 1")
    for what, own, other in (("latents", latents, object_latents), ("states", states, object_states)):
        if own.shape != other.shape:
            raise ConfigError(f"{what} {tuple(own.shape)} and the objects' {tuple(other.shape)} differ: encode alike")
    return (
        torch.lerp(latents, object_latents.to(latents), latent_weight),
        torch.lerp(states, object_states.to(states), text_weight),
    )


class ObjectPool:
    """Images of single objects with their classes, for `dual_fusion`; picklable, files are read when drawn."""

    def __init__(self, files: Sequence[tuple[str | Path, str]]) -> None:
        """Take pairs of an image file and its class; raises ConfigError for none."""
        if not files:
            raise ConfigError("ObjectPool: there is no image of an object")
        self.files = [(Path(file), label) for file, label in files]

    @classmethod
    def folder(cls, path: str | Path) -> ObjectPool:
        """Return the pool of a folder with one folder of images a class; underscores in its name are spaces.

        Raises ConfigError where there is none.
        """
        files = sorted(p.relative_to(path) for p in Path(path).glob("*/**/*") if p.suffix.lower() in _IMAGES)
        if not files:
            raise ConfigError(f"{path}: holds no folder with images; ObjectPool.folder takes one folder a class")
        return cls([(Path(path) / file, file.parts[0].replace("_", " ")) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, seed: int) -> tuple[Image.Image, str]:
        """Return an RGB image, drawn uniformly by a sample's seed, and the text " with " and its class.

        Raises InputError for a file that is no image.
        """
        from PIL import Image

        file, label = self.files[seeded(int(seed), "object").integers(len(self.files))]
        try:
            with Image.open(file) as image:
                return image.convert("RGB"), f" with {label}"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise InputError(f"{file}: cannot be read as an image of {label!r}: {in_one_line(e)}") from e


def _seeds(seeds: Seeds, embeddings: torch.Tensor) -> list[int]:
    listed: list[int] = seeds.tolist() if isinstance(seeds, torch.Tensor) else [int(seed) for seed in seeds]
    if len(listed) != len(embeddings):
        raise ConfigError(f"{len(listed)} seeds for {len(embeddings)} embeddings: one each, sample['seed']")
    return listed
