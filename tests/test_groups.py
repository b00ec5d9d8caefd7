"""Groups against a reference that follows the rule word by word."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.caption_groups import caption_keepers
from memfilter.captions import fingerprint, normalise, template
from memfilter.config import KEEP, Config, NamedOrder
from memfilter.details import packed
from memfilter.edges import find_candidates
from memfilter.encoders.builtin import Builtin
from memfilter.errors import InputError
from memfilter.groups import Neighbours, caption_rows, distinct_captions, group, load_samples, visit
from memfilter.records import CAPTION_METHODS, METHODS, Groups, Samples, Shard, signature_schema
from memfilter.store import Store, read_note, read_table, write_table

DIM = 2
SIMILARITY = Builtin.similarity
STRICT = Config.parse({"images": {"encoder_similarity": 1.85}})  # a cosine of 0.95, 18.2 degrees, and full evidence
PICTURE = packed(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1))
"""What all images show here, so that whatever is a candidate is a copy, with evidence 1."""


@dataclass(frozen=True)
class Image:
    """What the signatures hold of one image file; equal images have equal bytes."""

    name: int
    hash: int = 0
    angle: float = 0  # of its embedding, in degrees
    blank: bool = False
    look: bytes = bytes(66)
    width: int = 100
    height: int = 100
    bytes: int = 1000

    @property
    def digest(self) -> bytes:
        return b"image" + self.name.to_bytes(11, "little")


@dataclass(frozen=True)
class Row:
    """One sample; without an image it is a bad one."""

    uid: bytes
    image: Image | None
    caption: str = ""
    captions: tuple[str, ...] = ()
    score: str | None = None  # a field of the json

    def columns(self, index: int) -> dict[str, object]:
        found: dict[str, object] = {"uid": self.uid, "index": index, "key": f"{index:05}"}
        if self.image is None:
            return found | {"bad": "no_image", "detail": "the sample has no image member"}
        image = self.image
        return found | {
            "digest": image.digest,
            "hash": image.hash,
            "width": image.width,
            "height": image.height,
            "bytes": image.bytes,
            "blank": image.blank,
            "look": image.look if image.blank else None,
            "picture": PICTURE,
            "caption": self.caption,
            "fingerprint": fingerprint(self.caption),
            "captions": list(self.captions) or None,
            "json:score": self.score,
            "embedding": np.array([cos(radians(image.angle)), sin(radians(image.angle))], np.float16),
        }


def uid(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows_of(*images: Image | None, captions: Sequence[str] = ()) -> list[Row]:
    texts = [*captions, *[""] * (len(images) - len(captions))]
    return [Row(uid(i), image, text) for i, (image, text) in enumerate(zip(images, texts, strict=True))]


def write_parts(shards: Sequence[Sequence[Row]], store: Store) -> list[Shard]:
    schema = signature_schema(DIM, fields=("score",))
    named = []
    for number, rows in enumerate(shards):
        columns = [row.columns(i) for i, row in enumerate(rows)]
        table = pa.table({f.name: pa.array([c.get(f.name) for c in columns], f.type) for f in schema}, schema=schema)
        shard = Shard(f"{number:05}.tar", f"/data/{number:05}.tar", None)
        write_table(store.signatures(shard.name), table, f"part {number}")
        named.append(shard)
    return named


def grouped(shards: Sequence[Sequence[Row]], config: Config | None = None) -> Groups:
    """Return the groups of these shards, from parts on the disk through all steps."""
    config = config or STRICT
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        samples = load_samples(write_parts(shards, store), store, config.images.json_fields)
        captions, caption = distinct_captions(samples, store)
        keepers = caption_keepers(samples, captions, caption, store, config)
        return group(samples, find_candidates(samples, store, config), caption, keepers, store, config)


def together(shards: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for rows in shards for row in rows]


def image_config(**images: object) -> Config:
    captions = {name: images.pop(name) for name in ("tiers", "near_jaccard") if name in images}
    return Config.parse({"images": {"encoder_similarity": 1.85, **images}, "captions": captions})


# -- the reference ----------------------------------------------------------------------------------------------------


def visit_order(rows: Sequence[Row], config: Config) -> list[int]:
    def key(i: int) -> tuple[object, ...]:
        row = rows[i]
        if row.image is None:
            # a bad sample has none of the other keys, so its place among the bad is the uid's
            uids = [k for k in config.images.keep if k in ("uid", "-uid")]
            return (1, -number(row) if uids[:1] == ["-uid"] else number(row))
        return (0, *(place(row, row.image, k) for k in config.images.keep), row.uid)

    return sorted(range(len(rows)), key=key)


def number(row: Row) -> int:
    return int.from_bytes(row.uid, "big")


def place(row: Row, image: Image, key: str | NamedOrder) -> tuple[float, ...]:
    """Return what of two samples is less for the better one."""
    if isinstance(key, NamedOrder):
        order = list(key.order)
        return (0, order.index(row.score)) if row.score in order else (2 if row.score is None else 1,)
    name, sign = key.removeprefix("-"), -1 if key.startswith("-") else 1
    if name == "json:score":
        return (0, -sign * float(row.score)) if row.score and row.score != "x" else (1,)
    own = {
        "resolution": -image.width * image.height,
        "bytes": -image.bytes,
        "caption_length": -len(row.caption),
        "uid": number(row),
    }
    return (sign * own[name],)


def edge(one: Image, other: Image, config: Config) -> tuple[str, float] | None:
    """Return method and distance of the strongest verified edge between two images."""
    if one.digest == other.digest:
        return "exact", 0
    if one.blank and other.blank:
        levels = max(abs(a - b) for a, b in zip(one.look, other.look, strict=True))
        return ("blank", levels) if levels <= 6 else None
    if one.blank or other.blank:
        return None
    bits = (one.hash ^ other.hash).bit_count()
    if bits <= config.images.hash_radius:
        return "hash", bits
    cosine = cos(radians(one.angle - other.angle))
    if config.images.encoder and cosine >= max((config.images.encoder_similarity or SIMILARITY) - Builtin.gain, 0.1):
        return "embedding", 1 - cosine
    return None


def image_groups(rows: Sequence[Row], config: Config) -> dict[int, tuple[int, str, float]]:
    """Return of each sample its keeper, and method and distance of the edge to it."""
    found: dict[int, tuple[int, str, float]] = {}
    keepers: list[int] = []
    for i in visit_order(rows, config):
        image = rows[i].image
        for keeper in keepers if image else []:
            kept = rows[keeper].image
            assert image is not None
            assert kept is not None
            if (verified := edge(image, kept, config)) is not None:
                found[i] = (keeper, *verified)
                break
        else:
            found[i] = (i, "", 0)
            keepers.append(i)
    return found


def features(text: str) -> set[tuple[str, str]]:
    """Return the character 3- to 5-grams and the word 1- and 2-grams of a normal form."""
    words = text.split()
    found = {("character", text[i : i + n]) for n in (3, 4, 5) for i in range(len(text) - n + 1)}
    return found | {("word", " ".join(words[i : i + n])) for n in (1, 2) for i in range(len(words) - n + 1)}


def caption_edge(one: str, other: str, config: Config) -> tuple[str, float] | None:
    """Return tier and distance of the edge between two captions, None where there is none."""
    tiers = config.captions.tiers
    if one == other or ("exact" in tiers and normalise(one) == normalise(other)):
        return "exact", 0
    if "template" in tiers and template(one) is not None and template(one) == template(other):
        return "template", 0
    mine, theirs = features(normalise(one)), features(normalise(other))
    index = len(mine & theirs) / len(mine | theirs)
    return ("near", 1 - index) if "near" in tiers and index >= config.captions.near_jaccard else None


def caption_groups(rows: Sequence[Row], config: Config) -> list[tuple[int, str, float]]:
    """Return of each sample the one that stands for its caption group, and tier and distance of the edge to it."""
    order = visit_order(rows, config)
    use = Counter(r.caption for r in rows if r.image and r.caption.split())
    forms: dict[str, list[str]] = {}
    for text in sorted(use, key=lambda text: (-use[text], text)):
        forms.setdefault(normalise(text) if "exact" in config.captions.tiers else text, []).append(text)
    keepers: list[str] = []
    edge: dict[str, tuple[str, str, float]] = {}
    for texts in sorted(forms.values(), key=lambda texts: (-sum(use[t] for t in texts), texts[0])):
        found = [(k, e) for k in keepers if (e := caption_edge(texts[0], k, config))]
        keeper, (tier, distance) = found[0] if found else (texts[0], ("exact", 0))
        keepers += [] if found else [keeper]
        edge |= dict.fromkeys(texts, (keeper, tier, distance))
    expected = []
    for i, row in enumerate(rows):
        keeper, tier, distance = edge.get(row.caption, ("", "", 0)) if row.image else ("", "", 0)
        best = next((j for j in order if rows[j].image and keeper and rows[j].caption == keeper), i)
        expected.append((best, tier if best != i else "", distance if best != i else 0))
    return expected


def assert_equals_reference(found: Groups, rows: Sequence[Row], config: Config) -> None:
    expected, by_caption = image_groups(rows, config), caption_groups(rows, config)
    n = len(rows)
    assert np.argsort(found.rank).tolist() == visit_order(rows, config)
    assert found.image_group.tolist() == [expected[i][0] for i in range(n)]
    assert ["" if m < 0 else METHODS[m] for m in found.method] == [expected[i][1] for i in range(n)]
    # embeddings are stored in half precision
    np.testing.assert_allclose(found.distance, [expected[i][2] for i in range(n)], atol=2e-3)
    assert found.caption_group.tolist() == [by_caption[i][0] for i in range(n)]
    assert ["" if m < 0 else CAPTION_METHODS[m] for m in found.caption_method] == [by_caption[i][1] for i in range(n)]
    np.testing.assert_allclose(found.caption_distance, [by_caption[i][2] for i in range(n)], atol=1e-6)
    keys = [(expected[i][0], by_caption[i][0]) for i in range(n)]
    images, texts, joint = Counter(k[0] for k in keys), Counter(k[1] for k in keys), Counter(keys)
    assert found.image_count.tolist() == [images[k[0]] for k in keys]
    assert found.caption_count.tolist() == [texts[k[1]] for k in keys]
    assert found.joint_count.tolist() == [joint[k] for k in keys]
    assert found.caption_images.tolist() == [len({i for i, c in joint if c == k[1]}) for k in keys]
    assert found.image_captions.tolist() == [len({c for i, c in joint if i == k[0]}) for k in keys]


# -- random tables ----------------------------------------------------------------------------------------------------

CAPTIONS = ["", " ", "A cat", "a cat!", "a  CAT", "dog", "Dog.", "two dogs", "!!!"]
# a chain of neighbours, numbers, and other scripts
CAPTIONS += [
    f"a tall man in a red coat walks {ends}" for ends in ("his dog", "his dogs", "his dogs home", "two dogs home")
]
CAPTIONS += [
    "car 5 of a race",
    "car 77 of a race",
    "car 5 of a race, at night",
    "红色的苹果和梨",
    "红色的苹果和桃",
    "שלום לכל העולם",
]


@st.composite
def hashes(draw: st.DrawFn) -> int:
    """Draw a hash a few bits from one of two centres: chains and near misses of the radius are common."""
    centre = draw(st.sampled_from([0, 0xF0F0_F0F0_F0F0_F0F0]))
    return centre ^ sum(1 << bit for bit in draw(st.sets(st.sampled_from([0, 1, 17, 18, 40, 62, 63]), max_size=5)))


@st.composite
def images(draw: st.DrawFn) -> list[Image]:
    # multiples of 7 degrees are more than one degree from all the thresholds used here
    return [
        Image(
            name,
            draw(hashes()),
            7 * draw(st.integers(0, 25)),
            draw(st.sampled_from([False, False, False, True])),
            bytes([draw(st.sampled_from([0, 4, 6, 7, 10, 13, 255]))]) + bytes([draw(st.sampled_from([0, 5]))] * 65),
            draw(st.sampled_from([64, 100])),
            draw(st.sampled_from([64, 100])),
            draw(st.sampled_from([1000, 2000])),
        )
        for name in range(draw(st.integers(1, 10)))
    ]


@st.composite
def tables(draw: st.DrawFn) -> list[list[Row]]:
    """Draw the samples of up to three shards."""
    pool = [*draw(images()), None]
    uids = draw(st.lists(st.integers(0, 2**128 - 1) | st.integers(0, 40), max_size=24, unique=True))
    scores = st.sampled_from([None, "x", "1", "2.5", "-3"])
    rows = [Row(uid(u), draw(st.sampled_from(pool)), draw(st.sampled_from(CAPTIONS)), score=draw(scores)) for u in uids]
    cuts = sorted(draw(st.tuples(st.integers(0, len(rows)), st.integers(0, len(rows)))))
    return [rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] :]]


KEYS: list[object] = [sign + key for key in (*KEEP, "json:score") for sign in ("", "-")]
KEYS += [{"field": "score", "order": ["2.5", "x"]}]

CONFIGS = st.builds(
    image_config,
    hash_radius=st.integers(0, 6),
    encoder=st.sampled_from(["builtin", "builtin", None]),
    encoder_similarity=st.sampled_from([None, 1.8, 1.85, 1.89, 1.7]),
    keep=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5),
    tiers=st.sampled_from([["exact"], ["exact", "template", "near"], ["near"], ["template"], ["exact", "near"]]),
    near_jaccard=st.sampled_from([0.5, 0.7, 0.9, 1.0]),
)


@settings(max_examples=80, deadline=None)
@given(shards=tables(), config=CONFIGS)
def test_groups_equal_the_reference(shards: list[list[Row]], config: Config) -> None:
    assert_equals_reference(grouped(shards, config), together(shards), config)


@settings(max_examples=20, deadline=None)
@given(shards=tables(), config=CONFIGS, random=st.randoms(use_true_random=False))
def test_another_order_of_shards_and_samples_gives_the_same_groups(
    shards: list[list[Row]], config: Config, random: object
) -> None:
    permuted = [list(rows) for rows in shards]
    random.shuffle(permuted)  # type: ignore[attr-defined]
    for rows in permuted:
        random.shuffle(rows)  # type: ignore[attr-defined]

    def named(shards: list[list[Row]]) -> dict[bytes, tuple[object, ...]]:
        found, rows = grouped(shards, config), together(shards)
        return {
            row.uid: (
                rows[found.image_group[i]].uid,
                rows[found.caption_group[i]].uid,
                int(found.method[i]),
                float(found.distance[i]),
                int(found.image_count[i]),
                int(found.caption_count[i]),
                int(found.joint_count[i]),
                int(found.rank[i]),
            )
            for i, row in enumerate(rows)
        }

    assert named(shards) == named(permuted)


@settings(max_examples=20, deadline=None)
@given(
    shards=tables(),
    first=CONFIGS.filter(lambda c: c.images.encoder is not None),
    then=CONFIGS.filter(lambda c: c.images.encoder is not None),
)
def test_grouping_again_with_the_stored_edges_equals_a_fresh_run(
    shards: list[list[Row]], first: Config, then: Config
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        samples = load_samples(write_parts(shards, store), store, ("score",))
        captions, caption = distinct_captions(samples, store)
        before = caption_keepers(samples, captions, caption, store, first)
        group(samples, find_candidates(samples, store, first), caption, before, store, first)
        keepers = caption_keepers(samples, captions, caption, store, then)
        again = group(samples, find_candidates(samples, store, then), caption, keepers, store, then)
    fresh = grouped(shards, then)
    for name in ("rank", "image_group", "method", "distance", "score", "caption_group", "joint_count"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fresh, name))


def lists_of(pairs: set[tuple[int, int]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the second numbers of each first number begin, and these."""
    firsts = [first for first, _ in sorted(pairs)]
    return np.searchsorted(firsts, np.arange(n + 1)), np.array([other for _, other in sorted(pairs)], np.int64)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), hashes=st.integers(1, 8))
