"""Signatures of all shards -> candidates: pairs of images that may be copies, by hash and by embedding.

Joined once: candidates are stored wider than the configuration asks for, so that another threshold needs no other join.
Whether they are copies, `judge` decides.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from threadpoolctl import threadpool_limits

from .config import Config, digest_of
from .embedding_join import METHOD, Join, embedding_join
from .encoders import UNCALIBRATED
from .encoders.recorded import Encoders, Recorded
from .errors import printable
from .hash_join import hash_join
from .records import EDGES, HUBS, Floats, Indices, Ints, Samples, Shard, voids
from .store import Store, done, new_array, read_digest, read_table, replacing, write_table

log = logging.getLogger(__name__)

_RADIUS = 6  # edges are stored up to here
_PDQ_RADIUS = 31  # the widest that the configuration allows: its join is drawn for one radius
_MARGIN = 0.05  # below the encoder's own similarity, down to which edges are stored
_ROUNDING = 1e-7
_LOWEST = 0.1  # cosine of a pair that is worth aligning
_ALWAYS = 0.6  # cosine of one that is aligned even where copies abound: of photos at random one pair in 10^6 has it
_NEAREST = 16  # pairs of a row that are kept of those under a cosine of 0.9
_SURE = 0.9
_PAIRS_A_ROW = 5  # that are aligned, of the nearest ones: about as long as signing takes
_MOST_A_ROW = 32  # that are listed at all, where there are
_MOST_PAIRS = 20_000_000  # of them or more
_CROWD = 1000  # rows nearer than _SURE to one row, from which on they are a hub
_NEAR_HUB, _HUBS_A_ROW = 0.8, 3  # cosine to a hub's centre, and number of hubs, with which a row belongs to it
_SAMPLED = 1024  # rows by which the pairs at a cosine are estimated
_BLOCK = 1 << 14
_PART, _PART_BLOCK = 50_000, 512  # rows of a hub that are compared with each other, so many at a time


@dataclass(frozen=True)
class Candidates:
    """Pairs of rows that may be copies, and crowds of rows that all may be copies of each other.

    `hashes` has the edges between rows that represent those of their hash, `pairs` those between rows that represent
    those of their content digest.  Blank images are in none of them.
    """

    hashes: pa.Table
    pairs: pa.Table
    hubs: pa.Table
    encoder: Recorded | None

    def rows(self, samples: Samples) -> npt.NDArray[np.bool_]:
        """Whether each sample stands in any of them, or shares a hash with another one."""
        found = np.zeros(len(samples), np.bool_)
        for table in (self.pairs, self.hashes):
            found[table["a"].to_numpy()] = found[table["b"].to_numpy()] = True
        found[self.hubs["row"].to_numpy()] = True
        compared = np.flatnonzero(hashed(samples))
        _, place, count = np.unique(hashes_of(samples)[compared], return_inverse=True, return_counts=True)
        represents = np.zeros(len(count), np.bool_)
        represents[place[found[compared]]] = True
        found[compared] |= (count > 1)[place] | represents[place]
        return found


def signatures_digest(shards: list[Shard], store: Store) -> str:
    """Return the digest of all signature parts, in the order of their names."""
    return digest_of([[s.name, read_digest(store.signatures(s.name))] for s in shards])


def similarity(config: Config, encoder: Recorded | None) -> float:
    """Return the cosine from which on images are candidates: the configured one, or the encoder's own."""
    return config.images.encoder_similarity or (_own_similarity(encoder) if encoder else 1.0)


def find_candidates(samples: Samples, store: Store, config: Config, encoders: Encoders | None = None) -> Candidates:
    """Return the candidates that the configuration asks for, joined now or by an earlier run; the files hold more.

    The `encoders` are those that the configuration names, unless they are given.
    """
    encoder = (encoders or Encoders.of(config)).images
    hash_edges = _hash_edges(samples, store, config)
    near = hash_edges.filter(pc.less_equal(hash_edges["distance"], pa.scalar(config.images.hash_radius, pa.float32())))
    if encoder is None:
        return Candidates(near, EDGES.empty_table(), HUBS.empty_table(), None)
    if encoder.similarity is None and config.images.encoder_similarity is None:
        log.warning(
            "%s: the cosine of its copies was never measured; %.2f is used, or set images.encoder_similarity",
            printable(config.images.encoder or ""),
            UNCALIBRATED,
        )
    pairs, hubs = _embedding_edges(samples, store, encoder, similarity(config, encoder))
    reach = 1 - similarity(config, encoder) + encoder.gain + _ROUNDING  # alignment may add as much
    return Candidates(
        near, pairs.filter(pc.less_equal(pairs["distance"], pa.scalar(reach, pa.float32()))), hubs, encoder
    )


