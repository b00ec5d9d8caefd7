"""The main job, end to end, on real tars: the exact kept set, the same bytes however it is run, and clear refusals."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import encoded, picture, sample, words, write_tar
from PIL import ImageEnhance

import memfilter
from memfilter import Config, ConfigError, InputError, Manifest, RunError, ShardError

Rows = dict[tuple[str, str], dict[str, Any]]


def rows(manifest: Manifest) -> Rows:
    return {(row["shard"], row["key"]): row for row in manifest.table().to_pylist()}


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files, without the lock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def memfilter_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memfilter", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards: 40 single pictures, and copies of five of them, of three captions and of one pair."""
    folder = tmp_path_factory.mktemp("planted")
    singles = [encoded(picture(i, 160, 120)) for i in range(40)]
    image = [picture(i, 160, 120) for i in range(40)]
    captions = [words(i) for i in range(40)]
    shards: list[list[tuple[str, bytes]]] = [[], [], [], []]
    for i in range(40):
        shards[i % 3] += sample(f"{i:04}", singles[i], captions[i])
    copies = {
        "exact": singles[0],
        "quality": encoded(image[1], quality=40),
        "half": encoded(image[2].resize((80, 60))),
        "bright": encoded(ImageEnhance.Brightness(image[3]).enhance(1.12)),
        "png": encoded(image[4], "PNG"),
    }
    for name, data in copies.items():
        shards[3] += sample(name, data, f"another caption for {name}")
    shards[3] += sample("pair", encoded(image[5], quality=60), captions[5])
    shards[3] += sample("caption", encoded(picture(100, 160, 120)), captions[6].upper().replace(" ", ", ") + "!")
    shards[3] += sample("broken", singles[7][:500], "cut off")
    shards[3] += sample("alone", None, "no image")
    shards[3] += sample("twice", singles[8], "first") + sample("between", encoded(picture(101)), "between")
    shards[3] += sample("twice", singles[9], "second")
    for i, members in enumerate(shards):
        write_tar(folder / "data" / f"{i:05}.tar", members)
    return folder / "data"


