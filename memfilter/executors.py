"""Run one picklable function over many items, in this process or in spawned workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from .errors import WorkerError

R = TypeVar("R")


def default_workers() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[..., R], items: Sequence[tuple[Any, ...]], workers: int, what: Callable[[int], str]
) -> Iterator[R]:
    """Yield `function(*item)` for every item, in the order in which they finish.

    The first error ends the run: items that have not started are dropped and the error is raised here.  `what` names
    an item for the WorkerError that reports a worker's death.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            yield function(*item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting = iter(range(len(items)))
    running: dict[Future[R], int] = {}
    try:
        while True:
            # only a few items wait in the pool, so that an error or an interrupt leaves little to finish
            while len(running) < 2 * workers and (i := next(waiting, None)) is not None:
                with _interrupts_held():
                    running[pool.submit(function, *items[i])] = i
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                del running[future]
                yield result
    except BrokenProcessPool as e:
        names = ", ".join(sorted(what(i) for i in running.values()))
        raise WorkerError(
            f"a worker process died (killed, or out of memory) while these were in hand: {names}; "
            "run the same command again, with fewer --workers if memory is short; in a script of your own, call "
            "memfilter under 'if __name__ == \"__main__\":'"
        ) from e
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()  # an item in flight is lost; its file appears whole or not at all
        pool.shutdown(wait=True, cancel_futures=True)


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