def test_contents_join_the_best_keeper_that_they_have_an_edge_to(data: st.DataObject, n: int, hashes: int) -> None:
    hash_of = data.draw(st.lists(st.integers(-1, hashes - 1), min_size=n, max_size=n))
    ends = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] > e[1])
    by_content = data.draw(st.sets(ends, max_size=3 * n)) if n > 1 else set()
    pairs = st.tuples(st.integers(0, hashes - 1), st.integers(0, hashes - 1)).filter(lambda e: e[0] != e[1])
    drawn = data.draw(st.sets(pairs, max_size=2 * hashes)) if hashes > 1 else set()
    by_hash = drawn | {(b, a) for a, b in drawn}

    expected: list[int] = []
    for c in range(n):
        for keeper in (k for k in range(c) if expected[k] == k):
            a, b = hash_of[c], hash_of[keeper]
            if (c, keeper) in by_content or (a >= 0 and b >= 0 and (a == b or (a, b) in by_hash)):
                expected.append(keeper)
                break
        else:
            expected.append(c)
    looked_in = {
        (c, h)
        for c in range(n)
        for h in range(hashes)
        if hash_of[c] >= 0 and (h == hash_of[c] or (hash_of[c], h) in by_hash)
    }
    members = {(hash_of[c], c) for c in range(n) if hash_of[c] >= 0}
    neighbours = Neighbours(*lists_of(by_content, n), *lists_of(looked_in, n), *lists_of(members, hashes), hashes)
    assert visit(neighbours, lambda c, k: np.ones(len(c), np.bool_)).tolist() == expected


