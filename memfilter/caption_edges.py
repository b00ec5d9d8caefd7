"""Distinct captions -> the pairs that say the same, by the cosine of their embeddings."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from .config import Config, digest_of
from .embedding_join import METHOD, embedding_join
from .encoders import UNCALIBRATED
from .encoders.captions import CaptionEncoder
from .errors import printable
from .records import EDGES, Pairs
from .store import Store, done, new_array, read_table, replacing, write_table

log = logging.getLogger(__name__)

_CHUNK = 1 << 13  # texts in one file of embeddings


def semantic_similarity(encoder: CaptionEncoder, config: Config) -> float:
    """Return the cosine at which two captions say the same: as configured, the encoder's own, or a cautious one."""
    if config.captions.encoder_similarity is None and encoder.similarity is None:
        log.warning(
            "%s: the cosine of captions that say the same was never measured; %.2f is used, or set "
            "captions.encoder_similarity",
            printable(config.captions.encoder or ""),
            UNCALIBRATED,
        )
    return config.captions.encoder_similarity or encoder.similarity or UNCALIBRATED


def semantic_edges(
    texts: list[str] | pa.Array, store: Store, encoder: CaptionEncoder, similarity: float, inputs: str
) -> Pairs:
    """Return positions a < b of distinct texts whose cosine is at least `similarity`, sorted, and 1 - cosine.

    They are joined now or by an earlier run: `inputs` is a digest of the texts in their order.  A text of which the
    encoder knows nothing is in no pair.  A call that was killed goes on from the embeddings that it had written.
    """
    key = digest_of(["caption-edges-1", inputs, encoder.identity, similarity, METHOD])
    path = store.place(store.edges / "caption.parquet", key)
    work = store.edges / f"caption-{key}"  # what a killed join left there is its own
    if not done(path, key):
        if not (work / "rows.npy").exists():
            _write_embeddings(texts, encoder, work)
        # an empty file cannot be mapped
        rows = np.load(work / "rows.npy", mmap_mode="r" if len(texts) else None, allow_pickle=False)
        join = embedding_join(rows, similarity, work)
        about = {"rows": len(rows), "pairs": len(join.a), "cells": join.cells, "probes": join.probes}
        pairs = pa.table([join.a.astype(np.int64), join.b.astype(np.int64), join.distance], schema=EDGES)
        write_table(path, pairs, key, {**about, "lowest": similarity, "recall": asdict(join.recall)})
    for left_over in store.edges.glob("caption-*"):
        shutil.rmtree(left_over)
    table = read_table(path)
    return table["a"].to_numpy(), table["b"].to_numpy(), table["distance"].to_numpy()


def _write_embeddings(texts: list[str] | pa.Array, encoder: CaptionEncoder, work: Path) -> None:
    """Write the embeddings of all texts as one array of half precision, chunk by chunk, each a file until then."""
    starts = range(0, len(texts), _CHUNK)
    paths = {start: work / f"chunk-{start // _CHUNK:06}.npy" for start in starts}
    todo = [start for start in starts if not paths[start].exists()]
    bar = tqdm(
        todo, "caption embeddings", total=len(starts), initial=len(starts) - len(todo), unit="chunk", disable=None
    )
    for start in bar:
        part = texts[start : start + _CHUNK]
        _save(paths[start], encoder.encode(part if isinstance(part, list) else part.to_pylist()).astype(np.float16))
    if not len(texts):
        _save(work / "rows.npy", np.empty((0, max(encoder.dim, 1)), np.float16))
        return
    with replacing(work / "rows.npy") as temporary:
        rows = new_array(temporary, np.float16, (len(texts), encoder.dim))
        for start, path in paths.items():
            rows[start : start + _CHUNK] = np.load(path, allow_pickle=False)
    for path in paths.values():
        path.unlink()


def _save(path: Path, rows: npt.NDArray[np.float16]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows, allow_pickle=False)
