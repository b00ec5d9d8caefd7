"""What every family of pipelines shares: the condition, the noise schedules, tokens as bytes, how parts are read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..config import STEPS
from ..errors import ModelError
from .autoencoder import encode, vae_config, vae_scale
from .single_file import load_part

if TYPE_CHECKING:
    import torch

Index = dict[str, Any]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told of B captions: text states (B, L, D) and, in some families, a pooled state (B, P) and a
    mask (B, L) that is 1 at the tokens and 0 at the padding.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.states)

    def __getitem__(self, rows: slice) -> Condition:
        """Return the condition of some of the captions."""
        pooled, mask = (part if part is None else part[rows] for part in (self.pooled, self.mask))
        return Condition(self.states[rows], pooled, mask)


class Token(NamedTuple):
    """A token of a caption: its row in the condition's states, and the caption's characters that it stands for."""

    row: int
    start: int
    end: int


class Denoiser(Protocol):
    """What the magnitude stage needs of a text-to-image model.

    `prediction_type` is 'epsilon', 'v_prediction', 'sample' or 'flow' (noise minus image); `latent_shape` (C, H, W) is
    the model's own size, and may be set to another one that the model takes; `settings` tells what else shapes a
    prediction: the unconditional ("empty" where it is the condition of the empty caption, which then scores 0), the
    tokens that a caption is cut at, a guidance that the model is given.
    """

    prediction_type: str
    latent_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    settings: dict[str, Any]

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the model sees, as bytes: equal ids are one condition."""
        ...

    def truncated(self, captions: list[str]) -> npt.NDArray[np.bool_]:
        """Return (N,), true at the captions that are longer than the model takes, and are cut."""
        ...

    def encode(self, captions: list[str]) -> Condition:
        """Return the captions' condition, of a length that does not depend on the captions."""
        ...

    def unconditional(self, count: int) -> Condition:
        """Return so many times the condition that guidance leads away from, as the family's pipeline has it."""
        ...

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the caption's tokens, and how many of its characters were read; raises ModelError where it cannot."""
        ...

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        """Return the raw prediction (B, C, H, W) for latents x of that shape at one timestep, 0 to 1000."""
        ...

    def first_timestep(self, steps: int) -> int:
        """Return the first timestep of a schedule of so many steps."""
        ...

    def alpha_bar(self, timestep: float) -> float:
        """Return the square of the image's factor in x_t: the cumulative product of the alphas, or (1 - sigma)^2."""
        ...

    def timesteps(self, steps: int) -> list[float]:
        """Return the timesteps of a schedule of so many steps, from noise to image."""
        ...

    def step(self, prediction: torch.Tensor, timestep: float, x: torch.Tensor) -> torch.Tensor:
        """Return the latents at the next timestep of the schedule last asked for, or after its last the image's."""
        ...

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        """Return x_t of an image's latents and noise, both (B, C, H, W)."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and the width in pixels of the images whose latents have `latent_shape`; may raise ModelError."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, H, W) of images, float32 (B, 3, *image_size) from -1 to 1: the same for equal images.

        Raises ModelError where the model has none.
        """
        ...


class Diffusion:
    """The variance-preserving schedule of a folder's scheduler: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise."""

    prediction_type: str

    def _read_schedule(self, folder: Path, **settings: Any) -> None:
        from diffusers import DDIMScheduler

        if (name := _scheduler(folder)).startswith("EDM"):
            raise ModelError(f"its scheduler is an {name}, which scales the latents; such a model cannot be scored")
        config = DDIMScheduler.load_config(folder, subfolder="scheduler")
        # another scheduler's config does not say that latents are not clipped, and DDIM's default is to clip them
        self._schedule = DDIMScheduler.from_config({"clip_sample": False, **config}, **settings)
        self.prediction_type = str(self._schedule.config.prediction_type)
        if (count := len(self._schedule.alphas_cumprod)) < STEPS:
            raise ModelError(f"its schedule has {count} timesteps; magnitudes are measured on one of {STEPS} steps")

    def first_timestep(self, steps: int) -> int:
        """Return the first timestep of a DDIM schedule of so many steps."""
        self._schedule.set_timesteps(steps)
        return int(self._schedule.timesteps[0])

    def alpha_bar(self, timestep: float) -> float:
        """Return the cumulative product of the alphas at a timestep; raises ModelError beyond the model's last."""
        if not 0 <= int(timestep) < (count := len(self._schedule.alphas_cumprod)):
            raise ModelError(
                f"there is no timestep {timestep:g}: the model's are 0 to {count - 1} (magnitude.timesteps)"
            )
        return float(self._schedule.alphas_cumprod[int(timestep)])

    def timesteps(self, steps: int) -> list[float]:
        """Return the timesteps of a DDIM schedule of so many steps, whole numbers, from noise to image."""
        self._schedule.set_timesteps(steps)
        return [int(t) for t in self._schedule.timesteps]

    def step(self, prediction: torch.Tensor, timestep: float, x: torch.Tensor) -> torch.Tensor:
        """Return the latents at the next timestep of the schedule last asked for: a DDIM step, without new noise."""
        after: torch.Tensor = self._schedule.step(prediction, int(timestep), x, return_dict=False)[0]
        return after

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        """Return sqrt(abar) latents + sqrt(1 - abar) noise."""
        alpha_bar = self.alpha_bar(timestep)
        noisy: torch.Tensor = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
        return noisy


