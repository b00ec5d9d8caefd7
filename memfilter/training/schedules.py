"""What a diffusers scheduler says about training: the noised latents, the target and the weight of a timestep."""

from __future__ import annotations

from math import pi
from typing import Any

import torch

from ..errors import ConfigError

WEIGHTINGS = ("none", "sigma_sqrt", "cosmap", "logit_normal", "mode")
"""The weighting schemes of SD3's scripts; the last two draw timesteps and weigh every loss by 1."""


class Schedule:
    """A scheduler's training side: x_t = a latents + s noise, in float32, for timesteps on the scheduler's own scale.

    Variance-preserving schedulers (DDPM and all that hold `alphas_cumprod`) have a = sqrt(abar) and s = sqrt(1 - abar);
    flow-matching ones a = 1 - sigma and s = sigma, where sigma is the timestep divided by `num_train_timesteps`, with
    whatever shift the loop has put into it.  `prediction_type` is epsilon, v_prediction, sample or flow, the
    scheduler's own by default.  Raises ConfigError for another scheduler or type.
    """

    def __init__(self, scheduler: Any, prediction_type: str | None = None) -> None:
        config = scheduler.config
        own = str(config.get("prediction_type") or "epsilon")
        vp = getattr(scheduler, "alphas_cumprod", None)
        self.is_flow = own == "flow_prediction" or prediction_type == "flow" or vp is None
        if vp is None and not hasattr(scheduler, "scale_noise"):
            raise ConfigError(
                f"{type(scheduler).__name__} is neither variance-preserving nor flow-matching; give the scheduler that "
                "the model is trained with, such as a DDPMScheduler or FlowMatchEulerDiscreteScheduler"
            )
        self.prediction_type = prediction_type or ("flow" if self.is_flow else own)
        known = ("flow", "sample") if self.is_flow else ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in known:
            raise ConfigError(
                f"prediction_type {self.prediction_type!r}: with a {type(scheduler).__name__} it is one of "
                + ", ".join(known)
            )
        self._steps = int(config["num_train_timesteps"])
        self._alpha_bar = torch.empty(0) if self.is_flow else torch.as_tensor(vp, dtype=torch.float32)

    def factors(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a and s, each (B,), at timesteps (B,)."""
        if self.is_flow:
            sigma = timesteps.float() / self._steps
            return 1 - sigma, sigma
        if self._alpha_bar.device != timesteps.device:  # once: a copy a step would make the device wait
            self._alpha_bar = self._alpha_bar.to(timesteps.device)
        alpha_bar = self._alpha_bar[timesteps.long()]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t (B, ...) in the latents' precision."""
        a, s = (wide(factor, latents.ndim) for factor in self.factors(timesteps))
        return (a * latents.float() + s * noise.float()).to(latents.dtype)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the prediction is compared with, (B, ...) float32."""
        image, noise = latents.float(), noise.float()
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return image
        if self.prediction_type == "flow":
            return noise - image
        a, s = (wide(factor, image.ndim) for factor in self.factors(timesteps))
        return a * noise - s * image

    def eps_factor(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return |f| (B,) with which a difference of raw predictions becomes one of noise predictions."""
        a, s = self.factors(timesteps)
        if self.prediction_type == "epsilon":
            return torch.ones_like(a)
        return a / s.clamp(min=1e-6) if self.prediction_type == "sample" else a

    def min_snr(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the min-SNR weights (B,) of Hang et al. 2023: min(SNR, gamma) of the loss in x_0.

        That is divided by SNR for epsilon and by SNR + 1 for v_prediction.
        """
        signal, noise = (factor.square() for factor in self.factors(timesteps))
        # in forms that are finite at both ends of a schedule
        if self.prediction_type == "epsilon":
            return (gamma * noise / signal).clamp(max=1)
        if self.prediction_type == "v_prediction":
            return torch.minimum(signal, gamma * noise)
        return (signal / noise).clamp(max=gamma)

    def sd3(self, timesteps: torch.Tensor, weighting: str) -> torch.Tensor:
        """Return the weights (B,) of one of WEIGHTINGS, those of SD3's training scripts."""
        _, sigma = self.factors(timesteps)
        if weighting == "sigma_sqrt":
            return sigma**-2.0
        if weighting == "cosmap":
            return 2 / (pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones_like(sigma)


def wide(per_sample: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return (B,) as (B, 1, ...) of so many dimensions."""
    return per_sample.view(-1, *(1,) * (ndim - 1))
