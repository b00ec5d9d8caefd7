"""The manifest: one row per sample with what was decided and why; written, read and looked up here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError, RunError
from .records import (
    ACTIONS,
    CAPTION_METHODS,
    DUPLICATION,
    GENERALITY,
    MANIFEST,
    METHODS,
    Decisions,
    GeneralityScores,
    Groups,
    Ints,
    Samples,
    Scores,
)
from .source import sample_uid
from .store import Store, done, file_digest, read_table, replacing, write_sealed, write_table

SCHEMA_VERSION = 2


# -- writing ----------------------------------------------------------------------------------------------------------


def write_parts(
    store: Store,
    samples: Samples,
    groups: Groups,
    decisions: Decisions,
    scores: Scores | None,
    generality: GeneralityScores | None,
    own_uids: bool,
) -> None:
    """Write the parts and the look-up file; what would not change is left as it is.

    `manifest.json` is taken away: there is no finished manifest until `finish` has written it again.
    """
    (store.manifest / "manifest.json").unlink(missing_ok=True)
    uid = pc.fill_null(samples.table["uid"], bytes(16)).combine_chunks()
    for shard, start, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
        names = read_table(store.signatures(shard.name), ["uid", "index", "key", "bad", "detail"])
        table = _rows(np.arange(start, end), shard.name, names, uid, groups, decisions, scores, generality)
        path = store.manifest_part(shard.name)
        digest = _content_digest(table)
        if not done(path, digest):
            write_table(path, table, digest)
    _write_lookup(store, samples, uid, decisions, own_uids)
    expected = {store.manifest_part(s.name) for s in samples.shards}
    for part in (store.manifest / "parts").rglob("*.parquet"):
        if part not in expected:  # of a shard that is no longer among the inputs
            part.unlink()


def finish(store: Store, samples: Samples, decisions: Decisions, about: dict[str, Any]) -> Manifest:
    """Write `manifest.json`, by which a manifest is finished, and return the manifest.

    `about` is what it tells beside the counts and the digests of all files: configuration, versions, model, thresholds,
    shards, findings.
    """
    counts = dict(zip(ACTIONS, np.bincount(decisions.action, minlength=len(ACTIONS)).tolist(), strict=True))
    content = {
        "schema_version": SCHEMA_VERSION,
        "counts": {"read": len(samples), **counts},
        **about,
        "files": _files(store, samples, about),
    }
    write_sealed(store.manifest / "manifest.json", content)
    return Manifest.load(store.path)


def _files(store: Store, samples: Samples, about: dict[str, Any]) -> dict[str, str]:
    """Return the digests of all files that the result rests on, by their path in the run directory."""
    config = about["config"]
    paths = [store.edges / "hash.parquet", store.captions, store.caption_groups, store.manifest / "lookup.arrow"]
    in_pairs = config["magnitude"]["mode"] == "pair"
    paths += [path for s in samples.shards for path in (store.signatures(s.name), store.manifest_part(s.name))]
    if config["images"]["encoder"] is not None:
        paths.append(store.edges / "embedding.parquet")
    if "semantic" in config["captions"]["tiers"]:
        paths.append(store.edges / "caption.parquet")
    if about["magnitude"] is not None:
        pairs = [store.pair_scores(s.name) for s in samples.shards]
        paths += pairs if in_pairs else [store.scores / "captions.parquet"]
        paths += [store.threshold] if about["threshold"] is not None else []
        wanted = config["magnitude"]["threshold"] if isinstance(config["magnitude"]["threshold"], dict) else {}
        paths += [store.scores / f"{name}.parquet" for name in ("reference", "labelled") if name in wanted]
        if about["magnitude"]["noise_floor"] is not None:
            paths.append(store.scores / "noise_floor.parquet")
    if about["generality"] is not None:
        paths.append(store.generality / "captions.parquet")
    if about["generalised"] is not None:
        paths += [
            store.generalised,
            *([store.scores / "generalised.parquet"] if about["magnitude"] is not None and not in_pairs else []),
            *([store.generality / "generalised.parquet"] if about["generality"] is not None else []),
        ]
    return {p.relative_to(store.path).as_posix(): file_digest(p) for p in paths}


def _rows(
    rows: npt.NDArray[np.int64],
    shard: str,
    names: pa.Table,
    uid: pa.Array,
    groups: Groups,
    decisions: Decisions,
    scores: Scores | None,
    generality: GeneralityScores | None,
) -> pa.Table:
    action, canonical, method = decisions.action[rows], decisions.canonical[rows], groups.method[rows]
    joined = method >= 0
    columns = {
        "uid": names["uid"],
        "shard": [shard] * len(rows),
        "index": names["index"],
        "key": names["key"],
        "action": np.array(ACTIONS)[action].tolist(),
        "loss_weight": decisions.weight[rows],
        "reasons": _reasons(decisions, rows, names["bad"]),
        "detail": _detail(names["detail"], scores, rows),
        "canonical_uid": uid.take(pa.array(canonical, mask=canonical < 0)),
        "match_method": _named(METHODS, method),
        "match_distance": pa.array(groups.distance[rows], mask=~joined),
        "image_group": groups.image_group[rows],
        "caption_group": groups.caption_group[rows],
        "image_count": groups.image_count[rows].astype(np.int32),
        "caption_count": groups.caption_count[rows].astype(np.int32),
        "joint_count": groups.joint_count[rows].astype(np.int32),
        "duplication": np.array(DUPLICATION)[decisions.duplication[rows]].tolist(),
        "magnitude": _floats(scores.samples if scores else None, rows),
        "magnitude_eps": _floats(scores.samples_eps if scores else None, rows),
        "captions": decisions.pooled.slice(rows[0] if len(rows) else 0, len(rows)),
        "caption_match": _named(CAPTION_METHODS, groups.caption_method[rows]),
        "caption_distance": pa.array(groups.caption_distance[rows], mask=groups.caption_method[rows] < 0),
        "caption_images": groups.caption_images[rows].astype(np.int32),
        "image_captions": groups.image_captions[rows].astype(np.int32),
        "mitigate": decisions.mitigate[rows],
        **{
            # a bad sample's caption is -1
            name: _floats(np.append(generality.values[:, i], np.nan) if generality else None, groups.caption[rows])
            for i, name in enumerate(GENERALITY.names)
        },
    }
    return pa.table(columns, schema=MANIFEST)


def _named(names: tuple[str, ...], method: npt.NDArray[np.int8]) -> pa.Array:
    return pa.array(np.array([*names, ""])[method].tolist(), mask=method < 0)


def _floats(values: npt.NDArray[Any] | None, rows: Ints) -> pa.Array:
    if values is None:
        return pa.nulls(len(rows), pa.float32())
    found = values[rows].astype(np.float32)
    return pa.array(found, mask=np.isnan(found))


def _detail(detail: pa.ChunkedArray, scores: Scores | None, rows: Ints) -> pa.ChunkedArray:
    if scores is None or scores.unscored is None or not len(rows):
        return detail
    return pc.coalesce(detail.combine_chunks(), scores.unscored.slice(int(rows[0]), len(rows)).combine_chunks())


def _reasons(decisions: Decisions, rows: npt.NDArray[np.int64], bad: pa.ChunkedArray) -> pa.Array:
    flags = np.stack([found[rows] for found in decisions.reasons], axis=1)
    codes = bad.cast(pa.string()).combine_chunks()
    values: list[str] = []
    lengths = np.zeros(len(rows), np.int32)
    reasons = np.array(decisions.codes)
    for i in np.flatnonzero(flags.any(1) | codes.is_valid().to_numpy(zero_copy_only=False)):
        own = [codes[i].as_py()] if codes[i].is_valid else reasons[flags[i]].tolist()
        values += own
        lengths[i] = len(own)
    return pa.ListArray.from_arrays(np.r_[0, np.cumsum(lengths)].astype(np.int32), pa.array(values, pa.string()))


def _content_digest(table: pa.Table) -> str:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.blake2b(stream.getvalue(), digest_size=16).hexdigest()


def _write_lookup(store: Store, samples: Samples, uid: pa.Array, decisions: Decisions, own_uids: bool) -> None:
    """Write where each sample's row is and its weight, sorted by sample, to be memory-mapped."""
    shard = np.repeat(np.arange(len(samples.shards)), np.diff(samples.first))
    places = uid
    if own_uids:  # a loader knows a sample by shard and key alone
        keys = pa.concat_tables([read_table(store.signatures(s.name), ["key"]) for s in samples.shards])["key"]
        names = [samples.shards[i].name for i in shard]
        ids = [sample_uid(n, k.encode()) for n, k in zip(names, keys.to_pylist(), strict=True)]
        places = pa.array(ids, pa.binary(16))
    halves = np.frombuffer(places.buffers()[1], ">u8", 2 * len(places), places.offset * 16).astype(np.uint64)
    high, low = halves[::2], halves[1::2]
    order = np.lexsort((low, high))
    columns = {
        "high": high[order],
        "low": low[order],
        "weight": decisions.weight[order],
        "pool_weight": decisions.pool_weight[order],
        "mitigate": decisions.mitigate[order].astype(np.uint8),
        "shard": shard[order].astype(np.int32),
        "row": (np.arange(len(samples)) - samples.first[shard])[order].astype(np.int32),
    }
    table = pa.table(columns)
    with replacing(store.manifest / "lookup.arrow") as path, pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0] if len(table) else pa.record_batch(columns))


