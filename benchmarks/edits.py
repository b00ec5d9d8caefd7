"""Edits of RGB photos at full resolution, one function each: (photo, amount, random) -> picture.

What `amount` means, a share, an angle, a number of levels, is the function's own; `transformations.py` says how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Picture = Image.Image
Random = np.random.Generator
Levels = npt.NDArray[np.float32]


def _levels(picture: Picture) -> Levels:
    return np.asarray(picture, np.float32)


def _picture(levels: npt.NDArray[np.floating]) -> Picture:
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _toned(picture: Picture, curve: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Picture:
    """Return the picture with one curve from 0..1 to 0..1 laid over all its channels."""
    table = np.clip(np.rint(255 * curve(np.arange(256) / 255)), 0, 255).astype(int).tolist()
    return picture.point(table * len(picture.getbands()))


def _either(random: Random) -> float:
    return 1.0 if random.random() < 0.5 else -1.0


def _colour(random: Random) -> tuple[int, int, int]:
    """Return black or white half of the time, else any colour."""
    red, green, blue = (int(v) for v in random.integers(0, 256, 3))
    return (red, green, blue) if random.random() < 0.5 else ((0, 0, 0) if random.random() < 0.5 else (255, 255, 255))


# -- the frame that is taken, and its geometry ------------------------------------------------------------------------


def _window(photo: Picture, area: float, x: float, y: float) -> Picture:
    """Return a crop of this share of the area; x and y from 0 to 1 place it."""
    width, height = (max(8, round(side * math.sqrt(area))) for side in photo.size)
    left, top = round(x * (photo.width - width)), round(y * (photo.height - height))
    return photo.crop((left, top, left + width, top + height))


def crop_centre(photo: Picture, area: float, random: Random) -> Picture:
    return _window(photo, area, 0.5, 0.5)


def crop_corner(photo: Picture, area: float, random: Random) -> Picture:
    return _window(photo, area, float(random.integers(2)), float(random.integers(2)))


def mirror(photo: Picture, amount: float, random: Random) -> Picture:
    return ImageOps.mirror(photo)


def mirror_crop(photo: Picture, area: float, random: Random) -> Picture:
    return _window(ImageOps.mirror(photo), area, random.random(), random.random())


def aspect(photo: Picture, stretch: float, random: Random) -> Picture:
    root = math.sqrt(stretch) ** _either(random)
    return photo.resize((round(photo.width * root), round(photo.height / root)), Image.Resampling.LANCZOS)


def rotation(photo: Picture, degrees: float, random: Random) -> Picture:
    return photo.rotate(degrees * _either(random), Image.Resampling.BILINEAR, fillcolor=_colour(random))


def perspective(photo: Picture, amount: float, random: Random) -> Picture:
    """Pull two neighbouring corners inwards: the photo of a print from the side."""
    width, height = photo.size
    x, y = amount * width, amount * height
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
    pulls = [[[-x, -y], [0, 0], [0, 0], [-x, y]], [[0, 0], [x, -y], [x, y], [0, 0]]]
    pulls += [[[-x, -y], [x, -y], [0, 0], [0, 0]], [[0, 0], [0, 0], [x, y], [-x, y]]]
    source = corners + np.array(pulls[random.integers(4)])
    rows = [[*p, 1, 0, 0, 0, -q[0] * p[0], -q[0] * p[1]] for p, q in zip(corners, source, strict=True)]
    rows += [[0, 0, 0, *p, 1, -q[1] * p[0], -q[1] * p[1]] for p, q in zip(corners, source, strict=True)]
    solved = np.linalg.solve(np.array(rows), np.concatenate([source[:, 0], source[:, 1]]))
    fill = _colour(random)
    return photo.transform(
        photo.size, Image.Transform.PERSPECTIVE, solved.tolist(), Image.Resampling.BILINEAR, fillcolor=fill
    )


def _moved(photo: Picture, place: Callable[[Any, Any], tuple[Any, Any]]) -> Picture:
    """Return the photo with each pixel taken from where `place` maps it, in units of half a side from the centre."""
    levels = np.asarray(photo)
    height, width = levels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    x, y = place(x, y)
    columns = np.clip(np.rint((x + 1) / 2 * (width - 1)), 0, width - 1).astype(np.intp)
    rows = np.clip(np.rint((y + 1) / 2 * (height - 1)), 0, height - 1).astype(np.intp)
    return Image.fromarray(levels[rows, columns])


def wave(photo: Picture, amount: float, random: Random) -> Picture:
    phase = random.uniform(0, 6.28, 2).astype(np.float32)
    return _moved(photo, lambda x, y: (x + amount * np.sin(9 * y + phase[0]), y + amount * np.sin(9 * x + phase[1])))


def lens(photo: Picture, amount: float, random: Random) -> Picture:
    """Bulge the photo as a fisheye does."""
    return _moved(
        photo, lambda x, y: (x * (1 - amount + amount * (r := x * x + y * y) / 2), y * (1 - amount + amount * r / 2))
    )


# -- frames and overlays ----------------------------------------------------------------------------------------------

_WORDS = (
    "follow for more when you see it every single time nobody expects monday best day ever limited offer "
    "share with a friend copyright sample preview not for sale breaking news today only"
).split()


def _text(random: Random, words: int) -> str:
    return " ".join(str(w) for w in random.choice(_WORDS, words))


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(6.0, size))


def border(photo: Picture, amount: float, random: Random) -> Picture:
    return ImageOps.expand(photo, round(amount * min(photo.size)), _colour(random))


def letterbox(photo: Picture, amount: float, random: Random) -> Picture:
    """Add bars above and below, or left and right, of `amount` of the side in all."""
    bar = (0, round(amount * photo.height / 2)) if random.random() < 0.5 else (round(amount * photo.width / 2), 0)
    return ImageOps.expand(photo, bar, 0 if random.random() < 0.7 else 0xFFFFFF)


def text_bar(photo: Picture, amount: float, random: Random) -> Picture:
    """Lay a bar with a line of text over the top or the bottom, or add it there."""
    width, bar = photo.width, max(10, round(amount * photo.height))
    ink, paper = [((0, 0, 0), (255, 255, 255)), ((255, 255, 255), (0, 0, 0))][random.integers(2)]
    added, above = random.random() < 0.5, random.random() < 0.5
    grown = bar if added else 0
    canvas = Image.new("RGB", (width, photo.height + grown), paper)
    canvas.paste(photo, (0, grown if above else 0))
    top = 0 if above else canvas.height - bar
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, top, width, top + bar), paper)
    draw.text((width / 30, top + bar * 0.2), _text(random, 7), ink, _font(bar * 0.5))
    return canvas


def logo(photo: Picture, amount: float, random: Random) -> Picture:
    """Lay a disc with two letters into a corner."""
    photo = photo.copy()
    side = amount * min(photo.size)
    left = side * 0.2 if random.random() < 0.5 else photo.width - side * 1.2
    top = side * 0.2 if random.random() < 0.5 else photo.height - side * 1.2
    draw = ImageDraw.Draw(photo)
    draw.ellipse((left, top, left + side, top + side), _colour(random), (255, 255, 255), max(1, round(side / 20)))
    letters = "".join(random.choice([*"ABCDEFGHKLMNPRSTVXZ"], 2))
    draw.text((left + side / 2, top + side / 2), letters, _colour(random), _font(side * 0.5), "mm")
    return photo


def sticker(photo: Picture, amount: float, random: Random) -> Picture:
    """Lay three yellow faces over the photo."""
    photo = photo.copy()
    draw = ImageDraw.Draw(photo)
    side = amount * min(photo.size)
    for _ in range(3):
        x, y = random.uniform(0, photo.width - side), random.uniform(0, photo.height - side)
        draw.ellipse((x, y, x + side, y + side), (255, 204, 51), (150, 100, 0), max(1, round(side / 30)))
        for eye in (0.33, 0.67):
            across, down = x + eye * side, y + 0.38 * side
            draw.ellipse((across - side / 14, down - side / 9, across + side / 14, down + side / 9), (80, 50, 10))
        mouth = (x + side * 0.25, y + side * 0.3, x + side * 0.75, y + side * 0.8)
        draw.arc(mouth, 20, 160, (80, 50, 10), max(1, round(side / 16)))
    return photo


def watermark(photo: Picture, opacity: float, random: Random) -> Picture:
    """Repeat a slanted line of text all over the photo."""
    reach = round(math.hypot(*photo.size))
    layer = Image.new("L", (reach, reach))
    draw = ImageDraw.Draw(layer)
    size = max(10, min(photo.size) // 12)
    line = (_text(random, 2).upper() + "   ") * 12
    for k in range(0, reach, round(2.5 * size)):
        draw.text((-int(random.integers(0, 8 * size)), k), line, round(255 * opacity), _font(size))
    layer = layer.rotate(float(random.uniform(20, 40)) * _either(random), Image.Resampling.BILINEAR)
    left, top = (reach - photo.width) // 2, (reach - photo.height) // 2
    ink = Image.new("RGB", photo.size, (255, 255, 255) if random.random() < 0.7 else (0, 0, 0))
    return Image.composite(ink, photo, layer.crop((left, top, left + photo.width, top + photo.height)))


def grid_lines(photo: Picture, cells: float, random: Random) -> Picture:
    photo = photo.copy()
    draw = ImageDraw.Draw(photo)
    step = min(photo.size) / cells
    colour, width = _colour(random), max(1, round(min(photo.size) / 90))
    for k in range(1, math.ceil(max(photo.size) / step)):
        draw.line((k * step, 0, k * step, photo.height), colour, width)
        draw.line((0, k * step, photo.width, k * step), colour, width)
    return photo


def screenshot(photo: Picture, share: float, random: Random) -> Picture:
    """Show the photo in a page of an application: a bar above, a line of icons and two of text below."""
    dark = random.random() < 0.5
    paper, ink, faint = (
        ((18, 18, 18), (235, 235, 235), (70, 70, 70)) if dark else ((255, 255, 255), (20, 20, 20), (205, 205, 205))
    )
    width, extra = photo.width, round(photo.height * (1 / share - 1))
    canvas = Image.new("RGB", (width, photo.height + extra), paper)
    head = round(extra * 0.4)
    canvas.paste(photo, (0, head))
    draw, unit = ImageDraw.Draw(canvas), max(8.0, extra * 0.12)
    draw.ellipse((unit, head / 2 - unit, 3 * unit, head / 2 + unit), faint)
    draw.text((3.5 * unit, head / 2), _text(random, 2), ink, _font(unit), "lm")
    foot = head + photo.height
    for k in range(3):
        draw.rectangle(
            (unit + 2.5 * k * unit, foot + unit / 2, unit * (2.2 + 2.5 * k), foot + 1.7 * unit), None, ink, 2
        )
    for k in range(2):
        draw.text((unit, foot + unit * (2.1 + 1.3 * k)), _text(random, 6), ink if k == 0 else faint, _font(unit))
    return canvas


def film_frame(photo: Picture, amount: float, random: Random) -> Picture:
    """Put the photo between two black strips with sprocket holes."""
    strip = round(amount * photo.height)
    framed = ImageOps.expand(photo, (strip // 3, strip), 0)
    draw, hole = ImageDraw.Draw(framed), strip * 0.5
    for k in range(math.ceil(framed.width / (1.8 * hole))):
        for top in (strip * 0.25, framed.height - strip * 0.75):
            draw.rounded_rectangle((k * 1.8 * hole, top, k * 1.8 * hole + hole, top + hole), hole / 5, (240, 240, 240))
    return framed


# -- collages: the copy shows a second photo --------------------------------------------------------------------------


def collage_side(photo: Picture, share: float, random: Random, other: Picture) -> Picture:
    """Set two photos of one height side by side, each with this share of its width."""
    height, gap = photo.height, round(photo.width * 0.01)
    wide = [max(8, round(p.width * height / p.height * share)) for p in (photo, other)]
    parts = [
        _cut(p, share, 1.0).resize((w, height), reducing_gap=3.0) for p, w in zip((photo, other), wide, strict=True)
    ]
    order = [0, 1] if random.random() < 0.5 else [1, 0]
    canvas = Image.new("RGB", (sum(wide) + gap, height), (255, 255, 255))
    canvas.paste(parts[order[0]], (0, 0))
    canvas.paste(parts[order[1]], (wide[order[0]] + gap, 0))
    return canvas


def collage_stacked(photo: Picture, share: float, random: Random, other: Picture) -> Picture:
    """Set two photos of one width one above the other, each with this share of its height."""
    turned = [p.transpose(Image.Transpose.TRANSPOSE) for p in (photo, other)]
    return collage_side(turned[0], share, random, turned[1]).transpose(Image.Transpose.TRANSPOSE)


def _cut(photo: Picture, across: float, down: float) -> Picture:
    x, y = photo.width * (1 - across) / 2, photo.height * (1 - down) / 2
    return photo.crop((round(x), round(y), round(photo.width - x), round(photo.height - y)))


def picture_in_picture(photo: Picture, share: float, random: Random, other: Picture) -> Picture:
    """Lay the photo, at this share of the other's width or height, into a corner of the other."""
    inset = ImageOps.contain(photo, (round(other.width * share), round(other.height * share)))
    inset = ImageOps.expand(inset, 2, (255, 255, 255))
    other, margin = other.copy(), round(0.03 * min(other.size))
    left = margin if random.random() < 0.5 else other.width - inset.width - margin
    top = margin if random.random() < 0.5 else other.height - inset.height - margin
    other.paste(inset, (left, top))
    return other


