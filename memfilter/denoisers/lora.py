"""A LoRA fused into a denoiser and its text encoders, by the loaders of diffusers, or refused where it does not fit."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError
from .base import Family

if TYPE_CHECKING:
    import torch

_SIDE = re.compile(r"(?P<module>.+?)\.(?P<side>lora_A|lora_B|lora_|lokr_|alpha)")


def find_lora(path: Path) -> Path:
    """Return the safetensors file at the path, or the only one in the folder there; raises ModelError, and ConfigError
    where the library that fuses it is not installed.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or len(files) != 1 or files[0].suffix != ".safetensors":
        what = "no such file"
        if path.is_dir():
            what = f"a folder with {len(files)} safetensors files"
        elif path.exists():
            what = f"a {path.suffix or 'file'} file"
        raise ModelError(f"{path}: {what}; magnitude.lora takes a LoRA's safetensors file, or a folder with one")
    try:
        import peft  # noqa: F401
    except ImportError as e:
        raise ConfigError(f"a LoRA needs a package that is not installed: pip install 'memfilter[lora]' ({e})") from e
    return files[0]


def fuse(denoiser: Family, file: Path, scale: float) -> None:
    """Add a LoRA's low-rank products, times `scale`, to the weights that they are for.

    Raises ModelError for one of which not every key fits, or of a family for which diffusers loads none.
    """
    import diffusers

    kind = getattr(diffusers, denoiser.pipelines[0])
    if not hasattr(kind, "load_lora_weights"):
        raise ModelError(f"diffusers loads no LoRA into a {denoiser.pipelines[0]}")
    parts = denoiser.lora_parts()
    nothing = dict.fromkeys(name for name in inspect.signature(kind).parameters if name not in _defaults(kind))
    pipeline = kind(**(nothing | parts))
    where: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    unet = {"unet_config": parts["unet"].config} if "unet" in parts else {}
    try:
        out = pipeline.lora_state_dict(str(file.parent), **where, **unet)
        state = out[0] if isinstance(out, tuple) else out
        misfits = _misfits(state, parts)
    except Exception as e:  # diffusers raises what it likes
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"{file}: no LoRA that diffusers reads for this model: {cause}") from e
    if misfits:
        raise ModelError(
            f"{file}: {len(misfits)} of the LoRA's {len(state)} keys do not fit the model, such as {misfits[0]}; "
            "it is of another model"
        )
    pipeline.load_lora_weights(str(file.parent), **where)
    pipeline.fuse_lora(components=[*parts], lora_scale=scale)
    pipeline.unload_lora_weights()
    for part in parts.values():
        part.eval().requires_grad_(False)


def _defaults(kind: Any) -> set[str]:
    """Return the names of a pipeline's settings, which are no parts."""
    settings = inspect.signature(kind).parameters.values()
    return {setting.name for setting in settings if setting.default is not inspect.Parameter.empty}


def _misfits(state: dict[str, torch.Tensor], parts: dict[str, Any]) -> list[str]:
    """Return the keys for which no part has a layer, or one of another size."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils import convert_unet_state_dict_to_peft as of_denoiser

    def of_text_encoder(own: dict[str, Any]) -> dict[str, Any]:
        return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(own)))

    misfits = [key for key in state if key.split(".")[0] not in parts]
    for name, part in parts.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if not own:
            continue
        if not any("lora_A" in key or ".lokr_" in key for key in own):
            own = (of_text_encoder if name.startswith("text_encoder") else of_denoiser)(own)
        layers = dict(part.named_modules())
        for key, tensor in own.items():
            found = _SIDE.match(key)
            # some versions of transformers wrap a CLIP in a module of this name
            names = (found["module"], found["module"].removeprefix("text_model.")) if found else ()
            layer = next((layers[n] for n in names if n in layers), None)
            if found is None or layer is None or not _fits(tensor, found["side"], layer):
                misfits.append(prefix + key)
    return misfits


def _fits(tensor: torch.Tensor, side: str, layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    if weight is None:
        return False
    if side == "lora_A" and weight.ndim > 1:
        return bool(tensor.shape[1] == weight.shape[1])
    return side != "lora_B" or bool(tensor.shape[0] == weight.shape[0])
