"""The stage of magnitudes: one score a distinct caption, or a pair, in files of fixed chunks that a later run keeps.

Captions go by the order of their token ids and pairs by that of their shard, in chunks of a size that the configuration
alone decides, each chunk a file.  So a caption shares its batch with the same others in every run of the same captions,
and its score has the same bits.  Several GPUs have one worker each.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import calibration, executors, images
from .config import Config, FalsePositiveRate, Input, LabelledRate, Magnitude, Quantile, digest_of
from .denoisers import Denoiser, ModelFiles, find_model, load_denoiser, token_digest
from .errors import ChangedShard, ConfigError, ModelError, ShardError, in_one_line
from .magnitude import Pixels, Scorer, Scoring, distinct, warm_scorer
from .precision import rounding_errors
from .records import PAIR_SCORES, ROUNDING, SCORES, SIGNALS, Floats, Ints, Samples, Scores, Shard
from .shards import REMEDY
from .source import open_shard, printable_key
from .store import Store, done, file_digest, read_digest, read_note, read_table, write_table

log = logging.getLogger(__name__)

_PASSES = 2048  # of latents up to 64 x 64 in a chunk, some seconds of a GPU's work; fewer of larger ones
_LATENT_SIZE = 64 * 64
_LIBRARIES = ("diffusers", "torch", "transformers")
_AGAIN = "run 'memfilter run' again"


class Progress(Protocol):
    """What shows how far scoring has come: it passes on the sizes of finished chunks, which add up to `total`."""

    def __call__(self, sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
        """Return the sizes as they come."""
        ...


def score_captions(
    texts: pa.ChunkedArray,
    caption: Ints,
    captions_digest: str,
    model: ModelFiles,
    store: Store,
    config: Config,
    progress: Progress,
    generalised: pa.ChunkedArray | None = None,
) -> Scores:
    """Return the scores of all samples by their captions, computed now or by an earlier run.

    `texts` are the distinct captions and `caption` the row there of each sample's, -1 for a bad one.  The scores of
    `generalised` captions have a table of their own, so that the others stay as they are.  Raises ModelError, and
    ConfigError for a reference file or a labelled list that cannot be used.
    """
    return _Stage(model, config, store, progress).captions(texts, caption, captions_digest, generalised)


def score_pairs(
    samples: Samples,
    caption: Ints,
    captions: int,
    model: ModelFiles,
    store: Store,
    config: Config,
    progress: Progress,
) -> Scores:
    """Return the scores of all samples by their captions and images, computed now or by an earlier run.

    `caption` is of each sample the row of its caption among so many distinct `captions`, -1 for a bad one.  The images
    are read again, whole; one that cannot be decoded is told in `unscored`.  Raises ModelError, and ShardError for a
    shard that cannot be read again or has changed.
    """
    return _Stage(model, config, store, progress).pairs(samples, caption, captions)


class _Stage:
    """What the tables of one run's scores have in common."""

    def __init__(self, model: ModelFiles, config: Config, store: Store, progress: Progress) -> None:
        self.model, self.config, self.store, self.progress = model, config, store, progress
        self.settings = config.magnitude
        self.devices = list(self.settings.devices or _devices())
        self.base = digest_of(
            [
                "scores-3",
                model.files,
                _numbers(self.settings),
                sorted({_name(device) for device in self.devices}),
                {n: version(n) for n in (*_LIBRARIES, *(["pillow"] if self.settings.mode == "pair" else []))},
            ]
        )

    @cache  # noqa: B019  the stage ends with the run
    def check_model(self) -> None:
        """Raise ModelError where the model's files are not those by whose digests its scores are kept.

        Raises ConfigError where the caller of this command did not name it.
        """
        model = self.model
        if not model.may_read:
            raise ConfigError(
                f"magnitude.model: scores are needed that the run does not have, and {model.spec} is named by its "
                "run.json alone; name it, with its lora and other parts, in --config too, or give --trust"
            )
        if find_model(model.spec, self.settings.mode == "pair", *model.parts).files != model.files:
            raise ModelError(
                f"{model.spec}: has changed since the run read its files; bring it back, or run 'memfilter run' again "
                "with --update"
            )

    def scorer(self) -> Scorer:
        """Return this process's own scorer, loaded when it is first asked for."""
        self.check_model()
        return warm_scorer(self.model, self.settings, self.devices[0])

    def captions(
        self, texts: pa.ChunkedArray, caption: Ints, digest: str, generalised: pa.ChunkedArray | None
    ) -> Scores:
        """Return the scores of samples by their captions."""

        def further(name: str, captions: pa.ChunkedArray) -> pa.Table:
            return self._table(captions, digest_of([self.base, name, captions.to_pylist()]), name)

        wanted = self.settings.threshold
        lines = calibration.read_reference(Path(wanted.reference)) if isinstance(wanted, FalsePositiveRate) else None
        labelled = calibration.read_labelled(Path(wanted.labelled)) if isinstance(wanted, LabelledRate) else None
        own = self._table(texts, digest_of([self.base, digest]), "captions")
        info = self._info(self.store.at(self.store.scores / "captions.parquet"))
        reference = further("reference", lines) if lines is not None else None
        if isinstance(wanted, LabelledRate) and labelled is not None:
            found = further("labelled", pa.chunked_array([labelled.captions]))
            memorized = found["magnitude"].to_numpy()[labelled.is_memorized]
            reference = found.filter(pa.array(~labelled.is_memorized))
            info["calibration"] = _calibration(wanted, memorized, reference["magnitude"].to_numpy())
        general = further("generalised", generalised) if generalised is not None else None
        by_caption = own["magnitude"].to_numpy()
        return Scores(
            by_caption,
            _of_rows(by_caption, caption),
            _of_rows(own["magnitude_eps"].to_numpy(), caption),
            info,
            reference["magnitude"].to_numpy() if reference is not None else None,
            general["magnitude"].to_numpy() if general is not None else None,
            self._by_timestep(own, caption[caption >= 0], info)
            if reference is None
            else self._by_timestep(reference, np.arange(len(reference)), info),
            signals={name: _of_rows(own[name].to_numpy(), caption) for name in self.settings.signals},
        )

    def pairs(self, samples: Samples, caption: Ints, captions: int) -> Scores:
        """Return the scores of samples by their captions and images; a caption's is the highest of its samples'."""
        shards = samples.shards
        digests = {
            shard.name: digest_of([self.base, shard.name, read_digest(self.store.signatures(shard.name))])
            for shard in shards
        }
        paths = {shard.name: self.store.pair_scores(shard.name) for shard in shards}
        paths = {name: self.store.place(path, digests[name]) for name, path in paths.items()}
        todo = [s for s in shards if not done(paths[s.name], digests[s.name])]
        sizes = dict(zip((s.name for s in shards), np.diff(samples.first).tolist(), strict=True))
        items = [
            (
                self.model,
                self.settings,
                self.config.input,
                s,
                self.store.signatures(s.name),
                paths[s.name],
                digests[s.name],
            )
            for s in todo
        ]
        if todo:
            self.check_model()
        finished = executors.run(_score_shard, items, len(self.devices), lambda i: todo[i].name, slots=self.devices)
        for _ in self.progress(finished, sum(sizes[s.name] for s in todo), "pair"):
            pass
        columns = ["magnitude", "magnitude_eps", "values", "cause"]
        tables = [read_table(paths[s.name], columns) for s in shards]
        table = pa.concat_tables([PAIR_SCORES.empty_table().select(columns), *tables])
        magnitude = table["magnitude"].to_numpy()
        by_caption = np.full(captions, -np.inf, np.float32)
        scored = np.flatnonzero(~np.isnan(magnitude))
        np.maximum.at(by_caption, caption[scored], magnitude[scored])
        info = self._info(*(paths[s.name] for s in shards))
        info["unscored"] = table.num_rows - table["cause"].null_count
        return Scores(
            by_caption,
            magnitude,
            table["magnitude_eps"].to_numpy(),
            info,
            by_timestep=self._by_timestep(table, scored, info),
            unscored=table["cause"],
        )

    def _by_timestep(self, scored: pa.Table, rows: Ints, info: dict[str, Any]) -> Floats | None:
        """Return of the rows of which the threshold is a quantile the magnitudes (N, timesteps), if there are several.

        None where it is none.
        """
        count = len(info["timesteps"])
        if count == 1 or not isinstance(self.settings.threshold, Quantile | FalsePositiveRate | LabelledRate):
            return None
        rated = scored.take(pa.array(rows))
        if isinstance(self.settings.threshold, Quantile):
            rated = rated.filter(pc.greater(rated["magnitude"], 0))  # as `find_threshold` does
        values = pc.list_flatten(rated["values"]).to_numpy().reshape(len(rated), info["seeds"], count)
        found: Floats = values.mean(axis=1, dtype=np.float64).astype(np.float32)
        return found

    def _info(self, *paths: Path) -> dict[str, Any]:
        notes = [read_note(path) for path in paths] or [_note(self.scorer())]
        info = {"model": self.model.name, "files": self.model.files, **notes[0]}
        info["smallest_batch"] = min(note["smallest_batch"] for note in notes)
        info["noise_floor"] = self._noise_floor(info["dtype"])
        return info

    def _table(self, texts: pa.ChunkedArray, digest: str, name: str) -> pa.Table:
        """Return one row a caption, scored now or before."""
        path = self.store.place(self.store.scores / f"{name}.parquet", digest)
        chunks = self.store.scores / name
        if done(path, digest):
            shutil.rmtree(chunks, ignore_errors=True)
            return read_table(path)
        self.check_model()
        captions: list[str] = texts.to_pylist()
        ids, cut = self._tokens(captions)
        order, first = distinct(ids)
        size = _chunk_size(self.settings, self._denoiser().latent_shape)
        log.info("scoring %d conditions of %d distinct captions", len(order), len(captions))
        parts, items = [], []
        for start in range(0, max(len(order), 1), size):
            part, part_digest = chunks / f"{start // size:06}.parquet", digest_of([digest, start, size])
            parts.append(part)
            chunk = order[start : start + size]
            if not done(part, part_digest):
                items.append((self.model, self.settings, [captions[first[c]] for c in chunk], chunk, part, part_digest))
        finished = executors.run(
            _score_chunk, items, len(self.devices), lambda i: f"captions in {items[i][4].name}", slots=self.devices
        )
        for _ in self.progress(finished, sum(len(item[3]) for item in items), "caption"):
            pass
        scored = pa.concat_tables([read_table(part) for part in parts])
        place = {condition: i for i, condition in enumerate(order)}
        table = scored.take(pa.array([place[condition] for condition in ids], pa.int64())).combine_chunks()
        notes = [read_note(part) for part in parts]
        smallest = min(note["smallest_batch"] for note in notes)
        about = {**notes[0], "smallest_batch": smallest, "conditions": len(order), "cut": cut}
        write_table(path, table, digest, about)
        shutil.rmtree(chunks, ignore_errors=True)
        return table

    @cache  # noqa: B019  the stage ends with the run
    def _denoiser(self) -> Denoiser:
        """Return a denoiser for its tokenizers: on the CPU where the GPUs are their workers' own."""
        if len(self.devices) == 1:
            return self.scorer().denoiser
        return load_denoiser(self.model, self.settings.dtype, "cpu")

    def _tokens(self, captions: list[str]) -> tuple[list[bytes], int]:
        """Return the token ids of captions, and how many captions are longer than the model reads."""
        ids: list[bytes] = []
        cut = 0
        for start in range(0, len(captions), 8192):
            some = captions[start : start + 8192]
            ids += self._denoiser().token_ids(some)
            cut += int(self._denoiser().truncated(some).sum())
        return ids, cut

    def _noise_floor(self, dtype: str) -> float | None:
        """Return what rounding may do to a magnitude, measured now or before; None for float32, or where it cannot."""
        if dtype == "float32":
            return None
        digest = digest_of([self.base, "noise floor"])
        path = self.store.place(self.store.scores / "noise_floor.parquet", digest)
        if not done(path, digest):
            import torch

            self.check_model()
            try:
                exact = load_denoiser(self.model, "float32", self.devices[0])
                errors = rounding_errors(self.scorer().denoiser, exact)
            except (ModelError, torch.cuda.OutOfMemoryError) as e:
                # the scores are there, and stay good without it
                log.warning("the noise floor of %s is unknown: the model in float32: %s", dtype, in_one_line(e))
                return None
            write_table(path, pa.table([errors], schema=ROUNDING), digest)
        return float(read_table(path)["error"].to_numpy().max())


