"""Self-join of unit rows that lie on the disk: the pairs whose cosine reaches a threshold, found by k-means cells.

Rows are sorted into lists, one a cell.  Each row is compared with the list of its own cell and with those of the cells
next nearest to it, so that a pair is found when either row probes the other's cell.  That some pair lies further apart
is possible; how often is estimated in every join by comparing a sample of rows with all.  Up to 50,000 rows there is
one list, and nothing is missed.

Blocks are multiplied in float32, and what comes near the threshold again in float64.  Half-precision components are
multiples of 2**-24, so the sums of their products are multiples of 2**-48 and below 2: float64 holds them exactly, in
whatever order they are added.  The pairs therefore depend on no number of threads and no block.

Memory holds two blocks for each thread; rows, lists, probes and pairs are files, each there whole or not at all, from
which a join that was killed goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import ceil, sqrt
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
import numpy.typing as npt
import xxhash
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .config import digest_of
from .errors import RunError
from .pair_files import PAIR, mapped, merge, pair_keys, reach_disk, write_runs
from .records import Indices, Ints
from .store import new_array, replacing, write_json

R = TypeVar("R")

Halves = npt.NDArray[np.float16]

METHOD = f"cells-1, faiss {faiss.__version__}"
"""Names what decides which pairs are found, beside the rows and the arguments."""

_EXACT = 50_000  # rows, up to which all are compared with all
_PROBES = 16
_BLOCK = 1024  # rows on either side of a product
_MARGIN = 2e-3  # rows of half precision have lengths within 2**-11 of one, and float32 sums stray less than that
_TRAINED = 32  # rows a cell that k-means sees
_MOST_TRAINED = 1 << 19
_ITERATIONS = 6
_CLOSE = 1.5  # times the distance of a pair, on average between the rows of cells that are made one
_ASSIGNED = 1 << 17  # rows in one file of probes
_CHUNK = 1 << 29  # products of rows in one file of pairs: fewer where that makes less than 64 files
_SAMPLED = 1024  # rows compared with all, for the recall


@dataclass(frozen=True)
class Recall:
    """Of the true pairs of some sampled rows, how many the join found, and the 95% interval of that share.

    The interval is Wilson's, for no more trials than sampled rows have pairs, and for fewer where the rows' own shares
    scatter further than that.  Without a true pair there is no share, and the interval is 0 to 1.
    """

    rows: int
    pairs: int
    found: int
    share: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Join:
    """Pairs a < b sorted by (a, b), their distances 1 - cosine, and how complete they are.

    The arrays are views of files: they take no memory until they are used, and go with their folder.
    """

    a: npt.NDArray[np.uint32]
    b: npt.NDArray[np.uint32]
    distance: npt.NDArray[np.float32]
    cells: int
    probes: int
    recall: Recall


def embedding_join(
    rows: Halves,
    similarity: float,
    folder: Path,
    hub: Ints | None = None,
    exact: int = _EXACT,
    probes: int = _PROBES,
    threads: int | None = None,
) -> Join:
    """Return the pairs of rows with cosine at least `similarity`, every one verified, and an estimate of their share.

    `rows` (N, dim) are of unit length but for their rounding, and may be memory-mapped; a row of zeros is in no pair.
    `hub` numbers crowds of rows, -1 for none: two rows of one crowd are no pair, since these would be too many.
    Up to `exact` rows none is missed; beyond, `probes` of about sqrt(probes * N) cells are compared for each.  The
    same call continues a join that was killed, from what it left in `folder`, to the same bytes.  Raises RunError
    when `folder` holds the work on other rows or arguments.
    """
    if len(rows) >= 1 << 32:
        raise RunError(f"{folder}: {len(rows):,} embeddings are to be joined, at most 4,294,967,295 can be")
    cells = 1 if len(rows) <= exact else ceil(sqrt(probes * len(rows)))
    sample = np.sort(np.random.default_rng(0).choice(len(rows), min(len(rows), _SAMPLED), replace=False))
    hub = np.full(len(rows), -1) if hub is None else hub
    crowds = xxhash.xxh3_128_hexdigest(hub.astype("<i8").tobytes())
    _claim(folder, [METHOD, rows.shape, rows[sample].tobytes().hex(), similarity, cells, probes, crowds])
    with _workers(threads or faiss.omp_get_max_threads()) as pool:
        if not (folder / "keys.u8").exists():
            lists = _make_lists(rows, cells, probes, similarity, folder, pool, hub)
            merge(_compare_lists(lists, similarity, folder, pool), len(rows), folder)
        keys, distance = mapped(folder / "keys.u8", "<u8"), mapped(folder / "distance.f4", "<f4")
        recall = _estimate(rows, sample, similarity, keys, pool, hub)
    cells = 1 if (centroids := _load(folder / "centroids.npy")) is None else len(centroids)
    halves = keys.view("<u4").reshape(-1, 2)
    return Join(halves[:, 1], halves[:, 0], distance, cells, min(probes, cells), recall)


def _claim(folder: Path, arguments: list[Any]) -> None:
    """Make the folder this join's; raises RunError when it is another's."""
    path, digest = folder / "join.json", digest_of(arguments)
    try:
        claimed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        claimed = None
    if claimed is None:
        write_json(path, digest)
    elif claimed != digest:
        raise RunError(f"{folder}: holds a join of other embeddings or settings; delete it and run the command again")


# -- threads and files ------------------------------------------------------------------------------------------------


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool in whose threads all arithmetic is of one thread: blocks, not threads, decide about rounding."""
    with threadpool_limits(1, "blas"):
        pool = ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,))
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # when interrupted, what has not begun is left