# -- reading ----------------------------------------------------------------------------------------------------------


class Manifest:
    """An opened manifest.  Cheap to open and to send to other processes: tables are read when they are asked for."""

    def __init__(self, path: Path, info: dict[str, Any], root: str | None) -> None:
        self.path, self.info, self.root = path, info, root

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Open the manifest of a finished run; raises RunError when there is none or it is of another version."""
        store = Store(path)
        file = store.manifest / "manifest.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{path}: holds no manifest; finish the run with 'memfilter run ... --out {path}'") from None
        except (OSError, ValueError) as e:
            raise RunError(f"{file}: cannot be read: {e}; run the same command again") from e
        if not isinstance(info, dict) or info.get("schema_version") != SCHEMA_VERSION:
            raise RunError(f"{file}: not of schema version {SCHEMA_VERSION}; run again with this version of memfilter")
        if missing := {"config", "counts", "digest", "files", "shards"} - info.keys():
            raise RunError(f"{file}: damaged, it has no {min(missing)}; run the same command again")
        # a manifest that was copied away without its run is found by the shards' names alone
        run = (store.read_run() or {}) if store.run_file.exists() else {}
        return cls(store.path, info, run.get("root"))

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.path, self.info, self.root)

    @property
    def counts(self) -> dict[str, int]:
        """The reconciled counts: read = keep + mask + drop + bad."""
        counts: dict[str, int] = self.info["counts"]
        return counts

    @cached_property
    def shards(self) -> list[str]:
        """The names of the shards that were read, relative to the input root."""
        return [s["name"] for s in self.info["shards"] if not s.get("skipped")]

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """Return the rows of all shards, sorted by (shard, index)."""
        store = Store(self.path)
        parts = [read_table(store.manifest_part(name), columns) for name in self.shards]
        schema = pa.schema([MANIFEST.field(c) for c in columns]) if columns else MANIFEST
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def weight(self, shard: str, key: str | bytes) -> float:
        """Return the loss weight of the sample with this key in the shard of this name; raises KeyError."""
        return float(self._lookup["weight"][self._find(shard, key)])

    def pool_weight(self, shard: str, key: str | bytes) -> float:
        """Return the loss weight of a sample where samples train on their pooled captions; raises KeyError.

        It differs from `weight` where the sample, or one of its groups, is masked for its caption's magnitude alone.
        """
        return float(self._lookup["pool_weight"][self._find(shard, key)])

    def mitigate(self, shard: str, key: str | bytes) -> bool:
        """Tell whether the sample's caption is handed over to mitigation in training; raises KeyError."""
        return bool(self._lookup["mitigate"][self._find(shard, key)])

    def row(self, shard: str, key: str | bytes) -> dict[str, Any]:
        """Return the manifest's row of a sample as a dictionary; raises KeyError."""
        place = self._find(shard, key)
        part = self._part(int(self._lookup["shard"][place]))
        found: dict[str, Any] = part.slice(int(self._lookup["row"][place]), 1).to_pylist()[0]
        return found

    def attach(
        self,
        missing: Literal["error", "keep"] = "error",
        captions: Literal["own", "pool"] = "own",
        pipes: Mapping[str, str] | None = None,
    ) -> Attach:
        """Return a webdataset stage that sets `sample["loss_weight"]`, a Python float.

        A sample that the manifest does not know raises KeyError, or passes with weight 1 under `missing="keep"`.
        With `captions="pool"`, samples with pooled captions get them as `sample["captions"]`, and one that is masked
        for its own caption's magnitude alone trains on them.  Where a policy hands samples over to caption mitigation,
        `sample["mitigate"]` tells whether this is one.  `pipes` maps `pipe:` URLs to shard names.
        """
        if missing not in ("error", "keep") or captions not in ("own", "pool"):
            raise ConfigError(f"attach(missing={missing!r}, captions={captions!r}): error or keep, own or pool")
        return Attach(self, missing, captions, dict(pipes or {}))

    def shard_of(self, url: str) -> str:
        """Return the name of the shard at a URL; raises KeyError.

        It is looked for below the input root, below the filtered shards, and by its longest path suffix that names
        exactly one shard.
        """
        path = url.split("?")[0].split("#")[0].removeprefix("file://").removeprefix("file:")
        known = self._names
        for root in (self.root, os.path.abspath(self.path / "shards")):
            full = path if "://" in path else os.path.abspath(path)
            if root and full.startswith(root.rstrip("/") + "/"):
                name = full[len(root.rstrip("/")) + 1 :]
                if name in known:
                    return name
        parts = path.split("/")
        for i in range(len(parts)):
            suffix = "/".join(parts[i:])
            found = [n for n in known if n == suffix or n.endswith("/" + suffix)]
            if len(found) == 1:
                return found[0]
        raise KeyError(f"{url}: none of the manifest's {len(known)} shards, or more than one, has this name")

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.shards)

    @cached_property
    def _lookup(self) -> dict[str, npt.NDArray[Any]]:
        source = pa.memory_map(str(self.path / "manifest" / "lookup.arrow"))
        batch = pa.ipc.open_file(source).get_batch(0)
        return {name: batch.column(name).to_numpy() for name in batch.schema.names}

    def _find(self, shard: str, key: str | bytes) -> int:
        raw = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
        if self.info["config"]["input"]["uid_field"] is not None:
            raw = raw.decode("utf-8", "backslashreplace").encode()
        uid = sample_uid(shard, raw)
        high, low = int.from_bytes(uid[:8], "big"), int.from_bytes(uid[8:], "big")
        column = self._lookup["high"]
        place = int(np.searchsorted(column, np.uint64(high)))
        while place < len(column) and column[place] == high:
            if self._lookup["low"][place] == low:
                return place
            place += 1
        raise KeyError(f"{shard}: the manifest has no sample {key!r}")

    def _part(self, shard: int) -> pa.Table:
        if shard not in self._parts:
            self._parts.clear()  # loaders go shard by shard
            name = self.info["shards"][shard]["name"]
            self._parts[shard] = read_table(Store(self.path).manifest_part(name))
        return self._parts[shard]

    @cached_property
    def _parts(self) -> dict[int, pa.Table]:
        return {}


