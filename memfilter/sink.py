"""One shard and the samples to keep of it -> a filtered tar, byte for byte, with its marker written last."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .config import digest_of
from .errors import ShardError
from .records import Shard
from .remote import TIMEOUT
from .shards import REMEDY, SCHEME, TAR_SUFFIXES, shard_stem
from .source import BLOCK, Members, open_shard, printable_key
from .store import canonical, file_digest, read_note, read_table, replacing, write_json

_RECORD = 20 * BLOCK  # what tar pads an archive to


def marker(folder: Path, shard: str) -> Path:
    """Return the path of the marker that is written when a filtered shard is whole."""
    return folder / f"{shard_stem(shard)}_stats.json"


def kept_digest(shard: Shard, signature: str, kept: npt.NDArray[np.int64]) -> str:
    """Return the digest of what a filtered shard is made of: the input's signatures and the kept indices."""
    return digest_of(["filtered-1", shard.name, signature, kept.tolist()])


def is_written(shard: Shard, folder: Path, kept: str) -> bool:
    """Tell whether the filtered shard of this `kept_digest` is there, whole."""
    try:
        stats = json.loads(marker(folder, shard.name).read_text(encoding="utf-8"))
        return bool(stats["kept"] == kept and (folder / shard.name).stat().st_size == stats["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Changed(Exception):
    """The shard's bytes are not those that were signed."""


def write_shard(
    shard: Shard,
    folder: Path,
    signatures: Path,
    kept: npt.NDArray[np.int64],
    kept_as: str,
    timeout: float = TIMEOUT,
) -> None:
    """Write the filtered shard and then its marker.

    By the digest noted in its `signatures` the shard is known to be the one that was signed, to the byte.  Members that
    belong to no sample are left out; pax global headers stay.  A shard of which nothing is kept is not written.
    Raises ShardError when the shard is not the one that was signed; its signatures are removed then.
    """
    tar = folder / shard.name
    marker(folder, shard.name).unlink(missing_ok=True)
    if not len(kept):
        tar.unlink(missing_ok=True)
        return
    try:
        try:
            _filter(shard, tar, signatures, kept, timeout)
        except _Changed:
            if not SCHEME.match(shard.url):
                raise
            _filter(shard, tar, signatures, kept, timeout)  # what came over the network may have been damaged there
    except _Changed as e:
        signatures.unlink()  # of bytes that are no more: the next run reads the shard again
        raise ShardError(f"{shard.name}: has changed since it was read; run the same command again") from e
    except ShardError as e:
        advice = "bring the shard back, or set output.shards: false"
        raise ShardError(str(e).replace(REMEDY, advice)) from e
    write_json(marker(folder, shard.name), stats(tar, len(kept), kept_as))


def stats(tar: Path, count: int, kept_as: str) -> dict[str, Any]:
    """Return what the marker of a filtered shard of so many samples holds; raises OSError for one that is not there."""
    return {
        "count": count,
        "successes": count,
        "bytes": tar.stat().st_size,
        "digest": file_digest(tar),
        "kept": kept_as,
    }


def _filter(shard: Shard, tar: Path, signatures: Path, kept: npt.NDArray[np.int64], timeout: float) -> None:
    keys: list[str] = read_table(signatures, ["key"])["key"].to_pylist()
    keep = np.zeros(len(keys), bool)
    keep[kept] = True
    with replacing(tar) as temporary, open(temporary, "wb") as file, open_shard(shard, timeout) as members:
        if members.compressed:
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as out:
                _copy(members, out, keep, keys)
        else:
            _copy(members, file, keep, keys)
        if members.stored.digest != read_note(signatures)["digest"]:
            raise _Changed


def _copy(members: Members, out: IO[bytes] | gzip.GzipFile, keep: npt.NDArray[np.bool_], keys: list[str]) -> None:
    size = 0
    for member in members:
        if member.index >= 0 and (member.index >= len(keys) or printable_key(member.key) != keys[member.index]):
            raise _Changed
        if member.is_global or (member.index >= 0 and keep[member.index]):
            for chunk in member.raw():
                size += out.write(chunk)
    if members.samples != len(keys):
        raise _Changed
    out.write(bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD))


def sizes(folder: Path, counts: dict[str, int]) -> dict[Path, dict[str, int]]:
    """Return each `sizes.json` of a folder of filtered shards, and the samples by file name that it holds.

    `counts` are of all filtered shards by relative name.
    """
    by_folder: defaultdict[Path, dict[str, int]] = defaultdict(dict)
    for name, count in counts.items():
        tar = folder / name
        by_folder[tar.parent / "sizes.json"][tar.name] = count
    return by_folder


def write_sizes(folder: Path, counts: dict[str, int]) -> None:
    """Write a `sizes.json` of samples by file name into each folder of filtered shards, and remove what is stale.

    `counts` are of all filtered shards by relative name; shards of other names that carry a marker are removed.
    """
    wanted = sizes(folder, counts)
    expected = {marker(folder, name) for name in counts}
    tars = {folder / name for name in counts}
    for found in list(folder.rglob("*_stats.json")):
        stem = found.name.removesuffix("_stats.json")
        for suffix in TAR_SUFFIXES:
            if (tar := found.with_name(stem + suffix)) not in tars:
                tar.unlink(missing_ok=True)
        if found not in expected:
            found.unlink()
    for stale in set(folder.rglob("sizes.json")) - wanted.keys():
        stale.unlink()
    for path, content in wanted.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != canonical(content):
            write_json(path, content)
