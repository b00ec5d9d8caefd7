"""Weights in the original layout, a whole model in one safetensors file, for parts whose configs lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError

_UNET = ("model.diffusion_model.",)
_VAE = ("first_stage_model.",)
_CLIP_L = ("text_encoders.clip_l.",)
_CLIP_G = ("text_encoders.clip_g.",)
_T5 = ("text_encoders.t5xxl.",)
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "StableDiffusion": {"unet": _UNET, "text_encoder": ("cond_stage_model.",), "vae": _VAE},
    "StableDiffusionXL": {
        "unet": _UNET,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
        "vae": _VAE,
    },
    "StableDiffusion3": {
        "transformer": _UNET,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": _T5,
        "vae": _VAE,
    },
    "Flux": {
        "transformer": (
            *(*_UNET, "double_blocks.", "single_blocks.", "final_layer."),
            *("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in."),
        ),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5,
        "vae": ("vae.", *_VAE),
    },
}
"""How the keys of each part start in the original layout of a family."""
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def find_file(spec: str) -> Path | None:
    """Return the file that is named, None where it is none; raises ModelError for one that is not safetensors."""
    path = Path(spec)
    if path.suffix in _PICKLES and not path.is_dir():
        raise ModelError(
            f"{spec}: a pickle, which can run code and is not read; convert it where you trust it, with diffusers' "
            "from_single_file(FILE).save_pretrained(FOLDER), and give the folder"
        )
    return path if path.is_file() and path.suffix == ".safetensors" else None


def parts_within(file: Path, prefixes: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the keys in the file of each part that it holds, by the prefixes of its keys; raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (OSError, SafetensorError) as e:
        raise ModelError(f"not a whole safetensors file: {e}") from e
    found = {part: [key for key in keys if key.startswith(marks)] for part, marks in prefixes.items()}
    return {part: own for part, own in found.items() if own}


def load_part(kind: Any, file: Path, keys: list[str], folder: Path, dtype: Any) -> Any:
    """Return a model, of the config in the folder, with its weights out of the file.

    Raises ModelError where weights are missing.
    """
    from diffusers.loaders import single_file_utils
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        weights = {key: opened.get_tensor(key) for key in keys}
    missing: list[str] = []

    def load_state_dict(self: Any, state: Any, *_: Any, **__: Any) -> Any:
        outcome = kind.load_state_dict(self, state, strict=False)
        missing.extend(outcome.missing_keys)
        return outcome

    # diffusers leaves at random what the file lacks, and does not tell
    checked = type(kind.__name__, (kind,), {"load_state_dict": load_state_dict, "__module__": kind.__module__})
    where = {"config": str(folder.parent), "subfolder": folder.name, "torch_dtype": dtype, "local_files_only": True}
    if hasattr(kind, "from_single_file"):
        model = checked.from_single_file(weights, low_cpu_mem_usage=False, **where)  # type: ignore[attr-defined]
    elif kind.__name__.startswith("T5"):
        model = single_file_utils.create_diffusers_t5_model_from_checkpoint(checked, checkpoint=weights, **where)
    else:
        model = single_file_utils.create_diffusers_clip_model_from_ldm(checked, checkpoint=weights, **where)
    model.__class__ = kind
    missing += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    known = {id(parameter) for name, parameter in model.named_parameters() if name not in missing}
    # a tied weight has two names, and need not be there under both
    if lacking := [name for name in missing if id(model.state_dict(keep_vars=True)[name]) not in known]:
        raise ModelError(f"{file.name} lacks {len(lacking)} weights of {folder.name}, such as {lacking[0]}")
    return model.eval().requires_grad_(False)
