"""Self-join of embeddings: all pairs of rows within a distance, by probed cells."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from .records import Pairs

_FLAT = 20_000  # embeddings up to this number are compared with one another without cells
_MARGIN = 1e-3  # candidates are taken this much below the threshold, then compared again row by row
_THREADS = 1  # of k-means: sums in another order are other centroids


def embedding_join(rows: npt.NDArray[np.float32], similarity: float) -> Pairs:
    """Return pairs (a < b) of unit rows with cosine at least `similarity`, each with its distance 1 - cosine.

    Every pair returned is verified.  Up to 20,000 rows none is missed; beyond, rows are compared within k-means cells,
    of which the 16 nearest are probed for each, and a pair whose rows lie in cells further apart is missed.
    """
    n, dim = rows.shape
    if n < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    threads = faiss.omp_get_max_threads()
    index: Any
    if n <= _FLAT:
        index = faiss.IndexFlatIP(dim)
    else:
        cells = int(4 * np.sqrt(n))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = 1, 10, 64
        index.nprobe = 16
        faiss.omp_set_num_threads(_THREADS)
        index.train(rows)
        faiss.omp_set_num_threads(threads)
    index.add(rows)
    found = []
    for start in range(0, n, 4096):
        limits, _, neighbours = index.range_search(rows[start : start + 4096], similarity - _MARGIN)
        a = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits.astype(np.int64)))
        b = neighbours.astype(np.int64)
        found.append((np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]))
    a, b = _distinct(found, n)
    cosine = np.concatenate(
        [np.einsum("ij,ij->i", rows[a[i : i + 65536]], rows[b[i : i + 65536]]) for i in range(0, len(a), 65536)]
        or [np.empty(0, np.float32)]
    )
    near = cosine >= similarity
    return a[near], b[near], np.maximum(1 - cosine[near], 0).astype(np.float32)


def _distinct(found: list[tuple[Any, Any]], n: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the pairs sorted by (a, b), each once."""
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    key = np.concatenate([a * n + b for a, b in found])
    key.sort()  # np.unique hashes integers, which is several times slower on millions of them
    key = key[np.r_[True, key[1:] != key[:-1]]] if len(key) else key
    return key // n, key % n
