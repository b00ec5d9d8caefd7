"""Whether a finished run is, to the byte, as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunError
from .manifest import Manifest
from .recorded import recorded_by
from .records import ACTIONS, Shard
from .sink import kept_digest, marker, sizes, stats
from .store import Store, canonical, file_digest, is_sealed, read_bytes, read_digest, read_table


def verify(path: str | Path, progress: Callable[[list[str]], Iterable[str]] = iter) -> list[str]:
    """Return what is wrong with a finished run, one line each: nothing when every byte and count is as it was written.

    Checked are the bytes of every file that the run left, that all signatures were made alike, that read = keep + mask
    + drop + bad, and that the manifest's parts and the filtered shards hold exactly that.  Raises RunError when there
    is no finished run.
    """
    manifest = Manifest.load(path)
    store = Store(path)
    info = manifest.info
    sealed = [store.manifest / "manifest.json", *([store.run_file] if store.run_file.exists() else [])]
    problems = [f"{p.relative_to(store.path)}: its bytes have changed" for p in sealed if not is_sealed(p)]
    if problems:  # what they say cannot be relied on
        return problems
    for name in progress(sorted(info["files"])):
        try:
            if file_digest(store.path / name) != info["files"][name]:
                problems.append(f"{name}: its bytes have changed")
        except RunError:
            problems.append(f"{name}: its bytes have changed")
        except OSError as e:
            problems.append(f"{name}: cannot be read: {e.strerror}")
    counts = manifest.counts
    if counts["read"] != sum(counts[a] for a in ACTIONS):
        problems.append(f"counts: {counts['read']} read is not the sum of {counts}")
    if problems:
        return problems
    try:
        recorded_by(store, [Shard(shard["name"], "", None) for shard in info["shards"]])
    except RunError as e:
        problems.append(str(e))
    actions = manifest.table(["action"])["action"].value_counts().to_pylist()
    held = {a["values"]: a["counts"] for a in actions}
    if held != {a: counts[a] for a in ACTIONS if counts[a]}:
        problems.append(f"counts: the parts hold {held}, manifest.json says {counts}")
    if info["config"]["output"]["shards"]:
        kept = {s["name"]: 0 if s.get("skipped") else s["keep"] + s["mask"] for s in info["shards"]}
        for name, count in kept.items():
            problems += _verify_shard(store, name, count)
        for file, content in sizes(store.shards, {n: c for n, c in kept.items() if c}).items():
            problems += _verify_json(store, file, content)
    return problems


def _verify_shard(store: Store, name: str, count: int) -> Iterator[str]:
    tar = store.shards / name
    if not count:
        if tar.exists():
            yield f"shards/{name}: is there, and no sample of it was kept"
        return
    try:
        actions = read_table(store.manifest_part(name), ["action"])["action"].to_pylist()
        kept = np.flatnonzero([action in ("keep", "mask") for action in actions])
        kept_as = kept_digest(Shard(name, "", None), read_digest(store.signatures(name)), kept)
        yield from _verify_json(store, marker(store.shards, name), stats(tar, count, kept_as))
    except (OSError, RunError) as e:
        yield f"shards/{name}: missing or not finished ({e}); run the same command again"


def _verify_json(store: Store, path: Path, content: Any) -> Iterator[str]:
    """Compare a file with what it must hold."""
    name = path.relative_to(store.path).as_posix()
    try:
        if read_bytes(path) != canonical(content).encode():
            yield f"{name}: it, or what it tells of, has changed"
    except OSError as e:
        yield f"{name}: cannot be read: {e.strerror}; run the same command again"
