"""A foreign diffusion pipeline, adapted once to one call: (x_t, t, condition) -> raw prediction.

Only weights in safetensors files are read; nothing is unpickled and no remote code is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ModelError
from .store import file_digest

if TYPE_CHECKING:
    import torch

_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet")
_SUFFIXES = (".safetensors", ".json", ".txt")


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline as the user named it, the name that the manifest tells (a folder's own, or the hub id), and the
    digests of the files that shape a score by relative name.
    """

    spec: str
    name: str
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
    try:
        _refuse_other_families(path)
    except ModelError as e:
        raise ModelError(f"{spec}: {e}") from e
    if missing := [part for part in _PARTS if not (path / part).is_dir()]:
        raise ModelError(f"{spec}: has no {', '.join(missing)} folder: not a whole Stable Diffusion 1 or 2 pipeline")
    parts = sorted(p for part in _PARTS for p in (path / part).rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
    name = path.resolve().name if Path(spec).is_dir() else spec
    return ModelFiles(spec, name, {p.relative_to(path).as_posix(): file_digest(p) for p in parts})


def _folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(f"{spec}: no such folder; --model takes a diffusers pipeline's folder or its hub id")
    from diffusers import DiffusionPipeline

    try:
        with _silent():  # but for the progress of a download
            return Path(DiffusionPipeline.download(spec, use_safetensors=True))
    except Exception as e:  # the hub's client raises what it likes
        cause = " ".join(str(e).split())[:200]
        raise ModelError(
            f"{spec}: neither a folder here nor to be had from the hub ({type(e).__name__}: {cause}); "
            f"fetch it where there is a network with 'hf download {spec}' and give the folder"
        ) from e


def load_denoiser(model: ModelFiles, dtype: str) -> Denoiser:
    """Return the pipeline's denoiser on the GPU if there is one, else on the CPU, in evaluation mode.

    `auto` is float16 on a GPU and float32 on a CPU.  Raises ModelError for a pipeline that cannot be loaded whole or is
    of another family than Stable Diffusion 1 and 2.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"auto": "float16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    folder = _folder(model.spec)
    try:
        with quiet():
            return StableDiffusion(folder, device, getattr(torch, kind))
    except ModelError as e:
        raise ModelError(f"{model.spec}: {e}") from e
    except Exception as e:  # diffusers and transformers raise what they like
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"{model.spec}: the pipeline cannot be loaded: {type(e).__name__}: {cause}") from e


class StableDiffusion:
    """Stable Diffusion 1 and 2: one CLIP text encoder and a UNet with cross-attention.

    The parts are loaded by these classes, never by what the folder names, so that no code in it can run.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.device, self.dtype = device, dtype
        self._tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text_encoder = _whole(CLIPTextModel, folder / "text_encoder").to(device, dtype).eval()
        self._unet = _whole(UNet2DConditionModel, folder / "unet").to(device, dtype).eval()
        # Stable Diffusion counts its steps from 1, as its own pipeline insists
        self._schedule = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", steps_offset=1)
        self.prediction_type = str(self._schedule.config.prediction_type)
        self.latent_shape = _latent_shape(self._unet.config)

    def token_ids(self, captions: list[str]) -> list[bytes]:
        """Return of each caption the ids that the text encoder sees, as bytes."""
        return [b"".join(i.to_bytes(4, "big") for i in row) for row in self._ids(captions)]

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Return the text encoder's states (B, 77, D)."""
        import torch

        states: torch.Tensor = self._text_encoder(torch.tensor(self._ids(captions), device=self.device))[0]
        return states

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

    def _ids(self, captions: list[str]) -> list[list[int]]:
        length = self._text_encoder.config.max_position_embeddings
        ids: list[list[int]] = self._tokenizer(captions, padding="max_length", max_length=length, truncation=True)[
            "input_ids"
        ]
        return ids


@contextmanager
def _silent() -> Iterator[None]:
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
        with _silent():
            yield
    finally:
        for module in with_bars:
            module.enable_progress_bar()


def _refuse_other_families(folder: Path) -> None:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelError("model_index.json does not say what pipeline this is")
    name = str(index["_class_name"])
    if (
        not name.startswith("StableDiffusion")
        or "XL" in name
        or not {"unet", "text_encoder", "tokenizer"} <= set(index)
    ):
        raise ModelError(f"a {name}; this version scores Stable Diffusion 1 and 2 pipelines")


def _whole(kind: Any, folder: Path) -> Any:
    """Return a model of which every weight was in the folder's safetensors files; raises ModelError."""
    model, info = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder.name} lacks {len(missing)} weights, such as {missing[0]}; save or fetch it again")
    return model


def _latent_shape(unet: Any) -> tuple[int, int, int]:
    size = unet.sample_size if isinstance(unet.sample_size, (list, tuple)) else (unet.sample_size,) * 2
    if unet.in_channels != unet.out_channels or None in size:
        raise ModelError(
            f"the UNet takes {unet.in_channels} channels of size {unet.sample_size} and returns {unet.out_channels}; "
            "a text-to-image model's are equal and its size is set"
        )
    return (int(unet.in_channels), int(size[0]), int(size[1]))


def token_digest(ids: bytes) -> bytes:
    """Return the 16-byte blake2b digest under which a condition's score is kept."""
    return hashlib.blake2b(ids, digest_size=16).digest()
