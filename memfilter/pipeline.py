"""The order of the stages.  Data walks one way; a stage leaves files, and one whose files are done is passed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from . import executors, manifest, sink
from .caption_groups import caption_keepers, check_captions
from .config import Config, Input, digest_of
from .decisions import decide
from .denoisers import ModelFiles, find_model
from .edges import find_edges, similarity
from .encoders import described, image_encoder, public_name
from .encoders.captions import public_caption_name
from .errors import ConfigError, RunError
from .generalisation import FLAGS, flagged, general_captions, outcome, read_generalised, rewrite
from .generality import Rater, find_rater, generality_outcome, score_generality
from .groups import distinct_captions, group, load_samples
from .manifest import Manifest
from .records import ACTIONS, MANIFEST, MASK, Decisions, Samples, Scores, Shard
from .rewriters import Answer, find_rewriter
from .scores import check_devices, score_captions, score_pairs
from .shards import find_shards
from .signatures import DuplicateGauge, Signed, check_hash, is_signed, sign, versions, was_skipped
from .store import Store, read_digest, read_note
from .summary import statistics
from .tagging import public_tagger
from .thresholds import check_threshold, find_threshold

_MODEL_PARTS = ("denoiser", "lora", "lora_scale", "single_file_config")  # what may stand in for a model's own


def run(patterns: list[str], out: str | Path, config: Config | None = None, workers: int | None = None) -> Manifest:
    """Read the shards and leave a manifest, and filtered shards if wanted, in `out`; return the manifest.

    `patterns` are brace expansions, globs, folders or fsspec URLs.  The same call continues a run that was
    interrupted.  Raises a MemfilterError, in one line, for input, model or directory that cannot be used.
    """
    config, store = config or Config(), Store(out)
    stored = store.read_run() or {}
    # names below a root are settled by the first shard that was read
    root = config.input.root or (stored.get("root") if store.has_signatures() else None)
    shards, root = find_shards(patterns, root, config.input.allow_pipe)
    _refuse_nesting(patterns, shards, store.path)
    check_threshold(config)
    check_devices(config)
    check_hash(config)
    image_encoder(config.images.encoder)  # one that cannot be had is told before anything is written
    check_captions(config)
    model = _model(config)
    rater = find_rater(config)
    with store.locked():
        _forget_changed(shards, stored, store)
        store.write_run(
            {
                "root": root,
                "shards": [astuple(s) for s in shards],
                "config": config.model_dump(mode="json"),
                "model": model and astuple(model),
            }
        )
        _sign_all(shards, store, config, workers or executors.default_workers())
        return _decide_and_write(shards, model, rater, store, config, workers or executors.default_workers())


def rethreshold(path: str | Path, config_file: str | Path | None = None, workers: int | None = None) -> Manifest:
    """Decide again with another configuration, without the pixels; equal to a fresh run with it.

    The file's keys are laid over the run's own configuration.  Raises ConfigError for a key that changes what was read
    from the pixels, RunError when the run was not finished.
    """
    finished = _Finished(path, config_file)
    with finished.store.locked():
        finished.check()
        return finished.decide(workers)


def generalise(
    path: str | Path,
    config_file: str | Path | None = None,
    workers: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Manifest:
    """Rewrite the captions of flagged samples as general ones, and decide again with these in the pools.

    The file's keys, and `settings` of `generalise`, are laid over the run's own configuration.  The same call continues
    one that was interrupted, and asks again for what had no answer.  Raises what `rethreshold` does, and ModelError.
    """
    finished = _Finished(path, config_file, settings or {})
    store, config = finished.store, finished.config
    with store.locked():
        finished.check()
        samples = load_samples(finished.shards, store, config.images.json_fields)
        captions, caption = distinct_captions(samples, store)
        has_caption = samples.table["fingerprint"].is_valid().to_numpy()
        del samples  # large, and read again to decide
        rewriter = find_rewriter(config.generalise, captions["text"], read_digest(store.captions))
        found = finished.decide(workers)
        rows = found.table(["action", *(name for name in FLAGS if name in MANIFEST.names)])
        wanted = (
            flagged(rows, found.info["threshold"], config.generalise, found.info["generality"] is not None)
            & has_caption
        )
        flags = config.generalise.model_dump(include={*FLAGS})
        note = {"captions": read_digest(store.captions), "flags": flags, "samples": int(wanted.sum())}
        texts = captions["text"].take(pa.array(np.unique(caption[wanted])))
        rewrite(texts, rewriter, store, note, _rewriting_bar)
        return finished.decide(workers)


class _Finished:
    """A finished run that is decided again, with the keys of a file, and some of `generalise`, over its own."""

    def __init__(
        self, path: str | Path, config_file: str | Path | None, generalise: dict[str, Any] | None = None
    ) -> None:
        self.store, self.config_file = Store(path), config_file
        stored = self.store.read_run()
        if stored is None:
            raise RunError(f"{path}: holds no run; start one with 'memfilter run SHARDS... --out {path}'")
        try:
            before = Config.parse(stored["config"])
            self.shards = [Shard(*values) for values in stored["shards"]]
            self.model = ModelFiles(*stored["model"]) if stored["model"] else None
        except (KeyError, TypeError) as e:
            raise RunError(f"{self.store.run_file}: damaged ({e}); run 'memfilter run' again") from e
        self.stored, self.config = stored, Config.load(config_file, base=before)
        if generalise:
            values = self.config.model_dump(mode="json")
            self.config = Config.parse({**values, "generalise": {**values["generalise"], **generalise}})
        check_threshold(self.config)
        check_devices(self.config)
        check_hash(self.config)
        check_captions(self.config)
        if _model_settings(self.config) != _model_settings(before):
            self.model = _model(self.config)
        self.rater = find_rater(self.config)

    def check(self) -> None:
        """Raise RunError where a shard was not read, ConfigError where it was read under another configuration."""
        for shard in self.shards:
            path = self.store.signatures(shard.name)
            if not path.exists():
                raise RunError(
                    f"{self.store.path}: the run is not finished, {shard.name} was not read; finish it first"
                )
            if not is_signed(shard, path, self.config):
                raise ConfigError(
                    f"{self.config_file or self.store.path}: {shard.name} has no signatures under this configuration; "
                    "keys of 'input', images.hash, decode, ground and encoder, and other fields of the json in "
                    "images.keep, need 'memfilter run'"
                )

    def decide(self, workers: int | None) -> Manifest:
        """Decide and write, and store the configuration as the run's own; the directory is locked."""
        workers = workers or executors.default_workers()
        done = _decide_and_write(self.shards, self.model, self.rater, self.store, self.config, workers)
        settings = {"config": self.config.model_dump(mode="json"), "model": self.model and astuple(self.model)}
        self.store.write_run({**self.stored, **settings})
        return done


