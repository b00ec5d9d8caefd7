"""The manifest in all kinds of data loaders: the weights are those of its rows, and what it does not know is told."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import encoded, picture, sample, words, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import memfilter
from memfilter import Config, ConfigError, Manifest, RunError
from memfilter.lookup import Lookup, write_lookup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of one name in two folders and beside them; keys in folders; two copies are masked, two down-weighted."""
    folder = tmp_path_factory.mktemp("loader")
    shards = {"00000.tar": (0, 1), "a/00000.tar": (2, 3, 0), "b/00000.tar": (4, 2, 5)}
    for name, seeds in shards.items():
        members = [
            m
            for i, seed in enumerate(seeds)
            # two captions of one text: each of them half a sample
            for m in sample(f"x/{name[0]}{i}", encoded(picture(seed)), words(9 if seed in (1, 3) else 10 * i + seed))
        ]
        write_tar(folder / "in" / name, members)
    policy = {"image_duplicate": "mask", "caption_duplicate": "down_weight"}
    config = Config.parse({"policy": policy, "images": {"encoder": None}})
    return memfilter.run([str(folder / "in")], folder / "out", config, workers=1)


@pytest.fixture(scope="module")
def expected(run: Manifest) -> dict[tuple[str, str], float]:
    rows = run.table(["shard", "key", "loss_weight"]).to_pylist()
    weights = {(row["shard"], row["key"]): row["loss_weight"] for row in rows}
    assert sorted(weights.values()) == [0, 0, 0.5, 0.5, 1, 1, 1, 1]
    return weights


def originals(manifest: Manifest) -> list[str]:
    return [f"{manifest.root}/{name}" for name in manifest.shards]


