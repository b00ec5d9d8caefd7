"""Which of a group is kept: the exact kept sets on real tars, for each form of `images.keep`."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import encoded, picture, sample, write_tar

import memfilter
from memfilter import Config, ConfigError, Manifest
from memfilter.records import Shard
from memfilter.signatures import signature_digest

MISSING = object()


def json_of(value: Any) -> bytes | None:
    """Return a json with this value of the field, or none; text is the whole json as it stands."""
    if value is MISSING:
        return None
    return value if isinstance(value, bytes) else json.dumps({"value": value}).encode()


def copies(values: Sequence[Any], start: int = 0) -> list[tuple[str, bytes]]:
    """Return copies of one picture, whose keys count up and whose jsons hold these values."""
    members = []
    for i, value in enumerate(values, start):
        text = json_of(value)
        members += sample(f"{i:03}", encoded(picture(0)), "a cat", **({} if text is None else {"json": text}))
    return members


def config_of(*keep: Any, **images: Any) -> Config:
    return Config.parse({"images": {"encoder": None, "keep": list(keep)} | images})


def kept(manifest: Manifest) -> set[str]:
    return {row["key"] for row in manifest.table().to_pylist() if row["action"] == "keep"}


def best_first(folder: Path, values: Sequence[Any], key: Any) -> list[int]:
    """Return the places of the values in the order in which their samples are kept, by runs on ever fewer of them."""
    left, found = list(range(len(values))), []
    whole = copies(values)
    for step in range(len(values)):
        members = [m for m in whole if int(m[0][:3]) in left]
        write_tar(folder / f"data{step}" / "00000.tar", members)
        manifest = memfilter.run([str(folder / f"data{step}")], folder / f"out{step}", config_of(key), workers=1)
        (best,) = kept(manifest)
        assert kept_in_shards(manifest) == {best}
        found.append(int(best))
        left.remove(int(best))
    return found


def kept_in_shards(manifest: Manifest) -> set[str]:
    names = set()
    for path in (manifest.path / "shards").rglob("*.tar"):
        with tarfile.open(path) as tar:
            names |= {member.name.split(".")[0] for member in tar}
    return names


def test_the_highest_number_of_a_field_is_kept_and_what_is_no_number_comes_last(tmp_path: Path) -> None:
    values = [3, "6.5", -1e9, 7.25, " 7 ", 2**53 + 2, -0.5]
    assert best_first(tmp_path, values, "json:value") == [5, 3, 4, 1, 0, 6, 2]


def test_behind_a_minus_the_lowest_number_is_kept_and_what_is_no_number_still_comes_last(tmp_path: Path) -> None:
    values = ["n/a", 3, "-2", 1.5, True]
    assert best_first(tmp_path, values, "-json:value")[:3] == [2, 3, 1]


NO_NUMBERS: list[Any] = [
    MISSING,
    b"{}",
    b"[]",
    b'"text"',
    None,
    True,
    [9],
    [[9], [9]],
    {"value": 9},
    "",
    "nan",
    "Infinity",
    "1_000",
    "0x10",
    "9 of 10",
    "٩",
    b'{"value": NaN}',
    b'{"value": Infinity}',
    b'{"value": 1e999}',
    "1e999",
    b'{"value": "\\ud800"}',
    b'{"value": 1' + b"0" * 400 + b"}",
    "9" * 300,
    "9" * 20_000,
]


@pytest.mark.parametrize("key", ["json:value", "-json:value"])
def test_whatever_is_no_finite_number_comes_behind_every_number_and_is_no_defect(key: str, tmp_path: Path) -> None:
    worst = "-1e300" if key == "json:value" else "1e300"
    write_tar(tmp_path / "data" / "00000.tar", copies([*NO_NUMBERS, worst]))
    manifest = memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of(key), workers=1)
    assert kept(manifest) == {f"{len(NO_NUMBERS):03}"}
    assert manifest.counts["drop"] == len(NO_NUMBERS)


def test_whole_numbers_beyond_the_precision_of_a_float_are_compared_as_floats(tmp_path: Path) -> None:
    # 2^53 and 2^53 + 1 are one float: the next key decides
    by_uid = "ffffffffffffffffffffffffffffffff", "00000000000000000000000000000000", "0" * 31 + "1"
    numbers = (2**53 + 1, 2**53, 2**53 - 1)
    members = []
    for i, (number, uid) in enumerate(zip(numbers, by_uid, strict=True)):
        members += sample(f"{i:03}", encoded(picture(0)), "a", json=json.dumps({"n": number, "uid": uid}).encode())
    write_tar(tmp_path / "data" / "0.tar", members)
    config = Config.parse({"input": {"uid_field": "uid"}, "images": {"encoder": None, "keep": ["json:n", "-uid"]}})
    assert kept(memfilter.run([str(tmp_path / "data")], tmp_path / "out", config, workers=1)) == {"000"}
    config = Config.parse({"input": {"uid_field": "uid"}, "images": {"encoder": None, "keep": ["json:n"]}})
    assert kept(memfilter.run([str(tmp_path / "data")], tmp_path / "out", config, workers=1, update=True)) == {"001"}


def test_named_values_are_kept_in_their_order_then_others_then_none(tmp_path: Path) -> None:
    values = [None, "CC-BY-SA", "All rights reserved", "CC0", 4, "CC-BY", False]
    key = {"field": "value", "order": ["CC0", False, "CC-BY", 4, "CC-BY-SA"]}
    assert best_first(tmp_path, values, key) == [3, 6, 5, 4, 1, 2, 0]


def test_a_text_too_long_to_be_named_is_a_value_like_any_other(tmp_path: Path) -> None:
    longest = "x" * 255
    values = ["x" * 256, longest, MISSING]
    assert best_first(tmp_path, values, {"field": "value", "order": [longest]}) == [1, 0, 2]


@pytest.mark.parametrize(
    "name", ["a.b", "name with spaces", "bewertung ü", "-minus", "json:json", "caption", "uid", '"']
)
def test_a_field_may_have_any_name(name: str, tmp_path: Path) -> None:
    members = []
    for i, number in enumerate([1, 3, 2]):
        members += sample(f"{i:03}", encoded(picture(0)), "a", json=json.dumps({name: number}).encode())
    write_tar(tmp_path / "data" / "0.tar", members)
    assert kept(memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of(f"json:{name}"), workers=1)) == {
        "001"
    }


def test_the_keys_that_every_sample_has_are_turned_round_by_a_minus(tmp_path: Path) -> None:
    big, small = encoded(picture(0, 192, 160), quality=60), encoded(picture(0), quality=98)
    assert len(small) != len(big)
    members = sample("big", big, "a cat") + sample("small", small, "a tall cat")
    write_tar(tmp_path / "data" / "0.tar", members)
    fewest = "small" if len(small) < len(big) else "big"
    most = {"small": "big", "big": "small"}[fewest]
    expected = {"resolution": "big", "-resolution": "small", "bytes": most, "-bytes": fewest}
    expected |= {"caption_length": "small", "-caption_length": "big"}
    for key, name in expected.items():
        manifest = memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of(key), workers=1, update=True)
        assert kept(manifest) == {name}, key
    by_uid = [
        kept(memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of(k), workers=1, update=True))
        for k in ("uid", "-uid")
    ]
    assert sorted(name for names in by_uid for name in names) == ["big", "small"]


def test_ties_go_to_the_next_key(tmp_path: Path) -> None:
    values = [("CC0", 5, 0.2), ("CC0", 7, 0.9), ("CC0", 7, 0.1), ("CC-BY", 9, 0.0)]
    members = []
    for i, (licence, score, watermark) in enumerate(values):
        fields = {"license": licence, "aesthetic_score": score, "watermark_probability": watermark}
        members += sample(f"{i:03}", encoded(picture(0)), "a", json=json.dumps(fields).encode())
    write_tar(tmp_path / "data" / "0.tar", members)
    licence = {"field": "license", "order": ["CC0", "CC-BY"]}
    score, watermark = "json:aesthetic_score", "-json:watermark_probability"
    orders: list[tuple[tuple[Any, ...], str]] = [
        ((licence, score, watermark), "002"),
        ((score, licence, watermark), "003"),
        ((watermark, score, licence), "003"),
        ((licence, "resolution", "bytes", score, "-json:aesthetic_score", watermark), "002"),
    ]
    for keep, best in orders:
        manifest = memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of(*keep), workers=1, update=True)
        assert kept(manifest) == {best}


# -- what is signed ---------------------------------------------------------------------------------------------------


def test_the_signature_digest_depends_on_the_fields_and_not_on_their_order_or_direction() -> None:
    shard = Shard("0.tar", "/data/0.tar", None)

    def digest(*keep: Any) -> str:
        return signature_digest(shard, "content", config_of(*keep))

    licence = {"field": "license", "order": ["CC0"]}
    same = [["json:a", "json:license"], ["json:license", "uid", "-json:a"], [licence, "bytes", "json:a", "json:a"]]
    assert len({digest(*keep) for keep in same}) == 1
    assert digest("uid") == digest("bytes", "resolution") == digest("-bytes")
    others = [["uid"], ["json:a"], ["json:license"], ["json:a", "json:b"], ["json:a", "json:license", "json:b"]]
    assert len({digest(*keep) for keep in [same[0], *others]}) == 1 + len(others)


def test_another_order_of_signed_fields_is_decided_without_the_pixels_as_by_a_fresh_run(tmp_path: Path) -> None:
    members = []
    for i, (a, b) in enumerate([(1, "x"), (2, "y"), (3, "z")]):
        members += sample(f"{i:03}", encoded(picture(0)), "a", json=json.dumps({"a": a, "b": b}).encode())
    data = write_tar(tmp_path / "data" / "0.tar", members)
    order = {"field": "b", "order": ["x", "y"]}
    first = config_of("json:a", order)
    assert kept(memfilter.run([str(data.parent)], tmp_path / "out", first, workers=1)) == {"002"}
    later = [
        (["-json:a", order], "000"),
        ([{"field": "b", "order": ["y"]}, "json:a"], "001"),
        (["json:b", "json:a"], "002"),
    ]
    for i, (keep, best) in enumerate(later):
        fresh = memfilter.run([str(data.parent)], tmp_path / f"fresh{i}", config_of(*keep), workers=1)
        data.rename(tmp_path / "away.tar")
        text = yaml.safe_dump({"images": {"keep": keep}, "output": {"shards": False}})
        (tmp_path / "other.yaml").write_text(text)
        again = memfilter.rethreshold(tmp_path / "out", tmp_path / "other.yaml", workers=1)
        (tmp_path / "away.tar").rename(data)
        assert kept(again) == kept(fresh) == {best}
        assert again.table().equals(fresh.table())


def test_a_field_that_was_not_signed_is_refused_by_rethreshold_and_signed_by_run(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "data" / "0.tar", copies([1, 3, 2]))
    memfilter.run([str(data.parent)], tmp_path / "out", config_of("uid"), workers=1)
    (tmp_path / "other.yaml").write_text("images: {keep: ['json:value']}")
    with pytest.raises(
        ConfigError, match=r"0\.tar has no signatures .* other fields of the json in images\.keep, need"
    ):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "other.yaml")
    again = memfilter.run([str(data.parent)], tmp_path / "out", config_of("json:value"), workers=1, update=True)
    assert kept(again) == {"001"}


def test_only_the_named_fields_are_stored(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_tar(tmp_path / "data" / "0.tar", copies(["x", 4, True, [1], None, 1.50]))
    memfilter.run([str(tmp_path / "data")], tmp_path / "out", config_of("json:value", "json:other"), workers=1)
    table = pq.read_table(tmp_path / "out" / "signatures" / "0.tar.parquet")
    assert [n for n in table.column_names if n.startswith("json:")] == ["json:other", "json:value"]
    assert table["json:value"].to_pylist() == ["x", "4", "true", None, None, "1.5"]
    assert table["json:other"].null_count == 6


# -- groups -----------------------------------------------------------------------------------------------------------


def chain(flip: int) -> bytes:
    """Return a picture whose left part is another: neighbours in the chain are copies, its ends are not."""
    image = picture(3, 256, 256)
    image.paste(picture(4, 256, 256).crop((0, 0, flip, 256)), (0, 0))
    return encoded(image, quality=95)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_of_a_chain_the_ends_are_one_group_only_where_the_middle_is_kept(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    steps = {"a": chain(0), "b": chain(8), "c": chain(16)}
    bits = {name: bits_of(data) for name, data in steps.items()}
    near = max((bits["a"] ^ bits["b"]).bit_count(), (bits["b"] ^ bits["c"]).bit_count())
    far = (bits["a"] ^ bits["c"]).bit_count()
    assert 0 < near < far <= 16
    members = []
    for name, data in steps.items():
        members += sample(name, data, name, json=json.dumps({"place": order.index(name)}).encode())
    write_tar(tmp_path / "data" / "0.tar", members)
    config = config_of("-json:place", hash_radius=near, match_threshold=1e-9)  # whatever the comparison says
    manifest = memfilter.run([str(tmp_path / "data")], tmp_path / "out", config, workers=1)
    assert kept(manifest) == ({"b"} if order[0] == "b" else {"a", "c"})


def bits_of(data: bytes) -> int:
    from memfilter.signatures import Signer

    signer = Signer(config_of("uid"))
    return int(signer.table([{"uid": bytes(16), "index": 0, "key": "0"} | signer._image(data)])["hash"][0].as_py())


def test_groups_depend_neither_on_the_names_of_the_shards_nor_on_the_number_of_workers(tmp_path: Path) -> None:
    qualities = (95, 80, 60, 40)
    samples: list[list[tuple[str, bytes]]] = []
    for seed, quality in itertools.product(range(8), qualities):
        number = 10 * seed + qualities.index(quality)
        fields = {"uid": f"{number * 7919 % 997:032x}", "score": (number * 31) % 5}
        members = sample(f"{number:04}", encoded(picture(seed), quality=quality), "a", json=json.dumps(fields).encode())
        samples.append(members)

    def groups(names: Sequence[str], workers: int) -> dict[bytes, tuple[Any, ...]]:
        folder = tmp_path / "-".join([*names, str(workers)])
        for i, name in enumerate(names):
            write_tar(folder / "data" / f"{name}.tar", [m for members in samples[i :: len(names)] for m in members])
        config = Config.parse({"input": {"uid_field": "uid"}, "images": {"encoder": None, "keep": ["json:score"]}})
        rows = memfilter.run([str(folder / "data")], folder / "out", config, workers=workers).table().to_pylist()
        return {r["uid"]: (r["action"], r["canonical_uid"], r["match_method"], r["image_count"]) for r in rows}

    found = groups(("0", "1", "2"), 1)
    assert sum(action == "keep" for action, *_ in found.values()) == 8
    assert found == groups(("2", "0", "1"), 1) == groups(("1", "2", "0"), 2) == groups(("only",), 2)
