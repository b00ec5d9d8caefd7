"""Text-conditional prediction magnitudes of distinct captions, from a model that is loaded once and kept warm.

The score of Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, at the first
step: the L2 norm of e(x_T, t, caption) - e(x_T, t, unconditional) over the whole latent, for pure noise x_T at the
first timestep of a 50-step DDIM schedule (a flow's own), averaged over seeds.  Higher means memorized.  Every caption
meets the same noise, so the unconditional prediction is computed once a seed, and captions with equal token ids are
scored once.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from . import calibration
from .config import Config, FalsePositiveRate, LabelledRate, Quantile, digest_of
from .denoisers import Condition, Denoiser, ModelFiles, find_model, load_denoiser, token_digest
from .errors import ConfigError, ModelError, in_one_line
from .precision import rounding_errors
from .records import ROUNDING, SCORES, Floats, Ints, Scores
from .store import Store, done, file_digest, read_note, read_table, write_table

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

STEPS = 50
_CHUNK = 2048  # distinct conditions a checkpoint
_LOWEST_FACTOR = 0.01  # below it the epsilon scale says nothing
_LIBRARIES = ("diffusers", "torch", "transformers")


@dataclass(frozen=True)
class Scoring:
    """What a score depends on beside its caption."""

    prediction_type: str
    timestep: int
    latent_shape: tuple[int, ...]
    seeds: int
    device: str
    dtype: str
    eps_factor: float
    denoiser: dict[str, Any]  # the unconditional, and what else the adapter gives the model


class Scorer:
    """A warm denoiser with its noise bank and its unconditional predictions.

    Usable on its own: `Scorer.load("path").score(["a caption"])`.
    """

    def __init__(self, denoiser: Denoiser, seeds: int = 1, batch_size: int = 64) -> None:
        import torch

        self.denoiser, self.batch_size = denoiser, batch_size
        timestep = denoiser.first_timestep(STEPS)
        # drawn on the CPU in float32, so that every device and dtype sees the same noise
        noise = [torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(s)) for s in range(seeds)]
        self.noise = torch.stack(noise).to(denoiser.device, denoiser.dtype)
        with torch.inference_mode():
            # in a full batch, so that it takes the same path through the kernels as the captions do
            nothing = denoiser.unconditional(batch_size)
            self.unconditional = [self._predict(x, timestep, nothing)[:1] for x in self.noise]
        self.scoring = Scoring(
            denoiser.prediction_type,
            timestep,
            tuple(denoiser.latent_shape),
            seeds,
            denoiser.device.type,
            str(denoiser.dtype).removeprefix("torch."),
            eps_factor(denoiser.prediction_type, denoiser.alpha_bar(timestep)),
            {"family": type(denoiser).__name__, **denoiser.settings},
        )

    @classmethod
    def load(cls, spec: str, seeds: int = 1, dtype: str = "auto", batch_size: int = 64) -> Scorer:
        """Return a scorer over the pipeline in a folder or under a hub id; raises ModelError."""
        return cls(load_denoiser(find_model(spec), dtype), seeds, batch_size)

    def score(self, captions: list[str]) -> Floats:
        """Return (N, seeds) float32 raw magnitudes, one row a caption; equal token ids are scored once.

        Raises ModelError for predictions that are not finite, or that do not fit into memory.
        """
        import torch

        ids = self.denoiser.token_ids(captions) if captions else []
        order, first = _conditions(ids)
        norms = np.empty((len(order), len(self.noise)), np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = [captions[first[condition]] for condition in order[start : start + self.batch_size]]
            try:
                norms[start : start + len(batch)] = self._norms(batch)
            except torch.cuda.OutOfMemoryError as e:
                raise ModelError(f"out of memory with {self.batch_size} captions; lower magnitude.batch_size") from e
        place = {condition: i for i, condition in enumerate(order)}
        return norms[[place[condition] for condition in ids]]

    def _norms(self, captions: list[str]) -> Floats:
        import torch

        with torch.inference_mode():
            # a short batch is filled up, for the same reason
            condition = self.denoiser.encode(captions + [""] * (self.batch_size - len(captions)))
            columns = []
            for x, unconditional in zip(self.noise, self.unconditional, strict=True):
                prediction = self._predict(x, self.scoring.timestep, condition)
                columns.append((prediction - unconditional).flatten(1).norm(dim=1))
            norms: Floats = torch.stack(columns, dim=1)[: len(captions)].cpu().numpy()
        if not np.isfinite(norms).all():
            worst = captions[int(np.argmin(np.isfinite(norms).all(1)))]
            hint = (
                "its weights are damaged"
                if self.scoring.dtype == "float32"
                else "set magnitude.dtype: float32, or bfloat16"
            )
            raise ModelError(f"the prediction for {worst[:60]!r} is not finite in {self.scoring.dtype}; {hint}")
        return norms

    def _predict(self, x: torch.Tensor, timestep: int, condition: Condition) -> torch.Tensor:
        return self.denoiser.predict(x.expand(len(condition), *x.shape), timestep, condition).float()


def _conditions(ids: list[bytes]) -> tuple[list[bytes], dict[bytes, int]]:
    """Return the distinct ids, and of each the first place that it has.

    They are sorted, so that a batch holds the same captions whatever order they came in.
    """
    first: dict[bytes, int] = {}
    for i, condition in enumerate(ids):
        first.setdefault(condition, i)
    return sorted(first), first


def eps_factor(prediction_type: str, alpha_bar: float) -> float:
    """Return |f| with which a difference of raw predictions becomes one of noise predictions.

    `alpha_bar` is the square of the image's factor in x_t: of a flow it is (1 - sigma)^2.
    """
    factors = {
        "epsilon": 1.0,
        "v_prediction": alpha_bar**0.5,
        "flow": alpha_bar**0.5,
        "sample": alpha_bar**0.5 / max(1 - alpha_bar, 1e-12) ** 0.5,
    }
    if prediction_type not in factors:
        raise ModelError(f"prediction type {prediction_type!r} is none of {', '.join(factors)}")
    return float(factors[prediction_type])


# -- the stage --------------------------------------------------------------------------------------------------------


Progress = Callable[[Iterator[int], int], Iterator[int]]


def score_captions(
    texts: pa.ChunkedArray,
    captions_digest: str,
    model: ModelFiles | None,
    store: Store,
    config: Config,
    progress: Progress,
    generalised: pa.ChunkedArray | None = None,
) -> Scores | None:
    """Return the scores of the distinct captions, computed now or by an earlier run; None without a model.

    Those of `generalised` captions have a table of their own, so that the others stay as they are.

    Scoring goes through fixed chunks of distinct conditions in the order of their token ids; each finished chunk is a
    file.  Raises ModelError, and ConfigError for a reference file or a labelled list that cannot be used.
    """
    settings = config.magnitude
    if model is None:
        return None
    base = digest_of(["scores-2", model.files, _numbers(config), _device(), {n: version(n) for n in _LIBRARIES}])

    @cache
    def scorer() -> Scorer:
        # loaded when a table is missing, once, whatever is missing
        return Scorer(load_denoiser(model, settings.dtype), settings.seeds, settings.batch_size)

    def further(name: str, captions: pa.ChunkedArray) -> Floats:
        digest = digest_of([base, name, captions.to_pylist()])
        table, _ = _table(captions, digest, store.scores / f"{name}.parquet", scorer, progress)
        magnitude: Floats = table["magnitude"].to_numpy()
        return magnitude

    wanted = settings.threshold
    lines = _reference(Path(wanted.reference)) if isinstance(wanted, FalsePositiveRate) else None
    labelled = calibration.read_labelled(Path(wanted.labelled)) if isinstance(wanted, LabelledRate) else None
    digest = digest_of([base, captions_digest])
    own, info = _table(texts, digest, store.scores / "captions.parquet", scorer, progress)
    info = {"model": model.name, "files": model.files, **info}
    info["noise_floor"] = _noise_floor(model, info["dtype"], base, store, scorer)
    reference = further("reference", lines) if lines is not None else None
    if isinstance(wanted, LabelledRate) and labelled is not None:
        found = further("labelled", pa.chunked_array([labelled.captions]))
        reference = found[~labelled.is_memorized]
        info["calibration"] = _calibration(wanted, found[labelled.is_memorized], reference)
    general = further("generalised", generalised) if generalised is not None else None
    return Scores(own["magnitude"].to_numpy(), own["magnitude_eps"].to_numpy(), reference, info, general)


def _calibration(wanted: LabelledRate, memorized: Floats, others: Floats) -> dict[str, Any]:
    return {
        "digest": file_digest(Path(wanted.labelled)),
        **calibration.measures(memorized, others),
        **calibration.operating_point(memorized, others, wanted.false_positive_rate),
    }


def _noise_floor(model: ModelFiles, dtype: str, base: str, store: Store, scorer: Callable[[], Scorer]) -> float | None:
    """Return what rounding may do to a magnitude, measured now or before; None for float32, or where it cannot be."""
    if dtype == "float32":
        return None
    path, digest = store.scores / "noise_floor.parquet", digest_of([base, "noise floor"])
    if not done(path, digest):
        import torch

        try:
            errors = rounding_errors(scorer().denoiser, load_denoiser(model, "float32"), STEPS)
        except (ModelError, torch.cuda.OutOfMemoryError) as e:
            # the scores are there, and stay good without it
            log.warning("the noise floor of %s is unknown: the model in float32: %s", dtype, in_one_line(e))
            return None
        write_table(path, pa.table([errors], schema=ROUNDING), digest)
    return float(read_table(path)["error"].to_numpy().max())


def _numbers(config: Config) -> str:
    return config.digest("magnitude.mode", "magnitude.seeds", "magnitude.dtype", "magnitude.batch_size")


@cache
def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _table(
    texts: pa.ChunkedArray,
    digest: str,
    path: Path,
    scorer: Callable[[], Scorer],
    progress: Progress,
) -> tuple[pa.Table, dict[str, Any]]:
    """Return one row a caption, scored now or before, and what the scores depend on."""
    chunks = path.parent / path.stem
    if done(path, digest):
        shutil.rmtree(chunks, ignore_errors=True)
        return read_table(path), read_note(path)
    warm = scorer()
    captions: list[str] = texts.to_pylist()
    ids: list[bytes] = []
    for start in range(0, len(captions), 8192):
        ids += warm.denoiser.token_ids(captions[start : start + 8192])
    order, first = _conditions(ids)
    parts: list[pa.Table] = []
    starts = range(0, len(order), _CHUNK)
    log.info("scoring %d conditions of %d distinct captions", len(order), len(captions))
    for start in progress(iter(starts), len(starts)):
        part = chunks / f"{start // _CHUNK:06}.parquet"
        part_digest = digest_of([digest, start, _CHUNK])
        if not done(part, part_digest):
            chunk = order[start : start + _CHUNK]
            per_seed = warm.score([captions[first[c]] for c in chunk])
            write_table(part, _scores(chunk, per_seed, warm.scoring), part_digest)
        parts.append(read_table(part))
    scored = pa.concat_tables(parts) if parts else SCORES.empty_table()
    place = {condition: i for i, condition in enumerate(order)}
    table = scored.take(pa.array([place[condition] for condition in ids], pa.int64())).combine_chunks()
    info = {**asdict(warm.scoring), "conditions": len(order)}
    write_table(path, table, digest, info)
    shutil.rmtree(chunks, ignore_errors=True)
    return table, read_note(path)


def _scores(ids: list[bytes], per_seed: Floats, scoring: Scoring) -> pa.Table:
    raw = per_seed.mean(axis=1, dtype=np.float64).astype(np.float32)
    eps = raw * np.float32(scoring.eps_factor / np.sqrt(np.prod(scoring.latent_shape)))
    scaled = pa.array(eps, mask=np.full(len(eps), scoring.eps_factor < _LOWEST_FACTOR))
    return pa.table([[token_digest(i) for i in ids], raw, scaled, list(per_seed)], schema=SCORES)


def _reference(path: Path) -> pa.ChunkedArray:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: the reference captions cannot be read: {e}") from e
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{path}: holds no reference caption; give one a line")
    return pa.chunked_array([lines])


# -- the threshold ----------------------------------------------------------------------------------------------------


def check_threshold(config: Config) -> None:
    """Raise ConfigError when the threshold cannot be had: no model to score with, or no captions to take it from."""
    wanted = config.magnitude.threshold
    if wanted is not None and config.magnitude.model is None:
        raise ConfigError("magnitude.threshold is given and no model to score with; give --model or magnitude.model")
    if isinstance(wanted, FalsePositiveRate):
        _reference(Path(wanted.reference))
    elif isinstance(wanted, LabelledRate):
        calibration.read_labelled(Path(wanted.labelled))


def threshold(config: Config, scores: Scores | None, samples: Ints) -> float | None:
    """Return the magnitude at or above which a sample counts as memorized; None when none was asked for.

    `samples` holds the caption of each good sample, of whose magnitudes a quantile is taken.  For a false-positive
    rate it is the lowest value that at most that share of the reference captions, or of those labelled 0, reach.
    Raises ConfigError for one below the noise floor of the precision.
    """
    limit = _limit(config, scores, samples)
    floor = scores.info.get("noise_floor") if scores else None
    if scores and limit is not None and floor is not None and limit < floor:
        raise ConfigError(
            f"magnitude.threshold comes to {limit:.4g}, below the noise floor of {scores.info['dtype']}, {floor:.4g}, "
            "which rounding alone may reach; give a higher one, or set magnitude.dtype: float32"
        )
    return limit


def _limit(config: Config, scores: Scores | None, samples: Ints) -> float | None:
    wanted = config.magnitude.threshold
    if wanted is None or scores is None:
        return None
    if isinstance(wanted, float):
        return wanted
    if isinstance(wanted, Quantile):
        own = scores.magnitude[samples]
        return float(np.quantile(own, wanted.quantile, method="higher")) if len(own) else None
    assert scores.reference is not None
    return calibration.threshold_at_fpr(scores.reference, wanted.false_positive_rate)
