"""Online filtering: planted truth on real tars, agreement with a run, and a state that goes on exactly."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import encoded, picture, sample, scene, words, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import memfilter
from memfilter import Config, ConfigError, OnlineFilter, recent
from memfilter.details import packed
from memfilter.magnitude import Scorer
from memfilter.thresholds import Threshold

PICTURE = packed(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1))
"""What all images of the tables show, so that near hashes are copies."""

VERDICT = ("__key__", "loss_weight", "reasons", "duplicate_of")


def flat(level: int) -> bytes:
    return encoded(Image.new("L", (64, 64), level), "PNG")


def planted() -> list[list[tuple[str, bytes]]]:
    """Return samples of which the truth is known: see `TRUTH`."""
    first = encoded(picture(1))
    return [
        sample("0", first, "a red house"),
        sample("1", encoded(picture(2)), "a boat"),
        sample("2", first, "A red house!"),
        sample("3", encoded(picture(1), quality=70), "another caption"),
        sample("4", b"\xff\xd8\xff broken", "a boat"),
        sample("5", None, "no image"),
        sample("6", flat(100), "grey"),
        sample("7", flat(103), "grey again"),
        sample("8", flat(160), "lighter grey"),
        sample("9", encoded(picture(3)), "a boat"),
        sample("10", encoded(picture(4)), ""),
        sample("11", encoded(picture(5)), " "),
        sample("12", encoded(picture(6)), b"\xff\xfe".decode("latin-1"), json=b"{}"),
    ]


TRUTH = {
    "0": (1.0, [], ""),
    "1": (1.0, [], ""),
    "2": (0.0, ["exact_duplicate", "caption_duplicate"], "0"),
    "3": (0.0, ["hash_duplicate"], "0"),
    "6": (1.0, [], ""),
    "7": (0.0, ["blank_duplicate"], "6"),
    "8": (1.0, [], ""),
    "9": (1.0, ["caption_duplicate"], ""),
    "10": (1.0, [], ""),
    "11": (1.0, [], ""),
    "12": (1.0, [], ""),
}


def write(path: Path, samples: Iterable[list[tuple[str, bytes]]]) -> str:
    return str(write_tar(path, [member for members in samples for member in members]))


def read(urls: str | list[str], *stages: Any) -> wds.WebDataset:
    return wds.WebDataset(urls, shardshuffle=False).compose(*stages)


def verdicts(samples: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = (*VERDICT, "image_count", "caption_count", "magnitude")
    return [tuple(s.get(name) for name in names) for s in samples if s]


def encoderless(**sections: Any) -> Config:
    return Config.parse({"images": {"encoder": None}, **sections})


# -- what is found ----------------------------------------------------------------------------------------------------


def test_samples_in_memory_stay_as_they_are_and_get_the_same_verdicts_again(tmp_path: Path) -> None:
    samples, stage = list(read(write(tmp_path / "a.tar", planted()))), OnlineFilter()
    names = [set(s) for s in samples]
    first, second = ([(*v[:4],) for v in verdicts(stage(samples))] for _ in range(2))
    assert first == second
    assert [weight for _, weight, *_ in first] == [weight for weight, *_ in TRUTH.values()]
    assert [set(s) for s in samples] == names


def test_planted_duplicates_are_masked_with_their_reasons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = write(tmp_path / "a.tar", planted())
    stage = OnlineFilter()
    with caplog.at_level(logging.INFO, "memfilter.streaming"):
        found = {s["__key__"]: s for s in read(url, stage)}
    place = {key: f"{url}/{of}" if of else "" for key, (_, _, of) in TRUTH.items()}
    assert {k: (s["loss_weight"], s["reasons"], s["duplicate_of"]) for k, s in found.items()} == {
        k: (weight, reasons, place[k]) for k, (weight, reasons, _) in TRUTH.items()
    }
    assert list(found) == list(TRUTH)
    assert [found[k]["image_count"] for k in "0123"] == [1, 1, 2, 3]
    assert [found[k]["caption_count"] for k in ("0", "2", "1", "9", "10", "11")] == [1, 2, 1, 2, 1, 1]
    assert stage.counts == {
        **{"read": 13, "keep": 8, "mask": 3, "drop": 0, "bad": 2},
        **{"exact_duplicate": 1, "hash_duplicate": 1, "blank_duplicate": 1, "caption_duplicate": 2},
        **{"unreadable_image": 1, "no_image": 1},
    }
    assert "read 13" in caplog.text
    assert "unreadable_image 1" in caplog.text


def test_the_policies_drop_mask_and_record(tmp_path: Path) -> None:
    url = write(tmp_path / "a.tar", planted())
    dropped = OnlineFilter(image_duplicate="drop", caption_duplicate="mask")
    found = {s["__key__"]: s["loss_weight"] for s in read(url, dropped)}
    assert found == {k: float(k != "9") for k, (_, reasons, of) in TRUTH.items() if not of}
    assert dropped.counts["drop"] == 3
    recorded = OnlineFilter(image_duplicate="record")
    assert {s["loss_weight"] for s in read(url, recorded)} == {1.0}
    assert recorded.counts["hash_duplicate"] == 1


def test_a_caption_keeps_a_sample_whatever_befalls_the_first_with_it(tmp_path: Path) -> None:
    samples = [
        sample("0", encoded(picture(1)), "one"),
        sample("1", encoded(picture(1)), "two"),
        sample("2", encoded(picture(2)), "two"),
        sample("3", encoded(picture(3)), "two"),
    ]
    stage = OnlineFilter(caption_duplicate="drop")
    assert [s["__key__"] for s in read(write(tmp_path / "a.tar", samples), stage) if s["loss_weight"]] == ["0", "2"]


@pytest.mark.parametrize("hash", ["phash", "pdq"])
def test_what_is_found_is_what_a_run_finds_that_keeps_the_first(tmp_path: Path, hash: str) -> None:
    if hash == "pdq":
        pytest.importorskip("pdqhash")
    draw, shards = random.Random(hash), [list[Any](), list[Any](), list[Any]()]
    for n in range(60):
        image = scene(draw.randrange(18)).resize((200, 180))
        data = flat(60 + 2 * draw.randrange(20)) if n % 6 == 0 else encoded(image, quality=draw.choice([60, 90]))
        field = json.dumps({"n": n}).encode()
        shards[n // 20].append(sample(f"{n:03}", data, words(draw.randrange(25)), json=field))
    urls = [write(tmp_path / "in" / f"{i}.tar", some) for i, some in enumerate(shards)]
    config = Config.parse(
        {
            "images": {"encoder": None, "hash": hash, "keep": ["-json:n"]},
            "captions": {"tiers": ["exact"]},
            "policy": {"image_duplicate": "record"},
            "output": {"shards": False},
        }
    )
    rows = memfilter.run(urls, tmp_path / "out", config, workers=1).table().to_pylist()
    places = [f"{tmp_path}/in/{row['shard']}/{row['key']}" for row in rows]
    found = list(read(urls, OnlineFilter(config, image_duplicate="record")))
    of_place = dict(zip(places, rows, strict=True))
    for s, row, place in zip(found, rows, places, strict=True):
        assert s["__key__"] == row["key"]
        of = "" if row["match_method"] is None else places[row["image_group"]]
        assert (s["reasons"], s["duplicate_of"]) == (row["reasons"], of), place
    last = {of_place[s["duplicate_of"] or p]["image_group"]: s for s, p in zip(found, places, strict=True)}
    assert {group: s["image_count"] for group, s in last.items()} == {r["image_group"]: r["image_count"] for r in rows}
    methods = {row["match_method"] for row in rows}
    assert methods >= {"exact", "hash", "blank"}


def test_bad_samples_have_the_causes_of_a_run(tmp_path: Path) -> None:
    good = encoded(picture(1))
    samples = [
        sample("0", good, json=b'{"caption": 3}'),
        sample("1", good, json=b"[1]"),
        sample("2", encoded(picture(2), "PNG")[:200], json=b'{"caption": "cut"}'),
        sample("3", b"", json=b'{"caption": "empty"}'),
        sample("4", encoded(picture(3, 400, 400)), json=b'{"caption": "large"}'),
        sample("5", good, json=b'{"caption": "good"}'),
    ]
    url = write(tmp_path / "in" / "a.tar", samples)
    config = encoderless(input={"caption": "json", "max_pixels": 100_000}, output={"shards": False})
    rows = memfilter.run([url], tmp_path / "out", config, workers=1).table().to_pylist()
    stage = OnlineFilter(config)
    assert [s["__key__"] for s in read(url, stage)] == ["5"]
    causes = [row["reasons"][0] for row in rows if row["action"] == "bad"]
    assert len(causes) == 5
    assert {cause: stage.counts[cause] for cause in causes} == {cause: causes.count(cause) for cause in causes}


def test_bad_samples_are_told_at_the_first_and_the_tenth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(picture(1))
    url = write(tmp_path / "a.tar", [[(f"k{n}.img.jpg", data)] for n in range(12)])
    assert list(read(url, OnlineFilter())) == []
    why = "left out as bad, no_image: the sample has no image member"
    assert caplog.messages == [f"{url}/k{n - 1}: {why}; {n} of {n} samples so far were bad" for n in (1, 10)]


# -- the index --------------------------------------------------------------------------------------------------------


class Naive:
    """All that an index of images should know, in a list of the stalest first."""

    def __init__(self, capacity: int, radius: int) -> None:
        self.capacity, self.radius, self.held, self.born = capacity, radius, list[tuple[int, dict[str, Any]]](), 0

    def find(self, signature: dict[str, Any]) -> tuple[int, int] | None:
        exact = [h for h in self.held if h[1]["digest"] == signature["digest"]]
        near = [h for h in self.held if self._is_near(h[1], signature)]
        best = min(exact or near, key=lambda h: h[0], default=None)
        if best is None:
            return None
        self.held.remove(best)
        self.held.append(best)
        return best[0], 0 if exact else 3 if signature["blank"] else 1

    def _is_near(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        if one["blank"] or other["blank"]:
            alike = [abs(a - b) <= 6 for a, b in zip(one["look"] or b"", other["look"] or b"", strict=False)]
            return bool(one["blank"] and other["blank"] and all(alike))
        if one["hash"] is None or other["hash"] is None:
            return False
        a, b = (h if isinstance(h, int) else int.from_bytes(h, "big") for h in (one["hash"], other["hash"]))
        return (a ^ b).bit_count() <= self.radius

    def add(self, signature: dict[str, Any]) -> None:
        self.held = [*self.held, (self.born, signature)][-self.capacity :]
        self.born += 1


def signature(draw: random.Random, bits: int) -> dict[str, Any]:
    """Return one of few images near one another."""
    kind = draw.choices(["hash", "blank", "none"], [8, 2, 1])[0]
    base = draw.choice([0, 1, 2]) and random.Random(draw.randrange(3)).getrandbits(bits)
    for _ in range(draw.randrange(5 if bits == 64 else 40)):
        base ^= 1 << draw.randrange(bits)
    hash = base if bits == 64 else base.to_bytes(32, "big")
    look = bytes([draw.choice([90, 95, 100])] * 65 + [draw.choice([90, 95])])
    content = hash if kind == "hash" else look if kind == "blank" else draw.randrange(5)
    return {
        "digest": random.Random(repr((kind, content))).randbytes(16),
        "hash": None if kind == "none" else hash,
        "blank": kind == "blank",
        "look": look if kind == "blank" else None,
        "picture": PICTURE,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 12), st.sampled_from([(64, 0), (64, 4), (64, 16), (256, 31)]))
def test_the_index_finds_what_comparing_all_finds(seed: int, capacity: int, method: tuple[int, int]) -> None:
    bits, radius = method
    draw, table, naive = random.Random(seed), recent.images(capacity, bits), Naive(capacity, radius)
    for _ in range(60):
        one = signature(draw, bits)
        found, wanted = recent.find_image(table, one, radius, 0.5), naive.find(one)
        assert (found and (table["born"][found[0]], found[1])) == wanted
        if found is None:
            recent.add_image(table, one, "")
            naive.add(one)


@pytest.mark.parametrize(("words", "radius"), [(1, 4), (1, 16), (4, 31)])
def test_all_near_hashes_are_found_among_many(words: int, radius: int) -> None:
    from memfilter.hash_kernels import near

    draw = np.random.default_rng(words)
    hashes = draw.integers(0, 2**63, (20_000, words)).astype(np.uint64)
    row = hashes[5]
    for i in draw.choice(len(hashes), 300, replace=False):
        hashes[i] = row
        for bit in draw.choice(64 * words, draw.integers(radius + 3), replace=False):
            hashes[i, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    wanted = np.flatnonzero(np.bitwise_count(hashes ^ row).sum(1) <= radius)
    assert 100 < len(wanted) < 300
    assert near(row, hashes, radius).tolist() == wanted.tolist()


# -- epochs, workers and the stream's state ---------------------------------------------------------------------------


def stream(count: int, seed: int = 0, images: int = 12, captions: int = 9) -> list[dict[str, Any]]:
    """Return samples as webdataset reads them, many of them copies, none of one key twice."""
    draw = random.Random(seed)
    made = [encoded(picture(i), quality=q) for i in range(images) for q in (60, 90)] + [flat(90), flat(93), b"bad"]
    return [
        {
            **{"__key__": f"{n}", "__url__": f"{n % 3}.tar"},
            **{"jpg": draw.choice(made), "txt": words(draw.randrange(captions)).encode()},
        }
        for n in range(count)
    ]


def copies(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(s) for s in samples]


def test_a_second_epoch_has_the_verdicts_of_the_first_in_any_order() -> None:
    samples = stream(80)
    stage = OnlineFilter(capacity=80)
    first, counts = list(stage(copies(samples))), stage.counts
    assert 0 < sum(s["loss_weight"] for s in first) < len(first)
    again = copies(samples)
    random.Random(1).shuffle(again)
    second = {s["__key__"]: s for s in stage(again)}
    assert all(s[name] == second[s["__key__"]][name] for s in first for name in VERDICT)
    assert stage.counts == {name: 2 * n for name, n in counts.items()}
    last = {s["duplicate_of"] or f"{s['__url__']}/{s['__key__']}": s["image_count"] for s in first}
    assert all(s["image_count"] == last[s["duplicate_of"] or f"{s['__url__']}/{s['__key__']}"] for s in second.values())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/{}.tar?sig={}&x=1#part", "https://host/{}.tar"),
        ("pipe:curl -s 'https://host/{}.tar?sig={}&x=1' | zstd -d", "pipe:curl -s 'https://host/{}.tar' | zstd -d"),
        ('pipe:curl -s "https://host/{}.tar?sig={}"', 'pipe:curl -s "https://host/{}.tar"'),
        ("pipe:curl -s https://host/{}.tar?sig={}|zstd -d", "pipe:curl -s https://host/{}.tar|zstd -d"),
    ],
)
def test_urls_that_are_signed_anew_name_the_same_shards(url: str, shown: str) -> None:
    stage = OnlineFilter()
    for epoch in range(2):  # the same key in two shards
        first, other = ({**stream(1)[0], "__url__": url.format(shard, epoch)} for shard in "ab")
        found = list(stage([first, other]))
        assert [s["loss_weight"] for s in found] == [1.0, 0.0]
        assert found[1]["duplicate_of"] == shown.format("a") + "/0"
        assert found[1]["image_count"] == 2


def test_a_sample_is_never_its_own_duplicate_and_a_forgotten_image_passes_again() -> None:
    one, other, third = (
        {"__key__": str(i), "__url__": "a.tar", "jpg": encoded(picture(i)), "txt": words(i).encode()} for i in range(3)
    )
    stage = OnlineFilter(capacity=2)
    found = list(stage(copies([one, {**one, "__key__": "copy"}, other, third, {**one, "__key__": "late"}, one])))
    assert [s["loss_weight"] for s in found] == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    # its image stays for its copies' sake when the sample itself was forgotten
    stage = OnlineFilter(capacity=2)
    twins = [{**one, "__key__": f"copy {i}"} for i in range(4)]
    found = list(stage(copies([one, *twins, one])))
    assert [s["loss_weight"] for s in found] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert found[-1]["reasons"] == []
    # nor does it matter that it is forgotten between being read ahead and being judged
    found = list(OnlineFilter(capacity=2)(copies([one, other, {}, third, {**third, "__key__": "copy"}, one])))
    assert [s.get("loss_weight") for s in found] == [1.0, 1.0, None, 1.0, 0.0, 1.0]
    # a sample that is met again keeps its image and its caption with it
    found = list(OnlineFilter(capacity=2)(copies([one, other, one, third, {**one, "__key__": "copy"}])))
    assert [s["reasons"] for s in found] == [[], [], [], [], ["exact_duplicate", "caption_duplicate"]]


@pytest.mark.parametrize("capacity", [3, 8, 1000])
def test_a_stream_that_is_cut_anywhere_goes_on_exactly(capacity: int) -> None:
    samples = stream(50, seed=2)
    samples += [{**s, "loss_weight": float(n % 4 > 0)} for n, s in enumerate(samples[10:40])]
    config = encoderless(magnitude={"batch_size": 7})

    def made() -> OnlineFilter:
        return OnlineFilter(config, capacity=capacity, caption_duplicate="mask", image_duplicate="drop")

    whole = made()
    wanted, ends = verdicts(whole(copies(samples))), whole.counts
    for k in (0, 1, 6, 7, 8, 23, len(wanted) - 1, len(wanted)):
        before = made()
        head = verdicts(islice(before(iter(copies(samples))), k))
        buffer = io.BytesIO()
        torch.save(before.state_dict(), buffer)
        buffer.seek(0)
        after = made()
        after.load_state_dict(torch.load(buffer, weights_only=True))
        rest = copies(samples)[after.counts["read"] :]
        assert head + verdicts(after(rest)) == wanted
        assert after.counts == ends


def test_a_state_of_other_settings_is_refused() -> None:
    state = OnlineFilter(capacity=10).state_dict()
    with pytest.raises(ConfigError, match="saved with capacity = 10, and here it is 20; make the filter as it was"):
        OnlineFilter(capacity=20).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"images\.hash_radius = 4, and here it is 2"):
        OnlineFilter(Config.parse({"images": {"hash_radius": 2}}), capacity=10).load_state_dict(state)
    with pytest.raises(ConfigError, match='image_duplicate = "mask", and here it is "drop"'):
        OnlineFilter(capacity=10, image_duplicate="drop").load_state_dict(state)


@pytest.mark.parametrize("name", ["settings", "counts", "images", "captions", "samples", "scores"])
def test_what_is_not_a_whole_state_is_refused_and_changes_nothing(name: str) -> None:
    stage = OnlineFilter(capacity=10)
    list(stage(stream(5)))
    state = stage.state_dict()
    cut, other = {n: value for n, value in state.items() if n != name}, OnlineFilter(capacity=10)
    with pytest.raises(ConfigError, match=f"not a state of OnlineFilter, it has no {name}; give what its state_dict"):
        other.load_state_dict(cut)
    assert other.counts["read"] == 0
    with pytest.raises(ConfigError, match="not a state of OnlineFilter, it has no captions"):
        other.load_state_dict({})


def test_a_state_is_that_of_its_process(caplog: pytest.LogCaptureFixture) -> None:
    stage = OnlineFilter(capacity=10)
    list(stage(stream(5, captions=1)))
    caplog.clear()
    state = stage.state_dict()
    assert caplog.messages == []
    pickle.loads(pickle.dumps(stage)).state_dict()  # as when a worker read with a copy of it
    OnlineFilter(capacity=10).state_dict()
    assert [m[:74] for m in caplog.messages] == [
        "the state of an online filter that read no sample in this process: where a"
    ] * 2
    assert state["counts"]["read"] == 5


def test_a_stage_is_pickled_with_what_it_remembers() -> None:
    samples = stream(40, seed=3)
    stage = OnlineFilter(capacity=100)
    head = verdicts(pickle.loads(pickle.dumps(stage))(copies(samples[:20])))
    assert verdicts(stage(copies(samples[:20]))) == head
    moved = pickle.loads(pickle.dumps(stage))
    assert verdicts(moved(copies(samples[20:]))) == verdicts(stage(copies(samples[20:])))


def test_a_pickle_is_of_the_size_of_what_is_remembered() -> None:
    stage = OnlineFilter(capacity=1_000_000)
    list(stage(stream(20)))
    data = pickle.dumps(stage)
    assert len(data) < 150_000  # 20 pictures, not the room of a million
    moved = pickle.loads(data)
    assert verdicts(moved(stream(60))) == verdicts(stage(stream(60)))  # there is room for more
    assert moved.counts == stage.counts


def test_each_worker_of_a_loader_finds_the_copies_of_its_own_shards(tmp_path: Path) -> None:
    one, other = encoded(picture(1)), encoded(picture(2))
    urls = [
        write(tmp_path / f"{i}.tar", [sample(f"{i}-{k}", data, words(10 * i + k)) for k, data in enumerate(some)])
        for i, some in enumerate([[one, one, other], [one, other, one]])
    ]
    data = read(urls, OnlineFilter()).decode("pil", partial=True).to_tuple("__key__", "jpg", "loss_weight")
    loader = DataLoader(data, batch_size=None, num_workers=2)
    for _ in range(2):  # in each epoch new workers begin with nothing
        assert {key: weight for key, _, weight in loader} == {
            **{"0-0": 1.0, "0-1": 0.0, "0-2": 1.0},
            **{"1-0": 1.0, "1-1": 1.0, "1-2": 0.0},
        }
    together = DataLoader(data, batch_size=None, num_workers=1)
    assert sum(weight for _, _, weight in together) == 2


def test_the_end_of_a_shard_passes_in_its_place_and_weights_are_multiplied() -> None:
    samples = stream(4)
    samples[0]["loss_weight"], samples[1]["loss_weight"] = 0.0, 0.5
    found = list(OnlineFilter(image_duplicate="record")([*copies(samples[:2]), {}, *copies(samples[2:]), {}]))
    assert [s.get("__key__") for s in found] == ["0", "1", None, "2", "3", None]
    assert [s.get("loss_weight") for s in found] == [0.0, 0.5, None, 1.0, 1.0, None]


@pytest.mark.parametrize("weight", [0, 0.25, np.float32(0.25), torch.tensor(0.25)])
def test_a_weight_of_any_kind_of_number_counts(weight: Any) -> None:
    (found,) = OnlineFilter()([{**stream(1)[0], "loss_weight": weight}])
    assert found["loss_weight"] == float(weight)
    assert type(found["loss_weight"]) is float


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5, "0.5", b"1", None, torch.ones(2)])
def test_a_weight_that_is_no_number_is_refused(weight: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^0\.tar: sample '0' comes with the loss_weight .*, which is no finite number of 0 or more"
    ):
        list(OnlineFilter()([{**stream(1)[0], "loss_weight": weight}]))


def same(count: int, weights: Iterable[float]) -> list[dict[str, Any]]:
    """Return samples of one image and one caption with these weights."""
    data = encoded(picture(1))
    made = [{"__key__": f"{n}", "__url__": "a.tar", "jpg": data, "txt": b"a house"} for n in range(count)]
    return [{**s, "loss_weight": float(weight)} for s, weight in zip(made, weights, strict=True)]


def test_a_sample_that_does_not_train_is_the_first_of_nothing() -> None:
    stage = OnlineFilter(caption_duplicate="mask", image_duplicate="drop")
    for _ in range(2):
        found = list(stage(same(4, [0, 1, 0, 1])))
        assert [s["loss_weight"] for s in found] == [0.0, 1.0, 0.0]
        assert all(s["reasons"] == [] and s["duplicate_of"] == "" for s in found)
        assert [s["image_count"] for s in found if not s["loss_weight"]] == [1, 1]
    assert stage.counts == {
        **{"read": 8, "keep": 2, "mask": 4, "drop": 2, "bad": 0},
        **{"exact_duplicate": 2, "caption_duplicate": 2},
    }
    # nor does it come out when it is bad
    assert list(stage([{"__key__": "bad", "__url__": "a.tar", "jpg": b"bad", "loss_weight": 0.0}])) == []


@pytest.mark.parametrize("quality", [[90, 90, 90], [90, 80, 60]])
def test_one_copy_trains_whatever_weights_change_between_epochs(quality: list[int]) -> None:
    stage, data = OnlineFilter(), [encoded(picture(1), quality=q) for q in quality]
    for weights, wanted in (
        ([1, 1, 1], [1, 0, 0]),
        ([0, 1, 1], [0, 1, 0]),  # the first leaves its image to the second
        ([0, 1, 1], [0, 1, 0]),
        ([1, 1, 1], [0, 1, 0]),  # and finds it taken
        ([1, 0, 0], [0, 0, 0]),  # only behind it is its image free
        ([1, 0, 0], [1, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0.5], [0, 0, 0.5]),
    ):
        samples = [{**s, "jpg": jpg} for s, jpg in zip(same(3, weights), data, strict=True)]
        assert [s["loss_weight"] for s in stage(samples)] == wanted, weights


def test_a_caption_is_left_to_the_next_sample_too() -> None:
    stage = OnlineFilter(caption_duplicate="mask")
    samples = [{**s, "jpg": encoded(picture(n))} for n, s in enumerate(same(3, [1, 1, 1]))]
    assert [s["loss_weight"] for s in stage(copies(samples))] == [1.0, 0.0, 0.0]
    samples[0]["loss_weight"] = 0.0
    for _ in range(2):
        assert [s["loss_weight"] for s in stage(copies(samples))] == [0.0, 1.0, 0.0]
    samples[0]["loss_weight"] = 1.0
    assert [s["loss_weight"] for s in stage(copies(samples))] == [0.0, 1.0, 0.0]


def test_every_image_trains_behind_a_manifest_that_keeps_another_copy(tmp_path: Path) -> None:
    small, large = encoded(picture(1, 48, 40)), encoded(picture(1, 192, 160))
    url = write(tmp_path / "in" / "a.tar", [sample("0", small, "a house"), sample("1", large, "a house in a wood")])
    manifest = memfilter.run([url], tmp_path / "out", encoderless(output={"shards": False}), workers=1)
    assert [manifest.weight("a.tar", key) for key in "01"] == [0.0, 1.0]
    stage = OnlineFilter()
    for _ in range(2):
        assert [s["loss_weight"] for s in read(url, manifest.attach(), stage)] == [0.0, 1.0]


# -- magnitudes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> str:
    from pipelines import write_pipeline

    return str(write_pipeline(tmp_path_factory.mktemp("model")))


def test_captions_are_scored_as_a_scorer_does_and_masked_at_the_threshold(pipeline: str) -> None:
    samples = [s for s in stream(30, seed=4, captions=12) if s["jpg"] != b"bad"]
    scorer = Scorer.load(pipeline, batch_size=8)
    captions = [s["txt"].decode() for s in samples]
    wanted = scorer.score(captions).mean((1, 2), dtype=np.float64).astype(np.float32)
    limit = float(np.sort(np.unique(wanted))[-3])
    magnitude = {"model": pipeline, "batch_size": 8, "threshold": limit, "devices": ["cpu"]}
    for stage in (
        OnlineFilter(encoderless(magnitude=magnitude), image_duplicate="record"),
        OnlineFilter(encoderless(magnitude={"threshold": limit}), image_duplicate="record", scorer=scorer),
    ):
        found = list(stage(copies(samples)))
        np.testing.assert_allclose([s["magnitude"] for s in found], wanted, rtol=1e-5)
        over = [s["magnitude"] >= limit for s in found]
        assert [s["loss_weight"] == 0 for s in found] == over == [("magnitude" in s["reasons"]) for s in found]
        assert sum(over) == stage.counts["magnitude"] > 0
        assert all(over[i] == (wanted[i] >= limit) for i in range(len(over)) if abs(wanted[i] - limit) > 1e-4)


def test_scores_go_on_with_the_state(pipeline: str) -> None:
    samples = stream(24, seed=5, captions=10)
    config = encoderless(magnitude={"model": pipeline, "batch_size": 5, "threshold": 1.0, "devices": ["cpu"]})
    wanted = verdicts(OnlineFilter(config)(copies(samples)))
    before = OnlineFilter(config)
    head = verdicts(islice(before(iter(copies(samples))), 8))
    after = OnlineFilter(config)
    after.load_state_dict(before.state_dict())
    both = head + verdicts(after(copies(samples)[after.counts["read"] :]))
    assert [v[:-1] for v in both] == [v[:-1] for v in wanted]
    np.testing.assert_allclose([v[-1] for v in both], [v[-1] for v in wanted], rtol=1e-5)


def test_a_saved_threshold_is_of_the_same_model_measured_the_same_way(pipeline: str, tmp_path: Path) -> None:
    from memfilter.denoisers import find_model

    scorer = Scorer.load(pipeline, batch_size=8)
    depends = {"files": find_model(pipeline).files, **json.loads(json.dumps(asdict(scorer.scoring)))}
    Threshold(1.0, None, depends).save(tmp_path / "good.json")
    Threshold(1.0, None, {**depends, "seeds": 4}).save(tmp_path / "other.json")
    magnitude = {"model": pipeline, "batch_size": 8, "devices": ["cpu"]}
    good, other = (
        encoderless(magnitude={**magnitude, "threshold": {"saved": str(tmp_path / name)}})
        for name in ("good.json", "other.json")
    )
    for given_one in (None, scorer):
        stage = OnlineFilter(good, scorer=given_one)
        assert {s["loss_weight"] for s in stage(stream(4))} == {0.0}
        with pytest.raises(ConfigError, match="measured otherwise, seeds 4, and here it is 1"):
            list(OnlineFilter(other, scorer=given_one)(stream(4)))


# -- what it cannot obey ----------------------------------------------------------------------------------------------


def test_samples_that_are_not_as_they_were_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="no __url__; put OnlineFilter right after the shards are read"):
        list(OnlineFilter()([{"__key__": "0", "jpg": b""}]))
    with pytest.raises(ConfigError, match=r"a.tar/0: its jpg is a Image, not bytes; put OnlineFilter before decode"):
        list(OnlineFilter()([{"__key__": "0", "__url__": "a.tar", "jpg": picture(1)}]))
    with pytest.raises(ConfigError, match=r"^a.tar/7: its __key__ is of type int, not a text; put OnlineFilter right"):
        list(OnlineFilter()([{"__key__": 7, "__url__": "a.tar", "jpg": b""}]))
    with pytest.raises(ConfigError, match=r"^a.tar/7: its __url__ is of type PosixPath, not a text"):
        list(OnlineFilter()([{"__key__": "7", "__url__": Path("a.tar"), "jpg": b""}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity=0\): it is a number from 1"),
        ({"image_duplicate": "down_weight"}, "it is one of record, mask, drop"),
        ({"config": encoderless(magnitude={"threshold": 1.0})}, "no model to score with"),
        ({"config": encoderless(magnitude={"model": "m", "threshold": {"quantile": 0.9}})}, "a stream does not have"),
        ({"config": encoderless(magnitude={"model": "m", "mode": "pair"})}, "captions without their images"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineFilter(**options)
