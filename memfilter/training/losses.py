"""Losses that obey the manifest's `loss_weight`.

`masked_loss` is for loops that keep their own loss; `MaskedLoss` is the whole of a diffusers loop from the latents to
the loss, in which a masked sample can do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from . import ranks
from .online import OnlineMask, Step
from .schedules import WEIGHTINGS, Schedule, wide

Denominator = Literal["batch", "weights"]


def masked_loss(
    per_sample_loss: torch.Tensor, loss_weight: torch.Tensor, denominator: Denominator | torch.Tensor = "batch"
) -> torch.Tensor:
    """Return the sum of each sample's loss times its weight over the denominator, a scalar.

    Both have shape (B,); the loss is the mean over channels and pixels, after any min-SNR or SD3 weighting, and finite
    (0 times NaN is NaN; see `harmless`).  Spatial weights (B, 1, H, W) multiply a loss (B, C, H, W) before that mean.

    The denominator `batch` is B, so the other samples' gradients do not grow when one is masked.  `weights` is the mean
    over all processes of their sums of weights, so that the average of the processes' gradients is that of the weighted
    mean over the batches of all; every process has to take part.  With gradient accumulation it is the `total_weight`
    of the step's batches.  A sample of weight 0 gets a gradient of exactly zero, and a batch of them a zero loss with a
    graph, under each.  Raises ValueError for other shapes, and for weights on the CPU that are negative or NaN; on
    another device, where a look would make the host wait, such a weight makes the loss NaN.
    """
    shape = per_sample_loss.shape
    if loss_weight.shape != (shape if len(shape) == 1 else (*shape[:1], 1, *shape[2:])) or len(shape) not in (1, 4, 5):
        raise ValueError(
            f"per_sample_loss {tuple(per_sample_loss.shape)} and loss_weight {tuple(loss_weight.shape)} must both be "
            "(B,): average the loss over channels and pixels first; or (B, C, H, W) and (B, 1, H, W)"
        )
    weighted = of_samples(per_sample_loss * _valid(loss_weight).to(per_sample_loss))
    if isinstance(denominator, str):
        if denominator == "batch":
            return weighted.mean()
        if denominator != "weights":
            raise ValueError(f"denominator {denominator!r}: batch, weights, or the total_weight of a step's batches")
        denominator = total_weight(loss_weight.to(per_sample_loss.device))
    return weighted.sum() / denominator.to(weighted)


def total_weight(*loss_weights: torch.Tensor) -> torch.Tensor:
    """Return the denominator that makes the weights of one optimizer step add up to one: a scalar, never zero.

    `loss_weights` are those of this process's batches of the step, one for each accumulated backward pass.  It is the
    sum over them and over all processes, divided by the number of batches: losses divided by it, averaged over the
    processes and the accumulated passes as DDP and accelerate do, are the weighted mean.  Every process has to call it,
    on the device that its backend takes.
    """
    sums = [of_samples(weight.float()).sum() for weight in loss_weights]
    total = ranks.summed(torch.stack(sums).sum()) / (len(sums) * ranks.count())
    return torch.where(total > 0, total, 1.0)


def harmless(tensor: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
    """Return the tensor (B, ...) with zeros for the samples of weight 0.

    Whatever is NaN or infinite in them then reaches neither a denoiser nor its gradient: 0 times NaN is NaN.
    """
    return torch.where(wide(_trained(loss_weight), tensor.ndim), tensor, 0)


def check_finite(
    per_sample_loss: torch.Tensor, loss_weight: torch.Tensor, keys: Sequence[str] | npt.NDArray[np.str_] | None = None
) -> None:
    """Raise ValueError for a loss (B,) that is NaN or infinite in a sample that trains, and name it by its key.

    It makes the host wait for the device: call it where a step's loss is not finite, or once in a while.
    """
    trained = _trained(loss_weight)
    wrong = (~per_sample_loss.isfinite() & trained).nonzero()[:, 0].tolist()
    if not wrong:
        return
    name = f"sample {wrong[0]} in the batch" if keys is None else f"sample '{keys[wrong[0]]}'"
    if len(wrong) == int(trained.sum()):
        remedy = "no sample that trains has a finite one: look at the weights and the learning rate"
    else:
        remedy = (
            "others are finite, so its image or caption overflows the precision: run autoencoder and denoiser in "
            "bfloat16 or float32, or give it loss_weight 0"
        )
    raise ValueError(
        f"the loss of {name} ({len(wrong)} of {len(trained)}) is {per_sample_loss[wrong[0]].item()}; {remedy}"
    )


class MaskedLoss:
    """The loss of a diffusers training loop, from latents to a scalar, under the manifest's weights.

    `scheduler` and `prediction_type` are as `Schedule` takes them.  `snr_gamma` weighs by min-SNR, `weighting` by one
    of SD3's schemes.  `denominator` is that of `masked_loss`, `online` a mask that is found while training.  Nothing
    here waits for the device.  `last` holds the mean square errors (B,) of the last batch, without any weight, for
    `check_finite`.  Raises ConfigError for a weighting that the prediction does not have.
    """

    def __init__(
        self,
        scheduler: Any,
        prediction_type: str | None = None,
        *,
        snr_gamma: float | None = None,
        weighting: str = "none",
        denominator: Denominator = "batch",
        online: OnlineMask | None = None,
    ) -> None:
        self.schedule = Schedule(scheduler, prediction_type)
        if weighting not in WEIGHTINGS:
            raise ConfigError(f"weighting {weighting!r}: one of {', '.join(WEIGHTINGS)}")
        if self.schedule.is_flow and snr_gamma is not None:
            raise ConfigError("snr_gamma is for variance-preserving schedulers; a flow takes weighting=...")
        if not self.schedule.is_flow and weighting != "none":
            raise ConfigError(f"weighting {weighting!r} is for flows; a variance-preserving scheduler takes snr_gamma")
        self.snr_gamma, self.weighting, self.denominator, self.online = snr_gamma, weighting, denominator, online
        self.last: torch.Tensor | None = None

    def __call__(
        self,
        denoiser: Callable[..., Any] | torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        loss_weight: torch.Tensor,
        condition: Mapping[str, Any] | None = None,
        denominator: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the masked loss, a float32 scalar with a graph.

        `denoiser(x_t, timesteps, **condition)` returns the prediction, or something whose first element it is; a
        prediction may stand in its place, made from latents and a condition that were made `harmless` before.
        Latents and noise have shape (B, ...), timesteps (B,), `loss_weight` (B,) or (B, 1, H, W); `denominator`, a
        `total_weight`, takes the place of the own one.

        Latents, noise, and rows of the condition that are not finite are replaced by zeros for samples of weight 0, and
        their prediction by the target, so that nothing of them reaches the loss, a gradient or the online mask.  Raises
        ValueError for shapes that do not fit.
        """
        _check_shapes(latents, noise, timesteps, loss_weight)
        trained = _trained(loss_weight)
        latents, noise = harmless(latents, loss_weight), harmless(noise, loss_weight)
        x, condition = self.schedule.noised(latents, noise, timesteps), _harmless_condition(condition or {}, trained)
        out = denoiser if isinstance(denoiser, torch.Tensor) else denoiser(x, timesteps, **condition)
        prediction = out if isinstance(out, torch.Tensor) else out[0]
        if prediction.shape != latents.shape:
            raise ValueError(
                f"the prediction is {tuple(prediction.shape)} and the latents are {tuple(latents.shape)}: let the "
                "denoiser return the prediction alone, without a learned variance"
            )
        target = self.schedule.target(latents, noise, timesteps)
        squares = (torch.where(wide(trained, target.ndim), prediction.float(), target) - target).square()
        weight, self.last = loss_weight.to(squares), of_samples(squares.detach())
        if self.online is not None:
            model = None if isinstance(denoiser, torch.Tensor) else denoiser
            step = Step(self.schedule, model, x, timesteps, condition, prediction.detach(), self.last, trained)
            weight = weight * wide(self.online(step).to(weight), weight.ndim)
        by_time = torch.where(trained, self._by_time(timesteps), 1.0)
        losses = of_samples(squares) * by_time if weight.ndim == 1 else squares * wide(by_time, squares.ndim)
        return masked_loss(losses, weight, self.denominator if denominator is None else denominator)

    def _by_time(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.snr_gamma is not None:
            return self.schedule.min_snr(timesteps, self.snr_gamma)
        return self.schedule.sd3(timesteps, self.weighting)


def of_samples(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of each sample's values, (B,)."""
    return tensor if tensor.ndim == 1 else tensor.flatten(1).mean(1)


def _trained(loss_weight: torch.Tensor) -> torch.Tensor:
    """Return (B,), false for samples of which every weight is 0."""
    nonzero = loss_weight != 0
    return nonzero if nonzero.ndim == 1 else nonzero.flatten(1).any(1)


def _valid(loss_weight: torch.Tensor) -> torch.Tensor:
    if loss_weight.device.type != "cpu":
        return torch.where(loss_weight >= 0, loss_weight, torch.nan)
    wrong = (~(loss_weight >= 0)).reshape(len(loss_weight), -1).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"loss_weight of sample {row} in the batch is {loss_weight[row].min().item()}: weights are 0 or more; take "
            "them from Manifest.attach() or Manifest.weight(), and look at what changes them after that"
        )
    return loss_weight


def _harmless_condition(condition: Mapping[str, Any], trained: torch.Tensor) -> dict[str, Any]:
    """Return the condition with zeros for masked samples' rows that are not finite; others may be tables of places."""
    made = {}
    for name, value in condition.items():
        if isinstance(value, Mapping):
            value = _harmless_condition(value, trained)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == trained.shape:
            kept = trained | value.isfinite().reshape(len(value), -1).all(1)
            value = torch.where(wide(kept, value.ndim), value, 0)
        made[name] = value
    return made


def _check_shapes(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, loss_weight: torch.Tensor
) -> None:
    weights = [(len(latents),), (len(latents), 1, *latents.shape[2:])]
    if noise.shape != latents.shape or timesteps.shape != weights[0] or loss_weight.shape not in weights:
        raise ValueError(
            f"latents {tuple(latents.shape)}, noise {tuple(noise.shape)}, timesteps {tuple(timesteps.shape)} and "
            f"loss_weight {tuple(loss_weight.shape)} do not fit: (B, ...), (B, ...), (B,), and (B,) or (B, 1, H, W)"
        )