# -- tones and colours ------------------------------------------------------------------------------------------------


def brightness(photo: Picture, amount: float, random: Random) -> Picture:
    return ImageEnhance.Brightness(photo).enhance((1 + amount) ** _either(random))


def contrast(photo: Picture, amount: float, random: Random) -> Picture:
    return ImageEnhance.Contrast(photo).enhance((1 + amount) ** _either(random))


def gamma(photo: Picture, amount: float, random: Random) -> Picture:
    exponent = (1 + amount) ** _either(random)
    return _toned(photo, lambda v: v**exponent)


def hue_saturation(photo: Picture, amount: float, random: Random) -> Picture:
    """Turn the hue by up to `amount` of a circle and change the saturation."""
    hsv = np.array(photo.convert("HSV"))
    hsv[..., 0] += np.uint8(round(255 * amount * _either(random)) % 256)
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + 2 * amount) ** _either(random), 0, 255).astype(np.uint8)
    return Image.fromarray(hsv, "HSV").convert("RGB")


def grey(photo: Picture, amount: float, random: Random) -> Picture:
    """Take half of the colour, all of it, or all of it with a harder contrast."""
    grey = ImageEnhance.Color(photo).enhance(max(0.0, 1 - amount))
    return ImageEnhance.Contrast(grey).enhance(max(1.0, amount))


