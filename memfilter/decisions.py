"""(groups, scores, policy) -> one decision per sample, with its reasons.  Pure: no file is read or written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .config import DuplicatePolicy, Policies
from .records import BAD, DROP, KEEP, MASK, METHODS, Decisions, Floats, Groups, Ints, Samples, Scores

_ACTION = {"record": KEEP, "down_weight": KEEP, "mitigate": KEEP, "mask": MASK, "drop": DROP}


def decide(
    samples: Samples,
    groups: Groups,
    captions: pa.Table,
    scores: Scores | None,
    threshold: float | None,
    policy: Policies,
    general: pa.Array | None = None,
) -> Decisions:
    """Return the decisions.  At or above `threshold` a sample, and a caption, counts as memorized.

    An image duplicate is any member of an image group but its keeper: a full one where a better-ranked member has its
    caption, a partial one where the keeper has another caption; one may be both.  A caption duplicate is any member of
    a caption group but one: the best-ranked of those that the other policies treat the least harshly, so that a group
    never loses its last sample to two policies at once.  It is masked or dropped where it shows another image than that
    one; the same image is the image policies' affair.  The sample kept in a copy's place may itself be dropped under
    another policy.

    Where an image group's keeper is masked or dropped for its magnitude, its heir is kept in its stead: the best-ranked
    copy with an ordinary caption.  The heir takes the pool and is the canonical sample of the others, which are full or
    partial duplicates as if the keeper were not there; the keeper has the pool weight 0.  So no image is lost to its
    keeper's caption and the image policies, and none whose copies go trains twice.  Without an heir, a masked keeper
    may train on its pool; where that is empty, the pool weight is 0 too.

    `general` holds of each distinct caption the general one that joins the pools of its samples, null for none.
    """
    good, rows = samples.good, np.arange(len(samples))
    over, memorized = np.zeros(len(captions), bool), np.zeros(len(samples), bool)
    if scores is not None and threshold is not None:
        over, memorized = (magnitude >= np.float32(threshold) for magnitude in (scores.captions, scores.samples))

    ordinary = ~(memorized | np.append(over, False)[groups.caption])  # a bad sample's caption is -1
    stands = _standing(groups, memorized & (_ACTION[policy.magnitude] > KEEP), ordinary)
    replaced = (groups.image_group == rows) & (stands != rows)
    by_image = np.where((stands == rows) | replaced, KEEP, _by_image(groups, policy, stands, replaced))
    action = np.maximum(by_image, memorized * _ACTION[policy.magnitude])
    spared = _spared(groups, action)[groups.caption_group]
    caption_copy = good & (groups.caption_count > 1) & (spared != rows)
    another_image = groups.image_group != groups.image_group[spared]
    by_caption = caption_copy & another_image & (_ACTION[policy.caption_duplicate] > KEEP)
    action = np.maximum(action, by_caption * _ACTION[policy.caption_duplicate]).astype(np.int8)
    action[~good] = BAD

    codes = [f"{m}_duplicate" for m in METHODS] + ["caption_duplicate", "magnitude"]
    reasons = [groups.method == i for i in range(len(METHODS))] + [caption_copy, memorized & good]
    heir = np.where((action == DROP) & ~replaced, _in_its_place(groups, action, stands, replaced), stands)
    canonical = np.where(stands != rows, heir, np.where(by_caption, spared, -1))
    duplication = np.select(
        [groups.joint_count > 1, groups.image_count > 1, groups.caption_count > 1], [3, 2, 1], 0
    ).astype(np.int8)
    pooled = _nothing(len(samples))
    if policy.pool_captions:
        to = np.where((action == DROP) | replaced, heir, rows)  # a copy that stays keeps its captions to itself
        pooled = _pool(samples, groups, captions, over, action, to, general)
    weight = _share(groups, policy, action == KEEP)
    masked_for_caption = (action == MASK) & (by_image == KEEP) & ~by_caption
    has_caption = pc.fill_null(pc.list_value_length(pooled), 0).to_numpy() > 0
    pool_weight = _share(groups, policy, (action == KEEP) | (masked_for_caption & has_caption))
    mitigate = (action <= MASK) & _handed_over(groups, policy)
    return Decisions(action, reasons, codes, canonical, duplication, weight, pool_weight, mitigate, pooled)


def _by_image(groups: Groups, policy: Policies, stands: Ints, replaced: npt.NDArray[np.bool_]) -> Ints:
    """Action of the image policies on each sample."""
    full_copy = _best_with_both(groups, replaced) != np.arange(len(stands))
    partial_copy = groups.caption_group != groups.caption_group[stands]
    found: Ints = np.maximum(full_copy * _ACTION[policy.full], partial_copy * _ACTION[policy.partial])
    return found


def _best_with_both(groups: Groups, replaced: npt.NDArray[np.bool_]) -> Ints:
    """Best-ranked sample with each one's image and caption; a keeper that is replaced by its heir comes last."""
    both = groups.image_group * len(groups.rank) + groups.caption_group
    order = np.lexsort((groups.rank, replaced))
    _, first, place = np.unique(both[order], return_index=True, return_inverse=True)
    best = np.empty(len(order), np.int64)
    best[order] = order[first[place]]
    return best


