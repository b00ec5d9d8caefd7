"""Verified edges between the samples of all shards -> groups around keepers, of images and of captions.

A group is a keeper and the samples with a verified edge to it.  Samples are visited in the order `images.keep`: one
with an edge to earlier keepers joins the best-ranked of them, any other becomes a keeper.  So a chain A~B~C never joins
what is unlike, and the result depends on no shard order.  Blank images have neither hash nor embedding worth comparing:
their edges are between equal looks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .compiled import compiled
from .config import JSON, Config, digest_of
from .edges import hashed, hashes_of, signatures_digest, words
from .errors import InputError
from .keeping import rank_samples
from .looks import join_looks
from .records import LOOK_SIDE, Floats, Groups, Ints, Samples, Shard, voids
from .store import Store, done, read_table, write_table


def load_samples(shards: list[Shard], store: Store, fields: tuple[str, ...] = ()) -> Samples:
    """Return the signatures of all shards, with the texts of these fields of the json.

    Raises InputError when two samples give the same uid of their own.
    """
    names = ["uid", "bad", "digest", "hash", "width", "height", "bytes", "blank", "look"]
    names += ["caption", "fingerprint", "captions", *(JSON + name for name in fields)]
    parts = [read_table(store.signatures(s.name), names) for s in shards]
    table = pa.concat_tables(parts).unify_dictionaries()
    first = np.cumsum([0, *(len(p) for p in parts)])
    good = table["bad"].is_null().to_numpy()
    samples = Samples(shards, first, good, table)
    uids = voids(table["uid"])[good]
    values, place, count = np.unique(uids, return_index=True, return_counts=True)
    if len(values) < len(uids):
        at = int(np.flatnonzero(good)[place[np.argmax(count)]])
        shard = int(np.searchsorted(first, at, "right")) - 1
        raise InputError(
            f"{shards[shard].name}: sample {at - first[shard]} has uid {table['uid'][at].as_py().hex()}, which "
            f"{count.max()} samples give; take input.uid_field away or make it unique"
        )
    return samples


# -- captions ---------------------------------------------------------------------------------------------------------


def distinct_captions(samples: Samples, store: Store) -> tuple[pa.Table, Ints]:
    """Write and return the table of distinct captions, sorted, and of each sample the row of its own (-1 if bad).

    The table holds every text that is a sample's caption or stands in its `captions`.
    """
    own = _plain(samples.table["caption"])
    pooled = _plain(pc.list_flatten(samples.table["captions"]))
    texts = pc.unique(pa.concat_arrays([own, pooled]).drop_null())
    texts = texts.take(pc.sort_indices(texts))
    key = digest_of(["captions-1", signatures_digest(samples.shards, store)])
    table = pa.table({"text": texts})
    if not done(path := store.place(store.captions, key), key):
        write_table(path, table, key)
    return table, caption_rows(table, own)


def caption_rows(distinct: pa.Table, texts: pa.Array) -> Ints:
    """Return the row of each text in the table of distinct captions, -1 for null."""
    rows: Ints = pc.index_in(texts, _plain(distinct["text"])).fill_null(-1).to_numpy().astype(np.int64)
    return rows


def _plain(column: pa.ChunkedArray) -> pa.Array:
    # with 64-bit offsets before the chunks are joined: captions may pass 2 GiB
    return pa.chunked_array([c.cast(pa.large_string()) for c in column.chunks], pa.large_string()).combine_chunks()


# -- groups -----------------------------------------------------------------------------------------------------------


def group(
    samples: Samples,
    edges: tuple[pa.Table, pa.Table],
    caption: Ints,
    keepers: pa.Table,
    config: Config,
) -> Groups:
    """Return the image and caption groups of all samples and their multiplicities.

    `caption` is of each sample the row of its own among the distinct captions, of each of which `keepers` has a row.
    """
    n = len(samples)
    _, uid = np.unique(voids(samples.table["uid"]), return_inverse=True)
    rank = rank_samples(samples, uid, config.images.keep)
    keeper, method, distance = _image_groups(samples, rank, edges, config)
    caption_keeper, caption_method, caption_distance = _caption_groups(samples, rank, caption, keepers)
    pairs, joint, count = np.unique(keeper * n + caption_keeper, return_inverse=True, return_counts=True)
    return Groups(
        rank=rank,
        image_group=keeper,
        method=method,
        distance=distance,
        caption_group=caption_keeper,
        caption=caption,
        image_count=np.bincount(keeper, minlength=n)[keeper],
        caption_count=np.bincount(caption_keeper, minlength=n)[caption_keeper],
        joint_count=count[joint],
        caption_method=caption_method,
        caption_distance=caption_distance,
        caption_images=np.bincount(pairs % max(n, 1), minlength=n)[caption_keeper],
        image_captions=np.bincount(pairs // max(n, 1), minlength=n)[keeper],
    )


def _image_groups(
    samples: Samples, rank: Ints, edges: tuple[pa.Table, pa.Table], config: Config
) -> tuple[Ints, npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return of each sample its keeper, and method and distance of the edge between them.

    Copies to the byte have the same edges, so they are one content; images of one hash have the same hash edges, so
    those are walked from hash to hash.
    """
    n = len(samples)
    keeper = np.arange(n)
    method, distance = np.full(n, -1, np.int8), np.zeros(n, np.float32)
    rows = np.flatnonzero(samples.good)
    rows = rows[np.argsort(rank[rows])]
    if not len(rows):
        return keeper, method, distance
    # contents and hashes are numbered by their best-ranked row, so that a smaller number is a better rank
    content = np.full(n, -1, np.int64)
    content[rows] = _number(voids(samples.table["digest"])[rows])
    best = rows[np.unique(content[rows], return_index=True)[1]]
    blank = samples.flags("blank")
    is_hashed, hashes = hashed(samples), hashes_of(samples)
    hash_of = np.full(n, -1, np.int64)
    compared = rows[is_hashed[rows]]
    hash_of[compared] = _number(hashes[compared])

    by_hash = _adjacent(edges[0], hash_of, hash_of.max() + 1, mutual=True)
    by_content = _adjacent(edges[1], content, len(best), mutual=False)
    steps = len(best) + len(by_hash[1]) + len(by_content[1])
    joined = compiled(_visit, steps)(hash_of[best], *by_hash, *by_content)
    flat = np.flatnonzero(blank[best])
    joined[flat] = flat[join_looks(_looks(samples, best[flat]))]

    keeper[rows] = best[joined[content[rows]]]
    copies = rows[keeper[rows] != rows]
    kept = keeper[copies]
    same = content[copies] == content[kept]
    bits = np.bitwise_count(words(hashes[copies]) ^ words(hashes[kept])).sum(1)
    by_bits = ~same & is_hashed[copies] & is_hashed[kept] & (bits <= config.images.hash_radius)
    method[copies] = np.where(same, 0, np.where(blank[copies], 3, np.where(by_bits, 1, 2)))
    distance[copies] = np.where(same, 0, bits)
    flat = copies[method[copies] == 3]
    distance[flat] = np.abs(_looks(samples, flat) - _looks(samples, keeper[flat])).max(1, initial=0)
    rest = copies[method[copies] == 2]
    distance[rest] = _distances(edges[1], content, content[rest], content[keeper[rest]])
    return keeper, method, distance


