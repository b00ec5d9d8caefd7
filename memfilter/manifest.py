"""The manifest: one row per sample with what was decided and why; written, read and looked up here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import ConfigError, InputError, RunError, in_one_line, shown, without_secrets
from .lookup import Lookup, write_lookup
from .records import (
    ACTIONS,
    CAPTION_METHODS,
    DUPLICATION,
    GENERALITY,
    MANIFEST,
    METHODS,
    SIGNALS,
    Decisions,
    Floats,
    GeneralityScores,
    Groups,
    Ints,
    Samples,
    Scores,
    Shard,
)
from .shards import SCHEME, leads_out
from .source import printable_key, sample_uid
from .store import Store, done, file_digest, read_bytes, read_sealed, read_table, write_sealed, write_table

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .loader import Attach, Collate, Weigh

SCHEMA_VERSION = 2
_SECONDS = 0.1  # between two checks of an open manifest: in random order nearly every look-up is in another shard

Roots = Sequence[str | Path]
"""Folders and URLs below which a data set's shards lie, as the caller says."""


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
    """Write the parts and the look-up file; parts that would not change are left as they are."""
    uid = pc.fill_null(samples.table["uid"], bytes(16)).combine_chunks()
    for shard, start, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
        names = read_table(store.signatures(shard.name), ["uid", "index", "key", "bad", "detail"])
        table = _rows(np.arange(start, end), shard.name, names, uid, groups, decisions, scores, generality)
        digest = _content_digest(table)
        path = store.place(store.manifest_part(shard.name), digest)
        if not done(path, digest):
            write_table(path, table, digest)
    _write_lookup(store, samples, uid, decisions, own_uids)


def decided(store: Store, shards: Sequence[Shard], columns: list[str]) -> pa.Table:
    """Return columns of the rows that `write_parts` left, sorted by (shard, index)."""
    schema = pa.schema([MANIFEST.field(c) for c in columns])
    parts = [read_table(store.at(store.manifest_part(s.name)), columns) for s in shards]
    return pa.concat_tables([schema.empty_table(), *parts])


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
    paths = [
        store.edges / "hash.parquet",
        store.edges / "scores.parquet",
        store.captions,
        store.caption_groups,
        store.manifest / "lookup.arrow",
    ]
    in_pairs = config["magnitude"]["mode"] == "pair"
    paths += [path for s in samples.shards for path in (store.signatures(s.name), store.manifest_part(s.name))]
    if config["images"]["encoder"] is not None:
        paths += [store.edges / "embedding.parquet", store.edges / "hubs.parquet"]
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
    return {store.name(p): file_digest(p) for p in map(store.at, paths)}


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
        **{name: _floats(scores.signals.get(name) if scores else None, rows) for name in SIGNALS},
        "match_score": _floats(groups.score, rows),
        "match_threshold": pa.array(np.full(len(rows), groups.threshold, np.float32), mask=~joined),
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
    columns: dict[str, npt.NDArray[Any]] = {
        "weight": decisions.weight,
        "pool_weight": decisions.pool_weight,
        "mitigate": decisions.mitigate.astype(np.uint8),
        "shard": shard.astype(np.int32),
        "row": (np.arange(len(samples)) - samples.first[shard]).astype(np.int32),
    }
    write_lookup(store.manifest / "lookup.arrow", places, columns)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_info(path: str | Path) -> dict[str, Any] | None:
    """Return what a run's `manifest.json` tells, None where there is none that is as it was written.

    While a decision is taking the run's place it is the one before it.
    """
    return read_sealed(Store(path).manifest / "manifest.json")