def tint(photo: Picture, amount: float, random: Random) -> Picture:
    """Move the photo towards sepia, or towards a tint of any colour."""
    grey = _levels(photo.convert("L"))[..., None]
    tint = np.array([1.15, 0.95, 0.7]) if random.random() < 0.5 else random.uniform(0.4, 1.3, 3)
    return _picture((1 - amount) * _levels(photo) + amount * grey * tint.astype(np.float32))


def duotone(photo: Picture, amount: float, random: Random) -> Picture:
    """Map dark to one colour and light to another, stronger amounts with less between them."""
    grey = _levels(ImageOps.autocontrast(photo.convert("L")))[..., None] / 255
    dark, light = random.uniform(0, 130 * amount, 3), random.uniform(255 - 130 * amount, 255, 3)
    return _picture(dark.astype(np.float32) + grey * (light - dark).astype(np.float32))


def posterise(photo: Picture, bits: float, random: Random) -> Picture:
    return ImageOps.posterize(photo, round(bits))


def solarise(photo: Picture, threshold: float, random: Random) -> Picture:
    return ImageOps.solarize(photo, round(threshold))


def negative(photo: Picture, amount: float, random: Random) -> Picture:
    return ImageEnhance.Contrast(ImageOps.invert(photo)).enhance(amount)


