"""A finished run: what changes it, what is refused before anything is touched, and kills and full disks in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import encoded, picture, sample, words, write_tar
from test_faults import fill, small_disk  # noqa: F401  the fixture
from test_run import memfilter_command, tree

import memfilter
from memfilter import Config, ConfigError, Manifest, RunError, ShardError
from memfilter.records import Shard
from memfilter.signatures import instruction_set, made_by, recorded, signature_digest
from memfilter.store import file_digest, read_digest, read_note, read_table, write_sealed, write_table

PLAIN: dict[str, Any] = {"images": {"encoder": None}, "captions": {"tiers": ["exact"]}}
"""Quick to decide by: what is tried here is what becomes of files."""


def config(**sections: Any) -> Config:
    return Config.parse({**PLAIN, **sections})


def make_shards(folder: Path, shards: int = 4, samples: int = 6) -> Path:
    """Write shards of pictures; two samples of each repeat pictures of the shard before, larger and smaller."""
    for s in range(shards):
        members = []
        for i in range(samples):
            repeats = i < 2 and s
            seed = samples * (s - 1) + 2 + i if repeats else samples * s + i
            size = (120, 100) if repeats and i else (90, 75) if repeats else (100, 84)
            members += sample(f"{i:02}", encoded(picture(seed, *size)), words(samples * s + i), json=b"{}")
        write_tar(folder / ("a" if s < 2 else "b") / f"{s:05}.tar", members)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("input") / "in")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    manifest = memfilter.run([str(shards)], out, config(), workers=1)
    assert manifest.counts == {"read": 24, "keep": 18, "mask": 0, "drop": 6, "bad": 0}
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Input and run of one's own."""
    folder = Path(shutil.copytree(shards, tmp_path / "in"))
    memfilter.run([str(folder)], tmp_path / "out", config(), workers=1)
    return folder, tmp_path / "out"


