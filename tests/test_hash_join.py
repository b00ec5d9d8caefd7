"""The hash join against brute force, interrupted, out of core, and with PDQ from pixels to groups."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import encoded, sample, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import memfilter
from memfilter import Config, ConfigError
from memfilter.hash_join import hash_join, recall
from memfilter.images import decode
from memfilter.records import Pairs
from memfilter.signatures import pdq
from memfilter.store import Store, read_digest, read_table, write_table

Hashes = npt.NDArray[np.uint64]
Triples = list[tuple[int, int, float]]


def random_hashes(random: np.random.Generator, n: int) -> Hashes:
    return np.unique(random.integers(0, 2**64, n, np.uint64))


def flip(random: np.random.Generator, hashes: Hashes, bits: int) -> Hashes:
    """Return the hashes, of one word or four, with exactly this many bits flipped."""
    rows = hashes.reshape(len(hashes), 1 if hashes.ndim == 1 else hashes.shape[1])
    places = np.argsort(random.random((len(rows), 64 * rows.shape[1])), axis=1)[:, :bits]
    flips = np.zeros_like(rows)
    for place in places.T:
        flips[np.arange(len(rows)), place // 64] |= np.uint64(1) << (place % 64).astype(np.uint64)
    return (rows ^ flips).reshape(hashes.shape)


def clustered_hashes(random: np.random.Generator, n: int) -> Hashes:
    """Return hashes within 12 bits of a few centres, so that most candidates are near the radius."""
    centres = random.integers(0, 2**64, 1 + n // 50, np.uint64)
    parts = [flip(random, random.choice(centres, n // 13 + 1), bits) for bits in range(13)]
    return random.permutation(np.unique(np.concatenate(parts))[:n])


def crowded_hashes(random: np.random.Generator, n: int) -> Hashes:
    """Return hashes that differ in their middle 16 bits only: one bucket holds all under most keys."""
    return np.unique(random.integers(0, 2**16, n, np.uint64)) << np.uint64(24)


def half_crowded_hashes(random: np.random.Generator, n: int) -> Hashes:
    """Return hashes of which half agree in 40 bits, as those of pictures with one layout do, and half in none."""
    alike = random.integers(0, 2**24, n // 2, np.uint64) << np.uint64(17) | np.uint64(
        0xABCDE0000000000 & ~0x1FFFFFFFFFF
    )
    return random.permutation(np.unique(np.concatenate([alike, random_hashes(random, n - n // 2)])))


def brute_join(hashes: Hashes, radius: int) -> Pairs:
    found = [(np.empty(0, np.int64),) * 3]
    for a, row in enumerate(hashes):
        bits = np.bitwise_count(row ^ hashes[a + 1 :]).astype(np.int64)
        bits = bits.sum(1) if bits.ndim == 2 else bits
        near = np.flatnonzero(bits <= radius)
        found.append((np.full(len(near), a), near + a + 1, bits[near]))
    one, other, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    return one, other, distance.astype(np.float32)


def triples(pairs: Pairs) -> Triples:
    return list(zip(*(column.tolist() for column in pairs), strict=True))


def assert_equal(found: Pairs, expected: Pairs) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert one.tobytes() == two.tobytes()


KINDS = {
    "random": random_hashes,
    "clustered": clustered_hashes,
    "crowded": crowded_hashes,
    "half crowded": half_crowded_hashes,
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.sampled_from([0, 1, 2, 3, 17, 130, 700, 1500]),
    radius=st.integers(0, 8) | st.just(16),
    seed=st.integers(0, 2**32),
)
def test_the_pairs_are_exactly_those_of_brute_force_in_order(kind: str, n: int, radius: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.permutation(KINDS[kind](random, n))
    assert_equal(hash_join(hashes, radius), brute_join(hashes, radius))


@pytest.mark.parametrize("radius", [1, 4, 8])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_pair_is_missed_where_buckets_are_divided_again(kind: str, radius: int) -> None:
    random = np.random.default_rng(radius)
    hashes = KINDS[kind](random, 6_000)
    assert_equal(hash_join(hashes, radius), brute_join(hashes, radius))


@settings(max_examples=60, deadline=None)
@given(
    hashes=st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda i: 1 << i), max_size=40),
    radius=st.integers(0, 16),
)
def test_arbitrary_and_extreme_hashes_are_joined(hashes: set[int], radius: int) -> None:
    values = np.array(list(hashes), np.uint64)
    assert_equal(hash_join(values, radius), brute_join(values, radius))


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 6, 8, 10])
def test_pairs_planted_at_each_distance_among_40_000_hashes_are_found_and_none_beyond(radius: int) -> None:
    random = np.random.default_rng(radius)
    originals = random_hashes(random, 40_000)
    planted = [flip(random, originals[20 * d : 20 * d + 20], d) for d in range(1, radius + 2)]
    hashes = np.concatenate([originals, *planted])
    assert len(np.unique(hashes)) == len(hashes)

    a, b, distance = hash_join(hashes, radius)

    expected = {(20 * d + i, len(originals) + 20 * (d - 1) + i, d) for d in range(1, radius + 1) for i in range(20)}
    assert expected <= set(triples((a, b, distance)))
    np.testing.assert_array_equal(np.bitwise_count(hashes[a] ^ hashes[b]), distance)
    assert (distance <= radius).all()
    # two random hashes are within 10 bits once in 10^8 pairs
    assert len(a) - len(expected) <= 40


def test_a_crowd_within_two_bits_of_one_hash_is_joined_whole() -> None:
    random = np.random.default_rng(5)
    centre = np.full(4_000, random.integers(0, 2**64, dtype=np.uint64))
    crowd = np.unique(np.concatenate([flip(random, centre, 1), flip(random, centre, 2)]))
    hashes = np.concatenate([crowd, random_hashes(random, 30_000)])
    a, b, _ = hash_join(hashes, 4)
    assert ((a < len(crowd)) & (b < len(crowd))).sum() == len(crowd) * (len(crowd) - 1) // 2 > 10**6
    assert len(np.unique(a * len(hashes) + b)) == len(a)


# -- 256 bits ---------------------------------------------------------------------------------------------------------


def planted_256(random: np.random.Generator, n: int, each: int, distances: range) -> Hashes:
    """Return n random hashes and behind them, for each distance, copies of the first `each`."""
    rows = random.integers(0, 2**64, (n, 4), np.uint64)
    return np.concatenate([rows, *(flip(random, rows[:each], d) for d in distances)])


@settings(max_examples=40, deadline=None)
@given(n=st.sampled_from([0, 1, 2, 60, 300]), radius=st.integers(0, 31), seed=st.integers(0, 2**32))
def test_few_hashes_of_256_bits_are_joined_exactly(n: int, radius: int, seed: int) -> None:
    rows = planted_256(np.random.default_rng(seed), n, n // 10, range(1, 34, 4))
    assert_equal(hash_join(rows, radius), brute_join(rows, radius))


def test_planted_pairs_of_256_bits_are_found_as_often_as_recall_says_and_all_are_verified() -> None:
    random = np.random.default_rng(2)
    n, each, distances = 60_000, 1000, [8, 16, 20, 24, 28, 31]
    parts = [random.integers(0, 2**64, (n, 4), np.uint64)]
    # each copy has an original of its own
    parts += [flip(random, parts[0][each * i : each * (i + 1)], d) for i, d in enumerate(distances)]
    rows = np.concatenate(parts)

    a, b, distance = hash_join(rows, 31)

    np.testing.assert_array_equal(np.bitwise_count(rows[a] ^ rows[b]).sum(1), distance)
    assert (distance <= 31).all()
    assert len(np.unique(a * len(rows) + b)) == len(a)
    assert set(triples((a, b, distance))) <= {
        (each * i + j, n + each * i + j, d) for i, d in enumerate(distances) for j in range(each)
    }
    for d in distances:
        expected = recall(len(rows), 31, d)
        assert expected >= (0.999 if d <= 24 else 0.99)
        assert abs((distance == d).sum() / each - expected) <= 4 * np.sqrt(expected * (1 - expected) / each) + 1e-3
    assert_equal(hash_join(rows.copy(), 31), (a, b, distance))


@pytest.mark.parametrize("n", [10**5, 10**6, 10**7, 10**8])
def test_the_recall_is_that_of_a_pair_at_the_radius_or_nearer(n: int) -> None:
    chances = [recall(n, 31, d) for d in range(32)]
    assert chances[0] == 1
    assert chances == sorted(chances, reverse=True)
    assert chances[16] > 0.9999
    assert chances[24] > 0.999
    assert chances[31] >= 0.99


def test_a_heavy_bucket_of_256_bits_holds_every_pair() -> None:
    random = np.random.default_rng(3)
    rows = random.integers(0, 2**64, (24_000, 4), np.uint64)
    rows[:6_000, :3] = rows[0, :3]  # one bucket under three keys of four
    rows[:6_000, 3] = random.permutation(1 << 16)[:6_000].astype(np.uint64)
    crowd = brute_join(rows[:6_000], 4)
    assert len(crowd[0]) > 1000
    assert_equal(hash_join(rows, 4), crowd)


# -- interrupted, and out of core -------------------------------------------------------------------------------------

JOIN = """
import sys
from pathlib import Path
import numpy as np
from memfilter.hash_join import hash_join
hash_join(np.load(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("words", [1, 4])
def test_a_join_killed_between_its_tables_continues_to_the_same_bytes(words: int, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    radius = 8 if words == 1 else 31
    rows = random.integers(0, 2**64, (200_000, words), np.uint64)
    rows = np.concatenate([rows, flip(random, rows[:500], 6)])
    hashes = rows[:, 0] if words == 1 else rows
    expected = hash_join(hashes, radius)
    np.save(tmp_path / "hashes.npy", hashes)
    folder = tmp_path / "tables"
    process = subprocess.Popen([sys.executable, "-c", JOIN, tmp_path / "hashes.npy", str(radius), folder])
    while process.poll() is None and not (folder / "001.parquet").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "000.parquet").exists()
    # a finished table is believed: what is taken out of a copy is not found again
    emptied = shutil.copytree(folder, tmp_path / "emptied")
    first = read_table(emptied / "000.parquet")
    write_table(emptied / "000.parquet", first[:0], read_digest(emptied / "000.parquet"))
    assert len(hash_join(hashes, radius, emptied)[0]) == len(expected[0]) - len(first) < len(expected[0])
    # one of other hashes, and one that was cut, are made again
    shutil.copytree(folder, tmp_path / "others")
    assert_equal(hash_join(hashes[::2], radius, tmp_path / "others"), hash_join(hashes[::2], radius))
    os.truncate(folder / "000.parquet", 300)

    assert_equal(hash_join(hashes, radius, folder), expected)
    assert not folder.exists()


@pytest.mark.parametrize("words", [1, 4])
def test_a_table_beyond_the_memory_lies_in_a_file_and_gives_the_same_pairs(words: int, tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    rows = random.integers(0, 2**64, (50_000, words), np.uint64)
    rows = np.concatenate([rows, flip(random, rows[:500], 4)])
    hashes = rows[:, 0] if words == 1 else rows
    expected = hash_join(hashes, 6)
    assert len(expected[0]) == 500
    assert_equal(hash_join(hashes, 6, memory=1000), expected)
    assert_equal(hash_join(hashes, 6, tmp_path / "tables", memory=1000), expected)
    assert list(tmp_path.iterdir()) == []


# -- PDQ --------------------------------------------------------------------------------------------------------------

PDQ = Config.parse({"images": {"hash": "pdq", "encoder": None}})


def detailed(seed: int) -> Image.Image:
    """Return a picture with structure at all the frequencies that PDQ looks at, as photos have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)
    return Image.fromarray(coarse).resize((400, 320), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: 30 pictures, and copies of the first four; in the second also pictures without detail."""
    folder = tmp_path_factory.mktemp("copies")
    images = [detailed(i) for i in range(30)]
    copied = {
        "exact": encoded(images[0]),
        "quality": encoded(images[1], quality=30),
        "half": encoded(images[2].resize((200, 160))),
        "bright": encoded(ImageEnhance.Brightness(images[3]).enhance(1.1)),
    }
    # a ramp has levels enough not to be blank, and nothing for PDQ
    ramps = {
        f"ramp{i}": Image.fromarray(np.tile(np.linspace(i, 90 + i, 300).astype(np.uint8), (300, 1))) for i in (0, 9)
    }
    write_tar(folder / "0.tar", [m for i in range(30) for m in sample(f"{i:02}", encoded(images[i]))])
    members = [m for name, data in copied.items() for m in sample(name, data)]
    write_tar(folder / "1.tar", members + [m for name, image in ramps.items() for m in sample(name, encoded(image))])
    return folder


def test_planted_copies_are_grouped_by_pdq_and_nothing_else_is(copies: Path, tmp_path: Path) -> None:
    manifest = memfilter.run([str(copies)], tmp_path / "out", PDQ, workers=1)
    rows = {row["key"]: row for row in manifest.table().to_pylist()}
    for i, name in enumerate(["exact", "quality", "half", "bright"]):
        assert rows[name]["image_group"] == rows[f"{i:02}"]["image_group"], name
        dropped = next(rows[k] for k in (name, f"{i:02}") if rows[k]["action"] == "drop")
        assert dropped["match_method"] == ("exact" if name == "exact" else "hash")
        assert 0 <= dropped["match_distance"] <= 31
    assert sum(row["image_count"] > 1 for row in rows.values()) == 8
    assert manifest.counts["drop"] == 4
    stored = read_table(Store(tmp_path / "out").signatures("1.tar"), ["hash", "blank"]).to_pylist()
    assert [row["hash"] is None for row in stored] == [False] * 4 + [True] * 2
    assert not any(row["blank"] for row in stored)


@pytest.mark.parametrize("radius", [0, 8, 31])
def test_rethreshold_of_pdq_to_another_radius_equals_a_fresh_run(radius: int, copies: Path, tmp_path: Path) -> None:
    from test_run import tree

    (tmp_path / "new.yaml").write_text(f"images: {{hash_radius: {radius}}}")
    memfilter.run([str(copies)], tmp_path / "old", PDQ, workers=1)
    memfilter.rethreshold(tmp_path / "old", tmp_path / "new.yaml", workers=1)
    fresh = Config.parse({"images": {"hash": "pdq", "encoder": None, "hash_radius": radius}})
    memfilter.run([str(copies)], tmp_path / "fresh", fresh, workers=1)
    assert tree(tmp_path / "old") == tree(tmp_path / "fresh")


def test_pdq_of_a_full_decode_is_that_of_its_package(copies: Path) -> None:
    import pdqhash

    data = encoded(detailed(1))
    pixels = decode(data, True, 10**9).pixels
    bits, quality = pdqhash.compute(pixels)
    assert quality > 49
    assert pdq(pixels) == np.packbits(bits).tobytes()
    assert pdq(np.full((300, 300), 7, np.uint8)) is None


def test_a_fast_decode_moves_pdq_by_at_most_20_bits_of_real_photos(shared_data: Path) -> None:
    import tarfile

    from memfilter.images import PDQ_SIDE

    with tarfile.open(shared_data / "photos" / "00000.tar") as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:30]
        photos = [f.read() for m in members if (f := tar.extractfile(m))]
    moved = []
    for photo in photos:
        hashes = [pdq(decode(photo, full, 10**9, PDQ_SIDE).pixels) for full in (False, True)]
        one, two = (np.frombuffer(h, np.uint8) for h in hashes if h)
        moved.append(int(np.bitwise_count(one ^ two).sum()))
    assert max(moved) <= 20
    assert np.median(moved) <= 10


def test_pdq_has_a_radius_of_its_own() -> None:
    assert Config().images.hash_radius == 4
    assert PDQ.images.hash_radius == 31
    assert Config.parse({"images": {"hash": "pdq", "hash_radius": 12}}).images.hash_radius == 12
    for images, cause in (
        (
            {"hash_radius": 31},
            "images.hash_radius = 31: Input should be less than or equal to 16, or 31 with hash: pdq",
        ),
        ({"hash": "pdq", "hash_radius": 32}, "images.hash_radius = 32: Input should be less than or equal to 31"),
    ):
        with pytest.raises(ConfigError, match=cause):
            Config.parse({"images": images})


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "pdqhash":
            raise ModuleNotFoundError("No module named 'pdqhash'", name=name)

sys.meta_path.insert(0, Hidden())
from memfilter.cli import main
main()
"""


def test_a_missing_package_is_named_with_the_command_that_installs_it(copies: Path, tmp_path: Path) -> None:
    (tmp_path / "pdq.yaml").write_text("images: {hash: pdq}")
    arguments = ["run", str(copies), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "pdq.yaml")]
    done = subprocess.run([sys.executable, "-c", HIDDEN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("images.hash = 'pdq' needs a package; pip install 'memfilter[pdq]'")
    assert not (tmp_path / "out").exists()
