"""What trains, as other loaders read it: exact content, read back the way each of them does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import braceexpand
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from conftest import encoded, picture, sample, words, write_tar

import memfilter
from memfilter import Config, ConfigError, InputError, Manifest
from memfilter.cli import cli
from memfilter.exporters import EXPORTERS, export


def uid(i: int) -> str:
    """Return an own uid whose order is not that of the samples."""
    return f"{(7 - i) % 8:016x}{2**64 - 1 - i:016x}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three shards with uids of their own: a copy is masked, a broken image is bad, the third shard all over."""
    folder = tmp_path_factory.mktemp("exporters")

    def members(i: int, key: str, seed: int | None) -> list[tuple[str, bytes]]:
        image = b"\xff\xd8\xff" if seed is None else encoded(picture(seed))
        return sample(key, image, "a" * (9 - i), json=json.dumps({"uid": uid(i)}).encode())

    write_tar(folder / "in" / "0.tar", members(0, "a", 0) + members(1, "b", 1) + members(2, "x/c", 2))
    write_tar(folder / "in" / "1.tar", members(3, "{a,b}\\c", 0) + members(4, 'tab\t"é"', 3) + members(5, "e", None))
    write_tar(folder / "in" / "2.tar", members(6, "f", None) + members(7, "g", None))
    config = {"input": {"uid_field": "uid"}, "images": {"encoder": None}, "policy": {"image_duplicate": "mask"}}
    manifest = memfilter.run([str(folder / "in")], folder / "out", Config.parse(config), workers=1)
    rows = manifest.table(["key", "action"]).to_pylist()
    assert [r["action"] for r in rows] == ["keep", "keep", "keep", "mask", "keep", "bad", "bad", "bad"]
    return manifest


def test_keys_are_one_a_line_in_order_and_tabs_are_escaped(run: Manifest, tmp_path: Path) -> None:
    assert export(run, "keys", tmp_path / "keys.txt") == 4
    assert (tmp_path / "keys.txt").read_bytes() == '0.tar\ta\n0.tar\tb\n0.tar\tx/c\n1.tar\ttab\\x09"é"\n'.encode()


def test_energon_excludes_what_does_not_train(run: Manifest, tmp_path: Path) -> None:
    assert export(run, "energon", tmp_path / "split.yaml") == 4
    lines = [
        *("split_parts:", "  train:", '  - "0.tar"', '  - "1.tar"', '  - "2.tar"', "  val: []", "  test: []"),
        *("exclude:", r'- "1.tar/\\{a,b\\}\\\\c"', '- "1.tar/e"', '- "2.tar"'),
    ]
    assert (tmp_path / "split.yaml").read_text().splitlines() == lines
    split = yaml.safe_load((tmp_path / "split.yaml").read_text())
    # as energon reads it: every name is expanded, excluded shards go, and samples go by shard/key
    excluded = {e for entry in split["exclude"] for e in braceexpand.braceexpand(entry)}
    shards = [s for entry in split["split_parts"]["train"] for s in braceexpand.braceexpand(entry)]
    rows = run.table(["shard", "key", "loss_weight"]).to_pylist()
    read = [r for r in rows if r["shard"] in set(shards) - excluded and f"{r['shard']}/{r['key']}" not in excluded]
    assert read == [r for r in rows if r["loss_weight"] > 0]


