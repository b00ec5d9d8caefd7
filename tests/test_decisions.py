"""Decisions against a reference that decides one sample after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.config import Policies
from memfilter.decisions import decide
from memfilter.records import ACTIONS, DUPLICATION, METHODS, Decisions, Groups, Samples, Scores, Shard, signature_schema

THRESHOLD = 0.5


@dataclass(frozen=True)
class Row:
    """One sample: its image group by name (None: bad), its caption, and the texts of its json."""

    image: int | None
    caption: str = ""
    captions: tuple[str, ...] = ()


@dataclass
class Case:
    """Samples, their groups, and of each caption the magnitude."""

    rows: list[Row]
    rank: list[int]  # of each row
    method: list[int]  # of each row's edge to its keeper, where it is a copy
    magnitude: dict[str, float] = field(default_factory=dict)
    threshold: float | None = THRESHOLD
    policy: Policies = field(default_factory=Policies)
    own: dict[int, float] = field(default_factory=dict)  # magnitudes of rows that are scored with their images

    def __post_init__(self) -> None:
        n = len(self.rows)
        self.order = sorted(range(n), key=lambda i: self.rank[i])
        self.keeper = [self._first(lambda j, i=i: self.rows[j].image == self.rows[i].image, i) for i in range(n)]
        self.caption_keeper = [
            self._first(lambda j, i=i: group_name(self.rows[j]) == group_name(self.rows[i]), i) for i in range(n)
        ]
        self.texts = sorted({t for r in self.rows if r.image is not None for t in (r.caption, *r.captions)})

    def _first(self, alike: object, i: int) -> int:
        """Return the best-ranked good sample that is alike; a bad one, or one in no group, stands for itself."""
        assert callable(alike)
        return next((j for j in self.order if self.is_good(i) and self.is_good(j) and alike(j)), i)

    def is_good(self, i: int) -> bool:
        return self.rows[i].image is not None

    def is_copy(self, i: int) -> bool:
        return self.keeper[i] != i

    def is_over(self, text: str) -> bool:
        return self.threshold is not None and self.magnitude.get(text, 0) >= self.threshold


def group_name(row: Row) -> object:
    """Return what is equal for the samples of one caption group."""
    return row.caption.casefold() or object()


def decided(case: Case, general: dict[str, str] | None = None) -> Decisions:
    n = len(case.rows)
    good = [case.is_good(i) for i in range(n)]
    schema = signature_schema(0)
    columns = {name: pa.nulls(n, schema.field(name).type) for name in schema.names}
    columns["caption"] = pa.array([r.caption if g else None for r, g in zip(case.rows, good, strict=True)])
    columns["captions"] = pa.array(
        [list(r.captions) or None if g else None for r, g in zip(case.rows, good, strict=True)], pa.list_(pa.string())
    )
    samples = Samples([Shard("a.tar", "a.tar", None)], np.array([0, n]), np.array(good, bool), pa.table(columns))
    caption = [case.texts.index(r.caption) if g else -1 for r, g in zip(case.rows, good, strict=True)]
    joint = list(zip(case.keeper, case.caption_keeper, strict=True))
    groups = Groups(
        np.array(case.rank, np.int64),
        np.array(case.keeper, np.int64),
        np.array([case.method[i] if case.is_copy(i) else -1 for i in range(n)], np.int8),
        np.zeros(n, np.float32),
        np.array(case.caption_keeper, np.int64),
        np.array(caption, np.int64),
        counts(case.keeper),
        counts(case.caption_keeper),
        counts(joint),
        np.array([0 if case.caption_keeper[i] != i else -1 for i in range(n)], np.int8),
        np.zeros(n, np.float32),
        np.array([len({j[0] for j in joint if j[1] == c}) for c in case.caption_keeper], np.int64),
        np.array([len({j[1] for j in joint if j[0] == k}) for k in case.keeper], np.int64),
        np.full(n, np.nan, np.float32),
        0.5,
    )
    magnitudes = np.array([case.magnitude.get(t, 0) for t in case.texts], np.float32)
    of_samples = np.append(magnitudes, np.float32(np.nan))[caption]
    of_samples[list(case.own)] = list(case.own.values())
    scores = Scores(magnitudes, of_samples, of_samples, {})
    captions = pa.table({"text": pa.array(case.texts, pa.large_string())})
    forms = pa.array([general.get(t) for t in case.texts], pa.large_string()) if general else None
    return decide(samples, groups, captions, scores, case.threshold, case.policy, forms)


def counts(names: list[object] | list[int] | list[tuple[int, int]]) -> np.ndarray:
    number = Counter(names)
    return np.array([number[name] for name in names], np.int64)


def actions(found: Decisions) -> list[str]:
    return [ACTIONS[a] for a in found.action]


def reasons(found: Decisions) -> list[list[str]]:
    return [
        [c for c, flags in zip(found.codes, found.reasons, strict=True) if flags[i]] for i in range(len(found.action))
    ]


# -- the reference ----------------------------------------------------------------------------------------------------

HARM = {"record": 0, "mask": 1, "drop": 2}
SEVERITY = {**HARM, "down_weight": 0, "mitigate": 0}
ACTION = {0: "keep", 1: "mask", 2: "drop"}


def pair(case: Case, i: int) -> tuple[int, int]:
    return case.keeper[i], case.caption_keeper[i]


def heir(case: Case, i: int) -> int | None:
    """Return the copy that takes the place of a sample's keeper: of one over the threshold the best copy below it."""
    if SEVERITY[case.policy.magnitude] == 0 or not case.is_over(case.rows[case.keeper[i]].caption):
        return None
    copies = [j for j in case.order if case.is_copy(j) and case.keeper[j] == case.keeper[i]]
    return next((j for j in copies if not case.is_over(case.rows[j].caption)), None)


