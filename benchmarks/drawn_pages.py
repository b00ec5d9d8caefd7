"""Documents that are read: pages, tables, charts, slides, forms, and what programs show.

A function draws one picture and gives its caption.  `random` is the picture's own; `shared` starts alike for all
pictures of a series, and gives them one layout, program or template.
"""

from __future__ import annotations

import math
from random import Random

from pen import (
    ADJECTIVES,
    VERBS,
    WORDS,
    Colour,
    Picture,
    canvas,
    font,
    hue,
    paragraph,
    person,
    sentence,
    shade,
    smaller,
    ticks,
    title,
    words,
    wrapped,
    write,
)
from PIL import Image, ImageDraw

Drawn = tuple[Picture, str]

INK = (25, 25, 30)
_SERIES_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))


# -- print ------------------------------------------------------------------------------------------------------------


def page(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a page of running text in one or two columns, as a scan or an exported PDF shows it."""
    width, height = random.choice([(600, 800), (595, 842), (640, 904), (480, 680)])
    ground = random.choice(["white", "white", (250, 246, 236), (244, 244, 244)])
    picture, draw = canvas(width, height, ground)
    margin, face = (
        random.randrange(40, 80),
        random.choice(["serif", "times", "book", "sans", "grotesque", "typewriter"]),
    )
    text = font(face, random.choice([10, 11, 12, 13, 15]))
    heading = title(random, random.randrange(2, 5))
    top: float = margin
    if random.random() < 0.6:
        top = (
            write(
                draw,
                (margin, margin),
                wrapped(heading, font("serif bold", 20), width - 2 * margin),
                font("serif bold", 20),
                INK,
            )
            + 10
        )
    columns = random.choice([1, 1, 2])
    gap = 22
    across = (width - 2 * margin - gap * (columns - 1)) / columns
    for column in range(columns):
        x, y = margin + column * (across + gap), top
        while y < height - margin:
            lines = wrapped(paragraph(random, random.randrange(2, 8)), text, across)
            fit = max(0, int((height - margin - y) / (1.35 * text.size)))
            y = write(draw, (x, y), lines[:fit], text, INK) + random.choice([0, 6, 12])
            if not fit:
                break
    draw.text((width / 2, height - margin / 2), str(random.randrange(1, 400)), INK, text, anchor="mm")
    return picture, f"page: {heading.lower()}"


def table(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a table with a head, numbers and names."""
    rows, columns = random.randrange(5, 16), random.randrange(3, 8)
    wide, high = random.choice([70, 90, 110]), random.choice([20, 24, 30])
    picture, draw = canvas(columns * wide + 40, (rows + 1) * high + 70)
    face, accent = font(random.choice(["sans", "grotesque", "times"]), high // 2), hue(random, 0.5, 0.7)
    style, text_columns = random.choice(["grid", "zebra", "rules"]), random.randrange(1, 3)
    heading = title(random, 3)
    draw.text((20, 14), heading, INK, font("sans bold", 16))
    for row in range(rows + 1):
        top = 45 + row * high
        if row == 0 or (style == "zebra" and row % 2 == 0):
            draw.rectangle((20, top, 20 + columns * wide, top + high), accent if row == 0 else (236, 240, 245))
        if style != "zebra":
            draw.line((20, top, 20 + columns * wide, top), "grey")
        for column in range(columns):
            number = f"{random.uniform(0, 10 ** random.randrange(1, 5)):,.{random.choice([0, 1, 2])}f}"
            cell = random.choice(WORDS)[:10] if row == 0 or column < text_columns else number
            draw.text((26 + column * wide, top + high / 4), cell, "white" if row == 0 else INK, face)
    draw.line((20, 45 + (rows + 1) * high, 20 + columns * wide, 45 + (rows + 1) * high), "grey")
    if style == "grid":
        for column in range(columns + 1):
            draw.line((20 + column * wide, 45, 20 + column * wide, 45 + (rows + 1) * high), "grey")
    return picture, f"table of {heading.lower()}"


def ledger(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a sheet of a series that differs in its numbers alone: ruled in both directions, in one, or not at all."""
    rows, columns = shared.randrange(5, 16), shared.randrange(3, 9)
    wide, high, margin = shared.choice([60, 80, 110, 150, 190]), shared.choice([20, 26, 34, 48]), shared.choice([8, 30])
    picture, draw = canvas(columns * wide + 2 * margin, rows * high + 2 * margin)
    face = font(shared.choice(["sans", "grotesque", "times", "mono"]), shared.choice([10, 11, 12, 13, 14]))
    ruled, ink, digits = shared.choice(["grid", "grid", "lines", "none"]), shared.choice([INK, (110, 110, 110)]), 10**4
    across, down = (margin, margin + columns * wide), (margin, margin + rows * high)
    for row in range(rows + 1 if ruled != "none" else 0):
        draw.line((across[0], margin + row * high, across[1], margin + row * high), "grey")
    for column in range(columns + 1 if ruled == "grid" else 0):
        draw.line((margin + column * wide, down[0], margin + column * wide, down[1]), "grey")
    for row in range(rows):
        for column in range(columns):
            place_of = (margin + column * wide + 6, margin + row * high + high / 5)
            draw.text(place_of, f"{random.randrange(digits) / 10:,.1f}", ink, face)
    return picture, "a sheet of figures"


def music(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a sheet of music: staves with clefs, notes, beams and bars."""
    times, width = 3, random.choice([520, 600, 680])
    gap, staves = random.choice([6, 7, 8]), random.randrange(2, 7)
    picture, draw = canvas(width * times, (70 + staves * gap * 11) * times)
    heading = title(random, 2)
    draw.text((width * times / 2, 30 * times), heading, INK, font("times bold", 22 * times), anchor="mm")
    signature = random.choice(["44", "34", "68", "24"])
    for staff in range(staves):
        top, space = (80 + staff * gap * 11) * times, gap * times
        for line in range(5):
            draw.line((25 * times, top + line * space, (width - 25) * times, top + line * space), INK, times // 2 + 1)
        _clef(draw, 40 * times, top, space)
        if staff == 0:
            for k, digit in enumerate(signature):
                draw.text(
                    (72 * times, top + (1 + 2 * k) * space), digit, INK, font("times bold", 2 * space), anchor="mm"
                )
        _bars(random, draw, (90 * times, (width - 25) * times), top, space)
    picture = smaller(picture, times)
    if random.random() < 0.3:  # as on Wikipedia: black ink on transparent ground
        inked = Image.new("RGBA", picture.size, INK)
        inked.putalpha(picture.convert("L").point(lambda v: 255 - v))
        picture = inked
    return picture, f"sheet music of {heading.lower()}"


def _clef(draw: ImageDraw.ImageDraw, x: float, top: float, space: float) -> None:
    turns = [0.18 * k for k in range(60)]
    curl = [
        (x + space * (0.3 + t / 8) * math.cos(t), top + 3 * space - space * (0.3 + t / 8) * math.sin(t)) for t in turns
    ]
    draw.line(curl, INK, round(space / 4))
    draw.line(
        [(x, top + 5.5 * space), (x + space / 3, top - space), (x + space, top - 1.6 * space)], INK, round(space / 4)
    )


def _bars(random: Random, draw: ImageDraw.ImageDraw, span: tuple[float, float], top: float, space: float) -> None:
    x, end = span
    while x < end - 6 * space:
        count, step = random.choice([1, 2, 2, 3, 4]), random.uniform(2.2, 3.5) * space
        heights = [random.randrange(-1, 10) for _ in range(count)]
        up = sum(heights) / count > 4
        stem = (min(heights) / 2 - 3.2) * space if up else (max(heights) / 2 + 3.2) * space
        for k, height in enumerate(heights):
            cx, cy = x + k * step, top + height * space / 2
            hollow = count == 1 and random.random() < 0.5
            box = (cx - 0.62 * space, cy - 0.45 * space, cx + 0.62 * space, cy + 0.45 * space)
            draw.ellipse(box, None if hollow else INK, INK, round(space / 5))
            side = cx + (0.55 if up else -0.55) * space
            draw.line((side, cy, side, top + stem), INK, round(space / 6))
        if count > 1:
            side = (0.55 if up else -0.55) * space
            draw.line((x + side, top + stem, x + side + (count - 1) * step, top + stem), INK, round(space / 2.2))
        x += count * step + space
        if random.random() < 0.35:
            draw.line((x - space, top, x - space, top + 4 * space), INK, round(space / 6))


# -- charts -----------------------------------------------------------------------------------------------------------


def bar_chart(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a bar chart, standing or lying."""
    groups, lying = random.randrange(3, 13), random.random() < 0.3
    values = [random.uniform(0.05, 1) * 10 ** random.choice([1, 1, 1, 1.3]) for _ in range(groups)]
    random_colours = random.random() < 0.4
    base = random.choice(_SERIES_COLOURS)
    width, height = random.choice([(640, 480), (560, 360), (720, 420), (420, 420)])
    picture, draw, plot, heading = _axes(random, width, height, max(values), lying)
    left, top, right, bottom = plot
    for k, value in enumerate(values):
        fill = random.choice(_SERIES_COLOURS) if random_colours else base
        share = value / max(values) * 0.95
        label = random.choice(WORDS)[:7]
        if lying:
            step = (bottom - top) / groups
            y = top + (k + 0.15) * step
            draw.rectangle((left, y, left + share * (right - left), y + 0.7 * step), fill)
            draw.text((left - 6, y + 0.35 * step), label, INK, font("sans", 20), anchor="rm")
        else:
            step = (right - left) / groups
            x = left + (k + 0.15) * step
            draw.rectangle((x, bottom - share * (bottom - top), x + 0.7 * step, bottom), fill)
            draw.text(
                (x + 0.35 * step, bottom + 8), label[: max(2, int(step / 13))], INK, font("sans", 20), anchor="ma"
            )
    return smaller(picture, 2), f"bar chart of {heading.lower()}"


def line_chart(random: Random, shared: Random, place: int) -> Drawn:
    """Draw one to five lines over time, with a legend."""
    width, height = random.choice([(640, 480), (600, 340), (760, 420), (440, 400)])
    points, lines = random.choice([8, 12, 24, 60, 120]), random.randrange(1, 6)
    rough, marks = random.uniform(0.02, 0.12), points <= 24 and random.random() < 0.5
    picture, draw, plot, heading = _axes(random, width, height, 10 ** random.uniform(0, 4), False)
    left, top, right, bottom = plot
    colours = random.sample(_SERIES_COLOURS, lines)
    for colour in colours:
        level, drift, path = random.uniform(0.15, 0.85), random.uniform(-0.4, 0.4), []
        for k in range(points):
            level = min(0.98, max(0.02, level + drift / points + random.gauss(0, rough)))
            path.append((left + k * (right - left) / (points - 1), bottom - level * (bottom - top)))
        draw.line(path, colour, 4, joint="curve")
        for x, y in path if marks else []:
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
    if lines > 1:
        x, y = random.choice([left + 20, right - 190]), top + 12
        draw.rectangle((x, y, x + 170, y + 30 * lines + 8), "white", "lightgrey", 2)
        for k, colour in enumerate(colours):
            draw.line((x + 10, y + 20 + 30 * k, x + 50, y + 20 + 30 * k), colour, 4)
            draw.text((x + 60, y + 20 + 30 * k), random.choice(WORDS)[:8], INK, font("sans", 20), anchor="lm")
    for k in range(6):
        draw.text(
            (left + k * (right - left) / 5, bottom + 8),
            str(random.randrange(3) + 3 * k),
            INK,
            font("sans", 20),
            anchor="ma",
        )
    return smaller(picture, 2), f"line chart of {heading.lower()}"


def _axes(
    random: Random, width: int, height: int, highest: float, lying: bool
) -> tuple[Picture, ImageDraw.ImageDraw, tuple[int, int, int, int], str]:
    """Return a canvas of twice the size with title and axes, and the box within them."""
    ground = random.choice(["white", "white", (234, 234, 242), (255, 251, 240)])
    picture, draw = canvas(2 * width, 2 * height, "white")
    heading = title(random, random.randrange(2, 5))
    left, top, right, bottom = 150, 90, 2 * width - 50, 2 * height - 80
    draw.rectangle((left, top, right, bottom), ground)
    draw.text(((left + right) / 2, 45), heading, INK, font(random.choice(["sans", "sans bold"]), 30), anchor="mm")
    grid = random.random() < 0.7
    for value in ticks(highest, random.randrange(3, 7)):
        share, label = value / highest * 0.95, f"{value:g}"
        x, y = left + share * (right - left), bottom - share * (bottom - top)
        line = (x, top, x, bottom) if lying else (left, y, right, y)
        if grid:
            draw.line(line, "lightgrey" if ground == "white" else "white", 2)
        at, anchor = ((x, bottom + 8), "ma") if lying else ((left - 10, y), "rm")
        draw.text(at, label, INK, font("sans", 20), anchor=anchor)
    draw.line((left, top, left, bottom), INK, 2)
    draw.line((left, bottom, right, bottom), INK, 2)
    return picture, draw, (left, top, right, bottom), heading


# -- screens ----------------------------------------------------------------------------------------------------------


def chat(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a conversation in one app: bubbles to the left and right below a name."""
    dark = shared.random() < 0.4
    ground = (18, 22, 28) if dark else shared.choice([(255, 255, 255), (236, 229, 221), (241, 243, 246)])
    mine, theirs = hue(shared, 0.5, 0.55 if dark else 0.9), (48, 54, 64) if dark else (255, 255, 255)
    bar, ink = shade(mine, -0.35), (235, 235, 235) if dark else INK
    width, height, size = (*shared.choice([(360, 640), (375, 667), (414, 736)]), shared.choice([13, 15]))
    picture, draw = canvas(width, height, ground)
    name, text = person(random), font("sans", size)
    y = 70.0
    while y < height - 90:
        own = random.random() < 0.5
        lines = wrapped(
            paragraph(random, random.choice([1, 1, 1, 2]))
            if random.random() < 0.75
            else words(random, random.randrange(1, 3)),
            text,
            0.62 * width,
        )
        wide, high = max(text.getlength(line) for line in lines) + 24, len(lines) * 1.35 * size + 14
        x = width - wide - 12 if own else 12
        edge = None if dark or own else (222, 222, 222)
        draw.rounded_rectangle((x, y, x + wide, y + high), 12, mine if own else theirs, edge)
        write(draw, (x + 12, y + 6), lines, text, ink if dark or not own else INK)
        y += high + random.choice([6, 6, 18])
    draw.rectangle((0, height - 54, width, height), shade(ground, -0.08))
    draw.rounded_rectangle((14, height - 44, width - 60, height - 12), 16, theirs, (200, 200, 200))
    draw.ellipse((width - 48, height - 44, width - 16, height - 12), bar)
    draw.rectangle((0, 0, width, 58), bar)
    draw.ellipse((14, 12, 48, 46), hue(random))
    draw.text((31, 29), name[0], "white", font("sans bold", 16), anchor="mm")
    draw.text((60, 12), name, "white", font("sans bold", 15))
    draw.text(
        (60, 33), f"last seen {random.randrange(24):02}:{random.randrange(60):02}", (225, 225, 225), font("sans", 11)
    )
    return picture, f"chat with {name}"


def dialog(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a dialog of one program: same frame and buttons, another message or other fields."""
    old = shared.random() < 0.5
    ground = shared.choice([(212, 208, 200), (240, 240, 240), (250, 250, 250), (53, 57, 63)])
    ink = (235, 235, 235) if ground[0] < 100 else (10, 10, 10)
    bar, program = hue(shared, 0.6, 0.6), title(shared, 1)
    width, face = (
        shared.choice([360, 420, 480]),
        font(shared.choice(["sans", "grotesque"]), shared.choice([12, 13, 14])),
    )
    kind = random.choice(["message", "message", "form", "choices"])
    lines = wrapped(paragraph(random, random.randrange(1, 4)), face, width - 90)
    body = 20 * len(lines) if kind == "message" else 20 * len(lines[:2]) + 34 * (fields := random.randrange(2, 6))
    height = 30 + 24 + max(48, body) + 60
    picture, draw = canvas(width, height, ground)
    draw.fontmode = "1" if old else "L"
    draw.rectangle((0, 0, width, 27), bar)
    verb = random.choice(["Open", "Save", "Export", "Delete", "Print", "Rename"])
    draw.text((10, 14), f"{program} - {verb} {random.choice(WORDS)}", "white", font("sans bold", 12), anchor="lm")
    draw.line((width - 18, 9, width - 9, 18), "white", 2)
    draw.line((width - 9, 9, width - 18, 18), "white", 2)
    _icon(random, draw)
    y = 48.0
    for line in lines if kind == "message" else lines[:2]:
        draw.text((70, y), line, ink, face)
        y += 20
    for k in range(0 if kind == "message" else fields):
        row, label = y + 10 + 34 * k, f"{random.choice(ADJECTIVES).capitalize()} {random.choice(WORDS)}"
        if kind == "form":
            draw.text((70, row + 4), f"{label}:", ink, face)
            draw.rectangle((210, row, width - 24, row + 22), "white", (130, 130, 130))
            draw.text(
                (216, row + 4), random.choice([words(random, 1), f"{random.randrange(1, 9999)}"]), (0, 0, 0), face
            )
        else:
            draw.rectangle((72, row + 3, 86, row + 17), "white", (90, 90, 90))
            if random.random() < 0.5:
                draw.line([(75, row + 10), (78, row + 14), (84, row + 6)], (0, 90, 0), 2)
            draw.text((96, row + 2), label, ink, face)
    for k, label in enumerate(shared.choice([["OK"], ["Cancel", "OK"], ["Help", "Cancel", "Apply"]])):
        x = width - 96 * (k + 1)
        draw.rounded_rectangle(
            (x, height - 42, x + 84, height - 14), 0 if old else 5, shade(ground, 0.3), (130, 130, 130)
        )
        draw.text((x + 42, height - 28), label, ink, face, anchor="mm")
    return picture, f"{program.lower()} dialog"


def _icon(random: Random, draw: ImageDraw.ImageDraw) -> None:
    kind = random.choice("i!?x")
    if kind == "!":
        draw.polygon([(36, 46), (58, 86), (14, 86)], (250, 200, 40), (120, 90, 0))
    else:
        draw.ellipse((16, 46, 56, 86), {"i": (40, 110, 210), "?": (70, 90, 160), "x": (205, 45, 45)}[kind])
    draw.text((36, 68), kind, "black" if kind == "!" else "white", font("serif bold", 26), anchor="mm")


_KEYWORDS = ("def", "return", "if", "else:", "for", "in", "import", "class", "while", "not", "with", "as")


def code(random: Random, shared: Random, place: int) -> Drawn:
    """Draw an editor with some lines of coloured code."""
    dark = shared.random() < 0.6
    ground = shared.choice([(30, 30, 30), (39, 40, 34), (40, 42, 54)] if dark else [(255, 255, 255), (253, 246, 227)])
    plain = (212, 212, 212) if dark else (40, 40, 40)
    colours = {name: hue(shared, 0.55, 0.85 if dark else 0.55) for name in ("keyword", "text", "comment", "number")}
    size, width = shared.choice([12, 13, 15]), shared.choice([520, 640, 760])
    lines = _program(random, random.randrange(10, 30))
    step = round(1.45 * size)
    picture, draw = canvas(width, 36 + step * len(lines) + 14, ground)
    draw.rectangle((0, 0, width, 26), shade(ground, 0.12 if dark else -0.08))
    draw.text((56, 13), f"{random.choice(WORDS)}_{random.choice(WORDS)}.py", plain, font("sans", 12), anchor="lm")
    mono, start = font("mono", size), random.choice([1, 1, random.randrange(1, 900)])
    for k, line in enumerate(lines):
        y, x = 36 + k * step, 52.0
        draw.text((42, y), str(start + k), (130, 130, 130), mono, anchor="ra")
        x += mono.getlength(" ") * (len(line) - len(line.lstrip()))
        comment = line.lstrip().startswith("#")
        for word in line.split():
            kind = "comment" if comment else _token(word)
            draw.text((x, y), word, colours.get(kind, plain), mono)
            x += mono.getlength(word + " ")
    return picture, f"code of {lines[0].split('(')[0].removeprefix('def ').replace('_', ' ')}"


def _token(word: str) -> str:
    if word in _KEYWORDS:
        return "keyword"
    return "text" if word[0] in "\"'" else "number" if word[0].isdigit() else "plain"


def _program(random: Random, count: int) -> list[str]:
    """Return lines that look like Python."""

    def name() -> str:
        return random.choice([random.choice(WORDS), f"{random.choice(ADJECTIVES)}_{random.choice(WORDS)}"])

    lines = [f"def {random.choice(VERBS)}_{name()}({name()}, {name()}):"]
    depth = 1
    while len(lines) < count:
        line, deeper = random.choice(
            [
                (f"{name()} = {name()}({name()}, {random.randrange(100)} )", 0),
                (f"{name()} = {random.randrange(1000)} + {name()}", 0),
                (f"if not {name()} in {name()}:", 1),
                (f"for {name()} in {name()}.{random.choice(VERBS)}():", 1),
                (f"# {sentence(random)}", 0),
                (f'print( "{words(random, 2)}" )', 0),
                (f"return {name()}", -1),
                ("", 0),
            ]
        )
        lines.append("    " * depth + line if line else "")
        depth = max(1, min(4, depth + deeper))
    return lines


# -- puzzles, slides, forms, codes ------------------------------------------------------------------------------------


def grid(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a sudoku or a crossword, empty or in part filled."""
    if place % 2:
        return _crossword(random)
    cell, ink = random.choice([28, 36, 44]), random.choice([INK, (20, 40, 120)])
    picture, draw = canvas(9 * cell + 20, 9 * cell + 20)
    digits, rows, columns = (random.sample(range(n), n) for n in (9, 9, 9))
    rows = [3 * block + row for block in random.sample(range(3), 3) for row in random.sample(range(3), 3)]
    columns = [3 * block + row for block in random.sample(range(3), 3) for row in random.sample(range(3), 3)]
    given, face = random.uniform(0.28, 0.5), font(random.choice(["sans", "times", "grotesque"]), round(0.6 * cell))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if random.random() < given:
                digit = digits[(3 * row + row // 3 + column) % 9] + 1
                draw.text((10 + (x + 0.5) * cell, 10 + (y + 0.5) * cell), str(digit), ink, face, anchor="mm")
    for k in range(10):
        for line in (
            (10 + k * cell, 10, 10 + k * cell, 10 + 9 * cell),
            (10, 10 + k * cell, 10 + 9 * cell, 10 + k * cell),
        ):
            draw.line(line, ink, 1 if k % 3 else 3)
    return picture, "a sudoku"


def _crossword(random: Random) -> Drawn:
    cells, cell = random.choice([9, 11, 13, 15]), random.choice([22, 26, 30])
    picture, draw = canvas(cells * cell + 20, cells * cell + 20)
    black = {(x, y) for x in range(cells) for y in range(cells) if random.random() < 0.12 or (x % 2 and y % 2)}
    black |= {(cells - 1 - x, cells - 1 - y) for x, y in black}
    number, filled = 0, random.random() < 0.4
    for y in range(cells):
        for x in range(cells):
            box = (10 + x * cell, 10 + y * cell, 10 + (x + 1) * cell, 10 + (y + 1) * cell)
            draw.rectangle(box, INK if (x, y) in black else "white", INK)
            if (x, y) in black:
                continue
            if x == 0 or y == 0 or (x - 1, y) in black or (x, y - 1) in black:
                number += 1
                draw.text((box[0] + 2, box[1] + 1), str(number), INK, font("sans", cell // 3))
            if filled:
                letter = random.choice("AEIOUTNRSLDHCMPGBW")
                draw.text(
                    (box[0] + 0.55 * cell, box[1] + 0.6 * cell), letter, INK, font("sans", cell // 2), anchor="mm"
                )
    return picture, "a crossword"


def slide(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a slide of one deck: its template with another title and other points."""
    width, height = shared.choice([(640, 480), (720, 405), (800, 450)])
    ground, accent = shared.choice([(255, 255, 255), (245, 246, 250), (28, 36, 58)]), hue(shared, 0.7, 0.7)
    ink = (240, 240, 240) if ground[0] < 100 else INK
    picture, draw = canvas(width, height, ground)
    if shared.random() < 0.5:
        draw.rectangle((0, 0, width, 64), accent)
        head = (255, 255, 255)
    else:
        draw.rectangle((0, 0, 14, height), accent)
        draw.line((40, 70, width - 40, 70), accent, 3)
        head = ink
    face = shared.choice(["sans", "grotesque", "serif"])
    draw.ellipse((width - 60, height - 46, width - 30, height - 16), accent)
    draw.text((40, height - 30), title(shared, 3), accent, font(face, 12), anchor="lm")
    draw.text((width - 75, height - 30), str(place + 2), accent, font(face, 12), anchor="rm")
    heading = title(random, random.randrange(2, 4))
    draw.text((40, 34), heading, head, font(face, 28), anchor="lm")
    chart = random.random() < 0.35
    y, text = 95.0, font(face, random.choice([16, 18, 20]))
    for _ in range(random.randrange(2, 6)):
        lines = wrapped(sentence(random), text, (0.45 if chart else 0.8) * width)
        if y + len(lines) * 1.35 * text.size > height - 60:
            break
        draw.ellipse((44, y + 7, 52, y + 15), accent)
        y = write(draw, (64, y), lines, text, ink) + 10
    for k in range(random.randrange(3, 7) if chart else 0):
        x, high = 0.58 * width + 40 * k, random.uniform(0.1, 0.55) * height
        draw.rectangle((x, height - 80 - high, x + 28, height - 80), shade(accent, random.uniform(-0.4, 0.5)))
    return picture, f"slide: {heading.lower()}"


def receipt(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a receipt of one shop, or one form, filled in another way."""
    if shared.random() < 0.5:
        return _form(random, shared)
    width, shop, street = (
        shared.choice([260, 300, 340]),
        title(shared, 2).upper(),
        f"{shared.randrange(1, 99)} {title(shared, 1)} Road",
    )
    tax, greeting = shared.choice([7, 19, 20]), sentence(shared)
    face, items = font("typewriter", shared.choice([13, 14])), random.randrange(2, 12)
    picture, draw = canvas(width, 250 + 20 * items, shared.choice([(255, 255, 255), (250, 249, 244)]))
    draw.text((width / 2, 26), shop, INK, font("mono bold", 18), anchor="mm")
    draw.text((width / 2, 50), street, INK, face, anchor="mm")
    date = f"{random.randrange(1, 29):02}.{random.randrange(1, 13):02}.20{random.randrange(10, 25)}"
    draw.text((16, 74), f"{date}  {random.randrange(8, 21):02}:{random.randrange(60):02}", INK, face)
    draw.text((width - 16, 74), f"#{random.randrange(10000):04}", INK, face, anchor="ra")
    total, y = 0.0, 106
    for _ in range(items):
        price = random.randrange(49, 4999) / 100
        total += price
        draw.text((16, y), f"{random.randrange(1, 4)} {random.choice(WORDS)}", INK, face)
        draw.text((width - 16, y), f"{price:.2f}", INK, face, anchor="ra")
        y += 20
    draw.line((16, y + 6, width - 16, y + 6), INK)
    for label, value in (
        ("TOTAL", total),
        (f"TAX {tax}%", total * tax / (100 + tax)),
        ("CASH", math.ceil(total / 5) * 5),
    ):
        y += 20
        draw.text((16, y), label, INK, font("mono bold", 14) if label == "TOTAL" else face)
        draw.text((width - 16, y), f"{value:.2f}", INK, face, anchor="ra")
    write(draw, (16, y + 34), wrapped(greeting, face, width - 32), face, INK)
    return picture, f"receipt of {shop.lower()}"


def _form(random: Random, shared: Random) -> Drawn:
    width, heading, ink = shared.choice([480, 560]), title(shared, 3), shared.choice([INK, (20, 60, 110)])
    fields = [
        f"{shared.choice(ADJECTIVES).capitalize()} {shared.choice(WORDS)}" for _ in range(shared.randrange(6, 11))
    ]
    boxed, pen = shared.random() < 0.5, font("times italic", 20)
    picture, draw = canvas(width, 90 + 44 * len(fields) + 70)
    draw.text((24, 22), heading, ink, font("serif bold", 20))
    draw.line((24, 56, width - 24, 56), ink, 2)
    for k, label in enumerate(fields):
        y = 72 + 44 * k
        draw.text((24, y + 10), label, ink, font("sans", 12))
        answer = random.choice([person(random), words(random, 2), f"{random.randrange(10**6)}", sentence(random)[:24]])
        if boxed:
            draw.rectangle((190, y, width - 24, y + 32), "white", ink)
        else:
            draw.line((190, y + 32, width - 24, y + 32), ink)
        if random.random() < 0.85:
            draw.text((200, y + 6), answer, (25, 45, 130), pen)
    y = 72 + 44 * len(fields)
    for k, label in enumerate(("yes", "no", "unknown")):
        draw.rectangle((24 + 90 * k, y + 10, 38 + 90 * k, y + 24), "white", ink)
        draw.text((46 + 90 * k, y + 10), label, ink, font("sans", 12))
    chosen = 24 + 90 * random.randrange(3)
    draw.line((chosen + 2, y + 12, chosen + 12, y + 22), (25, 45, 130), 2)
    draw.line((chosen + 12, y + 12, chosen + 2, y + 22), (25, 45, 130), 2)
    return picture, f"form: {heading.lower()}"


def qr_code(random: Random, shared: Random, place: int) -> Drawn:
    """Draw a picture with the marks of a QR code and random modules."""
    modules, side = random.choice([21, 25, 29, 33, 37]), random.choice([3, 4, 5, 6, 8])
    ink: Colour = random.choice([(0, 0, 0), (0, 0, 0), (0, 0, 0), hue(random, 0.8, 0.4)])
    label = 26 if random.random() < 0.3 and modules * side > 150 else 0
    picture, draw = canvas((modules + 8) * side, (modules + 8) * side + label)

    def square(x: float, y: float, size: int, fill: object) -> None:
        draw.rectangle(((x + 4) * side, (y + 4) * side, (x + 4 + size) * side - 1, (y + 4 + size) * side - 1), fill)

    for y in range(modules):
        for x in range(modules):
            if random.random() < 0.5 or (x == 6 and y % 2 == 0) or (y == 6 and x % 2 == 0):
                square(x, y, 1, ink)
    for x, y in ((0, 0), (modules - 7, 0), (0, modules - 7)):
        square(x - (x > 0), y - (y > 0), 8, "white")
        for inset, fill in ((0, ink), (1, "white"), (2, ink)):
            square(x + inset, y + inset, 7 - 2 * inset, fill)
    if modules > 21:
        for inset, fill in ((0, ink), (1, "white"), (2, ink)):
            square(modules - 9 + inset, modules - 9 + inset, 5 - 2 * inset, fill)
    text = f"{random.choice(WORDS)}.example/{random.randrange(10**5)}"
    if label:
        draw.text((picture.width / 2, picture.height - 18), text, ink, font("sans", 12), anchor="mm")
    return picture, f"qr code of {text}"