def _standing(groups: Groups, memorized: npt.NDArray[np.bool_], ordinary: npt.NDArray[np.bool_]) -> Ints:
    """Row that stands for each sample's image: the group's keeper, or the heir of one that is memorized.

    The heir is the best-ranked ordinary copy.
    """
    copies = np.flatnonzero(memorized[groups.image_group] & ordinary)
    copies = copies[np.argsort(-groups.rank[copies])]
    stands = np.arange(len(ordinary))
    stands[groups.image_group[copies]] = copies  # the last, and so the best-ranked, of each image
    return stands[groups.image_group]


def _in_its_place(groups: Groups, action: npt.NDArray[np.int8], stands: Ints, replaced: npt.NDArray[np.bool_]) -> Ints:
    """Row of the sample of its image that stays in each sample's place; where none does, the one that stands for it.

    That is the best-ranked with its caption too that is kept or masked, else the best-ranked with another.  A keeper
    that is replaced by its heir stays in nobody's place.
    """
    order = np.lexsort((groups.rank, action))
    order = order[(action[order] <= MASK) & ~replaced[order]]
    of_image, first = np.unique(groups.image_group[order], return_index=True)
    heir = stands.copy()
    heir[of_image] = order[first]
    both = groups.image_group * len(action) + groups.caption_group
    pairs, first = np.unique(both[order], return_index=True)
    place = np.minimum(np.searchsorted(pairs, both), max(len(pairs) - 1, 0))
    twin = order[first][place] if len(pairs) else heir
    has_twin = pairs[place] == both if len(pairs) else np.zeros(len(action), bool)
    return np.where(has_twin, twin, heir[groups.image_group])


def _has_part(groups: Groups, policy: Policies, what: DuplicatePolicy) -> list[tuple[npt.NDArray[np.bool_], Ints]]:
    """Return, of each kind of duplication whose policy this is, which samples have a part in it, and whose group."""
    both = groups.image_group * len(groups.rank) + groups.caption_group
    kinds = [
        (policy.full, groups.joint_count > 1, both),
        (policy.partial, groups.image_captions > 1, groups.image_group),
        (policy.caption_duplicate, groups.caption_count > 1, groups.caption_group),
    ]
    return [(has_part, group) for its, has_part, group in kinds if its == what]


def _share(groups: Groups, policy: Policies, trains: npt.NDArray[np.bool_]) -> Floats:
    """Return the weight of each sample: where it trains 1 / how many train of a kind that is weighted down, else 0.

    The largest number counts, so that no group weighs more than one.
    """
    most = np.ones(len(trains), np.int64)
    for has_part, group in _has_part(groups, policy, "down_weight"):
        _, place = np.unique(group, return_inverse=True)
        training = np.bincount(place, trains, len(group)).astype(np.int64)[place]
        most = np.maximum(most, np.where(has_part, training, 1))
    return np.where(trains, 1 / most, 0).astype(np.float32)


