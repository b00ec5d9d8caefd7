"""The near tier's join against brute force: true edges alone, hardly one missed, the same after an interruption."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import words
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from memfilter.caption_groups import forms
from memfilter.caption_join import NO_EDGES, Joined, banding, buckets, caption_join

NEAR, TEMPLATE, SEMANTIC = 2, 1, 3


def features(text: str) -> set[tuple[str, str]]:
    parts = text.split()
    found = {("character", text[i : i + n]) for n in (3, 4, 5) for i in range(len(text) - n + 1)}
    return found | {("word", " ".join(parts[i : i + n])) for n in (1, 2) for i in range(len(parts) - n + 1)}


def jaccard(one: str, other: str) -> float:
    mine, theirs = features(one), features(other)
    return len(mine & theirs) / len(mine | theirs)


def brute_force(texts: list[str], threshold: float) -> list[tuple[int, float]]:
    """Return of each text the first earlier keeper that is near, itself if none is, and 1 - Jaccard index."""
    sets = [features(text) for text in texts]
    number = {f: i for i, f in enumerate(sorted(set().union(*sets)))}
    ends = np.cumsum([0, *(len(s) for s in sets)])
    columns = [number[f] for s in sets for f in s]
    matrix = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, ends), (len(texts), max(len(number), 1)))
    shared, sizes = (matrix @ matrix.T).toarray(), np.diff(ends)
    index = shared / np.maximum(sizes[:, None] + sizes - shared, 1)
    found: list[tuple[int, float]] = []
    for i in range(len(texts)):
        near = (j for j in np.flatnonzero(index[i, :i] >= threshold).tolist() if found[j][0] == j)
        keeper = next(near, i)
        found.append((keeper, 0.0 if keeper == i else 1 - index[i, keeper]))
    return found


def joined(texts: list[str], threshold: float | None = 0.7, **more: object) -> Joined:
    none = np.full(len(texts), -1)
    return caption_join(pa.array(texts, pa.large_string()), none, threshold, NO_EDGES, **more)  # type: ignore[arg-type]


def edited(text: str, draw: random.Random) -> str:
    """Return the text with a word added, removed, replaced or moved."""
    parts = text.split()
    at = draw.randrange(len(parts))
    kind = draw.randrange(4)
    word = words(draw.randrange(500)).split()[0]
    if kind < 3:
        parts[at : at + (kind > 0)] = [] if kind == 1 and len(parts) > 1 else [word]
    else:
        parts.insert(draw.randrange(len(parts)), parts.pop(at))
    return " ".join(parts)


def families(count: int, size: int, seed: int) -> list[str]:
    """Return distinct texts of ten words, each with edits of itself and edits of these."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    for i in range(count):
        family = [f"{words(1000 + i)} {words(2000 + i % 7)}"]
        family += [edited(draw.choice(family), draw) for _ in range(size - 1)]
        found |= dict.fromkeys(family)
    texts = list(found)
    draw.shuffle(texts)
    return texts


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text("ab ", min_size=1, max_size=12) | st.text("aé苹😀ש ", max_size=8) | st.sampled_from(["red", "red car"]),
        max_size=12,
        unique=True,
    ),
    st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]),
)
def test_few_texts_are_grouped_as_by_brute_force(texts: list[str], threshold: float) -> None:
    texts = list(dict.fromkeys(" ".join(t.split()) for t in texts if t.split()))
    found = joined(texts, threshold)
    expected = brute_force(texts, threshold)
    assert found.keeper.tolist() == [keeper for keeper, _ in expected]
    np.testing.assert_allclose(found.distance, [distance for _, distance in expected], atol=1e-6)
    assert found.method.tolist() == [NEAR if keeper != i else 0 for i, (keeper, _) in enumerate(expected)]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_among_many_texts_every_edge_is_true_and_hardly_one_is_missed(threshold: float) -> None:
    texts = families(200, 10, 3)
    assert len(texts) > 1500
    found = joined(texts, threshold)
    expected = np.array([keeper for keeper, _ in brute_force(texts, threshold)])
    copies = np.flatnonzero(found.keeper != np.arange(len(texts)))
    assert len(copies) > 50
    for i in copies:
        index = jaccard(texts[i], texts[found.keeper[i]])
        assert index >= threshold
        assert found.distance[i] == pytest.approx(1 - index, abs=1e-6)
        assert found.keeper[found.keeper[i]] == found.keeper[i]
    assert (found.keeper == expected).mean() > 0.99


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_texts_at_the_threshold_share_a_band_as_often_as_is_told(threshold: float) -> None:
    used = banding(10**6, threshold)
    assert used.recall(threshold) >= 0.995
    assert used.bands * used.rows <= 300


def test_two_texts_agree_in_a_band_as_often_as_their_jaccard_index_foretells() -> None:
    texts = families(400, 4, 5)
    keys = buckets(pa.array(texts, pa.large_string()), 0.7)
    used = banding(len(texts), 0.7)
    by_family: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        by_family.setdefault(" ".join(sorted(text.split())[:2]), []).append(i)
    pairs = [pair for members in by_family.values() for pair in combinations(members[:4], 2)]
    expected = [jaccard(texts[a], texts[b]) ** used.rows for a, b in pairs]
    agree = [(keys[a] == keys[b]).mean() for a, b in pairs]
    assert len(pairs) > 300
    assert np.mean(expected) > 0.1
    assert np.mean(agree) == pytest.approx(np.mean(expected), rel=0.05)