def _each(
    pool: ThreadPoolExecutor, function: Callable[..., R], items: Iterable[tuple[Any, ...]], what: str, done: int = 0
) -> list[R]:
    """Return `function(*item)` of every item; `done` are those that an earlier run did."""
    futures: list[Future[R]] = [pool.submit(function, *item) for item in items]
    with tqdm(total=done + len(futures), initial=done, desc=what, unit="chunk", disable=None) as bar:
        for future in as_completed(futures):
            future.result()
            bar.update()
    return [future.result() for future in futures]


def _load(path: Path) -> npt.NDArray[Any] | None:
    """Return a .npy file, memory-mapped, None where it is missing or not whole."""
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError, EOFError):
        return None


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
        reach_disk(file)


# -- cells and lists --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lists:
    """Rows in the order of their cells; `row` says which stands where, `ends` where each cell's list ends.

    `visitors` are the places of the rows that probe a cell without lying in it, one cell's after the other's.
    """

    rows: Halves
    row: Indices
    ends: Ints
    visitors: Indices
    visits: Ints  # where each cell's visitors end
    hub: Ints  # of each place


def _make_lists(
    rows: Halves, cells: int, probes: int, similarity: float, folder: Path, pool: ThreadPoolExecutor, hub: Ints
) -> _Lists:
    if cells == 1:
        return _Lists(rows, np.arange(len(rows)), np.array([len(rows)]), np.empty(0, np.int64), np.array([0]), hub)
    if _load(folder / "centroids.npy") is None:
        # in the pool, for its one thread: sums in another order are other centroids
        pool.submit(_train, rows, cells, similarity, folder / "centroids.npy").result()
    centroids = np.load(folder / "centroids.npy", allow_pickle=False)
    cells, probes = len(centroids), min(probes, len(centroids))
    starts = range(0, len(rows), _ASSIGNED)
    paths = {start: folder / f"probes-{i:05}.npy" for i, start in enumerate(starts)}
    todo = [(rows, start, centroids, probes, path) for start, path in paths.items() if _load(path) is None]
    _each(pool, _assign, todo, "embedding cells", len(paths) - len(todo))

    cell, counts = np.empty(len(rows), np.uint32), np.zeros(cells, np.int64)
    for start, path in paths.items():
        probed = np.load(path, allow_pickle=False)
        cell[start : start + len(probed)] = probed[:, 0]
        counts += np.bincount(probed[:, 1:].ravel(), minlength=cells)
    row = np.argsort(cell, kind="stable").astype(np.uint32)
    visits = np.cumsum(counts)
    if _load(folder / "visitors.npy") is None:
        place = np.empty_like(row)
        place[row] = np.arange(len(row), dtype=np.uint32)
        _write_visitors(list(paths.values()), place, probes - 1, visits - counts, folder / "visitors.npy")
    if _load(folder / "lists.npy") is None:
        with replacing(folder / "lists.npy") as temporary:
            lists = new_array(temporary, np.float16, rows.shape)
            for start in starts:
                lists[start : start + _ASSIGNED] = rows[row[start : start + _ASSIGNED]]
    visitors = np.load(folder / "visitors.npy", mmap_mode="r", allow_pickle=False)
    lists = np.load(folder / "lists.npy", mmap_mode="r", allow_pickle=False)
    return _Lists(lists, row, np.cumsum(np.bincount(cell, minlength=cells)), visitors, visits, hub[row])


