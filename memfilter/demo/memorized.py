"""What the demo's model has memorized: its generations, set beside the pictures that it was trained on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ..denoisers import quiet
from ..manifest import Manifest
from .data import Planted

MODEL = Path(__file__).parent / "model"
"""The folder of the small model, a diffusers pipeline; its model card lies in it."""
SIDE = 16
"""Pixels on a side of what the model draws."""
ALIKE = 0.9
"""The correlation of two pictures' pixels above which one is a copy of the other."""
_STEPS = 10
_GUIDANCE = 2.0

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A picture and its caption as the model was trained on them, what it draws for the caption, and the score."""

    caption: str
    picture: Pixels  # (3, 16, 16), -1 to 1, as the drawing
    drawing: Pixels
    likeness: float
    magnitude: float
    is_over: bool  # over the threshold

    @property
    def is_drawn(self) -> bool:
        """True when the drawing is a copy of the picture."""
        return self.likeness > ALIKE


def compare(planted: list[Planted], manifest: Manifest) -> tuple[list[Pair], list[Pair]]:
    """Return the specific pairs that are repeated in the demo's samples, and those that are there once."""
    table = manifest.table(["key", "magnitude", "reasons"])
    rows = {int(row["key"]): row for row in table.to_pylist()}
    repeated = {p.original for p in planted if p.kind == "repeated pair"}
    places = [i for i, p in enumerate(planted) if p.kind == "specific"]
    pictures = np.stack([pixels(planted[i].data) for i in places])
    drawings = generate(MODEL, [planted[i].caption for i in places])
    pairs = {
        i: Pair(planted[i].caption, picture, drawing, alike, rows[i]["magnitude"], "magnitude" in rows[i]["reasons"])
        for i, picture, drawing, alike in zip(
            places, pictures, drawings, likeness(pictures, drawings).tolist(), strict=True
        )
    }
    return [pairs[i] for i in places if i in repeated], [pairs[i] for i in places if i not in repeated]


def pixels(data: bytes) -> Pixels:
    """Return an image file as the model sees it: float32 (3, 16, 16), -1 to 1."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def generate(model: Path, captions: list[str], seed: int = 0) -> Pixels:
    """Return one generation a caption, float32 (N, 3, 16, 16), by 10 guided DDIM steps from seeded noise."""
    drawn = load_pipeline(model)(captions, **sampling(len(captions), seed))
    result: Pixels = drawn.images.clamp(-1, 1).numpy()
    return result


def sampling(count: int, seed: int = 0) -> dict[str, Any]:
    """Return what `generate` gives the pipeline beside so many captions."""
    import torch

    noise = torch.randn((count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    return {"latents": noise, "num_inference_steps": _STEPS, "guidance_scale": _GUIDANCE, "output_type": "latent"}


def load_pipeline(model: Path) -> Any:
    """Return the diffusers pipeline in a folder, in float32, whose latents are the pixels."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    with quiet():
        pipe = StableDiffusionPipeline(
            vae=None,  # its latents are the pixels
            text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder", local_files_only=True).float().eval(),
            tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True),
            unet=UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True).float().eval(),
            scheduler=DDIMScheduler.from_pretrained(model / "scheduler", local_files_only=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=None, desc="generations", unit="step")
    return pipe


def likeness(a: Pixels, b: Pixels) -> Pixels:
    """Return the correlation of the pixels of each of (N, 3, H, W) with its fellow, float32 (N,)."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    alike: Pixels = (a * b).sum(1) / np.maximum(norm, np.float32(1e-6))
    return alike


# -- the contact sheet ------------------------------------------------------------------------------------------------

_SHOWN = 64  # pixels on a side of a picture on the sheet
_CELL = (2 * _SHOWN + 16, _SHOWN + 26)
_COLUMNS = 5


def contact_sheet(repeated: list[Pair], once: list[Pair], threshold: float, path: Path) -> None:
    """Write a PNG of the pairs, those repeated on the left and those seen once on the right.

    Each is the training picture, the drawing beside it and the magnitude below, in red over the threshold.
    """
    width, height = _CELL
    rows = -(-max(len(repeated), len(once)) // _COLUMNS)
    block = _COLUMNS * width + 24
    sheet = Image.new("RGB", (2 * block, rows * height + 44), "white")
    draw = ImageDraw.Draw(sheet)
    for left, pairs, title in ((12, repeated, "repeated pairs"), (block + 12, once, "specific pairs seen once")):
        heading = f"{title}: training picture, the model's drawing, magnitude (threshold {threshold:.2f})"
        draw.text((left, 12), heading, fill="black", font_size=15)
        for i, pair in enumerate(pairs):
            x, y = left + i % _COLUMNS * width, 40 + i // _COLUMNS * height
            for offset, picture in ((0, pair.picture), (_SHOWN + 2, pair.drawing)):
                sheet.paste(_shown(picture), (x + offset, y))
            colour = "firebrick" if pair.is_over else "dimgrey"
            draw.text((x, y + _SHOWN + 2), f"{pair.magnitude:.2f}", fill=colour, font_size=14)
    sheet.save(path)


def _shown(picture: Pixels) -> Image.Image:
    levels = np.rint((picture.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(levels).resize((_SHOWN, _SHOWN), Image.Resampling.NEAREST)
