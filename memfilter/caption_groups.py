"""Distinct captions -> groups of captions around keepers, over all the tiers that the configuration names.

*Exact*: equal normal forms.  *Template*: equal but for numbers, codes, URLs, file names and dates.  *Near*: the Jaccard
index of their character 3- to 5-grams and word 1- and 2-grams.  *Semantic*: the cosine of their embeddings.  A keeper
is the caption that most samples use, then the first by text; the others have a verified edge to theirs.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .caption_join import METHOD, NO_EDGES, Joined, banding, caption_join
from .captions import normalise, template
from .config import Config, digest_of
from .edges import signatures_digest
from .records import CAPTION_KEEPERS, CAPTION_METHODS, Ints, Samples, voids
from .store import Store, done, read_table, write_table

EXACT, TEMPLATE, NEAR, SEMANTIC = CAPTION_METHODS
_BATCH = 1 << 17


def caption_keepers(samples: Samples, captions: pa.Table, caption: Ints, store: Store, config: Config) -> pa.Table:
    """Write and return, of each distinct caption, the row of its group's keeper and the edge to it.

    `caption` is of each sample the row of its own.  A text that no sample has as its own, and one without a visible
    character, is in no group: -1.
    """
    tiers, near = config.captions.tiers, config.captions.near_jaccard
    inputs = signatures_digest(samples.shards, store)
    key = digest_of(["caption-groups-1", METHOD, inputs, sorted(tiers), near if NEAR in tiers else None])
    if not done(store.caption_groups, key):
        table, note = _keepers(samples, captions, caption, config, store.caption_groups.with_suffix("") / key)
        write_table(store.caption_groups, table, key, note)
    shutil.rmtree(store.caption_groups.with_suffix(""), ignore_errors=True)
    return read_table(store.caption_groups)


def _keepers(
    samples: Samples, captions: pa.Table, caption: Ints, config: Config, work: Path
) -> tuple[pa.Table, dict[str, Any]]:
    """Return the table of keepers, and what is told of the join."""
    tiers = config.captions.tiers
    rows = np.flatnonzero(samples.good & samples.table["fingerprint"].is_valid().to_numpy())
    own, first, use = np.unique(caption[rows], return_index=True, return_counts=True)
    # captions of one normal form are one text, the most used of them, then the first
    prints = voids(samples.table["fingerprint"])[rows[first]]
    form = np.unique(prints, return_inverse=True)[1] if EXACT in tiers else np.arange(len(own))
    order = np.lexsort((own, -use, form))
    text = own[order[np.unique(form[order], return_index=True)[1]]]
    visited = np.lexsort((text, -np.bincount(form, use, len(text)).astype(np.int64)))
    place = np.empty(len(text), np.int64)
    place[visited] = np.arange(len(text))

    joined = _join(captions["text"].take(pa.array(text[visited])), config, work)
    n = len(captions)
    keeper, method, distance = np.full(n, -1), np.zeros(n, np.int8), np.zeros(n, np.float32)
    keeper[own] = text[visited[joined.keeper[place[form]]]]
    method[own], distance[own] = joined.method[place[form]], joined.distance[place[form]]
    note: dict[str, Any] = {"captions": len(text)}
    if NEAR in tiers:
        used = banding(len(text), config.captions.near_jaccard)
        note |= {**asdict(used), "recall_at_threshold": round(used.recall(config.captions.near_jaccard), 6)}
    return pa.table([keeper, method, distance], schema=CAPTION_KEEPERS), note


def _join(texts: pa.ChunkedArray, config: Config, work: Path) -> Joined:
    """Return the groups of captions that are unlike in their normal form, in the order in which they are visited."""
    tiers, n = config.captions.tiers, len(texts)
    if not {*tiers} - {EXACT}:
        return Joined(np.arange(n), np.zeros(n, np.int8), np.zeros(n, np.float32))
    normal, classes = forms(texts, TEMPLATE in tiers)
    return caption_join(normal, classes, config.captions.near_jaccard if NEAR in tiers else None, NO_EDGES, work)


def forms(texts: pa.ChunkedArray, templates: bool) -> tuple[pa.LargeStringArray, Ints]:
    """Return the normal forms of captions, and the number of each one's template, -1 for none."""
    normal, classes = [], []
    for start in range(0, len(texts), _BATCH):
        batch = texts.slice(start, _BATCH).to_pylist()
        normal.append(pa.array(map(normalise, batch), pa.large_string()))
        classes.append(pa.array((template(t) if templates else None for t in batch), pa.large_string()))
    numbers = pa.concat_arrays(classes or [pa.array([], pa.large_string())]).dictionary_encode().indices
    number: Ints = numbers.fill_null(-1).to_numpy().astype(np.int64)
    return pa.concat_arrays(normal or [pa.array([], pa.large_string())]), number
