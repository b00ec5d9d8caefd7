"""The demo's samples: pictures and captions made by our own code, with copies of a known kind among them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SEED = 20231
PAIRS = 40
"""Specific pairs that are repeated, and as many that are there once."""
TIMES = 25
"""How often a repeated pair is there."""
_SINGLES = 800
_A_KIND = 20
_PER_SHARD = 250


@dataclass(frozen=True)
class Planted:
    """One sample of the demo: its image file, its caption, of what kind it is, and of which original it is a copy.

    `kind` is `single` for a picture with an ordinary caption, `specific` for one with a caption full of names, and else
    the kind of copy; `original` is a place in the list of samples, -1 for what is no copy.
    """

    data: bytes
    caption: str
    kind: str = "single"
    original: int = -1


Edit = Callable[[Image.Image], bytes]


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """Return the image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _crop(image: Image.Image) -> bytes:
    w, h = image.size
    return jpeg(image.crop((w // 50, h // 50, w - w // 50, h - h // 50)))


IMAGE_KINDS: dict[str, Edit] = {
    "exact copy": jpeg,
    "re-encoded at quality 40": lambda image: jpeg(image, 40),
    "resized to half": lambda image: jpeg(
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    ),
    "cropped by 2% a side": _crop,
    "in a black frame": lambda image: jpeg(ImageOps.expand(image, 10, "black")),
}


def picture(random: np.random.Generator) -> Image.Image:
    """Return a random scene: a shaded ground with a dozen shapes, 192 x 160 pixels."""
    ground = random.integers(30, 220, (3, 4, 3)).astype(np.uint8)
    image = Image.fromarray(ground).resize((192, 160), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = random.integers(-20, 160, 2).tolist()
        w, h = random.integers(15, 90, 2).tolist()
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        shape = random.integers(3)
        if shape == 0:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        elif shape == 1:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        else:
            draw.polygon([(x, y + h), (x + w, y + h), (x + w // 2, y)], fill=colour)
    return image.filter(ImageFilter.GaussianBlur(0.8))


# -- captions ---------------------------------------------------------------------------------------------------------

_COLOURS = (
    "amber azure black bronze coral crimson emerald golden grey indigo ivory jade lilac ochre olive pearl".split()
)
_THINGS = (
    "barn boat bridge candle castle clock fence forest garden harbour kettle lantern meadow mill orchard tower".split()
)
_PLACES = (
    "at dawn|by the river|in the rain|near the coast|on a hill|under a bridge|in winter light|before a storm".split("|")
)
_SYLLABLES = "bar dor fen gal hul ith jor kel lun mir nol osk pel quin rav sol tam ulm vor wes yar zin".split()
_OFFICES = "captain|chemist|clockmaker|composer|duchess|engraver|gardener|glassblower|mayor|pilot|poet|surgeon".split(
    "|"
)


def ordinary_captions(random: np.random.Generator) -> Iterator[str]:
    """Yield captions of two things in a place, as many samples might have, each once."""
    n = len(_COLOURS) * len(_THINGS)
    for i in random.permutation(n * n * len(_PLACES)):
        (first, second), place = divmod(int(i) % (n * n), n), _PLACES[int(i) // (n * n)]
        yield f"{_thing(first)} and {_thing(second)} {place}"


def _thing(i: int) -> str:
    colour, thing = _COLOURS[i % len(_COLOURS)], _THINGS[i // len(_COLOURS)]
    return f"{'an' if colour[0] in 'aeio' else 'a'} {colour} {thing}"


def specific_captions(random: np.random.Generator) -> Iterator[str]:
    """Yield captions full of names, such as act as a key to one picture, each once."""
    seen: set[str] = set()
    while True:
        first, last, town = ("".join(random.choice(_SYLLABLES, 2)).capitalize() for _ in range(3))
        office, year = random.choice(_OFFICES), random.integers(1700, 2000)
        caption = f"{first} {last}, {office} of {town}, {year}"
        if caption not in seen:
            seen.add(caption)
            yield caption


# -- samples ----------------------------------------------------------------------------------------------------------


def samples() -> list[Planted]:
    """Return the demo's samples, shuffled."""
    random = np.random.default_rng(SEED)
    ordinary, specific = ordinary_captions(random), specific_captions(random)
    images = [picture(random) for _ in range(_SINGLES + 2 * PAIRS)]
    planted = [Planted(jpeg(image), next(ordinary)) for image in images[:_SINGLES]]
    planted += [Planted(jpeg(image), next(specific), "specific") for image in images[_SINGLES:]]
    chosen = iter(random.permutation(_SINGLES).tolist())
    for kind, edit in IMAGE_KINDS.items():
        for _ in range(_A_KIND):
            original = next(chosen)
            planted.append(Planted(edit(images[original]), next(ordinary), kind, original))
    for _ in range(_A_KIND):
        original = next(chosen)
        caption = planted[original].caption.upper() + "!"
        planted.append(Planted(jpeg(picture(random)), caption, "repeated caption", original))
    for original in range(_SINGLES, _SINGLES + PAIRS):
        for i in range(TIMES - 1):
            data = jpeg(images[original], 50 + 2 * i)
            planted.append(Planted(data, planted[original].caption, "repeated pair", original))
    planted.append(Planted(planted[next(chosen)].data[:2000], next(ordinary), "corrupt"))
    planted.append(Planted(b"<html>404 Not Found</html>", next(ordinary), "corrupt"))
    order = random.permutation(len(planted))
    place = np.argsort(order)
    return [replace(p, original=int(place[p.original])) if p.original >= 0 else p for p in (planted[i] for i in order)]


def unseen_captions(planted: list[Planted], n: int) -> list[str]:
    """Return captions that none of these samples has, half of them ordinary and half specific."""
    random = np.random.default_rng(SEED + 1)
    used = {p.caption for p in planted}
    found: list[str] = []
    for captions in (ordinary_captions(random), specific_captions(random)):
        fresh = (c for c in captions if c not in used)
        found += [next(fresh) for _ in range(n // 2)]
    return found


def write_shards(planted: list[Planted], folder: Path) -> None:
    """Write the samples as webdataset shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(planted), _PER_SHARD):
        with tarfile.open(folder / f"{start // _PER_SHARD:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, one in enumerate(planted[start : start + _PER_SHARD], start):
                for suffix, data in (("jpg", one.data), ("txt", one.caption.encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