def _visit(hash_of: Ints, hash_ends: Ints, near_hash: Ints, ends: Ints, better: Ints) -> Ints:
    """Return of each content its keeper's, when these, in the order of their rank, are visited one by one."""
    n = len(hash_of)
    joined = np.arange(n)
    of_hash = np.full(len(hash_ends), n)  # of each hash, the best keeper within the radius
    for c in range(n):
        h = hash_of[c]
        best = of_hash[h] if h >= 0 else n
        for at in range(ends[c], ends[c + 1]):
            other = better[at]  # sorted: the first keeper is the best
            if other >= best:
                break
            if joined[other] == other:
                best = other
        if best < n:
            joined[c] = best
        elif h >= 0:
            of_hash[h] = c
            for at in range(hash_ends[h], hash_ends[h + 1]):
                of_hash[near_hash[at]] = min(of_hash[near_hash[at]], c)
    return joined


def _looks(samples: Samples, rows: Ints) -> npt.NDArray[np.int16]:
    """Return the looks of these blank samples, (N, 64) grey levels."""
    looks = b"".join(samples.table["look"].take(pa.array(rows)).to_pylist())
    return np.frombuffer(looks, np.uint8).reshape(-1, LOOK_SIDE**2).astype(np.int16)


def _adjacent(edges: pa.Table, number: Ints, n: int, mutual: bool) -> tuple[Ints, Ints]:
    """Return where the neighbours of each number begin, one more at the end, and these, sorted, one after the other.

    Without `mutual` only smaller numbers are told as neighbours of greater ones.
    """
    key = np.empty(len(edges) * (1 + mutual), np.int64)
    at = 0
    for a, b, _ in _parts(edges, number):
        for one, other in [(np.maximum(a, b), np.minimum(a, b)), (np.minimum(a, b), np.maximum(a, b))][: 1 + mutual]:
            key[at : at + len(a)] = one * n + other
            at += len(a)
    key.sort()
    ends = np.searchsorted(key, np.arange(n + 1) * n)
    key %= max(n, 1)
    return ends, key


