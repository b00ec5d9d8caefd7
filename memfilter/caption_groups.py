"""Distinct captions -> groups of captions around keepers, over all the tiers that the configuration names.

*Exact*: equal normal forms.  *Template*: equal but for numbers, codes, URLs, file names and dates.  *Near*: the Jaccard
index of their character 3- to 5-grams and word 1- and 2-grams.  *Semantic*: the cosine of their embeddings.  A keeper
is the caption that most samples use, then the first by text; the others have a verified edge to theirs.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .caption_edges import semantic_edges, semantic_similarity
from .caption_join import METHOD, NO_EDGES, Joined, banding, caption_join
from .captions import FORMS, normalise, template
from .config import Config, digest_of
from .edges import signatures_digest
from .encoders.captions import CaptionEncoder
from .encoders.recorded import Encoders
from .records import CAPTION_KEEPERS, CAPTION_METHODS, Ints, Pairs, Samples, voids
from .store import Store, done, read_table, write_table

EXACT, TEMPLATE, NEAR, SEMANTIC = CAPTION_METHODS
_BATCH = 1 << 17
_LONGEST = 10_000  # characters of a caption that the near tier compares: features take forty times their bytes


def caption_keepers(
    samples: Samples,
    captions: pa.Table,
    caption: Ints,
    store: Store,
    config: Config,
    encoders: Encoders | None = None,
) -> pa.Table:
    """Write and return, of each distinct caption, the row of its group's keeper and the edge to it.

    The `encoders` are those that the configuration names, unless they are given.  `caption` is of each sample the row
    of its own.  A text that no sample has as its own, and one without a visible character, is in no group: -1.
    """
    tiers, near = config.captions.tiers, config.captions.near_jaccard
    encoder = (encoders or Encoders.of(config)).captions
    semantic = _Semantic.of(encoder, config) if encoder else None
    inputs = signatures_digest(samples.shards, store)
    by_meaning = semantic and [semantic.encoder.identity, semantic.similarity]
    key = digest_of(
        ["caption-groups-1", METHOD, FORMS, inputs, sorted(tiers), near if NEAR in tiers else None, by_meaning]
    )
    path = store.place(store.caption_groups, key)
    if not done(path, key):
        text, row_of = _texts(samples, caption, len(captions), EXACT in tiers)
        texts = captions["text"].take(pa.array(text))
        edges = semantic.edges(texts, store, digest_of([inputs, EXACT in tiers])) if semantic else NO_EDGES
        joined = _join(texts, edges, config, store.caption_groups.with_suffix("") / key)
        write_table(path, _table(text, row_of, joined), key, _note(joined, config, semantic))
    shutil.rmtree(store.caption_groups.with_suffix(""), ignore_errors=True)
    return read_table(path)


@dataclass(frozen=True)
class _Semantic:
    """The encoder of the tier `semantic`, and the cosine from which captions say the same."""

    encoder: CaptionEncoder
    similarity: float

    @classmethod
    def of(cls, encoder: CaptionEncoder, config: Config) -> _Semantic:
        return cls(encoder, semantic_similarity(encoder, config))

    def edges(self, texts: pa.ChunkedArray, store: Store, inputs: str) -> Pairs:
        return semantic_edges(texts, store, self.encoder, self.similarity, inputs)


def _texts(samples: Samples, caption: Ints, captions: int, exact: bool) -> tuple[Ints, Ints]:
    """Return the captions to compare, as rows in the order of their visit, and of each row the place of its own (-1).

    With `exact`, captions of one normal form are one, the most used of them, then the first.
    """
    rows = np.flatnonzero(samples.good & samples.table["fingerprint"].is_valid().to_numpy())
    own, first, use = np.unique(caption[rows], return_index=True, return_counts=True)
    prints = voids(samples.table["fingerprint"])[rows[first]]
    form = np.unique(prints, return_inverse=True)[1] if exact else np.arange(len(own))
    order = np.lexsort((own, -use, form))
    text = own[order[np.unique(form[order], return_index=True)[1]]]
    visited = np.lexsort((text, -np.bincount(form, use, len(text)).astype(np.int64)))
    place = np.empty(len(text), np.int64)
    place[visited] = np.arange(len(text))
    place_of = np.full(captions, -1)
    place_of[own] = place[form]
    return text[visited], place_of


def _join(texts: pa.ChunkedArray, edges: Pairs, config: Config, work: Path) -> Joined:
    """Return the groups of captions that are unlike in their normal form, in the order in which they are visited."""
    tiers, n = config.captions.tiers, len(texts)
    if not {*tiers} - {EXACT}:
        return Joined(np.arange(n), np.zeros(n, np.int8), np.zeros(n, np.float32), np.zeros(n, np.bool_))
    normal, classes = forms(texts, TEMPLATE in tiers)
    return caption_join(normal, classes, config.captions.near_jaccard if NEAR in tiers else None, edges, work)


def _table(text: Ints, place: Ints, joined: Joined) -> pa.Table:
    """Return keeper, method and distance of every distinct caption."""
    used = place >= 0
    keeper = np.where(used, text[joined.keeper[place]], -1) if len(text) else place
    method = np.where(used, joined.method[place], 0) if len(text) else np.zeros(len(place), np.int8)
    distance = np.where(used, joined.distance[place], 0) if len(text) else np.zeros(len(place), np.float32)
    return pa.table([keeper, method.astype(np.int8), distance.astype(np.float32)], schema=CAPTION_KEEPERS)


def _note(joined: Joined, config: Config, semantic: _Semantic | None) -> dict[str, Any]:
    """Return what the manifest tells of the join."""
    note: dict[str, Any] = {"captions": len(joined.keeper), "crowded": int(joined.crowded.sum())}
    if NEAR in config.captions.tiers:
        used, jaccard = banding(len(joined.keeper), config.captions.near_jaccard), config.captions.near_jaccard
        note |= {**asdict(used), "recall_at_threshold": round(used.recall(jaccard), 6)}
    if semantic:
        weights = getattr(semantic.encoder, "weights", None)
        about = {"identity": semantic.encoder.identity, "weights": weights, "similarity": semantic.similarity}
        note["encoder"] = about
    return note


def forms(texts: pa.ChunkedArray, templates: bool) -> tuple[pa.LargeStringArray, Ints]:
    """Return the normal forms of captions, of long ones the start, and the numbers of their templates (-1: none)."""
    normal, classes = [], []
    for start in range(0, len(texts), _BATCH):
        batch = texts.slice(start, _BATCH).to_pylist()
        normal.append(pa.array((normalise(t)[:_LONGEST].rstrip() for t in batch), pa.large_string()))
        classes.append(pa.array((template(t) if templates else None for t in batch), pa.large_string()))
    numbers = pa.concat_arrays(classes or [pa.array([], pa.large_string())]).dictionary_encode().indices
    number: Ints = numbers.fill_null(-1).to_numpy().astype(np.int64)
    return pa.concat_arrays(normal or [pa.array([], pa.large_string())]), number
