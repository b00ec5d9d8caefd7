"""A full disk, a place that cannot be written, and runs killed at every commit point: one line, then the same bytes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import encoded, picture, sample, write_tar
from test_run import memfilter_command, tree

import memfilter

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "data"
    for shard in range(3):
        members = []
        for i in range(20):
            image = encoded(picture(20 * shard + i if i else 0, 200, 150))
            members += sample(f"{i:03}", image, f"picture {i} of shard {shard}")
        write_tar(folder / f"{shard:05}.tar", members)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    memfilter.run([str(data)], out, workers=1)
    return out


def can_mount() -> bool:
    return os.getuid() == 0 and mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt") and unmount("/mnt")


def mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


def unmount(place: str | Path) -> bool:
    # lazily: the lookup file may still be mapped
    return subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 4 MiB."""
    if not can_mount():
        pytest.skip("this machine lets nobody mount a file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    assert mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", disk)
    yield disk
    unmount(disk)


def fill(disk: Path, but: int) -> Path:
    """Fill a disk but for so many bytes, and return the file that fills it."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - but, 0)))
    return filler


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95])
def test_a_full_disk_stops_the_run_wherever_it_is_and_the_same_call_ends_it(
    share: float, small_disk: Path, data: Path, undisturbed: Path
) -> None:
    pages = sum(-(-p.stat().st_size // 4096) for p in undisturbed.rglob("*") if p.is_file())
    filler = fill(small_disk, but=int(share * pages) * 4096)
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        memfilter.run([str(data)], small_disk / "out", workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert not (small_disk / "out" / "manifest" / "manifest.json").exists()
    filler.unlink()
    memfilter.run([str(data)], small_disk / "out", workers=1)
    assert tree(small_disk / "out") == tree(undisturbed)


def test_a_full_disk_is_one_line(small_disk: Path, data: Path) -> None:
    fill(small_disk, but=40 * 1024)
    for workers in ("1", "2"):
        done = memfilter_command("run", data, "--out", small_disk / "out", "--workers", workers)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "No space left on device; run the same command again after mending" in done.stderr


def test_a_file_that_may_not_grow_is_one_line(data: Path, tmp_path: Path) -> None:
    # as a full disk, where none can be mounted: no file may be over 8 KiB
    command = f"ulimit -f 8; exec {sys.executable} -m memfilter run {data} --out {tmp_path / 'out'} --workers 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "File too large; run the same command again after mending" in done.stderr


def test_a_place_that_cannot_be_written_is_one_line(data: Path) -> None:
    done = memfilter_command("run", data, "--out", "/proc/memfilter")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("memfilter: /proc/memfilter: cannot be written: ")
    assert done.stderr.endswith("; choose another --out\n")


def test_a_run_directory_that_has_become_read_only_is_one_line(small_disk: Path, data: Path, undisturbed: Path) -> None:
    memfilter.run([str(data)], small_disk / "out", workers=1)
    assert mount("-o", "remount,ro", small_disk)
    done = memfilter_command("run", data, "--out", small_disk / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{small_disk}" in done.stderr
    assert "ead-only" in done.stderr
    assert memfilter.verify(small_disk / "out") == []
    assert tree(small_disk / "out") == tree(undisturbed)


def test_killed_at_every_commit_point_and_at_random_the_next_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--json", str(tmp_path / "kills.json")]
    command += ["--only", "run", "--kills", "4", "--workers-kills", "0", "--samples", "60", "--without-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["commit_points"] >= 24
    assert result["random_kills"] == 4


@pytest.mark.parametrize("how", ["rethreshold", "update", "without inputs"])
def test_a_finished_run_killed_at_every_step_of_another_decision_is_as_it_was_or_says_so_and_is_finished_by_the_same(
    how: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--json", str(tmp_path / "kills.json")]
    command += ["--only", how, "--samples", "24", "--without-model", "--without-encoder", "--before"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())["decided_again"][how]
    assert found["commit_points"] >= 20
