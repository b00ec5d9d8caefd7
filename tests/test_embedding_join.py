"""The self-join of embeddings against brute force, and what a kill leaves of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfilter.embedding_join import Join, embedding_join
from memfilter.errors import RunError

Rows = npt.NDArray[np.float16]
Pair = tuple[int, int]


def unit(rows: npt.NDArray[np.floating[Any]]) -> Rows:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def near_copies(random: np.random.Generator, rows: Rows, cosine: npt.NDArray[np.floating[Any]]) -> Rows:
    """Return unit rows at these cosines to the given ones, but for their rounding."""
    noise = random.standard_normal(rows.shape)
    noise -= (noise * rows).sum(1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return unit(cosine[:, None] * rows + np.sqrt(1 - cosine[:, None] ** 2) * noise)


def scene_rows(n: int, dim: int, seed: int = 1) -> Rows:
    """Return unit rows that crowd around a few hundred scenes, as photos do, one in five a near copy of another."""
    random = np.random.default_rng(seed)
    scenes = random.standard_normal((300, dim))
    originals = unit(scenes[random.integers(0, 300, n - n // 5)] + 0.9 * random.standard_normal((n - n // 5, dim)))
    copied = originals[random.integers(0, len(originals), n // 5)]
    return random.permutation(np.concatenate([originals, near_copies(random, copied, random.uniform(0.85, 1, n // 5))]))


def cosines(rows: Rows) -> npt.NDArray[np.float64]:
    exact = rows.astype(np.float64)
    length = np.linalg.norm(exact, axis=1)
    cosine: npt.NDArray[np.float64] = exact @ exact.T / np.maximum(np.outer(length, length), 1e-300)
    return cosine


def brute_join(rows: Rows, similarity: float) -> set[Pair]:
    a, b = np.nonzero(np.triu(cosines(rows) >= similarity, 1))
    return set(zip(a.tolist(), b.tolist(), strict=True))


def pairs_of(join: Join) -> set[Pair]:
    return set(zip(join.a.tolist(), join.b.tolist(), strict=True))


def assert_is_verified(join: Join, rows: Rows, similarity: float) -> None:
    """Check order, threshold and distance of every pair."""
    cosine = cosines(rows)[join.a, join.b]
    key = join.a.astype(np.int64) * len(rows) + join.b
    assert (join.a < join.b).all()
    assert (np.diff(key) > 0).all()
    assert (cosine >= similarity - 1e-12).all()
    assert join.distance.dtype == np.float32
    np.testing.assert_allclose(join.distance, 1 - cosine, atol=1e-7)


def result(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "keys.u8").read_bytes(), (folder / "distance.f4").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 3, 40, 250]),
    dim=st.sampled_from([1, 2, 3, 16, 192]),
    similarity=st.sampled_from([0.05, 0.5, 0.8, 0.95, 0.999]),
    seed=st.integers(0, 2**32),
)
def test_up_to_the_exact_limit_the_pairs_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, n: int, dim: int, similarity: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = unit(random.standard_normal((n, dim)))
    copied = rows[: n // 3]
    rows = np.concatenate([rows, near_copies(random, copied, random.uniform(0.7, 1, len(copied)))]) if dim > 1 else rows
    join = embedding_join(rows, similarity, tmp_path_factory.mktemp("join"))
    assert pairs_of(join) == brute_join(rows, similarity)
    assert_is_verified(join, rows, similarity)
    assert join.recall.found == join.recall.pairs


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.95])
def test_rows_of_several_blocks_are_all_compared(tmp_path: Path, similarity: float) -> None:
    rows = scene_rows(2500, 48)
    join = embedding_join(rows, similarity, tmp_path)
    assert len(join.a) > 100
    assert pairs_of(join) == brute_join(rows, similarity)
    assert_is_verified(join, rows, similarity)


def test_equal_rows_are_at_no_distance_and_rows_of_zeros_in_no_pair(tmp_path: Path) -> None:
    row = unit(np.random.default_rng(2).standard_normal((1, 192)))
    join = embedding_join(np.concatenate([np.repeat(row, 3, axis=0), np.zeros((2, 192), np.float16)]), 0.95, tmp_path)
    assert list(zip(join.a.tolist(), join.b.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert join.distance.tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_what_has_no_pair_has_no_recall(tmp_path: Path, n: int) -> None:
    join = embedding_join(unit(np.ones((n, 8))), 0.9, tmp_path)
    assert len(join.a) == len(join.b) == len(join.distance) == 0
    assert (join.recall.rows, join.recall.pairs, join.recall.share) == (n, 0, None)


# -- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_a_pair_is_found_exactly_when_either_row_probes_the_cell_of_the_other(tmp_path: Path, probes: int) -> None:
    rows = scene_rows(3000, 32)
    join = embedding_join(rows, 0.9, tmp_path, exact=1000, probes=probes)
    probed = np.load(tmp_path / "probes-00000.npy")
    reached = [set(row) for row in probed.tolist()]
    own = probed[:, 0].tolist()
    true = brute_join(rows, 0.9)
    expected = {(a, b) for a, b in true if own[b] in reached[a] or own[a] in reached[b]}
    assert pairs_of(join) == expected
    assert (join.probes, join.cells) == (probes, probed.max() + 1)
    assert len(expected) < len(true) or probes > 2
    assert_is_verified(join, rows, 0.9)


def test_sixteen_probes_find_nearly_all_pairs_of_crowded_rows(tmp_path: Path) -> None:
    rows = scene_rows(5000, 64)
    true = brute_join(rows, 0.9)
    join = embedding_join(rows, 0.9, tmp_path, exact=1000)
    assert join.cells > 200
    assert len(pairs_of(join)) >= 0.99 * len(true)
    assert_is_verified(join, rows, 0.9)


def test_the_recall_of_a_sample_of_all_rows_is_the_recall(tmp_path: Path) -> None:
    rows = scene_rows(1000, 32)
    true = brute_join(rows, 0.9)
    join = embedding_join(rows, 0.9, tmp_path, exact=100, probes=1)
    found = pairs_of(join)
    assert found < true
    assert (join.recall.rows, join.recall.pairs, join.recall.found) == (1000, 2 * len(true), 2 * len(found))
    assert join.recall.share == len(found) / len(true)
    assert join.recall.low < join.recall.share < join.recall.high < 1


def test_the_recall_of_a_sample_is_near_that_of_brute_force_and_its_interval_holds_it(tmp_path: Path) -> None:
    inside = 0
    for seed in range(5):
        rows = scene_rows(2500, 24, seed)
        true = brute_join(rows, 0.9)
        join = embedding_join(rows, 0.9, tmp_path / str(seed), exact=100, probes=1)
        share = len(pairs_of(join)) / len(true)
        assert join.recall.rows == 1024
        assert join.recall.share == pytest.approx(share, abs=0.06)
        inside += join.recall.low <= share <= join.recall.high
    assert inside >= 4


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_one_thread_and_two_leave_the_same_bytes_and_the_caller_s_threads_as_they_were(tmp_path: Path) -> None:
    rows, before = scene_rows(6000, 48), faiss.omp_get_max_threads()
    joins = [embedding_join(rows, 0.9, tmp_path / str(t), exact=1000, threads=t) for t in (1, 2)]
    assert result(tmp_path / "1") == result(tmp_path / "2")
    assert joins[0].recall == joins[1].recall
    assert faiss.omp_get_max_threads() == before


def test_memory_mapped_rows_give_the_bytes_of_those_in_memory(tmp_path: Path) -> None:
    rows = scene_rows(3000, 32)
    np.save(tmp_path / "rows.npy", rows)
    embedding_join(rows, 0.9, tmp_path / "memory", exact=1000)
    embedding_join(np.load(tmp_path / "rows.npy", mmap_mode="r"), 0.9, tmp_path / "disk", exact=1000)
    assert result(tmp_path / "memory") == result(tmp_path / "disk")


def test_a_heavy_group_of_more_pairs_than_are_sorted_together_is_whole(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    one = unit(random.standard_normal((1, 16)))
    crowd = near_copies(random, np.repeat(one, 3500, axis=0), np.full(3500, 0.995))
    others = unit(random.standard_normal((1500, 16)))
    join = embedding_join(np.concatenate([crowd, others]), 0.95, tmp_path, exact=1000)
    key = join.a.astype(np.int64) << 32 | join.b
    assert (np.diff(key) > 0).all()
    assert ((join.a < 3500) & (join.b < 3500)).sum() == 3500 * 3499 // 2
    assert max(p.stat().st_size for p in tmp_path.glob("pairs-*")) > 12 * 2**21


# -- killed and run again ---------------------------------------------------------------------------------------------

KILLED = """
import signal, sys
from pathlib import Path
import numpy as np
from memfilter.embedding_join import embedding_join