def vignette(photo: Picture, amount: float, random: Random) -> Picture:
    y, x = np.mgrid[-1 : 1 : photo.height * 1j, -1 : 1 : photo.width * 1j].astype(np.float32)
    return _picture(_levels(photo) * (1 - amount * np.clip(x * x + y * y, 0, 1.6) / 1.6)[..., None])


def equalise(photo: Picture, amount: float, random: Random) -> Picture:
    return Image.blend(photo, ImageOps.equalize(photo), amount)


# -- texture ----------------------------------------------------------------------------------------------------------


def as_it_is(photo: Picture, amount: float, random: Random) -> Picture:
    return photo


def blur(photo: Picture, amount: float, random: Random) -> Picture:
    return photo.filter(ImageFilter.GaussianBlur(amount * min(photo.size)))


def motion_blur(photo: Picture, amount: float, random: Random) -> Picture:
    """Smear the photo along one direction, over `amount` of its shorter side."""
    levels, length = _levels(photo), amount * min(photo.size)
    angle = random.uniform(0, math.pi)
    steps = np.linspace(-0.5, 0.5, min(16, max(3, round(length)))) * length
    shifts = sorted({(round(s * math.sin(angle)), round(s * math.cos(angle))) for s in steps.tolist()})
    reach = math.ceil(length / 2) + 1
    padded = np.pad(levels, ((reach, reach), (reach, reach), (0, 0)), "edge")
    height, width = levels.shape[:2]
    total = np.zeros_like(levels)
    for down, across in shifts:
        total += padded[reach + down : reach + down + height, reach + across : reach + across + width]
    return _picture(total / len(shifts))


