"""The text-conditional prediction magnitude, from a model that is loaded once and kept warm.

The score of Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*: the L2 norm of
e(x_t, t, caption) - e(x_t, t, unconditional) over the whole latent.  Higher means memorized.  Three modes say what x_t
is, and every one meets the same noise of each seed:

* `prompt`: pure noise at the first timestep of a 50-step DDIM schedule (a flow's own).  The unconditional prediction
  does not depend on the caption and is computed once a seed.
* `trajectory`: the latents of so many guided steps from that noise on.
* `pair`: the noised latents of the caption's own image, at a fixed set of timesteps.

Further signals of a prompt are computed beside it, from the same passes as far as they share them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from .config import GUIDANCE, STEPS, Magnitude
from .denoisers import Condition, Denoiser, ModelFiles, find_model, load_denoiser
from .errors import ConfigError, ModelError
from .records import Floats
from .signals import anisotropy, anisotropy_weights, attention_entropy, check_signals, late_timestep, sharpness

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

MODES = ("prompt", "pair", "trajectory")
_LOWEST_FACTOR = 0.01  # below it the epsilon scale says nothing
T = TypeVar("T")


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

    The captions that share a batch with one change its score by rounding alone, in float32 by less than a millionth of
    the prediction's norm, and along a trajectory that adds up: some denoisers pad texts to the longest of the batch.
    The empty caption scores exactly 0 where the denoiser's `settings` say that it is the unconditional.
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
        signals: Sequence[str] = (),
    ) -> None:
        """Make a scorer of one mode: `timesteps` are those of `pair`, `steps` and `guidance` shape a `trajectory`.

        `signals` of a `prompt` are any of `attention_entropy`, `anisotropy` and `sharpness`.  Raises ConfigError for a
        mode or signals that there are not, ModelError for timesteps and signals that the model has not.
        """
        import torch

        if mode not in MODES or (mode == "pair" and not timesteps) or (signals and mode != "prompt"):
            raise ConfigError(
                f"mode {mode!r} with timesteps {timesteps} and signals {signals}: a mode is one of {', '.join(MODES)}; "
                "pair takes timesteps, and signals are of prompt alone"
            )
        self.denoiser, self.batch_size, self.guidance, self.signals = denoiser, batch_size, guidance, tuple(signals)
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
        check_signals(denoiser, self.signals, self.scoring.timesteps[0])
        self._take_batches_of(batch_size)

    @classmethod
    def load(cls, spec: str, seeds: int = 1, dtype: str = "auto", batch_size: int = 64, **settings: Any) -> Scorer:
        """Return a scorer over the pipeline in a folder, in a file or under a hub id; raises ModelError.

        `settings` are those of the class beside them, and `denoiser`, `lora`, `lora_scale` and `single_file_config` as
        in the configuration.
        """
        named = {k: settings.pop(k) for k in ("denoiser", "lora", "lora_scale", "single_file_config") if k in settings}
        files = find_model(spec, images=settings.get("mode") == "pair", **named)
        return cls(load_denoiser(files, dtype), seeds, batch_size, **settings)

    def score(self, captions: list[str]) -> Floats:
        """Return raw magnitudes (N, seeds, timesteps), float32, one row a caption; equal token ids are scored once.

        Raises ModelError for predictions that are not finite, or where a single caption does not fit into memory.
        """
        return self.measure(captions)["magnitude"]

    def measure(self, captions: list[str]) -> dict[str, Floats]:
        """Return what `score` does under `magnitude`, and each of the signals under its name, (N, seeds), float32.

        Raises ModelError as `score` does, and for a signal that is not defined for the model.
        """
        if self.scoring.mode == "pair":
            raise ConfigError("pairs are scored by their captions and images: call score_pairs")
        measure = self._at_first_step if self.scoring.mode == "prompt" else self._along_trajectory
        ids = self.denoiser.token_ids(captions) if captions else []
        order, first = distinct(ids)
        texts = [captions[first[condition]] for condition in order]
        norms = self._in_batches(len(order), lambda rows: measure(self._encode(texts[rows])))
        self._check(norms, texts)
        self._zero_unconditional(norms, order)
        place = {condition: i for i, condition in enumerate(order)}
        norms = norms[[place[condition] for condition in ids]]
        count = len(self.scoring.timesteps)
        further = {name: norms[:, :, count + i] for i, name in enumerate(self.signals)}
        return {"magnitude": norms[:, :, :count], **further}

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
        self._zero_unconditional(norms, self.denoiser.token_ids(captions) if captions else [])
        return norms

    # -- batches --

    def _take_batches_of(self, size: int) -> None:
        self.batch_size = size
        while self._if_it_fits(self._without_captions) is None:
            self.batch_size = self._half()

    def _without_captions(self) -> bool:
        """Compute the unconditional in a full batch, so that it takes the path through the kernels that captions do."""
        with self._without_gradients():
            self.nothing = self.denoiser.unconditional(self.batch_size)
            self.unconditional = []
            for x in self.noise if self.scoring.mode != "pair" else ():
                self.unconditional.append(self._predict(x, self.scoring.timesteps[0], self.nothing)[:1])
            if "anisotropy" in self.signals:
                late = late_timestep(self.denoiser)
                self._late = late, [self._predict(x, late, self.nothing)[:1] for x in self.noise]
        return True

    def _in_batches(self, count: int, measure: Callable[[slice], torch.Tensor]) -> Floats:
        """Return what `measure` gives (B, seeds, timesteps and signals) of every batch of rows, on the CPU."""
        columns = len(self.scoring.timesteps) + len(self.signals)
        found = [np.empty((0, self.scoring.seeds, columns), np.float32)]
        start, before = 0, None
        with self._without_gradients():
            while start < count:
                rows = slice(start, min(start + self.batch_size, count))
                launched = self._if_it_fits(partial(measure, rows))
                if launched is None:
                    self._take_batches_of(self._half())
                    continue
                # fetched once the next batch is on its way: a GPU does not wait for this process
                if before is not None:
                    found.append(before.cpu().numpy())
                start, before = rows.stop, launched[: rows.stop - start]
            if before is not None:
                found.append(before.cpu().numpy())
        return np.concatenate(found)

    def _if_it_fits(self, compute: Callable[[], T]) -> T | None:
        """Return what `compute` does, None where it runs out of the GPU's memory: what it held is free again then."""
        import torch

        try:
            return compute()
        except torch.cuda.OutOfMemoryError:
            return None

    def _half(self) -> int:
        import torch

        if self.batch_size == 1:
            raise ModelError("out of memory with a single caption; take a GPU with more, or a smaller dtype")
        log.warning("out of memory with %d captions; going on with half of them at a time", self.batch_size)
        torch.cuda.empty_cache()
        return self.batch_size // 2

    def _without_gradients(self) -> Any:
        import torch

        # forward-mode differentiation does not take tensors of inference mode
        return torch.no_grad() if self.signals else torch.inference_mode()

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

    def _zero_unconditional(self, norms: Floats, ids: list[bytes]) -> None:
        """Set to 0 how the unconditional differs from itself, which is by rounding beside other captions."""
        if not ids or self.denoiser.settings.get("unconditional") != "empty":
            return
        (empty,) = self.denoiser.token_ids([""])
        columns = [*self.scoring.timesteps, *self.signals]
        of_difference = [column != "attention_entropy" for column in columns]
        norms[np.ix_([i == empty for i in ids], [True] * self.scoring.seeds, of_difference)] = 0

    # -- what is measured of a batch: (B, seeds, timesteps) --

    def _at_first_step(self, condition: Condition) -> torch.Tensor:
        import torch

        (timestep,) = self.scoring.timesteps
        is_watched = "attention_entropy" in self.signals
        seeds = []
        for seed, (x, unconditional) in enumerate(zip(self.noise, self.unconditional, strict=True)):
            with attention_entropy(self.denoiser) if is_watched else nullcontext() as entropy:
                d = self._predict(x, timestep, condition) - unconditional
                found = {"attention_entropy": entropy()} if entropy else {}
            norm = _norm(d)
            if "anisotropy" in self.signals:
                found["anisotropy"] = self._anisotropy(seed, condition, norm)
            if "sharpness" in self.signals:
                latents = x.expand_as(d).to(self.denoiser.dtype)
                found["sharpness"] = sharpness(self.denoiser, latents, timestep, condition, self.nothing, d)
            seeds.append(torch.stack([norm, *(found[name] for name in self.signals)], dim=1))
        return torch.stack(seeds, dim=1)

    def _anisotropy(self, seed: int, condition: Condition, norm: torch.Tensor) -> torch.Tensor:
        late, unconditional = self._late
        d = self._predict(self.noise[seed], late, condition) - unconditional[seed]
        scoring = self.scoring
        weights = anisotropy_weights(scoring.prediction_type, scoring.eps_factors[0], self.denoiser.latent_shape)
        return anisotropy(norm, unconditional[seed], d, weights)

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


def warm_scorer(model: ModelFiles, settings: Magnitude, device: str | None) -> Scorer:
    """Return the scorer of these settings, loaded by the first call of this process and kept for the next ones.

    A process holds one; `release` gives its memory back.
    """
    # of the settings those alone that shape it
    return _warm(model, settings.model_copy(update={"model": None, "threshold": None, "devices": None}), device)


@lru_cache(1)
def _warm(model: ModelFiles, settings: Magnitude, device: str | None) -> Scorer:
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
        settings.signals,
    )


def release() -> None:
    """Let go of the model that the last run of this process left warm, and of its memory on the GPU."""
    import torch

    _warm.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
