"""Signatures of all shards -> verified edges between images that are copies by hash, or by embedding and alignment.

Joined once: edges are stored wider than the configuration asks for, so that another threshold needs no other join.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .config import Config, digest_of
from .embedding_join import METHOD, embedding_join
from .encoders import UNCALIBRATED, Encoder, image_encoder
from .hash_join import hash_join
from .records import EDGES, THUMBNAIL_SIDE, Floats, Indices, Ints, Samples, Shard, voids
from .store import Store, done, new_array, read_digest, read_table, replacing, write_table

log = logging.getLogger(__name__)

_RADIUS = 6  # edges are stored up to here
_PDQ_RADIUS = 31  # the widest that the configuration allows: its join is drawn for one radius
_MARGIN = 0.05  # below the encoder's own similarity, down to which edges are stored
_CHUNK = 1024  # pairs, about a second: so long an interrupt may wait
_ROUNDING = 1e-7
_LOWEST = 0.1  # cosine of a pair that is worth aligning
_ALWAYS = 0.6  # cosine of one that is aligned even where copies abound: of photos at random one pair in 10^6 has it
_PAIRS_A_ROW = 5  # that are aligned: about as long as signing takes
_SAMPLED = 1024  # rows by which the pairs at a cosine are estimated
_BLOCK = 1 << 14


def signatures_digest(shards: list[Shard], store: Store) -> str:
    """Return the digest of all signature parts, in the order of their names."""
    return digest_of([[s.name, read_digest(store.signatures(s.name))] for s in shards])


def similarity(config: Config) -> float:
    """Return the cosine at which two images are copies: the configured one, or the encoder's own."""
    encoder = image_encoder(config.images.encoder)
    return config.images.encoder_similarity or (_own_similarity(encoder) if encoder else 1.0)


def find_edges(samples: Samples, store: Store, config: Config) -> tuple[pa.Table, pa.Table]:
    """Return hash edges and embedding edges between representative rows, joined now or by an earlier run.

    A row represents those with its hash, or with its content digest; blank images have no such edges.  They are the
    edges that the configuration asks for; the files hold more.
    """
    encoder = image_encoder(config.images.encoder)
    hash_edges = _hash_edges(samples, store, config)
    near = pc.less_equal(hash_edges["distance"], pa.scalar(config.images.hash_radius, pa.float32()))
    if encoder is None:
        return hash_edges.filter(near), EDGES.empty_table()
    if encoder.similarity is None and config.images.encoder_similarity is None:
        log.warning(
            "%s: the cosine of its copies was never measured; %.2f is used, or set images.encoder_similarity",
            config.images.encoder,
            UNCALIBRATED,
        )
    embedding_edges = _embedding_edges(samples, store, encoder, similarity(config))
    reach = 1 - similarity(config) + _gain(encoder) * embedding_edges["evidence"].to_numpy()
    copies = embedding_edges["distance"].to_numpy() <= reach + _ROUNDING
    return hash_edges.filter(near), embedding_edges.filter(pa.array(copies)).select(EDGES.names)


def hashed(samples: Samples) -> npt.NDArray[np.bool_]:
    """Tell of which samples the hash is compared: blank images and those of low quality have none worth it."""
    valid: npt.NDArray[np.bool_] = samples.table["hash"].is_valid().to_numpy()
    return samples.compared & valid


def hashes_of(samples: Samples) -> npt.NDArray[np.void] | npt.NDArray[np.uint64]:
    """Return the perceptual hash of every sample, zeros where it has none."""
    column = samples.table["hash"]
    return column.fill_null(0).to_numpy() if column.type == pa.uint64() else voids(column)


