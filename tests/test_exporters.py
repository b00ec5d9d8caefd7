"""What trains, as other loaders read it: exact content, read back the way each of them does."""

from __future__ import annotations

import json
import os
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
    """Shards of one name in two folders, with memfilter's uids, and no filtered shards."""
    folder = tmp_path_factory.mktemp("folders")
    for i, name in enumerate(("a/0.tar", "b/0.tar")):
        write_tar(folder / "in" / name, sample("0", encoded(picture(i)), words(i)))
    config = Config.parse({"output": {"shards": False}, "images": {"encoder": None}})
    return memfilter.run([str(folder / "in")], folder / "out", config, workers=1)


def test_what_an_exporter_cannot_tell_is_refused(folders: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown to DataComp; run again with input\.uid_field"):
        export(folders, "datacomp", tmp_path / "subset.npy")
    with pytest.raises(ConfigError, match=r"b/0\.tar: a second shard of this file name"):
        export(folders, "open_clip", tmp_path / "sizes.json")
    with pytest.raises(ConfigError, match="export to 'wids': one of datacomp, energon, keys, open_clip"):
        export(folders, "wids", tmp_path / "index.json")
    assert list(tmp_path.iterdir()) == []
    assert export(folders, "keys", tmp_path / "keys") == 2  # without filtered shards too


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
        assert done.output == f"{out}: 4 of 8 samples train\n"
        assert out.is_file()
    assert CliRunner().invoke(cli, ["export", str(run.path), "--to", "wids", "--out", "x"]).exit_code == 2


def test_a_run_that_is_not_finished_is_one_line(tmp_path: Path) -> None:
    error = CliRunner().invoke(cli, ["export", str(tmp_path), "--to", "keys", "--out", str(tmp_path / "x")]).exception
    assert "holds no manifest; finish the run" in str(error)