class Flow:
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma noise, where sigma = t / 1000; predicted is noise - x_0."""

    prediction_type = "flow"
    latent_shape: tuple[int, int, int]

    _gives_sigmas = True  # whether the family's pipeline gives its scheduler sigmas from 1 down to 1 / steps
    _max_shift = 1.15  # the pipeline's own, where the scheduler's config does not tell

    def _read_schedule(self, folder: Path) -> None:
        import diffusers

        known = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
        if (name := _scheduler(folder)) not in known:
            raise ModelError(f"its scheduler is a {name}; that of a flow is a {' or a '.join(known)}")
        self._schedule = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
        if not self._schedule.config.get("use_flow_sigmas", True):
            raise ModelError(f"its scheduler is a {name} without use_flow_sigmas: not that of a flow")

    def first_timestep(self, steps: int) -> int:
        """Return the first timestep of the pipeline's own schedule of so many steps: all noise."""
        return round(self.timesteps(steps)[0])

    def alpha_bar(self, timestep: float) -> float:
        """Return (1 - sigma)^2 at a timestep."""
        return (1 - timestep / float(self._schedule.config.num_train_timesteps)) ** 2

    def timesteps(self, steps: int) -> list[float]:
        """Return the timesteps of the pipeline's own schedule of so many steps for the latents' size, falling."""
        config = self._schedule.config
        settings: dict[str, Any] = {}
        # the solver of some pipelines has sigmas of its own
        if self._gives_sigmas and not config.get("use_flow_sigmas"):
            settings["sigmas"] = np.linspace(1, 1 / steps, steps)
        if config.get("use_dynamic_shifting"):
            settings["mu"] = self._shift()
        self._schedule.set_timesteps(steps, **settings)
        return [float(t) for t in self._schedule.timesteps]

    def step(self, prediction: torch.Tensor, timestep: float, x: torch.Tensor) -> torch.Tensor:
        """Return the latents at the next sigma of the schedule last asked for: an Euler step."""
        now = int((self._schedule.timesteps.double() - timestep).abs().argmin())
        sigma, after = self._schedule.sigmas[now : now + 2].tolist()
        following: torch.Tensor = x + (after - sigma) * prediction
        return following

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        """Return (1 - sigma) latents + sigma noise."""
        image = self.alpha_bar(timestep) ** 0.5
        noisy: torch.Tensor = image * latents + (1 - image) * noise
        return noisy

    def _shift(self) -> float:
        """Return mu, which grows linearly with the transformer's tokens of an image: Esser et al. 2024, *Scaling
        Rectified Flow Transformers*, as the pipelines have it.
        """
        config = self._schedule.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", self._max_shift)
        return float(least + (most - least) * (self._image_tokens() - low) / (high - low))

    def _image_tokens(self) -> int:
        _, height, width = self.latent_shape
        return (height // 2) * (width // 2)


@dataclass(frozen=True)
class Source:
    """Where a pipeline's parts lie: its folder, and what takes the place of weights in it, or is fused into them.

    Of a single file, the folder has the configs and the tokenizers, and `within` the file's keys of each part in it.
    """

    folder: Path
    index: Index
    denoiser: Path | None = None
    lora: Path | None = None
    lora_scale: float = 1.0
    file: Path | None = None
    within: dict[str, list[str]] = field(default_factory=dict)


class Family:
    """One family's pipelines, by the class names in model_index.json, and the parts of them that shape a score.

    The parts are loaded by classes that are named here, never by what the folder names, so that no code in it can run.
    """

    pipelines: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    denoiser: ClassVar[tuple[str, str]]  # the part, and its class
    width: ClassVar[str]  # what the denoiser's config calls the width of text states
    autoencoder: ClassVar[str] = "AutoencoderKL"

    settings: dict[str, Any]
    latent_shape: tuple[int, int, int]
    _network: Any

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self._source, self.device, self.dtype = source, device, dtype
        self._autoencoder: Any = None

    def encode(self, captions: list[str]) -> Condition:
        """Return the captions' condition."""
        raise NotImplementedError

    def unconditional(self, count: int) -> Condition:
        """Return so many times the condition of the empty caption."""
        return self.encode([""] * count)

    def tokens(self, caption: str) -> tuple[list[Token], int]:
        """Return the tokens that the model sees of a caption, without those that no text stands for, and how many of
        the caption's characters were read; raises ModelError where states are not one row a token of one tokenizer.
        """
        kind = type(self).__name__
        raise ModelError(f"words have no weights under {kind}: its text states are not one row for each token")

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and the width in pixels of the images whose latents have `latent_shape`."""
        scale = vae_scale(self._source.folder) if self._has_autoencoder() else 1
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, H, W) of images, (B, 3, *image_size) from -1 to 1, as the denoiser takes them.

        They are the mean of the autoencoder's posterior, in float32 or better; the pixels themselves in a pipeline
        without an autoencoder.  It is loaded when first asked for.  Raises ModelError for an autoencoder that is not
        whole, and latents of another shape than the denoiser's.
        """
        import torch

        with torch.no_grad():
            if self._has_autoencoder():
                self._autoencoder = self._autoencoder or self._load_autoencoder()
                latents = encode(self._autoencoder, pixels)
            else:
                latents = pixels.to(torch.promote_types(self.dtype, torch.float32))
        if latents.shape[1:] != (expected := tuple(self.latent_shape)):
            raise ModelError(
                f"images of {tuple(pixels.shape[1:])} become latents of {tuple(latents.shape[1:])}, and the denoiser "
                f"takes {expected}; it takes images of {(3, *self.image_size)}"
            )
        return latents

    def _has_autoencoder(self) -> bool:
        """Return whether there is one; raises ModelError where there is none and the latents are no pixels."""
        if has(self._source.index, "vae"):
            return True
        if self.latent_shape[0] != 3:
            raise ModelError(
                f"the pipeline has no autoencoder (vae), and its denoiser takes {self.latent_shape[0]} channels, not "
                "the 3 of an image: pairs cannot be scored"
            )
        return False

    def _load_autoencoder(self) -> Any:
        import diffusers
        import torch

        folder = self._source.folder
        # some overflow in half precision, and say so; of the others none is known to be safe in it
        exact = torch.promote_types(self.dtype, torch.float32)
        dtype = exact if vae_config(folder).get("force_upcast", True) else self.dtype
        try:
            with quiet():
                return self._load(getattr(diffusers, self.autoencoder), folder / "vae", dtype)
        except ModelError:
            raise
        except Exception as e:  # diffusers raises what it likes
            cause = " ".join(str(e).split())[:200]
            raise ModelError(f"{folder}: the autoencoder cannot be loaded: {type(e).__name__}: {cause}") from e

    def truncated(self, captions: list[str]) -> npt.NDArray[np.bool_]:
        """Return (N,), true at the captions of which some tokenizer of the family's leaves tokens out, too long."""
        cut = np.zeros(len(captions), bool)
        for tokenizer, texts, length in self._texts(captions) if captions else []:
            cut |= is_cut(tokenizer, texts, length)
        return cut

    def _texts(self, captions: list[str]) -> list[tuple[Any, list[str], int]]:
        """Return of each tokenizer what it is given for the captions, and how many tokens of it are kept."""
        raise NotImplementedError

    def lora_parts(self) -> dict[str, Any]:
        """Return by name the models into which a LoRA of this family may go."""
        return {self.denoiser[0]: self._network}

    def _load(self, kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
        """Return a model of which every weight was in the folder's safetensors files, or in the single file.

        Raises ModelError.
        """
        if self._source.file and folder.name in self._source.within:
            keys = self._source.within[folder.name]
            model = load_part(kind, self._source.file, keys, folder, dtype or self.dtype)
            return model.to(self.device)
        # loaded in its precision and not cast to it: the libraries keep in float32 what would overflow or drift
        model, info = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=dtype or self.dtype,
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{folder.name} lacks {len(missing)} weights, such as {missing[0]}; save or fetch it again"
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _load_language_model(self, kind: Any, folder: Path) -> Any:
        """Return a text encoder that was trained in bfloat16, in that in place of float16, in which it overflows."""
        import torch

        return self._load(kind, folder, torch.bfloat16 if self.dtype == torch.float16 else self.dtype)

    def _load_but_last_layer(self, kind: Any, folder: Path) -> Any:
        """Return a language model that ends with its last states but one: asked for, it would hold those of all."""
        import torch

        model = self._load_language_model(kind, folder)
        model.layers, model.norm = model.layers[:-1], torch.nn.Identity()
        model.config.num_hidden_layers -= 1
        return model

    def _load_denoiser(self) -> Any:
        import diffusers

        part, kind = self.denoiser
        folder = self._source.denoiser or self._source.folder / part
        # cast as well: diffusers leaves some of them in float32 where accelerate is not installed
        self._network = self._load(getattr(diffusers, kind), folder).to(self.dtype)
        return self._network

    def _check_width(self, found: int) -> None:
        """Raise ModelError unless the denoiser takes text states of this width."""
        expected = self._network.config[self.width]
        if isinstance(expected, int) and found != expected:
            raise ModelError(
                f"its text states are {found} wide, and its {self.denoiser[0]} takes {expected} ({self.width}): these "
                "are parts of different models"
            )

    def compile(self) -> None:
        """Have torch compile the denoiser for batches of one size, with CUDA graphs where it runs on a GPU."""
        import torch

        if self.device.type == "cuda":  # its convolutions are fastest so
            self._network.to(memory_format=torch.channels_last)
        self._network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default", dynamic=False)

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array))
        # from pinned memory, so that the copy does not wait for what the GPU has still to do
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _times(self, time: float, count: int) -> torch.Tensor:
        import torch

        return torch.full((count,), time, device=self.device, dtype=torch.float32)