def noise(photo: Picture, deviation: float, random: Random) -> Picture:
    levels = _levels(photo)
    return _picture(levels + deviation * random.standard_normal(levels.shape, np.float32))


def downscale(photo: Picture, divisor: float, random: Random) -> Picture:
    return photo.resize([max(8, round(side / divisor)) for side in photo.size], Image.Resampling.BICUBIC)


def sharpen(photo: Picture, percent: float, random: Random) -> Picture:
    return photo.filter(ImageFilter.UnsharpMask(2, round(percent), 0))


def pixelate(photo: Picture, cells: float, random: Random) -> Picture:
    """Show the photo in square cells, this many along its shorter side."""
    cell = min(photo.size) / cells
    return photo.resize([round(side / cell) for side in photo.size], Image.Resampling.BOX).resize(
        photo.size, Image.Resampling.NEAREST
    )


def halftone(photo: Picture, dots: float, random: Random) -> Picture:
    """Print the photo in grey dots on a screen of 45 degrees, this many along its shorter side."""
    grey = _levels(photo.convert("L")) / 255
    y, x = np.mgrid[0 : photo.height, 0 : photo.width].astype(np.float32) * (math.pi * dots / min(photo.size))
    screen = (np.cos(x + y) * np.cos(x - y) + 1) / 2
    return _picture(255 / (1 + np.exp(-12 * (grey - 0.15 - 0.7 * screen)))).convert("RGB")


def dither(photo: Picture, divisor: float, random: Random) -> Picture:
    """Show the photo in black and white pixels, at a fraction of its size."""
    return downscale(photo, divisor, random).convert("1")


def glitch(photo: Picture, amount: float, random: Random) -> Picture:
    """Shift bands of rows sideways and the red channel against the others."""
    levels = np.array(photo)
    reach = max(2, round(amount * photo.width))
    levels[..., 0] = np.roll(levels[..., 0], reach // 3, 1)
    cuts = np.sort(random.integers(0, photo.height, 14))
    for top, bottom in zip(cuts[::2].tolist(), cuts[1::2].tolist(), strict=True):
        levels[top:bottom] = np.roll(levels[top:bottom], int(random.integers(-reach, reach + 1)), 1)
    return Image.fromarray(levels)


def sketch(photo: Picture, amount: float, random: Random) -> Picture:
    """Blend the photo with a pencil drawing of it."""
    grey = photo.convert("L")
    soft = _levels(ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(min(photo.size) / 60)))
    drawing = np.minimum(255, _levels(grey) * 255 / np.maximum(256 - soft, 1))[..., None]
    return _picture((1 - amount) * _levels(photo) + amount * drawing)


def painted(photo: Picture, divisor: float, random: Random) -> Picture:
    """Flatten the photo as with a brush: the medians of a smaller copy of it, drawn large again."""
    small = photo.resize([max(8, round(side / divisor)) for side in photo.size], Image.Resampling.BOX)
    return small.filter(ImageFilter.MedianFilter(5)).resize(photo.size, Image.Resampling.BILINEAR)