def _distances(edges: pa.Table, number: Ints, a: Ints, b: Ints) -> npt.NDArray[np.float32]:
    """Return the stored distances between these pairs of numbers, which all have an edge."""
    n = len(number)
    wanted, inverse = np.unique(np.minimum(a, b) * n + np.maximum(a, b), return_inverse=True)
    found = np.zeros(len(wanted), np.float32)
    for one, other, distance in _parts(edges, number) if len(wanted) else ():
        key = np.minimum(one, other) * n + np.maximum(one, other)
        place = np.minimum(np.searchsorted(wanted, key), len(wanted) - 1)
        hit = wanted[place] == key
        found[place[hit]] = distance[hit]
    return found[inverse]


def _parts(edges: pa.Table, number: Ints) -> Iterator[tuple[Ints, Ints, npt.NDArray[np.float32]]]:
    """Yield the numbers at both ends of the edges and their distances, a million at a time: there may be 10^8."""
    for part in edges.to_batches(1 << 20):
        yield number[part["a"].to_numpy()], number[part["b"].to_numpy()], part["distance"].to_numpy()


def _caption_groups(
    samples: Samples, rank: Ints, caption: Ints, keepers: pa.Table
) -> tuple[Ints, npt.NDArray[np.int8], Floats]:
    """Return of each sample the one that stands for its caption group, and method and distance of the edge to it.

    That is the best-ranked of those that use the keeper's caption.  A sample without a caption is its own group.
    """
    n = len(samples)
    keeper = np.arange(n)
    rows = np.flatnonzero(samples.good & samples.table["fingerprint"].is_valid().to_numpy())
    rows = rows[np.argsort(-rank[rows])]
    stands = np.full(len(keepers), -1)
    stands[caption[rows]] = rows  # the last, and so the best-ranked, of each caption
    keeper[rows] = stands[keepers["keeper"].to_numpy()[caption[rows]]]
    method, distance = np.full(n, -1, np.int8), np.zeros(n, np.float32)
    joined = np.flatnonzero(keeper != np.arange(n))
    method[joined] = keepers["method"].to_numpy()[caption[joined]]
    distance[joined] = keepers["distance"].to_numpy()[caption[joined]]
    return keeper, method, distance


def _number(values: npt.NDArray[np.void] | npt.NDArray[np.uint64]) -> Ints:
    """Return of each value a number by first appearance: 0 for the first distinct one."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]
