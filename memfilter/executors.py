"""Run one picklable function over many items, in this process or in spawned workers.

A worker has one item in hand at a time, so that its death is known to be that item's.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import SpawnContext
from typing import Any, TypeVar

import psutil

from .errors import WorkerError

R = TypeVar("R")

log = logging.getLogger(__name__)

_GLANCE = 0.05  # seconds between two looks at the workers' memory
_NO_LOCKS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOSYS, errno.ENOSPC)
_WORKER = "memfilter-worker"
_UNGUARDED = 77  # exit code of a worker that was about to do, as it started, what the script that started it does
_GUARD = "call memfilter under 'if __name__ == \"__main__\":' in a script of your own"


def check_guard() -> None:
    """End this process if it is a worker that is being started: it imports the script, which asks for workers again."""
    process = multiprocessing.current_process()
    if process.name == _WORKER and getattr(process, "_inheriting", False):
        os._exit(_UNGUARDED)


def default_workers() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[..., R],
    items: Sequence[tuple[Any, ...]],
    workers: int,
    what: Callable[[int], str],
    max_memory: int | None = None,
    slots: Sequence[str] | None = None,
) -> Iterator[R]:
    """Yield `function(*item)` for every item, in the order in which they finish.

    The first error ends the run: items that have not started are dropped and the error is raised here.  An item whose
    worker dies, runs out of memory, or holds more than `max_memory` bytes is tried once more by a new worker, alone
    and after the others; then a WorkerError names it by `what`.  A single worker is this process itself, unless its
    memory is limited.

    Each worker has one of the `slots`, such as a GPU, to itself, and `function(slot, *item)` is called.  Workers import
    the script that called; there are none where it came from standard input, and they end with this process.
    """
    workers = min(workers, len(items))
    if (workers > 1 or max_memory is not None) and not _has_script():
        _tell_of_script()
        workers, max_memory = 1, None
    if workers <= 1 and max_memory is None:
        for i, item in enumerate(items):
            yield _here(function, (*slots[:1], *item) if slots else item, what(i))
        return
    waiting, retrying = [*range(len(items) - 1, -1, -1)], False
    again: list[int] = []  # to be tried alone, after the others
    idle = [_Worker(slots[i] if slots else None) for i in range(workers)]
    busy: dict[Future[R], tuple[_Worker, int]] = {}
    try:
        while waiting or busy or again:
            if not waiting and not busy:
                retrying = True
                waiting.append(again.pop(0))
            while idle and waiting:
                worker, i = idle.pop(), waiting.pop()
                busy[worker.start(function, items[i])] = worker, i
            finished, _ = wait(busy, timeout=_GLANCE if max_memory else None, return_when=FIRST_COMPLETED)
            for worker, _ in busy.values() if max_memory else ():
                worker.hold_to(max_memory or 0)
            for future in finished:
                worker, i = busy.pop(future)
                try:
                    result = future.result()
                except (BrokenProcessPool, MemoryError) as e:
                    cause = worker.end(e)
                    if retrying:
                        raise WorkerError(_report(what(i), cause)) from e
                    log.warning("%s: its worker died (%s); trying it once more, last and alone", what(i), cause)
                    again.append(i)
                    idle.append(_Worker(worker.slot))
                else:
                    if worker.was_stopped:  # as it handed its result over: the next item is not to die of that
                        worker.end()
                        worker = _Worker(worker.slot)
                    idle.append(worker)
                    yield result
    finally:
        for worker in [*idle, *(w for w, _ in busy.values())]:
            worker.end()  # an item in flight is lost; its file appears whole or not at all


def _has_script() -> bool:
    """Whether a worker can import what this process runs; an interactive session and `-c` have nothing to import."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is None or os.path.exists(file)


@cache
def _tell_of_script() -> None:
    log.warning("a script from standard input cannot be imported by workers: going on in this process alone")


def _here(function: Callable[..., R], item: tuple[Any, ...], name: str) -> R:
    try:
        return function(*item)
    except MemoryError:
        log.warning("%s: out of memory; trying it once more", name)
    try:
        return function(*item)
    except MemoryError as e:
        raise WorkerError(_report(name, "out of memory")) from e


def _report(name: str, cause: str) -> str:
    return (
        f"{name}: its worker died twice ({cause}); look at it, or run the same command again with fewer "
        "--workers (or magnitude.devices) if memory is short"
    )


class _Worker:
    """One spawned process, started with its first item."""

    def __init__(self, slot: str | None) -> None:
        self.slot = slot
        self._pool = _pool()
        self._process: Any = None
        self._taken = 0  # bytes, once they were too many

    def start(self, function: Callable[..., R], item: tuple[Any, ...]) -> Future[R]:
        """Hand over an item."""
        item = item if self.slot is None else (self.slot, *item)
        with _interrupts_held():
            try:
                future = self._pool.submit(function, *item)
            except BrokenProcessPool:  # it died with nothing in hand
                self._pool = _pool()
                future = self._pool.submit(function, *item)
        (self._process,) = self._pool._processes.values()
        return future

    @property
    def was_stopped(self) -> bool:
        """True once the process has been killed for its memory."""
        return self._taken > 0

    def hold_to(self, max_memory: int) -> None:
        """Kill the process if it holds more than so many bytes."""
        try:
            taken = psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:  # it is gone, and its future will tell
            return
        if taken > max_memory:
            self._taken = taken
            self._process.kill()

    def end(self, error: BaseException | None = None) -> str:
        """End the process, whatever it does; return why it died, if it did."""
        if self._process is not None and not isinstance(error, BrokenProcessPool):
            self._process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        code = self._process and self._process.exitcode  # known for sure once the pool has reaped it
        if self.was_stopped:
            return f"it held {self._taken / 2**20:,.0f} MiB of memory, over input.max_memory"
        if isinstance(error, MemoryError):
            return "out of memory"
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}, as when memory runs out"
        if code == _UNGUARDED and error is not None:
            raise WorkerError(f"workers import the script that starts them: {_GUARD}, or ask for one worker")
        return f"exit code {code}; {_GUARD}"


class _Spawn(SpawnContext):
    """Starts processes by a name that they know from their first line on."""

    def Process(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().Process(*args, **{**options, "name": _WORKER})


def _pool() -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(1, mp_context=_Spawn(), initializer=_end_with_parent)
    except OSError as e:  # its locks are files there, and the error names none
        if e.errno not in _NO_LOCKS:
            raise
        raise WorkerError(
            f"/dev/shm: workers cannot be started: {e.strerror or e}; make it writable, or run with --workers 1 and "
            "without input.max_memory"
        ) from e


def _end_with_parent() -> None:
    """Let this process end as soon as the one that started it has: it would wait for ever, with all its memory."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="memfilter-watch", daemon=True).start()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while workers are started: they inherit that, from their first instruction on.

    It reaches the whole process group, and this process alone is to answer it, as soon as the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
