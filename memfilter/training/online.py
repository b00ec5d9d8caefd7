"""Masks that are found while training: which samples of a batch are being memorized right now.

Each is called once a batch by `MaskedLoss(online=...)`, and has a method `weights` for loops that keep their own loss.
The weights are 0 or 1, to be multiplied on `loss_weight`: the batch keeps its size, so that every process has a graph
and a loss weighting keeps its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from ..errors import ConfigError
from ..thresholds import Threshold
from . import ranks
from .schedules import Schedule


@dataclass(frozen=True)
class Step:
    """What a batch's forward pass leaves to an online mask; nothing in it has a graph."""

    schedule: Schedule
    denoiser: Callable[..., Any] | None  # None where the loop gave the prediction alone
    x: torch.Tensor  # (B, ...), the noised latents
    timesteps: torch.Tensor  # (B,)
    condition: Mapping[str, Any]
    prediction: torch.Tensor  # (B, ...), raw
    loss: torch.Tensor  # (B,) float32, the mean square error without any weight
    trained: torch.Tensor  # (B,) bool, false where the manifest masks the sample


class OnlineMask:
    """What the masks share: how many samples they have seen and kept, of those that the manifest does not mask.

    `seen` and `kept` are scalar tensors that grow on the device, this process's own; `last` holds the weights of the
    last batch.
    """

    def __init__(self) -> None:
        self.seen, self.kept = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        self.last: torch.Tensor | None = None

    def __call__(self, step: Step) -> torch.Tensor:
        """Return the weights (B,) of a batch, float32."""
        raise NotImplementedError

    @property
    def kept_fraction(self) -> torch.Tensor:
        """The share of samples that was kept so far, a scalar tensor; NaN before the first."""
        return self.kept / self.seen

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued training needs to go on exactly."""
        return {"seen": self.seen.clone(), "kept": self.kept.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.seen, self.kept = state["seen"].clone(), state["kept"].clone()

    def _counted(self, kept: torch.Tensor, trained: torch.Tensor | None) -> torch.Tensor:
        counted = torch.ones_like(kept) if trained is None else trained
        self.seen = self.seen.to(kept.device) + counted.sum()
        self.kept = self.kept.to(kept.device) + (kept & counted).sum()
        self.last = (kept | ~counted).float()  # 1 for what the manifest masks: no finding of this mask
        return self.last


class MagnitudeMask(OnlineMask):
    """Masks samples whose text-conditional prediction magnitude reaches a threshold (Wen et al. 2024).

    The magnitude is the L2 norm of e(x_t, t, caption) - e(x_t, t, unconditional) on the batch's own noised latents: one
    more forward pass without a graph.  `threshold` is one number, or one for each of some timesteps, straight lines
    between them and constant beyond; the norm varies with t.  It may be the `Threshold` of a run in mode `pair`, whose
    raw norms are of noised latents too.  `scale` "raw" is the norm as in the paper, whose threshold is 2 for Stable
    Diffusion; "epsilon" that of the noise predictions divided by sqrt(elements), as in the manifest's `magnitude_eps`.
    For the first `warmup` batches nothing is masked and no pass is made.

    `unconditional` is the condition of the empty caption, encoded once: tensors with a first dimension of 1, which
    take the place of the batch's own; what it does not name stays the sample's.
    """

    def __init__(
        self,
        threshold: float | Mapping[float, float] | Threshold,
        unconditional: Mapping[str, Any],
        *,
        warmup: int = 0,
        scale: Literal["raw", "epsilon"] = "raw",
    ) -> None:
        super().__init__()
        if scale not in ("raw", "epsilon"):
            raise ConfigError(f"scale {scale!r}: raw or epsilon")
        self._depends: Mapping[str, Any] = {}
        if isinstance(threshold, Threshold):
            _check_measured(threshold, scale)
            self._depends = threshold.depends
            threshold = dict(threshold.by_timestep or [(0.0, threshold.magnitude)])
        points = sorted(threshold.items()) if isinstance(threshold, Mapping) else [(0.0, threshold)]
        if not points or not all(value > 0 for _, value in points):
            raise ConfigError(f"threshold {threshold!r}: numbers over 0, one or one for each of some timesteps")
        self._times = torch.tensor([time for time, _ in points], dtype=torch.float32)
        self._values = torch.tensor([value for _, value in points], dtype=torch.float32)
        self.unconditional, self.warmup, self.scale, self.batches = unconditional, warmup, scale, 0

    def __call__(self, step: Step) -> torch.Tensor:
        """Return the weights (B,) of a batch, float32; makes the one pass."""
        self.batches += 1
        if self.batches <= self.warmup:
            return self._counted(torch.ones_like(step.trained), step.trained)
        if step.denoiser is None:
            raise ConfigError("a magnitude needs a second pass: give MaskedLoss the denoiser, not its prediction")
        condition = _replaced(step.condition, self.unconditional, len(step.x))
        with torch.no_grad():
            out = step.denoiser(step.x, step.timesteps, **condition)
        unconditional = out if isinstance(out, torch.Tensor) else out[0]
        return self.weights(step.prediction, unconditional, step.timesteps, step.schedule, step.trained)

    def weights(
        self,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
        timesteps: torch.Tensor,
        schedule: Schedule | None = None,
        trained: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the weights (B,) for two raw predictions (B, ...): 0 where the magnitude reaches the threshold.

        The epsilon scale needs the `schedule`.  `trained` (B,) is false for samples that do not count.  A magnitude
        that is NaN masks nothing, so that a failing model shows.
        """
        self._check_fits(conditional[0].numel(), schedule)
        norm = (conditional.detach().float() - unconditional.float()).flatten(1).norm(dim=1)
        if self.scale == "epsilon":
            if schedule is None:
                raise ConfigError("scale 'epsilon' needs the schedule: weights(..., schedule=Schedule(scheduler))")
            norm = norm * schedule.eps_factor(timesteps) / conditional[0].numel() ** 0.5
        return self._counted(~(norm >= self.threshold(timesteps)), trained)

    def _check_fits(self, elements: int, schedule: Schedule | None) -> None:
        if not self._depends:
            return
        measured, kind = prod(self._depends["latent_shape"]), self._depends["prediction_type"]
        if elements != measured:
            raise ConfigError(
                f"the threshold was measured on latents of {measured:,} elements, and these have {elements:,}: the "
                "norm grows with them; take a threshold of this size"
            )
        if schedule is not None and kind != schedule.prediction_type:
            raise ConfigError(
                f"the threshold is of a model that predicts {kind}, and this one {schedule.prediction_type}; take a "
                "threshold of this model"
            )

    def threshold(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the thresholds (B,) at timesteps (B,)."""
        if self._times.device != timesteps.device:
            self._times, self._values = self._times.to(timesteps.device), self._values.to(timesteps.device)
        if len(self._times) == 1:
            return self._values.expand(len(timesteps))
        t = timesteps.float()
        right = torch.searchsorted(self._times, t).clamp(1, len(self._times) - 1)
        left = right - 1
        part = ((t - self._times[left]) / (self._times[right] - self._times[left])).clamp(0, 1)
        return torch.lerp(self._values[left], self._values[right], part)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued training needs to go on exactly; the threshold is no part of it."""
        return {**super().state_dict(), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(state)
        self.batches = state["batches"]


class AntiGradientControl(OnlineMask):
    """Masks samples whose loss is far below what is usual at their timestep (AGC, Guan et al. 2024).

    A sample is masked where its loss times `factor` is below the moving average of the losses at its timestep: 1.25 for
    Stable Diffusion, 2 for CIFAR in the paper.  The averages start at 0 and each of the n losses that a batch holds at
    a timestep moves its average by 1 - `decay`, masked or not: average = decay^n average + (1 - decay^n) (their mean),
    which is what n updates one after another come to on average over their orders.  So the state does not depend on how
    a batch is divided: with torch.distributed the losses of all processes are summed, and the masks are those of one
    process with the whole batch.  It needs no further pass.  `timesteps` is the number of averages; timesteps, from 0
    to that, belong to the average of their integer part.
    """

    def __init__(self, factor: float = 1.25, decay: float = 0.8, timesteps: int = 1000) -> None:
        super().__init__()
        if factor < 1 or not 0 <= decay < 1:
            raise ConfigError(f"factor {factor} and decay {decay}: at least 1, and from 0 to below 1")
        self.factor, self.decay, self.average = factor, decay, torch.zeros(timesteps)

    def __call__(self, step: Step) -> torch.Tensor:
        """Return the weights (B,) of a batch, float32, and let its losses move the averages."""
        return self.weights(step.loss, step.timesteps, step.trained)

    def weights(self, loss: torch.Tensor, timesteps: torch.Tensor, trained: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights (B,) for losses (B,), and let the losses move the averages; every process has to call it.

        The losses are means over channels and pixels, before `loss_weight`.  `trained` (B,) is false for samples that
        the manifest masks: their losses move nothing.  Nor does one that is not finite.
        """
        loss = loss.detach().float()
        if self.average.device != loss.device:
            self.average = self.average.to(loss.device)
        at = timesteps.long().clamp(0, len(self.average) - 1)
        kept = ~(loss * self.factor < self.average[at])
        counted = loss.isfinite() if trained is None else loss.isfinite() & trained
        values = torch.stack([torch.where(counted, loss, 0.0), counted.float()])
        total, number = ranks.summed(loss.new_zeros(2, len(self.average)).index_add_(1, at, values))
        old = self.decay**number
        self.average = old * self.average + (1 - old) * total / number.clamp(min=1)
        return self._counted(kept, trained)

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued training needs to go on exactly."""
        return {**super().state_dict(), "average": self.average.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; raises ConfigError for one of another number of timesteps."""
        if state["average"].shape != self.average.shape:
            raise ConfigError(
                f"a state of {len(state['average'])} timesteps does not fit: AntiGradientControl(timesteps=...) has "
                f"{len(self.average)}"
            )
        super().load_state_dict(state)
        self.average = state["average"].clone()


def _check_measured(threshold: Threshold, scale: str) -> None:
    mode = threshold.depends.get("mode")
    if mode != "pair" or scale != "raw":
        raise ConfigError(
            f"a threshold of mode {mode!r} under scale {scale!r}: training has noised latents of images, as mode "
            "'pair' has, and a run's thresholds are of the raw norm; take one of a run with magnitude.mode: pair"
        )


def _replaced(condition: Mapping[str, Any], unconditional: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the batch's condition with what the unconditional one names in its place, repeated for each sample."""
    made = dict(condition)
    for name, value in unconditional.items():
        if isinstance(value, Mapping):
            value = _replaced(condition.get(name) or {}, value, count)
        elif isinstance(value, torch.Tensor) and value.shape[:1] == (1,):
            value = value.expand(count, *value.shape[1:])
        made[name] = value
    return made