def _decide_and_write(
    shards: list[Shard], model: ModelFiles | None, rater: Rater | None, store: Store, config: Config, workers: int
) -> Manifest:
    samples = load_samples(shards, store, config.images.json_fields)
    edges = find_edges(samples, store, config)
    captions, caption = distinct_captions(samples, store)
    keepers = caption_keepers(samples, captions, caption, store, config)
    groups = group(samples, edges, caption, keepers, config)
    rewritten = read_generalised(store)
    further = rewritten["general"].drop_null() if rewritten is not None else None
    digest = read_digest(store.captions)
    scores = None
    if model and config.magnitude.mode == "pair":
        scores = score_pairs(samples, caption, len(captions), model, store, config, _scoring_bar)
    elif model:
        scores = score_captions(captions["text"], caption, digest, model, store, config, _scoring_bar, further)
    generality = score_generality(captions["text"], digest, rater, store, _generality_bar, further)
    threshold = find_threshold(config, scores, samples.good)
    limit = threshold.magnitude if threshold else None
    general = general_captions(rewritten, captions, scores, limit)
    decisions = decide(samples, groups, captions, scores, limit, config.policy, general)
    about = _about(samples, decisions, scores, limit, store, config)
    about["generalised"] = outcome(rewritten, general, samples, caption, decisions, store)
    about["generality"] = generality_outcome(generality, caption[samples.good], captions, rewritten)
    about["found"] = statistics(samples, groups, decisions, scores, store)
    manifest.write_parts(store, samples, groups, decisions, scores, generality, config.input.uid_field is not None)
    if config.output.shards:
        _write_shards(samples, decisions, store, workers, config.input)
    else:
        sink.write_sizes(store.shards, {})  # those of an earlier decision go
    if threshold:
        threshold.save(store.threshold)
    else:
        store.threshold.unlink(missing_ok=True)
    return manifest.finish(store, samples, decisions, about)


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