def samples_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Return samples as a webdataset reader gives them."""
    names = manifest.table(["shard", "key"]).to_pylist()
    return [
        {"__key__": n["key"], "__url__": f"{manifest.root}/{n['shard']}", "pixels": torch.full((2,), float(i))}
        for i, n in enumerate(names)
    ]


# -- the look-up file -------------------------------------------------------------------------------------------------

# neighbours, equal halves and the ends of the range: anything but the uniform numbers that a digest gives
_HALVES = st.one_of(st.integers(0, 3), st.integers(2**64 - 3, 2**64 - 1), st.integers(0, 2**64 - 1))
_UIDS = st.builds(lambda high, low: high.to_bytes(8, "big") + low.to_bytes(8, "big"), _HALVES, _HALVES)


@settings(max_examples=60, deadline=None)
@given(st.lists(_UIDS, max_size=60), st.lists(_UIDS, max_size=20))
def test_a_sample_is_found_where_a_dictionary_finds_it(uids: list[bytes], others: list[bytes]) -> None:
    weights = np.arange(len(uids), dtype=np.float32)
    columns = {"weight": weights, "pool_weight": weights + 0.5, "mitigate": (weights % 2).astype(np.uint8)}
    first = {uid: i for i, uid in reversed(list(enumerate(uids)))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lookup.arrow"
        write_lookup(path, pa.array(uids, pa.binary(16)), columns)
        lookup = Lookup(path)
        asked = uids + others
        places = lookup.places(b"".join(asked))
        assert places.tolist() == [lookup.place(uid) for uid in asked]
        found = [lookup.weight(place) if place >= 0 else None for place in places.tolist()]
        assert found == [first.get(uid) for uid in asked]
        known = places[places >= 0]
        assert lookup.weights(known).tolist() == [lookup.weight(place) for place in known.tolist()]
        assert [lookup.weight(p, pooled=True) for p in known.tolist()] == [
            lookup.weight(p) + 0.5 for p in known.tolist()
        ]
        masked = Lookup(path, known[:1])
        assert [masked.weight(p) for p in known.tolist()] == masked.weights(known).tolist()
        assert not masked.weights(known[:1]).any()


def test_the_file_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    count = 200_000
    uids = pa.Array.from_buffers(pa.binary(16), count, [None, pa.py_buffer(np.random.default_rng(0).bytes(16 * count))])
    columns = {name: np.ones(count, np.float32) for name in ("weight", "pool_weight")}
    write_lookup(tmp_path / "lookup.arrow", uids, {**columns, "mitigate": np.zeros(count, np.uint8)})
    code = (
        "import sys, pathlib, pyarrow, memfilter.lookup\n"
        "opened = memfilter.lookup.Lookup(pathlib.Path(sys.argv[1]))\n"
        "print(pyarrow.total_allocated_bytes(), any(c.flags.owndata for c in opened.columns.values()))\n"
        "print([m for m in ('pandas', 'torch') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lookup.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0 False", "[]"]


def test_weights_in_one_look_up_are_those_one_by_one(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    shards, keys = zip(*expected, strict=True)
    weights = run.weights(shards, keys)
    assert weights.dtype == np.float32
    assert weights.tolist() == list(expected.values()) == [run.weight(shard, key) for shard, key in expected]
    assert run.weights([f"file://{run.root}/{shard}" for shard in shards], keys).tolist() == weights.tolist()
    assert run.weights([], []).tolist() == []
    with pytest.raises(KeyError, match=r"a/00000\.tar: the manifest has no sample 'x/b0'"):
        run.weights(["b/00000.tar", "a/00000.tar"], ["x/b0", "x/b0"])


def test_samples_with_uids_of_their_own_are_found_by_shard_and_key(tmp_path: Path) -> None:
    def members(i: int) -> list[tuple[str, bytes]]:
        return sample(f"{i}\udce9", encoded(picture(i % 2)), json=json.dumps({"uid": f"{i:032x}"}).encode())

    write_tar(tmp_path / "in" / "0.tar", [m for i in range(4) for m in members(i)])
    config = Config.parse({"input": {"uid_field": "uid"}, "images": {"encoder": None}})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    keys = [f"{i}\udce9" for i in range(4)]
    weights = manifest.weights(["0.tar"] * 4, keys).tolist()
    assert weights == manifest.table(["loss_weight"])["loss_weight"].to_pylist()
    assert weights == [manifest.weight("0.tar", key) for key in keys]
    assert sum(weights) == 2


def test_what_is_missing_is_one_line(run: Manifest, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run.path / "run.json").read_text())
    with pytest.raises(RunError, match="holds no manifest; finish the run"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text((run.path / "manifest" / "manifest.json").read_text())
    manifest = Manifest.load(tmp_path)
    with pytest.raises(RunError, match=r"lookup\.arrow: missing or damaged"):
        manifest.weight("a/00000.tar", "x/a0")
    (tmp_path / "manifest" / "lookup.arrow").write_bytes(b"ARROW1")
    with pytest.raises(RunError, match=r"lookup\.arrow: missing or damaged"):
        manifest.weights(["a/00000.tar"], ["x/a0"])


# -- webdataset -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["0.2.86", "0.2.111", "installed"])
def webdataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a version of webdataset, empty for the installed one."""
    if request.param == "installed":
        return ""
    folder = tmp_path_factory.mktemp("webdataset") / request.param
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"webdataset=={request.param}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"webdataset {request.param} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    return str(folder)


def test_every_version_of_webdataset_gets_the_weights(
    run: Manifest, expected: dict[tuple[str, str], float], webdataset: str
) -> None:
    path = os.pathsep.join(filter(None, [webdataset, str(ROOT), os.environ.get("PYTHONPATH")]))
    filtered = [str(run.path / "shards" / name) for name in run.shards]  # all are kept or masked
    command = [sys.executable, str(ROOT / "tests" / "webdataset_versions.py"), str(run.path), *filtered[:2]]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, originals(run)[2]], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"].startswith(webdataset)
    assert found["markers"] == 2
    weights = {key: weight for (_, key), weight in expected.items()}
    assert list(found["weights"]) == ["composed", "pipeline", "pickled", "batched", "decoded", "forked", "spawned"]
    assert all(given == weights for given in found["weights"].values())


def test_a_stage_that_was_used_is_sent_on_as_it_was_made(run: Manifest) -> None:
    for made in (run.attach("keep"), run.weigh("keep"), run.collate(missing="keep")):
        before = pickle.dumps(made)
        rows = [{"__key__": "new", "__url__": "new.tar"}, samples_of(run)[0]]
        columns = {"__key__": [r["__key__"] for r in rows], "__url__": [r["__url__"] for r in rows]}
        list(made(columns if made.__class__.__name__ == "Weigh" else rows))
        assert made.unknown == 1
        assert pickle.dumps(made) == before
        assert pickle.loads(before).unknown == 0


