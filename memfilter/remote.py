"""The bytes of an object in a remote store, asked for again where the store fails, stalls or stops short.

An attempt runs in a thread of its own, which reads one chunk ahead: a store that never answers holds up neither the
deadline, nor Ctrl-C, nor the end of the process.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Queue
from typing import Any, NamedTuple, TypeVar

import fsspec

from .errors import in_one_line, without_secrets

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between one attempt and the next; they begin anew when a byte has come."""

TIMEOUT = 60.0
"""Seconds in which the next bytes must come, unless the caller says otherwise."""

_CHUNK = 1 << 20
_BLOCK = 4 << 20  # asked for at a time where the store takes ranges; some take 50 MiB, which may outlast the deadline
_REFUSED, _GONE = (401, 403), (404, 410)
# what a store may tell of an object's version; the first that is there counts
_VERSIONS = (
    *("ETag", "etag", "version", "version_id", "VersionId", "generation", "blob_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created"),
)

T = TypeVar("T")


class Told(NamedTuple):
    """What a store tells of an object: its size in bytes, and a token that changes when the object does."""

    size: int | None
    version: str | None

    @classmethod
    def of(cls, info: dict[str, Any]) -> Told:
        """Return what an `fs.info` tells."""
        found = next((info[key] for key in _VERSIONS if info.get(key) is not None), None)
        return cls(info.get("size"), None if found is None else str(found))


class Changed(OSError):
    """An object is not the one that it was."""


def retried(ask: Callable[[], T]) -> T:
    """Return what `ask` returns, at the first attempt or a later one.

    Raises its last error, and at once what would come again: there is no such object, or one that may not be seen.
    """
    for wait in WAITS:
        try:
            return ask()
        except Exception as e:
            if isinstance(e, MemoryError | ImportError) or _is_final(e):
                raise
        time.sleep(wait)
    return ask()


def cause(error: Exception, url: str = "") -> str:
    """Return in a few words what went wrong, without the object's URL, which is no part of a result."""
    error = _fault(error)
    if isinstance(status := getattr(error, "status", None), int):
        return f"HTTP status {status}"
    if isinstance(error, OSError) and error.strerror:
        return without_secrets(str(error.strerror))
    text, url = in_one_line(error), without_secrets(url)
    return text.replace(url, url.rsplit("/", 1)[-1]) if url else text


def _fault(error: Exception) -> Exception:
    """Return the fault itself: fsspec's http calls every one FileNotFoundError, and has it as the cause."""
    inner = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(inner, Exception):
        return error
    of_http = isinstance(inner, asyncio.TimeoutError) or type(inner).__module__.startswith("aiohttp")
    return inner if of_http else error


def _is_gone(error: Exception) -> bool:
    fault = _fault(error)
    return isinstance(fault, FileNotFoundError) or getattr(fault, "status", None) in _GONE


def _is_final(error: Exception) -> bool:
    """Tell whether the store has answered, and would answer the same again."""
    fault = _fault(error)
    return _is_gone(error) or isinstance(fault, PermissionError) or getattr(fault, "status", None) in _REFUSED