def file_of(tmp_path: Path, **sections: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def standing(out: Path) -> dict[str, str]:
    """Digests of all files of the run itself, without what a refused decision left beside them."""
    return {name: digest for name, digest in tree(out).items() if not name.startswith("next/")}


RECORD: dict[str, Any] = {"policy": {"image_duplicate": "record"}}
MASK: dict[str, Any] = {"policy": {"image_duplicate": "mask"}}
LESS: dict[str, Any] = {"policy": {"image_duplicate": "mask", "caption_duplicate": "drop"}}


# -- inputs that are gone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gone", "other bytes", "other size"])
def test_a_decision_that_needs_inputs_that_are_gone_is_refused_with_their_names(
    fault: str, own: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own
    before = standing(out)
    for name in ("a/00001.tar", "b/00002.tar"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if fault != "gone":
            (folder / name).write_bytes(data[:-1] + b"x" + (b"" if fault == "other bytes" else bytes(512)))
    with pytest.raises(ShardError, match=r"^a/00001\.tar, b/00002\.tar: cannot be read: .*nothing was changed$"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    assert standing(out) == before
    assert memfilter.verify(out) == []
    assert Manifest.load(out).counts["drop"] == 6
    memfilter.rethreshold(out, file_of(tmp_path, policy={"image_duplicate": "drop"}), workers=1)
    assert tree(out) == before


def test_a_touched_input_of_the_same_bytes_is_used(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    os.utime(folder / "a" / "00001.tar", (5, 5))
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**RECORD), workers=1)
    assert {n: d for n, d in tree(out).items() if n != "run.json"} == {
        n: d for n, d in tree(tmp_path / "fresh").items() if n != "run.json"
    }


def test_what_only_removes_or_masks_is_made_from_the_filtered_shards(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    wide = {"images": {"encoder": None, "hash_radius": 16}}
    for change in (MASK, {"policy": {"image_duplicate": "record"}, **wide}, {"policy": {"image_duplicate": "drop"}}):
        memfilter.rethreshold(out, file_of(tmp_path, **change), workers=1)
        if change is MASK:
            folder.rename(tmp_path / "away")
            memfilter.rethreshold(out, file_of(tmp_path, policy={"image_duplicate": "record"}), workers=1)
    assert memfilter.verify(out) == []
    (tmp_path / "away").rename(folder)
    fresh = config(images=wide["images"], policy={"image_duplicate": "drop"})
    memfilter.run([str(folder)], tmp_path / "fresh", fresh, workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_filtered_shard_that_is_damaged_is_no_source(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    tar = out / "shards" / "b" / "00002.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-1] + b"x")
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)  # adds to it: it is made of the input
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"x")
    folder.rename(tmp_path / "away")
    drop = file_of(tmp_path, policy={"image_duplicate": "drop"})
    with pytest.raises(ShardError, match=r"^b/00002\.tar: cannot be read: .*nothing was changed$"):
        memfilter.rethreshold(out, drop, workers=1)
    tar.write_bytes(whole)
    memfilter.rethreshold(out, drop, workers=1)
    assert tar.read_bytes() == data


def test_filtered_shards_that_nothing_could_make_again_stay_when_none_are_wanted(
    own: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = own
    shutil.rmtree(folder / "b")
    memfilter.rethreshold(out, file_of(tmp_path, output={"shards": False}), workers=1)
    left = sorted(p.relative_to(out / "shards").as_posix() for p in (out / "shards").rglob("*.*"))
    names = [f"b/0000{i}{end}" for i in (2, 3) for end in (".tar", "_stats.json")]
    assert left == sorted([*names, "b/sizes.json"])
    assert "b/00002.tar, b/00003.tar: not meant any more, and kept" in caplog.text
    assert memfilter.verify(out) == []


def test_generalise_refuses_before_it_touches_anything_too(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    before = standing(out)
    shutil.rmtree(folder)
    with pytest.raises(ShardError, match=r"^a/00000\.tar, .*: cannot be read"):
        memfilter.generalise(out, file_of(tmp_path, **RECORD), workers=1)
    assert {name: digest for name, digest in standing(out).items() if not name.endswith(".jsonl")} == before
    manifest = memfilter.generalise(out, settings={"joint_count": 1}, workers=1)
    assert manifest.info["generalised"]["flagged_samples"] == 18
    assert memfilter.verify(out) == []


def test_a_failure_in_the_middle_of_deciding_costs_nothing_of_what_stood(run: Path, tmp_path: Path) -> None:
    before = standing(run)
    wrong = {"captions": {"tiers": ["exact", "near"]}, "images": {"encoder": None, "hash_radius": 12}}
    wrong["magnitude"] = {"model": "nobody/nothing"}
    with pytest.raises(memfilter.MemfilterError):
        memfilter.rethreshold(run, file_of(tmp_path, **wrong), workers=1)
    killed(run, file_of(tmp_path, **MASK), "manifest/parts/b/00002.tar.parquet")
    (run / "next" / "edges").mkdir(exist_ok=True)
    (run / "next" / "edges" / "hash.parquet").write_bytes(b"half")  # as a crash of the machine leaves it
    assert standing(run) == before
    memfilter.rethreshold(run, workers=1)
    assert tree(run) == before


# -- nothing by accident ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policy": {"image_duplicate": "mask"}}, r"policy\.image_duplicate drop → mask"),
        ({"images": {"encoder": None, "hash": "dhash"}}, r"images\.hash phash → dhash"),
        ({"output": {"shards": False}}, r"output\.shards True → False"),
        ({"input": {"on_bad_shard": "skip"}}, r"input\.on_bad_shard stop → skip"),
    ],
    ids=str,
)
def test_another_configuration_of_a_finished_run_needs_update(
    change: dict[str, Any], told: str, run: Path, shards: Path
) -> None:
    before = standing(run)
    with pytest.raises(RunError, match=rf"is finished, and this is another run \({told}\); give --update"):
        memfilter.run([str(shards)], run, config(**change), workers=1)
    assert standing(run) == before
    memfilter.run([str(shards)], run, config(**change), workers=1, update=True)
    assert memfilter.verify(run) == []
    fresh = run.parent / "fresh"
    memfilter.run([str(shards)], fresh, config(**change), workers=1)
    # what is left of the signatures' sake of an earlier encoder or hash is no file of the manifest
    assert standing(run).keys() >= standing(fresh).keys()
    assert {n: d for n, d in standing(run).items() if n in standing(fresh)} == standing(fresh)


def test_a_run_without_its_configuration_does_not_undo_a_rethreshold(run: Path, shards: Path, tmp_path: Path) -> None:
    memfilter.rethreshold(run, file_of(tmp_path, **MASK), workers=1)
    before = standing(run)
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(PLAIN))
    done = memfilter_command("run", shards, "--out", run, "--config", tmp_path / "first.yaml", "--workers", "1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "policy.image_duplicate mask → drop" in done.stderr
    assert standing(run) == before
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({**PLAIN, **MASK}))
    done = memfilter_command("run", shards, "--out", run, "--config", tmp_path / "first.yaml", "--workers", "1")
    assert done.returncode == 0
    assert "→" not in done.stdout
    assert standing(run) == before


def test_what_decides_nothing_may_differ(run: Path, shards: Path) -> None:
    before = standing(run)
    limits = {"input": {"timeout": 5.0, "max_memory": 2**40}, "generalise": {"joint_count": 7}}
    memfilter.run([str(shards)], run, config(**limits), workers=2)
    after = standing(run)
    assert {n for n in before if before[n] != after.get(n)} <= {"run.json"}
    assert json.loads((run / "run.json").read_text())["config"]["generalise"]["joint_count"] == 2


def test_another_list_of_shards_needs_update_and_is_told(own: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own
    before = standing(out)
    with pytest.raises(RunError, match=r"\(shards fewer: b/00002\.tar, b/00003\.tar\); give --update"):
        memfilter.run([f"{folder}/a"], out, config(input={"root": str(folder)}), workers=1)
    write_tar(folder / "a" / "more.tar", sample("0", encoded(picture(99)), "one more"))
    with pytest.raises(RunError, match=r"\(shards more: a/more\.tar\)"):
        memfilter.run([str(folder)], out, config(), workers=1)
    assert standing(out) == before
    memfilter.run([str(folder)], out, config(), workers=1, update=True)
    memfilter.run([str(folder)], tmp_path / "fresh", config(), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_with_fewer_shards_a_filtered_one_goes_while_its_input_stands_and_stays_otherwise(
    own: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = own
    (folder / "b" / "00003.tar").unlink()
    manifest = memfilter.run([f"{folder}/a"], out, config(), workers=1, update=True)
    assert manifest.shards == ["a/00000.tar", "a/00001.tar"]
    left = sorted(p.relative_to(out / "shards").as_posix() for p in (out / "shards").rglob("*.tar"))
    assert left == ["a/00000.tar", "a/00001.tar", "b/00003.tar"]
    assert "b/00003.tar: not meant any more, and kept: the input is gone" in caplog.text
    assert not (out / "manifest" / "parts" / "b" / "00002.tar.parquet").exists()
    assert memfilter.verify(out) == []
    memfilter.run([f"{folder}/a"], out, config(), workers=1)  # and is not this run's any more
    assert (out / "shards" / "b" / "00003.tar").exists()


def test_a_model_that_was_not_there_before_needs_update(run: Path, shards: Path) -> None:
    from memfilter.demo.memorized import MODEL

    with pytest.raises(RunError, match=r"\(the model none → model\); give --update"):
        memfilter.run([str(shards)], run, config(magnitude={"model": str(MODEL)}), workers=1)
    assert memfilter.verify(run) == []


def test_a_shard_of_other_bytes_is_read_again_and_told(
    own: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = own
    write_tar(folder / "b" / "00003.tar", sample("00", encoded(picture(77)), "another"))
    memfilter.run([str(folder)], out, config(), workers=1)
    assert "b/00003.tar: changed since it was read, and read again" in caplog.text
    memfilter.run([str(folder)], tmp_path / "fresh", config(), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_what_was_and_what_is_are_printed(run: Path, tmp_path: Path) -> None:
    done = memfilter_command("rethreshold", run, "--config", file_of(tmp_path, **MASK), "--workers", "1")
    was, reasons, *_ = done.stdout.splitlines()
    assert was == "was → is  read 24 → 24, keep 18 → 18, mask 0 → 6, drop 6 → 0"
    assert reasons.startswith("reasons   ")
    assert "hash_duplicate 6 → 6" in reasons
    done = memfilter_command("rethreshold", run, "--config", file_of(tmp_path, **MASK), "--workers", "1")
    assert "→" not in done.stdout
    done = memfilter_command("generalise", run, "--config", file_of(tmp_path, policy={"image_duplicate": "drop"}))
    assert done.stdout.startswith("was → is  read 24 → 24, keep 18 → 18, mask 6 → 0, drop 0 → 6\n")


# -- files of others --------------------------------------------------------------------------------------------------


def test_what_the_run_did_not_write_stays(own: tuple[Path, Path], finished: Path, tmp_path: Path) -> None:
    folder, out = own
    stranger = Path(shutil.copytree(folder, tmp_path / "stranger"))
    memfilter.run([str(stranger)], tmp_path / "other", config(**MASK), workers=1)
    foreign = {
        "shards/mine.tar": b"mine",
        "shards/mine_stats.json": b'{"count": 3, "successes": 3}',
        "shards/c/sizes.json": b'{"mine.tar": 3}',
        "shards/c/mine.tar": b"mine",
        # of another run, with a marker like ours
        "shards/c/00009.tar": (tmp_path / "other" / "shards" / "b" / "00002.tar").read_bytes(),
        "shards/c/00009_stats.json": (tmp_path / "other" / "shards" / "b" / "00002_stats.json").read_bytes(),
        "manifest/parts/mine.parquet": b"mine",
        "manifest/notes.txt": b"mine",
        "edges/embedding-notes/mine.txt": b"mine",
        "edges/caption-notes": b"mine",
        ".draft.tmp": b"mine",
        "shards/.00000.tar.5.tmp": b"mine",
    }
    for name, data in foreign.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    memfilter.rethreshold(out, file_of(tmp_path, **MASK), workers=1)
    memfilter.run([f"{folder}/a"], out, config(), workers=1, update=True)
    memfilter.rethreshold(out, file_of(tmp_path, output={"shards": False}), workers=1)
    assert {name: (out / name).read_bytes() for name in foreign} == foreign
    assert not list((out / "shards").rglob("0000[0-3].tar"))


@pytest.mark.parametrize("what", ["file", "folder", "run", "link"])
def test_what_lies_where_decisions_are_made_is_not_removed_with_one(
    what: str, run: Path, finished: Path, tmp_path: Path
) -> None:
    following = run / "next"
    if what == "file":
        following.write_bytes(b"mine")
    elif what == "folder":
        following.mkdir()
        (following / "mine.txt").write_bytes(b"mine")
    elif what == "run":  # `--out run/next`
        shutil.copytree(finished, following)
    else:
        following.symlink_to(shutil.copytree(finished, tmp_path / "elsewhere"))
    before = tree(run)
    for _ in range(2):
        with pytest.raises(RunError, match=r"out/next: in the way, and not written by this run .*; move it away"):
            memfilter.rethreshold(run, file_of(tmp_path, **MASK), workers=1)
    assert tree(run) == before
    following.rename(tmp_path / "moved")
    following.mkdir()
    memfilter.rethreshold(run, file_of(tmp_path, **MASK), workers=1)
    assert not following.exists()


@pytest.mark.parametrize("name", ["../../victim.tar", "/tmp/victim.tar", "a/../../../victim.tar"])
def test_a_stored_shard_that_lies_outside_of_the_run_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "victim.tar", tmp_path / "victim_stats.json"):
        file.write_text('{"kept": "mine"}')
    stored = json.loads((run / "run.json").read_text())
    del stored["digest"]
    write_sealed(run / "run.json", {**stored, "shards": [*stored["shards"], [name, name, 1, "1"]]})
    before = tree(tmp_path)
    with pytest.raises(RunError, match=r"its run\.json names the shard '.*victim\.tar', which lies outside"):
        memfilter.rethreshold(run, workers=1)
    assert {n: d for n, d in tree(tmp_path).items() if not n.endswith(".lock")} == before


def test_a_foreign_shard_in_the_way_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    for file in (run / "shards" / "a").glob("00000*"):
        file.unlink()
    (run / "shards" / "a" / "00000.tar").write_bytes(b"mine")
    (run / "shards" / "a" / "00000_stats.json").write_text('{"count": 3, "successes": 3}')
    before = standing(run)
    with pytest.raises(RunError, match=r"shards: a/00000\.tar: in the way, and not written by this run"):
        memfilter.rethreshold(run, file_of(tmp_path, **RECORD), workers=1)
    assert standing(run) == before


def test_markers_of_versions_whose_manifests_do_not_tell_of_them_are_known_by_the_parts(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own
    info = json.loads((out / "manifest" / "manifest.json").read_text())
    del info["digest"]
    for shard in info["shards"]:
        del shard["filtered"]
    write_sealed(out / "manifest" / "manifest.json", info)
    memfilter.run([f"{folder}/a"], out, config(**MASK), workers=1, update=True)
    assert sorted(p.name for p in (out / "shards").rglob("*.tar")) == ["00000.tar", "00001.tar"]
    assert memfilter.verify(out) == []


# -- in the middle of another decision --------------------------------------------------------------------------------

KILLED = """
import signal, sys
import memfilter

def hook(event, details):
    if event == "os.rename" and str(details[1]).endswith({at!r}):
        signal.raise_signal(signal.SIGKILL)

sys.addaudithook(hook)
memfilter.rethreshold({out!r}, {config!r}, workers=1)
"""


def killed(out: Path, config: Path, at: str = ".tar") -> None:
    """Decide a run again, and be killed before the first file whose name ends so is put in its place."""
    script = KILLED.format(at=at, out=str(out), config=str(config))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_run_that_is_half_decided_again_says_so_and_is_finished_by_the_same_command(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own
    opened = Manifest.load(out)
    opened.weight("a/00000.tar", "00")
    wanted = file_of(tmp_path, **RECORD)
    killed(out, wanted)
    says = rf"is being decided again, .* finish it with 'memfilter rethreshold {out}'"
    for ask in (Manifest.load, memfilter.verify):
        with pytest.raises(RunError, match=says):
            ask(out)
    with pytest.raises(RunError, match="is being decided again"):
        opened.weight("a/00001.tar", "00")
    done = memfilter_command("verify", out)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    with pytest.raises(RunError, match=r"is finished, and this is another run \(policy\.image_duplicate record → drop"):
        memfilter.run([str(folder)], out, config(), workers=1)
    memfilter.rethreshold(out, workers=1)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**RECORD), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("at", [".tar", "lookup.arrow", "run.json"])
def test_a_run_that_is_half_decided_again_may_be_decided_otherwise(at: str, run: Path, tmp_path: Path) -> None:
    before = tree(run)
    killed(run, file_of(tmp_path, **RECORD), at)
    memfilter.rethreshold(run, file_of(tmp_path, policy={"image_duplicate": "drop"}), workers=1)
    assert tree(run) == before


def test_what_was_being_made_from_the_filtered_shards_goes_on_without_the_inputs(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    memfilter.run([str(folder)], tmp_path / "fresh", config(), workers=1)
    folder.rename(tmp_path / "away")
    wanted = file_of(tmp_path, policy={"image_duplicate": "drop"})
    for name in ("a/00001.tar", "b/00003.tar"):
        killed(out, wanted, name)
    (out / "manifest" / "journal.json").write_text("{half")
    with pytest.raises(RunError, match="is being decided again"):
        Manifest.load(out)
    memfilter.rethreshold(out, wanted, workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_killed_update_is_finished_by_the_same_and_other_signatures_are_not_mixed_in(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own
    dhash = {"images": {"encoder": None, "hash": "dhash"}}
    script = KILLED.replace("memfilter.rethreshold({out!r}, {config!r}, workers=1)", "{call}")
    call = f"memfilter.run([{str(folder)!r}], {str(out)!r}, memfilter.Config.load({{!r}}), workers=1, update=True)"
    (tmp_path / "dhash.yaml").write_text(yaml.safe_dump({**PLAIN, **dhash}))
    call = call.format(str(tmp_path / "dhash.yaml"))
    before = standing(out)
    done = subprocess.run([sys.executable, "-c", script.format(at="b/00002.tar.parquet", call=call)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert standing(out) == before
    assert memfilter.verify(out) == []
    memfilter.rethreshold(out, file_of(tmp_path, **MASK), workers=1)
    memfilter.run([str(folder)], tmp_path / "masked", config(**MASK), workers=1)
    assert tree(out) == tree(tmp_path / "masked")
    for at in ("b/00002.tar.parquet", "b/00002.tar", "b/00003.tar.parquet"):
        subprocess.run([sys.executable, "-c", script.format(at=at, call=call)], check=False)
    with pytest.raises(RunError, match=r"being decided again, .* finish it with the same command"):
        Manifest.load(out)
    memfilter.run([str(folder)], out, config(**dhash), workers=1, update=True)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**dhash), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


# -- full disks -------------------------------------------------------------------------------------------------------


def state_of(out: Path, before: dict[str, str]) -> str:
    """Return "whole" where a run stands as before to the byte, and else what opening it says."""
    try:
        Manifest.load(out)
    except RunError as e:
        return str(e)
    return "whole" if standing(out) == before and memfilter.verify(out) == [] else "other bytes"


@pytest.mark.parametrize("how", ["rethreshold", "update"])
def test_a_full_disk_at_any_step_leaves_the_run_as_it_was_or_says_so_and_the_same_call_ends_it(
    how: str,
    small_disk: Path,  # noqa: F811
    finished: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    wanted = file_of(tmp_path, **RECORD)
    dhash = config(images={"encoder": None, "hash": "dhash"}, **RECORD)

    def call(out: Path) -> None:
        if how == "rethreshold":
            memfilter.rethreshold(out, wanted, workers=1)
        else:
            memfilter.run([f"{shards}/a"], out, dhash, workers=1, update=True)

    expected = Path(shutil.copytree(finished, tmp_path / "expected"))
    call(expected)
    before, answers = standing(finished), []
    for pages in [*range(0, 40, 3), *range(40, 110, 10)]:
        out = Path(shutil.copytree(finished, small_disk / "out"))
        filler = fill(small_disk, but=pages * 4096)
        try:
            call(out)
            answers.append("done")
        except OSError as e:
            answers.append(state_of(out, before) if e.errno == errno.ENOSPC else str(e))
        filler.unlink()
        call(out)
        assert tree(out) == tree(expected), pages
        shutil.rmtree(out)
    under_way = {answer for answer in answers if "is being decided again" in answer}
    assert {*answers} == {"whole", "done", *under_way}, answers


def test_a_shard_that_cannot_be_written_stops_the_decision_half_way_and_the_same_call_ends_it(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for seed, (name, size) in enumerate({"0": (90, 75), "1": (600, 500)}.items()):
        image = encoded(picture(seed, *size), quality=99)
        write_tar(folder / f"{name}.tar", [m for i in range(6) for m in sample(f"{i}", image, words(i))])
    memfilter.run([str(folder)], out, config(), workers=1)
    small, large = (out / "shards" / f"{name}.tar" for name in "01")
    before = [small.read_bytes(), large.read_bytes()]
    file_of(tmp_path, **RECORD)
    command = f"ulimit -f 300; exec {sys.executable} -m memfilter rethreshold {out} --config {tmp_path / 'config.yaml'}"
    done = subprocess.run(["bash", "-c", command + " --workers 1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "File too large; run the same command again after mending" in done.stderr
    assert "is being decided again" in state_of(out, {})
    assert [small.read_bytes() == before[0], large.read_bytes() == before[1]] == [False, True]
    memfilter.rethreshold(out, tmp_path / "config.yaml", workers=1)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**RECORD), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_shards_that_grow_need_room_before_the_first_is_replaced(
    small_disk: Path,  # noqa: F811
    shards: Path,
    tmp_path: Path,
) -> None:
    members = [m for i in range(9) for m in sample(f"{i}", encoded(picture(1, 500, 400), quality=99), words(i))]
    write_tar(tmp_path / "in" / "0.tar", members)
    memfilter.run([str(tmp_path / "in")], small_disk / "out", config(), workers=1)
    before = standing(small_disk / "out")
    filler = fill(small_disk, but=250_000)
    done = memfilter_command("rethreshold", small_disk / "out", "--config", file_of(tmp_path, **RECORD))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device: the filtered shards need about" in done.stderr
    assert "are free; nothing was changed; run the same command again after mending" in done.stderr
    assert standing(small_disk / "out") == before
    assert memfilter.verify(small_disk / "out") == []
    filler.unlink()
    assert memfilter.rethreshold(small_disk / "out", tmp_path / "config.yaml", workers=1).counts["keep"] == 9


def test_the_room_that_counts_is_that_of_the_filtered_shards(
    small_disk: Path,  # noqa: F811
    own: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    _, out = own
    (out / "shards").rename(tmp_path / "shards")
    (out / "shards").symlink_to(shutil.copytree(tmp_path / "shards", small_disk / "shards"))
    before = standing(out)
    filler = fill(small_disk, but=4096)
    with pytest.raises(OSError, match=r"the filtered shards need about .* are free; nothing was changed"):
        memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1, trust=True)
    filler.unlink()
    assert standing(out) == before
    assert memfilter.verify(out) == []
    memfilter.rethreshold(out, tmp_path / "config.yaml", workers=1, trust=True)
    assert memfilter.verify(out) == []


# -- what signatures were made by -------------------------------------------------------------------------------------


def other_instructions() -> dict[str, str]:
    """The environment of a process that takes a lower class of instructions; skips where the processor has none."""
    lower = {"avx512": "AVX2", "avx2": "SSE41"}.get(instruction_set())
    if lower is None:
        pytest.skip("this processor has one class of instructions")
    return {**os.environ, "ONEDNN_MAX_CPU_ISA": lower}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Input and run of a machine of another class, with the built-in encoder, and the name of the class."""
    environment = other_instructions()
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("0", "1"):
        members = [m for i in range(5) for m in sample(f"{i}", encoded(picture(i + 3 * int(name))), words(i))]
        write_tar(folder / "in" / f"{name}.tar", members)
    command = [sys.executable, "-m", "memfilter", "run", str(folder / "in"), "--out", str(folder / "out")]
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True, env=environment)
    return folder / "in", folder / "out", environment["ONEDNN_MAX_CPU_ISA"].lower()


@pytest.fixture
def brought(elsewhere: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    folder, out, _ = elsewhere
    return folder, Path(shutil.copytree(out, tmp_path / "out"))


def instructions_of(out: Path) -> set[str]:
    return {recorded(path)["instructions"] for path in (out / "signatures").rglob("*.parquet")}


def test_a_digest_names_what_shapes_the_numbers() -> None:
    shard, plain, encoding = Shard("0.tar", "0.tar", 1), config(), Config()
    assert {"torch", "instructions", "encoder"} <= made_by(encoding).keys()
    assert not {"torch", "instructions", "encoder"} & made_by(plain).keys()  # hashes do not depend on them
    assert os.uname().nodename not in str(made_by(encoding))
    for settings in (plain, encoding):
        by = made_by(settings)
        digests = {signature_digest(shard, "content", settings, {**by, name: "another"}) for name in by}
        assert len({signature_digest(shard, "content", settings), *digests}) == 1 + len(by)


def test_the_class_of_instructions_is_one_where_embeddings_differ(
    elsewhere: tuple[Path, Path, str], tmp_path: Path
) -> None:
    folder, out, lower = elsewhere
    here = memfilter.run([str(folder)], tmp_path / "here", workers=1)
    there = Manifest.load(out)
    assert (there.info["instruction_set"], here.info["instruction_set"]) == (lower, instruction_set())
    tables = [pq.read_table(run / "signatures" / "0.tar.parquet") for run in (out, here.path)]
    assert not tables[0]["embedding"].equals(tables[1]["embedding"])
    assert tables[0].drop_columns("embedding").equals(tables[1].drop_columns("embedding"))


def test_a_run_from_elsewhere_is_decided_by_its_parts_as_they_are(
    elsewhere: tuple[Path, Path, str], brought: tuple[Path, Path], tmp_path: Path
) -> None:
    out = brought[1]
    signed = {p.name: p.read_bytes() for p in (out / "signatures").rglob("*.parquet")}
    assert memfilter.verify(out) == []
    memfilter.rethreshold(out, file_of(tmp_path, **RECORD), workers=1)
    manifest = memfilter.generalise(out, settings={"image_count": 2}, workers=1)
    assert memfilter.verify(out) == []
    assert signed == {p.name: p.read_bytes() for p in (out / "signatures").rglob("*.parquet")}
    assert manifest.info["instruction_set"] == elsewhere[2]
    assert manifest.info["versions"]["torch"] == made_by(Config())["torch"]


def test_run_says_what_differs_and_signs_again_only_with_update(
    elsewhere: tuple[Path, Path, str], brought: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = brought
    before, lower = standing(out), elsewhere[2]
    memfilter.run([str(folder)], out, workers=1)
    told = f"its signatures stay as they were made, --update makes them again (instructions {lower} → "
    assert told in caplog.text
    assert standing(out) == before
    memfilter.run([str(folder)], out, workers=1, update=True)
    assert instructions_of(out) == {instruction_set()}
    memfilter.run([str(folder)], tmp_path / "fresh", workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_unlike_parts_are_not_mixed(brought: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(brought[0], tmp_path / "in")), brought[1]
    stored = json.loads((out / "run.json").read_text())
    del stored["digest"]
    shards = [[n, str(folder / n), size, str((folder / n).stat().st_mtime_ns)] for n, _, size, _ in stored["shards"]]
    write_sealed(out / "run.json", {**stored, "root": str(folder), "shards": shards})
    before = standing(out)
    write_tar(folder / "1.tar", sample("0", encoded(picture(50)), "another"))
    with pytest.raises(RunError, match=r"1\.tar: to be read again, and its signatures would not be like the others"):
        memfilter.run([str(folder)], out, workers=1)
    assert standing(out) == before
    memfilter.run([str(folder)], tmp_path / "here", workers=1)
    shutil.copy(tmp_path / "here" / "signatures" / "1.tar.parquet", out / "signatures" / "1.tar.parquet")
    made = r"the signatures of 0\.tar were made otherwise than those of 1\.tar \(instructions \w+ → \w+\)"
    with pytest.raises(RunError, match=made):
        memfilter.rethreshold(out, workers=1)
    info = json.loads((out / "manifest" / "manifest.json").read_text())
    del info["digest"]
    info["files"]["signatures/1.tar.parquet"] = file_digest(out / "signatures" / "1.tar.parquet")
    write_sealed(out / "manifest" / "manifest.json", info)
    assert any("made otherwise" in problem for problem in memfilter.verify(out))
    memfilter.run([str(folder)], out, workers=1, update=True)
    assert tree(out) == tree(tmp_path / "here")


def test_signatures_of_a_version_that_did_not_record_it_are_taken_as_they_are(
    own: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = own
    for path in (out / "signatures").rglob("*.parquet"):
        note = read_note(path)
        del note["by"]
        write_table(path, read_table(path), read_digest(path), note)
    memfilter.rethreshold(out, file_of(tmp_path, **MASK), workers=1)
    assert memfilter.verify(out) == []
    assert Manifest.load(out).info["versions"]["pillow"]
    memfilter.run([str(folder)], out, config(**MASK), workers=1)
    assert "signatures an earlier version of memfilter → signatures-6" in caplog.text
    with pytest.raises(ConfigError, match=r"a/00000\.tar has no signatures .* need 'memfilter run' with --update"):
        memfilter.rethreshold(out, file_of(tmp_path, images={"hash": "dhash"}), workers=1)
    memfilter.run([str(folder)], out, config(**MASK), workers=1, update=True)
    memfilter.run([str(folder)], tmp_path / "fresh", config(**MASK), workers=1)
    assert tree(out) == tree(tmp_path / "fresh")