# -- images -----------------------------------------------------------------------------------------------------------

FAR = 0xFFFF_FFFF_0000_0000  # 32 bits from 0


def test_a_chain_of_hashes_does_not_join_what_is_unlike() -> None:
    a, b, c = Image(0, 0b0000, 0, bytes=30), Image(1, 0b1111, 60, bytes=20), Image(2, 0b1111_1111, 120, bytes=10)
    found = grouped([rows_of(a, b, c)])
    assert found.image_group.tolist() == [0, 0, 2]
    assert found.image_count.tolist() == [2, 2, 1]


def test_the_middle_of_a_chain_holds_both_ends_when_it_is_the_keeper() -> None:
    a, b, c = Image(0, 0b0000, 0, bytes=20), Image(1, 0b1111, 60, bytes=30), Image(2, 0b1111_1111, 120, bytes=10)
    found = grouped([rows_of(a, b, c)])
    assert found.image_group.tolist() == [1, 1, 1]
    assert found.distance.tolist() == [4, 0, 4]


def test_a_chain_of_embeddings_does_not_join_what_is_unlike() -> None:
    hashes = [0, FAR, FAR << 16 & (2**64 - 1), ~FAR & (2**64 - 1)]
    chain = [Image(i, hashes[i], 14 * i, bytes=100 - i) for i in range(4)]
    found = grouped([rows_of(*chain)])
    assert found.image_group.tolist() == [0, 0, 2, 2]
    assert [METHODS[m] for m in found.method[[1, 3]]] == ["embedding", "embedding"]
    np.testing.assert_allclose(found.distance[[1, 3]], 1 - cos(radians(14)), atol=1e-3)