def is_replaced(case: Case, i: int) -> bool:
    return not case.is_copy(i) and heir(case, i) is not None


def by_image(case: Case, i: int) -> int:
    """Return how hard the image policies are on a sample; they count as if a replaced keeper were not there."""
    policy = case.policy
    if stands(case, i) == i or is_replaced(case, i):
        return 0
    same_pair = [j for j in case.order if pair(case, j) == pair(case, i) and not is_replaced(case, j)]
    is_partial = case.caption_keeper[stands(case, i)] != case.caption_keeper[i]
    return max(
        SEVERITY[policy.full_duplicate or policy.image_duplicate] if same_pair[0] != i else 0,
        SEVERITY[policy.partial_duplicate or policy.image_duplicate] if is_partial else 0,
    )


def before_captions(case: Case, i: int) -> int:
    """Return how hard the image and magnitude policies are on a sample."""
    own = SEVERITY[case.policy.magnitude] if case.is_over(case.rows[i].caption) else 0
    return max(by_image(case, i), own)


def spared(case: Case, i: int) -> int:
    """Return the sample of i's caption group that no caption policy touches: the best of the least harmed."""
    members = [j for j in range(len(case.rows)) if case.caption_keeper[j] == case.caption_keeper[i]]
    return min(members, key=lambda j: (before_captions(case, j), case.rank[j]))


def reference(case: Case) -> list[tuple[str, list[str], int]]:
    """Return action, reasons and canonical of each sample."""
    found = []
    for i, row in enumerate(case.rows):
        if not case.is_good(i):
            found.append(("bad", [], -1))
            continue
        severity, why, canonical = before_captions(case, i), [], -1
        if case.is_copy(i):
            why.append(f"{METHODS[case.method[i]]}_duplicate")
        stays = spared(case, i)  # of its captions
        if stays != i:
            why.append("caption_duplicate")
            harm = SEVERITY[case.policy.caption_duplicate] if case.keeper[stays] != case.keeper[i] else 0
            severity = max(severity, harm)
            if stands(case, i) == i and harm:
                canonical = stays
        if case.is_over(row.caption):
            why.append("magnitude")
        found.append((ACTION[severity], why, canonical))
    action = [a for a, _, _ in found]
    return [
        (a, why, in_its_place(case, i, action) if stands(case, i) != i else canonical)
        for i, (a, why, canonical) in enumerate(found)
    ]


def stands(case: Case, i: int) -> int:
    """Return the sample that stands for a sample's image."""
    found = heir(case, i)
    return case.keeper[i] if found is None else found


