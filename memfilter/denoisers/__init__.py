"""A foreign diffusion pipeline, adapted once to one call: (x_t, t, condition) -> raw prediction.

Each family of diffusers pipelines has one adapter in a module here.  Only weights in safetensors files are read;
nothing is unpickled and no remote code is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from ..errors import ConfigError, ModelError
from ..store import file_digest
from .base import Condition, Denoiser, Diffusion, Family, Flow, Index, Source, Token, has, quiet, read_index, silent
from .flux import Flux
from .lora import find_lora, fuse
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .single_file import LAYOUTS, find_file, parts_within
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
    """A model as the user named it, the name that the manifest tells (a folder's or a file's own, or the hub id), and
    the digests of the files that shape a score by relative name; then what takes the place of its parts, as named.
    """

    spec: str
    name: str
    files: dict[str, str] = field(hash=False)
    denoiser: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    single_file_config: str | None = None
    may_read: bool = True
    """Whether the caller of this command named it; where `run.json` alone does, its scores are used and no more."""

    @property
    def stored(self) -> list[Any]:
        """What `run.json` holds of it."""
        return [getattr(self, f.name) for f in fields(self)[:-1]]

    @classmethod
    def read(cls, stored: Any) -> ModelFiles | None:
        """Return the model of a `run.json`, which alone does not allow to read it; raises TypeError for none."""
        return replace(cls(*stored[:7]), may_read=False) if stored else None

    @property
    def parts(self) -> tuple[str | None, str | None, float, str | None]:
        """What `find_model` takes beside the spec."""
        return self.denoiser, self.lora, self.lora_scale, self.single_file_config


def find_model(
    spec: str,
    images: bool = False,
    denoiser: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
    single_file_config: str | None = None,
) -> ModelFiles:
    """Return the files of the pipeline in a folder, a single file or under a hub id, fetched if need be.

    `denoiser` is a folder with a fine-tuned UNet or transformer in place of the pipeline's own, `lora` the file or the
    folder of a LoRA that is fused in, times `lora_scale`; a single file's configs and tokenizers are in the folder, or
    under the hub id, `single_file_config`, or else in the folder of the file's name without its suffix.

    The autoencoder's weights are among the files only where scores rest on `images`.  Raises ModelError when there is
    no diffusers pipeline under that name, or one that cannot be scored, and ConfigError for a package that is missing.
    """
    source, family = _source(spec, denoiser, lora, lora_scale, single_file_config)
    try:
        files = _files(source, family, images)
    except ModelError as e:
        raise ModelError(f"{spec}: {e}") from e
    name = Path(spec).resolve().name if Path(spec).exists() else spec
    digests = {name: file_digest(path) for name, path in sorted(files.items())}
    return ModelFiles(spec, name, digests, denoiser, lora, lora_scale, single_file_config)


def _source(
    spec: str, denoiser: str | None, lora: str | None, lora_scale: float, config: str | None
) -> tuple[Source, Any]:
    """Return where a model's parts lie, and its family; raises ModelError, and ConfigError."""
    file = find_file(spec)
    if config and not file:
        raise ConfigError(f"magnitude.single_file_config is for a model in a safetensors file, which {spec} is not")
    folder = _configs(file, config) if file else _folder(spec)
    place = spec if folder == Path(spec) or not file else str(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{place}: no diffusers pipeline: it has no model_index.json (save one with save_pretrained)")
    try:
        index = read_index(folder)
        family = _family(index)
        within = _within(file, family, index) if file else {}
    except ModelError as e:
        raise ModelError(f"{spec}: {e}") from e
    if denoiser:
        _check_denoiser(Path(denoiser), family)
    found = find_lora(Path(lora)) if lora else None
    return Source(folder, index, Path(denoiser) if denoiser else None, found, lora_scale, file, within), family


def _files(source: Source, family: Any, images: bool) -> dict[str, Path]:
    """Return by name the files that shape a score; raises ModelError where some are missing."""
    path, index = source.folder, source.index
    parts = [part for part in family.parts if part not in family.optional or has(index, part)]
    parts += ["vae"] if images and has(index, "vae") else []
    parts = [part for part in parts if source.denoiser is None or part != family.denoiser[0]]
    places = [path / part for part in parts]
    folders = [place for place in places if not place.suffix]
    if missing := [place.name for place in folders if not place.is_dir()]:
        raise ModelError(f"has no {', '.join(missing)} folder: not a whole {index['_class_name']}")
    if "vae" in parts and "vae" not in source.within and not any((path / "vae").glob("*.safetensors")):
        raise ModelError("vae holds no safetensors file; save or fetch it again")
    within = [p for folder in folders for p in folder.rglob("*") if p.suffix in _SUFFIXES]
    files = {p.relative_to(path).as_posix(): p for p in {*within, *places} if p.is_file()}
    if source.file:  # in whose place the folder's weights are not read
        files = {n: p for n, p in files.items() if p.suffix != ".safetensors" or p.parent.name not in source.within}
        files[source.file.name] = source.file
    if source.denoiser:
        own = (p for p in source.denoiser.iterdir() if p.suffix in (".safetensors", ".json"))
        files |= {f"denoiser/{p.name}": p for p in own}
    if source.lora:
        files[f"lora/{source.lora.name} * {source.lora_scale}"] = source.lora
    return files


def _folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise ModelError(
            f"{spec}: no such folder; --model takes a diffusers pipeline's folder, its hub id, or a safetensors file"
        )
    from diffusers import DiffusionPipeline

    return _fetched(spec, lambda: DiffusionPipeline.download(spec, use_safetensors=True))


def _fetched(spec: str, fetch: Callable[[], Any]) -> Path:
    try:
        with silent():  # but for the progress of a download
            return Path(fetch())
    except Exception as e:  # the hub's client raises what it likes
        cause = " ".join(str(e).split())[:200]
        raise ModelError(
            f"{spec}: neither a folder here nor to be had from the hub ({type(e).__name__}: {cause}); "
            f"fetch it where there is a network with 'hf download {spec}' and give the folder"
        ) from e


def _configs(file: Path, config: str | None) -> Path:
    """Return the folder of a single file's configs and tokenizers, fetched if need be."""
    folder = Path(config) if config else file.with_suffix("")
    if folder.is_dir():
        return folder
    if config is None:
        raise ModelError(
            f"{file}: has no configs and no tokenizer; put those of a diffusers pipeline of its kind into {folder}, or "
            "name their folder or hub id in magnitude.single_file_config"
        )
    if folder.exists() or config.startswith((".", "/", "~")) or config.count("/") != 1:
        raise ModelError(f"{config}: no such folder; magnitude.single_file_config takes a pipeline's folder or hub id")
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in _SUFFIXES if suffix != ".safetensors"]
    return _fetched(config, lambda: snapshot_download(config, allow_patterns=patterns))