def test_a_sample_near_two_keepers_joins_the_better_ranked_whatever_the_method() -> None:
    best, second = Image(0, 0, 0, bytes=30), Image(1, FAR, 28, bytes=20)
    near_both = Image(2, FAR ^ 1, 14, bytes=10)
    found = grouped([rows_of(near_both, second, best)])
    assert found.image_group.tolist() == [2, 1, 2]
    assert METHODS[found.method[0]] == "embedding"


def test_an_exact_copy_is_said_to_be_exact_though_its_hash_is_equal_too() -> None:
    image = Image(0, 5, 0)
    found = grouped([rows_of(image, image, replace(image, name=1, bytes=999))])
    assert found.image_group.tolist() == [0, 0, 0]
    assert found.method.tolist() == [-1, METHODS.index("exact"), METHODS.index("hash")]
    assert found.distance.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("bits", "together"), [(4, True), (5, False)])
def test_the_radius_is_the_largest_distance_of_a_duplicate(bits: int, together: bool) -> None:
    found = grouped([rows_of(Image(0, 0, 0), Image(1, 2**bits - 1, 90))], image_config(hash_radius=4))
    assert (found.image_group[0] == found.image_group[1]) == together


@pytest.mark.parametrize("radius", [7, 10, 16])
def test_a_radius_beyond_the_stored_one_joins_anew(radius: int) -> None:
    config = image_config(hash_radius=radius)
    images = [Image(0, 0, 0, bytes=9), Image(1, 2**radius - 1, 90, bytes=8), Image(2, 2 ** (radius + 1) - 1, 180)]
    found = grouped([rows_of(*[replace(i, bytes=1000 - i.name) for i in images])], config)
    assert found.image_group.tolist() == [0, 0, 2]