def words(hashes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return hashes as rows of 64-bit words."""
    return hashes.view(np.uint64).reshape(len(hashes), hashes.itemsize // 8)


def _own_similarity(encoder: Encoder) -> float:
    return encoder.similarity or UNCALIBRATED


def _gain(encoder: Encoder) -> float:
    return getattr(encoder, "gain", 0.0)


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


def _embedding_edges(samples: Samples, store: Store, encoder: Encoder, wanted: float) -> pa.Table:
    """Return the edges that are stored, with the evidence of the alignment of those that it can decide about."""
    own, gain = _own_similarity(encoder), _gain(encoder)
    lowest = max(min(wanted, own - _MARGIN) - gain, _LOWEST) if gain else min(wanted, own - _MARGIN)
    highest = max(wanted, own)  # copies over it are sure, however many a heavy group has
    inputs = signatures_digest(samples.shards, store)
    key = digest_of(["embedding-edges-3", inputs, lowest, highest, gain, METHOD])
    path = store.place(store.edges / "embedding.parquet", key)
    work = store.edges / f"embedding-{key}"  # what a killed join left there is its own
    if not done(path, key):
        compared = np.flatnonzero(samples.compared)
        _, place = np.unique(voids(samples.table["digest"])[compared], return_index=True)
        rows = compared[np.sort(place)]
        # k-means depends on the order of its rows, and this one on nothing but the samples
        rows = rows[np.argsort(voids(samples.table["uid"])[rows], kind="stable")]
        if not (work / "rows.npy").exists():
            _write_embeddings(samples, store, rows, work / "rows.npy")
        embeddings = np.load(work / "rows.npy", mmap_mode="r", allow_pickle=False)
        lowest = max(lowest, min(_affordable(embeddings, lowest, highest), _ALWAYS)) if gain else lowest
        join = embedding_join(embeddings, lowest, work)
        table = _edges((join.a, join.b, join.distance), rows)
        evidence = np.zeros(len(table), np.float32)
        unsure = np.flatnonzero(table["distance"].to_numpy() > 1 - highest) if gain else np.empty(0, np.int64)
        evidence[unsure] = _aligned(samples, store, table.take(pa.array(unsure)), work)
        about = {"rows": len(rows), "pairs": len(join.a), "cells": join.cells, "probes": join.probes}
        note = {**about, "lowest": lowest, "aligned": len(unsure), "recall": asdict(join.recall)}
        write_table(path, table.append_column("evidence", pa.array(evidence)), key, note)
    for left_over in store.edges.glob("embedding-*"):
        shutil.rmtree(left_over)
    return read_table(path)


def _affordable(embeddings: npt.NDArray[np.float16], lowest: float, highest: float) -> float:
    """Return the cosine, in hundredths, above which about five pairs a row, or fewer, are left to be aligned.

    All pairs grow as the square of the rows, so that among more rows less alike ones are no longer looked at.
    """
    n = len(embeddings)
    chosen = np.sort(np.random.default_rng(0).choice(n, min(n, _SAMPLED), replace=False))
    steps = np.arange(floor(100 * lowest), floor(100 * highest) + 1) / 100
    pairs = np.zeros(len(steps) + 1)
    with threadpool_limits(1, "blas"):  # sums in one order
        sampled = embeddings[chosen].astype(np.float32)
        for start in range(0, n, _BLOCK):
            cosine = sampled @ embeddings[start : start + _BLOCK].astype(np.float32).T
            pairs += np.bincount(np.searchsorted(steps, cosine[cosine < highest], "right"), minlength=len(pairs))
    above = pairs[::-1].cumsum()[::-1][1:] / max(len(chosen), 1) / 2  # a row, at each step or over it
    enough = np.flatnonzero(above <= _PAIRS_A_ROW)
    return float(steps[enough[0]]) if len(enough) else highest


def _aligned(samples: Samples, store: Store, edges: pa.Table, work: Path) -> Floats:
    """Return the evidence of the alignment of each edge's two thumbnails; every finished chunk is kept in `work`."""
    if not len(edges):
        return np.empty(0, np.float32)
    from .alignment import align  # only now: it brings a compiler along

    ends = np.stack([edges["a"].to_numpy(), edges["b"].to_numpy()])
    rows, place = np.unique(ends, return_inverse=True)
    thumbnails = np.empty((len(rows), THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)
    _gather(samples, store, "thumbnail", rows, lambda at, column: thumbnails.__setitem__(at, _pixels(column)))
    a, b = place.reshape(ends.shape)
    starts = range(0, len(a), _CHUNK)

    def chunk(start: int) -> Floats:
        path = work / f"evidence-{start // _CHUNK:06}.npy"
        if path.exists():
            found: Floats = np.load(path, allow_pickle=False)
            return found
        found = align(thumbnails, a[start : start + _CHUNK], b[start : start + _CHUNK])
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, found)
        return found

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        try:
            done_chunks = tqdm(pool.map(chunk, starts), total=len(starts), desc="alignment", unit="chunk", disable=None)
            return np.concatenate(list(done_chunks))
        finally:
            pool.shutdown(cancel_futures=True)


def _pixels(column: pa.Array) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)


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
