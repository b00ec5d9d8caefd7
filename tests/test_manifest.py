"""The manifest in a data loader: every sample finds its row, from whatever place it was read."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
from conftest import encoded, picture, sample, write_tar
from torch.utils.data import DataLoader

import memfilter
from memfilter import Config, ConfigError, InputError, Manifest, RunError


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two folders with a shard of one name in each: six pictures, and copies of two of them that are masked."""
    folder = tmp_path_factory.mktemp("masked")
    for name, seeds in (("a", (0, 1, 2, 0)), ("b", (3, 4, 5, 4))):
        members = [
            m for i, seed in enumerate(seeds) for m in sample(f"{name}{i}", encoded(picture(seed)), f"{name} {i}")
        ]
        write_tar(folder / "in" / name / "00000.tar", members)
    config = Config.parse({"policy": {"image_duplicate": "mask"}})
    return memfilter.run([str(folder / "in")], folder / "out", config, workers=1)


def weights(manifest: Manifest, urls: list[str], **options: Any) -> dict[str, float]:
    data = wds.WebDataset(urls, shardshuffle=False).compose(manifest.attach(**options))
    return {s["__key__"]: s["loss_weight"] for s in data}


def originals(manifest: Manifest) -> list[str]:
    assert manifest.root is not None
    return [f"{manifest.root}/{name}" for name in manifest.shards]


def test_weights_are_those_of_the_rows_on_original_and_filtered_shards(masked: Manifest) -> None:
    rows = {r["key"]: r["loss_weight"] for r in masked.table(["key", "loss_weight"]).to_pylist()}
    assert sorted(rows.values()) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert weights(masked, originals(masked)) == rows
    assert weights(masked, [str(masked.path / "shards" / n) for n in masked.shards]) == rows


def test_weights_are_python_floats_for_batching(masked: Manifest) -> None:
    assert all(type(w) is float for w in weights(masked, originals(masked)).values())


STRANGERS = ["https://host/bucket/a/00000.tar?token=1", "s3://elsewhere/data/b/00000.tar", "s3://elsewhere/a/00001.tar"]


def test_a_shard_of_another_host_is_found_below_the_callers_roots_alone(masked: Manifest) -> None:
    for url in STRANGERS:
        with pytest.raises(KeyError):
            masked.shard_of(url)
    with pytest.raises(KeyError, match=r"bucket/a/00000\.tar: at another place, .* give roots=\[") as error:
        masked.shard_of(STRANGERS[0])
    assert str(masked.root) in str(error.value)
    assert "token" not in str(error.value)
    roots = ["https://host/bucket/?token=2", "s3://elsewhere/data"]
    assert [masked.shard_of(url, roots) for url in STRANGERS[:2]] == ["a/00000.tar", "b/00000.tar"]
    for url in (STRANGERS[2], "https://host/bucket2/a/00000.tar", "http://host/bucket/a/00000.tar"):
        with pytest.raises(KeyError):
            masked.shard_of(url, roots)
    with pytest.raises(KeyError, match=r"/a/00000\.tar: not there, or not of its size"):
        masked.shard_of("/scratch/a/00000.tar")
    for one in ("s3://x", Path("/x")):
        with pytest.raises(ConfigError, match=rf"roots='{one}': give a list"):
            masked.attach(roots=one)  # type: ignore[arg-type]


def test_every_look_up_takes_the_callers_roots(masked: Manifest) -> None:
    url, roots = "s3://mirror/a/00000.tar", ["s3://mirror"]
    named = {"__url__": url, "__key__": "a3", "width": 1}
    asks: list[Callable[..., Any]] = [
        lambda **given: next(masked.attach(**given)([named]))["loss_weight"],
        lambda **given: next(pickle.loads(pickle.dumps(masked.attach(**given)))([named]))["loss_weight"],
        lambda **given: pickle.loads(pickle.dumps(masked.weigh(**given)))(named)["loss_weight"],
        lambda **given: pickle.loads(pickle.dumps(masked.collate(**given)))([named])["loss_weight"].item(),
        lambda **given: masked.weights([url], ["a3"], **given).item(),
    ]
    for ask in asks:
        with pytest.raises(KeyError, match="at another place"):
            ask()
        assert ask(roots=roots) == masked.weight("a/00000.tar", "a3")