def test_without_an_encoder_only_hashes_and_digests_join() -> None:
    images = [Image(0, 0, 10), Image(1, FAR, 10)]
    assert grouped([rows_of(*images)]).image_group.tolist() == [0, 0]
    assert grouped([rows_of(*images)], image_config(encoder=None)).image_group.tolist() == [0, 1]


def test_what_the_embedding_join_worked_with_is_gone_once_its_edges_are_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    images = [Image(i, i * 0x9E37_79B9_7F4A_7C15 % 2**64, angle) for i, angle in enumerate((10, 12, 90))]
    samples = load_samples(write_parts([rows_of(*images)], store), store)
    (store.edges / "embedding-of-a-join-with-another-threshold").mkdir(parents=True)
    pairs = find_candidates(samples, store, STRICT).pairs
    assert [(e["a"], e["b"]) for e in pairs.to_pylist()] == [(0, 1)]
    assert sorted(p.name for p in store.edges.iterdir()) == ["embedding.parquet", "hash.parquet", "hubs.parquet"]
    note = read_note(store.edges / "embedding.parquet")
    assert (note["rows"], note["pairs"], note["recall"]["pairs"], note["recall"]["share"]) == (3, 3, 6, 1.0)


def test_blank_images_are_grouped_by_their_looks_and_with_no_other() -> None:
    blank = Image(0, 0, 0, blank=True, look=bytes([100] * 66), bytes=2000)
    lighter = replace(blank, name=1, look=bytes([106] * 66))
    speck = replace(blank, name=2, look=bytes([100] * 65 + [107]))
    found = grouped([rows_of(blank, lighter, blank, speck, Image(3, 0, 0), replace(speck, bytes=1))])
    assert found.image_group.tolist() == [0, 0, 0, 3, 4, 3]
    assert found.image_count.tolist() == [3, 3, 3, 2, 1, 2]
    assert ["" if m < 0 else METHODS[m] for m in found.method] == ["", "blank", "exact", "", "", "exact"]
    assert found.distance.tolist() == [0, 6, 0, 0, 0, 0]


