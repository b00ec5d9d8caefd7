"""One process at a time in a folder, on file systems that lock files and on those that do not."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .errors import RunError

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_CANNOT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # as some network file systems answer


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, by its `.lock`; the lock dies with the process.

    Where files cannot be locked, `.lock.owner` names host and process; what a process of this host left that has ended
    is taken over.  Raises RunError where another one holds the folder, OSError where it cannot be written.
    """
    path = folder / ".lock"
    if path.is_symlink():
        raise RunError(f"{path}: is a link; remove it")
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if (cause := _lock(file, path)) is None:
            yield
        else:
            with _owned(folder, cause):
                yield
    finally:
        os.close(file)


def _lock(file: int, path: Path) -> str | None:
    """Lock an open file; return why that cannot be done here, None where it was."""
    try:
        import fcntl
    except ImportError:  # no POSIX system
        return "this system cannot lock files"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in _CANNOT:
            return f"this file system cannot lock files ({e.strerror})"
        if e.errno not in _HELD:
            raise
        raise RunError(
            f"{path.parent}: another run is using this directory, it holds {path}; wait for it or choose another, "
            "or remove that file if the run was on a host that is gone"
        ) from e
    return None


@contextmanager
def _owned(folder: Path, cause: str) -> Iterator[None]:
    path, aside = folder / ".lock.owner", folder / f".lock.owner.{os.getpid()}"
    own = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": psutil.Process().create_time()})
    if not _create(path, own):
        told = _read(path)
        is_ours = False
        if _has_ended(told):
            os.replace(path, aside)  # of two that find it at once, the second moves what the first has put there
            if _read(aside) == told:
                is_ours = _create(path, own)
                aside.unlink()
            else:
                os.replace(aside, path)
        if not is_ours:
            who = f"process {told.get('process')} on {told.get('host')}" if told else "another one"
            raise RunError(
                f"{folder}: another run is using this directory: {cause}, and {path} names {who}; wait for it or "
                "choose another, or remove that file if the run has ended"
            )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(file, "w", encoding="utf-8") as f:
        f.write(text)
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _has_ended(told: dict[str, Any]) -> bool:
    """Whether the process that is told was one of this host, and is there no more."""
    if told.get("host") != socket.gethostname() or type(told.get("process")) is not int:
        return False
    try:
        return bool(psutil.Process(told["process"]).create_time() != told.get("since"))
    except (psutil.Error, ValueError, OverflowError):
        return True