class RemoteStream(io.RawIOBase):
    """The bytes of one remote object, from the first to the last, of one version.

    After a fault the object is opened again and read on from the byte where it stopped.  Raises, in one line without
    the URL, FileNotFoundError when there is no such object, OSError when several attempts have brought no byte, and
    Changed when the store tells otherwise of it than before, or than `size`, the bytes that it was listed with.
    """

    def __init__(self, url: str, size: int | None = None, timeout: float = TIMEOUT) -> None:
        super().__init__()
        self.url, self.timeout = url, timeout
        self._listed = size
        self._told: Told | None = None
        self._at = 0  # bytes that have come
        self._faults = 0  # since the last byte came
        self._seeks = True
        self._ended = False
        self._rest = memoryview(b"")
        self._attempt: _Attempt | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the start of `buffer` with the next bytes and return their number, 0 at the end of the object."""
        while not self._rest and not self._ended:
            self._rest = memoryview(self._receive())
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        """Give up what is under way."""
        self._give_up()
        super().close()

    def _give_up(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt:
            attempt.give_up()

    def _receive(self) -> bytes:
        """Return the bytes that came next, which may be none."""
        if not self._attempt:
            self._attempt = _Attempt(self.url, self._at, self._seeks)
        try:
            answer = self._attempt.answers.get(timeout=self.timeout)
        except Empty:
            answer = TimeoutError(f"no byte in {self.timeout:g} s")
        if isinstance(answer, bytes):
            self._at += len(answer)
            self._faults = 0 if answer else self._faults
            return answer
        if isinstance(answer, Told):
            self._compare(answer)
        elif answer is not None:
            self._recover(answer)
        elif self._told and self._told.size is not None and self._at < self._told.size:
            self._recover(EOFError(f"it ended there, short of its {self._told.size:,} bytes"))
        else:
            self._ended = True
        return b""

    def _compare(self, told: Told) -> None:
        """Hold what the store tells now against what it told first."""
        if not self._told:
            if None not in (self._listed, told.size) and self._listed != told.size:
                raise Changed(f"had {self._listed:,} bytes when it was listed, and now has {told.size:,}")
            self._told = told
        elif self._told != told:
            raise Changed(f"has changed while it was read, before byte {self._at:,}")

    def _recover(self, error: BaseException) -> None:
        """Wait before the next attempt; raises OSError when there is to be none."""
        sought = self._attempt and self._attempt.seeks
        self._give_up()
        if not isinstance(error, Exception) or isinstance(error, MemoryError | ImportError):
            raise error
        if _is_gone(error):
            raise FileNotFoundError(cause(error, self.url)) from error
        if _is_final(error):
            raise OSError(cause(error, self.url)) from error
        if sought and isinstance(error, ValueError | NotImplementedError):
            self._seeks = False  # fsspec's word for it: the next attempt reads from the beginning
            return
        self._faults += 1
        if self._faults > len(WAITS):
            what = f"no more came at byte {self._at:,} in {self._faults} attempts, the last because"
            raise OSError(f"{what}: {cause(error, self.url)}") from error
        time.sleep(WAITS[self._faults - 1])


class _GivenUp(Exception):
    """Nobody waits for this attempt any more."""


class _Attempt:
    """One attempt: what the store tells of the object, its bytes from `start` on, what it tells then, and None.

    An error takes the place of what did not come; empty bytes are a sign of life.
    """

    def __init__(self, url: str, start: int, seek: bool) -> None:
        self.url, self.start = url, start
        self.seeks = seek and start > 0
        # room for the two answers that a thread may still be handing over when it is given up
        self.answers: Queue[Told | bytes | BaseException | None] = Queue(maxsize=2)
        self._given_up = threading.Event()
        threading.Thread(target=self._run, name=f"memfilter-{start}", daemon=True).start()

    def give_up(self) -> None:
        """Let the thread end as soon as the store gives it back."""
        self._given_up.set()
        with suppress(Empty):
            while True:
                self.answers.get_nowait()

    def _hand_over(self, answer: Told | bytes | None) -> None:
        if self._given_up.is_set():
            raise _GivenUp
        self.answers.put(answer)

    def _run(self) -> None:
        try:
            fs, path = fsspec.core.url_to_fs(self.url)
            self._hand_over(b"")
            told = self._tell(fs, path)
            if told.size is None or self.start < told.size:
                self._read(fs, path)
            self._tell(fs, path)
            self._hand_over(None)
        except _GivenUp:
            pass
        except BaseException as e:
            self.answers.put(e)

    def _tell(self, fs: Any, path: str) -> Told:
        fs.invalidate_cache(path)
        told = Told.of(fs.info(path))
        self._hand_over(told)
        return told

    def _read(self, fs: Any, path: str) -> None:
        # a web server's answer to one request is of one version, and needs no ranges; to resume, they are asked for
        whole = not self.seeks and self.url.startswith(("http://", "https://"))
        with fs.open(path, "rb", block_size=0 if whole else _BLOCK) as file:
            at = self.start if self.seeks else 0
            if at:
                file.seek(at)
            self._hand_over(b"")
            while data := file.read(_CHUNK if at >= self.start else min(_CHUNK, self.start - at)):
                self._hand_over(bytes(data) if at >= self.start else b"")
                at += len(data)