def in_its_place(case: Case, i: int, action: list[str]) -> int:
    """Return the sample that a dropped copy leaves the place to: kept before masked, with its own caption if any is."""
    stay = [j for a in ("keep", "mask") for j in case.order if action[j] == a and case.keeper[j] == case.keeper[i]]
    stay = [j for j in stay if not is_replaced(case, j)]
    stay.sort(key=lambda j: pair(case, j) != pair(case, i))
    return stay[0] if stay and action[i] == "drop" and not is_replaced(case, i) else stands(case, i)


def duplication(case: Case, i: int) -> str:
    def others(alike: object) -> bool:
        assert callable(alike)
        return any(alike(j) for j in range(len(case.rows)) if j != i)

    def same_image(j: int) -> bool:
        return case.keeper[j] == case.keeper[i]

    def same_caption(j: int) -> bool:
        return case.caption_keeper[j] == case.caption_keeper[i]

    if others(lambda j: same_image(j) and same_caption(j)):
        return "full"
    if others(same_image):
        return "partial"
    return "caption" if others(same_caption) else "none"


def pool(case: Case, i: int, action: list[str]) -> list[str] | None:
    """Return the pooled captions: own, own json's, then by rank those of each that gives its own; null with none."""
    if not case.policy.pool_captions or action[i] not in ("keep", "mask") or is_replaced(case, i):
        return None
    giving = [j for j in case.order if case.is_good(j) and (action[j] == "drop" or is_replaced(case, j))]
    giving = [j for j in giving if in_its_place(case, j, action) == i]
    if not giving and not case.rows[i].captions:
        return None
    found: list[str] = []
    for j in (i, *giving):
        for text in (case.rows[j].caption, *case.rows[j].captions):
            if text and text not in found and not case.is_over(text):
                found.append(text)
    return found


# -- random cases -----------------------------------------------------------------------------------------------------

