"""Candidates among the samples of all shards -> groups around keepers, of images and of captions.

A group is a keeper and the samples with a verified edge to it.  Samples are visited in the order `images.keep`: one
with an edge to earlier keepers joins the best-ranked of them, any other becomes a keeper.  So a chain A~B~C never joins
what is unlike, and the result depends on no shard order.  A candidate is verified when it decides: of a sample and a
keeper that it might join.  So a heavy group of n copies costs n comparisons, not n^2 / 2.  Blank images have neither
hash nor embedding worth comparing: their edges are between equal looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .compiled import compiled
from .config import JSON, Config, digest_of
from .edges import Candidates, hashed, hashes_of, signatures_digest, words
from .errors import InputError, RunError
from .judge import Judge
from .keeping import rank_samples
from .looks import DISTANT, join_looks, most_levels
from .records import LOOK_BYTES, Floats, Groups, Ints, Samples, Shard, voids
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
    candidates: Candidates,
    caption: Ints,
    keepers: pa.Table,
    store: Store,
    config: Config,
) -> Groups:
    """Return the image and caption groups of all samples and their multiplicities; candidates are judged on the way.

    `caption` is of each sample the row of its own among the distinct captions, of each of which `keepers` has a row.
    """
    n = len(samples)
    _, uid = np.unique(voids(samples.table["uid"]), return_inverse=True)
    rank = rank_samples(samples, uid, config.images.keep)
    keeper, method, distance, score = _image_groups(samples, rank, candidates, store, config)
    caption_keeper, caption_method, caption_distance = _caption_groups(samples, rank, caption, keepers)
    pairs, joint, count = np.unique(keeper * n + caption_keeper, return_inverse=True, return_counts=True)
    return Groups(
        rank=rank,
        image_group=keeper,
        method=method,
        distance=distance,
        score=score,
        threshold=config.images.match_threshold,
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
    samples: Samples, rank: Ints, candidates: Candidates, store: Store, config: Config
) -> tuple[Ints, npt.NDArray[np.int8], Floats, Floats]:
    """Keeper row, match method, match distance and match score of each sample.

    Copies to the byte have the same candidates, so they are one content.
    """
    n = len(samples)
    keeper = np.arange(n)
    method, distance, score = np.full(n, -1, np.int8), np.zeros(n, np.float32), np.full(n, np.nan, np.float32)
    rows = np.flatnonzero(samples.good)
    rows = rows[np.argsort(rank[rows])]
    # contents and hashes are numbered by their best-ranked row, so that a smaller number is a better rank
    content = np.full(n, -1, np.int64)
    content[rows] = _number(voids(samples.table["digest"])[rows])
    best = rows[np.unique(content[rows], return_index=True)[1]]
    is_hashed, hashes = hashed(samples), hashes_of(samples)
    flat = np.flatnonzero(samples.flags("blank")[best])
    inputs = signatures_digest(samples.shards, store)
    asked = candidates.rows(samples)
    asked[best[content[np.flatnonzero(asked & (content >= 0))]]] = True  # a content is compared by its best-ranked row
    with Judge(samples, store, config, inputs, np.flatnonzero(asked), candidates.encoder) as judge:

        def bits(a: Ints, b: Ints) -> npt.NDArray[np.uint64]:
            apart = np.bitwise_count(words(hashes[a]) ^ words(hashes[b])).sum(1)
            return np.where(is_hashed[a] & is_hashed[b], apart, 1 << 16)

        def accepts(c: Ints, k: Ints) -> npt.NDArray[np.bool_]:
            a, b = best[c], best[k]
            return judge.accepts(a, b, bits(a, b) <= config.images.hash_radius)

        _check(candidates, content, store)
        joined = visit(_neighbours(samples, rows, content, best, candidates), accepts)
        joined[flat] = flat[join_looks(_looks(samples, best[flat]), most_levels(config.images.match_threshold))]
        judge.finish()
        keeper[rows] = best[joined[content[rows]]]
        copies = rows[keeper[rows] != rows]
        kept = keeper[copies]
        same, blank = content[copies] == content[kept], samples.flags("blank")[copies]
        one, other = best[content[copies]], best[content[kept]]
        by_bits = bits(copies, kept) <= config.images.hash_radius
        method[copies] = np.select([same, blank, by_bits], [0, 3, 1], 2)
        by_pair = ~same & ~blank
        distance[copies] = np.where(same, 0, bits(copies, kept))
        score[copies] = 1
        score[copies[by_pair]] = judge.scores(one[by_pair], other[by_pair])
        rest = method[copies] == 2
        distance[copies[rest]] = np.maximum(1 - judge.cosine(one[rest], other[rest]), 0)
    alike = copies[method[copies] == 3]
    levels = np.abs(_looks(samples, alike) - _looks(samples, keeper[alike])).max(1, initial=0)
    distance[alike], score[alike] = levels, 1 - levels / DISTANT
    return keeper, method, distance, score


def _looks(samples: Samples, rows: Ints) -> npt.NDArray[np.int16]:
    """Return the looks of these blank samples, (N, 66) levels."""
    looks = b"".join(samples.table["look"].take(pa.array(rows)).to_pylist())
    return np.frombuffer(looks, np.uint8).reshape(-1, LOOK_BYTES).astype(np.int16)


@dataclass(frozen=True)
class Neighbours:
    """The candidates of n contents, which are numbered by their rank.

    Content c has those of `near[ends[c]:ends[c + 1]]`, all smaller than c and sorted; and, in each hub of
    `hubs[hub_ends[c]:hub_ends[c + 1]]`, the members of that hub: `members[member_ends[h]:member_ends[h + 1]]`, sorted.
    """

    ends: Ints
    near: Ints
    hub_ends: Ints
    hubs: Ints
    member_ends: Ints
    members: Ints
    hash_hubs: int  # the hubs before this one are of equal hashes


def _neighbours(samples: Samples, rows: Ints, content: Ints, best: Ints, candidates: Candidates) -> Neighbours:
    """Return the candidates of the contents: equal hashes are a hub, in which near hashes look as well."""
    n, hashes = len(best), hashes_of(samples)
    hash_of = np.full(len(samples), -1, np.int64)
    compared = rows[hashed(samples)[rows]]
    hash_of[compared] = _number(hashes[compared])
    count = int(hash_of.max(initial=-1)) + 1
    a, b = (content[candidates.pairs[name].to_numpy()] for name in ("a", "b"))
    ends, near = _lists(np.maximum(a, b), np.minimum(a, b), n)
    node = np.arange(count)
    a, b = (hash_of[candidates.hashes[name].to_numpy()] for name in ("a", "b"))
    looked_in = _lists(np.concatenate([node, a, b]), np.concatenate([node, b, a]), count)
    own = np.flatnonzero(hash_of[best] >= 0)
    hash_hubs = np.diff(looked_in[0])[hash_of[best[own]]]
    content_of = np.repeat(own, hash_hubs)
    first = looked_in[0][hash_of[best[own]]]
    at = np.repeat(first - np.cumsum(hash_hubs) + hash_hubs, hash_hubs) + np.arange(len(content_of))
    member = content[candidates.hubs["row"].to_numpy()]
    hub = candidates.hubs["hub"].to_numpy() + count
    hub_ends, hubs = _lists(np.concatenate([content_of, member]), np.concatenate([looked_in[1][at], hub]), n)
    total = int(max(hub.max(initial=-1) + 1, count))
    member_ends, members = _lists(np.concatenate([hash_of[best[own]], hub]), np.concatenate([own, member]), total)
    return Neighbours(ends, near, hub_ends, hubs, member_ends, members, count)


def _check(candidates: Candidates, content: Ints, store: Store) -> None:
    """Raise RunError where stored candidates name rows that are none, or hubs without number."""
    named = [table[name] for table in (candidates.pairs, candidates.hashes) for name in ("a", "b")]
    for column in (*named, candidates.hubs["row"]):
        rows = column.to_numpy()
        if len(rows) and not (0 <= rows.min() <= rows.max() < len(content) and content[rows].min() >= 0):
            raise RunError(
                f"{store.edges}: damaged, it names samples that are none; remove it and run the command again"
            )
    hubs = candidates.hubs["hub"].to_numpy()
    if len(hubs) and not 0 <= hubs.min() <= hubs.max() < len(content):
        raise RunError(f"{store.edges}: damaged, a hub has no number; remove it and run the command again")


def _lists(of: Ints, other: Ints, n: int) -> tuple[Ints, Ints]:
    """Return where the others of each number begin, one more at the end, and these, sorted, one after the other."""
    key = of * max(n, int(other.max(initial=0)) + 1)
    key += other
    key.sort()
    width = max(n, int(other.max(initial=0)) + 1)
    return np.searchsorted(key, np.arange(n + 1) * width), key % width


def visit(neighbours: Neighbours, accepts: Callable[[Ints, Ints], npt.NDArray[np.bool_]]) -> Ints:
    """Return of each content its keeper's, when these, in the order of their rank, are visited one by one.

    `accepts` tells of pairs (content, keeper) whether they are copies.  It is asked about the best-ranked keeper first,
    and about no other once that one is joined.  Of the keepers that a content meets in hubs alone it tries 32 that the
    encoder takes for like ones, and 256 of the same hash: in a crowd of pictures that only look alike, no more.
    """
    ends, member_ends, members = neighbours.ends, neighbours.member_ends, neighbours.members
    n = len(ends) - 1
    joined, tried, fails = np.full(n, -1), np.full(n, -1), np.zeros((n, 3), np.int64)
    undecided, at = np.arange(n), ends[:-1].copy()
    steps = n + len(neighbours.near) + len(neighbours.hubs) + len(members)
    step, shorten = compiled(_step, steps), compiled(_shortened, steps)
    while len(undecided):
        asked, keepers, met_in = step(
            undecided, joined, tried, fails, at, ends, neighbours.near, neighbours.hub_ends, neighbours.hubs,
            member_ends, members, neighbours.hash_hubs, _TRIED,
        )  # fmt: skip
        if len(asked):
            good = accepts(asked, keepers)
            joined[asked[good]] = keepers[good]
            tried[asked[~good]] = keepers[~good]
            fails[asked[~good], met_in[~good]] += 1
        undecided = undecided[joined[undecided] < 0]
        member_ends, members = shorten(joined, member_ends, members)
    return joined


_TRIED = (0, 256, 32)  # in no hub, in one of a hash, and in one of the encoder's: the first is not counted


def _step(
    undecided: Ints, joined: Ints, tried: Ints, fails: Ints, at: Ints, ends: Ints, near: Ints, hub_ends: Ints,
    hubs: Ints, member_ends: Ints, members: Ints, hash_hubs: int, most: tuple[int, int, int],
) -> tuple[Ints, Ints, Ints]:  # fmt: skip
    """Make keepers of the contents that have no candidate left.

    Return which have a keeper for the next one, that keeper, and where they meet it: in no hub, in one of a hash or in
    one of the encoder's.
    """
    asked, keepers = np.empty(len(undecided), np.int64), np.empty(len(undecided), np.int64)
    met_in, count = np.empty(len(undecided), np.int64), 0
    for c in undecided:
        best, where = c, 0
        p = at[c]
        while p < ends[c + 1] and (near[p] <= tried[c] or (joined[near[p]] >= 0 and joined[near[p]] != near[p])):
            p += 1
        at[c] = p
        if p < ends[c + 1]:
            best = near[p]
        for h in hubs[hub_ends[c] : hub_ends[c + 1]]:
            kind = 1 if h < hash_hubs else 2
            if fails[c, kind] >= most[kind]:
                continue
            low, high = member_ends[h], member_ends[h + 1]
            while low < high:  # the first member behind the one that was tried last
                middle = (low + high) // 2
                if members[middle] <= tried[c]:
                    low = middle + 1
                else:
                    high = middle
            while low < member_ends[h + 1] and joined[members[low]] >= 0 and joined[members[low]] != members[low]:
                low += 1
            if low < member_ends[h + 1] and members[low] < best:
                best, where = members[low], kind
        if best == c:
            joined[c] = c
        elif joined[best] == best:
            asked[count], keepers[count], met_in[count] = c, best, where
            count += 1
    return asked[:count], keepers[:count], met_in[:count]


def _shortened(joined: Ints, ends: Ints, members: Ints) -> tuple[Ints, Ints]:
    """Return the lists of members without those that joined a keeper."""
    kept, left, count = np.zeros(len(ends), np.int64), np.empty(len(members), np.int64), 0
    for h in range(len(ends) - 1):
        for m in members[ends[h] : ends[h + 1]]:
            if joined[m] < 0 or joined[m] == m:
                left[count] = m
                count += 1
        kept[h + 1] = count
    return kept, left[:count]


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
