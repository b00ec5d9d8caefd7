"""The embedding join against brute force."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.joins import embedding_join
from memfilter.records import Pairs

Rows = npt.NDArray[np.float32]


def triples(pairs: Pairs) -> list[tuple[int, int, float]]:
    return list(zip(*(column.tolist() for column in pairs), strict=True))


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