def test_unknown_samples_are_counted_and_told_at_each_power_of_ten(
    run: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    stage, url = run.attach(missing="keep"), originals(run)[1]
    with caplog.at_level(logging.WARNING, "memfilter"):
        passed = list(stage({"__key__": f"new{i}", "__url__": url} for i in range(25)))
        passed += stage([{"__key__": "new", "__url__": "elsewhere/1.tar"}, samples_of(run)[0]])
    assert [s["loss_weight"] for s in passed] == [1.0] * 27
    assert stage.unknown == 26
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "the manifest has no sample 'new0'; 1 passed with weight 1",
        "the manifest has no sample 'new9'; 10 passed with weight 1",
    ]


def test_an_unknown_sample_is_an_error_that_names_key_shard_and_remedy(run: Manifest) -> None:
    known, stranger = samples_of(run)[0], {"__key__": "new", "__url__": originals(run)[1]}
    for made in (run.attach(), run.collate()):
        with pytest.raises(KeyError, match=r"a/00000\.tar: the manifest has no sample 'new'; give .* missing='keep'"):
            list(made([known, stranger]))
    with pytest.raises(ConfigError, match="missing='ignore': error or keep"):
        run.weigh("ignore")  # type: ignore[arg-type]


DOUBT = "is this the manifest of another data set?"