def test_a_local_shard_elsewhere_has_the_whole_name_and_the_size_of_its_own(
    masked: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = Path(originals(masked)[0]).read_bytes()
    for place in ("moved/a/00000.tar", "00000.tar", "other/a/00000.tar"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(content)
    (tmp_path / "other" / "a" / "00000.tar").write_bytes(content[:-10240])
    for url in ("00000.tar", "none/a/00000.tar", "other/a/00000.tar", "moved/a\0/a/00000.tar"):
        with pytest.raises(KeyError):
            masked.shard_of(f"{tmp_path}/{url}")
    assert not caplog.messages
    assert masked.shard_of(f"{tmp_path}/other/a/00000.tar", [str(tmp_path / "other")]) == "a/00000.tar"
    with caplog.at_level("WARNING", "memfilter"):
        found = weights(Manifest.load(masked.path), [f"{tmp_path}/moved/a/00000.tar"] * 2)
    assert found == {key: weight for key, weight in weights(masked, originals(masked)).items() if key[0] == "a"}
    place = f"{masked.root}/a/00000.tar"
    assert caplog.messages == [f"{tmp_path}/moved/a/00000.tar: taken for {place}, by its name and size"]


def test_a_filtered_shard_elsewhere_is_known_by_its_own_size(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in" / "a.tar", [m for i in (0, 0, 1) for m in sample(f"{i}{len(str(i))}", encoded(picture(i)))]
    )
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    shutil.copytree(tmp_path / "out" / "shards", tmp_path / "elsewhere")
    assert manifest.shard_of(f"{tmp_path}/elsewhere/a.tar") == "a.tar"


def test_of_two_names_that_a_path_ends_with_the_longer_one_is_its_shard(tmp_path: Path) -> None:
    for i, name in enumerate(("0.tar", "a/0.tar")):
        write_tar(
            tmp_path / "in" / name,
            [m for j in range(9 * i + 1) for m in sample(f"{i}{j}", encoded(picture(9 * i + j)))],
        )
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    (tmp_path / "b" / "a").mkdir(parents=True)
    shutil.copy(tmp_path / "in" / "0.tar", tmp_path / "b" / "a")
    with pytest.raises(KeyError, match=rf"not of its size, so not taken for {tmp_path}/in/a/0\.tar"):
        manifest.shard_of(f"{tmp_path}/b/a/0.tar")
    copied = Manifest.load(shutil.copytree(manifest.path / "manifest", tmp_path / "copied" / "manifest").parent)
    with pytest.raises(KeyError, match=r"so not taken for a/0\.tar; if"):  # which lies nobody knows where
        copied.shard_of(f"{tmp_path}/b/a/0.tar")
    shutil.copy(tmp_path / "in" / "a" / "0.tar", tmp_path / "b" / "a")
    assert manifest.shard_of(f"{tmp_path}/b/a/0.tar") == "a/0.tar"


def test_moved_shards_are_found(masked: Manifest, tmp_path: Path) -> None:
    shutil.copytree(Path(masked.root or ""), tmp_path / "moved")
    assert weights(masked, [str(tmp_path / "moved" / n) for n in masked.shards]) == weights(masked, originals(masked))


def test_a_pipe_needs_the_callers_mapping(masked: Manifest) -> None:
    url = f"pipe:cat {originals(masked)[0]}"
    with pytest.raises(KeyError, match="pipes="):
        weights(masked, [url])
    assert len(weights(masked, [url], pipes={url: "a/00000.tar"})) == 4


def test_no_shard_is_guessed_from_a_command(masked: Manifest) -> None:
    for ask in (masked.shard_of, masked.name_of):
        with pytest.raises(KeyError, match="pipes="):
            ask(f"pipe:cat {originals(masked)[0]}")


def test_marks_of_a_url_are_letters_in_a_local_path(tmp_path: Path) -> None:
    for i, name in enumerate(("c#d/0.tar", "w?x/0.tar", "1#2.tar")):
        write_tar(tmp_path / "in" / name, sample(f"{i}", encoded(picture(i))))
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    assert manifest.shards == ["1#2.tar", "c#d/0.tar", "w?x/0.tar"]
    samples = [{"__url__": url, "__key__": key} for url, key in zip(originals(manifest), "201", strict=True)]
    assert [s["loss_weight"] for s in manifest.attach()(samples)] == [1, 1, 1]
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    for root in ("moved", "out/shards"):
        assert [manifest.shard_of(f"{tmp_path}/{root}/{name}") for name in manifest.shards] == manifest.shards
        assert [manifest.shard_of(f"file:{tmp_path}/{root}/{name}") for name in manifest.shards] == manifest.shards


def test_a_manifest_is_found_from_another_folder(
    masked: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(masked.path.parent)
    manifest = Manifest.load(masked.path.name)
    monkeypatch.chdir(tmp_path)
    assert manifest.weight("a/00000.tar", "a0") == masked.weight("a/00000.tar", "a0")
    assert manifest.path == masked.path


def test_a_sample_that_is_not_known_is_an_error_or_counted(masked: Manifest, tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "00000.tar", sample("a0", b"", "old") + sample("new", b"", "new"))
    with pytest.raises(KeyError, match=r"a/00000\.tar: the manifest has no sample 'new'"):
        weights(masked, [str(tmp_path / "a" / "00000.tar")], roots=[tmp_path])
    stage = masked.attach(missing="keep", roots=[tmp_path])
    data = wds.WebDataset([str(tmp_path / "a" / "00000.tar")], shardshuffle=False).compose(stage)
    assert {s["__key__"]: s["loss_weight"] for s in data}["new"] == 1.0
    assert stage.unknown == 1


def test_end_of_shard_markers_pass_untouched(masked: Manifest) -> None:
    assert list(masked.attach()([{}])) == [{}]


def test_options_that_do_not_exist_are_refused(masked: Manifest) -> None:
    with pytest.raises(ConfigError, match="error or keep, own or pool"):
        masked.attach(missing="ignore")  # type: ignore[arg-type]


def test_loader_workers_get_the_manifest(masked: Manifest) -> None:
    data = (
        wds.WebDataset(originals(masked), shardshuffle=False)
        .compose(masked.attach())
        .to_tuple("__key__", "loss_weight")
    )
    loaded = dict(DataLoader(data, batch_size=None, num_workers=2))
    assert loaded == weights(masked, originals(masked))
    again = pickle.loads(pickle.dumps(masked.attach()))
    assert again.manifest.weight("a/00000.tar", "a0") == masked.weight("a/00000.tar", "a0")


def test_a_row_tells_everything_of_a_sample(masked: Manifest) -> None:
    row = masked.row("b/00000.tar", "b3")
    twin = masked.row("b/00000.tar", "b1")
    assert {row["action"], twin["action"]} == {"mask", "keep"}
    assert row["image_group"] == twin["image_group"]
    with pytest.raises(KeyError):
        masked.row("b/00000.tar", "b9")


def test_a_key_that_is_not_utf8_is_found_by_its_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", sample("caf\udce9", encoded(picture(1)), "latin-1"))
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    assert manifest.table()["key"].to_pylist() == [r"caf\xe9"]
    assert manifest.weight("a.tar", b"caf\xe9") == 1
    assert weights(manifest, originals(manifest)) == {"caf\udce9": 1.0}


def scored(tmp_path: Path, members: list[tuple[str, bytes]], **settings: Any) -> Manifest:
    """A run's manifest in which all captions with "key" in them are over a threshold: written by the same stages."""
    from memfilter import manifest as manifests
    from memfilter import pipeline
    from memfilter.caption_groups import caption_keepers
    from memfilter.decisions import decide
    from memfilter.edges import find_candidates
    from memfilter.groups import distinct_captions, group, load_samples
    from memfilter.records import Scores
    from memfilter.store import Store
    from memfilter.summary import statistics

    write_tar(tmp_path / "in" / "a.tar", members)
    config = Config.parse({"images": {"encoder": None}, **settings})
    run = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    store = Store(run.path)
    samples = load_samples([pipeline.Shard(s["name"], "", s["bytes"]) for s in run.info["shards"]], store)
    captions, caption = distinct_captions(samples, store)
    keepers = caption_keepers(samples, captions, caption, store, config)
    groups = group(samples, find_candidates(samples, store, config), caption, keepers, store, config)
    high = np.array([5.0 if "key" in text else 0.5 for text in captions["text"].to_pylist()], np.float32)
    scores = Scores(high, high[caption], high[caption] / 64, {"conditions": 3})
    decisions = decide(samples, groups, captions, scores, 2.0, config.policy)
    about = {k: v for k, v in run.info.items() if k not in ("schema_version", "counts", "files", "digest")}
    about["found"] = statistics(samples, groups, decisions, scores, store)
    manifests.write_parts(store, samples, groups, decisions, scores, None, own_uids=False)
    return manifests.finish(store, samples, decisions, about)


def in_training(manifest: Manifest, member: str, **options: Any) -> dict[str, tuple[float, Any]]:
    """Return each sample's weight and what stands in a member of it."""
    data = wds.WebDataset(originals(manifest), shardshuffle=False).compose(manifest.attach(**options))
    return {s["__key__"]: (s["loss_weight"], s.get(member)) for s in data}


LARGE = encoded(picture(0, 200, 160))


def test_the_heir_of_a_memorized_keeper_trains_in_its_stead_in_either_mode(tmp_path: Path) -> None:
    members = sample("0", LARGE, "a key, known by heart") + sample("1", encoded(picture(0)), "a harmless copy")
    members += sample("2", encoded(picture(0)), "one more copy") + sample("3", encoded(picture(2)), "another key")
    manifest = scored(tmp_path, members)
    rows = manifest.table().to_pylist()
    assert [row["action"] for row in rows] == ["mask", "keep", "drop", "mask"]
    assert [row["magnitude"] for row in rows] == [5.0, 0.5, 0.5, 5.0]
    assert [row["captions"] for row in rows] == [None, ["a harmless copy", "one more copy"], None, None]
    assert [row["canonical_uid"] for row in rows] == [rows[1]["uid"], None, rows[1]["uid"], None]
    # the edges are those to the group's keeper
    assert [row["match_method"] for row in rows] == [None, "hash", "hash", None]
    assert [(row["image_group"], row["image_count"]) for row in rows] == [(0, 3)] * 3 + [(3, 1)]
    for captions in ("own", "pool"):
        assert weights(manifest, originals(manifest), captions=captions) == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 0.0}
    assert in_training(manifest, "txt", captions="pool")["1"] == (1.0, b"a harmless copy")


def test_a_masked_sample_trains_on_the_first_caption_of_its_pool_and_on_nothing_else(tmp_path: Path) -> None:
    pool = json.dumps({"captions": ["the key again", "une caption s\u00fbre", "another safe one"]}).encode()
    members = sample("0", LARGE, "a key, known by heart", json=pool) + sample("1", encoded(picture(0)), "the key")
    # a pool in which nothing is safe, and none at all
    members += sample("2", encoded(picture(2, 200, 160)), "another key") + sample("3", encoded(picture(2)), "my key")
    members += sample("4", encoded(picture(4)), "a lonely key") + sample("5", encoded(picture(5)), "fine", json=pool)
    manifest = scored(tmp_path, members)
    rows = manifest.table(["action", "captions"]).to_pylist()
    assert [row["action"] for row in rows] == ["mask", "drop", "mask", "drop", "mask", "keep"]
    safe = ["une caption s\u00fbre", "another safe one"]
    assert [row["captions"] for row in rows] == [safe, None, [], None, None, ["fine", *safe]]
    own = [b"a key, known by heart", b"the key", b"another key", b"my key", b"a lonely key", b"fine"]
    by_own = {str(i): (float(i == 5), text) for i, text in enumerate(own)}
    assert in_training(manifest, "txt") == by_own
    by_pool = in_training(manifest, "txt", captions="pool")
    assert by_pool == {**by_own, "0": (1.0, "une caption s\u00fbre".encode())}
    assert in_training(manifest, "json", captions="pool")["0"] == (1.0, pool)


def test_a_run_of_before_that_weighs_an_empty_pool_hands_out_no_memorized_caption(tmp_path: Path) -> None:
    members = sample("0", LARGE, "a key") + sample("1", encoded(picture(2)), "my key", json=b'{"captions": ["a key"]}')
    manifest = scored(tmp_path, members)
    file = manifest.path / "manifest" / "lookup.arrow"
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    at = table.schema.get_field_index("pool_weight")
    assert table["pool_weight"].to_pylist() == [0, 0]
    table = table.set_column(at, "pool_weight", pa.array([1, 1], pa.float32()))
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert Manifest.load(manifest.path).pool_weight("a.tar", "0") == 1
    assert weights(Manifest.load(manifest.path), originals(manifest), captions="pool") == {"0": 0.0, "1": 0.0}


def test_a_caption_in_a_json_gives_way_in_its_field_alone(tmp_path: Path) -> None:
    fields = {"text": "a key", "captions": ["\u732b"], "width": 2**70, "nested": {"text": "a key"}}
    members = sample("0", LARGE, "a key of the txt", json=json.dumps(fields).encode())
    manifest = scored(tmp_path, members, input={"caption": "json", "caption_field": "text"})
    weight, found = in_training(manifest, "json", captions="pool")["0"]
    assert weight == 1.0
    assert json.loads(found) == {**fields, "text": "\u732b"}
    assert in_training(manifest, "txt", captions="pool")["0"] == (1.0, b"a key of the txt")
    stage, names = manifest.attach(captions="pool"), {"__key__": "0", "__url__": originals(manifest)[0]}
    assert next(stage([{**names, "json": fields}]))["json"] == {**fields, "text": "\u732b"}
    assert json.loads(next(stage([{**names, "json": json.dumps(fields)}]))["json"])["text"] == "\u732b"
    for other in (b"{", b"[1]", b"[" * 100_000, 7):
        with pytest.raises(InputError, match=r"a\.tar: sample '0': its json is no object, and not what the run read"):
            list(stage([{**names, "json": other}]))


def test_a_memorized_caption_that_is_only_recorded_gives_way_to_its_pool_too(tmp_path: Path) -> None:
    members = sample("0", LARGE, "a key, known by heart") + sample("1", encoded(picture(0)), "a harmless copy")
    manifest = scored(tmp_path, members, policy={"magnitude": "record"})
    assert in_training(manifest, "txt")["0"] == (1.0, b"a key, known by heart")
    assert in_training(manifest, "txt", captions="pool")["0"] == (1.0, b"a harmless copy")


def test_a_sample_without_a_url_is_refused(masked: Manifest) -> None:
    with pytest.raises(ConfigError, match="right after the shards are read"):
        list(masked.attach(missing="keep")([{"__key__": "a0"}]))


def test_rows_are_those_of_their_shard_behind_a_skipped_one(tmp_path: Path) -> None:
    for i in range(3):
        members = [m for j in range(2) for m in sample(f"{i}{j}", encoded(picture(2 * i + j)))]
        write_tar(tmp_path / "in" / f"{i}.tar", members)
    (tmp_path / "in" / "0.tar").write_bytes((tmp_path / "in" / "0.tar").read_bytes()[:1000])
    config = Config.parse({"input": {"on_bad_shard": "skip"}})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    for shard in (1, 2):
        for key in (f"{shard}0", f"{shard}1"):
            row = manifest.row(f"{shard}.tar", key)
            assert (row["shard"], row["key"]) == (f"{shard}.tar", key)


def test_a_manifest_that_was_copied_alone_serves_a_loader(masked: Manifest, tmp_path: Path) -> None:
    shutil.copytree(masked.path / "manifest", tmp_path / "copy" / "manifest")
    assert weights(Manifest.load(tmp_path / "copy"), originals(masked)) == weights(masked, originals(masked))


def test_file_urls_are_plain_paths(masked: Manifest, tmp_path: Path) -> None:
    urls = [f"file://{path}" for path in originals(masked)]
    assert weights(masked, urls) == weights(masked, originals(masked))
    again = memfilter.run(urls, tmp_path / "out", Config.parse({"policy": {"image_duplicate": "mask"}}), workers=1)
    assert again.root == masked.root
    assert weights(again, urls) == weights(masked, urls)


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(RunError, match="damaged, it has no config"):
        memfilter.verify(tmp_path)


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no manifest"):
        Manifest.load(tmp_path)


def test_the_table_has_the_promised_columns(masked: Manifest) -> None:
    assert masked.table().schema.names == [
        *("uid", "shard", "index", "key", "action", "loss_weight", "reasons", "detail"),
        *("canonical_uid", "match_method", "match_distance", "image_group", "caption_group"),
        *("image_count", "caption_count", "joint_count", "duplication", "magnitude", "magnitude_eps", "captions"),
        *("caption_match", "caption_distance", "caption_images", "image_captions", "mitigate"),
        *("generality", "generality_specificity", "generality_broadness", "generality_tense", "generality_abstraction"),
        *("attention_entropy", "anisotropy", "sharpness"),
        *("match_score", "match_threshold"),
    ]
    assert masked.table().schema.field("uid").type == pa.binary(16)


# -- a run that is decided again while its manifest is open -----------------------------------------------------------


@pytest.fixture
def open_run(masked: Manifest, tmp_path: Path) -> Manifest:
    return Manifest.load(shutil.copytree(masked.path, tmp_path / "open"))


def decided_again(manifest: Manifest, policy: str) -> None:
    file = manifest.path.parent / "policy.yaml"
    file.write_text(f"policy: {{image_duplicate: {policy}}}")
    memfilter.rethreshold(manifest.path, file, workers=1)
    time.sleep(0.1)  # look-ups notice it that late


def test_an_open_manifest_whose_run_was_decided_again_gives_no_more_weights(open_run: Manifest) -> None:
    stage, rows = open_run.attach(), open_run.weigh()
    urls = originals(open_run)
    stream = stage({"__url__": url, "__key__": f"{key}1"} for url, key in zip(urls, "ab", strict=True))
    assert next(stream)["loss_weight"] == 1.0
    assert open_run.weight("a/00000.tar", "a1") == 1.0
    sent = pickle.dumps(open_run)
    decided_again(open_run, "record")
    asks = [
        lambda: next(stream),
        lambda: open_run.weight("b/00000.tar", "b1"),
        lambda: open_run.weights(["b/00000.tar"], ["b1"]),
        lambda: open_run.row("b/00000.tar", "b1"),
        lambda: open_run.table(["loss_weight"]),
        lambda: rows({"__url__": [urls[1]], "__key__": ["b1"]}),
        lambda: next(stage([{"__url__": urls[0], "__key__": "a1"}])),  # the next epoch, on the shard of the last one
        lambda: pickle.loads(sent).weight("a/00000.tar", "a1"),
    ]
    for ask in asks:
        with pytest.raises(RunError, match="was decided again since its manifest was opened; open it again"):
            ask()
    assert set(Manifest.load(open_run.path).table(["loss_weight"])["loss_weight"].to_pylist()) == {1.0}


def test_an_open_manifest_stays_good_where_nothing_was_decided_otherwise(open_run: Manifest) -> None:
    assert open_run.weight("a/00000.tar", "a1") == 1.0
    decided_again(open_run, "mask")
    assert open_run.weight("b/00000.tar", "b1") == 1.0
    assert len(open_run.table()) == 8


def test_a_manifest_that_has_gone_is_told(open_run: Manifest) -> None:
    assert open_run.weight("a/00000.tar", "a1") == 1.0
    shutil.rmtree(open_run.path)
    time.sleep(0.1)
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read any more: No such file"):
        open_run.weight("b/00000.tar", "b1")


def test_a_shard_that_comes_too_early_for_a_check_is_checked_later(open_run: Manifest) -> None:
    assert open_run.weight("a/00000.tar", "a1") == 1.0
    assert open_run.weight("b/00000.tar", "b1") == 1.0
    shutil.rmtree(open_run.path)
    time.sleep(0.1)
    with pytest.raises(RunError, match="cannot be read any more"):
        open_run.weight("b/00000.tar", "b2")


def test_look_ups_at_random_order_cost_no_more_than_in_the_order_of_shards(open_run: Manifest) -> None:
    shards = open_run.shards * 3000

    def seconds(order: list[str]) -> float:
        started = time.process_time()
        for shard in order:
            open_run.place(shard, "a1")
        return time.process_time() - started

    in_order, at_random = (min(seconds(order) for _ in range(3)) for order in (sorted(shards), shards))
    assert at_random < 3 * in_order  # ten times as much where each change of shard is a look at the disk