class Manifest:
    """An opened manifest.  Cheap to open and to send to other processes: tables are read when they are asked for."""

    def __init__(self, path: Path, info: dict[str, Any], root: str | None, online: Ints | None = None) -> None:
        self.path, self.info, self.root = path, info, root
        self._online = online  # places in the look-up file that training masked, sorted
        self._checked: str | None = None  # the shard at which the run was checked last
        self._due = 0.0  # when look-ups may check it again, by the monotonic clock
        self._seen: tuple[int, ...] = ()  # what the file system tells of manifest.json
        self._told = False  # whether a shard at another place was taken for the run's

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Open the manifest of a finished run; raises RunError when there is none or it is of another version.

        Its path is absolute from now on: what is read later is found wherever the process goes.
        """
        store = Store(path)
        file = store.manifest / "manifest.json"
        try:
            info = json.loads(read_bytes(file))
        except FileNotFoundError:
            raise RunError(f"{path}: holds no manifest; finish the run with 'memfilter run ... --out {path}'") from None
        except (OSError, ValueError) as e:
            raise RunError(f"{file}: cannot be read: {e}; run the same command again") from e
        if not isinstance(info, dict) or info.get("schema_version") != SCHEMA_VERSION:
            raise RunError(f"{file}: not of schema version {SCHEMA_VERSION}; run again with this version of memfilter")
        if missing := {"config", "counts", "digest", "files", "shards"} - info.keys():
            raise RunError(f"{file}: damaged, it has no {min(missing)}; run the same command again")
        try:
            outside = [n for n in (*(s["name"] for s in info["shards"]), *info["files"]) if leads_out(n)]
        except (KeyError, TypeError) as e:
            raise RunError(f"{file}: damaged ({in_one_line(e)}); run the same command again") from e
        if outside:
            raise RunError(f"{file}: names {min(outside)!r}, which lies outside of the run; it was not written by one")
        if (journal := store.read_journal()) is not None:
            raise RunError(f"{path}: {_under_way(journal.command, path)}")
        # a manifest that was copied away without its run is found by the shards' names alone
        run = (store.read_run() or {}) if store.run_file.exists() else {}
        root = run.get("root")
        return cls(Path(os.path.abspath(path)), info, without_secrets(root) if isinstance(root, str) else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.path, self.info, self.root, self._online)

    def check(self) -> None:
        """Raise RunError where the run was decided again since this manifest was opened, or is being decided again.

        Look-ups ask once a shard, and at most ten times a second.
        """
        store = Store(self.path)
        file = store.manifest / "manifest.json"
        if store.journal.exists():
            raise RunError(f"{self.path}: {_under_way('run', self.path)}")
        try:
            stat = os.stat(file)
            seen = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
            is_same = seen == self._seen or self.info["digest"].encode() in read_bytes(file)
        except OSError as e:
            raise RunError(f"{file}: cannot be read any more: {e.strerror}; open the manifest where it is now") from e
        if not is_same:
            raise RunError(f"{self.path}: was decided again since its manifest was opened; open it again")
        self._seen = seen

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
        schema = pa.schema([MANIFEST.field(c) for c in columns]) if columns else MANIFEST
        return pa.concat_tables([schema.empty_table(), *(part for _, part in self.parts(columns))])

    def parts(self, columns: list[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Yield each shard's name and rows, sorted by index."""
        for name in self.shards:
            part = read_table(Store(self.path).manifest_part(name), columns)
            self.check()
            yield name, part

    def weight(self, shard: str, key: str | bytes) -> float:
        """Return the loss weight of the sample with this key in the shard of this name; raises KeyError."""
        return self.lookup.weight(self._find(shard, key))

    def weights(self, shards: Sequence[str], keys: Sequence[str | bytes], roots: Roots = ()) -> Floats:
        """Return the loss weights (N,) of samples by their shards, names or URLs, and keys; raises KeyError.

        `roots` are those of `shard_of`.
        """
        roots = known_roots(roots)
        names = {shard: self.name_of(shard, roots) for shard in dict.fromkeys(shards)}
        return self.lookup.weights(self._find_all([names[shard] for shard in shards], keys))

    def pool_weight(self, shard: str, key: str | bytes) -> float:
        """Return the loss weight of a sample where samples train on their pooled captions; raises KeyError.

        It differs from `weight` where the sample, or one of its groups, is masked for its caption's magnitude alone and
        has a safe caption in its pool.
        """
        return self.lookup.weight(self._find(shard, key), pooled=True)

    def with_online(
        self,
        *paths: str | Path,
        share: float = 0.5,
        pipes: Mapping[str, str] | None = None,
        roots: Roots = (),
    ) -> Manifest:
        """Return this manifest with weight 0 for what training masked in at least `share` of the times it was seen.

        `paths` are files of `memfilter.training.Sightings`, of all processes and sessions, and are added up.  The
        weights change, also those of pooled captions, and so does what `attach` gives; the run's rows stay as they are.
        `pipes` and `roots` are those of `attach`.  Raises InputError for a file that is none, ConfigError for a share
        out of range, and KeyError for a sample that the manifest does not know.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"with_online(share={share}): above 0 and at most 1")
        known, roots = self.known_pipes(pipes), known_roots(roots)
        rows = pa.concat_tables([_SIGHTINGS.empty_table(), *(_read_sightings(Path(path)) for path in paths)])
        shards = rows["shard"].unique()
        names = pa.array([known.get(name) or self.name_of(name, roots) for name in shards.to_pylist()], pa.string())
        rows = rows.set_column(0, "shard", names.take(pc.index_in(rows["shard"], shards).combine_chunks()))
        counts = rows.group_by(["shard", "key"]).aggregate([("seen", "sum"), ("masked", "sum")])
        often = counts.filter(pc.greater_equal(counts["masked_sum"], pc.multiply(counts["seen_sum"], share)))
        places = self._find_all(often["shard"].to_pylist(), often["key"].to_pylist())
        earlier = places[:0] if self._online is None else self._online
        return Manifest(self.path, self.info, self.root, np.union1d(earlier, places))

    def mitigate(self, shard: str, key: str | bytes) -> bool:
        """Tell whether the sample's caption is handed over to mitigation in training; raises KeyError."""
        return self.lookup.mitigate(self._find(shard, key))

    def row(self, shard: str, key: str | bytes) -> dict[str, Any]:
        """Return the manifest's row of a sample as a dictionary; raises KeyError."""
        place = self._find(shard, key)
        part = self._part(int(self.lookup.columns["shard"][place]))
        found: dict[str, Any] = part.slice(int(self.lookup.columns["row"][place]), 1).to_pylist()[0]
        return found

    def attach(
        self,
        missing: Literal["error", "keep"] = "error",
        captions: Literal["own", "pool"] = "own",
        pipes: Mapping[str, str] | None = None,
        roots: Roots = (),
    ) -> Attach:
        """Return a webdataset stage that yields samples with their `loss_weight`, a Python float.

        A weight that a sample carries already, as from `OnlineFilter`, is multiplied by the manifest's: what either
        masks stays masked.  One that is not a finite number of 0 or more raises ConfigError.

        A sample that the manifest does not know raises KeyError, or passes with weight 1 under `missing="keep"`:
        `unknown` of the stage counts those of this process, and a warning tells the first, tenth, hundredth and so on.
        With `captions="pool"`, samples with pooled captions get them as `sample["captions"]`, and one that is masked
        for its own caption's magnitude alone trains on them: the first stands in place of its caption, in the member
        that `input.caption` names (of a json, in its field).  Without any its weight stays 0.  Where a policy hands
        samples over to caption mitigation, `sample["mitigate"]` tells whether this is one.  `pipes` maps URLs that tell
        no shard, as those of `pipe:`, to shard names; a name that is none of the manifest's raises ConfigError.
        `roots` are folders and URLs below which this data set's shards lie too, as `shard_of` says.
        """
        from .loader import Attach

        return Attach(self, missing, captions, pipes, roots)

    def weigh(
        self,
        missing: Literal["error", "keep"] = "error",
        pipes: Mapping[str, str] | None = None,
        roots: Roots = (),
    ) -> Weigh:
        """Return a function that gives rows a column `loss_weight`: `dataset.map(manifest.weigh(), batched=True)`.

        It is for Hugging Face `datasets`, batched or not, and whatever else maps rows that tell their shard by
        `__url__` (or `shard`) and their `__key__` (or `key`); float32.  Where a policy hands samples over to caption
        mitigation there is a column `mitigate` too.  `missing`, `pipes` and `roots` are those of `attach`.
        """
        from .loader import Weigh

        return Weigh(self, missing, pipes, roots)

    def collate(
        self,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        missing: Literal["error", "keep"] = "error",
        pipes: Mapping[str, str] | None = None,
        roots: Roots = (),
    ) -> Collate:
        """Return a function that makes a batch as `collate_fn` does, with its `loss_weight`, a float32 tensor (B,).

        Either all samples of a batch carry their `loss_weight`, or they are looked up as by `weigh`, all at once;
        raises ConfigError where only some carry one.  `collate_fn`, by default torch's own, gets them without the
        weight and without the names of shard and key: a batch with texts in it fails in accelerate with more than one
        process.  `missing`, `pipes` and `roots` are those of `attach`.
        """
        from .loader import Collate

        return Collate(self, collate_fn, missing, pipes, roots)

    def shard_of(self, url: str, roots: Roots = ()) -> str:
        """Return the name of the shard at a URL; raises KeyError.

        It is its path below the input root, the filtered shards or one of `roots`, folders and URLs below which the
        caller knows this data set's shards.  A local file elsewhere is the shard whose whole name its path ends with,
        the longest, if it has the size of that or of the filtered one; a warning names both places, once.  A `pipe:`
        URL, which may run any command, names none.
        """
        if url.startswith("pipe:"):
            raise KeyError(f"{shown(url)}: tell its shard with pipes={{url: name}}")
        path = _absolute(url)
        for root in filter(None, (self.root, str(self.path / "shards"), *known_roots(roots))):
            name = path.removeprefix(root.rstrip("/") + "/")
            if name != path and name in self._names:
                return name
        parts = path.split("/")
        named = (s for i in range(len(parts)) if (s := "/".join(parts[i:])) in self._names)
        if (name := next(named, "")) not in self._names:
            raise KeyError(f"{shown(url)}: none of the manifest's {len(self._names)} shards has this name")
        place = f"{self.root}/{name}" if self.root else name
        if "://" in path or not self._has_size(name, path):
            why = "at another place" if "://" in path else "not there, or not of its size"
            why += f", so not taken for {shown(place)}"
            raise KeyError(f"{shown(path)}: {why}; if it is that, give roots=[where its shards lie]")
        if not self._told:
            self._told = True
            _log.warning("%s: taken for %s, by its name and size", shown(path), shown(place))
        return name

    def known_pipes(self, pipes: Mapping[str, str] | None) -> dict[str, str]:
        """Return a mapping of URLs to shard names; raises ConfigError where a name is none of the manifest's."""
        for url, name in (pipes or {}).items():
            if name not in self._names:
                raise ConfigError(f"pipes: {shown(url)} is to be {name!r}, which is none of the manifest's shards")
        return dict(pipes or {})

    def is_other(self, shard: str, path: str) -> bool:
        """Tell whether a file has another size than the input shard of this name and the filtered one.

        Names such as 00000.tar recur in every data set.  False where either size is not known.
        """
        own = self.path / "shards" / shard
        with contextlib.suppress(OSError):
            expected = {self._sizes[shard], *([own.stat().st_size] if self.info["config"]["output"]["shards"] else [])}
            return None not in expected and os.stat(path).st_size not in expected
        return False

    def _has_size(self, shard: str, path: str) -> bool:
        """Whether a local file has the size of the input shard of this name or of the filtered one."""
        expected = {self._sizes[shard]}
        with contextlib.suppress(OSError):
            expected |= {(self.path / "shards" / shard).stat().st_size}
        try:
            return os.stat(path).st_size in expected
        except (OSError, ValueError):  # the latter of a path with a zero byte
            return False

    def name_of(self, shard: str, roots: Roots = ()) -> str:
        """Return the shard of this name, or else the name of the one at this URL; raises KeyError."""
        return shard if shard in self._names else self.shard_of(shard, roots)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.shards)

    @cached_property
    def _sizes(self) -> dict[str, int | None]:
        return {s["name"]: s["bytes"] for s in self.info["shards"]}

    @cached_property
    def lookup(self) -> Lookup:
        """The look-up file, opened; raises RunError where it is missing or damaged, or of a later decision."""
        lookup = Lookup(self.path / "manifest" / "lookup.arrow", self._online)
        self.check()  # once it is open: what is opened earlier than a decision stays as it was
        return lookup

    def place(self, shard: str, key: str | bytes) -> int:
        """Return the place in the look-up file of the sample with this key in the shard of this name, -1 for none.

        Raises RunError where the run was decided again.
        """
        if shard != self._checked:
            self._check_at(shard)
        return self.lookup.place(self._uid(shard, key))

    def places(self, shards: Sequence[str], keys: Sequence[str | bytes]) -> Ints:
        """Return the places (N,) in the look-up file of samples by the names of their shards and their keys.

        Raises RunError where the run was decided again.
        """
        if len(shards) and (shards[0] != self._checked or shards[-1] != self._checked):
            self._check_at(shards[-1])
        return self.lookup.places(b"".join(self._uid(s, k) for s, k in zip(shards, keys, strict=True)))

    def _check_at(self, shard: str) -> None:
        """Check the run, or leave it to a later look-up in this shard if the last check was just now."""
        if (now := time.monotonic()) >= self._due:
            self.check()
            self._checked, self._due = shard, now + _SECONDS

    def _find(self, shard: str, key: str | bytes) -> int:
        place = self.place(shard, key)
        if place < 0:
            raise KeyError(f"{shard}: the manifest has no sample {key!r}")
        return place

    def _find_all(self, shards: Sequence[str], keys: Sequence[str | bytes]) -> Ints:
        places = self.places(shards, keys)
        if (places < 0).any():
            unknown = int(np.argmin(places))
            raise KeyError(f"{shards[unknown]}: the manifest has no sample {keys[unknown]!r}")
        return places

    def _uid(self, shard: str, key: str | bytes) -> bytes:
        raw = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
        # with uids of their own, samples are looked up by their keys as they stand in the table
        return sample_uid(shard, printable_key(raw).encode() if self._own_uids else raw)

    @cached_property
    def _own_uids(self) -> bool:
        return self.info["config"]["input"]["uid_field"] is not None

    def _part(self, shard: int) -> pa.Table:
        if shard not in self._parts:
            self._parts.clear()  # loaders go shard by shard
            name = self.info["shards"][shard]["name"]
            part = read_table(Store(self.path).manifest_part(name))
            self.check()
            self._parts[shard] = part
        return self._parts[shard]

    @cached_property
    def _parts(self) -> dict[int, pa.Table]:
        return {}