def _of_rows(values: Floats, row: Ints) -> Floats:
    """Return the value of each row, NaN where it is -1."""
    return np.append(values, np.float32(np.nan))[row]


def _calibration(wanted: LabelledRate, memorized: Floats, others: Floats) -> dict[str, Any]:
    return {
        "digest": file_digest(Path(wanted.labelled)),
        **calibration.measures(memorized, others),
        **calibration.operating_point(memorized, others, wanted.false_positive_rate),
    }


def _numbers(settings: Magnitude) -> dict[str, Any]:
    """Return the settings that shape a score."""
    names = {"mode", "seeds", "dtype", "batch_size", "compile"}
    names |= {"prompt": {"signals"}, "pair": {"timesteps"}, "trajectory": {"steps", "guidance"}}[settings.mode]
    return settings.model_dump(mode="json", include=names)


def _devices() -> list[str]:
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]


def check_devices(config: Config) -> None:
    """Raise ConfigError for a device that is not here, and for devices of more than one kind."""
    devices = config.magnitude.devices or ()
    if not devices:
        return
    import torch

    here = {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    if missing := [d for d in devices if d not in here]:
        raise ConfigError(f"magnitude.devices: no {missing[0]!r} here; there is {', '.join(sorted(here))}")
    if len({d.split(":")[0] for d in devices}) > 1:
        raise ConfigError("magnitude.devices: a CPU and GPUs do not score alike; name devices of one kind")


@cache
def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _chunk_size(settings: Magnitude, latent_shape: tuple[int, int, int]) -> int:
    """Return how many conditions or pairs make a chunk, a multiple of the batch."""
    passes = {"prompt": 1, "pair": 2 * len(settings.timesteps), "trajectory": 2 * settings.steps}[settings.mode]
    area = max(latent_shape[1] * latent_shape[2] / _LATENT_SIZE, 1)
    batches = _PASSES / (passes * settings.seeds * area * settings.batch_size)
    return settings.batch_size * max(round(batches), 1)


# -- what a worker does -----------------------------------------------------------------------------------------------


def _note(scorer: Scorer) -> dict[str, Any]:
    return {**asdict(scorer.scoring), "smallest_batch": scorer.batch_size}


def _score_chunk(
    device: str,
    model: ModelFiles,
    settings: Magnitude,
    captions: list[str],
    ids: list[bytes],
    path: Path,
    digest: str,
) -> int:
    """Write the scores of a chunk of conditions; return their number."""
    scorer = warm_scorer(model, settings, device)
    found = scorer.measure(captions)
    columns = [pa.array([token_digest(i) for i in ids], pa.binary(16)), *_columns(found["magnitude"], scorer.scoring)]
    for name in SIGNALS:
        is_asked = name in found
        columns.append(found[name].mean(axis=1, dtype=np.float64) if is_asked else pa.nulls(len(ids), pa.float32()))
    write_table(path, pa.table(columns, schema=SCORES), digest, _note(scorer))
    return len(ids)


def _columns(norms: Floats, scoring: Scoring) -> tuple[Floats, pa.Array, pa.Array]:
    """Return magnitude, epsilon-scale magnitude and the values of all seeds and timesteps, a row a score."""
    raw = norms.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
    eps = scoring.on_epsilon_scale(norms)
    values = norms.reshape(len(norms), norms.shape[1] * norms.shape[2])
    return raw, pa.array(eps, mask=np.isnan(eps)), pa.array(list(values), pa.list_(pa.float32()))


def _score_shard(
    device: str,
    model: ModelFiles,
    settings: Magnitude,
    limits: Input,
    shard: Shard,
    signatures: Path,
    path: Path,
    digest: str,
) -> int:
    """Write the scores of a shard's pairs, one row a sample; return the number of samples.

    Its images are read again, and whole; parts that an earlier run finished are kept, and their images passed over.
    """
    scorer = warm_scorer(model, settings, device)
    table = read_table(signatures, ["uid", "key", "bad", "caption"])
    size = _chunk_size(settings, scorer.denoiser.latent_shape)
    good = np.flatnonzero(table["bad"].is_null().to_numpy())
    parts = [path.parent / path.stem / f"{start:06}.parquet" for start in range(0, len(good), size)]
    todo = {i: part for i, part in enumerate(parts) if not done(part, digest_of([digest, i, size]))}
    wanted = {int(row) for i in todo for row in good[i * size : (i + 1) * size]}
    read = _pictures(shard, table["key"].to_pylist(), wanted, scorer.denoiser.image_size, limits, signatures)
    try:
        for i, part in todo.items():
            rows = good[i * size : (i + 1) * size]
            found = list(islice(read, len(rows)))
            rows_of = _pair_rows(scorer, table.take(rows), found)
            write_table(part, rows_of, digest_of([digest, i, size]), _note(scorer))
        for _ in read if todo else ():  # to the end of the shard, which is checked there
            pass
    except ChangedShard:  # the finished parts are of other pictures
        shutil.rmtree(path.parent / path.stem, ignore_errors=True)
        raise
    scored = pa.concat_tables([PAIR_SCORES.empty_table(), *(read_table(part) for part in parts)])
    rows = np.full(len(table), len(scored))
    rows[good] = np.arange(len(good))
    columns = {name: scored[name].take(pa.array(rows, mask=rows == len(scored))) for name in PAIR_SCORES.names[1:]}
    smallest = min([scorer.batch_size, *(read_note(part)["smallest_batch"] for part in parts)])
    note = {**_note(scorer), "smallest_batch": smallest}
    write_table(path, pa.table({"uid": table["uid"], **columns}, schema=PAIR_SCORES), digest, note)
    shutil.rmtree(path.parent / path.stem, ignore_errors=True)
    return len(table)


def _pair_rows(scorer: Scorer, samples: pa.Table, found: list[Pixels | str]) -> pa.Table:
    """Return the rows of a chunk, null with its cause for a sample without pixels."""
    readable = [i for i, pixels in enumerate(found) if not isinstance(pixels, str)]
    captions = samples["caption"].to_pylist()
    shape = (0, *scorer.denoiser.image_size, 3)
    pixels = np.stack([found[i] for i in readable]) if readable else np.empty(shape, np.uint8)
    raw, eps, values = _columns(scorer.score_pairs([captions[i] for i in readable], pixels), scorer.scoring)
    place = np.full(len(found), len(readable))
    place[readable] = np.arange(len(readable))
    take = pa.array(place, mask=place == len(readable))
    causes = [pixels if isinstance(pixels, str) else None for pixels in found]
    columns = [samples["uid"].combine_chunks(), pa.array(raw).take(take), eps.take(take), values.take(take), causes]
    return pa.table(columns, schema=PAIR_SCORES)


def _pictures(
    shard: Shard, keys: list[str], wanted: set[int], size: tuple[int, int], limits: Input, signatures: Path
) -> Iterator[Pixels | str]:
    """Yield of each wanted sample, by its index, its image cropped to the model's size, or why it has none.

    The image is the one that a training script sees: `convert("RGB")` of it, whatever `images.ground` says.
    Raises ChangedShard when the shard is not the one that was signed.
    """
    try:
        yield from _read_pictures(shard, keys, wanted, size, limits, signatures)
    except ChangedShard:
        raise
    except ShardError as e:
        raise ShardError(str(e).replace(REMEDY, "bring the shard back, or take another magnitude.mode")) from e


def _read_pictures(
    shard: Shard, keys: list[str], wanted: set[int], size: tuple[int, int], limits: Input, signatures: Path
) -> Iterator[Pixels | str]:
    last = -1
    with open_shard(shard, limits.timeout) as members:
        for member in members:
            if member.index >= 0 and (member.index >= len(keys) or printable_key(member.key) != keys[member.index]):
                raise ChangedShard(shard.name, _AGAIN)
            if member.index in wanted and member.index != last and member.suffix in images.SUFFIXES:
                last = member.index
                try:
                    pixels = images.decode(member.read(), True, limits.max_pixels, ground=None).pixels
                    yield images.cropped(pixels, *size)
                except images.BadImage as e:
                    yield f"no magnitude: {e.detail}"
        if members.stored.digest != read_note(signatures)["digest"]:
            raise ChangedShard(shard.name, _AGAIN)
