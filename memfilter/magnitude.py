"""The text-conditional prediction magnitude, from a model that is loaded once and kept warm.

The score of Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*: the L2 norm of
e(x_t, t, caption) - e(x_t, t, unconditional) over the whole latent.  Higher means memorized.  Three modes say what x_t
is, and every one meets the same noise of each seed:

* `prompt`: pure noise at the first timestep of a 50-step DDIM schedule (a flow's own).  The unconditional prediction
  does not depend on the caption and is computed once a seed.
* `trajectory`: the latents of so many guided steps from that noise on.
* `pair`: the noised latents of the caption's own image, at a fixed set of timesteps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .config import GUIDANCE, STEPS, Magnitude
from .denoisers import Condition, Denoiser, ModelFiles, find_model, load_denoiser
from .errors import ConfigError, ModelError
from .records import Floats

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

_LOWEST_FACTOR = 0.01  # below it the epsilon scale says nothing


@dataclass(frozen=True)
class Scoring:
    """What a score depends on beside its caption, and image: `eps_factors` are of each timestep."""

    mode: str
    prediction_type: str
    timesteps: tuple[float, ...]
    latent_shape: tuple[int, ...]
    seeds: int
    device: str
    dtype: str
    eps_factors: tuple[float, ...]
    denoiser: dict[str, Any]  # the unconditional, and what else the adapter gives the model
    guidance: float | None  # along which a trajectory goes

    def on_epsilon_scale(self, norms: Floats) -> Floats:
        """Return raw norms (N, seeds, timesteps) as differences of noise predictions, per root of an element, (N,).

        The mean over seeds and timesteps; NaN where the factor of a timestep is too small for it to say anything.
        """
        factors = np.array(self.eps_factors) / np.sqrt(np.prod(self.latent_shape))
        eps: Floats = (norms * factors).mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
        return eps if min(self.eps_factors) >= _LOWEST_FACTOR else np.full_like(eps, np.nan)


class Scorer:
    """A warm denoiser with its noise bank and its unconditional predictions.

    Usable on its own: `Scorer.load("path").score(["a caption"])`.  `batch_size` is halved whenever a batch does not fit
    into the GPU's memory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        seeds: int = 1,
        batch_size: int = 64,
        mode: str = "prompt",
        timesteps: Sequence[float] = (),
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> None:
        """Make a scorer of one mode: `timesteps` are those of `pair`, `steps` and `guidance` shape a `trajectory`."""
        import torch

        self.denoiser, self.batch_size, self.guidance = denoiser, batch_size, guidance
        # drawn on the CPU in float32, so that every device and dtype sees the same noise
        noise = [torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(s)) for s in range(seeds)]
        self.noise = torch.stack(noise).to(denoiser.device)
        if mode == "trajectory":
            timesteps = denoiser.timesteps(STEPS)[:steps]
        elif mode == "prompt":
            timesteps = [denoiser.first_timestep(STEPS)]
        self.scoring = Scoring(
            mode,
            denoiser.prediction_type,
            tuple(timesteps),
            tuple(denoiser.latent_shape),
            seeds,
            denoiser.device.type,
            str(denoiser.dtype).removeprefix("torch."),
            tuple(eps_factor(denoiser.prediction_type, denoiser.alpha_bar(t)) for t in timesteps),
            {"family": type(denoiser).__name__, **denoiser.settings},
            guidance if mode == "trajectory" else None,
        )
        self._take_batches_of(batch_size)

    @classmethod
    def load(cls, spec: str, seeds: int = 1, dtype: str = "auto", batch_size: int = 64, **settings: Any) -> Scorer:
        """Return a scorer over the pipeline in a folder or under a hub id; raises ModelError.

        `settings` are those of the class beside them.
        """
        files = find_model(spec, images=settings.get("mode") == "pair")
        return cls(load_denoiser(files, dtype), seeds, batch_size, **settings)

    def score(self, captions: list[str]) -> Floats:
        """Return raw magnitudes (N, seeds, timesteps), float32, one row a caption; equal token ids are scored once.

        Raises ModelError for predictions that are not finite, or where a single caption does not fit into memory.
        """
        if self.scoring.mode == "pair":
            raise ConfigError("pairs are scored by their captions and images: call score_pairs")
        measure = self._at_first_step if self.scoring.mode == "prompt" else self._along_trajectory
        ids = self.denoiser.token_ids(captions) if captions else []
        order, first = distinct(ids)
        texts = [captions[first[condition]] for condition in order]
        norms = self._in_batches(len(order), lambda rows: measure(self._encode(texts[rows])))
        self._check(norms, texts)
        place = {condition: i for i, condition in enumerate(order)}
        return norms[[place[condition] for condition in ids]]

    def score_pairs(self, captions: list[str], images: Pixels) -> Floats:
        """Return raw magnitudes (N, seeds, timesteps), float32, of captions with their images, uint8 (N, H, W, 3).

        The images are of the denoiser's `image_size`.  Raises ModelError as `score` does, ConfigError for another mode
        and for images of another size.
        """
        wanted = (*self.denoiser.image_size, 3)
        if self.scoring.mode != "pair":
            raise ConfigError(f"a scorer of the mode {self.scoring.mode!r} takes captions alone: call score")
        if len(captions) != len(images) or images.shape[1:] != wanted:
            raise ConfigError(f"{len(captions):,} captions and images of shape {images.shape}; give (N, *{wanted})")
        norms = self._in_batches(len(captions), lambda rows: self._noised(self._encode(captions[rows]), images[rows]))
        self._check(norms, captions)
        return norms

    # -- batches --

    def _take_batches_of(self, size: int) -> None:
        """Compute the unconditional in a full batch, so that it takes the path through the kernels that captions do."""
        import torch

        self.batch_size = size
        try:
            with torch.inference_mode():
                self.nothing, self.unconditional = self.denoiser.unconditional(size), []
                for x in self.noise if self.scoring.mode != "pair" else ():
                    self.unconditional.append(self._predict(x, self.scoring.timesteps[0], self.nothing)[:1])
        except torch.cuda.OutOfMemoryError as e:
            self._halve(e)

    def _in_batches(self, count: int, measure: Callable[[slice], torch.Tensor]) -> Floats:
        """Return what `measure` gives (B, seeds, timesteps) of every batch of rows, on the CPU."""
        import torch

        found = [np.empty((0, self.scoring.seeds, len(self.scoring.timesteps)), np.float32)]
        start, before = 0, None
        with torch.inference_mode():
            while start < count:
                rows = slice(start, min(start + self.batch_size, count))
                try:
                    launched = measure(rows)[: rows.stop - start]
                except torch.cuda.OutOfMemoryError as e:
                    self._halve(e)
                    continue
                # fetched once the next batch is on its way: a GPU does not wait for this process
                if before is not None:
                    found.append(before.cpu().numpy())
                start, before = rows.stop, launched
            if before is not None:
                found.append(before.cpu().numpy())
        return np.concatenate(found)

    def _halve(self, error: Exception) -> None:
        import torch

        if self.batch_size == 1:
            raise ModelError("out of memory with a single caption; take a GPU with more, or a smaller dtype") from error
        log.warning("out of memory with %d captions; going on with half of them at a time", self.batch_size)
        self.nothing, self.unconditional = self.nothing[:1], []
        torch.cuda.empty_cache()
        self._take_batches_of(self.batch_size // 2)

    def _encode(self, captions: list[str]) -> Condition:
        # a short batch is filled up, so that every batch takes the same path through the kernels
        return self.denoiser.encode(captions + [""] * (self.batch_size - len(captions)))

    def _predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the prediction (B, C, H, W) in float32, in memory of its own."""
        import torch

        latents = x.expand(len(condition), *x.shape[-3:]).to(self.denoiser.dtype)
        out = self.denoiser.predict(latents, timestep, condition)
        # a compiled model writes its next prediction over this one
        return out.to(torch.float32, copy=True)

    def _check(self, norms: Floats, captions: list[str]) -> None:
        finite = np.isfinite(norms).all(axis=(1, 2))
        if not finite.all():
            worst, dtype = captions[int(np.argmin(finite))], self.scoring.dtype
            hint = "its weights are damaged" if dtype == "float32" else "set magnitude.dtype: float32, or bfloat16"
            raise ModelError(f"the prediction for {worst[:60]!r} is not finite in {dtype}; {hint}")

    # -- what is measured of a batch: (B, seeds, timesteps) --

    def _at_first_step(self, condition: Condition) -> torch.Tensor:
        import torch

        (timestep,) = self.scoring.timesteps
        norms = [
            _norm(self._predict(x, timestep, condition) - unconditional)
            for x, unconditional in zip(self.noise, self.unconditional, strict=True)
        ]
        return torch.stack(norms, dim=1)[:, :, None]

    def _along_trajectory(self, condition: Condition) -> torch.Tensor:
        import torch

        self.denoiser.timesteps(STEPS)  # another scorer may have asked its schedule for other steps
        seeds = []
        for noise, first in zip(self.noise, self.unconditional, strict=True):
            x, e_u, norms = noise.expand(len(condition), *noise.shape), first, []
            for i, timestep in enumerate(self.scoring.timesteps):
                if i:
                    e_u = self._predict(x, timestep, self.nothing)
                d = self._predict(x, timestep, condition) - e_u
                norms.append(_norm(d))
                x = self.denoiser.step(e_u + self.guidance * d, timestep, x)
            seeds.append(torch.stack(norms, dim=1))
        return torch.stack(seeds, dim=1)

    def _noised(self, condition: Condition, images: Pixels) -> torch.Tensor:
        import torch

        missing = len(condition) - len(images)
        filled = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
        pixels = torch.from_numpy(filled).to(self.denoiser.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.denoiser.encode_images(pixels).float()
        seeds = []
        for noise in self.noise:
            norms = []
            for timestep in self.scoring.timesteps:
                x = self.denoiser.add_noise(latents, noise.expand_as(latents), timestep)
                e_c, e_u = (self._predict(x, timestep, c) for c in (condition, self.nothing))
                norms.append(_norm(e_c - e_u))
            seeds.append(torch.stack(norms, dim=1))
        return torch.stack(seeds, dim=1)


def _norm(difference: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = difference.flatten(1).norm(dim=1)
    return norm


def distinct(ids: list[bytes]) -> tuple[list[bytes], dict[bytes, int]]:
    """Return the distinct ids, and of each the first place that it has.

    They are sorted, so that a batch holds the same captions whatever order they came in.
    """
    first: dict[bytes, int] = {}
    for i, condition in enumerate(ids):
        first.setdefault(condition, i)
    return sorted(first), first


def eps_factor(prediction_type: str, alpha_bar: float) -> float:
    """Return |f| with which a difference of raw predictions becomes one of noise predictions.

    `alpha_bar` is the square of the image's factor in x_t: of a flow it is (1 - sigma)^2.
    """
    factors = {
        "epsilon": 1.0,
        "v_prediction": alpha_bar**0.5,
        "flow": alpha_bar**0.5,
        "sample": alpha_bar**0.5 / max(1 - alpha_bar, 1e-12) ** 0.5,
    }
    if prediction_type not in factors:
        raise ModelError(f"prediction type {prediction_type!r} is none of {', '.join(factors)}")
    return float(factors[prediction_type])


# -- kept warm --------------------------------------------------------------------------------------------------------


def warm_scorer(model: ModelFiles, settings: Magnitude, device: str) -> Scorer:
    """Return a run's scorer on a device, loaded by the first call of this process and kept for the next ones.

    A process holds one; `release` gives its memory back.
    """
    # of the settings those alone that shape it
    return _warm(model, settings.model_copy(update={"model": None, "threshold": None, "devices": None}), device)


@lru_cache(1)
def _warm(model: ModelFiles, settings: Magnitude, device: str) -> Scorer:
    denoiser = load_denoiser(model, settings.dtype, device)
    if settings.compile:
        denoiser.compile()  # type: ignore[attr-defined]
    return Scorer(
        denoiser,
        settings.seeds,
        settings.batch_size,
        settings.mode,
        settings.timesteps,
        settings.steps,
        settings.guidance,
    )


def release() -> None:
    """Let go of the model that the last run of this process left warm, and of its memory on the GPU."""
    import torch

    _warm.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