TEXTS = ["", "cat", "Cat", "CAT", "dog", "Dog", "a bird", "zebra"]
POLICY = st.sampled_from(["record", "mask", "drop"])
OF_KIND = st.sampled_from(["record", "down_weight", "mitigate", "mask", "drop"])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(0, 12))
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5, unique=True))
    rows = [
        Row(
            draw(st.sampled_from([None, 0, 1, 2, 3, 3, 4, 4])),
            draw(st.sampled_from(texts)),
            tuple(draw(st.lists(st.sampled_from(TEXTS), max_size=3))) if draw(st.booleans()) else (),
        )
        for _ in range(n)
    ]
    ranks = draw(st.permutations(range(n)))
    order = sorted(range(n), key=lambda i: (rows[i].image is None, ranks[i]))
    return Case(
        rows,
        [order.index(i) for i in range(n)],
        [draw(st.integers(0, 2)) for _ in range(n)],
        {t: draw(st.sampled_from([0.0, 0.25, THRESHOLD, 0.75, float("nan")])) for t in TEXTS},
        draw(st.sampled_from([None, 0.0, THRESHOLD, 0.7])),
        draw(
            st.builds(
                Policies,
                image_duplicate=OF_KIND,
                full_duplicate=st.none() | OF_KIND,
                partial_duplicate=st.none() | OF_KIND,
                caption_duplicate=OF_KIND,
                magnitude=POLICY,
            )
        ),
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_actions_reasons_and_canonicals_equal_the_reference(case: Case) -> None:
    found = decided(case)
    assert list(zip(actions(found), reasons(found), found.canonical.tolist(), strict=True)) == reference(case)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_weights_and_mitigation_follow_the_policy_of_each_kind(case: Case) -> None:
    found, policy = decided(case), case.policy
    action, n = actions(found), len(case.rows)
    pools = found.pooled.to_pylist()
    # what is masked for its caption's magnitude alone trains in place of nothing else, and on a caption of its pool
    kept = [a == "keep" for a in action]
    by_pool = [is_masked_for_its_caption(case, i) and action[i] == "mask" and bool(pools[i]) for i in range(n)]
    of_image = policy.full_duplicate or policy.image_duplicate, policy.partial_duplicate or policy.image_duplicate
    for i in range(n):
        full = [j for j in range(n) if pair(case, j) == pair(case, i)]
        partial = [j for j in range(n) if case.keeper[j] == case.keeper[i]]
        caption = [j for j in range(n) if case.caption_keeper[j] == case.caption_keeper[i]]
        captions = {case.caption_keeper[j] for j in partial}
        kinds = [(of_image[0], full, len(full) > 1), (of_image[1], partial, len(captions) > 1)]
        kinds.append((policy.caption_duplicate, caption, len(caption) > 1))
        weighted = [members for p, members, has_part in kinds if has_part and p == "down_weight"]
        for weights, trains in ((found.weight, kept), (found.pool_weight, np.logical_or(kept, by_pool))):
            share = 1 / max([1, *(sum(trains[j] for j in members) for members in weighted)])
            assert weights[i] == np.float32(share if trains[i] else 0)
        asked = any(p == "mitigate" and has_part for p, _, has_part in kinds)
        assert found.mitigate[i] == (asked and action[i] in ("keep", "mask"))


def is_masked_for_its_caption(case: Case, i: int) -> bool:
    """Tell whether neither the image policies nor that of captions touch a sample, and no heir takes its place."""
    stays = spared(case, i)
    touched = SEVERITY[case.policy.caption_duplicate] > 0 and case.keeper[stays] != case.keeper[i]
    return not (by_image(case, i) or is_replaced(case, i) or touched)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_duplication_equals_the_reference(case: Case) -> None:
    assert [DUPLICATION[d] for d in decided(case).duplication] == [duplication(case, i) for i in range(len(case.rows))]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_pooled_captions_equal_the_reference(case: Case) -> None:
    found = decided(case)
    assert found.pooled.to_pylist() == [pool(case, i, actions(found)) for i in range(len(case.rows))]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_caption_group_never_loses_its_last_sample_to_the_caption_policy(case: Case) -> None:
    action = actions(decided(case))
    for stands in set(case.caption_keeper):
        members = [i for i in range(len(case.rows)) if case.caption_keeper[i] == stands and case.is_good(i)]
        for gone in ({"drop"}, {"drop", "mask"}):
            without = [ACTION[before_captions(case, i)] for i in members]
            if any(a not in gone for a in without):
                assert any(action[i] not in gone for i in members)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_group_of_images_keeps_its_keeper_unless_its_caption_goes(case: Case) -> None:
    found = decided(case)
    action, why = actions(found), reasons(found)
    for i in set(case.keeper):
        if case.is_good(i) and action[i] != "keep":
            assert set(why[i]) & {"caption_duplicate", "magnitude"}


def in_training(found: Decisions, pooled: bool) -> list[bool]:
    """Tell which samples train, on their own captions or on their pools, as a loader decides it."""
    pools = found.pooled.to_pylist()
    by_pool = [bool(p and w) for p, w in zip(pools, found.pool_weight, strict=True)]
    return [bool(w) or (pooled and p) for w, p in zip(found.weight, by_pool, strict=True)]


@settings(max_examples=200, deadline=None)
@given(cases(), POLICY.filter(HARM.get), st.booleans())
def test_every_image_trains_once_if_it_has_an_ordinary_caption_and_never_twice(
    case: Case, policy: str, pooled: bool
) -> None:
    case.policy = Policies(image_duplicate=policy, magnitude=case.policy.magnitude, pool_captions=pooled)  # type: ignore[arg-type]
    found = decided(case)
    for keeper in set(case.keeper):
        members = [i for i in range(len(case.rows)) if case.keeper[i] == keeper]
        captions = [case.rows[i].caption for i in members if case.is_good(i)]
        for trains in (in_training(found, False), in_training(found, True)):
            assert sum(trains[i] for i in members) <= 1
            if captions and (case.policy.magnitude == "record" or not all(map(case.is_over, captions))):
                assert sum(trains[i] for i in members) == 1


# -- one by one -------------------------------------------------------------------------------------------------------


def case_of(*rows: Row, **more: object) -> Case:
    return Case(list(rows), list(range(len(rows))), [1] * len(rows), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("image", "caption", "magnitude"), list(product(HARM, repeat=3)))
def test_the_hardest_policy_decides(image: str, caption: str, magnitude: str) -> None:
    policy = Policies(image_duplicate=image, caption_duplicate=caption, magnitude=magnitude)  # type: ignore[arg-type]
    # the last row is a copy of the first by image, of the second by caption, and memorized
    case = case_of(Row(0, "fish"), Row(1, "cat"), Row(0, "CAT"), Row(None), magnitude={"CAT": 1.0}, policy=policy)
    found = decided(case)
    hardest = max(image, caption, magnitude, key=SEVERITY.__getitem__)
    assert actions(found) == ["keep", "keep", {"record": "keep"}.get(hardest, hardest), "bad"]
    assert reasons(found) == [[], [], ["hash_duplicate", "caption_duplicate", "magnitude"], []]


def test_a_bad_sample_is_bad_for_no_reason_of_the_policies() -> None:
    found = decided(case_of(Row(None), Row(None), Row(0, "")))
    assert actions(found) == ["bad", "bad", "keep"]
    assert reasons(found) == [[], [], []]
    assert found.canonical.tolist() == [-1, -1, -1]
    assert [DUPLICATION[d] for d in found.duplication] == ["none"] * 3
    assert found.pooled.to_pylist() == [None] * 3


def test_the_default_policies_drop_copies_record_captions_and_mask_the_memorized() -> None:
    found = decided(case_of(Row(0, "a"), Row(0, "b"), Row(1, "a"), Row(2, "m"), magnitude={"m": 0.9}))
    assert actions(found) == ["keep", "drop", "keep", "mask"]
    assert found.canonical.tolist() == [-1, 0, -1, -1]


@pytest.mark.parametrize(("threshold", "masked"), [(None, []), (0.0, [0, 1, 2]), (0.3, [1, 2]), (0.5, [2]), (0.51, [])])
def test_a_caption_at_the_threshold_is_memorized(threshold: float | None, masked: list[int]) -> None:
    magnitude = {"a": 0.0, "b": 0.3, "c": 0.5}
    found = decided(case_of(Row(0, "a"), Row(1, "b"), Row(2, "c"), magnitude=magnitude, threshold=threshold))
    assert [i for i, a in enumerate(actions(found)) if a == "mask"] == masked


def test_without_scores_nothing_is_memorized() -> None:
    case = case_of(Row(0, "a"))
    samples = Samples([], np.array([0]), np.ones(1, bool), pa.table({"captions": pa.nulls(1, pa.list_(pa.string()))}))
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    alone, zero = np.full(1, -1, np.int8), np.zeros(1, np.float32)
    groups = Groups(none, none, alone, zero, none, none, one, one, one, alone, zero, one, one, zero, 0.5)
    captions = pa.table({"text": pa.array(case.texts, pa.large_string())})
    found = decide(samples, groups, captions, None, 0.0, Policies())
    assert (actions(found), reasons(found)) == (["keep"], [[]])


def test_the_sample_that_a_caption_group_keeps_is_one_that_the_image_policy_leaves() -> None:
    policy = Policies(caption_duplicate="drop")
    # the best-ranked "cat" is a copy of the fish
    found = decided(case_of(Row(0, "fish"), Row(0, "cat"), Row(1, "cat"), Row(2, "cat"), policy=policy))
    assert actions(found) == ["keep", "drop", "keep", "drop"]
    assert found.canonical.tolist() == [-1, 0, -1, 2]


def test_the_sample_that_a_caption_group_keeps_is_one_that_no_other_policy_masks() -> None:
    policy = Policies(caption_duplicate="drop")
    found = decided(case_of(Row(0, "Cat"), Row(1, "cat"), policy=policy, magnitude={"Cat": 1.0}))
    assert actions(found) == ["drop", "keep"]


def test_a_masked_sample_outlives_a_dropped_one_as_the_last_of_its_caption_group() -> None:
    policy = Policies(caption_duplicate="drop")
    # of the cats one is a copy of the fish and one is memorized
    case = case_of(Row(0, "fish"), Row(0, "cat"), Row(1, "Cat"), policy=policy, magnitude={"Cat": 1.0})
    assert actions(decided(case)) == ["keep", "drop", "mask"]


# -- pooled captions --------------------------------------------------------------------------------------------------


def pooled(*rows: Row, **more: object) -> list[list[str] | None]:
    found: list[list[str] | None] = decided(case_of(*rows, **more)).pooled.to_pylist()
    return found


def test_pooled_captions_stand_in_the_order_own_then_json_then_copies_by_rank() -> None:
    rows = [Row(0, "own", ("z", "a")), Row(0, "second", ("more",)), Row(0, "first")]
    case = Case(rows, [0, 2, 1], [1, 1, 1])
    assert decided(case).pooled.to_pylist() == [["own", "z", "a", "first", "second", "more"], None, None]


def test_a_pooled_caption_stands_once() -> None:
    rows = [Row(0, "own", ("own", "x", "x")), Row(0, "x"), Row(0, "own")]
    assert pooled(*rows)[0] == ["own", "x"]


def test_no_memorized_and_no_empty_caption_is_pooled() -> None:
    rows = [Row(0, "m", ("", "b")), Row(0, "o", ("m", "c")), Row(0, "n")]
    assert pooled(*rows, magnitude={"m": 0.5, "n": 0.9, "o": 0.7}) == [["b", "c"], None, None]
    assert pooled(Row(0, "a"), Row(0, "", ("c",))) == [["a", "c"], None]


# -- the heir of a memorized keeper -----------------------------------------------------------------------------------

# the keeper and its best-ranked copy are memorized
KEYS = (Row(0, "key", ("k",)), Row(0, "lock", ("l",)), Row(0, "fine", ("f",)), Row(0, "KEY"), Row(0, "more"))
MEMORIZED = {"key": 0.5, "lock": 0.9}


@pytest.mark.parametrize("image", ["mask", "drop"])
@pytest.mark.parametrize("magnitude", ["mask", "drop"])
def test_the_best_ranked_copy_with_an_ordinary_caption_is_kept_for_a_memorized_keeper(
    image: str, magnitude: str
) -> None:
    policy = Policies(image_duplicate=image, magnitude=magnitude)  # type: ignore[arg-type]
    found = decided(case_of(*KEYS, magnitude=MEMORIZED, policy=policy))
    second = "drop" if "drop" in (image, magnitude) else "mask"
    assert actions(found) == [magnitude, second, "keep", image, image]
    why = [{*codes} - {"caption_duplicate"} for codes in reasons(found)]
    assert why[:3] == [{"magnitude"}, {"hash_duplicate", "magnitude"}, {"hash_duplicate"}]
    assert found.canonical.tolist() == [2, 2, -1, 2, 2]
    assert found.weight.tolist() == found.pool_weight.tolist() == [0, 0, 1, 0, 0]
    pools = found.pooled.to_pylist()
    from_second, from_others = (["l"] if second == "drop" else []), (["KEY", "more"] if image == "drop" else [])
    assert pools[2] == ["fine", "f", "k", *from_second, *from_others]
    assert pools[0] is None


def test_a_memorized_keeper_without_an_ordinary_copy_trains_on_its_pool() -> None:
    rows = (Row(0, "key", ("k",)), Row(0, "lock", ("l",)))
    found = decided(case_of(*rows, magnitude=MEMORIZED))
    assert actions(found) == ["mask", "drop"]
    assert found.canonical.tolist() == [-1, 0]
    assert found.pooled.to_pylist() == [["k", "l"], None]
    assert (found.weight.tolist(), found.pool_weight.tolist()) == ([0, 0], [1, 0])


def test_a_copy_under_a_memorized_caption_is_no_heir_whatever_its_own_pair_measures() -> None:
    case = case_of(Row(0, "key"), Row(0, "key"), Row(0, "fine"), magnitude=MEMORIZED, own={1: 0.1, 2: 0.7})
    assert actions(decided(case)) == ["mask", "drop", "drop"]
    case.own = {1: 0.1}
    assert actions(decided(case)) == ["mask", "drop", "keep"]


def test_a_keeper_whose_magnitude_is_recorded_has_no_heir() -> None:
    found = decided(case_of(*KEYS, magnitude=MEMORIZED, policy=Policies(magnitude="record")))
    assert actions(found) == ["keep", "drop", "drop", "drop", "drop"]
    assert found.pooled.to_pylist()[0] == ["k", "l", "fine", "f", "KEY", "more"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # of each caption one: the heir and the best of the others with the keeper's
        ({"full_duplicate": "drop", "image_duplicate": "record"}, "mask keep keep drop drop"),
        # one caption, that of the heir
        ({"partial_duplicate": "drop", "image_duplicate": "record"}, "mask keep drop drop keep"),
    ],
    ids=str,
)
def test_the_kinds_of_copies_are_those_beside_the_heir(policy: dict[str, str], expected: str) -> None:
    rows = (Row(0, "key"), Row(0, "dog"), Row(0, "Key"), Row(0, "KEY"), Row(0, "Dog"))
    found = decided(case_of(*rows, magnitude=MEMORIZED, policy=Policies.model_validate(policy)))
    assert " ".join(actions(found)) == expected