def test_a_manifest_of_another_data_set_says_so(run: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    stranger = {"__key__": "x/a0", "__url__": "s3://bucket/train-0001.tar"}
    message = r"train-0001\.tar: none of the manifest's 3 shards.*is this the manifest of another data set\?"
    for made in (run.attach(), run.collate(), run.weigh()):
        with pytest.raises(KeyError, match=message):
            list(made(stranger if made.__class__.__name__ == "Weigh" else [stranger]))
    with pytest.raises(KeyError) as error:  # one more shard in a data set that is known
        list(run.attach()([samples_of(run)[0], stranger]))
    assert "none of the manifest's 3 shards" in str(error.value)
    assert "another data set" not in str(error.value)
    with caplog.at_level(logging.WARNING, "memfilter"):
        assert next(run.attach("keep")([stranger]))["loss_weight"] == 1
    assert caplog.messages[-1].endswith("1 passed with weight 1; no shard so far is known: " + DOUBT)


def test_a_shard_of_the_same_name_and_keys_and_another_size_is_refused_or_doubted_below_the_callers_root(
    run: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = samples_of(run)
    filtered = [{**row, "__url__": row["__url__"].replace(str(run.root), str(run.path / "shards"))} for row in rows]
    with caplog.at_level(logging.WARNING, "memfilter"):
        list(run.attach()(rows))
        list(run.attach()(filtered))
    assert not caplog.messages
    other = tmp_path / "a" / "00000.tar"
    other.parent.mkdir()
    other.write_bytes(b"0" * 20480 * 3)
    stranger = {**rows[2], "__url__": f"file:{other}"}
    with pytest.raises(
        KeyError, match=r"a/00000\.tar: not there, or not of its size.*; give the manifest of these shards, or missing"
    ):
        list(run.attach()([stranger]))
    with caplog.at_level(logging.WARNING, "memfilter"):
        assert next(run.attach("keep")([stranger]))["loss_weight"] == 1
    # why it passes: by another manifest or by roots it would not
    assert "not of its size" in caplog.messages[-1]
    assert "give roots=[" in caplog.messages[-1]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "memfilter"):
        list(run.attach(roots=[str(tmp_path)])([stranger] * 3))
    assert caplog.messages == [f"file:{other}: has another size than the manifest's shard a/00000.tar: {DOUBT}"]


def test_a_weight_that_a_sample_carries_is_multiplied(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    rows, earlier = samples_of(run), [0.0, 0.5, 1, np.float32(2), torch.tensor(0.5), 0, 1.0, 0.25]
    carrying = [{**row, "loss_weight": weight} for row, weight in zip(rows, earlier, strict=True)]
    products = [float(e) * w for e, w in zip(earlier, expected.values(), strict=True)]
    stage = run.attach(captions="pool")
    for _ in range(2):  # the same samples again, as from memory in the next epoch
        found = [sample["loss_weight"] for sample in stage(carrying)]
        assert found == products
        assert {type(weight) for weight in found} == {float}
    stranger = {"__key__": "new", "__url__": rows[0]["__url__"], "loss_weight": 0.25}
    assert next(run.attach("keep")([stranger]))["loss_weight"] == 0.25
    for wrong in (-1.0, float("nan"), float("inf"), "1", b"1", None, [1.0], torch.ones(2)):
        with pytest.raises(ConfigError, match=r"00000\.tar: sample 'x/00' comes with the loss_weight .*, which is no"):
            list(stage([{**rows[0], "loss_weight": wrong}]))
        with pytest.raises(ConfigError, match=r"'x/00' comes with the loss_weight"):
            run.collate()([{**rows[0], "loss_weight": wrong}])


def test_pipes_name_shards_of_the_manifest(run: Manifest) -> None:
    pipes = {"pipe:cat b.tar": "nope.tar"}
    for make in (run.attach, run.weigh, run.collate):
        with pytest.raises(ConfigError, match=r"pipes: pipe:cat b\.tar is to be 'nope\.tar', which is none of"):
            make(pipes=pipes)


# -- Hugging Face datasets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_get_a_column_of_weights(
    run: Manifest, expected: dict[tuple[str, str], float], streaming: bool, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    options = {"data_files": {"train": originals(run)}, "split": "train", "cache_dir": str(tmp_path)}
    data = datasets.load_dataset("webdataset", streaming=streaming, **options)
    for mapped in (data.map(run.weigh(), batched=True), data.map(run.weigh())):
        rows = mapped.remove_columns(["jpg"])
        found = {(run.shard_of(r["__url__"]), r["__key__"]): float(r["loss_weight"]) for r in rows}
        assert found == expected
    if streaming:
        return
    assert mapped.features["loss_weight"].dtype == "float32"
    rows = mapped.with_format("torch", ["loss_weight", "__key__", "__url__"])
    batch = next(iter(DataLoader(rows, len(rows), collate_fn=run.collate())))
    assert {name: value.tolist() for name, value in batch.items()} == {"loss_weight": list(expected.values())}


def test_datasets_knows_an_equal_function_again(run: Manifest) -> None:
    fingerprint = pytest.importorskip("datasets.fingerprint").Hasher.hash
    weigh = run.weigh()
    before = fingerprint(weigh)
    weigh({"__key__": ["x/a0"], "__url__": [originals(run)[1]]})
    assert fingerprint(weigh) == fingerprint(Manifest.load(run.path).weigh()) == before
    assert fingerprint(run.weigh("keep")) != before


def test_rows_are_found_by_shard_and_key_too(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    shards, keys = map(list, zip(*expected, strict=True))
    assert run.weigh()({"shard": shards, "key": keys})["loss_weight"].tolist() == list(expected.values())
    assert run.weigh()({"shard": "00000.tar", "key": "x/00"}) == {"loss_weight": expected["00000.tar", "x/00"]}
    with pytest.raises(ConfigError, match="rows hold 'jpg', '__key__': keep the columns __url__ and __key__"):
        run.weigh()({"jpg": [], "__key__": []})


def test_rows_that_are_no_text_are_told(run: Manifest) -> None:
    url = originals(run)[0]
    for rows in ({"__url__": [url, url], "__key__": ["x/00", 7]}, {"__url__": [url, None], "__key__": ["x/00"] * 2}):
        with pytest.raises(ConfigError, match=r"row 1 has __url__ .* and __key__ .*: both must be text"):
            run.weigh()(rows)
    for row in ({"__url__": url, "__key__": 7}, {"__url__": None, "__key__": "x/00"}):
        with pytest.raises(ConfigError, match="row 0 has"):
            run.weigh()(row)
    table = pa.table({"__url__": [url], "__key__": ["x/00"], "txt": ["a text that is no name"]})
    with pytest.raises(ConfigError, match="a Table of __url__, __key__, txt: give mappings") as error:
        run.weigh()(table)  # type: ignore[arg-type]
    assert "a text" not in str(error.value)


def test_a_url_that_tells_no_shard_is_mapped(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    url = "/cache/downloads/3f2a9c"  # where a reader keeps what it downloaded under the name of a digest
    rows = {"__url__": [url], "__key__": ["x/a1"]}
    assert run.weigh(pipes={url: "a/00000.tar"})(rows)["loss_weight"] == expected["a/00000.tar", "x/a1"]


def test_what_is_handed_over_to_mitigation_is_told_in_a_column(tmp_path: Path) -> None:
    members = sample("0", encoded(picture(0)), words(0)) + sample("1", encoded(picture(0)), words(0))
    write_tar(tmp_path / "in" / "0.tar", members + sample("2", encoded(picture(2)), words(2)))
    policy = {"image_duplicate": "record", "full_duplicate": "mitigate"}
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config.parse({"policy": policy}), workers=1)
    columns = manifest.weigh("keep")({"shard": ["0.tar"] * 4, "key": ["0", "1", "2", "new"]})
    assert {n: c.tolist() for n, c in columns.items()} == {
        "loss_weight": [1] * 4,
        "mitigate": [True, True, False, False],
    }
    batch = manifest.collate()([{"shard": "0.tar", "key": key} for key in "02"])
    assert batch["mitigate"].tolist() == [True, False]
    stranger = {"__key__": "none", "__url__": f"{manifest.root}/0.tar"}
    assert next(manifest.attach("keep")([stranger]))["mitigate"] is False


# -- batches ----------------------------------------------------------------------------------------------------------


def captions_in_order(samples: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(set(s) == {"pixels", "caption"} for s in samples)
    return {"lengths": torch.tensor([len(s["caption"]) for s in samples])}


def test_a_batch_gets_its_weights_and_loses_its_names(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    samples = [{**s, "__local_path__": None} for s in samples_of(run)]
    batch = run.collate()(samples)
    assert set(batch) == {"pixels", "loss_weight"}
    assert batch["loss_weight"].dtype == torch.float32
    assert batch["loss_weight"].tolist() == list(expected.values())
    assert batch["pixels"].shape == (8, 2)
    batch = run.collate(captions_in_order)([{**s, "caption": "ab"} for s in samples])
    assert batch["lengths"].tolist() == [2] * 8
    assert batch["loss_weight"].tolist() == list(expected.values())
    assert set(samples[0]) == {"pixels", "__key__", "__url__", "__local_path__"}  # as they were


def test_weights_that_samples_carry_are_taken(run: Manifest) -> None:
    samples = [{"pixels": torch.ones(2), "loss_weight": weight} for weight in (0.25, torch.tensor(0.5), np.float32(1))]
    batch = run.collate()(samples)
    assert batch["loss_weight"].tolist() == [0.25, 0.5, 1]
    assert batch["loss_weight"].dtype == torch.float32
    attached = list(run.attach()(samples_of(run)))
    assert set(run.collate()(attached)) == {"pixels", "loss_weight"}


def test_texts_that_tell_shard_and_key_stay_out_of_the_batch(run: Manifest) -> None:
    names = {"shard": "00000.tar", "key": "x/00", "__url__": originals(run)[0], "__key__": "x/00"}
    for weight in ({}, {"loss_weight": 1.0}):
        assert set(run.collate()([{"pixels": torch.ones(2), **names, **weight}])) == {"pixels", "loss_weight"}


def test_a_batch_of_unlike_samples_is_refused(run: Manifest) -> None:
    first, second = samples_of(run)[:2]
    with pytest.raises(ConfigError, match="1 of a batch's 2 samples have a loss_weight: give it to all or none"):
        run.collate()([first, {**second, "loss_weight": 1.0}])
    with pytest.raises(ConfigError, match="rows hold '__key__', 'pixels': keep the columns __url__ and __key__"):
        run.collate()([first, {name: value for name, value in second.items() if name != "__url__"}])


def test_a_batch_that_is_no_mapping_is_refused(run: Manifest) -> None:
    with pytest.raises(ConfigError, match="collate_fn returned list: a mapping"):
        run.collate(list)(samples_of(run))


def test_loader_workers_collate(run: Manifest, expected: dict[tuple[str, str], float]) -> None:
    loader = DataLoader(samples_of(run), 3, num_workers=2, collate_fn=run.collate())  # type: ignore[arg-type]
    assert [w for batch in loader for w in batch["loss_weight"].tolist()] == list(expected.values())
