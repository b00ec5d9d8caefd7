"""Edited copies of photos at full resolution, as they circulate: 45 kinds at three strengths, seeded by names alone.

They are written apart from the edits that the built-in descriptor is trained on (`copies.py`: small grey photos).
`Kind.training` tells how much of a kind that training has seen: "yes", "in part", or "no", wholly unseen.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import edits
import numpy as np
from edits import Picture, Random

STRENGTHS = ("weak", "middle", "strong")

PARTNER = 61
"""The second photo of a collage is this many places further on in the list of photos."""

Edit = Callable[[Picture, float, Random], Picture]
Collage = Callable[[Picture, float, Random, Picture], Picture]


@dataclass(frozen=True)
class Kind:
    """One kind of edit: the amount of each strength, how far training has seen it, and how the copy is saved.

    A collage shows a second photo too, and is a copy of both.  A `quality` of 0 saves a PNG.
    """

    edit: Edit | Collage
    amounts: tuple[float, float, float]
    training: str
    quality: tuple[int, int, int] = (90, 90, 90)
    collage: bool = False


def copy_of(photo: Picture, other: Picture, kind: str, strength: str, name: str) -> bytes:
    """Return the copy of an RGB photo as the bytes of a JPEG or PNG; `other` is the second photo of a collage.

    The result depends on the pixels and the three names alone.
    """
    made, level = KINDS[kind], STRENGTHS.index(strength)
    random = np.random.default_rng([zlib.crc32(part.encode()) for part in (kind, strength, name)])
    more = (other,) if made.collage else ()
    picture = made.edit(photo, made.amounts[level], random, *more)
    buffer = io.BytesIO()
    if made.quality[level]:
        picture.save(buffer, "JPEG", quality=made.quality[level])
    else:
        picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


KINDS = {
    "crop_centre": Kind(edits.crop_centre, (0.8, 0.6, 0.4), "yes"),
    "crop_corner": Kind(edits.crop_corner, (0.8, 0.6, 0.4), "yes"),
    "mirror": Kind(edits.mirror, (0, 0, 0), "yes", (90, 50, 20)),
    "mirror_crop": Kind(edits.mirror_crop, (0.8, 0.6, 0.4), "yes"),
    "aspect": Kind(edits.aspect, (1.2, 1.5, 2.0), "yes"),
    "rotation": Kind(edits.rotation, (3, 8, 15), "yes"),
    "perspective": Kind(edits.perspective, (0.06, 0.12, 0.2), "yes"),
    "wave": Kind(edits.wave, (0.01, 0.025, 0.05), "no"),
    "lens": Kind(edits.lens, (0.1, 0.25, 0.45), "no"),
    "border": Kind(edits.border, (0.05, 0.12, 0.25), "yes"),
    "letterbox": Kind(edits.letterbox, (0.15, 0.35, 0.7), "yes"),
    "film_frame": Kind(edits.film_frame, (0.08, 0.15, 0.25), "in part"),
    "screenshot": Kind(edits.screenshot, (0.85, 0.7, 0.55), "in part"),
    "text_bar": Kind(edits.text_bar, (0.1, 0.18, 0.3), "yes"),
    "logo": Kind(edits.logo, (0.12, 0.2, 0.35), "yes"),
    "sticker": Kind(edits.sticker, (0.15, 0.28, 0.45), "in part"),
    "watermark": Kind(edits.watermark, (0.25, 0.5, 0.85), "no"),
    "grid_lines": Kind(edits.grid_lines, (3, 6, 12), "no"),
    "collage_side": Kind(edits.collage_side, (1.0, 0.8, 0.6), "yes", collage=True),
    "collage_stacked": Kind(edits.collage_stacked, (1.0, 0.8, 0.6), "yes", collage=True),
    "picture_in_picture": Kind(edits.picture_in_picture, (0.6, 0.45, 0.3), "in part", collage=True),
    "brightness": Kind(edits.brightness, (0.2, 0.5, 1.0), "yes"),
    "contrast": Kind(edits.contrast, (0.3, 0.8, 2.0), "yes"),
    "gamma": Kind(edits.gamma, (0.3, 0.7, 1.4), "yes"),
    "hue_saturation": Kind(edits.hue_saturation, (0.06, 0.2, 0.45), "in part"),
    "grey": Kind(edits.grey, (0.5, 1.0, 1.6), "in part"),
    "tint": Kind(edits.tint, (0.4, 0.7, 1.0), "in part"),
    "duotone": Kind(edits.duotone, (0.3, 0.6, 0.9), "in part"),
    "posterise": Kind(edits.posterise, (4, 2, 1), "yes", (0, 0, 0)),
    "solarise": Kind(edits.solarise, (192, 144, 96), "no"),
    "negative": Kind(edits.negative, (1.0, 1.4, 0.6), "no"),
    "vignette": Kind(edits.vignette, (0.4, 0.7, 1.0), "yes"),
    "equalise": Kind(edits.equalise, (0.4, 0.7, 1.0), "no"),
    "jpeg": Kind(edits.as_it_is, (0, 0, 0), "yes", (50, 20, 8)),
    "blur": Kind(edits.blur, (0.005, 0.012, 0.025), "yes"),
    "motion_blur": Kind(edits.motion_blur, (0.02, 0.05, 0.1), "no"),
    "noise": Kind(edits.noise, (10, 25, 50), "yes"),
    "downscale": Kind(edits.downscale, (2, 4, 8), "yes"),
    "sharpen": Kind(edits.sharpen, (150, 300, 600), "yes"),
    "pixelate": Kind(edits.pixelate, (48, 28, 16), "yes"),
    "halftone": Kind(edits.halftone, (70, 45, 25), "no"),
    "dither": Kind(edits.dither, (1, 2, 4), "no", (0, 0, 0)),
    "glitch": Kind(edits.glitch, (0.04, 0.1, 0.25), "no"),
    "sketch": Kind(edits.sketch, (0.4, 0.7, 1.0), "no"),
    "painted": Kind(edits.painted, (2, 3, 5), "no"),
}
"""All kinds by name.  Pixelation is among the edits of training, which coarsen with square cells too."""