def test_an_heir_is_the_one_that_its_caption_group_keeps() -> None:
    policy = Policies(caption_duplicate="drop")
    found = decided(case_of(Row(0, "key"), Row(0, "cat"), Row(1, "Cat"), policy=policy, magnitude=MEMORIZED))
    assert actions(found) == ["mask", "keep", "drop"]
    assert found.canonical.tolist() == [1, -1, 1]


def test_where_a_caption_policy_drops_the_heir_it_still_stands_for_the_image() -> None:
    policy = Policies(caption_duplicate="drop")
    rows = (Row(1, "Cat"), Row(0, "key"), Row(0, "cat"), Row(0, "more"))
    found = decided(case_of(*rows, policy=policy, magnitude=MEMORIZED))
    assert actions(found) == ["keep", "mask", "drop", "drop"]
    assert found.canonical.tolist() == [-1, 2, 0, 2]


def test_the_general_form_of_a_memorized_keepers_caption_goes_to_its_heir() -> None:
    general = {"key": "a thing", "fine": "a fine thing"}
    found = decided(case_of(*KEYS[:3], magnitude=MEMORIZED), general)
    assert found.pooled.to_pylist() == [None, None, ["fine", "f", "k", "l", "a thing", "a fine thing"]]


def test_no_sample_at_all_is_decided() -> None:
    found = decided(case_of())
    assert (actions(found), found.canonical.tolist(), found.pooled.to_pylist()) == ([], [], [])