@pytest.fixture(scope="module")
def finished(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return memfilter.run([str(planted)], tmp_path_factory.mktemp("finished") / "out", workers=1)


def test_every_row_is_what_was_planted(finished: Manifest) -> None:
    found = rows(finished)
    for original, name in enumerate(["exact", "quality", "half", "bright", "png"]):
        copy, single = found["00003.tar", name], found[f"{original % 3:05}.tar", f"{original:04}"]
        assert copy["image_group"] == single["image_group"], name
        assert {copy["action"], single["action"]} == {"keep", "drop"}, name
        dropped, kept = sorted((copy, single), key=lambda r: str(r["action"]))
        assert dropped["canonical_uid"] == kept["uid"]
        assert dropped["match_method"] in (("exact",) if name == "exact" else ("hash", "embedding")), name
        assert dropped["reasons"][0] == f"{dropped['match_method']}_duplicate"
        assert (dropped["loss_weight"], kept["loss_weight"]) == (0, 1)
        assert (copy["duplication"], copy["image_count"], copy["joint_count"]) == ("partial", 2, 1)
    pair = found["00003.tar", "pair"]
    assert (pair["duplication"], pair["joint_count"], pair["caption_count"]) == ("full", 2, 2)
    caption = found["00003.tar", "caption"]
    assert (caption["duplication"], caption["caption_count"], caption["action"]) == ("caption", 2, "keep")
    assert caption["caption_group"] == found["00000.tar", "0006"]["caption_group"]
    bad = [(r["key"], r["reasons"]) for r in found.values() if r["action"] == "bad"]
    assert sorted(bad) == [("alone", ["no_image"]), ("broken", ["unreadable_image"]), ("twice", ["repeated_key"])]
    assert finished.counts == {"read": 52, "keep": 42, "mask": 0, "drop": 6, "bad": 4}
    twice = [r for r in finished.table().to_pylist() if r["key"] == "twice"]
    assert [r["reasons"] for r in twice] == [["repeated_key"]] * 2


def test_nothing_else_was_joined(finished: Manifest) -> None:
    assert sum(r["image_count"] > 1 for r in finished.table().to_pylist()) == 12
    assert sum(r["caption_count"] > 1 for r in finished.table().to_pylist()) == 4


def test_filtered_shards_hold_exactly_the_kept_samples_byte_for_byte(finished: Manifest, planted: Path) -> None:
    kept = {place for place, row in rows(finished).items() if row["action"] == "keep"}
    seen = set()
    for path in sorted(planted.glob("*.tar")):
        with tarfile.open(path) as before, tarfile.open(finished.path / "shards" / path.name) as after:
            for member in after:
                key = (path.name, member.name.split(".")[0])
                assert key in kept
                seen.add(key)
                original = before.extractfile(member.name)
                written = after.extractfile(member)
                assert original is not None
                assert written is not None
                assert original.read() == written.read()
    assert seen == kept
    sizes = json.loads((finished.path / "shards" / "sizes.json").read_text())
    assert sum(sizes.values()) == len(kept)


def test_kept_captions_are_pooled_from_dropped_copies(finished: Manifest) -> None:
    found = rows(finished)
    both = {words(0), "another caption for exact"}
    keeper = next(r for r in found.values() if r["captions"] and set(r["captions"]) == both)
    assert keeper["action"] == "keep"
    assert found["00001.tar", "0010"]["captions"] is None


def test_manifest_names_no_place_clock_or_host(finished: Manifest, planted: Path) -> None:
    text = (finished.path / "manifest" / "manifest.json").read_text()
    assert str(planted) not in text
    assert str(finished.path) not in text
    assert os.uname().nodename not in text


def test_two_workers_shuffled_order_and_another_folder_give_the_same_bytes(
    finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    shards = sorted(map(str, planted.glob("*.tar")))
    random.Random(3).shuffle(shards)
    memfilter.run(shards, tmp_path / "out", workers=2)
    assert tree(tmp_path / "out") == tree(finished.path)


def test_the_same_command_again_writes_nothing(finished: Manifest, planted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*.parquet")}
    before |= {p: p.stat().st_mtime_ns for p in finished.path.rglob("*.tar")}
    memfilter.run([str(planted)], finished.path, workers=1)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "memfilter", "run", str(planted), "--out", str(tmp_path / "out"), "--workers", "2"]
    moments, killed, whole = random.Random(11), 0, 10.0
    for i in range(40):
        if i % 4 == 0:  # from the beginning again, so that every stage is met
            subprocess.run(["rm", "-rf", str(tmp_path / "out")], check=True)
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=moments.uniform(0.1, 1.0) * whole)
            whole = min(whole, time.monotonic() - started)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        if killed == 5:
            break
    assert killed == 5
    subprocess.run(command, check=True, capture_output=True)
    assert tree(tmp_path / "out") == tree(finished.path)


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"hash_radius": 0, "encoder_similarity": 0.999}},
        {"images": {"hash_radius": 8, "keep": ["caption_length", "uid"]}},
        {"policy": {"image_duplicate": "mask", "caption_duplicate": "drop", "pool_captions": False}},
        {"policy": {"image_duplicate": "record"}, "output": {"shards": True}},
    ],
    ids=str,
)
def test_rethreshold_equals_a_fresh_run(
    change: dict[str, Any], finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(change))
    old, new = tmp_path / "old", tmp_path / "new"
    memfilter.run([str(planted)], old, workers=1)
    memfilter.rethreshold(old, tmp_path / "new.yaml", workers=1)
    memfilter.run([str(planted)], new, Config.load(tmp_path / "new.yaml"), workers=1)
    assert tree(old) == tree(new)
    assert tree(old) != tree(finished.path)


def test_rethreshold_rewrites_only_the_shards_whose_kept_set_changed(planted: Path, tmp_path: Path) -> None:
    memfilter.run([str(planted)], tmp_path / "out", workers=1)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").glob("*.tar")}
    (tmp_path / "new.yaml").write_text("images: {hash_radius: 0, encoder_similarity: 2.0}")
    found = rows(memfilter.rethreshold(tmp_path / "out", tmp_path / "new.yaml", workers=1))
    assert 0 < sum(row["image_count"] > 1 for row in found.values()) < 12
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards").glob("*.tar")}
    assert 0 < sum(before[n] != after[n] for n in before) < len(before) or before.keys() != after.keys()


