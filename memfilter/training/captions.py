"""Captions changed while training so that they are less of a key to their images (Somepalli et al. 2023, Li et al.).

A `Mitigation` applies one change or several to the captions of a data set, as a webdataset stage or one at a time.
What is drawn depends on its seed, the epoch and the sample alone: not on workers, order or batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..errors import ConfigError, RunError, in_one_line
from ..insertions import insert_tokens, random_caption, repeat_words, seeded
from ..manifest import path_of

log = logging.getLogger(__name__)

Change = Callable[[str, Sequence[str], np.random.Generator], str]
"""What makes a caption of a caption, the sample's pool (empty for none) and a generator of its own."""

_WORKERS = 4096  # of one data loader, at most; the main process is one more


class MultipleCaptions:
    """MC: any caption of the sample's pool, drawn uniformly; without a pool it stays as it is."""

    def __call__(self, caption: str, pool: Sequence[str], random: np.random.Generator) -> str:
        """Return the caption to train with."""
        return pool[int(random.integers(len(pool)))] if pool else caption


@dataclass(frozen=True)
class GeneralCaption:
    """The general caption in the sample's pool, if it has one (Li et al.), with a probability, always by default.

    `general` are the run's general captions, those that `memfilter generalise` made.  As none over the magnitude
    threshold is in a pool, none is taken.
    """

    general: Collection[str]
    probability: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def load(cls, run: str | Path, probability: float = 1.0) -> GeneralCaption:
        """Return the change to the general captions of a run's directory; raises RunError when it has none."""
        file = Path(run) / "generalised" / "captions.parquet"
        try:
            column = pq.read_table(file, columns=["general"])["general"]
        except FileNotFoundError:
            raise RunError(f"{run}: holds no general captions; make them with 'memfilter generalise {run}'") from None
        except (OSError, pa.ArrowException) as e:
            raise RunError(f"{file}: damaged ({in_one_line(e)}); run 'memfilter generalise {run}' again") from e
        return cls(frozenset(column.drop_null().to_pylist()), probability)

    def __call__(self, caption: str, pool: Sequence[str], random: np.random.Generator) -> str:
        """Return the caption to train with."""
        if random.random() >= self.probability:
            return caption
        # the form of the sample's own caption stands last; those of its copies' captions may stand before
        return next((text for text in reversed(pool) if text in self.general), caption)


@dataclass(frozen=True)
class RandomCaption:
    """RC: with a probability, `count` tokens of a `vocabulary` in the caption's place, written as one text.

    Words of one's own, instead of a vocabulary, each need a space behind.
    """

    tokens: Sequence[str]
    probability: float = 0.1
    count: int = 4

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, caption: str, pool: Sequence[str], random: np.random.Generator) -> str:
        """Return the caption to train with."""
        return random_caption(self.tokens, random, self.count) if random.random() < self.probability else caption


@dataclass(frozen=True)
class RandomTokens:
    """RT: with a probability, `count` tokens of a `vocabulary` inserted, each at a random place between words."""

    tokens: Sequence[str]
    probability: float = 0.1
    count: int = 2

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, caption: str, pool: Sequence[str], random: np.random.Generator) -> str:
        """Return the caption to train with."""
        return (
            insert_tokens(caption, self.tokens, random, self.count) if random.random() < self.probability else caption
        )


@dataclass(frozen=True)
class RepeatedWords:
    """CWR: with a probability, `count` of the caption's own words inserted, each at a random place between words."""

    probability: float = 0.1
    count: int = 2

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, caption: str, pool: Sequence[str], random: np.random.Generator) -> str:
        """Return the caption to train with."""
        return repeat_words(caption, random, self.count) if random.random() < self.probability else caption


def sample_seed(seed: int, epoch: int, *names: int | str | bytes) -> int:
    """Return the seed, from 0 to under 2**63, of all that is drawn for the sample of these names in this epoch."""
    return int(seeded(seed, epoch, *names).integers(2**63))