def test_blank_images_alone_are_grouped() -> None:
    blank = Image(0, 0, 0, blank=True)
    assert grouped([rows_of(blank, blank)]).image_group.tolist() == [0, 0]


def test_a_bad_sample_is_its_own_group_ranked_last_and_counted_once() -> None:
    image = Image(0)
    found = grouped([rows_of(None, image, None, image, captions=["a cat", "a cat", "a cat", "a cat"])])
    assert found.image_group.tolist() == [0, 1, 2, 1]
    assert found.caption_group.tolist() == [0, 1, 2, 1]
    assert found.image_count.tolist() == found.caption_count.tolist() == found.joint_count.tolist() == [1, 2, 1, 2]
    assert found.rank.tolist() == [2, 0, 3, 1]
    assert found.caption.tolist() == [-1, 0, -1, 0]


@pytest.mark.parametrize("shards", [[[]], [[], []], [rows_of(None, None)], [[], rows_of(None)]])
def test_tables_without_a_good_sample_have_groups_of_one(shards: list[list[Row]]) -> None:
    n = sum(map(len, shards))
    found = grouped(shards)
    assert found.image_group.tolist() == found.caption_group.tolist() == list(range(n))
    assert found.image_count.tolist() == [1] * n


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["resolution", "uid"], 1),
        (["bytes", "uid"], 2),
        (["caption_length", "uid"], 3),
        (["uid"], 0),
        (["resolution"], 1),
    ],
)
def test_the_keeper_is_the_first_in_the_order_that_the_config_names(keep: list[str], kept: int) -> None:
    images = [Image(0), Image(1, width=200), Image(2, bytes=5000), Image(3), Image(4, width=200)]
    rows = rows_of(*images, captions=["a", "a", "a", "ünïcödé 🐈", "a"])
    assert grouped([rows], image_config(keep=keep)).image_group.tolist() == [kept] * 5


# -- captions ---------------------------------------------------------------------------------------------------------


