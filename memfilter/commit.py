"""A decision that was made beside a run's own files takes their place, or is refused before anything is touched.

Filtered shards are replaced one by one and tables by renaming them; from the first to the last of these a journal says
so.  Every step can be done again: a call that was killed is finished by deciding the same again.
"""

from __future__ import annotations

import errno
import filecmp
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from . import executors, sink
from .config import Config
from .errors import InputError, RunError, ShardError, printable
from .manifest import read_info
from .records import MASK, Decisions, Ints, Samples, Shard
from .shards import NOT_NAMED, shard_stem, told_of
from .source import content_digest
from .store import Journal, Store, file_digest, read_digest, read_note, read_table, write_sealed

log = logging.getLogger(__name__)

_NAMED = 10  # shards in one message
_ASKED_AT_ONCE = 16


@dataclass
class Plan:
    """What becomes of the filtered shards."""

    write: list[tuple[Any, ...]] = field(default_factory=list)  # arguments of `sink.write_shard`
    growth: list[tuple[int, int]] = field(default_factory=list)  # bytes of each before and after, estimated
    kept: set[str] = field(default_factory=set)  # the digests of filtered shards that a killed call may leave
    remove: list[str] = field(default_factory=list)  # no longer meant
    left: list[str] = field(default_factory=list)  # no longer meant, and not to be had again
    counts: dict[str, int] = field(default_factory=dict)  # samples by shard


def names_of(shards: Iterable[str]) -> str:
    """Return the names of shards for a message."""
    some = sorted(shards)
    more = f" and {len(some) - _NAMED:,} more" if len(some) > _NAMED else ""
    return printable(", ".join(some[:_NAMED]) + more)


# -- before anything is touched ---------------------------------------------------------------------------------------


