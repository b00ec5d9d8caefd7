"""Pictures that are no photos, drawn: 20 kinds in two lists, of which any two pictures are different.

    python benchmarks/documents.py --out SHEETS

What is tuned on a set is not proved on it: thresholds may be set on TUNING, and HELD_OUT tells how good they are.  The
command writes a contact sheet a kind, to be looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import drawn_pages as pages
import drawn_pictures as pictures
import numpy as np
from pen import Picture
from PIL import Image


@dataclass(frozen=True)
class Kind:
    """A way to draw; so many pictures in a row are a `series`: of one product, program, template or style.

    `shrinks` is the share of the pictures that are saved at a smaller size, as thumbnails are.
    """

    draw: Callable[[Random, Random, int], tuple[Picture, str]]
    series: int = 1
    shrinks: float = 0.25


TUNING = {
    "page": Kind(pages.page),
    "bar_chart": Kind(pages.bar_chart),
    "line_chart": Kind(pages.line_chart),
    "table": Kind(pages.table),
    "ledger": Kind(pages.ledger, 12),
    "chat": Kind(pages.chat, 8),
    "music": Kind(pages.music),
    "dialog": Kind(pages.dialog, 8, 0.1),
    "code": Kind(pages.code, 8),
    "signal": Kind(pictures.signal, 1000),
}
HELD_OUT = {
    "product": Kind(pictures.product, 48),
    "meme": Kind(pictures.meme, 8),
    "comic": Kind(pictures.comic, 6),
    "map": Kind(pictures.map_, 8, 0.1),
    "slide": Kind(pages.slide, 8),
    "receipt": Kind(pages.receipt, 8),
    "grid": Kind(pages.grid, 2),
    "qr_code": Kind(pages.qr_code, 1, 0.1),
    "card": Kind(pictures.card, 52, 0),
    "flag": Kind(pictures.flag, 1000),
}


def documents(kinds: dict[str, Kind], count: int, seed: int = 0) -> Iterator[tuple[str, Picture, str]]:
    """Yield `count` pictures of each kind as (key, picture, caption), the same for the same seed.

    A picture does not depend on `count`.  AssertionError if two look the same.
    """
    for name, kind in kinds.items():
        seen: dict[bytes, str] = {}
        for number in range(count):
            key = f"{name}-{number:03}"
            shared = Random(f"{seed} {name} series {number // kind.series}")
            random = Random(f"{seed} {name} {number}")
            picture, caption = kind.draw(random, shared, number % kind.series)
            assert seen.setdefault(look(picture), key) == key, f"{key} looks like {seen[look(picture)]}"
            yield key, saved(picture, kind, random), caption


def look(picture: Picture) -> bytes:
    """Return what is equal for two pictures that look the same: the picture on white, small."""
    levels = np.asarray(on_white(picture).resize((96, 96), Image.Resampling.BOX))
    return (levels // 8).tobytes()


def on_white(picture: Picture) -> Picture:
    """Return the picture in RGB, with white where it is transparent."""
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def saved(picture: Picture, kind: Kind, random: Random) -> Picture:
    """Return the picture as somebody saves it: some smaller, some in grey or with a palette."""
    if random.random() < kind.shrinks:
        share = random.uniform(0.5, 0.9)
        size = round(share * picture.width), round(share * picture.height)
        picture = picture.resize(size, random.choice([Image.Resampling.LANCZOS, Image.Resampling.BILINEAR]))
    if picture.mode == "RGB" and random.random() < 0.2:
        levels = np.asarray(picture).astype(int)
        grey = np.ptp(levels, axis=2).max() < 24
        return picture.convert("L") if grey else picture.quantize(random.choice([64, 128, 256]))
    return picture


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--count", type=int, default=40)
    arguments.add_argument("--kinds", nargs="+", default=[*TUNING, *HELD_OUT])
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    across, side = 8, 200
    for name in given.kinds:
        sheet = Image.new("RGB", (across * (side + 4), -(-given.count // across) * (side + 4)), (200, 220, 255))
        for number, (_, picture, _) in enumerate(documents({name: (TUNING | HELD_OUT)[name]}, given.count)):
            thumbnail = picture.convert("RGBA")
            thumbnail.thumbnail((side, side))
            at = (number % across * (side + 4), number // across * (side + 4))
            sheet.paste(thumbnail, at, thumbnail)
        sheet.save(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