class Mitigation:
    """A webdataset stage that applies changes to captions, one after the other, and gives each sample its `seed`.

    It comes after `Manifest.attach`, whose pools it takes from `sample["captions"]`, and before or after `decode`; the
    caption is `sample[caption]`, text or UTF-8.  Where a policy hands samples over to mitigation, only those whose
    `sample["mitigate"]` is true are changed; without that key every sample is.  A caption that is not in the sample's
    pool is memorized (or blank), and one of the pool takes its place before anything else, whoever is handed over.

    `sample["seed"]` is an int for the functions of `memfilter.training` that draw for embeddings.  A sample is known by
    its shard's base name, its key and its caption.  The draws of one kind of change do not depend on the others.

    Each pass over the data is an epoch, counted from 0 for each worker, in memory that the workers of a DataLoader
    share; so a stage belongs to one loader, with one number of workers.  In a stream that never ends, of resampled
    shards, an epoch ends where the first sample of it comes again.  `set_epoch` before a pass sets its number, as when
    a training goes on.
    """

    def __init__(self, *changes: Change, seed: int = 0, caption: str = "txt") -> None:
        kinds = [getattr(change, "__name__", type(change).__name__) for change in changes]
        self.changes = [(f"{kind} {kinds[:i].count(kind)}", changes[i]) for i, kind in enumerate(kinds)]
        self.seed, self.caption = seed, caption
        self._passes = torch.zeros(_WORKERS + 1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass over the data that of this epoch, in every worker, persistent ones too."""
        self._passes.fill_(epoch)

    def change(self, caption: str, seed: int, captions: Sequence[str] | None = None) -> str:
        """Return the caption that a sample trains with, for loops without webdataset.

        `seed` is its `sample_seed` of the epoch, `captions` its pool.
        """
        pool = captions or ()
        caption = _passing(caption, pool, seed)
        for name, change in self.changes:
            caption = change(caption, pool, seeded(seed, name))
        return caption

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield every sample, its caption changed and its seed set; raises ConfigError for one without a caption."""
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id + 1
        epoch, first, seen, pooled = self._next_epoch(place), None, 0, 0
        for sample in samples:
            if "__key__" in sample:  # webdataset marks the end of a shard by an empty sample
                sample = dict(sample)  # one that comes again, from a list, comes with its own caption
                name = (*_place(sample), self._text(sample))
                if name == first:
                    epoch = self._next_epoch(place)
                first = first or name
                self._mitigate(sample, sample_seed(self.seed, epoch, *name), name[-1])
                seen, pooled = seen + 1, pooled + ("captions" in sample)
            yield sample
        if seen and not pooled and any(isinstance(c, MultipleCaptions | GeneralCaption) for _, c in self.changes):
            log.warning("none of %d samples has a pool of captions; take attach(captions='pool')", seen)

    def _next_epoch(self, place: int) -> int:
        epoch = int(self._passes[place])
        self._passes[place] += 1
        return epoch

    def _text(self, sample: dict[str, Any]) -> str:
        text = sample.get(self.caption)
        if not isinstance(text, str | bytes):
            raise ConfigError(
                f"sample {sample['__key__']!r} has no text in {self.caption!r}: name the member that holds captions "
                "with Mitigation(caption=...), or set it to the empty caption before"
            )
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else text

    def _mitigate(self, sample: dict[str, Any], seed: int, own: str) -> None:
        sample["seed"] = seed
        pool = sample.get("captions") or ()
        made = self.change(own, seed, pool) if sample.get("mitigate", True) else _passing(own, pool, seed)
        if made != own:
            sample[self.caption] = made.encode() if isinstance(sample[self.caption], bytes) else made


def _place(sample: dict[str, Any]) -> tuple[str, str]:
    """Return the base name of a sample's shard, and its key."""
    return path_of(str(sample.get("__url__", ""))).rsplit("/", 1)[-1], sample["__key__"]


def _passing(caption: str, pool: Sequence[str], seed: int) -> str:
    """Return the caption, or one of its pool where that does not hold it."""
    if not pool or caption in pool:
        return caption
    return MultipleCaptions()(caption, pool, seeded(seed, "pool"))


def _check(change: GeneralCaption | RandomCaption | RandomTokens | RepeatedWords) -> None:
    name = type(change).__name__
    if not 0 <= change.probability <= 1:
        raise ConfigError(f"{name}(probability={change.probability}): from 0 to 1")
    if not isinstance(change, GeneralCaption) and change.count < 1:
        raise ConfigError(f"{name}(count={change.count}): at least 1")
    if isinstance(change, RandomCaption | RandomTokens) and not len(change.tokens):
        raise ConfigError(f"{name}: the vocabulary holds no token; take memfilter.insertions.vocabulary(tokenizer)")