class Planner:
    """Finds what a decision changes among the filtered shards, and whether all of it can be done.

    `earlier` are the shards of the run's decision and of one that was killed.  Inputs that were listed just now are
    `fresh`; others are looked at before they are relied on.
    """

    def __init__(self, work: Store, earlier: dict[str, Shard], config: Config, fresh: bool) -> None:
        assert work.base
        self.work, self.run, self.earlier, self.config, self.fresh = work, work.base, earlier, config, fresh
        self.journal = self.run.read_journal()
        self.plan = Plan(kept=set(self.journal.kept) if self.journal else set())
        self.needed: list[Shard] = []  # inputs that samples are to be read from
        self.standing: list[Shard] = []  # those that the filtered shards stand for, where these are sound
        self.foreign: list[str] = []
        self.stems: dict[str, list[str]] = {}
        for name in earlier:
            self.stems.setdefault(shard_stem(name), []).append(name)
        told = (read_info(self.run.path) or {}).get("shards", [])
        self.filtered = {shard["name"]: shard["filtered"] for shard in told if "filtered" in shard}

    def make(self, samples: Samples, decisions: Decisions, workers: int) -> Plan:
        """Return the plan.

        Raises ShardError for inputs that are needed and are not as they were, RunError for files in the way that the
        run did not write, OSError where the disk has no room.
        """
        shards = samples.shards if self.config.output.shards else []
        for shard, start, end in zip(shards, samples.first, samples.first[1:], strict=False):
            kept = np.flatnonzero(decisions.action[start:end] <= MASK)
            self._add(shard, kept, samples.table["bytes"].slice(start, end - start))
        self._stale({s.name for s in shards}, {s.name: s for s in samples.shards})
        if self.foreign:
            names = names_of(self.foreign)
            raise RunError(
                f"{self.run.shards}: {names}: in the way, and not written by this run (or the _stats.json beside it is "
                "damaged); move it away and run the same command again; nothing was changed"
            )
        self._check_inputs()
        if self.run.is_finished():
            self._check_room(workers)
        return self.plan

    def _add(self, shard: Shard, kept: Ints, sizes: pa.ChunkedArray) -> None:
        folder, name = self.run.shards, shard.name
        signature = self.work.signatures(name)
        kept_as = sink.kept_digest(shard, read_digest(signature), kept)
        told, tar = sink.read_marker(folder, name), folder / name
        if len(kept):
            self.plan.counts[name] = len(kept)
        is_there = tar.exists() or sink.marker(folder, name).exists()
        if (sink.is_whole(shard, folder, told, kept_as) and len(kept)) or not (len(kept) or is_there):
            return
        same_stem = {name, *self.stems.get(shard_stem(name), ())}
        is_own = told is not None and (told["kept"] == kept_as or any(self._is_own(n, told) for n in same_stem))
        if is_there and not is_own:
            self.foreign.append(name)
        held = self._held(shard, kept, told)
        if len(kept) and not self.fresh:
            (self.needed if held is None else self.standing).append(shard)
        now = tar.stat().st_size if tar.exists() else 0
        self.plan.growth.append((now, _estimate(kept, held, sizes, now, read_note(signature).get("bytes", 0))))
        self.plan.kept |= {kept_as, *([told["kept"]] if told else [])}
        self.plan.write.append((shard, folder, signature, kept, kept_as, self.config.input.timeout, held))

    def _before(self, name: str) -> tuple[str, Ints] | None:
        """Return the digest of a shard's filtered one and what it holds, as the run's own parts give them."""
        try:
            actions = read_table(self.run.manifest_part(name), ["action"])["action"]
            kept = np.flatnonzero(pc.is_in(actions, pa.array(["keep", "mask"])).to_numpy())
            return sink.kept_digest(Shard(name, "", None), read_digest(self.run.signatures(name)), kept), kept
        except RunError:
            return None

    def _is_own(self, name: str, told: dict[str, Any]) -> bool:
        """Tell whether a marker is this run's: its digest is one that its manifest, journal or parts give.

        Manifests of earlier versions do not, so that their parts are asked.
        """
        if told["kept"] in self.plan.kept or told["kept"] == self.filtered.get(name):
            return True
        before = self._before(name) if name not in self.filtered else None
        return before is not None and before[0] == told["kept"]

    def _held(self, shard: Shard, kept: Ints, told: dict[str, Any] | None) -> Ints | None:
        """Return what the filtered shard that stands holds, where it is of the same input and holds all to keep."""
        before = self._before(shard.name)
        if before is None or not sink.is_whole(shard, self.run.shards, told, before[0]):
            return None
        notes = [read_note(store.signatures(shard.name)) for store in (self.run, self.work)]
        if notes[0].get("digest") != notes[1].get("digest") or not np.isin(kept, before[1]).all():
            return None
        return before[1]

    def _stale(self, wanted: set[str], listed: dict[str, Shard]) -> None:
        """Find the filtered shards that are no longer meant; those whose input is gone stay."""
        asked: list[Shard] = []
        for name, shard in sorted({**self.earlier, **listed}.items()):
            if name in wanted:
                continue
            is_there, told = (self.run.shards / name).exists(), sink.read_marker(self.run.shards, name)
            if told is not None and self._is_own(name, told):
                self.plan.remove.append(name)
                self.plan.kept.add(told["kept"])
                if is_there and not (self.fresh and name in listed):  # a killed call may have left the marker alone
                    asked.append(shard)
        self.plan.left = sorted(self._faults(asked))
        self.plan.remove = [name for name in self.plan.remove if name not in self.plan.left]

    def _faults(self, shards: list[Shard]) -> dict[str, str]:
        """Return why inputs cannot be relied on, by name; those that are as they were read are left out."""
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            faults = zip((s.name for s in shards), pool.map(self._fault, shards), strict=True)
            return {name: fault for name, fault in faults if fault is not None}

    def _fault(self, shard: Shard) -> str | None:
        if not shard.may_read:
            return NOT_NAMED
        if shard.url.startswith("pipe:"):
            return None
        try:
            told = told_of(shard.url)
        except InputError as e:
            return str(e)
        if None not in (told.size, shard.size) and told.size != shard.size:
            return f"has {told.size:,} bytes, not {shard.size:,}"
        if told.version == shard.version:
            return None
        try:
            signature = self.work.signatures(shard.name)
            same = read_note(signature).get("digest") == content_digest(shard, self.config.input.timeout)
        except (RunError, ShardError) as e:
            return str(e)
        return None if same else "has changed"

    def _check_inputs(self) -> None:
        gone = self._faults(self.needed)
        gone |= {name: fault for name, fault in self._faults(self.standing).items() if not self._is_sound(name)}
        if gone:
            first = min(gone)
            raise ShardError(
                f"{names_of(gone)}: cannot be read: {first}: {gone[first]}; the decision needs samples that the "
                "filtered shards do not hold: bring the shard back, say with --inputs where it lies, or set "
                "output.shards: false; nothing was changed"
            )

    def _is_sound(self, name: str) -> bool:
        told = sink.read_marker(self.run.shards, name)
        return told is not None and file_digest(self.run.shards / name) == told.get("digest")

    def _check_room(self, workers: int) -> None:
        """Put those first that shrink; raise OSError where what grows has no room."""
        order = np.argsort([after - now for now, after in self.plan.growth], kind="stable")
        self.plan.write = [self.plan.write[i] for i in order]
        now, after = np.array([self.plan.growth[i] for i in order], np.int64).reshape(-1, 2).T
        finished = np.r_[0, np.cumsum(after - now)]
        begun = np.r_[0, np.cumsum(after)]
        start = np.maximum(np.arange(len(after)) + 1 - workers, 0)  # of those that are written at once with each
        most = int((finished[start] + begun[1:] - begun[start]).max(initial=0))
        folder = self.run.shards if self.run.shards.exists() else self.run.path  # it may be a link to another disk
        free = shutil.disk_usage(folder).free
        if most > free:
            needs = f"the filtered shards need about {most:,} bytes, {free:,} are free; nothing was changed"
            raise OSError(errno.ENOSPC, f"No space left on device: {needs}", str(folder))


