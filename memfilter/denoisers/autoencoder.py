"""From images to a model's latents: what its autoencoder's config says, and the encoding itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def vae_config(folder: Path) -> dict[str, Any]:
    """Return the autoencoder's config, empty where there is none."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return config if isinstance(config, dict) else {}


def vae_scale(folder: Path) -> int:
    """Return how many pixels a latent spans on a side, 8 where the autoencoder's config does not tell."""
    config = vae_config(folder)
    if "temperal_downsample" in config:
        return 1 << len(config["temperal_downsample"])
    try:
        return 1 << (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)
    except (KeyError, TypeError):
        return 8


def latent_side(folder: Path) -> int:
    """Return the side of the latents of the autoencoder's own image size, or else of 1024 pixels: for transformers
    that take any size.
    """
    size = vae_config(folder).get("sample_size", 1024)
    return int(size) // vae_scale(folder)


def encode(autoencoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return an autoencoder's mean latents of images, normalised as its config says, in float32 or better."""
    import torch

    config, dtype = autoencoder.config, torch.promote_types(autoencoder.dtype, torch.float32)
    images = pixels.to(autoencoder.dtype)
    takes_frames = "temperal_downsample" in config
    out = autoencoder.encode(images.unsqueeze(2) if takes_frames else images, return_dict=False)[0]
    latents: torch.Tensor = (out if isinstance(out, torch.Tensor) else out.mode()).to(dtype)
    latents = latents.squeeze(2) if takes_frames else latents
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (latents.new_tensor(config[f"latents_{n}"]).view(-1, 1, 1) for n in ("mean", "std"))
        latents = (latents - mean) / std
    normalised: torch.Tensor = (latents - (config.get("shift_factor") or 0)) * config.get("scaling_factor", 1.0)
    return normalised
