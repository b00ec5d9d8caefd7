"""Fonts, words and canvases that the drawn documents share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Picture = Image.Image
Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont

FACES = {
    "sans": "DejaVuSans",
    "sans bold": "DejaVuSans-Bold",
    "serif": "DejaVuSerif",
    "serif bold": "DejaVuSerif-Bold",
    "mono": "DejaVuSansMono",
    "mono bold": "DejaVuSansMono-Bold",
    "times": "STIXGeneral",
    "times bold": "STIXGeneralBol",
    "times italic": "STIXGeneralItalic",
    "book": "cmr10",
    "grotesque": "cmss10",
    "typewriter": "cmtt10",
}
"""Typefaces that matplotlib, which imagededup needs, brings to every machine."""

WORDS = (
    "river stone window garden paper winter yellow mountain engine silver market bridge doctor letter forest orange "
    "summer table morning water story city road house bird planet copper valley signal harvest captain mirror lantern "
    "meadow pocket violin castle island thunder blanket compass orchard feather harbour kitchen village ribbon marble "
    "tunnel anchor basket candle desert eagle fabric ginger hammer insect jacket ladder magnet needle olive pepper "
    "quarter rocket saddle temple uncle velvet wagon yard zebra account budget client delivery estimate factory goods "
    "invoice journal licence manager network office policy quality report service tender update vendor warranty"
).split()
VERBS = "finds takes moves opens follows repairs sells carries needs paints counts builds crosses forgets buys".split()
ADJECTIVES = "old small bright quiet heavy green broken simple early empty narrow clever golden late strange".split()
FIRST_NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mona Nils Olga Paul Rosa Sven Tara Uwe".split()
LAST_NAMES = "Abel Brandt Cole Dunn Ekberg Fuchs Grant Holm Ivers Jansen Kruse Lind Moreau Novak Orsini Price".split()


@cache
def font(face: str, size: int) -> Font:
    """Return a typeface of FACES at a size in pixels, laid out alike on every machine."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FACES[face]}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def words(random: Random, count: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(count))


def title(random: Random, count: int) -> str:
    return words(random, count).capitalize()


def sentence(random: Random) -> str:
    one, other = random.sample(WORDS, 2)
    adjectives = random.sample(ADJECTIVES, 2)
    tail = random.choice(
        ["", f" near the {random.choice(WORDS)}", f" before the {random.choice(WORDS)} comes", " every day"]
    )
    start = random.choice(["The", "Our", "Every", "Another", "This"])
    return f"{start} {adjectives[0]} {one} {random.choice(VERBS)} the {adjectives[1]} {other}{tail}."


def person(random: Random) -> str:
    return f"{random.choice(FIRST_NAMES)} {random.choice(LAST_NAMES)}"


def paragraph(random: Random, sentences: int) -> str:
    return " ".join(sentence(random) for _ in range(sentences))


def wrapped(text: str, face: Font, width: float) -> list[str]:
    """Return the text in lines no wider than `width`, but for longer words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write(draw: ImageDraw.ImageDraw, at: tuple[float, float], lines: Iterable[str], face: Font, fill: object) -> float:
    """Write lines one below the other; return where the next would stand."""
    x, y = at
    for line in lines:
        draw.text((x, y), line, fill, face)
        y += round(1.35 * face.size)
    return y


def shade(colour: Colour, by: float) -> Colour:
    """Return the colour, darker for `by` below 0 and lighter above, by this share of the way to black or white."""
    end = 255 if by > 0 else 0
    red, green, blue = (round(v + (end - v) * abs(by)) for v in colour)
    return red, green, blue


def hue(random: Random, saturation: float = 0.7, value: float = 0.8) -> Colour:
    """Return a colour of a random hue."""
    turn = 6 * random.random()
    red, green, blue = (
        round(255 * value * (1 - saturation * max(0.0, min(1.0, k, 4 - k))))
        for k in ((turn + 5) % 6, (turn + 3) % 6, (turn + 1) % 6)
    )
    return red, green, blue


def canvas(width: int, height: int, ground: object = "white") -> tuple[Picture, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), ground)  # type: ignore[arg-type]
    return picture, ImageDraw.Draw(picture)


def smaller(picture: Picture, times: int) -> Picture:
    """Return the picture at 1 / `times` of its size, which smooths the edges that were drawn without."""
    return picture.resize((picture.width // times, picture.height // times), Image.Resampling.BOX)


def backdrop(random: Random, width: int, height: int) -> Picture:
    """Return soft patches of like colours, as behind somebody in a photo."""
    numbers = np.random.default_rng(random.getrandbits(32))
    base = np.array(hue(random, random.uniform(0.1, 0.5), random.uniform(0.4, 0.8)))
    cells = int(numbers.integers(3, 8))
    levels = base + numbers.normal(0, 45, (cells, cells, 1)) + numbers.normal(0, 15, (cells, cells, 3))
    small = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def grainy(picture: Picture, random: Random, strength: float) -> Picture:
    """Return the picture with the grain of a camera's sensor."""
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, strength, (picture.height, picture.width, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def shadowed(shape: Picture, softness: float) -> Picture:
    """Return a drawing on transparent ground laid on white, above its soft shadow."""
    ground = Image.new("RGBA", shape.size, "white")
    dark = Image.new("RGBA", shape.size, (0, 0, 0, 255))
    dark.putalpha(shape.getchannel("A").filter(ImageFilter.GaussianBlur(softness)).point(lambda v: int(v * 0.3)))
    moved = Image.new("RGBA", shape.size)
    moved.paste(dark, (0, round(softness)))
    return Image.alpha_composite(Image.alpha_composite(ground, moved), shape).convert("RGB")


def ticks(highest: float, count: int) -> Iterator[float]:
    """Yield round numbers from 0 to about `highest`."""
    step = highest / count
    magnitude = 10.0 ** np.floor(np.log10(step))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= step)
    for k in range(int(highest / step) + 1):
        yield k * step