def test_rethreshold_refuses_what_needs_the_pixels(finished: Manifest, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text("images: {hash: dhash}")
    with pytest.raises(ConfigError, match=r"need 'memfilter run'"):
        memfilter.rethreshold(finished.path, tmp_path / "new.yaml")


def test_a_shard_of_which_nothing_is_kept_leaves_no_tar(tmp_path: Path) -> None:
    data = encoded(picture(1))
    write_tar(tmp_path / "in" / "a.tar", sample("1", encoded(picture(1, 200, 180)), "large"))
    write_tar(tmp_path / "in" / "b.tar", sample("1", data, "small"))
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    assert sorted(p.name for p in (tmp_path / "out" / "shards").glob("*.tar")) == ["a.tar"]
    assert [s.get("emptied") for s in manifest.info["shards"]] == [None, True]
    assert memfilter.verify(tmp_path / "out") == []


def test_without_shards_only_the_manifest_is_written(planted: Path, tmp_path: Path) -> None:
    memfilter.run([str(planted)], tmp_path / "out", Config.parse({"output": {"shards": False}}), workers=1)
    assert not (tmp_path / "out" / "shards").exists()
    assert memfilter.verify(tmp_path / "out") == []


def test_captions_from_json_and_uids_of_their_own(tmp_path: Path) -> None:
    def fields(i: int) -> bytes:
        return json.dumps({"text": f"caption {i}", "id": f"{i:032x}", "captions": [f"more {i}"]}).encode()

    members = [m for i in range(3) for m in sample(f"{i}", encoded(picture(i)), json=fields(i))]
    members += sample("3", encoded(picture(3)), json=b'{"text": "no id"}')
    members += sample("4", encoded(picture(4)), json=b"[1, 2")
    write_tar(tmp_path / "in" / "a.tar", members)
    config = Config.parse({"input": {"caption": "json", "caption_field": "text", "uid_field": "id"}})
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config, workers=1)
    found = rows(manifest)
    assert [found["a.tar", str(i)]["uid"] for i in range(3)] == [i.to_bytes(16, "big") for i in range(3)]
    assert found["a.tar", "0"]["captions"] == ["caption 0", "more 0"]
    assert [found["a.tar", k]["reasons"] for k in "34"] == [["bad_uid"], ["bad_json"]]
    assert [manifest.weight("a.tar", k) for k in "01234"] == [1, 1, 1, 0, 0]


def test_two_samples_with_one_own_uid_stop_the_run(tmp_path: Path) -> None:
    same = json.dumps({"id": "0" * 32}).encode()
    write_tar(tmp_path / "in" / "a.tar", [m for i in range(2) for m in sample(f"{i}", encoded(picture(i)), json=same)])
    with pytest.raises(InputError, match=r"a\.tar: sample \d has uid 0{32}, which 2 samples give"):
        memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config.parse({"input": {"uid_field": "id"}}), workers=1)


def test_gzip_shards_are_filtered_as_gzip(tmp_path: Path) -> None:
    members = sample("1", encoded(picture(1)), "one") + sample("2", encoded(picture(1)), "two")
    write_tar(tmp_path / "in" / "a.tar.gz", members, "w:gz")
    memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    with tarfile.open(tmp_path / "out" / "shards" / "a.tar.gz", "r:gz") as tar:
        assert len(tar.getnames()) == 2


def test_shards_in_another_file_system_are_read(planted: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in planted.glob("*.tar"):
        memory.pipe(f"/bucket/run/{path.name}", path.read_bytes())
    manifest = memfilter.run(["memory://bucket/run/{00000..00003}.tar"], tmp_path / "out", workers=1)
    assert manifest.counts["read"] == 52
    assert manifest.shards == [f"{i:05}.tar" for i in range(4)]


def test_json_captions_of_another_meaning_are_no_fault(tmp_path: Path) -> None:
    fields = [b'{"captions": "one"}', b'{"captions": [{"text": "x"}]}', b"[1, 2]", b'{"captions": null}']
    members = [m for i, data in enumerate(fields) for m in sample(str(i), encoded(picture(i)), f"own {i}", json=data)]
    members += sample("4", encoded(picture(4)), "own 4", json=b'{"cut')
    write_tar(tmp_path / "in" / "a.tar", members)
    found = rows(memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1))
    assert [found["a.tar", str(i)]["action"] for i in range(5)] == ["keep"] * 4 + ["bad"]
    assert all(row["captions"] is None for row in found.values())