def _within(file: Path, family: Any, index: Index) -> dict[str, list[str]]:
    layout = LAYOUTS.get(family.__name__)
    if layout is None:
        read = ", ".join(name for name, other in _FAMILIES.items() if other.__name__ in LAYOUTS)
        raise ModelError(f"single files are read of {read}, not of a {index['_class_name']}; give a pipeline's folder")
    within = parts_within(file, layout)
    part = family.denoiser[0]
    if part not in within:
        raise ModelError(
            f"holds no {part} of a {index['_class_name']} in the original layout (keys that start with "
            f"{layout[part][0]}); is it of another kind than its configs, or a part or a LoRA alone?"
        )
    return {name: keys for name, keys in within.items() if has(index, name)}


def _check_denoiser(folder: Path, family: Any) -> None:
    """Raise ModelError unless the folder has a fine-tuned denoiser of the family."""
    part, kind = family.denoiser
    try:
        name = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"{folder}: no {part}: magnitude.denoiser takes a folder with the config.json and the safetensors files of "
            "a model saved with save_pretrained"
        ) from None
    if name != kind:
        raise ModelError(f"{folder}: a {name}; the pipeline's {part} is a {kind}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: holds no safetensors file; save it with safe_serialization=True")


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
    of a family that has no adapter, and for a LoRA that does not fit.
    """
    import torch

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = {"auto": "float16" if place.type == "cuda" else "float32"}.get(dtype, dtype)
    source, family = _source(model.spec, model.denoiser, model.lora, model.lora_scale, model.single_file_config)
    try:
        with quiet():
            denoiser: Denoiser = family(source, place, getattr(torch, kind))
            if source.lora:
                fuse(cast(Family, denoiser), source.lora, source.lora_scale)
            return denoiser
    except ModelError as e:
        raise ModelError(f"{model.spec}: {e}") from e
    except Exception as e:  # diffusers and transformers raise what they like
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"{model.spec}: the pipeline cannot be loaded: {type(e).__name__}: {cause}") from e


def token_digest(ids: bytes) -> bytes:
    """Return the 16-byte blake2b digest under which a condition's score is kept."""
    return hashlib.blake2b(ids, digest_size=16).digest()