@pytest.mark.parametrize("policy", ["record", "mask"])
def test_a_copy_that_is_not_dropped_keeps_its_captions_to_itself(policy: str) -> None:
    rows = [Row(0, "a"), Row(0, "b", ("c",))]
    assert pooled(*rows, policy=Policies(image_duplicate=policy)) == [None, ["b", "c"]]  # type: ignore[arg-type]


def test_a_caption_duplicate_that_is_dropped_gives_no_caption_to_an_unlike_image() -> None:
    rows = [Row(0, "cat"), Row(1, "Cat", ("other",))]
    assert pooled(*rows, policy=Policies(caption_duplicate="drop")) == [None, None]


def test_nothing_is_pooled_where_the_policy_says_so_or_there_is_nothing() -> None:
    rows = [Row(0, "a", ("b",)), Row(0, "c")]
    assert pooled(*rows, policy=Policies(pool_captions=False)) == [None, None]
    assert pooled(Row(0, "a"), Row(1, "b")) == [None, None]
    assert pooled() == []


# -- each kind by itself ----------------------------------------------------------------------------------------------

# a pair that comes twice, its image with another caption that comes twice too, and the first caption elsewhere
MIXED = (Row(0, "cat"), Row(0, "Cat"), Row(0, "dog"), Row(0, "Dog"), Row(1, "cat"))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"full_duplicate": "drop", "image_duplicate": "record"}, "keep drop keep drop keep"),
        ({"partial_duplicate": "drop", "image_duplicate": "record"}, "keep keep drop drop keep"),
        ({"partial_duplicate": "mask", "image_duplicate": "drop"}, "keep drop mask drop keep"),
        ({"caption_duplicate": "drop", "image_duplicate": "record"}, "keep keep keep keep drop"),
        ({"image_duplicate": "mitigate"}, "keep keep keep keep keep"),
    ],
    ids=str,
)
def test_a_policy_acts_on_its_own_kind(policy: dict[str, str], expected: str) -> None:
    found = decided(case_of(*MIXED, policy=Policies.model_validate(policy)))
    assert " ".join(actions(found)) == expected


