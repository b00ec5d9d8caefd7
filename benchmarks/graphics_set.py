"""The sets of the graphics benchmark, and copies of their pictures of one kind each, as files and as tars.

Both are written once to a cache folder, named by what they are made of.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from documents import HELD_OUT, TUNING, documents, on_white
from pen import Picture
from PIL import Image, ImageOps

GRAPHICS = ("clipart", "screens", "emoji")
DOCUMENTS = {"tuning": TUNING, "held_out": HELD_OUT}
PHOTOS = ("photos", "coco")
EACH = 40
"""Drawn documents of each kind."""

SMALL = 48
"""Originals with a shorter side below this are reported apart."""


@dataclass(frozen=True)
class Pictures:
    """Picture files by key, and the same with their captions in one tar."""

    files: dict[str, Path]
    captions: dict[str, str]
    tar: Path


@dataclass(frozen=True)
class Planted:
    """Copies of one kind, and the key of the original of each."""

    pictures: Pictures
    original: dict[str, str]


# -- the sets ---------------------------------------------------------------------------------------------------------


def pictures(name: str, data: Path, cache: Path) -> Pictures:
    """Return the pictures of a set: of ../shared/data, or drawn."""
    here = Path(__file__).parent
    code = ["graphics_set.py"]
    shards = []
    if name in DOCUMENTS:
        code += ["documents.py", "drawn_pages.py", "drawn_pictures.py", "pen.py"]
    else:
        shards = sorted((data / name if name in PHOTOS else data / "graphics" / name).glob("*.tar"))
        if not shards:
            raise SystemExit(f"no tar of {name} in {data}: give the folder that holds graphics/, photos/ and coco/")
    stamp = b"".join(file.read_bytes() for file in [*(here / file for file in code), *shards])
    folder = cache / f"{name}-{zlib.crc32(stamp):08x}" / "originals"
    return _written(folder, lambda: _stored(shards) if shards else _drawn(name))


def _drawn(name: str) -> Iterator[tuple[str, bytes, str]]:
    for key, picture, caption in documents(DOCUMENTS[name], EACH):
        yield f"{key}.png", png(picture), caption


def _stored(shards: list[Path]) -> Iterator[tuple[str, bytes, str]]:
    for shard in shards:
        with tarfile.open(shard) as tar:
            held = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        for name, content in held.items():
            if name.endswith((".png", ".jpg")):
                yield name, content, held[f"{Path(name).stem}.txt"].decode()


# -- the copies -------------------------------------------------------------------------------------------------------


def planted(originals: Pictures, kind: str) -> Planted:
    """Return a copy of this kind of each original that has one: one on white of the transparent ones alone."""
    copies = _written(originals.tar.parent / kind, lambda: _copies(originals, kind))
    return Planted(copies, {key: key.removesuffix(f"-{kind}") for key in copies.files})


def _copies(originals: Pictures, kind: str) -> Iterator[tuple[str, bytes, str]]:
    for key, file in originals.files.items():
        picture = plain(Image.open(file))
        if kind == "on_white" and picture.mode == "RGB":
            continue
        if kind not in KEEP_ALPHA and blank(on_white(picture)):
            continue  # white art on transparent ground: its copy shows nothing
        content, suffix = KINDS[kind](picture, Random(f"{kind} {key}"))
        yield f"{key}-{kind}.{suffix}", content, originals.captions[key]


def plain(picture: Picture) -> Picture:
    """Return the picture in RGB, or in RGBA if any of it is transparent."""
    rgba = picture.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    return rgba if lowest < 255 else rgba.convert("RGB")


def blank(picture: Picture) -> bool:
    """Whether an RGB picture shows next to nothing."""
    return all(highest - lowest < 8 for lowest, highest in picture.getextrema())  # type: ignore[misc, union-attr]


def png(picture: Picture) -> bytes:
    return _encoded(picture, "PNG")


def _encoded(picture: Picture, format: str, **settings: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **settings)
    return buffer.getvalue()


def jpeg60(picture: Picture, random: Random) -> tuple[bytes, str]:
    return _encoded(on_white(picture), "JPEG", quality=60), "jpg"


def half(picture: Picture, random: Random) -> tuple[bytes, str]:
    size = max(1, picture.width // 2), max(1, picture.height // 2)
    return png(picture.resize(size, Image.Resampling.LANCZOS)), "png"


def webp(picture: Picture, random: Random) -> tuple[bytes, str]:
    return _encoded(picture, "WEBP", quality=80), "webp"


def ground(picture: Picture, random: Random) -> tuple[bytes, str]:
    return png(on_white(picture)), "png"


def border_black(picture: Picture, random: Random) -> tuple[bytes, str]:
    return _bordered(picture, "black")


def border_white(picture: Picture, random: Random) -> tuple[bytes, str]:
    return _bordered(picture, "white")


def _bordered(picture: Picture, colour: str) -> tuple[bytes, str]:
    """Return the picture on white within a border of 6% of its shorter side."""
    return png(ImageOps.expand(on_white(picture), max(1, round(0.06 * min(picture.size))), colour)), "png"


def crop(picture: Picture, random: Random) -> tuple[bytes, str]:
    """Return 85% of the picture by side; the window's centre is near the picture's."""
    width, height = (max(1, round(0.85 * side)) for side in picture.size)
    left = round(random.uniform(0.25, 0.75) * (picture.width - width))
    top = round(random.uniform(0.25, 0.75) * (picture.height - height))
    return png(picture.crop((left, top, left + width, top + height))), "png"


KINDS: dict[str, Callable[[Picture, Random], tuple[bytes, str]]] = {
    "jpeg60": jpeg60,
    "half": half,
    "webp": webp,
    "on_white": ground,
    "border_black": border_black,
    "border_white": border_white,
    "crop": crop,
}
"""Ways to copy a picture, which is in RGB or RGBA; the copy's bytes and the file's suffix are returned."""

KEEP_ALPHA = ("half", "webp", "crop")
"""Kinds whose copies are transparent where the original is; the others are on white."""


# -- the cache --------------------------------------------------------------------------------------------------------


def _written(folder: Path, members: Callable[[], Iterator[tuple[str, bytes, str]]]) -> Pictures:
    """Return the pictures of a folder, which is filled with members (file name, bytes, caption) if it is not yet.

    The tar comes last and tells that all is there.
    """
    tar_file = folder.with_suffix(".tar")
    if not tar_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = tar_file.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w") as tar:
            for name, content, caption in members():
                (folder / name).write_bytes(content)
                for member, data in ((name, content), (f"{Path(name).stem}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        unfinished.rename(tar_file)
    files, captions = {}, {}
    with tarfile.open(tar_file) as tar:
        for member in tar:
            key = Path(member.name).stem
            if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                captions[key] = file.read().decode()
            else:
                files[key] = folder / member.name
    return Pictures(files, captions, tar_file)