class Attach:
    """The stage of `Manifest.attach`: a picklable callable from samples to samples."""

    def __init__(self, manifest: Manifest, missing: str, captions: str, pipes: dict[str, str]) -> None:
        self.manifest, self.missing, self.captions, self.pipes = manifest, missing, captions, pipes
        self.unknown = 0  # samples that passed with weight 1 because the manifest does not know them
        self.mitigates = "mitigate" in manifest.info["config"]["policy"].values()
        self._shard_of: dict[str, str] = {}

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield every sample with its weight set."""
        for sample in samples:
            if "__key__" in sample:  # webdataset marks the end of a shard by an empty sample
                self._attach(sample)
            yield sample

    def _attach(self, sample: dict[str, Any]) -> None:
        if "__url__" not in sample:
            raise ConfigError("a sample has no __url__; put attach() right after the shards are read, before any map")
        try:
            shard, key = self._name(sample["__url__"]), sample["__key__"]
            sample["loss_weight"] = self.manifest.weight(shard, key)
            if self.mitigates:
                sample["mitigate"] = self.manifest.mitigate(shard, key)
            if self.captions == "pool":
                self._pool(sample, shard, key)
        except KeyError as e:
            if self.missing == "error":
                raise KeyError(f"{e.args[0]}; give the manifest of these shards, or attach(missing='keep')") from None
            self.unknown += 1
            sample["loss_weight"] = 1.0

    def _pool(self, sample: dict[str, Any], shard: str, key: str) -> None:
        pooled = self.manifest.row(shard, key)["captions"]
        if pooled is not None:
            sample["captions"] = pooled
        if pooled or sample["loss_weight"]:
            sample["loss_weight"] = self.manifest.pool_weight(shard, key)

    def _name(self, url: str) -> str:
        if url not in self._shard_of:
            if url.startswith("pipe:"):
                if url not in self.pipes:
                    raise KeyError(f"{url}: tell its shard with attach(pipes={{url: name}})")
                self._shard_of[url] = self.pipes[url]
            else:
                self._shard_of[url] = self.manifest.shard_of(url)
        return self._shard_of[url]