def test_shards_of_an_earlier_decision_go_when_none_are_wanted(planted: Path, tmp_path: Path) -> None:
    memfilter.run([str(planted)], tmp_path / "out", workers=1)
    none = Config.parse({"output": {"shards": False}})
    memfilter.run([str(planted)], tmp_path / "out", none, workers=1, update=True)
    assert not list((tmp_path / "out" / "shards").rglob("*.*"))


def test_a_decision_that_cannot_write_its_shards_leaves_the_run_as_it_was(planted: Path, tmp_path: Path) -> None:
    shutil.copytree(planted, tmp_path / "in")
    memfilter.run([str(tmp_path / "in")], tmp_path / "out", workers=1)
    before = tree(tmp_path / "out")
    (tmp_path / "in" / "00001.tar").rename(tmp_path / "moved.tar")
    (tmp_path / "new.yaml").write_text("policy: {image_duplicate: record}")
    with pytest.raises(
        ShardError,
        match=r"^00001\.tar: cannot be read: .*: bring the shard back, say with --inputs where",
    ):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "new.yaml", workers=1)
    after = tree(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert memfilter.verify(tmp_path / "out") == []
    (tmp_path / "moved.tar").rename(tmp_path / "in" / "00001.tar")
    memfilter.rethreshold(tmp_path / "out", tmp_path / "new.yaml", workers=1)
    assert memfilter.verify(tmp_path / "out") == []
    assert not (tmp_path / "out" / "next").exists()


def test_rethreshold_of_an_unfinished_run_says_so(finished: Manifest, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    (tmp_path / "out" / "signatures" / "00002.tar.parquet").unlink()
    with pytest.raises(RunError, match=r"the run is not finished, 00002\.tar was not read"):
        memfilter.rethreshold(tmp_path / "out")


# -- bad shards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_a_cut_shard(planted: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in planted.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00001.tar").write_bytes((planted / "00001.tar").read_bytes()[:20_000])
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cut_shard_stops_the_run_with_its_name(workers: int, with_a_cut_shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"^00001\.tar: ends inside a member at byte 20,000; ") as error:
        memfilter.run([str(with_a_cut_shard)], tmp_path / "out", workers=workers)
    assert "\n" not in str(error.value)


def test_a_cut_shard_can_be_skipped_and_is_named(with_a_cut_shard: Path, planted: Path, tmp_path: Path) -> None:
    config = Config.parse({"input": {"on_bad_shard": "skip"}})
    manifest = memfilter.run([str(with_a_cut_shard)], tmp_path / "out", config, workers=1)
    assert manifest.counts["read"] == 52 - 13
    assert "ends inside a member" in manifest.info["shards"][1]["skipped"]
    assert "00001.tar" not in manifest.shards
    assert not (tmp_path / "out" / "shards" / "00001.tar").exists()
    assert memfilter.verify(tmp_path / "out") == []
    (with_a_cut_shard / "00001.tar").write_bytes((planted / "00001.tar").read_bytes())
    mended = memfilter.run([str(with_a_cut_shard)], tmp_path / "out", config, workers=1)
    assert mended.counts["read"] == 52


# -- verify -----------------------------------------------------------------------------------------------------------


def flipped_bytes_that_pass(out: Path, places: int) -> list[tuple[str, int]]:
    """Flip bytes of every file in turn, and return those that `verify` does not see."""
    passed = []
    moments = random.Random(3)
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock"):
        data = path.read_bytes()
        for place in {0, len(data) - 1, *(moments.randrange(len(data)) for _ in range(places))}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << moments.randrange(8)]) + data[place + 1 :])
            try:
                problems = memfilter.verify(out)
            except RunError as e:
                problems = [str(e)]
            if not problems or any("\n" in p for p in problems):
                passed.append((path.relative_to(out).as_posix(), place))
        path.write_bytes(data)
    return passed