def _train(rows: Halves, cells: int, similarity: float, path: Path) -> None:
    """Write the cells' centroids, of unit length; k-means sees a bounded sample of the rows, in their order.

    It cuts a heavy group into many cells, more than are probed.  Cells are therefore one where their rows are pairs, or
    nearly, on average: the average cosine between two cells' rows is the product of their means.
    """
    count = min(len(rows), _TRAINED * cells, max(_MOST_TRAINED, cells))
    sample = np.sort(np.random.default_rng(1).choice(len(rows), count, replace=False))
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": count}
    kmeans = faiss.Kmeans(rows.shape[1], cells, niter=_ITERATIONS, seed=1, spherical=True, **limits)
    trained = rows[sample].astype(np.float32)
    kmeans.train(trained)
    nearest = kmeans.index.search(trained, 1)[1][:, 0]
    counts = np.bincount(nearest, minlength=cells)
    means = np.zeros((cells, rows.shape[1]))
    np.add.at(means, nearest, trained)
    means /= np.maximum(counts, 1)[:, None]
    stands = counts > 0
    for cell in np.argsort(-counts, kind="stable"):
        if stands[cell]:
            stands &= means @ means[cell] < 1 - _CLOSE * (1 - similarity)
            stands[cell] = True
    _save(path, np.asarray(kmeans.centroids)[stands])


def _assign(rows: Halves, start: int, centroids: npt.NDArray[np.float32], probes: int, path: Path) -> None:
    """Write the cells nearest to each row of one file, the nearest first."""
    index: Any = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    part = rows[start : start + _ASSIGNED]
    found = np.empty((len(part), probes), np.uint32)
    for i in range(0, len(part), 4 * _BLOCK):
        found[i : i + 4 * _BLOCK] = index.search(part[i : i + 4 * _BLOCK].astype(np.float32), probes)[1]
    _save(path, found)


