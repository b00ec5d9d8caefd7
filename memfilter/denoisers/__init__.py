"""A foreign diffusion pipeline, adapted once to one call: (x_t, t, condition) -> raw prediction.

Each family of diffusers pipelines has one adapter in a module here.  Only weights in safetensors files are read;
nothing is unpickled and no remote code is run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..store import file_digest
from .base import Condition, Denoiser, Diffusion, Flow, Index, Source, Token, has, quiet, read_index, silent
from .flux import Flux
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusion3, StableDiffusionXL
from .z_image import ZImage

__all__ = [
    "Condition",
    "Denoiser",
    "Diffusion",
    "Flow",
    "ModelFiles",
    "Token",
    "find_model",
    "load_denoiser",
    "quiet",
    "token_digest",
]

_FAMILIES: dict[str, Any] = {
    "Stable Diffusion 1 and 2": StableDiffusion,
    "SDXL": StableDiffusionXL,
    "SD3": StableDiffusion3,
    "Flux": Flux,
    "PixArt": PixArt,
    "Sana": Sana,
    "Lumina2": Lumina2,
    "Z-Image": ZImage,
    "Qwen-Image": QwenImage,
}
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline as the user named it, the name that the manifest tells (a folder's own, or the hub id), and the
    digests of the files that shape a score by relative name.
    """

    spec: str
    name: str
    files: dict[str, str] = field(hash=False)


def find_model(spec: str, images: bool = False) -> ModelFiles:
    """Return the files of the pipeline in a folder, or of a hub id, fetched if need be.

    The autoencoder's weights are among them only where scores rest on `images`.  Raises ModelError when there is no
    diffusers pipeline under that name, or one that cannot be scored.
    """
    path = _folder(spec)
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{spec}: no diffusers pipeline: it has no model_index.json (save one with save_pretrained)")
    try:
        index = read_index(path)
        family = _family(index)
    except ModelError as e:
        raise ModelError(f"{spec}: {e}") from e
    parts = [*family.parts, "vae"] if images and has(index, "vae") else family.parts
    places = [path / part for part in parts if part not in family.optional or has(index, part)]
    folders = [place for place in places if not place.suffix]
    if missing := [place.name for place in folders if not place.is_dir()]:
        raise ModelError(f"{spec}: has no {', '.join(missing)} folder: not a whole {index['_class_name']}")
    if "vae" in parts and not any((path / "vae").glob("*.safetensors")):
        raise ModelError(f"{spec}: vae holds no safetensors file; save or fetch it again")
    within = [p for folder in folders for p in folder.rglob("*") if p.suffix in _SUFFIXES]
    files = sorted(p for p in {*within, *places} if p.is_file())
    name = path.resolve().name if Path(spec).is_dir() else spec
    return ModelFiles(spec, name, {p.relative_to(path).as_posix(): file_digest(p) for p in files})


def _folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(f"{spec}: no such folder; --model takes a diffusers pipeline's folder or its hub id")
    from diffusers import DiffusionPipeline

    try:
        with silent():  # but for the progress of a download
            return Path(DiffusionPipeline.download(spec, use_safetensors=True))
    except Exception as e:  # the hub's client raises what it likes
        cause = " ".join(str(e).split())[:200]
        raise ModelError(
            f"{spec}: neither a folder here nor to be had from the hub ({type(e).__name__}: {cause}); "
            f"fetch it where there is a network with 'hf download {spec}' and give the folder"
        ) from e


def _family(index: Index) -> Any:
    name = str(index["_class_name"])
    supported = f"this version scores pipelines of {', '.join(_FAMILIES)}"
    family = next((f for f in _FAMILIES.values() if name in f.pipelines), None)
    if family is None:
        raise ModelError(f"a {name}; {supported}")
    required = [part for part in family.parts if "." not in part and part not in family.optional]
    if missing := [part for part in required if not has(index, part)]:
        raise ModelError(f"a {name} that names no {', '.join(missing)}; {supported}, with their text conditioning")
    return family


def load_denoiser(model: ModelFiles, dtype: str, device: str | None = None) -> Denoiser:
    """Return the pipeline's denoiser on a device, by default the GPU if there is one, else the CPU, for evaluation.

    `auto` is float16 on a GPU and float32 on a CPU.  Raises ModelError for a pipeline that cannot be loaded whole or is
    of a family that has no adapter.
    """
    import torch

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = {"auto": "float16" if place.type == "cuda" else "float32"}.get(dtype, dtype)
    folder = _folder(model.spec)
    try:
        with quiet():
            index = read_index(folder)
            denoiser: Denoiser = _family(index)(Source(folder, index), place, getattr(torch, kind))
            return denoiser
    except ModelError as e:
        raise ModelError(f"{model.spec}: {e}") from e
    except Exception as e:  # diffusers and transformers raise what they like
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"{model.spec}: the pipeline cannot be loaded: {type(e).__name__}: {cause}") from e


def token_digest(ids: bytes) -> bytes:
    """Return the 16-byte blake2b digest under which a condition's score is kept."""
    return hashlib.blake2b(ids, digest_size=16).digest()