@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        ({"full_duplicate": "down_weight"}, [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1]),
        ({"partial_duplicate": "down_weight"}, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 1]),
        ({"caption_duplicate": "down_weight"}, [1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 3]),
        ({"full_duplicate": "down_weight", "caption_duplicate": "down_weight"}, [1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 3]),
        # the largest number counts, whichever kind it is of
        ({"image_duplicate": "down_weight", "caption_duplicate": "down_weight"}, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 3]),
        ({"full_duplicate": "drop", "partial_duplicate": "down_weight"}, [1 / 2, 0, 1 / 2, 0, 1]),
        ({"image_duplicate": "drop", "caption_duplicate": "down_weight"}, [1 / 2, 0, 0, 0, 1 / 2]),
    ],
    ids=str,
)
def test_a_kind_is_weighted_down_by_its_own_count(policy: dict[str, str], weights: list[float]) -> None:
    found = decided(case_of(*MIXED, policy=Policies.model_validate({"image_duplicate": "record", **policy})))
    np.testing.assert_allclose(found.weight, weights, rtol=1e-6)


def test_a_sample_masked_for_its_caption_alone_trains_on_its_pool_with_the_weight_that_it_would_have() -> None:
    policy = Policies(image_duplicate="down_weight")
    rows = (Row(0, "fine"), Row(0, "key", ("safe",)), Row(1, "key", ("safe",)))
    found = decided(case_of(*rows, magnitude={"key": 1.0}, policy=policy))
    assert actions(found) == ["keep", "mask", "mask"]
    assert found.weight.tolist() == [1, 0, 0]
    assert found.pool_weight.tolist() == [0.5, 0.5, 1]


