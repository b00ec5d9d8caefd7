"""Encoders of timm and open_clip: by name, from a hub repository, or from a folder that either library saved.

The libraries make the networks; which file of weights they read is settled here, so that its digest can be told.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..images import Frame
from . import weights
from .pretrained import Recipe

_TIMM_CONFIG, _OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_OPEN_CLIP_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
)


def in_folder(path: Path) -> Recipe:
    """Return the recipe for a folder that timm or open_clip saved; raises ModelError for another."""
    if not path.is_dir():
        raise ModelError(
            f"{path}: no such folder; save one with timm.models.save_for_hf, or fetch one with 'hf download'"
        )
    if (path / _OPEN_CLIP_CONFIG).is_file():
        return _open_clip_folder(path, weights.first_of(path, _OPEN_CLIP_FILES + _TIMM_FILES))
    if (path / _TIMM_CONFIG).is_file():
        return _timm_folder(path, weights.first_of(path, _TIMM_FILES))
    raise ModelError(f"{path}: holds neither {_OPEN_CLIP_CONFIG} nor {_TIMM_CONFIG}: not a model of open_clip or timm")


def on_hub(repository: str) -> Recipe:
    """Return the recipe for a hub repository of timm or open_clip, fetched if need be; raises ModelError."""
    config = weights.fetched(repository, (_OPEN_CLIP_CONFIG, _TIMM_CONFIG))
    # both files are of one revision, the folder's name in the cache
    pinned = f"{repository.partition('@')[0]}@{config.parent.name}"
    if config.name == _OPEN_CLIP_CONFIG:
        return _open_clip_folder(config.parent, weights.fetched(pinned, _OPEN_CLIP_FILES))
    return _timm_folder(config.parent, weights.fetched(pinned, _TIMM_FILES))


def timm_named(name: str) -> Recipe:
    """Return the recipe for a pretrained model by timm's name; raises ConfigError or ModelError."""
    timm = _library("timm", "timm")
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the tag
        found = None
    if found is None or not (found.hf_hub_id or found.url):
        raise ConfigError(f"images.encoder = 'timm:{name}': not pretrained in timm; timm.list_pretrained() tells names")
    if found.hf_hub_id:
        file = weights.fetched(found.hf_hub_id, (found.hf_hub_filename,) if found.hf_hub_filename else _TIMM_FILES)
    else:
        file = weights.downloaded(found.url)
    return _timm_recipe(f"timm:{name}", name, found.architecture, None, found.to_dict(), file)


def open_clip_named(name: str) -> Recipe:
    """Return the recipe for `ARCH/TAG` of open_clip, or `ARCH/FILE` with a file here."""
    open_clip = _library("open_clip", "open_clip_torch")
    architecture, _, tag = name.partition("/")
    model = open_clip.get_model_config(architecture)
    if model is None:
        raise ConfigError(
            f"images.encoder = 'open_clip:{name}': no {architecture!r}; open_clip.list_models() tells names"
        )
    found = open_clip.get_pretrained_cfg(architecture, tag)
    if found and found["hf_hub"]:
        repository, _, file_name = found["hf_hub"].rpartition("/")
        file = weights.fetched(repository, _alternatives(file_name) if file_name else _OPEN_CLIP_FILES)
    elif found:
        file = weights.downloaded(found["url"])
    elif Path(tag).is_file():
        file = Path(tag)
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(
            f"images.encoder = 'open_clip:{name}': {tag!r} is neither a file here nor a tag of {architecture}: {tags}"
        )
    quick = bool(found.get("quick_gelu"))
    make = partial(open_clip.create_model, architecture, force_quick_gelu=quick)
    return _open_clip_recipe(architecture, [model, quick], model, found, file, make)


def _alternatives(name: str) -> tuple[str, ...]:
    stem, dot, suffix = name.rpartition(".")
    return (f"{stem}.safetensors", name) if dot and suffix in ("bin", "pth") else (name,)


# -- timm -------------------------------------------------------------------------------------------------------------


def _timm_folder(folder: Path, file: Path) -> Recipe:
    config = weights.read_config(folder / _TIMM_CONFIG)
    settings = config.get("pretrained_cfg", config)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not isinstance(settings, dict):
        raise ModelError(f"{folder / _TIMM_CONFIG}: names no architecture: not a model of timm")
    return _timm_recipe(str(folder), f"local-dir:{folder}", architecture, config, settings, file)


