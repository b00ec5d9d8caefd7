"""A foreign diffusion pipeline, adapted once to one call: (x_t, t, condition) -> raw prediction.

Only weights in safetensors files are read; nothing is unpickled and no remote code is run.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ModelError
from .store import file_digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline as the user named it, and the digests of its files by relative name."""

    spec: str
    files: dict[str, str]


class Denoiser(Protocol):
    """What the magnitude stage needs of a text-to-image model.

    `prediction_type` is 'epsilon', 'v_prediction' or 'sample'; `latent_shape` (C, H, W) is the model's own size.
    """

    prediction_type: str
    latent_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the model sees, as bytes: equal ids are one condition."""
        ...

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Return the text conditions (B, L, D)."""
        ...

    def predict(self, x: torch.Tensor, timestep: int, condition: torch.Tensor) -> torch.Tensor:
        """Return the raw prediction (B, C, H, W) for latents x of that shape at one timestep."""
        ...

    def first_timestep(self, steps: int) -> int:
        """Return the first timestep of a DDIM schedule of so many steps."""
        ...

    def alpha_bar(self, timestep: int) -> float:
        """Return the cumulative product of the alphas at a timestep."""
        ...


def find_model(spec: str) -> ModelFiles:
    """Return the files of the pipeline in a folder, or of a hub id, fetched if need be.

    Raises ModelError when there is no diffusers pipeline under that name.
    """
    path = _folder(spec)
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{spec}: no diffusers pipeline: it has no model_index.json (save one with save_pretrained)")
    files = sorted(
        p for p in path.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".txt", ".model")
    )
    return ModelFiles(spec, {p.relative_to(path).as_posix(): file_digest(p) for p in files})


def _folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(f"{spec}: no such folder; --model takes a diffusers pipeline's folder or its hub id")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(spec, use_safetensors=True))
    except Exception as e:  # the hub's client raises what it likes
        cause = " ".join(str(e).split())[:200]
        raise ModelError(
            f"{spec}: neither a folder here nor to be had from the hub ({type(e).__name__}: {cause}); "
            f"fetch it where there is a network with 'hf download {spec}' and give the folder"
        ) from e


def load_denoiser(model: ModelFiles, dtype: str) -> Denoiser:
    """Return the pipeline's denoiser on the GPU if there is one, else on the CPU, in evaluation mode.

    `auto` is float16 on a GPU and float32 on a CPU.  Raises ModelError for a pipeline that cannot be loaded or is of
    another family than Stable Diffusion 1 and 2.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"auto": "float16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    diffusers_logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            _folder(model.spec),
            torch_dtype=getattr(torch, kind),
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as e:  # diffusers and transformers raise what they like
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"{model.spec}: the pipeline cannot be loaded: {type(e).__name__}: {cause}") from e
    if (
        not type(pipe).__name__.startswith("StableDiffusion")
        or not hasattr(pipe, "unet")
        or "XL" in type(pipe).__name__
    ):
        raise ModelError(
            f"{model.spec}: a {type(pipe).__name__}; this version scores Stable Diffusion 1 and 2 pipelines"
        )
    return StableDiffusion(pipe.to(device))


class StableDiffusion:
    """Stable Diffusion 1 and 2: one CLIP text encoder and a UNet with cross-attention."""

    def __init__(self, pipe: Any) -> None:
        from diffusers import DDIMScheduler

        self._pipe = pipe
        self._unet = pipe.unet.eval()
        pipe.text_encoder.eval()
        config = pipe.unet.config
        size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        self.latent_shape = (config.in_channels, *size)
        if config.in_channels != config.out_channels:
            raise ModelError(f"the UNet takes {config.in_channels} channels and returns {config.out_channels}")
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self._schedule = DDIMScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = str(self._schedule.config.prediction_type)

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the text encoder sees, as bytes."""
        tokenizer = self._pipe.tokenizer
        ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        return [b"".join(int(i).to_bytes(4, "big") for i in row) for row in ids["input_ids"]]

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Return the text encoder's states (B, 77, D)."""
        condition: torch.Tensor = self._pipe.encode_prompt(captions, self.device, 1, False)[0]
        return condition

    def predict(self, x: torch.Tensor, timestep: int, condition: torch.Tensor) -> torch.Tensor:
        """Return the UNet's raw prediction (B, C, H, W)."""
        prediction: torch.Tensor = self._unet(x, timestep, encoder_hidden_states=condition, return_dict=False)[0]
        return prediction

    def first_timestep(self, steps: int) -> int:
        """Return the first timestep of a DDIM schedule of so many steps."""
        self._schedule.set_timesteps(steps)
        return int(self._schedule.timesteps[0])

    def alpha_bar(self, timestep: int) -> float:
        """Return the cumulative product of the alphas at a timestep."""
        return float(self._schedule.alphas_cumprod[timestep])


def token_digest(ids: bytes) -> bytes:
    """Return the 16-byte blake2b digest under which a condition's score is kept."""
    return hashlib.blake2b(ids, digest_size=16).digest()
