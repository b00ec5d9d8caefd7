"""The order of the stages.  Data walks one way; a stage leaves files, and one whose files are done is passed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from . import executors, manifest
from .caption_groups import caption_keepers
from .commit import Planner, commit, names_of
from .config import Config, FalsePositiveRate, LabelledRate, SavedThreshold, digest_of
from .decisions import decide
from .denoisers import ModelFiles, find_model
from .edges import find_candidates, similarity
from .encoders import public_name
from .encoders.captions import public_caption_name
from .encoders.recorded import Encoders, Recorded
from .errors import ChangedShard, ConfigError, RunError, without_secrets
from .generalisation import FLAGS, flagged, general_captions, outcome, read_generalised, rewrite
from .generality import Scored, find_rater, generality_outcome, score_generality
from .given import MODEL, Given
from .groups import distinct_captions, group, load_samples
from .manifest import Manifest
from .recorded import check_signed, differences, parse_stored, recorded_by, stored_shards, unchanged
from .records import ACTIONS, MANIFEST, MASK, Decisions, Samples, Scores, Shard
from .rewriters import Answer, find_rewriter
from .scores import check_devices, score_captions, score_pairs
from .shards import find_shards
from .signatures import EARLIER, DuplicateGauge, Signed, check_hash, is_signed, made_by, sign, was_skipped
from .sink import kept_digest
from .store import Store, read_digest, read_note, read_sealed
from .summary import statistics
from .tagging import public_tagger
from .thresholds import check_threshold, find_threshold

log = logging.getLogger(__name__)

_NO_LIBRARIES = ("encoder", "forms", "instructions", "signatures")
_MODEL_PARTS = ("denoiser", "lora", "lora_scale", "single_file_config")  # what may stand in for a model's own


def run(
    patterns: list[str], out: str | Path, config: Config | None = None, workers: int | None = None, update: bool = False
) -> Manifest:
    """Read the shards and leave a manifest, and filtered shards if wanted, in `out`; return the manifest.

    `patterns` are brace expansions, globs, folders or fsspec URLs.  The same call continues a run that was
    interrupted.  A finished run takes other shards, another configuration or another model only as an `update`; a shard
    whose bytes have changed is read again in any case.  Raises a MemfilterError, in one line, for input, model or
    directory that cannot be used.
    """
    executors.check_guard()
    config, store = config or Config(), Store(out)
    stored = store.settings() or {}
    # names below a root are settled by the first shard that was read
    settled = stored.get("root") if store.has_signatures() else None
    shards, root = find_shards(patterns, config.input.root, config.input.allow_pipe, settled)
    _refuse_nesting(patterns, shards, store.path)
    check_threshold(config)
    check_devices(config)
    check_hash(config)
    encoders = Encoders.of(config)  # one that cannot be had is told before anything is written
    model = _model(config)
    rater = find_rater(config)
    if store.is_finished() and not update:
        config = unchanged(store.path, stored, shards, model, config)
    with store.locked(linked_shards=True), _noting_changes(store):
        recorded = recorded_by(store, shards) if store.is_finished() and not update else None
        by, workers = recorded or made_by(config), workers or executors.default_workers()
        if by.get("encoder") not in (None, encoders.images and encoders.images.identity):
            known = Recorded.read_from(stored.get("encoders"))  # by which the signatures were made
            encoders = replace(encoders, images=known or encoders.images)
        job = _Job(store, shards, config, model, encoders, rater, by, workers, "run", {"root": root})
        _sign_all(job)
        return _commit(job, _decide(job))


def rethreshold(
    path: str | Path,
    config_file: str | Path | None = None,
    workers: int | None = None,
    inputs: Sequence[str] = (),
    trust: bool = False,
) -> Manifest:
    """Decide again with another configuration, without the pixels; equal to a fresh run with it.

    The file's keys are laid over the run's own configuration.  Nothing is touched before the decision is whole and all
    that it needs is found to be there; a call that was killed after that is finished by the same call.

    What the run directory names is data: no command, host, code or place outside that it alone names is used, but for
    input shards that are local files.  Others are read where the patterns `inputs` name them, or with `trust`, which
    is for directories of one's own.

    Raises ConfigError for a key that changes what was read from the pixels and for what is needed and was not named
    here, RunError when the run was not finished, ShardError for inputs that are needed and cannot be read.
    """
    executors.check_guard()
    store = _run_at(path)
    with store.locked(trust), _noting_changes(store):
        job = _again(store, config_file, workers, "rethreshold", Given.by(store.path, config_file, (), inputs, trust))
        return _commit(job, _decide(job))


def generalise(
    path: str | Path,
    config_file: str | Path | None = None,
    workers: int | None = None,
    settings: dict[str, Any] | None = None,
    inputs: Sequence[str] = (),
    trust: bool = False,
) -> Manifest:
    """Rewrite the captions of flagged samples as general ones, and decide again with these in the pools.

    The file's keys, and `settings` of `generalise`, are laid over the run's own configuration; a model or an endpoint
    is taken from these alone, never from an earlier call.  The same call continues one that was interrupted, and asks
    again for what had no answer.  All else is as in `rethreshold`.  Raises what that does, and ModelError.
    """
    executors.check_guard()
    store = _run_at(path)
    with store.locked(trust), _noting_changes(store):
        given = Given.by(store.path, config_file, settings or {}, inputs, trust)
        job = _again(store, config_file, workers, "generalise", given, settings or {})
        work, config = job.work, job.config
        samples = load_samples(job.shards, work, config.images.json_fields)
        captions, caption = distinct_captions(samples, work)
        has_caption = samples.table["fingerprint"].is_valid().to_numpy()
        del samples  # large, and read again to decide
        digest = read_digest(work.at(work.captions))
        rewriter = find_rewriter(config.generalise, captions["text"], digest)
        info = _decide(job).info
        rows = manifest.decided(work, job.shards, ["action", *(name for name in FLAGS if name in MANIFEST.names)])
        wanted = flagged(rows, info["threshold"], config.generalise, info["generality"] is not None) & has_caption
        flags = config.generalise.model_dump(include={*FLAGS})
        note = {"captions": digest, "flags": flags, "samples": int(wanted.sum())}
        texts = captions["text"].take(pa.array(np.unique(caption[wanted])))
        rewrite(texts, rewriter, work, note, _rewriting_bar)
        return _commit(job, _decide(job))


# -- a decision, beside what stands -----------------------------------------------------------------------------------


@dataclass
class _Job:
    """A decision about a run that is under way; its signatures were made `by` this."""

    store: Store
    shards: list[Shard]
    config: Config
    model: ModelFiles | None
    encoders: Encoders
    rater: Scored | None
    by: dict[str, str]
    workers: int
    command: str
    settings: dict[str, Any]  # of run.json, beside those that stand here

    def __post_init__(self) -> None:
        self.work = self.store.beside()
        lists = []
        for stored in (self.store.read_run(), read_sealed(self.work.run_file)):
            lists += [stored["shards"], stored.get("earlier", [])] if stored else []
        self.earlier = {shard.name: shard for shards in lists for shard in stored_shards(self.store.path, shards)}

    def begin(self) -> None:
        """Store what the decision is made of; what a killed one left is cleared, unless a journal tells of it."""
        if not self.store.journal.exists():
            for folder in ("manifest", "generalised"):
                shutil.rmtree(self.work.path / folder, ignore_errors=True)
        names = {shard.name for shard in self.shards}
        settings = {
            **self.settings,
            "shards": [s.stored for s in self.shards],
            "config": _without_secrets(self.config.model_dump(mode="json")),
            "model": self.model and self.model.stored,
            "encoders": {**self.encoders.stored, "rater": self.rater and self.rater.about},
        }
        if not self.store.is_finished():  # before anything else: a directory without it is none of ours
            self.store.write_run(settings)
        self.work.write_run({**settings, "earlier": [s.stored for n, s in self.earlier.items() if n not in names]})


@dataclass(frozen=True)
class _Decided:
    samples: Samples
    decisions: Decisions
    info: dict[str, Any]  # what manifest.json will hold


def _decide(job: _Job) -> _Decided:
    """Make the decision, all stages in order, and leave what differs from the run's own files beside them."""
    store, config, model = job.work, job.config, job.model
    samples = load_samples(job.shards, store, config.images.json_fields)
    candidates = find_candidates(samples, store, config, job.encoders)
    captions, caption = distinct_captions(samples, store)
    keepers = caption_keepers(samples, captions, caption, store, config, job.encoders)
    groups = group(samples, candidates, caption, keepers, store, config)
    rewritten = read_generalised(store)
    further = rewritten["general"].drop_null() if rewritten is not None else None
    digest = read_digest(store.at(store.captions))
    scores = None
    if model and config.magnitude.mode == "pair":
        scores = score_pairs(samples, caption, len(captions), model, store, config, _scoring_bar)
    elif model:
        scores = score_captions(captions["text"], caption, digest, model, store, config, _scoring_bar, further)
    generality = score_generality(captions["text"], digest, job.rater, store, _generality_bar, further)
    threshold = find_threshold(config, scores, samples.good)
    limit = threshold.magnitude if threshold else None
    general = general_captions(rewritten, captions, scores, limit)
    decisions = decide(samples, groups, captions, scores, limit, config.policy, general)
    about = _about(samples, decisions, scores, limit, job)
    about["generalised"] = outcome(rewritten, general, decisions, store)
    about["generality"] = generality_outcome(generality, caption[samples.good], captions, rewritten)
    about["found"] = statistics(samples, groups, decisions, scores, store)
    manifest.write_parts(store, samples, groups, decisions, scores, generality, config.input.uid_field is not None)
    if threshold:
        threshold.save(store.threshold)
    else:
        store.threshold.unlink(missing_ok=True)
    return _Decided(samples, decisions, manifest.finish(store, samples, decisions, about).info)