def _timm_recipe(
    origin: str, name: str, architecture: str, config: Any, settings: dict[str, Any], file: Path
) -> Recipe:
    timm = _library("timm", "timm")
    data = importlib.import_module("timm.data").resolve_data_config(pretrained_cfg=settings)
    channels, height, width = data["input_size"]
    if (channels, height) != (3, width):
        raise ModelError(f"{origin}: takes {channels} channels of {height} x {width} pixels, not RGB squares")
    mode = {"squash": "squash", "border": "longest"}.get(data["crop_mode"], "shortest")
    mean = tuple(float(m) for m in data["mean"])
    fill = tuple(round(255 * m) for m in mean) if mode == "longest" else (0, 0, 0)

    def build() -> nn.Module:
        # of tensors that are read here, never by timm; with its classifier, so that no weight may be missing
        overlay = {
            "state_dict": weights.read(file),
            "source": "",
            "file": None,
            "hf_hub_id": None,
            "custom_load": False,
        }
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        model.pretrained_cfg = model.default_cfg = {}  # they hold the tensors once more
        model.reset_classifier(0)
        return model  # type: ignore[no-any-return]

    return Recipe(
        kind=f"timm/{architecture}",
        settings=config,
        file=file,
        side=width,
        frame=Frame(math.floor(width / data["crop_pct"]), mode, data["interpolation"], fill),  # type: ignore[arg-type]
        mean=mean,
        std=tuple(float(s) for s in data["std"]),
        similarity=None,
        libraries=("timm",),
        build=build,
    )


# -- open_clip --------------------------------------------------------------------------------------------------------


def _open_clip_folder(folder: Path, file: Path) -> Recipe:
    open_clip = _library("open_clip", "open_clip_torch")
    config = weights.read_config(folder / _OPEN_CLIP_CONFIG)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise ModelError(f"{folder / _OPEN_CLIP_CONFIG}: has no model_cfg with a vision_cfg: not a model of open_clip")
    make = partial(open_clip.create_model, f"local-dir:{folder}")
    return _open_clip_recipe("local", config, model, config.get("preprocess_cfg", {}), file, make)


def _open_clip_recipe(
    architecture: str, settings: Any, model: dict[str, Any], preprocessing: dict[str, Any], file: Path, make: Any
) -> Recipe:
    open_clip = _library("open_clip", "open_clip_torch")
    defaults = importlib.import_module("open_clip.transform").PreprocessCfg()
    size = model["vision_cfg"].get("image_size", 224)
    height, side = size if isinstance(size, (list, tuple)) else (size, size)
    if height != side:
        raise ModelError(f"{file}: takes {height} x {side} pixels, not squares")
    chosen = {
        key: preprocessing.get(key) or getattr(defaults, key)
        for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")
    }

    def build() -> nn.Module:
        with _quiet_root_logger():
            network = make(load_weights=False, pretrained_text=False, pretrained_image=False)
            open_clip.load_checkpoint(network, str(file), strict=True, weights_only=True)
        return _ImageTower(network.visual)

    return Recipe(
        kind=f"open_clip/{architecture}",
        settings=settings,
        file=file,
        side=side,
        frame=Frame(
            side,
            chosen["resize_mode"],
            "bilinear" if chosen["interpolation"] == "bilinear" else "bicubic",  # as its own transform has it
            (chosen["fill_color"],) * 3,
        ),
        mean=tuple(float(m) for m in chosen["mean"]),
        std=tuple(float(s) for s in chosen["std"]),
        similarity=None,
        libraries=("open_clip_torch", "timm"),
        build=build,
    )


class _ImageTower(nn.Module):
    """The image's half of a CLIP; the text's is let go."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        found = self.visual(images)
        rows: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa returns its tokens too
        return rows


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip, which logs through the root logger, from configuring it and from speaking through it."""
    root, nowhere, before = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(nowhere)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(nowhere)


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(
            f"images.encoder needs {package}, which cannot be imported ({e}); install it with "
            "pip install 'memfilter[encoders]'"
        ) from e