def unlike_images(n: int) -> list[Image]:
    """Return blank images, which are alike to none."""
    return [Image(i, blank=True, look=bytes([20 * i] * 66), bytes=1000 - i) for i in range(n)]


def test_the_keeper_of_a_caption_group_is_the_most_used_caption_then_the_first_by_text() -> None:
    most = grouped([rows_of(*unlike_images(4), captions=["a cat", "A CAT", "A Cat!", "A CAT"])])
    assert most.caption_group.tolist() == [1, 1, 1, 1]
    tie = grouped([rows_of(*unlike_images(3), captions=["a cat", "A cat", "A CAT"])])
    assert tie.caption_group.tolist() == [2, 2, 2]


def test_a_caption_group_is_represented_by_the_best_ranked_sample_of_its_keeper_caption() -> None:
    images = [replace(image, bytes=100 + i) for i, image in enumerate(unlike_images(4))]
    found = grouped([rows_of(*images, captions=["a cat", "a cat", "A CAT", "a cat"])])
    assert found.caption_group.tolist() == [3, 3, 3, 3]
    assert found.caption_count.tolist() == [4, 4, 4, 4]


def test_samples_without_a_caption_are_alone() -> None:
    found = grouped([rows_of(*unlike_images(4), captions=["", "", " \n", "!"])])
    assert found.caption_group.tolist() == [0, 1, 2, 3]
    assert found.caption_count.tolist() == [1, 1, 1, 1]


def test_the_joint_count_is_that_of_samples_with_both_image_and_caption() -> None:
    one, other = unlike_images(2)
    found = grouped([rows_of(one, one, one, other, other, captions=["a", "a", "b", "a", "a"])])
    assert found.image_count.tolist() == [3, 3, 3, 2, 2]
    assert found.caption_count.tolist() == [4, 4, 1, 4, 4]
    assert found.joint_count.tolist() == [2, 2, 1, 2, 2]


def test_the_distinct_captions_are_all_texts_sorted_and_found_again(tmp_path: Path) -> None:
    blank = unlike_images(3)
    rows = [
        Row(uid(0), blank[0], "b", ("z", "ä", "b")),
        Row(uid(1), None),
        Row(uid(2), blank[1], ""),
        Row(uid(3), blank[2], "b"),
    ]
    store = Store(tmp_path)
    samples = load_samples(write_parts([rows[:2], rows[2:]], store), store)
    captions, caption = distinct_captions(samples, store)
    assert captions["text"].to_pylist() == ["", "b", "z", "ä"]
    assert caption.tolist() == [1, -1, 0, 1]
    assert caption_rows(captions, pa.array(["z", None, "nowhere"])).tolist() == [2, -1, -1]


# -- many copies ------------------------------------------------------------------------------------------------------

COPIES = 5000


