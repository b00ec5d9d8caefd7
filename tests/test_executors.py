"""Items over workers: all results, whoever dies, and a death reported with the item that caused it."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from memfilter import WorkerError, executors

MIB = 2**20


def square(i: int) -> int:
    return i * i


def die_while_there_are_marks(i: int, marks: Path, death: int) -> int:
    """Take one of the item's marks away and die of a signal; with no mark left, return the square."""
    mark = next(marks.glob(f"{i}-*"), None)
    if mark is not None:
        mark.unlink()
        os.kill(os.getpid(), death)
        time.sleep(60)
    return i * i


def run_out_of_memory(i: int, marks: Path) -> int:
    mark = next(marks.glob(f"{i}-*"), None)
    if mark is not None:
        mark.unlink()
        raise MemoryError
    return i * i


def hold(i: int, size: int) -> int:
    held = bytearray(size)
    for at in range(0, size, 4096):
        held[at] = 1
    time.sleep(0.5)
    return os.getpid()


def leave_at_once(i: int) -> None:
    os._exit(3)


def named(i: int) -> str:
    return f"{i:05}.tar"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_gives_its_result(workers: int) -> None:
    found = executors.run(square, [(i,) for i in range(10)], workers, named)
    assert sorted(found) == [i * i for i in range(10)]


def test_no_items_give_nothing() -> None:
    assert list(executors.run(square, [], 2, named)) == []


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSEGV])
def test_an_item_that_kills_its_worker_once_is_tried_again_and_named(
    death: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "3-first").touch()
    items = [(i, tmp_path, death) for i in range(6)]
    with caplog.at_level(logging.WARNING):
        assert sorted(executors.run(die_while_there_are_marks, items, 2, named)) == [i * i for i in range(6)]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"00003.tar: its worker died (killed by {signal.Signals(death).name}")


def test_an_item_that_kills_two_workers_stops_the_run_after_the_others(tmp_path: Path) -> None:
    for mark in ("2-first", "2-second"):
        (tmp_path / mark).touch()
    results = executors.run(die_while_there_are_marks, [(i, tmp_path, signal.SIGKILL) for i in range(6)], 2, named)
    assert sorted(next(results) for _ in range(5)) == [0, 1, 9, 16, 25]
    with pytest.raises(WorkerError, match=r"^00002\.tar: its worker died twice \(killed by SIGKILL, as when memory"):
        next(results)


def test_a_worker_that_leaves_is_reported_with_its_exit_code() -> None:
    with pytest.raises(WorkerError, match=r"^0000[01]\.tar: its worker died twice \(exit code 3"):
        list(executors.run(leave_at_once, [(0,), (1,)], 2, named))


@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_memory_is_tried_again_once(workers: int, tmp_path: Path) -> None:
    (tmp_path / "1-first").touch()
    items = [(i, tmp_path) for i in range(3)]
    assert sorted(executors.run(run_out_of_memory, items, workers, named)) == [0, 1, 4]
    for mark in ("1-first", "1-second"):
        (tmp_path / mark).touch()
    with pytest.raises(WorkerError, match=r"^00001\.tar: its worker died twice \(out of memory\)"):
        list(executors.run(run_out_of_memory, items, workers, named))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_over_its_memory_is_stopped_with_the_figure(workers: int) -> None:
    items = [(0, MIB), (1, 600 * MIB), (2, MIB)]
    with pytest.raises(WorkerError, match=r"^00001\.tar: .*\(it held \d{3} MiB of memory, over input\.max_memory\)"):
        list(executors.run(hold, items, workers, named, max_memory=300 * MIB))


def test_a_worker_under_its_memory_is_left_alone_and_is_another_process() -> None:
    found = list(executors.run(hold, [(0, MIB), (1, 2 * MIB)], 1, named, max_memory=1024 * MIB))
    assert len(found) == 2
    assert os.getpid() not in found