def known_roots(roots: Roots) -> tuple[str, ...]:
    """Folders and URLs below which a data set's shards lie; folders as absolute paths.

    Raises ConfigError for one in place of several.
    """
    if isinstance(roots, str | os.PathLike):
        raise ConfigError(f"roots={str(roots)!r}: give a list of folders and URLs, [{str(roots)!r}]")
    return tuple(_absolute(root) for root in roots)


def _absolute(url: str | Path) -> str:
    """Return a URL without query and fragment, and of a file its absolute path."""
    path = path_of(str(url))
    return path if "://" in path else os.path.abspath(path)


def _under_way(command: str, path: str | Path) -> str:
    how = f"'memfilter {command} {path}'" if command != "run" else "the same command"
    return f"is being decided again, or a call that did so was killed; wait for it, or finish it with {how}"


_QUERY = re.compile(r"\?[^\s'\"|]*")  # in a command


def path_of(url: str) -> str:
    """Return a URL without userinfo, query and fragment, which change as it is signed anew; a command without queries.

    Of a file it is the path, in which `?` and `#` are letters.
    """
    if url.startswith("pipe:"):
        return _QUERY.sub("", url)
    local = url.removeprefix("file://").removeprefix("file:")
    return without_secrets(url.split("?")[0].split("#")[0]) if SCHEME.match(local) else local


_SIGHTINGS = pa.schema([("shard", pa.string()), ("key", pa.string()), ("seen", pa.int64()), ("masked", pa.int64())])


def _read_sightings(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, columns=_SIGHTINGS.names).cast(_SIGHTINGS)
    except (OSError, ValueError, pa.ArrowException) as e:
        raise InputError(f"{path}: not a file that Sightings.save() wrote: {in_one_line(e)}") from e