def read_index(folder: Path) -> Index:
    """Return what model_index.json says; raises ModelError where it does not name a pipeline."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelError("model_index.json does not say what pipeline this is")
    return index


def has(index: Index, part: str) -> bool:
    """Return whether a model_index.json names this part, and not as null."""
    return index.get(part) not in (None, [None, None])


def tokenise(tokenizer: Any, texts: list[str], length: int) -> tuple[Tokens, npt.NDArray[np.bool_]]:
    """Return the ids (B, length) of texts that are cut or padded to one length, and a mask, true at the tokens."""
    return _tokenised(tokenizer, tuple(texts), length)[:2]


def is_cut(tokenizer: Any, texts: list[str], length: int) -> npt.NDArray[np.bool_]:
    """Return (B,), true at the texts that have more tokens than `length`."""
    return _tokenised(tokenizer, tuple(texts), length)[2]


@lru_cache(maxsize=3)  # as many as a family has tokenizers: what was cut is asked for right after the ids
def _tokenised(
    tokenizer: Any, texts: tuple[str, ...], length: int
) -> tuple[Tokens, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_attention_mask": True}
    if not tokenizer.is_fast:
        out = tokenizer(list(texts), **settings)
        whole = tokenizer(list(texts), verbose=False)["input_ids"]
        cut = np.array([len(ids) > length for ids in whole])
        return np.asarray(out["input_ids"], np.int64), np.asarray(out["attention_mask"]).astype(bool), cut
    # what is beyond the length comes in further rows, which tell that a text was cut
    out = tokenizer(list(texts), return_overflowing_tokens=True, **settings)
    rows = np.asarray(out["overflow_to_sample_mapping"])
    first = np.searchsorted(rows, np.arange(len(texts)))
    ids, mask = (np.asarray(out[name])[first] for name in ("input_ids", "attention_mask"))
    return ids.astype(np.int64), mask.astype(bool), np.bincount(rows, minlength=len(texts)) > 1


def spans(tokenizer: Any, text: str, length: int) -> tuple[list[Token], int]:
    """Return a text's tokens within this length, special ones left out, and where the first that was cut off starts.

    Raises ModelError for a tokenizer that does not tell where its tokens are from.
    """
    if not tokenizer.is_fast:
        raise ModelError("its tokenizer does not tell where tokens are from; pip install 'transformers>=5'")
    out = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    cut = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=length)["offset_mapping"]
    tokens = [Token(row, start, end) for row, (start, end) in enumerate(cut) if start < end]
    rest = [start for start, end in out if start < end][len(tokens) :]
    return tokens, rest[0] if rest else len(text)


def packed(ids: Tokens, mask: npt.NDArray[np.bool_] | None = None) -> list[bytes]:
    """Return each row of ids as bytes, of the masked ones alone if a mask is given: a model sees no other."""
    rows = ids if mask is None else (row[kept] for row, kept in zip(ids, mask, strict=True))
    return [row.astype(">u4").tobytes() for row in rows]


def square(size: Any, channels: int) -> tuple[int, int, int]:
    """Return the latent shape of a model's sample_size, a side or two."""
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    return (int(channels), int(sides[0]), int(sides[1]))


def _scheduler(folder: Path) -> str:
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return str(config.get("_class_name", ""))
    except (OSError, ValueError, AttributeError) as e:
        raise ModelError("scheduler/scheduler_config.json cannot be read; save or fetch it again") from e


@contextmanager
def silent() -> Iterator[None]:
    """Keep the two libraries from logging to the terminal: what matters comes as one error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(m, m.get_verbosity()) for m in (diffusers_logging, transformers_logging)]
    for module, _ in before:
        module.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the two libraries from logging and from showing progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with_bars = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in with_bars:
        module.disable_progress_bar()
    try:
        with silent():
            yield
    finally:
        for module in with_bars:
            module.enable_progress_bar()
