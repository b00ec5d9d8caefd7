"""One shard and the samples to keep of it -> a filtered tar, byte for byte, with its marker written last."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .config import digest_of
from .errors import ChangedShard, ShardError
from .records import Ints, Shard
from .remote import TIMEOUT
from .shards import REMEDY, SCHEME, shard_stem
from .source import BLOCK, Members, open_shard, printable_key
from .store import canonical, file_digest, read_bytes, read_note, read_table, replacing, write_json

_RECORD = 20 * BLOCK  # what tar pads an archive to


def marker(folder: Path, shard: str) -> Path:
    """Return the path of the marker that is written when a filtered shard is whole."""
    return folder / f"{shard_stem(shard)}_stats.json"


def kept_digest(shard: Shard, signature: str, kept: npt.NDArray[np.int64]) -> str:
    """Return the digest of what a filtered shard is made of: the input's signatures and the kept indices."""
    return digest_of(["filtered-1", shard.name, signature, kept.tolist()])


def read_marker(folder: Path, shard: str) -> dict[str, Any] | None:
    """Return what the marker of a filtered shard tells, None where there is none that a run wrote.

    What a killed call left in doubt is settled: `was` tells of the shard that was to be replaced, if it still stands.
    """
    path, tar = marker(folder, shard), folder / shard
    try:
        told = json.loads(read_bytes(path))
        if not isinstance(told["kept"], str):
            return None
        if "was" not in told:
            return dict(told)
        was = told.pop("was")
        digest = file_digest(tar) if tar.is_file() else None
        standing = next((one for one in (told, was) if digest and one and one.get("digest") == digest), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if standing is None:
        return {"kept": told["kept"]}  # neither is there
    write_json(path, standing)
    return dict(standing)


def is_written(shard: Shard, folder: Path, kept: str) -> bool:
    """Tell whether the filtered shard of this `kept_digest` is there, whole."""
    return is_whole(shard, folder, read_marker(folder, shard.name), kept)


def is_whole(shard: Shard, folder: Path, told: dict[str, Any] | None, kept: str) -> bool:
    """Tell whether the filtered shard of this `kept_digest` is there, as its marker tells."""
    try:
        return bool(told and told["kept"] == kept and (folder / shard.name).stat().st_size == told["bytes"])
    except (OSError, KeyError):
        return False


class _Changed(Exception):
    """The shard's bytes are not those that were signed."""


def write_shard(
    shard: Shard,
    folder: Path,
    signatures: Path,
    kept: Ints,
    kept_as: str,
    timeout: float = TIMEOUT,
    held: Ints | None = None,
) -> None:
    """Write the filtered shard, in place of the one that stands, and then its marker.

    By the digest noted in its `signatures` the shard is known to be the one that was signed, to the byte.  Where the
    filtered shard that stands holds the samples `held`, these among them, it is made from that.  Members that belong to
    no sample are left out; pax global headers stay.  A shard of which nothing is kept is not written.  What stands is
    touched by nothing but what takes its place.  Raises ShardError for a shard that cannot be read, and ChangedShard
    for one that is not the one that was signed.
    """
    tar, mark = folder / shard.name, marker(folder, shard.name)
    if not len(kept):
        tar.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        return
    was = read_marker(folder, shard.name)
    with replacing(tar) as temporary:
        _make(shard, tar, temporary, signatures, kept, was, timeout, held)
        made = stats(temporary, len(kept), kept_as)
        # until the new shard is there, its marker tells of both: the digest says which of the two it is
        write_json(mark, {**made, "was": was})
    write_json(mark, made)


def _make(
    shard: Shard,
    tar: Path,
    temporary: Path,
    signatures: Path,
    kept: Ints,
    was: dict[str, Any] | None,
    timeout: float,
    held: Ints | None,
) -> None:
    """Write the kept samples to `temporary`, from the filtered shard that stands or from the input."""
    keys: list[str] = read_table(signatures, ["key"])["key"].to_pylist()
    keep = np.zeros(len(keys), bool)
    keep[kept] = True
    content = read_note(signatures)["digest"]
    try:
        if held is not None and was and file_digest(tar) == was.get("digest"):
            standing = Shard(shard.name, str(tar.absolute()), was["bytes"])
            _filter(standing, temporary, [keys[i] for i in held], keep[held], None, timeout)
            return
        try:
            _filter(shard, temporary, keys, keep, content, timeout)
        except _Changed:
            if not SCHEME.match(shard.url):
                raise
            # what came over the network may have been damaged there
            _filter(shard, temporary, keys, keep, content, timeout)
    except _Changed as e:
        raise ChangedShard(shard.name, "run the same command again") from e
    except ShardError as e:
        advice = "bring the shard back, or set output.shards: false"
        raise ShardError(str(e).replace(REMEDY, advice)) from e


def stats(tar: Path, count: int, kept_as: str) -> dict[str, Any]:
    """Return what the marker of a filtered shard of so many samples holds; raises OSError for one that is not there."""
    return {
        "count": count,
        "successes": count,
        "bytes": tar.stat().st_size,
        "digest": file_digest(tar),
        "kept": kept_as,
    }


def _filter(
    shard: Shard, to: Path, keys: list[str], keep: npt.NDArray[np.bool_], content: str | None, timeout: float
) -> None:
    """Write the samples to keep of a shard; raises _Changed unless it has these keys, and this `content` if any."""
    with open(to, "wb") as file, open_shard(shard, timeout) as members:
        if members.compressed:
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as out:
                _copy(members, out, keep, keys)
        else:
            _copy(members, file, keep, keys)
        if content is not None and members.stored.digest != content:
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


def write_sizes(folder: Path, counts: dict[str, int], earlier: Iterable[str] = ()) -> None:
    """Write a `sizes.json` of samples by file name into each folder of filtered shards, and remove what is stale.

    `counts` are of all filtered shards by relative name.  Stale is one that names `earlier` shards alone, none of which
    is there any more.
    """
    wanted = sizes(folder, counts)
    for path, names in sizes(folder, dict.fromkeys(earlier, 0)).items():
        if path not in wanted and _is_stale(path, names.keys()):
            path.unlink()
    for path, content in wanted.items():
        if not path.is_file() or path.read_bytes() != canonical(content).encode():
            write_json(path, content)


def _is_stale(path: Path, names: Iterable[str]) -> bool:
    try:
        told = json.loads(read_bytes(path))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.keys() <= {*names} and not any((path.parent / n).exists() for n in told)


def remove_shard(folder: Path, shard: str, expected: set[Path]) -> None:
    """Remove a filtered shard, and its marker unless that is among the `expected`: of a shard of the same stem."""
    (folder / shard).unlink(missing_ok=True)
    if (mark := marker(folder, shard)) not in expected:
        mark.unlink(missing_ok=True)