def timed(rows: list[Row], config: Config) -> tuple[Groups, float]:
    """Return the groups and the seconds that grouping took, without writing the parts."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        shards = write_parts([rows], store)
        start = time.perf_counter()
        samples: Samples = load_samples(shards, store)
        captions, caption = distinct_captions(samples, store)
        keepers = caption_keepers(samples, captions, caption, store, config)
        found = group(samples, find_candidates(samples, store, config), caption, keepers, store, config)
        return found, time.perf_counter() - start


def test_a_group_of_5_000_exact_copies_is_whole_and_quick() -> None:
    found, seconds = timed(rows_of(*[Image(0)] * COPIES, Image(1, FAR, 90), captions=["a cat"] * COPIES), Config())
    assert (found.image_group[:COPIES] == 0).all()
    assert found.image_count.tolist() == [COPIES] * COPIES + [1]
    assert found.caption_count.tolist() == found.joint_count.tolist() == [COPIES] * COPIES + [1]
    assert seconds < 3


def test_a_group_of_5_000_encodings_of_65_near_hashes_is_whole_and_quick() -> None:
    flips = [0, *(1 << bit for bit in range(64))]
    images = [Image(i, flips[i % 65], bytes=9000 - i) for i in range(COPIES)]
    found, seconds = timed(rows_of(*images), image_config(encoder=None))
    assert (found.image_group == 0).all()
    assert (found.image_count == COPIES).all()
    assert [METHODS[m] for m in np.unique(found.method[1:])] == ["hash"]
    assert found.distance[:66].tolist() == [0] + [1] * 64 + [0]
    assert seconds < 30


def test_a_group_of_1_500_encodings_of_near_embeddings_is_whole() -> None:
    # each has an edge to each: a million edges
    images = [Image(i, i * 0x9E37_79B9_7F4A_7C15 % 2**64, 0, bytes=9000 - i) for i in range(1500)]
    found, seconds = timed(rows_of(*images), image_config(hash_radius=0))
    assert (found.image_group == 0).all()
    assert (found.image_count == 1500).all()
    assert (found.method[1:] == METHODS.index("embedding")).all()
    assert seconds < 15


@pytest.mark.parametrize("distinct", [1, 3000])
def test_a_heavy_group_costs_about_one_comparison_a_copy_and_lists_no_square_of_pairs(distinct: int) -> None:
    # a crowd of copies whose hashes are equal, or all apart, and one picture that is alone
    hashes = [(i % distinct) * 0x9E37_79B9_7F4A_7C15 % 2**64 for i in range(3000)]
    images = [Image(i, h, 0, bytes=9000 - i) for i, h in enumerate(hashes)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        samples = load_samples(write_parts([rows_of(*images, Image(9999, FAR, 90))], store), store)
        candidates = find_candidates(samples, store, STRICT)
        captions, caption = distinct_captions(samples, store)
        keepers = caption_keepers(samples, captions, caption, store, STRICT)
        found = group(samples, candidates, caption, keepers, store, STRICT)
        judged = read_table(store.edges / "scores.parquet")
    assert (found.image_group[:-1] == 0).all()
    assert found.image_count.tolist() == [3000] * 3000 + [1]
    assert len(candidates.pairs) + len(candidates.hashes) < 17 * 3000  # the nearest, and no square
    assert len(candidates.hubs) == 3000
    assert 2999 <= len(judged) < 3100


def test_what_a_link_in_the_run_directory_names_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "somebody's").write_text("precious")
    store = Store(tmp_path / "run")
    samples = load_samples(write_parts([rows_of(Image(0, 0, 0), Image(1, 0, 0))], store), store)
    store.edges.mkdir(exist_ok=True)
    for name in ("pictures.bin", "embeddings.bin"):
        (store.edges / name).symlink_to(tmp_path / "somebody's")
    candidates = find_candidates(samples, store, STRICT)
    captions, caption = distinct_captions(samples, store)
    group(samples, candidates, caption, caption_keepers(samples, captions, caption, store, STRICT), store, STRICT)
    assert read_table(store.edges / "scores.parquet").num_rows == 1
    assert (tmp_path / "somebody's").read_text() == "precious"
    assert not (store.edges / "pictures.bin").is_symlink()


def test_in_a_crowd_of_unlike_pictures_a_copy_is_tried_first_of_those_that_are_near_and_of_its_hash() -> None:
    n, nothing = 400, np.empty(0, np.int64)
    near = np.array([150])  # of the last one
    ends, none = np.r_[np.zeros(n, np.int64), 1], np.zeros(n + 1, np.int64)
    crowd = Neighbours(ends, near, np.arange(n + 1), np.zeros(n, np.int64), np.array([0, n]), np.arange(n), 0)
    joined = visit(crowd, lambda c, k: (c == n - 1) & (k == 150))
    assert joined.tolist() == [*range(n - 1), 150]
    # without the nearest no more than 32 are tried, where the hash is equal 256
    for hash_hubs, keeper, expected in ((0, 31, 31), (0, 150, n - 1), (1, 150, 150), (1, 300, n - 1)):
        crowd = Neighbours(
            none, nothing, np.arange(n + 1), np.zeros(n, np.int64), np.array([0, n]), np.arange(n), hash_hubs
        )
        assert visit(crowd, lambda c, k, keeper=keeper: (c == n - 1) & (k == keeper))[-1] == expected


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_uid_that_two_samples_give_is_refused_with_the_shard(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = rows_of(*unlike_images(3))
    shards = write_parts([rows[:2], [rows[2], replace(rows[2], image=Image(9))]], store)
    with pytest.raises(InputError, match=r"^00001.tar: sample 0 has uid 02000000000000000000000000000000, which 2 "):
        load_samples(shards, store)