def _write_visitors(probes: list[Path], place: Indices, others: int, begins: Ints, path: Path) -> None:
    """Sort the places of the rows by the cells that they probe, their own aside, in one pass over the probes."""
    start = 0
    with replacing(path) as temporary:
        visitors = new_array(temporary, np.uint32, (len(place) * others,))
        for part in probes:
            probed = np.load(part, allow_pickle=False)
            cells = probed[:, 1:].ravel()
            counts = np.bincount(cells, minlength=len(begins))
            order = np.argsort(cells, kind="stable")
            target = np.arange(len(cells)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
            visitors[target] = place[start + order // max(others, 1)]
            begins = begins + counts
            start += len(probed)


# -- comparing lists --------------------------------------------------------------------------------------------------


def _compare_lists(lists: _Lists, similarity: float, folder: Path, pool: ThreadPoolExecutor) -> list[Path]:
    """Compare every list with itself and its visitors, and return the files of pairs, in runs that are sorted.

    A list is compared in tiles of so many of its rows, a file holds the pairs of so many tiles; both follow from the
    lists alone.
    """
    sizes = np.diff(lists.ends, prepend=0)
    tiles = -(-sizes // _BLOCK)
    cell = np.repeat(np.arange(len(sizes)), tiles)
    nth = np.arange(len(cell)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = lists.ends[cell] - sizes[cell] + nth * _BLOCK
    last = np.minimum(first + _BLOCK, lists.ends[cell])
    work = np.cumsum((last - first) * (lists.ends[cell] - first + np.diff(lists.visits, prepend=0)[cell]))
    chunk = min(_CHUNK, int(work[-1]) // 64 + 1) if len(work) else 1
    groups = np.split(np.stack([cell, first, last], axis=1), np.flatnonzero(np.diff(work // chunk)) + 1)
    paths = [folder / f"pairs-{i:06}" for i in range(len(groups))]
    todo = [(lists, tiles, similarity, path) for tiles, path in zip(groups, paths, strict=True) if not path.exists()]
    _each(pool, _compare, todo, "embedding join", len(paths) - len(todo))
    return paths


def _compare(lists: _Lists, tiles: Ints, similarity: float, path: Path) -> None:
    tile_pairs = (_pairs_of(lists, cell, first, last, similarity) for cell, first, last in tiles.tolist())
    write_runs(path, chain.from_iterable(tile_pairs))


def _pairs_of(lists: _Lists, cell: int, first: int, last: int, similarity: float) -> Iterator[npt.NDArray[Any]]:
    """Yield the pairs of some rows of a list with the list's from there on and with its visitors, block by block."""
    tile = lists.rows[first:last]
    members = tile.astype(np.float32)
    visitors = np.sort(lists.visitors[lists.visits[cell - 1] if cell else 0 : lists.visits[cell]])
    others = np.concatenate([np.arange(first, lists.ends[cell]), visitors])
    for start in range(0, len(others), _BLOCK):
        other = others[start : start + _BLOCK]
        block = lists.rows[other]
        crowds = lists.hub[other], lists.hub[first:last]
        i, j, cosine = _near(block, block.astype(np.float32), tile, members, similarity, *crowds)
        a, b = other[i], first + j
        once = (a > b) | (a < first)  # within the list a pair would come twice, and each row with itself
        pairs = np.empty(int(once.sum()), PAIR)
        pairs["key"] = pair_keys(lists.row[a[once]], lists.row[b[once]])
        pairs["distance"] = np.maximum(1 - cosine[once], 0)
        yield pairs


def _near(
    left: Halves,
    left32: npt.NDArray[np.float32],
    right: Halves,
    right32: npt.NDArray[np.float32],
    similarity: float,
    left_hub: Ints,
    right_hub: Ints,
) -> tuple[Ints, Ints, npt.NDArray[np.float64]]:
    """Return the pairs of places in two blocks whose cosine reaches the similarity, and the cosine."""
    reached = left32 @ right32.T >= np.float32(similarity - _MARGIN)
    if (left_hub >= 0).any() and (right_hub >= 0).any():
        reached &= (left_hub[:, None] != right_hub) | (left_hub < 0)[:, None]
    near = np.flatnonzero(reached)
    i, j = np.divmod(near, max(len(right), 1))
    cosine = np.empty(len(near))
    if 16 * len(near) > left32.shape[0] * right32.shape[0]:  # many: each row is converted once
        x, y = left.astype(np.float64), right.astype(np.float64)
        cosine = _cosine((x @ y.T)[i, j], _dot(x, x)[i], _dot(y, y)[j])
    else:
        for start in range(0, len(near), 4 * _BLOCK):
            step = slice(start, start + 4 * _BLOCK)
            x, y = left[i[step]].astype(np.float64), right[j[step]].astype(np.float64)
            cosine[step] = _cosine(_dot(x, y), _dot(x, x), _dot(y, y))
    enough = cosine >= similarity
    return i[enough], j[enough], cosine[enough]


def _dot(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    product: npt.NDArray[np.float64] = np.einsum("ij,ij->i", x, y)
    return product


def _cosine(
    dot: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    # one root of the product: so that the cosine of equal rows is exactly one
    cosine: npt.NDArray[np.float64] = dot / np.maximum(np.sqrt(x * y), np.finfo(np.float64).tiny)
    return cosine


# -- how much was found -----------------------------------------------------------------------------------------------


def _estimate(
    rows: Halves, sample: Ints, similarity: float, keys: npt.NDArray[np.uint64], pool: ThreadPoolExecutor, hub: Ints
) -> Recall:
    """Compare the sampled rows with all, and look for the true pairs among the keys of those that were found."""
    sampled = rows[sample]
    starts = [(rows, start, sample, sampled, similarity, keys, hub) for start in range(0, len(rows), _ASSIGNED)]
    counts = _each(pool, _count, starts, "embedding recall")
    true, found = np.sum(counts, axis=0) if counts else np.zeros((2, 1), np.int64)
    with_pairs, pairs, hits = int((true > 0).sum()), int(true.sum()), int(found.sum())
    if not pairs:
        return Recall(len(sample), 0, 0, None, 0.0, 1.0)
    share = hits / pairs
    variance = float(((found - share * true) ** 2).sum()) / pairs**2  # of a ratio of two sums over rows
    trials = min(with_pairs, share * (1 - share) / variance) if variance else with_pairs
    z = 1.96
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / (1 + z * z / trials)
    return Recall(len(sample), pairs, hits, share, max(centre - half, 0.0), 1.0 if hits == pairs else centre + half)


def _count(
    rows: Halves, start: int, sample: Ints, sampled: Halves, similarity: float, keys: npt.NDArray[np.uint64], hub: Ints
) -> npt.NDArray[np.int64]:
    """Return of each sampled row its true pairs with some of the rows, and those of them that were found."""
    sampled32 = sampled.astype(np.float32)
    counts = np.zeros((2, len(sample)), np.int64)
    for first in range(start, min(start + _ASSIGNED, len(rows)), _BLOCK):
        block = rows[first : min(first + _BLOCK, len(rows))]
        crowds = hub[sample], hub[first : first + len(block)]
        i, j, _ = _near(sampled, sampled32, block, block.astype(np.float32), similarity, *crowds)
        i, j = i[sample[i] != first + j], j[sample[i] != first + j]
        key = pair_keys(sample[i], first + j)
        place = np.searchsorted(keys, key)
        hit = place < len(keys)
        hit[hit] = keys[place[hit]] == key[hit]
        counts[0] += np.bincount(i, minlength=len(sample))
        counts[1] += np.bincount(i[hit], minlength=len(sample))
    return counts
