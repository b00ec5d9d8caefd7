"""A manifest told to other loaders, which know samples that train and samples that do not, but no weights.

A sample trains where its loss weight is over 0; what is down-weighted therefore counts in full.  Each exporter writes
one file from the manifest alone, a shard's rows at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError, InputError
from .manifest import Manifest
from .records import voids
from .shards import SCHEME, TAR_SUFFIXES
from .source import sample_uid
from .store import canonical, replacing


def export(manifest: Manifest, to: str, path: str | Path) -> int:
    """Write the file of the exporter named `to` and return how many samples train.

    What stands at `path`, or where it links to, is replaced when the new file is whole.  Raises ConfigError for an
    exporter that does not exist or does not fit the run, and for a path that is a URL, cannot be written, is inside the
    run directory, or is that of a file among the input, of a shard, or of anything but a file.
    """
    if to not in EXPORTERS:
        raise ConfigError(f"export to {to!r}: one of {', '.join(EXPORTERS)}")
    place = _place(manifest, path)
    try:
        with replacing(place) as temporary:
            EXPORTERS[to](manifest, temporary)
    except OSError as e:  # its own text names the temporary file
        raise ConfigError(f"{path}: cannot be written: {e.strerror or e}; mend that or choose another") from e
    return sum(len(_training(rows)) for _, rows in manifest.parts(["loss_weight"]))


def _place(manifest: Manifest, path: str | Path) -> Path:
    """Return where a file is to be written, with links followed; raises ConfigError where none may be."""
    if SCHEME.match(str(path)):
        raise ConfigError(f"{path}: is a URL; name a local file")
    where, root = os.path.realpath(path), manifest.root
    if os.path.isdir(where):
        raise ConfigError(f"{path}: is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{path}: is a device or a pipe; name a file")
    if where.startswith(os.path.realpath(manifest.path) + os.sep):
        raise ConfigError(f"{path}: is inside the run directory, which holds what the run wrote alone; choose another")
    there, shards = os.path.exists(where), [shard["name"] for shard in manifest.info["shards"]]
    if there and root and "://" not in root:
        inputs = {os.path.realpath(f"{root}/{shard}") for shard in shards}  # some may be links out of the root
        if where in inputs or where.startswith(os.path.realpath(root) + os.sep):
            raise ConfigError(f"{path}: is there already, among the input; move it away or choose another")
    # the input may lie elsewhere by now, and a manifest that was copied away without its run does not know where
    names = {os.path.basename(path), os.path.basename(where)}
    if any(name.lower().endswith(TAR_SUFFIXES) for name in names) or (
        there and names & {shard.rpartition("/")[2] for shard in shards}
    ):
        raise ConfigError(f"{path}: has a shard's name; choose another")
    return Path(where)


def keys(manifest: Manifest, path: Path) -> None:
    r"""Write a line for each sample that trains: shard, tab, key.

    Keys are as in the manifest, where bytes that are not UTF-8 are written as `\xNN`; so are tabs and line breaks here.
    """
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for shard, rows in manifest.parts(["key", "loss_weight"]):
            names = _training(rows)["key"].to_pylist()
            file.writelines(f"{_escaped(shard)}\t{_escaped(key)}\n" for key in names)


def _escaped(text: str) -> str:
    return re.sub(r"[\t\n\r]", lambda found: f"\\x{ord(found[0]):02x}", text)


def energon(manifest: Manifest, path: Path) -> None:
    """Write a `split.yaml` for Megatron-Energon: all shards in the split `train`, and `exclude` of what does not train.

    It belongs in `.nv-meta/` of a data set whose folder is the run's input root; another split takes its `exclude`
    alone.  A shard of which nothing trains is excluded as a whole, as is one that the run skipped.  Raises InputError
    for a sample to be excluded whose key is not UTF-8: Energon has no name for it.  Where the uids are the data's own
    nothing tells such a key from one that is written with the escape, and either raises.
    """
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("split_parts:\n  train:\n")
        file.writelines(f"  - {_pattern(shard['name'])}\n" for shard in manifest.info["shards"])
        file.write("  val: []\n  test: []\n")
        names = _excluded(manifest)
        first = next(names, None)
        file.write("exclude: []\n" if first is None else f"exclude:\n- {_pattern(first)}\n")
        file.writelines(f"- {_pattern(name)}\n" for name in names)


_ESCAPE = re.compile(r"\\x[89a-f][0-9a-f]")  # as the manifest writes a byte that is not UTF-8


def _excluded(manifest: Manifest) -> Iterator[str]:
    """Yield what Energon is to leave out: shards, and samples as shard/key."""
    yield from (shard["name"] for shard in manifest.info["shards"] if shard.get("skipped"))
    own_uids = manifest.info["config"]["input"]["uid_field"] is not None
    for shard, rows in manifest.parts(["uid", "key", "loss_weight"]):
        out = rows.filter(pc.equal(rows["loss_weight"], 0))
        if len(out) == len(rows):
            yield shard
            continue
        for uid, key in zip(out["uid"].to_pylist(), out["key"].to_pylist(), strict=True):
            if _ESCAPE.search(key) and (own_uids or uid != sample_uid(shard, key.encode())):
                is_not = "may not be UTF-8 (input.uid_field keeps no other trace)" if own_uids else "is not UTF-8"
                raise InputError(f"{shard}: the key {key!r} {is_not} and energon cannot exclude it; rename it")
            yield f"{shard}/{key}"


def _pattern(name: str) -> str:
    """Return a name as YAML text for which brace expansion, which Energon does to it, gives that name."""
    literal = re.sub(r"([\\{}])", r"\\\1", name)
    return '"' + literal.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def datacomp(manifest: Manifest, path: Path) -> None:
    """Write the subset file of DataComp's resharder: the uids that train, sorted, a .npy of dtype `u8,u8`.

    Raises ConfigError where the run's uids are not the data's own.
    """
    if manifest.info["config"]["input"]["uid_field"] is None:
        raise ConfigError(
            f"{manifest.path}: its uids are memfilter's own, unknown to DataComp; run again with input.uid_field: uid"
        )
    parts = manifest.parts(["uid", "loss_weight"])
    halves = np.frombuffer(b"".join(voids(_training(rows)["uid"]).tobytes() for _, rows in parts), ">u8")
    order = np.lexsort((halves[1::2], halves[::2]))
    subset = np.empty(len(order), "u8,u8")
    subset["f0"], subset["f1"] = halves[::2][order], halves[1::2][order]
    with open(path, "wb") as file:
        np.save(file, subset)


def open_clip(manifest: Manifest, path: Path) -> None:
    """Write the `sizes.json` of the filtered shards: of each its samples, kept and masked, by its file name.

    A run has one in each of their folders.  Raises ConfigError for a run without filtered shards, and for shards of
    several folders that have one file name, by which alone open_clip tells them apart.
    """
    if not manifest.info["config"]["output"]["shards"]:
        raise ConfigError(f"{manifest.path}: has no filtered shards to count; run again with output.shards: true")
    sizes: dict[str, int] = {}
    for shard, rows in manifest.parts(["action"]):
        name, size = shard.rpartition("/")[2], pc.is_in(rows["action"], pa.array(["keep", "mask"])).to_numpy().sum()
        if size and name in sizes:
            raise ConfigError(f"{shard}: a second shard of this file name; export each folder from a run of its own")
        if size:  # an emptied shard is not written
            sizes[name] = int(size)
    path.write_text(canonical(sizes), encoding="utf-8")


def _training(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.greater(rows["loss_weight"], 0))


EXPORTERS: dict[str, Callable[[Manifest, Path], None]] = {
    "datacomp": datacomp,
    "energon": energon,
    "keys": keys,
    "open_clip": open_clip,
}
