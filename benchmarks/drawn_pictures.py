"""Pictures that come in series on the web: a product in several colours, memes, comics, maps, playing cards, flags.

A function draws one picture and gives its caption.  `random` is the picture's own; `shared` starts alike for all
pictures of a series, and gives them one product, template or style, of which `place` counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from random import Random

from drawn_pages import INK, Drawn
from pen import (
    Colour,
    backdrop,
    canvas,
    font,
    grainy,
    hue,
    sentence,
    shade,
    shadowed,
    smaller,
    title,
    words,
    wrapped,
)
from PIL import Image, ImageDraw, ImageFilter

Brush = ImageDraw.ImageDraw

_TIMES = 3  # the shapes are drawn at so many times of their size, then made smaller

# -- products ---------------------------------------------------------------------------------------------------------

_COLOURS = 4  # of each product

DYES: dict[str, Colour] = {
    "red": (200, 35, 45),
    "blue": (35, 85, 190),
    "green": (40, 140, 75),
    "yellow": (240, 200, 50),
    "black": (40, 40, 44),
    "pink": (240, 140, 175),
    "orange": (240, 125, 35),
    "purple": (120, 60, 150),
    "brown": (125, 80, 50),
    "grey": (160, 165, 170),
    "turquoise": (60, 190, 190),
}


def product(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a product on white; four in a row are the same product in four colours."""
    name = shared.sample(list(_PRODUCTS), len(_PRODUCTS))[place // _COLOURS]
    one = Random(f"{shared.getrandbits(32)} {name}")
    width, height = one.choice([(400, 400), (500, 500), (360, 450), (300, 300)])
    stretch, detail = one.uniform(0.85, 1.1), one.getrandbits(32)
    dye = one.sample(list(DYES), _COLOURS)[place % _COLOURS]
    shape = Image.new("RGBA", (1000, 1000))
    _PRODUCTS[name](ImageDraw.Draw(shape), DYES[dye], Random(detail))
    light = Image.linear_gradient("L").rotate(90 + detail % 60).resize(shape.size)
    lit = Image.composite(shape, Image.new("RGBA", shape.size, "black"), light.point(lambda v: 190 + v // 4))
    lit.putalpha(shape.getchannel("A"))
    side = round(0.88 * min(width, height))
    lit = lit.resize((round(side * min(1, stretch)), round(side * min(1, 1 / stretch))), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", (width, height))
    ground.paste(lit, ((width - lit.width) // 2, (height - lit.height) // 2))
    return shadowed(ground, 5), f"{dye} {name}"


def _shirt(brush: Brush, dye: Colour, detail: Random) -> None:
    sleeve = detail.choice([430, 640])
    for side in (1, -1):
        arm = [(500 + side * x, y) for x, y in ((190, 130), (420, sleeve - 120), (310, sleeve), (200, 330))]
        brush.polygon(arm, shade(dye, -0.12))
        brush.line(arm[1:3], shade(dye, -0.4), 8)
    brush.polygon([(310, 130), (690, 130), (700, 900), (300, 900)], dye)
    brush.ellipse((400, 70, 600, 220), shade(dye, -0.45))
    brush.arc((390, 60, 610, 235), 0, 180, shade(dye, 0.25), 16)
    if detail.random() < 0.7:
        brush.rounded_rectangle((400, 360, 600, 520), 30, detail.choice(["white", "black"]))
        brush.text(
            (500, 440), detail.choice("ABKMRSX") + detail.choice("1379"), dye, font("sans bold", 100), anchor="mm"
        )
    for y in (720, 800):
        brush.line([(330, y), (420, y + 30)], shade(dye, -0.2), 6)


def _mug(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.arc((600, 320, 920, 700), -90, 90, shade(dye, -0.15), 60)
    brush.polygon([(180, 200), (740, 200), (700, 830), (220, 830)], dye)
    brush.ellipse((220, 770, 700, 890), dye)
    brush.ellipse((180, 130, 740, 270), shade(dye, 0.3))
    brush.ellipse((205, 148, 715, 256), detail.choice([shade(dye, -0.6), (90, 60, 40)]))
    for k in range(detail.randrange(4)):
        brush.line([(190 + 6 * k, 380 + 90 * k), (728 - 6 * k, 380 + 90 * k)], "white", 24)
    brush.line([(270, 300), (290, 780)], shade(dye, 0.45), 26)


def _bottle(brush: Brush, dye: Colour, detail: Random) -> None:
    neck = detail.choice([90, 130])
    brush.rounded_rectangle((500 - neck, 60, 500 + neck, 190), 20, detail.choice([(60, 60, 60), (200, 200, 205)]))
    brush.polygon([(500 - neck, 180), (500 + neck, 180), (690, 380), (310, 380)], dye)
    brush.rounded_rectangle((310, 340, 690, 940), 60, dye)
    brush.rounded_rectangle((310, 520, 690, 760), 0, "white")
    brush.text(
        (500, 640),
        detail.choice(["aqua", "pure", "fresh", "vita"]),
        shade(dye, -0.3),
        font("serif bold", 110),
        anchor="mm",
    )
    brush.line([(360, 400), (360, 880)], shade(dye, 0.5), 22)


def _chair(brush: Brush, dye: Colour, detail: Random) -> None:
    wood = detail.choice([(150, 105, 65), (70, 50, 40), (190, 190, 195)])
    for x in (260, 690):
        brush.polygon([(x, 640), (x + 55, 640), (x + 35, 960), (x + 10, 960)], wood)
    for x in (330, 620):
        brush.polygon([(x, 640), (x + 40, 640), (x + 30, 900), (x + 8, 900)], shade(wood, -0.3))
    brush.rounded_rectangle((290, 60, 710, 560), detail.choice([40, 160]), dye)
    brush.rounded_rectangle((230, 520, 770, 670), 50, shade(dye, -0.15))
    for k in range(detail.randrange(2, 5)):
        brush.line([(350 + 90 * k, 130), (350 + 90 * k, 480)], shade(dye, -0.3), 8)


def _sneaker(brush: Brush, dye: Colour, detail: Random) -> None:
    upper = [(110, 420), (330, 300), (440, 330), (560, 520), (800, 590), (910, 680), (900, 740), (110, 740)]
    brush.polygon(upper, dye)
    brush.polygon([(110, 420), (330, 300), (300, 420), (150, 500)], shade(dye, -0.45))
    brush.rounded_rectangle((90, 720, 925, 800), 36, detail.choice(["white", (230, 215, 180)]), (170, 170, 170), 5)
    for k in range(5):
        x, y = 420 + 50 * k, 370 + 45 * k
        brush.line([(x, y), (x - 70, y + 50)], "white", 18)
    stripe = detail.choice([shade(dye, -0.5), shade(dye, 0.7)])
    for k in range(detail.randrange(1, 4)):
        brush.line([(210 + 80 * k, 700), (290 + 80 * k, 520)], stripe, 30)


def _bag(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.arc((330, 80, 670, 620), 180, 360, shade(dye, -0.4), 34)
    brush.polygon([(220, 340), (780, 340), (870, 900), (130, 900)], dye)
    brush.line([(180, 560), (820, 560)], shade(dye, -0.25), 10)
    flap = detail.choice([480, 600])
    brush.polygon([(220, 340), (780, 340), (800, flap), (500, flap + 90), (200, flap)], shade(dye, -0.15))
    brush.ellipse((460, flap + 10, 540, flap + 90), (220, 190, 90))


def _cap(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.pieslice((160, 220, 760, 960), 180, 360, dye)
    brush.polygon([(600, 560), (940, 650), (930, 720), (560, 640), (300, 600)], shade(dye, -0.3))
    brush.ellipse((430, 200, 490, 240), shade(dye, -0.3))
    for x in (300, 460, 610):
        brush.arc((x - 130, 220, x + 130, 950), 190, 280, shade(dye, -0.25), 6)
    brush.text((480, 450), detail.choice(["NY", "LA", "SF", "BK"]), "white", font("serif bold", 130), anchor="mm")


def _lamp(brush: Brush, dye: Colour, detail: Random) -> None:
    metal = detail.choice([(60, 60, 65), (200, 170, 90), (190, 190, 195)])
    brush.rectangle((482, 420, 518, 880), metal)
    brush.ellipse((320, 850, 680, 940), shade(metal, -0.2))
    top = detail.choice([120, 220])
    brush.polygon([(500 - top, 90), (500 + top, 90), (790, 460), (210, 460)], dye)
    brush.line([(210, 460), (790, 460)], shade(dye, -0.3), 14)
    brush.line([(500 - top, 90), (500 + top, 90)], shade(dye, -0.3), 10)


def _phone_case(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.rounded_rectangle((270, 50, 730, 950), 80, dye, shade(dye, -0.4), 12)
    brush.rounded_rectangle((310, 90, 500, 290), 50, (35, 35, 38))
    for x, y in ((360, 140), (450, 140), (360, 240)):
        brush.ellipse((x - 32, y - 32, x + 32, y + 32), (70, 75, 90), (15, 15, 15), 8)
    for _ in range(detail.choice([0, 6, 14])):
        x, y, r = detail.randrange(330, 670), detail.randrange(380, 880), detail.randrange(14, 50)
        brush.ellipse((x - r, y - r, x + r, y + r), shade(dye, detail.choice([-0.35, 0.5])))


def _sofa(brush: Brush, dye: Colour, detail: Random) -> None:
    for x in (170, 800):
        brush.rectangle((x, 760, x + 34, 850), (90, 60, 40))
    brush.rounded_rectangle((120, 260, 880, 640), 60, shade(dye, -0.12))
    seats = detail.choice([2, 3])
    for k in range(seats):
        left, wide = 170 + k * 660 / seats, 660 / seats
        brush.rounded_rectangle((left, 300, left + wide - 8, 560), 40, dye, shade(dye, -0.3), 5)
        brush.rounded_rectangle((left, 540, left + wide - 8, 690), 30, shade(dye, 0.12), shade(dye, -0.3), 5)
    for x in (80, 800):
        brush.rounded_rectangle((x, 420, x + 120, 770), 50, shade(dye, -0.2))
    brush.rectangle((150, 690, 850, 770), shade(dye, -0.25))


def _backpack(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.arc((410, 40, 590, 220), 180, 360, shade(dye, -0.5), 26)
    brush.rounded_rectangle((230, 110, 770, 920), 170, dye, shade(dye, -0.3), 8)
    brush.rounded_rectangle((290, 540, 710, 870), 60, shade(dye, -0.18), shade(dye, -0.45), 8)
    brush.arc((280, 250, 720, 700), 190, 350, (40, 40, 40), 12)
    brush.rectangle((480, 520, 520, 600), detail.choice([(220, 190, 90), (200, 200, 205)]))
    brush.rounded_rectangle((430, 300, 570, 400), 12, detail.choice(["white", "black", (240, 220, 180)]))


def _kettle(brush: Brush, dye: Colour, detail: Random) -> None:
    brush.arc((250, 60, 750, 560), 180, 360, (45, 45, 48), 46)
    brush.polygon([(640, 520), (900, 330), (930, 380), (700, 700)], shade(dye, -0.15))
    brush.ellipse((180, 300, 780, 900), dye)
    brush.rectangle((180, 820, 780, 920), (255, 255, 255, 0))
    brush.rounded_rectangle((230, 790, 730, 840), 20, (60, 60, 64))
    brush.ellipse((330, 280, 630, 380), shade(dye, 0.2), shade(dye, -0.3), 6)
    brush.ellipse((450, 240, 510, 300), (45, 45, 48))
    if detail.random() < 0.5:
        brush.arc((230, 340, 720, 860), 200, 250, shade(dye, 0.6), 30)


_PRODUCTS: dict[str, Callable[[Brush, Colour, Random], None]] = {
    "t-shirt": _shirt,
    "mug": _mug,
    "bottle": _bottle,
    "chair": _chair,
    "sneaker": _sneaker,
    "handbag": _bag,
    "cap": _cap,
    "lamp": _lamp,
    "phone case": _phone_case,
    "sofa": _sofa,
    "backpack": _backpack,
    "kettle": _kettle,
}


# -- memes and comics -------------------------------------------------------------------------------------------------


def meme(random: Random, shared: Random, place: int) -> Drawn:
    """Draw one template, a picture like a photo, with other words above and below."""
    width, height = shared.choice([(500, 500), (600, 450), (480, 600), (400, 400)])
    picture = backdrop(shared, width, height)
    brush = ImageDraw.Draw(picture)
    for _ in range(shared.choice([1, 1, 2])):
        _creature(shared, brush, width, height)
    picture = grainy(picture.filter(ImageFilter.GaussianBlur(1.2)), shared, 5)
    brush = ImageDraw.Draw(picture)
    size = round(width / shared.choice([11, 13, 15]))
    texts = [sentence(random).rstrip(".").upper(), words(random, random.randrange(2, 6)).upper()]
    for text, top in zip(texts, (True, False), strict=True):
        face = font("sans bold", size)
        lines = wrapped(text, face, 0.92 * width)[:3]
        y = 0.02 * height if top else 0.97 * height - 1.15 * size * len(lines)
        for line in lines:
            brush.text(
                (width / 2, y), line, "white", face, anchor="ma", stroke_width=max(2, size // 14), stroke_fill="black"
            )
            y += 1.15 * size
    return picture, f"meme: {texts[0].lower()}"


def _creature(random: Random, brush: Brush, width: int, height: int) -> None:
    x, y, r = random.uniform(0.3, 0.7) * width, random.uniform(0.4, 0.6) * height, random.uniform(0.14, 0.24) * width
    fur = hue(random, random.uniform(0.2, 0.7), random.uniform(0.5, 0.9))
    brush.ellipse((x - 1.4 * r, y + 0.6 * r, x + 1.4 * r, y + 4 * r), shade(fur, -0.2))
    for side in (-1, 1):
        ear = [
            (x + side * 0.35 * r, y - 0.8 * r),
            (x + side * 1.05 * r, y - 1.5 * r),
            (x + side * 0.95 * r, y - 0.3 * r),
        ]
        brush.polygon(ear, shade(fur, -0.3))
    for k in range(8):
        s = r * (1 - 0.08 * k)
        brush.ellipse((x - s, y - s, x + s, y + s), shade(fur, 0.06 * k - 0.1))
    for side in (-1, 1):
        ex, s = x + side * 0.38 * r, random.uniform(0.16, 0.24) * r
        brush.ellipse((ex - s, y - 0.2 * r - s, ex + s, y - 0.2 * r + s), "white")
        brush.ellipse((ex - s / 2, y - 0.2 * r - s / 2, ex + s / 2, y - 0.2 * r + s / 2), (20, 20, 20))
    brush.ellipse((x - 0.14 * r, y + 0.1 * r, x + 0.14 * r, y + 0.3 * r), (50, 30, 30))
    brush.arc((x - 0.4 * r, y + 0.1 * r, x + 0.4 * r, y + 0.65 * r), 20, 160, (50, 20, 20), max(2, round(r / 18)))


_SKINS: list[Colour] = [(250, 220, 195), (230, 185, 145), (185, 130, 90), (115, 75, 55)]
_HAIR: list[Colour] = [(35, 25, 25), (105, 65, 35), (225, 185, 90), (175, 75, 35), (190, 190, 190)]


def comic(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a frame of one strip: two figures in one place, who say other things and move."""
    width, height = shared.choice([(360, 360), (420, 320), (300, 400), (480, 360)])
    sky, ground = hue(shared, 0.3, 0.95), hue(shared, 0.4, 0.7)
    picture, brush = canvas(width * _TIMES, height * _TIMES, sky)
    w, h = picture.size
    horizon = shared.uniform(0.62, 0.75) * h
    brush.rectangle((0, horizon, w, h), ground)
    for _ in range(shared.randrange(2, 5)):
        x, wide, high = shared.uniform(0, 0.9) * w, shared.uniform(0.08, 0.25) * w, shared.uniform(0.1, 0.4) * h
        brush.rectangle((x, horizon - high, x + wide, horizon), hue(shared, 0.35, 0.8), INK, _TIMES)
        brush.rectangle((x + wide / 4, horizon - high / 2, x + wide / 2, horizon - high / 4), "white", INK, _TIMES)
    looks = [(shared.choice(_SKINS), hue(shared, 0.8, 0.7), shared.choice(_HAIR)) for _ in range(2)]
    steps = [random.uniform(-0.08, 0.08) for _ in range(2)]
    for k, look in enumerate(looks):
        _figure(random, brush, (0.27 + 0.46 * k + steps[k]) * w, h, look, 1 - 2 * k)
    texts = [sentence(random)] if random.random() < 0.6 else [sentence(random), words(random, 2) + "?"]
    speaker = random.randrange(2)
    for k, text in enumerate(texts):
        _bubble(brush, text, (0.27 + 0.46 * ((speaker + k) % 2)) * w, (0.03 + 0.26 * k) * h, w, 0.4 * h)
    brush.rectangle((0, 0, w - 1, h - 1), None, INK, 3 * _TIMES)
    return smaller(picture, _TIMES), f"comic: {texts[0].lower()}"


def _figure(random: Random, brush: Brush, x: float, h: float, look: tuple[Colour, Colour, Colour], facing: int) -> None:
    skin, coat, hair = look
    r, y, line = 0.085 * h, 0.52 * h, 2 * _TIMES
    for side in (-1, 1):
        brush.line((x + side * 0.4 * r, y + 3.4 * r, x + side * random.uniform(0.3, 1) * r, h - r / 2), INK, 3 * line)
        hand = (x + side * random.uniform(1.2, 2.4) * r, y + random.uniform(0, 3.5) * r)
        brush.line((x + side * 0.8 * r, y + 1.5 * r, *hand), coat, 4 * line)
        brush.ellipse(
            (hand[0] - 0.25 * r, hand[1] - 0.25 * r, hand[0] + 0.25 * r, hand[1] + 0.25 * r), skin, INK, line // 2
        )
    brush.rounded_rectangle((x - 0.9 * r, y + r, x + 0.9 * r, y + 3.6 * r), r / 2, coat, INK, line)
    brush.ellipse((x - r, y - r, x + r, y + r), skin, INK, line)
    brush.pieslice((x - 1.08 * r, y - 1.15 * r, x + 1.08 * r, y + 0.9 * r), 180, 360, hair, INK, line)
    for side in (0, 1):
        ex = x + facing * (0.15 + 0.45 * side) * r
        brush.ellipse((ex - r / 9, y, ex + r / 9, y + r / 4), INK)
    mx = x + facing * 0.35 * r
    mouth = random.choice(["open", "smile", "sad"])
    if mouth == "open":
        brush.ellipse((mx - r / 4, y + 0.4 * r, mx + r / 4, y + 0.8 * r), (120, 20, 30), INK, line // 2)
    else:
        start, top = (20, 0.2) if mouth == "smile" else (200, 0.5)
        brush.arc((mx - r / 3, y + top * r, mx + r / 3, y + (top + 0.5) * r), start, start + 140, INK, line)


def _bubble(brush: Brush, text: str, x: float, y: float, w: float, mouth: float) -> None:
    face = font("sans", round(w / 30))
    lines = wrapped(text, face, 0.4 * w)
    wide, step = max(face.getlength(line) for line in lines) + 20 * _TIMES, 1.25 * face.size
    left = min(max(x - wide / 2, 0.02 * w), 0.98 * w - wide)
    high = step * len(lines) + 12 * _TIMES
    box = (left, y, left + wide, y + high)
    brush.polygon(
        [(x - 12, y + high - 4 * _TIMES), (x + 24, y + high - 4 * _TIMES), (x, mouth)], "white", INK, 2 * _TIMES
    )
    brush.rounded_rectangle(box, 8 * _TIMES, "white", INK, 2 * _TIMES)
    brush.line((x - 8, y + high - 2 * _TIMES, x + 20, y + high - 2 * _TIMES), "white", 2 * _TIMES)
    for k, line in enumerate(lines):
        brush.text((left + wide / 2, y + 6 * _TIMES + (k + 0.5) * step), line, INK, face, anchor="mm")


# -- maps -------------------------------------------------------------------------------------------------------------


def map_(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a street map in the style of one provider: land, parks, a river, streets and names."""
    side = shared.choice([256, 320, 400])
    land = shared.choice([(242, 239, 233), (229, 227, 223), (250, 250, 245)])
    water, park = shared.choice([(170, 211, 223), (163, 204, 255)]), (200, 228, 188)
    main, edge = shared.choice(
        [((250, 215, 130), (205, 160, 60)), ((255, 255, 255), (180, 180, 180)), ((240, 150, 130), (200, 90, 80))]
    )
    picture, brush = canvas(side * _TIMES, side * _TIMES, land)
    full = picture.width
    for _ in range(random.randrange(1, 5)):
        brush.polygon(_blob(random, full), park)
    if random.random() < 0.3:
        brush.polygon(_blob(random, full), water)
    angle, gap = random.uniform(0, math.pi / 2), random.uniform(0.07, 0.13) * full
    for turn in (0.0, math.pi / 2):
        for k in range(-14, 15):
            if random.random() < 0.75:
                street = _street(
                    angle + turn,
                    k * gap + random.gauss(0, gap / 8),
                    full,
                    random.uniform(-0.9, 0.3),
                    random.uniform(0.1, 1),
                )
                brush.line(street, (205, 200, 195), 6 * _TIMES)
                brush.line(street, "white", 4 * _TIMES)
    if random.random() < 0.75:
        brush.line(_curve(random, full), water, round(random.uniform(8, 30)) * _TIMES, joint="curve")
    for _ in range(random.randrange(1, 4)):
        road = _curve(random, full)
        brush.line(road, edge, 11 * _TIMES, joint="curve")
        brush.line(road, main, 8 * _TIMES, joint="curve")
    if random.random() < 0.4:
        rail = _curve(random, full)
        brush.line(rail, (110, 110, 110), 3 * _TIMES, joint="curve")
    town = title(random, 1)
    for k in range(random.randrange(2, 6)):
        at = (random.uniform(0.15, 0.85) * full, random.uniform(0.1, 0.9) * full)
        label, size = (
            (town, 16) if k == 0 else (f"{title(random, 1)} {random.choice(['Street', 'Park', 'Square'])}", 10)
        )
        brush.text(
            at, label, (60, 60, 70), font("sans", size * _TIMES), anchor="mm", stroke_width=4, stroke_fill="white"
        )
    return smaller(picture, _TIMES), f"map of {town.lower()}"


def _street(angle: float, offset: float, full: int, start: float, end: float) -> list[tuple[float, float]]:
    """Return the ends of a line at this angle and distance from the centre; start and end are in sides of the map."""
    x, y = math.cos(angle), math.sin(angle)
    return [(full / 2 - y * offset + x * t * full, full / 2 + x * offset + y * t * full) for t in (start, end)]


def _curve(random: Random, full: int) -> list[tuple[float, float]]:
    """Return a winding line from one side of the map to another."""
    angle, bend, phase = random.uniform(0, 2 * math.pi), random.uniform(0, 0.15), random.uniform(0, 6)
    offset = random.uniform(-0.35, 0.35)
    points = []
    for k in range(41):
        along, across = (k - 20) / 20, offset + bend * math.sin(phase + k / 5)
        x, y = math.cos(angle), math.sin(angle)
        points.append((full * (0.5 + x * along - y * across), full * (0.5 + y * along + x * across)))
    return points


def _blob(random: Random, full: int) -> list[tuple[float, float]]:
    x, y, r = (random.uniform(0, full), random.uniform(0, full), random.uniform(0.08, 0.25) * full)
    radii = [r * random.uniform(0.7, 1.2) for _ in range(10)]
    return [(x + s * math.cos(k * math.pi / 5), y + s * math.sin(k * math.pi / 5)) for k, s in enumerate(radii)]


# -- playing cards and flags ------------------------------------------------------------------------------------------

_RANKS = ("A", *map(str, range(2, 11)), "J", "Q", "K")
_SUITS = {"\u2660": "spades", "\u2665": "hearts", "\u2666": "diamonds", "\u2663": "clubs"}
_NAMES = {"A": "ace", "J": "jack", "Q": "queen", "K": "king"}
_PIPS = {
    1: [(0.5, 0.5)],
    2: [(0.5, 0.18), (0.5, 0.82)],
    3: [(0.5, 0.18), (0.5, 0.5), (0.5, 0.82)],
    4: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.82)],
    5: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.82)] + [(0.5, 0.5)],
    6: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.5, 0.82)],
    7: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.5, 0.82)] + [(0.5, 0.34)],
    8: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.5, 0.82)] + [(0.5, 0.34), (0.5, 0.66)],
    9: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.39, 0.61, 0.82)] + [(0.5, 0.5)],
    10: [(x, y) for x in (0.3, 0.7) for y in (0.18, 0.39, 0.61, 0.82)] + [(0.5, 0.28), (0.5, 0.72)],
}


def card(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a card of one deck; its corners are transparent."""
    rank, suit = shared.sample([(rank, suit) for rank in _RANKS for suit in _SUITS], 52)[place]
    width, height = shared.choice([(140, 190), (200, 280), (250, 350)])
    ground = shared.choice([(255, 255, 255), (253, 250, 235)])
    w, h = width * _TIMES, height * _TIMES
    picture = Image.new("RGBA", (w, h))
    brush = ImageDraw.Draw(picture)
    brush.rounded_rectangle((0, 0, w - 1, h - 1), w // 12, ground, (120, 120, 120), _TIMES)
    ink = (200, 20, 35) if _SUITS[suit] in ("hearts", "diamonds") else (15, 15, 20)
    face, sign = font(shared.choice(["serif bold", "sans bold"]), h // 9), font("sans", h // 10)
    for half in range(2):
        brush.text((0.1 * w, 0.09 * h), rank, ink, face, anchor="mm")
        brush.text((0.1 * w, 0.2 * h), suit, ink, sign, anchor="mm")
        if half == 0:
            picture = picture.rotate(180)
            brush = ImageDraw.Draw(picture)
    if rank in "JQK":
        _court(brush, w, h, rank, suit, ink, shared)
    else:
        pips = _PIPS[1 if rank == "A" else int(rank)]
        for x, y in pips:
            size = h // 3 if rank == "A" else h // 7
            pip = Image.new("RGBA", (size, size))
            ImageDraw.Draw(pip).text((size / 2, size / 2), suit, ink, font("sans", size), anchor="mm")
            pip = pip.rotate(180) if y > 0.51 else pip
            picture.alpha_composite(pip, (round((0.1 + 0.8 * x) * w - size / 2), round(y * h - size / 2)))
    return smaller(picture, _TIMES), f"{_NAMES.get(rank, rank)} of {_SUITS[suit]}"


def _court(brush: Brush, w: int, h: int, rank: str, suit: str, ink: Colour, shared: Random) -> None:
    robes = dict(zip(_SUITS, shared.sample(list(DYES), len(_SUITS)), strict=True))
    robe, crown, hair = DYES[robes[suit]], (235, 190, 60), _HAIR[list(_SUITS).index(suit)]
    brush.rectangle((0.2 * w, 0.12 * h, 0.8 * w, 0.88 * h), None, (60, 80, 160), 2 * _TIMES)
    brush.polygon(
        [(0.25 * w, 0.86 * h), (0.75 * w, 0.86 * h), (0.62 * w, 0.5 * h), (0.38 * w, 0.5 * h)], robe, ink, _TIMES
    )
    brush.ellipse((0.37 * w, 0.3 * h, 0.63 * w, 0.52 * h), (245, 215, 190), ink, _TIMES)
    if rank == "Q":
        brush.pieslice((0.33 * w, 0.27 * h, 0.67 * w, 0.6 * h), 180, 360, hair)
        brush.ellipse((0.4 * w, 0.33 * h, 0.6 * w, 0.51 * h), (245, 215, 190))
    if rank == "K":
        brush.pieslice((0.38 * w, 0.38 * h, 0.62 * w, 0.58 * h), 0, 180, hair)
    points = 5 if rank == "K" else 3
    top = [(0.37 * w, 0.34 * h)]
    for k in range(points):
        top += [((0.37 + 0.26 * (k + 0.5) / points) * w, 0.2 * h), ((0.37 + 0.26 * (k + 1) / points) * w, 0.32 * h)]
    brush.polygon([*top, (0.63 * w, 0.35 * h), (0.37 * w, 0.35 * h)], (60, 90, 160) if rank == "J" else crown, ink)
    for x in (0.45, 0.55):
        brush.ellipse((x * w - w / 80, 0.4 * h, x * w + w / 80, 0.415 * h), INK)
    brush.text((0.5 * w, 0.7 * h), suit, ink, font("sans", h // 7), anchor="mm")


_CLOTH: dict[str, Colour] = {
    "red": (206, 17, 38),
    "white": (255, 255, 255),
    "blue": (0, 50, 160),
    "green": (0, 122, 61),
    "yellow": (252, 209, 22),
    "black": (10, 10, 10),
    "light blue": (110, 170, 225),
    "orange": (245, 130, 32),
}
_LAYOUTS = (
    "pales",
    "bars",
    "nordic",
    "cross",
    "saltire",
    "disc",
    "hoist",
    "canton",
    "quarters",
    "star",
    "bend",
    "stripes",
)


def flag(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a flag; no two of a series have both layout and colours in common."""
    choices = [(layout, colours) for layout in _LAYOUTS for colours in permutations(_CLOTH, 3)]
    layout, names = shared.sample(choices, len(choices))[place]
    height = random.choice([120, 160, 200, 240])
    width = round(height * random.choice([1.5, 1.5, 5 / 3, 2]))
    w, h = width * _TIMES, height * _TIMES
    first, second, third = (_CLOTH[name] for name in names)
    picture, brush = canvas(w, h, first)
    _LAY[layout](brush, w, h, second, third)
    if random.random() < 0.3:
        brush.rectangle((0, 0, w - 1, h - 1), None, (120, 120, 120), _TIMES)
    return smaller(picture, _TIMES), f"flag: {layout} of {', '.join(names)}"


_SIGNALS: dict[str, tuple[tuple[float, float, float, float, int], ...]] = {
    "halves": ((0, 0.5, 1, 1, 1),),
    "sides": ((0.5, 0, 1, 1, 1),),
    "bands": ((0, 1 / 3, 1, 2 / 3, 1), (0, 2 / 3, 1, 1, 2)),
    "narrow bands": ((0, 0.25, 1, 0.75, 1), (0, 0.75, 1, 1, 2)),
    "posts": ((1 / 3, 0, 2 / 3, 1, 1), (2 / 3, 0, 1, 1, 2)),
    "frame": ((0.2, 0.2, 0.8, 0.8, 1),),
    "checks": ((0.5, 0, 1, 0.5, 1), (0, 0.5, 0.5, 1, 1)),
    "corner": ((0, 0, 0.5, 0.5, 1),),
}
"""Boxes, in shares of the sides, and which of the colours after the ground's each has."""

_PAINTS: tuple[Colour, ...] = (
    (220, 30, 40),
    (250, 250, 250),
    (20, 70, 170),
    (245, 205, 30),
    (15, 15, 15),
    (20, 130, 80),
)


def signal(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a signal flag of boxes; no two of a series have both boxes and colours in common."""
    inks = {name: 1 + max(box[4] for box in boxes) for name, boxes in _SIGNALS.items()}
    choices = [(name, colours) for name, count in inks.items() for colours in permutations(_PAINTS, count)]
    name, colours = shared.sample(choices, len(choices))[place]
    height = random.choice([120, 160, 200, 240])
    w, h = round(height * random.choice([1, 1.25, 1.5])), height
    picture, brush = canvas(w, h, colours[0])
    for left, top, right, bottom, of in _SIGNALS[name]:
        brush.rectangle((left * w, top * h, right * w, bottom * h), colours[of])
    return picture, f"signal flag: {name}"


def _star(brush: Brush, x: float, y: float, r: float, fill: Colour) -> None:
    spikes = [(r if k % 2 == 0 else 0.4 * r, math.pi * (k / 5 - 0.5)) for k in range(10)]
    brush.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for s, a in spikes], fill)


def _cross(brush: Brush, w: int, h: int, x: float, thick: float, fill: Colour) -> None:
    brush.rectangle((x * w - thick * h, 0, x * w + thick * h, h), fill)
    brush.rectangle((0, (0.5 - thick) * h, w, (0.5 + thick) * h), fill)


def _pales(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((w / 3, 0, 2 * w / 3, h), second)
    brush.rectangle((2 * w / 3, 0, w, h), third)


def _level_bars(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((0, h / 3, w, 2 * h / 3), second)
    brush.rectangle((0, 2 * h / 3, w, h), third)


def _nordic(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    _cross(brush, w, h, 0.36, 0.12, second)
    _cross(brush, w, h, 0.36, 0.06, third)


def _centred(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    _cross(brush, w, h, 0.5, 0.1, second)
    brush.ellipse((w / 2 - h / 5, 0.3 * h, w / 2 + h / 5, 0.7 * h), third)


def _saltire(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    for thick, fill in ((0.2, second), (0.1, third)):
        brush.line((0, 0, w, h), fill, round(thick * h))
        brush.line((0, h, w, 0), fill, round(thick * h))


def _disc(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((0, 0.75 * h, w, h), third)
    brush.ellipse((w / 2 - 0.28 * h, 0.14 * h, w / 2 + 0.28 * h, 0.7 * h), second)


def _hoist(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((0, h / 2, w, h), second)
    brush.polygon([(0, 0), (0.45 * w, h / 2), (0, h)], third)


def _canton(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((0, 0, 0.45 * w, 0.5 * h), second)
    _star(brush, 0.225 * w, 0.26 * h, 0.17 * h, third)


def _quarters(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((w / 2, 0, w, h / 2), second)
    brush.rectangle((0, h / 2, w / 2, h), third)


def _one_star(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.rectangle((0, 0, 0.08 * w, h), second)
    _star(brush, 0.54 * w, 0.53 * h, 0.32 * h, third)


def _bend(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    brush.polygon([(w, 0), (w, h), (0, h)], second)
    brush.line((0, h, w, 0), third, round(0.2 * h))


def _stripes(brush: Brush, w: int, h: int, second: Colour, third: Colour) -> None:
    for k in range(1, 9, 2):
        brush.rectangle((0, k * h / 9, w, (k + 1) * h / 9), second)
    brush.rectangle((0, 0, 0.4 * w, 5 * h / 9), third)


_LAY: dict[str, Callable[[Brush, int, int, Colour, Colour], None]] = dict(
    zip(
        _LAYOUTS,
        (
            *(_pales, _level_bars, _nordic, _centred, _saltire, _disc),
            *(_hoist, _canton, _quarters, _one_star, _bend, _stripes),
        ),
        strict=True,
    )
)