def test_a_masked_sample_without_a_safe_caption_has_no_weight_and_no_share_in_either_mode() -> None:
    policy = Policies(image_duplicate="down_weight")
    rows = (Row(0, "fine"), Row(0, "key"), Row(0, "key", ("lock",)), Row(1, "key"))
    found = decided(case_of(*rows, magnitude=MEMORIZED, policy=policy))
    assert actions(found) == ["keep", "mask", "mask", "mask"]
    assert found.pooled.to_pylist() == [None, None, [], None]
    assert found.weight.tolist() == found.pool_weight.tolist() == [1, 0, 0, 0]


def test_a_sample_masked_as_a_copy_does_not_train_on_its_pool() -> None:
    policy = Policies(image_duplicate="mask", magnitude="mask")
    rows = (Row(0, "fine"), Row(0, "key", ("safe",)), Row(0, "more", ("other",)))
    found = decided(case_of(*rows, magnitude={"key": 1.0}, policy=policy))
    assert actions(found) == ["keep", "mask", "mask"]
    assert found.pooled.to_pylist() == [None, ["safe"], ["more", "other"]]
    assert found.pool_weight.tolist() == found.weight.tolist() == [1, 0, 0]


def test_a_memorized_keeper_has_no_share_of_what_its_copies_weigh() -> None:
    policy = Policies(image_duplicate="down_weight")
    rows = (Row(0, "key"), Row(0, "fine"), Row(0, "more"))
    found = decided(case_of(*rows, magnitude={"key": 1.0}, policy=policy))
    assert found.weight.tolist() == found.pool_weight.tolist() == [0, 0.5, 0.5]
    assert found.canonical.tolist() == [1, -1, 1]


def test_a_dropped_copys_captions_go_to_a_kept_sample_before_a_masked_one_of_better_rank() -> None:
    policy = Policies(image_duplicate="record", full_duplicate="drop", caption_duplicate="drop")
    # the keeper gives way to the fish elsewhere, and the best-ranked copy is memorized
    rows = (Row(0, "fish"), Row(0, "key", ("safe",)), Row(0, "cat"), Row(0, "Fish"), Row(1, "fish"))
    found = decided(Case(list(rows), [1, 2, 3, 4, 0], [1] * 5, magnitude={"key": 1.0}, policy=policy))
    assert actions(found) == ["drop", "mask", "keep", "drop", "keep"]
    assert found.canonical.tolist() == [4, 0, 0, 2, -1]
    assert found.pooled.to_pylist() == [None, ["safe"], ["cat", "fish", "Fish"], None, None]


def test_a_dropped_copys_caption_goes_to_the_sample_that_stays_with_its_caption() -> None:
    policy = Policies(image_duplicate="record", full_duplicate="drop", caption_duplicate="drop")
    # the keeper gives way to the fish elsewhere that has its caption
    rows = (Row(0, "fish"), Row(0, "cat"), Row(0, "Cat"), Row(1, "fish"))
    found = decided(Case(list(rows), [1, 2, 3, 0], [1] * 4, policy=policy))
    assert actions(found) == ["drop", "keep", "drop", "keep"]
    assert found.canonical.tolist() == [3, 0, 1, -1]
    assert found.pooled.to_pylist() == [None, ["cat", "fish", "Cat"], None, None]