def _handed_over(groups: Groups, policy: Policies) -> npt.NDArray[np.bool_]:
    """Tell which samples have a part in a kind of duplication whose captions training is to change."""
    found = np.zeros(len(groups.rank), bool)
    for has_part, _ in _has_part(groups, policy, "mitigate"):
        found |= has_part
    return found


def _spared(groups: Groups, action: Ints) -> Ints:
    """Return, at each caption group's ordinal, the member that no caption policy touches."""
    best = np.arange(len(action))
    order = np.lexsort((groups.rank, action, groups.caption_group))
    group, first = np.unique(groups.caption_group[order], return_index=True)
    best[group] = order[first]
    return best


def _pool(
    samples: Samples,
    groups: Groups,
    captions: pa.Table,
    over: npt.NDArray[np.bool_],
    action: npt.NDArray[np.int8],
    to: Ints,
    general: pa.Array | None,
) -> pa.ListArray:
    """Return of each kept or masked sample its own captions and those that come `to` it, without the memorized.

    Null where there was nothing to pool.  A sample's own caption comes first, then its json's `captions`, then the
    others' in the order of their rank, and the general form of its own caption last, behind that of a keeper which it
    replaces.  Captions without a visible character are not pooled.
    """
    n = len(samples)
    texts, rewritten = _with_general(captions["text"].combine_chunks().cast(pa.large_string()), general)
    unwanted = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0).to_numpy(zero_copy_only=False)
    unwanted = unwanted | np.pad(over, (0, len(texts) - len(captions)))
    lists = samples.table["captions"].cast(pa.large_list(pa.large_string())).combine_chunks()
    own = np.flatnonzero(samples.good)
    listed = pc.list_parent_indices(lists).to_numpy()
    listed_caption = pc.index_in(pc.list_flatten(lists), texts).to_numpy().astype(np.int64)
    source = np.concatenate([own, listed])
    caption = np.concatenate([groups.caption[own], listed_caption])
    target = to[source]
    place = np.concatenate([np.zeros(len(own), np.int64), 1 + np.arange(len(listed))])
    turn = np.where(source == target, -1, groups.rank[source])
    if len(captions):
        flagged = own[rewritten[groups.caption[own]] >= 0]
        heir = np.where(action[flagged] == DROP, flagged, to[flagged])
        source, target = np.append(source, flagged), np.append(target, heir)
        caption = np.append(caption, rewritten[groups.caption[flagged]])
        place, turn = np.append(place, 1 + (heir == flagged)), np.append(turn, np.full(len(flagged), n))

    has_pool = np.zeros(n, bool)
    has_pool[target[(target != source) | (place > 0)]] = True
    wanted = has_pool[target] & (action[target] <= MASK) & ~unwanted[caption]
    caption, target, place, turn = (x[wanted] for x in (caption, target, place, turn))
    order = np.lexsort((place, turn, target))
    target, caption = target[order], caption[order]
    _, once = np.unique(target * len(texts) + caption, return_index=True)
    once.sort()
    target, caption = target[once], caption[once]
    offsets = np.r_[0, np.cumsum(np.bincount(target, minlength=n))]
    none = ~has_pool | (action > MASK)
    values = texts.take(pa.array(caption)).cast(pa.string())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=pa.array(none))


def _with_general(texts: pa.Array, general: pa.Array | None) -> tuple[pa.Array, Ints]:
    """Return the distinct captions with the general ones behind them, and of each of the former the general one's row.

    A general caption that is among the distinct ones has their row; -1 stands for none.
    """
    if general is None:
        return texts, np.full(len(texts), -1)
    both = pc.unique(pa.concat_arrays([texts, general.drop_null()]))  # in the order of first appearance
    return both, pc.index_in(general, both).fill_null(-1).to_numpy().astype(np.int64)


def _nothing(n: int) -> pa.ListArray:
    return pa.nulls(n, pa.list_(pa.string()))