left = int(sys.argv[3])
def hook(event, details):
    global left
    left -= event == "os.rename"
    if left < 0:
        signal.raise_signal(signal.SIGKILL)
sys.addaudithook(hook)
embedding_join(np.load(sys.argv[1], mmap_mode="r"), 0.9, Path(sys.argv[2]), exact=1000, threads=2)
"""


@pytest.mark.parametrize("renames", [2, 4, 30, 68])
def test_a_join_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, renames: int) -> None:
    rows = scene_rows(3000, 32)
    np.save(tmp_path / "rows.npy", rows)
    whole = embedding_join(rows, 0.9, tmp_path / "whole", exact=1000)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "rows.npy"), str(killed), str(renames)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    left = {p: p.stat().st_mtime_ns for p in killed.glob("[!.]*")}
    assert len(left) in (renames - 1, renames)  # the other thread's may have been counted and not yet done

    again = embedding_join(rows, 0.9, killed, exact=1000)

    assert result(killed) == result(tmp_path / "whole")
    assert again.recall == whole.recall
    assert {p: p.stat().st_mtime_ns for p in left} == left


def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    rows = scene_rows(3000, 32)
    embedding_join(rows, 0.9, tmp_path, exact=1000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name in ("centroids.npy", "probes-00000.npy", "lists.npy", "visitors.npy"):
        (tmp_path / name).write_bytes(before[name][:-100])
    (tmp_path / "keys.u8").unlink()
    embedding_join(rows, 0.9, tmp_path, exact=1000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_folder_of_another_join_is_refused(tmp_path: Path) -> None:
    rows = scene_rows(1000, 32)
    embedding_join(rows, 0.9, tmp_path)
    for other, similarity in ((rows[::-1], 0.9), (rows, 0.8)):
        with pytest.raises(RunError, match="holds a join of other embeddings or settings"):
            embedding_join(other, similarity, tmp_path)