def _commit(job: _Job, decided: _Decided) -> Manifest:
    """Put the decision in the place of the run's own; raises before anything is touched where that cannot be done."""
    planner = Planner(job.work, job.earlier, job.config, fresh=job.command == "run")
    plan = planner.make(decided.samples, decided.decisions, job.workers)
    max_memory = job.config.input.max_memory
    commit(job.work, plan, decided.info, job.earlier, job.command, job.workers, max_memory)
    return Manifest.load(job.store.path)


# -- what a run was, and is to be -------------------------------------------------------------------------------------


def _run_at(path: str | Path) -> Store:
    store = Store(path)
    if store.read_run() is None:
        raise RunError(f"{path}: holds no run; start one with 'memfilter run SHARDS... --out {path}'")
    return store


def _again(
    store: Store,
    config_file: str | Path | None,
    workers: int | None,
    command: str,
    given: Given,
    generalise: dict[str, Any] | None = None,
) -> _Job:
    """Return a decision about what a run has read, with the keys of a file, and some of `generalise`, over its own.

    Raises RunError where a shard was not read, ConfigError where it was read under another configuration, or where
    something is needed that the caller did not name.
    """
    stored = store.settings() or {}
    before, shards, model = parse_stored(store.path, stored)
    if generalise is not None:  # by what captions are rewritten, the caller says
        before = before.model_copy(
            update={"generalise": before.generalise.model_copy(update={"model": None, "endpoint": None})}
        )
    config = Config.load(config_file, base=before)
    if generalise:
        values = config.model_dump(mode="json")
        config = Config.parse({**values, "generalise": {**values["generalise"], **generalise}})
    if isinstance(config.magnitude.threshold, FalsePositiveRate | LabelledRate | SavedThreshold):  # it lies in a file
        given.check(config, "magnitude.threshold")
    check_threshold(config)
    check_devices(config)
    check_hash(config)
    encoders = given.encoders(stored.get("encoders"), before, config)
    if _model_settings(config) != _model_settings(before):
        given.check(config, *MODEL)
        model = _model(config)
    else:
        model = given.model(model, config)
    rater = given.rater(stored.get("encoders"), config)
    shards = given.shards(shards, config)
    if not store.journal.exists():
        shutil.rmtree(store.beside().path / "signatures", ignore_errors=True)  # of a killed `run`: these are the run's
    by = recorded_by(store, shards)
    check_signed(store, shards, before, config, encoders.images, by, str(config_file or store.path))
    workers = workers or executors.default_workers()
    job = _Job(store, shards, config, model, encoders, rater, by or {}, workers, command, stored)
    job.begin()
    return job