def hashed(samples: Samples) -> npt.NDArray[np.bool_]:
    """Whether each sample's hash takes part in the join.  Blank and low-quality images do not."""
    valid: npt.NDArray[np.bool_] = samples.table["hash"].is_valid().to_numpy()
    return samples.compared & valid


def hashes_of(samples: Samples) -> npt.NDArray[np.void] | npt.NDArray[np.uint64]:
    """Return the perceptual hash of every sample, zeros where it has none."""
    column = samples.table["hash"]
    return column.fill_null(0).to_numpy() if column.type == pa.uint64() else voids(column)


def words(hashes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return hashes as rows of 64-bit words."""
    return hashes.view(np.uint64).reshape(len(hashes), hashes.itemsize // 8)


def _own_similarity(encoder: Recorded) -> float:
    return encoder.similarity or UNCALIBRATED


def _hash_edges(samples: Samples, store: Store, config: Config) -> pa.Table:
    radius = max(config.images.hash_radius, _PDQ_RADIUS if config.images.hash == "pdq" else _RADIUS)
    key = digest_of(["hash-edges-2", signatures_digest(samples.shards, store), radius])
    path = store.place(store.edges / "hash.parquet", key)
    if not done(path, key):
        rows = np.flatnonzero(hashed(samples))
        values, place = np.unique(hashes_of(samples)[rows], return_index=True)
        pairs = hash_join(words(values), radius, store.edges / "hash")
        write_table(path, _edges(pairs, rows[place]), key)
    return read_table(path)


def _embedding_edges(samples: Samples, store: Store, encoder: Recorded, wanted: float) -> tuple[pa.Table, pa.Table]:
    """Return the pairs and the hubs that are stored."""
    own, gain = _own_similarity(encoder), encoder.gain
    lowest = max(min(wanted, own - _MARGIN) - gain, _LOWEST) if gain else min(wanted, own - _MARGIN)
    inputs = signatures_digest(samples.shards, store)
    key = digest_of(["embedding-edges-5", inputs, lowest, gain, METHOD])
    new = store.edges / "embedding.parquet", store.edges / "hubs.parquet"
    path, hubs_path = (store.place(one, key) for one in new)
    work = store.edges / f"embedding-{key}"  # what a killed join left there is its own
    if not (done(path, key) and done(hubs_path, key)):
        path, hubs_path = new
        compared = np.flatnonzero(samples.compared)
        _, place = np.unique(voids(samples.table["digest"])[compared], return_index=True)
        rows = compared[np.sort(place)]
        # k-means depends on the order of its rows, and this one on nothing but the samples
        rows = rows[np.argsort(voids(samples.table["uid"])[rows], kind="stable")]
        if not (work / "rows.npy").exists():
            _write_embeddings(samples, store, rows, work / "rows.npy")
        embeddings = np.load(work / "rows.npy", mmap_mode="r", allow_pickle=False)
        hub, members = _hubs(embeddings)
        lowest = _affordable(embeddings, hub, lowest) if gain else lowest
        join = embedding_join(embeddings, lowest, work, hub)
        near = _nearest(join, len(rows)) if gain else np.ones(len(join.a), np.bool_)
        a, b, distance = _nearest_in_hubs(embeddings, hub)
        a, b = np.concatenate([join.a[near], a]), np.concatenate([join.b[near], b])
        table = _edges((a, b, np.concatenate([join.distance[near], distance])), rows)
        about = {"rows": len(rows), "pairs": len(table), "cells": join.cells, "probes": join.probes}
        note = {**about, "lowest": lowest, "hubs": len(np.unique(members[1])), "recall": asdict(join.recall)}
        order = np.lexsort((members[1], rows[members[0]]))
        write_table(hubs_path, pa.table([rows[members[0]][order], members[1][order]], schema=HUBS), key)
        write_table(path, table, key, note)
    for left_over in store.edges.glob("embedding-*"):
        shutil.rmtree(left_over)
    return read_table(path), read_table(hubs_path)


def _sample(n: int) -> Ints:
    found: Ints = np.sort(np.random.default_rng(0).choice(n, min(n, _SAMPLED), replace=False))
    return found


def _blocks(embeddings: npt.NDArray[np.float16], others: Floats) -> Any:
    """Yield the first row of each block, and the cosines of its rows with the others."""
    for start in range(0, len(embeddings), _BLOCK):
        yield start, embeddings[start : start + _BLOCK].astype(np.float32) @ others.T


def _hubs(embeddings: npt.NDArray[np.float16]) -> tuple[Ints, tuple[Ints, Ints]]:
    """Return of each row the hub whose pairs need no list, -1 for none, and all members of the hubs: rows and hubs.

    A hub is what lies around one row that more than a thousand rows are as good as copies of: a picture that is there
    so often, or a kind of picture that the encoder cannot tell apart.  Their pairs would be too many to list.  Rows at
    random are looked at, so that a hub of m among n rows is found but for one time in exp(1024 m / n).
    """
    n = len(embeddings)
    hub, nothing = np.full(n, -1), np.empty(0, np.int64)
    if n <= _CROWD:
        return hub, (nothing, nothing)
    with threadpool_limits(1, "blas"):  # sums in one order
        centres = embeddings[_sample(n)].astype(np.float32)
        crowd = np.sum([(cosine >= _SURE).sum(0) for _, cosine in _blocks(embeddings, centres)], axis=0)
        chosen: list[int] = []
        for at in np.argsort(-crowd, kind="stable").tolist():
            if crowd[at] > _CROWD and (not chosen or (centres[chosen] @ centres[at]).max() < _SURE):
                chosen.append(at)
        if not chosen:
            return hub, (nothing, nothing)
        found = []
        for start, cosine in _blocks(embeddings, centres[chosen]):
            nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :_HUBS_A_ROW]
            reached = np.take_along_axis(cosine, nearest, 1)
            hub[start : start + len(cosine)] = np.where(reached[:, 0] >= _SURE, nearest[:, 0], -1)
            row, place = np.nonzero(reached >= _NEAR_HUB)
            found.append(np.stack([row + start, nearest[row, place]]))
    rows, hubs = np.concatenate(found, 1)
    return hub, (rows, hubs)


def _affordable(embeddings: npt.NDArray[np.float16], hub: Ints, lowest: float) -> float:
    """Return the cosine, in hundredths, above which about five pairs a row, or fewer, are left to be aligned.

    All pairs grow as the square of the rows, so that among more rows less alike ones are no longer looked at.  Of one
    row no more than its nearest count, so that a crowd of like pictures does not cost the others their candidates.
    """
    n = len(embeddings)
    chosen = _sample(n)
    steps = np.arange(floor(100 * lowest), 100) / 100
    counts = np.zeros((len(chosen), len(steps) + 1))
    with threadpool_limits(1, "blas"):  # sums in one order
        for start, cosine in _blocks(embeddings, embeddings[chosen].astype(np.float32)):
            theirs = hub[start : start + len(cosine), None]
            step = np.searchsorted(steps, cosine, "right") * ((theirs != hub[chosen]) | (theirs < 0))
            step += len(counts[0]) * np.arange(len(chosen))
            counts += np.bincount(step.ravel(), minlength=counts.size).reshape(counts.shape)
    above = counts[:, ::-1].cumsum(1)[:, ::-1][:, 1:] - 1  # of each row, others at each step or over it
    nearest = np.minimum(np.maximum(above, 0), _NEAREST).mean(0) / 2 if len(chosen) else np.zeros(len(steps))
    listed = np.maximum(above, 0).mean(0) / 2 if len(chosen) else np.zeros(len(steps))
    wanted = min(_first(steps, nearest <= _PAIRS_A_ROW), _ALWAYS)
    return max(wanted, _first(steps, listed <= max(_MOST_A_ROW, _MOST_PAIRS / max(n, 1))), lowest)


def _first(steps: npt.NDArray[np.float64], enough: npt.NDArray[np.bool_]) -> float:
    return float(steps[np.argmax(enough)]) if enough.any() else 1.0


def _nearest(join: Join, n: int) -> npt.NDArray[np.bool_]:
    """Whether each pair is kept: it is a sure one, or one of the nearest of either row."""
    kept: npt.NDArray[np.bool_] = join.distance <= 1 - _SURE
    rest = np.flatnonzero(~kept)
    row = np.concatenate([join.a[rest], join.b[rest]]).astype(np.int64)
    pair, distance = np.tile(rest, 2), np.tile(join.distance[rest], 2)
    order = np.lexsort((pair, distance, row))
    begin = np.searchsorted(row[order], np.arange(n))
    kept[pair[order][np.arange(len(order)) - begin[row[order]] < _NEAREST]] = True
    return kept


def _nearest_in_hubs(embeddings: npt.NDArray[np.float16], hub: Ints) -> tuple[Indices, Indices, Floats]:
    """Return pairs, and their distances, of each hub's member with its nearest ones in there.

    Of what only looks alike to the encoder, copies are nearer than the rest.  A hub of more than 50,000 rows is
    searched in parts of so many.
    """
    found: list[tuple[Ints, Ints, Floats]] = []
    with threadpool_limits(1, "blas"):  # sums in one order
        for number in range(hub.max(initial=-1) + 1):
            members = np.flatnonzero(hub == number)
            for part in (members[start : start + _PART] for start in range(0, len(members), _PART)):
                own = embeddings[part].astype(np.float32)
                count = min(_NEAREST, len(part) - 1)
                for start in range(0, len(part), _PART_BLOCK) if count else ():
                    distance = 1 - own[start : start + _PART_BLOCK] @ own.T
                    place = np.arange(len(distance))
                    distance[place, start + place] = np.inf
                    near = np.argpartition(distance, count - 1, axis=1)[:, :count]
                    a, b = np.repeat(part[start + place], count), part[near.ravel()]
                    apart = np.take_along_axis(distance, near, 1).ravel()
                    found.append((np.minimum(a, b), np.maximum(a, b), apart))
    if not found:
        return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    a, b, distance = (np.concatenate(parts) for parts in zip(*found, strict=True))
    _, first = np.unique(a * len(hub) + b, return_index=True)
    return a[first], b[first], distance[first]


def _gather(samples: Samples, store: Store, name: str, rows: Ints, put: Callable[[Ints, pa.Array], object]) -> None:
    """Hand over a column of the signatures at these distinct rows, shard by shard, with their places among the rows."""
    place = np.full(len(samples), -1, np.int64)
    place[rows] = np.arange(len(rows))
    for shard, first, end in zip(samples.shards, samples.first, samples.first[1:], strict=False):
        wanted = np.flatnonzero(place[first:end] >= 0)
        if len(wanted):
            column = read_table(store.signatures(shard.name), [name])[name].combine_chunks()
            put(place[first:end][wanted], column.take(pa.array(wanted)))


def _write_embeddings(samples: Samples, store: Store, rows: Ints, path: Path) -> None:
    """Write the embeddings of these rows, in their order, as one array of half precision."""
    schema = pa.schema(read_table(store.signatures(samples.shards[0].name), ["embedding"]).schema)
    dim = schema.field("embedding").type.list_size
    with replacing(path) as temporary:
        if not len(rows):  # an empty file cannot be mapped
            with open(temporary, "wb") as file:
                np.save(file, np.empty((0, dim), np.float16))
            return
        found = new_array(temporary, np.float16, (len(rows), dim))
        _gather(
            samples,
            store,
            "embedding",
            rows,
            lambda at, column: found.__setitem__(at, column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)),
        )


def _edges(pairs: tuple[Indices, Indices, Floats], rows: Ints) -> pa.Table:
    """Return pairs of representatives as a table of edges between these rows, sorted."""
    a, b = rows[pairs[0]], rows[pairs[1]]
    a, b = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((b, a))
    return pa.table([a[order], b[order], pairs[2][order]], schema=EDGES)
