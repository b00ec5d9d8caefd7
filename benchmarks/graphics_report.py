"""The results of graphics.py as tables in Markdown, and the dropped pairs as a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pen import Picture, font
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from graphics import Row

_SIDE, _PER_ROW = 110, 7
_GROUND = (200, 220, 255)  # shows where a picture is transparent
_INKS = {"copy": (0, 120, 0), "different": (180, 0, 0), "unjudged": (200, 110, 0)}


def markdown(result: dict[str, Any]) -> str:
    """Return what is dropped by set and method, and recall by set, kind and method."""
    sets = result["sets"]
    methods = list(next(iter(sets.values()))["dropped"])
    target = result["target"]
    lines = [
        f"Different pictures that are dropped, of all of a set; in brackets how many of them nobody has judged yet. "
        f"The target is {target['different_share']:.1%}.",
        "",
        f"| set | images | {' | '.join(methods)} |",
        "|---|---|" + "---|" * len(methods),
    ]
    for name, measured in sets.items():
        cells = [_dropped(measured["dropped"][method]) for method in methods]
        lines.append(f"| {name} | {measured['images']:,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Recall of planted copies; for memfilter also the groups that hold different pictures. The target is "
        f"{target['recall']}. In brackets: of originals below {result['small_below']} pixels.",
        "",
        f"| set | kind | copies | {' | '.join(methods)} | false groups |",
        "|---|---|---|" + "---|" * (len(methods) + 1),
    ]
    for name, measured in sets.items():
        for kind, found in measured["planted"].items():
            cells = [_recall(found[method]) for method in methods]
            copies = f"{found['copies']}" + f" ({found['copies_small']})" * (found["copies_small"] > 0)
            false = found["memfilter"]["false_groups"]
            lines.append(f"| {name} | {kind.replace('_', ' ')} | {copies} | {' | '.join(cells)} | {false} |")
    for kind, recall in result["recall_of_all_sets"].items():
        lines.append(f"| all | {kind.replace('_', ' ')} | | {' | '.join(f'{recall[m]:.3f}' for m in methods)} | |")
    return "\n".join(lines) + "\n"


def _dropped(measured: Mapping[str, Any]) -> str:
    unjudged = f" ({measured['unjudged']})" * (measured["unjudged"] > 0)
    return f"{measured['different']}{unjudged}, {measured['different_share']:.1%}"


def _recall(measured: Mapping[str, Any]) -> str:
    recall, small = measured["recall"], measured["recall_small"]
    return ("-" if recall is None else f"{recall:.3f}") + ("" if small is None else f" ({small:.2f})")


def sheet(rows: Sequence[Row], files: Mapping[str, Path], verdict: Callable[[str, str], str], out: Path) -> None:
    """Draw the kept and the dropped picture of each dropped row side by side, with method, distance and score."""
    gone = [row for row in rows if row.action == "drop" and row.kept]
    gone.sort(key=lambda row: (verdict(str(row.kept), row.key), -(row.score or 0.0), row.kept, row.key))
    across, down = 2 * _SIDE + 12, _SIDE + 30
    drawn = Image.new("RGB", (_PER_ROW * across, max(1, -(-len(gone) // _PER_ROW)) * down), "white")
    draw = ImageDraw.Draw(drawn)
    for number, row in enumerate(gone):
        x, y = number % _PER_ROW * across, number // _PER_ROW * down
        judged = verdict(str(row.kept), row.key)
        draw.text((x, y), f"{row.kept} {row.key}", "black", font("sans", 9))
        draw.text((x, y + 12), f"{row.edge} {judged}", _INKS[judged], font("sans", 9))
        for side, key in enumerate((str(row.kept), row.key)):
            drawn.paste(_thumbnail(files[key]), (x + side * (_SIDE + 2), y + 26))
    drawn.save(out)


def _thumbnail(file: Path) -> Picture:
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    scale = min(_SIDE / picture.width, _SIDE / picture.height)
    size = max(1, int(scale * picture.width)), max(1, int(scale * picture.height))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", size, _GROUND), picture).convert("RGB")
