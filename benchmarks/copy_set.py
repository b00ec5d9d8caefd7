"""The images of the copy-detection benchmark, as files and as tars: originals with their copies, and distractors.

Both are written once to a cache folder.  Each is named by its photos, that of the copies also by the code that edits
them.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformations import KINDS, PARTNER, STRENGTHS, copy_of


@dataclass(frozen=True)
class ImageSet:
    """Images in one order: `files` one by one, and the same in `tars`, one after the other."""

    folder: Path
    files: list[Path]
    tars: list[Path]

    @property
    def keys(self) -> list[str]:
        """The images' keys, which no two of a set share."""
        return [file.stem for file in self.files]


@dataclass(frozen=True)
class CopySet:
    """The first `originals` images are the photos; then come copies, of each kind, strength and photo in turn.

    `truth` (originals, copies) is True where the copy shows the original.
    """

    images: ImageSet
    originals: int
    truth: npt.NDArray[np.bool_]
    kind: npt.NDArray[np.int64]
    strength: npt.NDArray[np.int64]


def copy_set(shards: list[Path], cache: Path) -> CopySet:
    """Return the photos of these shards and all their copies, made where the cache lacks them."""
    here = Path(__file__).parent
    photos = {f"{shard.parent.name}-{key}": data for shard in shards for key, data in _members(shard)}
    code = [(here / name).read_bytes() for name in ("edits.py", "transformations.py")]
    folder = cache / f"copies-{zlib.crc32(b''.join([*code, *photos.values()])):08x}"
    (folder / "files").mkdir(parents=True, exist_ok=True)
    names = list(photos)
    originals = [(f"{name}.jpg", photos[name]) for name in names]
    files, tars = [folder / "files" / name for name, _ in originals], [folder / "tars" / "00000.tar"]
    _write(folder, tars[0], originals)
    for number, (kind, made) in enumerate(KINDS.items(), 1):
        suffix = [".jpg" if quality else ".png" for quality in made.quality]
        files += [
            folder / "files" / f"{kind}-{s}-{n}{e}" for s, e in zip(STRENGTHS, suffix, strict=True) for n in names
        ]
        tars.append(folder / "tars" / f"{number:05}.tar")
        _write(folder, tars[-1], _copies(photos, kind, [file.name for file in files[-len(STRENGTHS) * len(names) :]]))
    n = len(names)
    shows = np.stack([_truth(n, kind.collage) for kind in KINDS.values()], 1)  # (originals, kinds, photos)
    truth = np.repeat(shows[:, :, None], len(STRENGTHS), 2).reshape(n, -1)
    kind_of, strength_of = (g.ravel() for g in np.mgrid[: len(KINDS), : len(STRENGTHS), :n][:2])
    return CopySet(ImageSet(folder, files, tars), n, truth, kind_of, strength_of)


def distractor_set(shards: list[Path], cache: Path) -> ImageSet:
    """Return the images of these shards; the tars are the shards themselves."""
    members = [member for shard in shards for member in _members(shard)]
    folder = cache / f"distractors-{zlib.crc32(b''.join(data for _, data in members)):08x}"
    (folder / "files").mkdir(parents=True, exist_ok=True)
    files = [folder / "files" / f"{key}.jpg" for key, _ in members]
    for file, (_, data) in zip(files, members, strict=True):
        if not file.exists():
            file.write_bytes(data)
    return ImageSet(folder, files, shards)


def _truth(n: int, collage: bool) -> npt.NDArray[np.bool_]:
    """Return (n, n) True where the copy made of photo j shows photo i."""
    own = np.eye(n, dtype=bool)
    return own | np.roll(own, PARTNER, 0) if collage else own


def _members(shard: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                yield member.name.removesuffix(".jpg"), file.read()


def _copies(photos: dict[str, bytes], kind: str, file_names: list[str]) -> Iterator[tuple[str, bytes]]:
    names = list(photos)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in photos.values()]
    for at, file_name in enumerate(file_names):
        strength, i = STRENGTHS[at // len(names)], at % len(names)
        other = pictures[(i + PARTNER) % len(names)]
        yield file_name, copy_of(pictures[i], other, kind, strength, names[i])


def _write(folder: Path, path: Path, entries: Iterator[tuple[str, bytes]] | list[tuple[str, bytes]]) -> None:
    """Write entries to files and, last, to the tar, which therefore tells that they are done."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for name, data in entries:
            (folder / "files" / name).write_bytes(data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    unfinished.rename(path)