def _without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the passwords of its URLs; nothing is asked of these again."""
    for section, name in (("input", "root"), ("generalise", "endpoint")):
        if config[section][name] is not None:
            config[section][name] = without_secrets(config[section][name])
    return config


@contextmanager
def _noting_changes(store: Store) -> Iterator[None]:
    """Store of a shard whose bytes turn out to be others that it has changed: the next `run` reads it again."""
    try:
        yield
    except ChangedShard as e:
        for place in (store, store.beside()):
            if stored := read_sealed(place.run_file):
                lists = [[*values[:3], "changed"] if values[0] == e.shard else values for values in stored["shards"]]
                place.write_run({**stored, "shards": lists})
        raise


def _model(config: Config) -> ModelFiles | None:
    """Return the files of the model that is named; raises ModelError, and ConfigError for parts of none."""
    settings = config.magnitude
    if settings.model:
        parts = settings.model_dump(include={*_MODEL_PARTS})
        return find_model(settings.model, images=settings.mode == "pair", **parts)
    if given := [part for part in _MODEL_PARTS if getattr(settings, part) and part != "lora_scale"]:
        raise ConfigError(f"magnitude.{given[0]} is given and no model; give --model or magnitude.model")
    return None


def _model_settings(config: Config) -> dict[str, Any]:
    settings = config.magnitude
    return {**settings.model_dump(include={"model", *_MODEL_PARTS}), "images": settings.mode == "pair"}


# -- the stage that goes shard by shard --------------------------------------------------------------------------------


def _sign_all(job: _Job) -> None:
    """Leave the signatures of all shards: the run's own, and beside them those that differ from a finished run's."""
    finished = job.store.is_finished()
    own = job.work.own_signatures if finished else job.store.own_signatures
    todo = _unsigned(job, finished)
    job.begin()
    tasks = [(s, own(s.name), job.config) for s in todo]
    gauge, samples, bad, total = DuplicateGauge(), 0, 0, len(job.shards)
    with tqdm(total=total, initial=total - len(todo), desc="signatures", unit="shard", disable=None) as bar:
        signed: Signed
        for signed in executors.run(sign, tasks, job.workers, lambda i: todo[i].name, job.config.input.max_memory):
            samples, bad = samples + signed.samples, bad + signed.bad
            gauge.add(signed.contents)
            rate = samples / max(bar.format_dict["elapsed"], 1e-6)
            bar.set_postfix_str(
                f"{rate:,.0f} samples/s, duplicates {gauge.share:.1%}, bad {bad / max(samples, 1):.1%}", refresh=False
            )
            bar.update()


def _unsigned(job: _Job, finished: bool) -> list[Shard]:
    """Return the shards that have no signatures, or other ones than they would get, and remove what is of no use.

    It comes before the versions of the shards are stored, so that a run that is killed in between notices again.
    Raises RunError where some would be made by something else than a finished run's.
    """
    run_parts, parts = job.store.own_signatures, job.work.own_signatures
    versions = [_versions(read_sealed(store.run_file)) for store in (job.store, job.work)]
    todo, changed, again = [], [], []
    for shard in job.shards:
        places = [path(shard.name) for path in (run_parts, parts)]
        usable = [
            known.get(shard.name, Ellipsis) == shard.version and is_signed(shard, place, job.config, job.by)
            for known, place in zip(versions, places, strict=True)
        ]
        if not usable[1]:
            places[1].unlink(missing_ok=True)
        if not finished and not usable[0]:
            places[0].unlink(missing_ok=True)
        if not any(usable):
            todo.append(shard)
            is_other = versions[0].get(shard.name, shard.version) != shard.version
            changed += [shard.name] if finished and is_other else []
        elif was_skipped(places[usable.index(True)]):  # it may have been out of reach for a while: it is tried again
            again.append(shard)
    here = made_by(job.config)
    if finished and job.by != here:
        told = differences(job.by, here)
        if todo:
            raise RunError(
                f"{job.store.path}: {names_of(s.name for s in todo)}: to be read again, and its signatures would not "
                f"be like the others ({told}); give --update to make all of them again"
            )
        log.warning("%s: its signatures stay as they were made, --update makes them again (%s)", job.store.path, told)
        return []
    if changed:
        log.warning("%s: %s: changed since it was read, and read again", job.store.path, names_of(changed))
    return todo + again


def _versions(stored: dict[str, Any] | None) -> dict[str, str | None]:
    return {shard.name: shard.version for shard in (Shard(*values) for values in (stored or {}).get("shards", []))}


def _scoring_bar(sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
    with tqdm(total=total, desc="magnitudes", unit=unit, disable=None) as bar:
        for size in sizes:
            bar.update(size)
            yield size


def _generality_bar(chunks: Iterator[int], total: int) -> Iterator[int]:
    return iter(tqdm(chunks, total=total, desc="generality", unit="chunk", disable=None))


def _rewriting_bar(answers: Iterator[tuple[int, Answer]], total: int) -> Iterator[tuple[int, Answer]]:
    return iter(tqdm(answers, total=total, desc="generalised", unit="caption", disable=None))


# -- small print ------------------------------------------------------------------------------------------------------


def _refuse_nesting(patterns: list[str], shards: list[Shard], out: Path) -> None:
    # the folders that shards were found in, and those that were searched from the top down
    named = [p.removeprefix("file://").split("**")[0] for p in patterns if "**" in p or os.path.isdir(p)]
    folders = {os.path.abspath(p) for p in named} | {os.path.dirname(s.url) for s in shards if os.path.isabs(s.url)}
    places = [Path(os.path.abspath(out)), out.resolve()]
    for folder in sorted(folders):
        for place, inside in [(p, f) for p in places for f in (Path(folder), Path(folder).resolve())]:
            if place == inside or inside in place.parents or place in inside.parents:
                raise ConfigError(f"{place}: lies in an input folder, or holds one ({folder}); give another --out")


def _about(
    samples: Samples, decisions: Decisions, scores: Scores | None, limit: float | None, job: _Job
) -> dict[str, Any]:
    store, config = job.work, job.config
    dump = config.model_dump(mode="json")
    dump["input"]["root"] = None  # where the data lies is no part of the result
    for key in ("allow_pipe", "max_memory", "timeout"):  # nor is how it was read
        del dump["input"][key]
    dump["images"]["encoder"] = public_name(config.images.encoder)
    dump["captions"]["encoder"] = public_caption_name(config.captions.encoder)
    dump["magnitude"]["model"] = scores and scores.info["model"]
    for key in ("denoiser", "lora", "single_file_config"):  # by their own names, as the model
        named = dump["magnitude"][key]
        is_hub_id = key == "single_file_config" and named and not Path(named).exists() and named.count("/") == 1
        dump["magnitude"][key] = Path(named).resolve().name if named and not is_hub_id else named
    del dump["magnitude"]["devices"]  # which, and how many, is no part of the result
    dump["generality"]["tagger"] = public_tagger(config.generality.tagger)
    del dump["generality"]["wordnet"]  # where it lies; what it holds stands in `generality`
    del dump["generalise"]  # what was rewritten, and by what, stands in `generalised`
    if isinstance(wanted := dump["magnitude"]["threshold"], dict):
        wanted.update((key, Path(wanted[key]).name) for key in ("reference", "labelled", "saved") if key in wanted)
    shards = []
    for shard, start, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
        counts = np.bincount(decisions.action[start:end], minlength=len(ACTIONS)).tolist()
        note = read_note(store.signatures(shard.name))
        entry = {"name": shard.name, "bytes": note.get("bytes", shard.size), **dict(zip(ACTIONS, counts, strict=True))}
        if "skipped" in note:
            entry["skipped"] = note["skipped"]
        elif sum(counts) and not sum(counts[: MASK + 1]):
            entry["emptied"] = True
        elif sum(counts) and config.output.shards:  # by which the filtered shard is known to be this run's
            kept = np.flatnonzero(decisions.action[start:end] <= MASK)
            entry["filtered"] = kept_digest(shard, read_digest(store.signatures(shard.name)), kept)
        if "digest" in note:
            entry["digest"] = note["digest"]
        shards.append(entry)
    encoder = job.encoders.images
    libraries = {name: number for name, number in job.by.items() if name not in _NO_LIBRARIES}
    if job.by == EARLIER:
        libraries = (manifest.read_info(job.store.path) or {}).get("versions", {})
    return {
        "config": dump,
        "config_digests": {name: digest_of(keys) for name, keys in dump.items()},
        "versions": {**libraries, "memfilter": version("memfilter")},
        "instruction_set": job.by.get("instructions"),
        "caption_join": read_note(store.at(store.caption_groups)),
        "embedding_join": read_note(store.at(store.edges / "embedding.parquet")) if encoder else None,
        "encoder": encoder and _described(encoder, similarity(config, encoder), job),
        "magnitude": scores and scores.info,
        "threshold": limit,
        "shards": shards,
    }


def _described(encoder: Recorded, similarity: float, job: _Job) -> dict[str, Any]:
    """Return what the manifest tells of the encoder; where that is another by now, what it told before."""
    before = (manifest.read_info(job.store.path) or {}).get("encoder")
    if before and job.by.get("encoder") not in (None, encoder.identity):
        return {**before, "similarity": similarity}
    return {
        "identity": encoder.identity,
        "weights": encoder.weights,  # sha256, of those that have a file of them
        "preprocessing": encoder.preprocessing,
        "similarity": similarity,
    }
