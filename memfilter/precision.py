"""The noise floor of a precision below float32: how far its rounding may move a prediction magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .config import STEPS
from .denoisers import Denoiser
from .records import Floats

if TYPE_CHECKING:
    import torch

_CAPTIONS = [
    "a photo of a dog",
    "two people walk along a beach at sunset",
    "an oil painting of a ship in a storm",
    "a red car parked in front of a brick house",
    "a bowl of fruit on a wooden table",
    "portrait of an old woman, black and white",
    "a map of the city with streets and rivers",
    "a poster with large letters",
]


def rounding_errors(denoiser: Denoiser, exact: Denoiser) -> Floats:
    """Return of eight ordinary captions how far the working precision moves them, float32 (8,).

    That is ||d - d'||, where d = e(x, t, caption) - e(x, t, unconditional) comes from the model in its working
    precision and d' from the same model in float32, for one noise x at the schedule's first timestep.  The magnitude
    ||d|| of such a caption is wrong by at most this, and two captions of one meaning may be as far apart.
    """
    import torch

    x = torch.randn(exact.latent_shape, generator=torch.Generator().manual_seed(0))
    d = [_difference(one, x) for one in (denoiser, exact)]
    errors: Floats = (d[0] - d[1]).flatten(1).norm(dim=1).cpu().numpy()
    return errors.astype(np.float32)


def _difference(denoiser: Denoiser, x: torch.Tensor) -> torch.Tensor:
    import torch

    batch = x.to(denoiser.device, denoiser.dtype).expand(len(_CAPTIONS), *x.shape)
    timestep = denoiser.first_timestep(STEPS)
    with torch.inference_mode():
        conditions = denoiser.encode(_CAPTIONS), denoiser.unconditional(len(_CAPTIONS))
        conditional, unconditional = (denoiser.predict(batch, timestep, c).float() for c in conditions)
        return conditional - unconditional
