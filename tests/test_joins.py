"""Self-joins against brute force."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.joins import Pairs, embedding_join, hash_join

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.float32]


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


# -- embeddings -------------------------------------------------------------------------------------------------------


def unit(rows: npt.NDArray[np.floating]) -> Rows:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def near_copies(random: np.random.Generator, rows: Rows, cosine: npt.NDArray[np.floating]) -> Rows:
    """Return unit rows at exactly these cosines to the given ones."""
    noise = random.standard_normal(rows.shape)
    noise -= (noise * rows).sum(1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return unit(cosine[:, None] * rows + np.sqrt(1 - cosine[:, None] ** 2) * noise)


def scene_rows(random: np.random.Generator, n: int, dim: int) -> Rows:
    """Return unit rows that crowd around a few hundred scenes, as photos do."""
    scenes = random.standard_normal((300, dim))
    return unit(scenes[random.integers(0, 300, n)] + 0.9 * random.standard_normal((n, dim)))


def assert_is_brute_join(pairs: Pairs, rows: Rows, similarity: float) -> None:
    """Check the pairs against float64 brute force, whose verdict within 1e-6 of the threshold is not asked."""
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    found = {(a, b): distance for a, b, distance in triples(pairs)}
    assert list(found) == sorted(found)
    assert len(found) == len(pairs[0])
    upper = np.triu(np.ones_like(cosine, bool), 1)
    must = set(zip(*(x.tolist() for x in np.nonzero(upper & (cosine >= similarity + 1e-6))), strict=True))
    may = set(zip(*(x.tolist() for x in np.nonzero(upper & (cosine >= similarity - 1e-6))), strict=True))
    assert must <= set(found) <= may
    for (a, b), distance in found.items():
        assert distance == pytest.approx(1 - cosine[a, b], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 3, 40, 250]),
    dim=st.sampled_from([1, 2, 3, 16, 192]),
    similarity=st.sampled_from([0.05, 0.5, 0.8, 0.95, 0.999]),
    seed=st.integers(0, 2**32),
)
def test_embedding_join_finds_exactly_the_pairs_of_brute_force(n: int, dim: int, similarity: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = unit(random.standard_normal((n, dim)))
    copied = rows[: n // 3]
    rows = np.concatenate([rows, near_copies(random, copied, random.uniform(0.7, 1, len(copied)))]) if dim > 1 else rows
    assert_is_brute_join(embedding_join(rows, similarity), rows, similarity)


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.95])
def test_embedding_join_misses_no_pair_among_2_000_rows(similarity: float) -> None:
    random = np.random.default_rng(1)
    originals = scene_rows(random, 1600, 192)
    rows = np.concatenate([originals, near_copies(random, originals[:400], random.uniform(0.85, 1, 400))])
    pairs = embedding_join(rows, similarity)
    assert len(pairs[0]) > 100
    assert_is_brute_join(pairs, rows, similarity)


def test_embedding_join_pairs_equal_rows_at_no_distance() -> None:
    row = unit(np.random.default_rng(2).standard_normal((1, 192)))
    a, b, distance = embedding_join(np.repeat(row, 4, axis=0), 0.95)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    np.testing.assert_allclose(distance, 0, atol=1e-6)


def test_embedding_join_beyond_the_flat_limit_finds_the_planted_pairs_and_nothing_unverified_and_repeats() -> None:
    random = np.random.default_rng(3)
    originals = scene_rows(random, 24_000, 64)
    rows = np.concatenate([originals, near_copies(random, originals[:1000], random.uniform(0.951, 0.999, 1000))])

    a, b, distance = embedding_join(rows, 0.95)

    planted = set(zip(range(1000), range(24_000, 25_000), strict=True))
    found = set(zip(a.tolist(), b.tolist(), strict=True))
    assert len(planted & found) >= 0.98 * len(planted)
    cosine = np.einsum("ij,ij->i", rows[a].astype(np.float64), rows[b].astype(np.float64))
    assert (a < b).all()
    assert len(found) == len(a)
    assert (cosine >= 0.95 - 1e-6).all()
    np.testing.assert_allclose(distance, 1 - cosine, atol=1e-6)

    again = embedding_join(rows.copy(), 0.95)
    for first, second in zip((a, b, distance), again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_embedding_join_beyond_the_flat_limit_does_not_depend_on_the_number_of_threads() -> None:
    import faiss

    random = np.random.default_rng(4)
    originals = scene_rows(random, 20_000, 16)
    rows = np.concatenate([originals, near_copies(random, originals[:500], np.full(500, 0.97))])
    threads = faiss.omp_get_max_threads()
    try:
        results = []
        for count in (1, 2):
            faiss.omp_set_num_threads(count)
            results.append(embedding_join(rows, 0.95))
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