def test_energon_excludes_nothing_where_all_trains(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", sample("\udce9", encoded(picture(0))))  # a key that need not be named
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    export(manifest, "energon", tmp_path / "split.yaml")
    split = yaml.safe_load((tmp_path / "split.yaml").read_text())
    assert split == {"split_parts": {"train": ["0.tar"], "val": [], "test": []}, "exclude": []}


def test_energon_excludes_a_skipped_shard_and_refuses_a_key_that_it_cannot_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", sample("a", encoded(picture(0))) + sample("caf\udce9", encoded(picture(0))))
    write_tar(tmp_path / "in" / "1.tar", sample(r"a\x09", encoded(picture(0))) + sample("b", encoded(picture(1))))
    (tmp_path / "in" / "2.tar").write_bytes((tmp_path / "in" / "0.tar").read_bytes()[:1000])
    config = Config.parse({"input": {"on_bad_shard": "skip"}, "images": {"encoder": None}})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    if manifest.weight("0.tar", b"caf\xe9"):
        pytest.fail("the copy with the longer key is to be dropped")
    with pytest.raises(InputError, match=r"0\.tar: the key 'caf\\\\xe9' is not UTF-8"):
        export(manifest, "energon", tmp_path / "split.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_energon_takes_an_escape_for_one_where_nothing_tells(tmp_path: Path) -> None:
    def run_on(name: str, key: str) -> Manifest:
        jsons = [json.dumps({"uid": uid(i)}).encode() for i in range(2)]
        members = sample("a", encoded(picture(0)), "longer", json=jsons[0])
        write_tar(tmp_path / name / "0.tar", members + sample(key, encoded(picture(0)), "short", json=jsons[1]))
        config = Config.parse({"input": {"uid_field": "uid"}, "images": {"encoder": None}})
        manifest = memfilter.run([str(tmp_path / name)], tmp_path / f"{name}-run", config, workers=1)
        assert manifest.weight("0.tar", key) == 0
        return manifest

    for name, key in (("raw", "caf\udce9"), ("written", r"caf\xe9")):
        manifest = run_on(name, key)
        with pytest.raises(InputError, match=r"0\.tar: the key 'caf\\\\xe9' may not be UTF-8"):
            export(manifest, "energon", tmp_path / "split.yaml")
    export(run_on("literal", r"a\x09"), "energon", tmp_path / "split.yaml")
    assert r'"0.tar/a\\\\x09"' in (tmp_path / "split.yaml").read_text()


def test_datacomp_finds_its_uids_in_the_sorted_array(run: Manifest, tmp_path: Path) -> None:
    assert export(run, "datacomp", tmp_path / "subset.npy") == 4
    subset = np.load(tmp_path / "subset.npy", mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    kept = [uid(i) for i in (0, 1, 2, 4)]
    assert subset.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u in kept)
    for i in range(8):  # as its resharder does
        key = np.array([divmod(int(uid(i), 16), 2**64)], "u8,u8")[0]
        count = np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")
        assert count == (uid(i) in kept)


def test_open_clip_gets_the_sizes_of_the_filtered_shards(run: Manifest, tmp_path: Path) -> None:
    assert export(run, "open_clip", tmp_path / "sizes.json") == 4
    assert (tmp_path / "sizes.json").read_bytes() == (run.path / "shards" / "sizes.json").read_bytes()
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 3, "1.tar": 2}
    shards = sorted(str(path) for path in (run.path / "shards").glob("*.tar"))
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sum(int(sizes[os.path.basename(shard)]) for shard in shards) == 5  # as open_clip counts them


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of one name in two folders, with memfilter's uids."""
    folder = tmp_path_factory.mktemp("folders")
    for i, name in enumerate(("a/0.tar", "b/0.tar")):
        write_tar(folder / "in" / name, sample("0", encoded(picture(i)), words(i)))
    config = Config.parse({"images": {"encoder": None}})
    return memfilter.run([str(folder / "in")], folder / "out", config, workers=1)


def test_what_an_exporter_cannot_tell_is_refused(folders: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown to DataComp; run again with input\.uid_field"):
        export(folders, "datacomp", tmp_path / "subset.npy")
    with pytest.raises(ConfigError, match=r"b/0\.tar: a second shard of this file name"):
        export(folders, "open_clip", tmp_path / "sizes.json")
    with pytest.raises(ConfigError, match="export to 'wids': one of datacomp, energon, keys, open_clip"):
        export(folders, "wids", tmp_path / "index.json")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_filtered_shards_has_no_sizes_of_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", sample("0", encoded(picture(0))))
    config = Config.parse({"output": {"shards": False}, "images": {"encoder": None}})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    with pytest.raises(ConfigError, match=r"no filtered shards to count; run again with output\.shards: true"):
        export(manifest, "open_clip", tmp_path / "sizes.json")
    assert export(manifest, "keys", tmp_path / "keys") == 1


def test_nothing_is_written_over_the_input_or_into_the_run(run: Manifest, tmp_path: Path) -> None:
    root = Path(run.root or "")
    before = (root / "0.tar").read_bytes()
    with pytest.raises(ConfigError, match=r"0\.tar: is there already, among the input"):
        export(run, "keys", root / "0.tar")
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(ConfigError, match="among the input"):
        export(run, "keys", tmp_path / "link" / "0.tar")
    with pytest.raises(ConfigError, match="inside the run directory"):
        export(run, "open_clip", run.path / "shards" / "sizes.json")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        export(run, "keys", tmp_path)
    assert (root / "0.tar").read_bytes() == before
    assert memfilter.verify(run.path) == []


def test_what_is_no_file_stays_and_a_link_stays_a_link(run: Manifest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name in ("pipe", "to-pipe"):
        with pytest.raises(ConfigError, match="is a device or a pipe; name a file"):
            export(run, "keys", tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/keys.txt")
    for _ in range(2):  # the target is made, and replaced
        assert export(run, "keys", tmp_path / "link") == 4
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "keys.txt").read_bytes().startswith(b"0.tar\ta\n")
        (tmp_path / "folder" / "keys.txt").write_text("an earlier one")


def test_a_shard_that_is_a_link_is_not_overwritten(tmp_path: Path) -> None:
    write_tar(tmp_path / "blob", sample("0", encoded(picture(0))))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").symlink_to("../blob")
    (tmp_path / "link").symlink_to("in/0.tar")
    before = (tmp_path / "blob").read_bytes()
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    for place in ("in/0.tar", "link", "blob"):
        with pytest.raises(ConfigError, match="among the input"):
            export(manifest, "keys", tmp_path / place)
    assert (tmp_path / "blob").read_bytes() == before


def test_shards_are_not_overwritten_where_the_input_root_is_not_known(run: Manifest, tmp_path: Path) -> None:
    shutil.copytree(run.path / "manifest", tmp_path / "copy" / "manifest")
    info = json.loads((tmp_path / "copy" / "manifest" / "manifest.json").read_text())
    info["shards"].append({"name": "c/plain", "bytes": 5, "skipped": "a cause"})
    (tmp_path / "copy" / "manifest" / "manifest.json").write_text(json.dumps(info))
    manifest = Manifest.load(tmp_path / "copy")
    assert manifest.root is None
    (tmp_path / "plain").write_text("a shard")
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "1.tar").symlink_to("blob")
    for name in ("plain", "link", "0.tar", "1.tar", "new.TAR.GZ", "new.tgz"):
        with pytest.raises(ConfigError, match="has a shard's name; choose another"):
            export(manifest, "keys", tmp_path / name)
    assert (tmp_path / "plain").read_text() == "a shard"
    assert not (tmp_path / "blob").exists()
    assert export(manifest, "keys", tmp_path / "keys") == 4


def test_a_place_that_cannot_be_written_is_one_line(run: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "k", tmp_path / "file" / "k" / "k", tmp_path / ("k" * 250)):
        with pytest.raises(ConfigError, match=f"^{place}: cannot be written: ") as error:
            export(run, "keys", place)
        assert ".tmp" not in str(error.value)
    for arguments in (["--out", "s3://bucket/keys"], ["--out", "file:///keys"]):
        done = CliRunner().invoke(cli, ["export", str(run.path), "--to", "keys", *arguments])
        assert str(done.exception) == f"{arguments[1]}: is a URL; name a local file"
    with pytest.raises(ConfigError, match="is a URL"):
        export(run, "keys", "s3://bucket/keys")


def test_an_export_replaces_an_earlier_one_by_the_same_bytes(run: Manifest, tmp_path: Path) -> None:
    for to in EXPORTERS:
        (tmp_path / to).write_text("an earlier one")
        export(run, to, tmp_path / to)
        first = (tmp_path / to).read_bytes()
        export(Manifest.load(run.path), to, tmp_path / to)
        assert (tmp_path / to).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == list(EXPORTERS)


def test_the_command_writes_each_of_them(run: Manifest, tmp_path: Path) -> None:
    for to in EXPORTERS:
        out = tmp_path / to
        done = CliRunner().invoke(cli, ["export", str(run.path), "--to", to, "--out", str(out)], catch_exceptions=False)
        first, *more = done.output.splitlines()
        assert first == f"{out}: 4 of 8 samples train"
        place = f"it belongs in {run.root}/.nv-meta: the run's input root is {run.root}; another needs a run with "
        assert more == ([place + "input.root"] if to == "energon" else [])
        assert out.is_file()
    assert CliRunner().invoke(cli, ["export", str(run.path), "--to", "wids", "--out", "x"]).exit_code == 2


def test_a_run_that_is_not_finished_is_one_line(tmp_path: Path) -> None:
    error = CliRunner().invoke(cli, ["export", str(tmp_path), "--to", "keys", "--out", str(tmp_path / "x")]).exception
    assert "holds no manifest; finish the run" in str(error)
