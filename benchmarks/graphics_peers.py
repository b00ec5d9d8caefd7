"""What imagededup and fastdup, each with its defaults, make of the pictures of graphics.py."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from graphics_set import Pictures, Planted
from imagededup import methods
from imagededup.utils.general_utils import get_files_to_remove

HASHES = {"phash": methods.PHash, "dhash": methods.DHash, "ahash": methods.AHash, "whash": methods.WHash}


@dataclass(frozen=True)
class Found:
    """The pictures that a tool would remove, each with the one that it keeps, and the copies that it links directly."""

    removed: list[tuple[str, str]]
    copies: set[str]
    version: str


def found(name: str, originals: Pictures, copies: Planted | None, fastdup: Path | None) -> Found:
    """Return what a peer finds among originals and their copies; it is measured once and then read from the cache."""
    kind = copies.pictures.tar.stem if copies else "originals"
    stored = originals.tar.parent / "peers" / f"{name.replace(' ', '_')}-{kind}.json"
    if not stored.exists():
        stored.parent.mkdir(exist_ok=True)
        if name == "fastdup":
            assert fastdup
            made = _by_fastdup(originals, copies, fastdup, stored.with_suffix(".work"))
        else:
            made = _by_hash(name, originals, copies)
        text = json.dumps({"version": made.version, "removed": made.removed, "copies": sorted(made.copies)})
        stored.with_suffix(".unfinished").write_text(text)
        stored.with_suffix(".unfinished").rename(stored)
    read = json.loads(stored.read_text())
    return Found([(kept, dropped) for kept, dropped in read["removed"]], set(read["copies"]), read["version"])


def _by_hash(name: str, originals: Pictures, copies: Planted | None) -> Found:
    method = HASHES[name.removeprefix("imagededup ")](verbose=False)
    hashes: dict[str, str] = {}
    for pictures in (originals, copies.pictures) if copies else (originals,):
        hashes |= method.encode_images(str(next(iter(pictures.files.values())).parent))
    hashes = {Path(file).stem: hashes[file] for file in sorted(hashes)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that workers for encoding have nothing to do
        duplicates = method.find_duplicates(encoding_map=hashes)
    removed: dict[str, str] = {}
    for kept, others in duplicates.items():
        if kept not in removed:
            for other in others:
                removed.setdefault(other, kept)
    # the tool's own list, to which the loop adds only for which picture each goes
    assert removed.keys() == set(get_files_to_remove(duplicates))
    pairs = copies.original if copies else {}
    linked = {copy for copy, original in pairs.items() if original in duplicates.get(copy, ())}
    return Found([(kept, dropped) for dropped, kept in removed.items()], linked, version("imagededup"))


def _by_fastdup(originals: Pictures, copies: Planted | None, python: Path, work: Path) -> Found:
    files = [*originals.files.values(), *(copies.pictures.files.values() if copies else ())]
    listed, out = work.with_suffix(".txt"), work.with_suffix(".out")
    listed.write_text("".join(f"{file.resolve()}\n" for file in files))
    script = Path(__file__).with_name("fastdup_groups.py")
    # without the crash reports that it would send
    environment = {**os.environ, "SENTRY_OPT_OUT": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(script), str(listed), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    made = json.loads(out.read_text())
    for file in (listed, out):
        file.unlink()
    removed = [(first, other) for first, *others in made["components"] for other in others]
    pairs = {frozenset(pair) for pair in made["pairs"]}
    planted = copies.original if copies else {}
    linked = {copy for copy, original in planted.items() if {copy, original} in pairs}
    return Found(removed, linked, made["version"])


Peer = Callable[[Pictures, Planted | None], Found]


def peers(fastdup: Path | None) -> dict[str, Peer]:
    """Return the peers by name; fastdup is left out where the Python of its environment is not given."""

    def peer(name: str) -> Peer:
        return lambda originals, copies: found(name, originals, copies, fastdup)

    names = [f"imagededup {name}" for name in HASHES] + (["fastdup"] if fastdup else [])
    return {name: peer(name) for name in names}