def _estimate(kept: Ints, held: Ints | None, sizes: pa.ChunkedArray, now: int, whole: int) -> int:
    """Return about how many bytes a filtered shard will have, by the sizes of its images."""
    images = pc.fill_null(sizes, 0).to_numpy().astype(np.int64)
    images[images == 0] = images[images > 0].mean() if images.any() else 1
    of, size = (images.sum(), whole) if held is None else (images[held].sum(), now)
    return int(size * images[kept].sum() / max(of, 1))


# -- step by step -----------------------------------------------------------------------------------------------------


def commit(
    work: Store,
    plan: Plan,
    info: dict[str, Any],
    earlier: dict[str, Shard],
    command: str,
    workers: int,
    max_memory: int | None,
) -> None:
    """Put a decision in the place of the run's own, with its filtered shards and what `info` lists of files.

    It ends with the run's settings, those that stand in the decision's own `run.json`.
    """
    run, settings = work.base, work.read_run()
    assert run
    assert settings
    del settings["earlier"]
    last = work.name(work.manifest / "manifest.json")
    moved = [name for name in (*sorted(info["files"]), last) if (work.path / name).exists()]
    if plan.write or plan.remove or any(_differs(work.path / name, run.path / name) for name in moved):
        write_sealed(run.journal, asdict(Journal(command, sorted(plan.kept))))
    if info["config"]["output"]["shards"]:
        _write_shards(plan.write, len(info["shards"]), workers, max_memory)
    expected = {sink.marker(run.shards, name) for name in plan.counts}
    for name in plan.remove:
        sink.remove_shard(run.shards, name, expected)
    sink.write_sizes(run.shards, plan.counts, earlier)
    for name in moved:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        if name == last:
            _drop_old(run, info, earlier)
        os.replace(work.path / name, run.path / name)
    run.write_run(settings)
    run.journal.unlink(missing_ok=True)
    work.clear()
    if plan.left:
        log.warning(
            "%s: %s: not meant any more, and kept: the input is gone, has changed or was not named, so that nothing "
            "could make them again",
            run.shards,
            names_of(plan.left),
        )


def _differs(new: Path, old: Path) -> bool:
    return not old.exists() or not filecmp.cmp(new, old, shallow=False)


def _drop_old(run: Store, info: dict[str, Any], earlier: dict[str, Shard]) -> None:
    """Remove what the run's earlier manifest had and the new one has not: parts of other shards, a threshold."""
    names = {shard["name"] for shard in info["shards"]}
    for name in earlier.keys() - names:
        run.manifest_part(name).unlink(missing_ok=True)
    if run.name(run.threshold) not in info["files"]:
        run.threshold.unlink(missing_ok=True)


def _write_shards(tasks: list[tuple[Any, ...]], total: int, workers: int, max_memory: int | None) -> None:
    with tqdm(total=total, initial=total - len(tasks), desc="filtered shards", unit="shard", disable=None) as bar:
        for _ in executors.run(sink.write_shard, tasks, workers, lambda i: str(tasks[i][0].name), max_memory):
            bar.update()
