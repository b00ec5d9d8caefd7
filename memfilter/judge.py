"""Which candidates are copies: pairs of samples are compared in detail when the grouping asks, each pair once.

What was found is stored, so that deciding again asks only for pairs that were not asked before, and a run that is
killed goes on.  A pair's score depends on its two pictures alone.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from . import comparison, details
from .alignment import METHOD, align
from .config import Config, digest_of
from .edges import similarity
from .encoders.recorded import Recorded
from .errors import RunError
from .records import JUDGED, Floats, Ints, Samples, voids
from .store import Store, done, read_table, replacing, write_table

_CHUNK = 64  # pairs whose pictures are held by a thread, at 196 kB each
_KEPT_AFTER = 60.0  # seconds of work that a kill may cost


class Judge:
    """Scores of pairs of samples, from the pictures and embeddings that the signatures store.

    `rows` are those that may be asked about.  Use it as a context: it writes files of their pictures and embeddings,
    and removes them.
    """

    def __init__(
        self, samples: Samples, store: Store, config: Config, inputs: str, rows: Ints, encoder: Recorded | None
    ) -> None:
        self.samples, self.store, self.rows = samples, store, rows
        self.embedded = encoder is not None
        self.gain = encoder.gain if encoder else 0.0
        self.similarity = similarity(config, encoder)
        self.threshold = config.images.match_threshold
        # not the processor or a library: a finished run stays as it is where these are others
        self.key = digest_of(["scores-2", inputs, comparison.identity(), METHOD])
        self._asked: list[pa.Table] = []
        self._written = time.monotonic()

    def __enter__(self) -> Judge:
        paths = [*self.store.places(self._path), self._unfinished]
        self._known = [read_table(path) for path in paths if done(path, self.key)]
        self._look_up()
        self._place = np.full(len(self.samples), -1, np.int64)
        self._place[self.rows] = np.arange(len(self.rows))
        self._digest = np.unique(voids(self.samples.table["digest"]), return_inverse=True)[1]
        if len(self.rows):
            self._shown = _Shown(self.samples, self.store, self.rows, self.embedded)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(cores)
        self._bar = tqdm(desc="comparison", unit="pair", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._bar.close()
        if len(self.rows):
            self._shown.remove()

    def accepts(self, a: Ints, b: Ints, by_hash: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether these pairs of rows are copies; pairs that are no neighbours by hash also need the embedding's word.

        That is a cosine, and gain times evidence of alignment, of at least `images.encoder_similarity`.
        """
        swap = self._digest[a] > self._digest[b]  # the order of a pair depends on its contents alone
        a, b = np.where(swap, b, a), np.where(swap, a, b)
        cosine = self.cosine(a, b) if self.embedded else np.zeros(len(a))
        evidence, score = np.zeros(len(a), np.float32), np.full(len(a), np.nan, np.float32)
        place, known = self._find(a, b)
        evidence[known], score[known] = self._evidence[place[known]], self._score[place[known]]
        missing = np.isnan(score) & (by_hash | ~known | self._supported(cosine, evidence))
        rows = np.flatnonzero(missing)
        starts = range(0, len(rows), _CHUNK)
        chunks = [rows[start : start + _CHUNK] for start in starts]
        compared = self._pool.map(lambda at: self._compare(a[at], b[at], cosine[at], by_hash[at]), chunks)
        for at, (found, scored) in zip(chunks, compared, strict=True):
            evidence[at], score[at] = found, scored
            self._bar.update(len(at))
        score[~(by_hash | self._supported(cosine, evidence))] = np.nan  # though another configuration had cause
        self._asked.append(pa.table([a, b, evidence, pa.array(score, mask=np.isnan(score))], schema=JUDGED))
        self._keep_some()
        accepted: npt.NDArray[np.bool_] = score >= np.float32(self.threshold)
        return accepted

    def cosine(self, a: Ints, b: Ints) -> npt.NDArray[np.float64]:
        """Return the cosines of the embeddings of pairs of rows."""
        found = np.empty(len(a))
        for start in range(0, len(a), 1 << 14):
            x, y = (self._embedding(rows[start : start + (1 << 14)]) for rows in (a, b))
            length = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
            found[start : start + (1 << 14)] = np.einsum("ij,ij->i", x, y) / np.maximum(length, 1e-300)
        return found

    def finish(self) -> None:
        """Write what was asked, and nothing else: a fresh run with this configuration writes the same."""
        table = _sorted(self._asked)
        path = self.store.place(self._path, self.key)
        if not done(path, self.key) or not read_table(path).equals(table):
            write_table(self._path, table, self.key)
        self._unfinished.unlink(missing_ok=True)
        self._known, self._asked = [table], []
        self._look_up()

    def scores(self, a: Ints, b: Ints) -> Floats:
        """Return the scores of pairs that were asked about before `finish`."""
        swap = self._digest[a] > self._digest[b]
        place, _ = self._find(np.where(swap, b, a), np.where(swap, a, b))
        found: Floats = self._score[place] if len(a) else np.empty(0, np.float32)
        return found

    def _supported(self, cosine: npt.NDArray[np.float64], evidence: Floats) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = cosine + self.gain * evidence >= self.similarity - 1e-7
        return found & self.embedded

    def _compare(
        self, a: Ints, b: Ints, cosine: npt.NDArray[np.float64], by_hash: npt.NDArray[np.bool_]
    ) -> tuple[Floats, Floats]:
        """Return evidence of each pair, and score where it is worth the comparison, else NaN."""
        rows, place = np.unique(np.stack([a, b]), return_inverse=True)
        one, other = place.reshape(2, -1)
        shown = np.empty((len(rows), *comparison.SHAPE), np.float32)
        for at, planes in zip(self._place[rows], shown, strict=True):
            comparison.planes(self._shown.picture(at), planes)
        aligned = align(comparison.thumbnails(shown), one, other)
        score = np.full(len(a), np.nan, np.float32)
        wanted = np.flatnonzero(by_hash | self._supported(cosine, aligned.evidence))
        if len(wanted):
            found = comparison.features(shown, one[wanted], other[wanted], aligned.of(wanted))
            score[wanted] = comparison.scores(found)
        return aligned.evidence, score

    def _embedding(self, rows: Ints) -> npt.NDArray[np.float64]:
        return self._shown.embeddings[self._place[rows]].astype(np.float64)

    # -- what is known --

    def _look_up(self) -> None:
        table = _sorted(self._known)
        self._keys = table["a"].to_numpy() * len(self.samples) + table["b"].to_numpy()
        self._evidence, self._score = table["evidence"].to_numpy(), table["score"].to_numpy()

    def _find(self, a: Ints, b: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        key = a * len(self.samples) + b
        place = np.minimum(np.searchsorted(self._keys, key), max(len(self._keys) - 1, 0))
        return place, (self._keys[place] == key) if len(self._keys) else np.zeros(len(a), np.bool_)

    def _keep_some(self) -> None:
        if time.monotonic() - self._written > _KEPT_AFTER:
            write_table(self._unfinished, _sorted([*self._known, *self._asked]), self.key)
            self._written = time.monotonic()

    @property
    def _path(self) -> Path:
        return self.store.edges / "scores.parquet"

    @property
    def _unfinished(self) -> Path:
        return self.store.edges / "scores-unfinished.parquet"


def _sorted(tables: list[pa.Table]) -> pa.Table:
    """Return judged pairs in the order of their rows, each once: with a score where one has it."""
    table = pa.concat_tables([JUDGED.empty_table(), *tables]).combine_chunks()
    a, b, score = (table[name].to_numpy() for name in ("a", "b", "score"))  # NaN for null
    order = np.lexsort((np.isnan(score), b, a))
    a, b = a[order], b[order]
    first = np.r_[True, (a[1:] != a[:-1]) | (b[1:] != b[:-1])][: len(a)]
    return table.take(pa.array(order[first]))


class _Shown:
    """Pictures and embeddings of some rows, sorted, in two files that are mapped: they take 8 bytes a row."""

    def __init__(self, samples: Samples, store: Store, rows: Ints, has_embeddings: bool) -> None:
        self._store, self._paths = store, (store.edges / "pictures.bin", store.edges / "embeddings.bin")
        ends, columns = [np.zeros(1, np.int64)], ["picture", *(["embedding"] if has_embeddings else [])]
        # by another name first: what lies at the path may be a link to somebody's file
        with (
            replacing(self._paths[0]) as one,
            replacing(self._paths[1]) as other,
            open(one, "wb") as pictures,
            open(other, "wb") as embeddings,
        ):
            for shard, first, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
                start, stop = np.searchsorted(rows, [first, end])
                if stop > start:
                    part = read_table(store.signatures(shard.name), columns).take(pa.array(rows[start:stop] - first))
                    found = part["picture"].fill_null(b"").to_pylist()
                    pictures.write(b"".join(found))
                    ends.append(ends[-1][-1] + np.cumsum([len(picture) for picture in found]))
                if stop > start and has_embeddings:
                    dim = part["embedding"].type.list_size
                    flat = part["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                    if len(flat) != (stop - start) * dim:
                        raise RunError(
                            f"{store.signatures(shard.name)}: damaged, embeddings are missing; read the input again"
                        )
                    embeddings.write(flat.astype(np.float16).tobytes())
        self._ends = np.concatenate(ends)
        self._pictures = np.memmap(self._paths[0], np.uint8, "r") if self._ends[-1] else np.empty(0, np.uint8)
        self.embeddings: npt.NDArray[np.float16] = np.empty((0, 0), np.float16)
        if has_embeddings:
            self.embeddings = np.memmap(self._paths[1], np.float16, "r", shape=(len(rows), dim))

    def picture(self, at: int) -> details.Pixels:
        """Return the picture at this place; raises RunError where it is damaged."""
        try:
            return details.unpacked(self._pictures[self._ends[at] : self._ends[at + 1]].tobytes())
        except ValueError as e:
            raise RunError(
                f"{self._store.path}: a stored picture is damaged ({e}); read the input again, into another --out"
            ) from e

    def remove(self) -> None:
        """Remove the files."""
        del self._pictures, self.embeddings
        for path in self._paths:
            path.unlink(missing_ok=True)