# -- the two stages that go shard by shard ----------------------------------------------------------------------------


def _forget_changed(shards: list[Shard], stored: dict[str, Any], store: Store) -> None:
    """Remove the signatures of shards whose version is not the one that the last run was told.

    It comes before the new versions are stored, so that a run that is killed in between notices again.
    """
    known = {shard.name: shard.version for shard in (Shard(*values) for values in stored.get("shards", []))}
    for shard in shards:
        if shard.name not in known or known[shard.name] != shard.version:
            store.signatures(shard.name).unlink(missing_ok=True)


def _sign_all(shards: list[Shard], store: Store, config: Config, workers: int) -> None:
    # a shard that was skipped may have been out of reach for a while: it is tried again
    todo = [s for s in shards if not is_signed(s, path := store.signatures(s.name), config) or was_skipped(path)]
    tasks = [(s, store.signatures(s.name), config) for s in todo]
    gauge, samples, bad = DuplicateGauge(), 0, 0
    with tqdm(total=len(shards), initial=len(shards) - len(todo), desc="signatures", unit="shard", disable=None) as bar:
        signed: Signed
        for signed in executors.run(sign, tasks, workers, lambda i: todo[i].name, config.input.max_memory):
            samples, bad = samples + signed.samples, bad + signed.bad
            gauge.add(signed.contents)
            rate = samples / max(bar.format_dict["elapsed"], 1e-6)
            bar.set_postfix_str(
                f"{rate:,.0f} samples/s, duplicates {gauge.share:.1%}, bad {bad / max(samples, 1):.1%}", refresh=False
            )
            bar.update()


def _write_shards(samples: Samples, decisions: Decisions, store: Store, workers: int, limits: Input) -> None:
    tasks, counts = [], {}
    for shard, start, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
        kept = np.flatnonzero(decisions.action[start:end] <= MASK)
        signature = store.signatures(shard.name)
        if len(kept):
            counts[shard.name] = len(kept)
        kept_as = sink.kept_digest(shard, read_digest(signature), kept)
        if not (len(kept) and sink.is_written(shard, store.shards, kept_as)):
            tasks.append((shard, store.shards, signature, kept, kept_as, limits.timeout))
    done = len(samples.shards) - len(tasks)
    with tqdm(total=len(samples.shards), initial=done, desc="filtered shards", unit="shard", disable=None) as bar:
        for _ in executors.run(sink.write_shard, tasks, workers, lambda i: str(tasks[i][0].name), limits.max_memory):
            bar.update()
    sink.write_sizes(store.shards, counts)


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
    samples: Samples, decisions: Decisions, scores: Scores | None, limit: float | None, store: Store, config: Config
) -> dict[str, Any]:
    dump = config.model_dump(mode="json")
    dump["input"]["root"] = None  # where the data lies is no part of the result
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
        if "digest" in note:
            entry["digest"] = note["digest"]
        shards.append(entry)
    encoder = image_encoder(config.images.encoder)
    return {
        "config": dump,
        "config_digests": {name: digest_of(keys) for name, keys in dump.items()},
        "versions": {"memfilter": version("memfilter"), **versions(config.images.hash)},
        "caption_join": read_note(store.caption_groups),
        "embedding_join": read_note(store.edges / "embedding.parquet") if config.images.encoder else None,
        "encoder": encoder and described(encoder, similarity(config)),
        "magnitude": scores and scores.info,
        "threshold": limit,
        "shards": shards,
    }