def test_a_chain_joins_no_two_that_are_unlike() -> None:
    # each is near the next alone
    texts = [
        "one two three four five six seven",
        "two three four five six seven eight",
        "three four five six seven eight nine",
    ]
    assert jaccard(texts[0], texts[1]) >= 0.6 > jaccard(texts[0], texts[2])
    assert jaccard(texts[1], texts[2]) >= 0.6
    assert joined(texts, 0.6).keeper.tolist() == [0, 0, 2]


def test_ten_thousand_variants_of_one_text_are_compared_with_its_keeper_alone() -> None:
    base = " ".join(words(i) for i in range(4))
    texts = [base, *(f"{base} {words(i).split()[0]}" for i in range(10_000))]
    texts = list(dict.fromkeys(texts))
    found = joined(texts)
    assert (found.keeper == 0).all()


def test_texts_of_one_boilerplate_are_told_as_crowded_and_their_copies_found_all_the_same() -> None:
    frame = "royalty free stock photo, picture and image download in high resolution"
    texts = [f"{' '.join(words(i).split()[:3])} {frame}" for i in range(1500)]
    copies = [text.replace("download", "to download") for text in texts[:100]]
    found = joined(texts + copies)
    assert found.crowded.sum() > 100
    near = [jaccard(texts[k], copy) for k, copy in zip(found.keeper[1500:], copies, strict=False) if k < 1500]
    assert len(near) > 95
    assert min(near) >= 0.7
    assert not joined(families(200, 8, 9)).crowded.any()


def test_long_captions_by_the_hundred_are_compared_in_passable_time() -> None:
    texts = [" ".join(words(40 * i + j) for j in range(60)) for i in range(600)]
    start = time.process_time()
    assert (joined(texts).keeper == np.arange(600)).all()
    assert time.process_time() - start < 10


def test_a_class_and_an_edge_join_too_and_the_first_keeper_wins() -> None:
    texts = [words(0), words(1), words(2), words(1) + "s", words(3)]
    template = np.array([-1, 5, 5, -1, -1])
    edges = (np.array([0, 0]), np.array([3, 4]), np.array([0.25, 0.125], np.float32))
    found = caption_join(pa.array(texts, pa.large_string()), template, 0.7, edges)
    assert found.keeper.tolist() == [0, 1, 1, 0, 0]
    assert found.method.tolist() == [0, 0, TEMPLATE, SEMANTIC, SEMANTIC]
    assert found.distance.tolist() == [0, 0, 0, 0.25, 0.125]


def test_an_edge_to_a_text_that_joined_another_joins_nothing() -> None:
    texts = [words(0), words(1), words(2)]
    edges = (np.array([0, 1]), np.array([1, 2]), np.zeros(2, np.float32))
    found = caption_join(pa.array(texts, pa.large_string()), np.full(3, -1), None, edges)
    assert found.keeper.tolist() == [0, 0, 2]


def test_no_text_gives_no_group() -> None:
    assert joined([]).keeper.tolist() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_parts_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = families(200, 8, 9)
    whole = joined(texts)
    monkeypatch.setattr("memfilter.caption_join._CHUNK", 100)
    parts = joined(texts, folder=tmp_path, threads=threads)
    assert [c.tolist() for c in vars(parts).values()] == [c.tolist() for c in vars(whole).values()]
    files = sorted(tmp_path.iterdir())
    assert len(files) == -(-len(texts) // 1600)
    for left in ([], files[:-1]):  # nothing is done again, or the last part
        for path in set(files) - set(left) if left else ():
            path.unlink()
        again = joined(texts, folder=tmp_path, threads=threads)
        assert [c.tolist() for c in vars(again).values()] == [c.tolist() for c in vars(whole).values()]


JOIN = """
import sys, time
from pathlib import Path
import memfilter.caption_join as join
from test_caption_join import families, joined
join._CHUNK = 64
leave = join._Visitor.leave
def slowly(self, first, end, path):
    leave(self, first, end, path)
    print(path.name, flush=True)
    time.sleep(0.2)
join._Visitor.leave = slowly
found = joined(families(300, 12, 2), folder=Path(sys.argv[1]))
"""


def test_a_killed_join_goes_on_from_its_parts_to_the_same_groups(tmp_path: Path) -> None:
    command = [sys.executable, "-c", JOIN, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "00000.npy"
    process.kill()
    process.wait()
    left = sorted(p.name for p in tmp_path.glob("0*.npy"))
    assert left
    assert len(left) < 3
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    assert done.stdout.split()[0] > left[-1]
    texts = families(300, 12, 2)
    parts = [np.load(path) for path in sorted(tmp_path.glob("0*.npy"))]
    assert np.concatenate(parts)["keeper"].tolist() == joined(texts).keeper.tolist()


def test_a_text_of_a_hundred_thousand_characters_is_joined_in_passable_time() -> None:
    long = " ".join(words(i) for i in range(3300))
    assert len(long) > 100_000
    texts = [long, long + " more", words(1), "".join(long.split())]
    assert joined(texts).keeper.tolist() == [0, 0, 2, 3]


def test_forms_are_in_their_order_and_templates_numbered() -> None:
    captions = pa.chunked_array([["Car 5!", "a dog", "CAR 77"]], pa.large_string())
    normal, template = forms(captions, True)
    assert normal.to_pylist() == ["car 5", "a dog", "car 77"]
    assert template[0] == template[2] >= 0 > template[1]
    assert forms(captions, False)[1].tolist() == [-1, -1, -1]
