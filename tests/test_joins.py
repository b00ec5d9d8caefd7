"""The self-join of hashes against brute force."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.joins import Pairs, hash_join

Hashes = npt.NDArray[np.uint64]


def random_hashes(random: np.random.Generator, n: int) -> Hashes:
    return np.unique(random.integers(0, 2**64, n, np.uint64))


def flip(random: np.random.Generator, hashes: Hashes, bits: int) -> Hashes:
    """Return the hashes with exactly this many bits flipped."""
    places = np.argsort(random.random((len(hashes), 64)), axis=1)[:, :bits].astype(np.uint64)
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=1, initial=0)


def clustered_hashes(random: np.random.Generator, n: int) -> Hashes:
    """Return hashes within 12 bits of a few centres, so that most candidates are near the radius."""
    centres = random.integers(0, 2**64, 1 + n // 50, np.uint64)
    parts = [flip(random, random.choice(centres, n // 13 + 1), bits) for bits in range(13)]
    return shuffled(random, np.unique(np.concatenate(parts))[:n])


def crowded_hashes(random: np.random.Generator, n: int) -> Hashes:
    """Return hashes that differ in their middle 16 bits only: one bucket holds all under most keys."""
    return np.unique(random.integers(0, 2**16, n, np.uint64)) << np.uint64(24)


def shuffled(random: np.random.Generator, hashes: Hashes) -> Hashes:
    return random.permutation(hashes)


def brute_hash_join(hashes: Hashes, radius: int) -> list[tuple[int, int, int]]:
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    a, b = np.nonzero(np.triu(distance <= radius, 1))
    return list(zip(a.tolist(), b.tolist(), distance[a, b].tolist(), strict=True))


def triples(pairs: Pairs) -> list[tuple[int, int, float]]:
    return list(zip(*(column.tolist() for column in pairs), strict=True))


KINDS = {"random": random_hashes, "clustered": clustered_hashes, "crowded": crowded_hashes}


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.sampled_from([0, 1, 2, 3, 17, 130, 400]),
    radius=st.integers(0, 10),
    seed=st.integers(0, 2**32),
)
def test_hash_join_finds_exactly_the_pairs_of_brute_force_in_order(kind: str, n: int, radius: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    hashes = shuffled(random, KINDS[kind](random, n))
    assert triples(hash_join(hashes, radius)) == brute_hash_join(hashes, radius)


@settings(max_examples=100, deadline=None)
@given(
    hashes=st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda i: 1 << i), max_size=40),
    radius=st.integers(0, 16),
)
def test_hash_join_finds_the_pairs_among_arbitrary_and_extreme_hashes(hashes: set[int], radius: int) -> None:
    values = np.array(list(hashes), np.uint64)
    assert triples(hash_join(values, radius)) == brute_hash_join(values, radius)


@pytest.mark.parametrize("radius", [0, 1, 3, 6, 10])
def test_hash_join_finds_pairs_planted_at_each_distance_among_20_000_hashes(radius: int) -> None:
    random = np.random.default_rng(radius)
    originals = random_hashes(random, 20_000 - 20 * (radius + 2))
    planted = [flip(random, originals[20 * d : 20 * d + 20], d) for d in range(1, radius + 2)]
    hashes = np.concatenate([originals, *planted])
    assert len(np.unique(hashes)) == len(hashes)

    a, b, distance = hash_join(hashes, radius)

    near = [(20 * (d - 1) + 20 + i, d) for d in range(1, radius + 1) for i in range(20)]
    expected = [(i, len(originals) + i - 20, d) for i, d in near]
    assert set(expected) <= set(triples((a, b, distance)))
    beyond = len(originals) + 20 * radius
    assert not ((b >= beyond) & (a == b - beyond + 20 * (radius + 1))).any()
    np.testing.assert_array_equal(np.bitwise_count(hashes[a] ^ hashes[b]), distance)
    assert (distance <= radius).all()
    assert (np.lexsort((b, a)) == np.arange(len(a))).all()
    # two random hashes are within 10 bits once in 10^8 pairs
    assert len(a) - len(expected) <= 30


def test_hash_join_holds_every_pair_of_a_heavy_bucket() -> None:
    random = np.random.default_rng(5)
    crowd = flip(random, np.full(20_000, random.integers(0, 2**64, dtype=np.uint64)), 1)
    hashes = np.concatenate([np.unique(crowd), random_hashes(random, 3000)])
    near = 64
    a, b, distance = hash_join(hashes, 2)
    inside = (a < near) & (b < near)
    assert inside.sum() == near * (near - 1) // 2
    assert (distance[inside] == 2).all()


def test_hash_join_compares_a_bucket_that_is_larger_than_a_chunk_of_candidates() -> None:
    hashes = np.arange(3200, dtype=np.uint64)  # 5 million candidates share each key of the upper bits
    assert triples(hash_join(hashes, 1)) == brute_hash_join(hashes, 1)