def test_verify_finds_a_flipped_byte_in_every_file(finished: Manifest) -> None:
    assert memfilter.verify(finished.path) == []
    assert flipped_bytes_that_pass(finished.path, 12) == []
    assert memfilter.verify(finished.path) == []


def test_verify_finds_a_file_that_is_gone(finished: Manifest) -> None:
    for path in sorted(p for p in finished.path.rglob("*") if p.is_file() and p.name not in (".lock", "run.json")):
        moved = path.rename(path.with_name("away"))
        try:
            problems = memfilter.verify(finished.path)
        except RunError as e:
            problems = [str(e)]
        moved.rename(path)
        assert problems, path


def test_a_run_goes_on_after_a_flipped_byte_or_says_what_to_do(
    finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    """Whatever is damaged, the same command makes it good again, or stops in one line that names the file."""
    moments = random.Random(4)
    names = [p.relative_to(finished.path) for p in sorted(finished.path.rglob("*")) if p.is_file()]
    for name in (n for n in names if n.name != ".lock" and n.parts[0] != "shards"):
        out = tmp_path / "out"
        shutil.copytree(finished.path, out)
        data = (out / name).read_bytes()
        place = moments.randrange(len(data))
        (out / name).write_bytes(data[:place] + bytes([data[place] ^ 1 << moments.randrange(8)]) + data[place + 1 :])
        try:
            memfilter.run([str(planted)], out, workers=1)
            answer = "the same bytes" if tree(out) == tree(finished.path) else "other bytes"
        except RunError as e:
            answer = str(e)
        assert answer == "the same bytes" or answer.startswith(f"{out / name}: "), (name, place)
        shutil.rmtree(out)


# -- the command line -------------------------------------------------------------------------------------------------


def test_command_line_runs_resumes_verifies_and_reconciles(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = memfilter_command("run", planted, "--out", out, "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "52 read = 42 kept + 0 masked + 6 dropped + 4 bad"
    assert "magnitude skipped: no model" in done.stdout
    done = memfilter_command("verify", out)
    assert (done.returncode, "sound" in done.stdout) == (0, True)
    (tmp_path / "new.yaml").write_text("policy: {image_duplicate: mask}")
    done = memfilter_command("rethreshold", out, "--config", tmp_path / "new.yaml")
    assert done.stdout.splitlines()[-1] == "52 read = 42 kept + 6 masked + 0 dropped + 4 bad"
    (out / "shards" / "00000.tar").unlink()
    done = memfilter_command("verify", out)
    assert done.returncode == 1
    assert "shards/00000.tar: missing" in done.stderr


def refusals(tmp_path: Path, planted: Path) -> dict[str, tuple[list[str | Path], str]]:
    empty, text, yaml_file = tmp_path / "empty", tmp_path / "in" / "text.tar", tmp_path / "bad.yaml"
    empty.mkdir()
    text.parent.mkdir()
    text.write_text("hello, I am no tar\n" * 100)
    yaml_file.write_text("images: {hash_radios: 4}")
    nothing = tmp_path / "in" / "nothing.tar"
    nothing.write_bytes(b"")
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.doc").write_text("mine")
    out = tmp_path / "out"
    return {
        "missing folder": ([tmp_path / "none", "--out", out], "none: no such file or folder"),
        "empty folder": ([empty, "--out", out], "empty: the folder holds no .tar"),
        "glob of nothing": ([tmp_path / "*.tgz", "--out", out], "*.tgz: the pattern matches no file"),
        "no tar": ([text, "--out", out], "text.tar: is not a tar"),
        "empty tar": ([nothing, "--out", out], "nothing.tar: is empty (0 bytes)"),
        "out in a searched folder": ([planted.parent, "--out", planted.parent / "out"], "lies in an input folder"),
        "out in a folder by URL": (
            [f"file://{planted}/00000.tar", "--out", planted / "out"],
            "lies in an input folder",
        ),
        "empty name": (["", "--out", out], "an empty name was given for a shard"),
        "out is a file": ([planted, "--out", yaml_file], "is a file; give a folder as --out"),
        "out in input": ([planted, "--out", planted / "out"], "lies in an input folder"),
        "out is another folder": ([planted, "--out", busy], "holds 'thesis.doc' and no memfilter run"),
        "unknown key": ([planted, "--out", out, "--config", yaml_file], "unknown key 'images.hash_radios'; the keys"),
        "no config": ([planted, "--out", out, "--config", tmp_path / "no.yaml"], "no.yaml: cannot be read"),
        "no pipeline": ([planted, "--out", out, "--model", empty], "no diffusers pipeline: it has no model_index.json"),
        "no model": ([planted, "--out", out, "--model", "./nope"], "nope: no such folder"),
        "pipe": (["pipe:cat x.tar", "--out", out], "set input.allow_pipe: true"),
    }


def test_bad_input_is_one_clear_line_and_exit_code_1(tmp_path: Path, planted: Path) -> None:
    from memfilter.cli import main

    for name, (arguments, message) in refusals(tmp_path, planted).items():
        error = io.StringIO()
        stderr, sys.stderr = sys.stderr, error
        try:
            with pytest.raises(SystemExit) as exit:
                main(["run", *map(str, arguments), "--workers", "1"])
        finally:
            sys.stderr = stderr
        assert exit.value.code == 1, name
        assert message in error.getvalue(), name
        assert error.getvalue().count("\n") == 1, name


def test_a_model_that_is_neither_here_nor_on_the_hub_is_one_line(planted: Path, tmp_path: Path) -> None:
    done = memfilter_command("run", planted, "--out", tmp_path / "out", "--model", "nobody-at-all/no-such-model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("memfilter: nobody-at-all/no-such-model: neither a folder here nor")
    assert done.stderr.count("\n") == 1


def test_usage_errors_exit_with_2() -> None:
    assert memfilter_command("run").returncode == 2
    assert memfilter_command("run", "x", "--out", "y", "--workers", "0").returncode == 2
    assert memfilter_command("nonsense").returncode == 2


def test_a_second_run_in_one_directory_is_refused(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = memfilter_command("run", planted, "--out", out)
    assert done.returncode == 1
    assert "another run is using this directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_directory_of_another_version_is_refused(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="was written in format 99"):
        memfilter.run([str(planted)], tmp_path / "out")


@pytest.mark.parametrize(("workers", "after"), [("1", 0.5), ("2", 0.05), ("2", 0.3)])
def test_ctrl_c_is_one_line_and_the_run_can_continue(
    workers: str, after: float, finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "memfilter", "run", str(planted), "--out", str(out), "--workers", workers]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (out / "run.json").exists():
        time.sleep(0.01)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "memfilter: interrupted; run the same command again to continue"
    subprocess.run(command, check=True, capture_output=True)
    assert tree(out) == tree(finished.path)


def test_an_interrupt_inside_an_exec_of_text_ends_with_its_own_code(tmp_path: Path) -> None:
    probe = "exec('raise KeyboardInterrupt')"
    (tmp_path / "probe.py").write_text(
        f"from memfilter import cli\ncli.cli.command('probe')(lambda: {probe})\ncli.main(['probe'])\n"
    )
    done = subprocess.run([sys.executable, "-m", "probe"], cwd=tmp_path, capture_output=True, text=True)
    interrupted = "memfilter: interrupted; run the same command again to continue"
    assert (done.returncode, done.stderr.strip()) == (130, interrupted)


def test_a_killed_worker_is_reported_with_its_shard_which_another_reads(
    finished: Manifest, planted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "memfilter", "run", str(planted), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    workers: list[Any] = []
    while not workers:
        time.sleep(0.05)
        workers = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    workers[0].kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.fullmatch(r"memfilter\.executors: 0000[0-3]\.tar: its worker died \(killed by SIGKILL.*\n", error)
    assert tree(out) == tree(finished.path)


def test_a_shard_that_takes_too_much_memory_stops_the_run_with_its_name(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "tight.yaml").write_text("input: {max_memory: 100000000}")
    config = tmp_path / "tight.yaml"
    done = memfilter_command("run", planted / "00000.tar", "--out", tmp_path / "out", "--config", config)
    assert done.returncode == 1
    *_, error = done.stderr.splitlines()
    assert error.startswith("memfilter: 00000.tar: its worker died twice (it held ")
