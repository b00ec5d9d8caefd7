"""A small data set with planted truth, made by our own code, and the main job on it."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from . import pipeline, summary
from .config import Config
from .manifest import Manifest

SEED = 20231
_SINGLES = 400
_A_KIND = 20
_REPEATS = 5
_PER_SHARD = 150


@dataclass(frozen=True)
class Planted:
    """One sample of the demo: its image file, its caption, and of what kind of which original it is a copy."""

    data: bytes
    caption: str
    kind: str = "single"
    original: int = -1


Edit = Callable[[Image.Image], bytes]


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _crop(image: Image.Image) -> bytes:
    w, h = image.size
    return _jpeg(image.crop((w // 50, h // 50, w - w // 50, h - h // 50)))


IMAGE_KINDS: dict[str, Edit] = {
    "exact copy": _jpeg,
    "re-encoded at quality 40": lambda image: _jpeg(image, 40),
    "resized to half": lambda image: _jpeg(
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    ),
    "cropped by 2% a side": _crop,
    "brightened by 12%": lambda image: _jpeg(ImageEnhance.Brightness(image).enhance(1.12)),
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


_COLOURS = (
    "amber azure black bronze coral crimson emerald golden grey indigo ivory jade lilac ochre olive pearl".split()
)
_THINGS = (
    "barn boat bridge candle castle clock fence forest garden harbour kettle lantern meadow mill orchard tower".split()
)
_PLACES = (
    "at dawn|by the river|in the rain|near the coast|on a hill|under a bridge|in winter light|before a storm".split("|")
)


def captions(random: np.random.Generator) -> Iterator[str]:
    """Yield captions that differ from one another."""
    n = len(_COLOURS) * len(_THINGS)
    for i in random.permutation(n * n * len(_PLACES)):
        (first, second), place = divmod(int(i) % (n * n), n), _PLACES[int(i) // (n * n)]
        one = f"{_COLOURS[first % 16]} {_THINGS[first // 16]}"
        yield f"a {one} and a {_COLOURS[second % 16]} {_THINGS[second // 16]} {place}"


def samples() -> list[Planted]:
    """Return the demo's samples, shuffled; `original` is a place in the list."""
    random = np.random.default_rng(SEED)
    texts = captions(random)
    images = [picture(random) for _ in range(_SINGLES)]
    planted = [Planted(_jpeg(image), next(texts)) for image in images]
    chosen = iter(random.permutation(_SINGLES).tolist())
    for kind, edit in IMAGE_KINDS.items():
        for _ in range(_A_KIND):
            original = next(chosen)
            planted.append(Planted(edit(images[original]), next(texts), kind, original))
    for _ in range(_A_KIND):
        original = next(chosen)
        planted.append(
            Planted(_jpeg(picture(random)), planted[original].caption.upper() + "!", "repeated caption", original)
        )
    for _ in range(_A_KIND // 2):
        original = next(chosen)
        for i in range(_REPEATS):
            data = _jpeg(images[original], 60 + 5 * i)
            planted.append(Planted(data, planted[original].caption, "repeated pair", original))
    planted.append(Planted(planted[next(chosen)].data[:2000], next(texts), "corrupt"))
    planted.append(Planted(b"<html>404 Not Found</html>", next(texts), "corrupt"))
    order = random.permutation(len(planted))
    place = np.argsort(order)
    moved = [planted[i] for i in order]
    return [Planted(p.data, p.caption, p.kind, int(place[p.original]) if p.original >= 0 else -1) for p in moved]


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


def score(planted: list[Planted], manifest: Manifest) -> list[tuple[str, int, int, str]]:
    """Return (kind, planted, found, how) rows; the last counts samples that were joined and are copies of nothing."""
    table = manifest.table(["key", "action", "reasons", "image_group", "caption_group", "duplication"])
    rows = dict(zip((int(k) for k in table["key"].to_pylist()), table.to_pylist(), strict=True))
    found: dict[str, list[str]] = {}
    total: dict[str, int] = {}
    false = 0
    for i, one in enumerate(planted):
        mine, theirs = rows[i], rows[max(one.original, 0)]
        same_image, same_caption = (mine[g] == theirs[g] for g in ("image_group", "caption_group"))
        if one.kind == "single":
            # an original may be dropped in favour of a better copy of it, never in favour of anything else
            family = [j for j in rows if rows[j]["image_group"] == mine["image_group"] and j != i]
            false += any(planted[j].original != i or planted[j].kind == "repeated caption" for j in family)
            continue
        hit = {"repeated caption": same_caption, "repeated pair": same_image and same_caption}.get(one.kind, same_image)
        if one.kind == "corrupt":
            hit = mine["action"] == "bad"
        total[one.kind] = total.get(one.kind, 0) + 1
        if hit:
            how = [
                r
                for r in mine["reasons"] + theirs["reasons"]
                if one.kind == "repeated caption" or r != "caption_duplicate"
            ]
            found.setdefault(one.kind, []).append(how[0] if how else mine["duplication"])
    result = []
    for kind in (*IMAGE_KINDS, "repeated caption", "repeated pair", "corrupt"):
        hits = found.get(kind, [])
        ways = sorted(set(hits), key=lambda way: (-hits.count(way), way))
        result.append((kind, total[kind], len(hits), ", ".join(f"{hits.count(way)} {way}" for way in ways)))
    return [*result, ("joined wrongly", 0, false, "")]


def run(out: Path, workers: int | None = None) -> list[str]:
    """Write the demo's shards to `out`/input, run on them into `out`/run, and return the lines to print."""
    started = time.monotonic()
    planted = samples()
    write_shards(planted, out / "input")
    manifest = pipeline.run([str(out / "input")], out / "run", Config(), workers)
    rows = score(planted, manifest)
    lines = [f"{'':26}{'planted':>8}{'found':>8}   how"]
    lines += [f"{kind:26}{n:8,}{found:8,}   {how}" for kind, n, found, how in rows]
    lines += ["", *summary.lines(manifest.info, str(out / "run"))[:-1]]
    lines.append(f"input     {out / 'input'}; took {time.monotonic() - started:.0f} s")
    return [*lines, summary.reconciliation(manifest.counts)]
