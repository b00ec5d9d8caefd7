"""Stream one tar's members with their raw bytes, in constant memory, checked to the end.

The reader follows the POSIX ustar and pax formats with GNU long names.  A key ends at the first dot of a member's base
name and the suffix, lower-cased, is the rest: the convention of webdataset.  Members of one key that follow one
another are one sample; a suffix that returns begins the next occurrence of the key.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

import xxhash

from .errors import ShardError, in_one_line, shown
from .records import Shard
from .remote import TIMEOUT, Changed, RemoteStream
from .shards import NOT_NAMED, REMEDY, SCHEME, is_local

BLOCK = 512
_BUFFER = 128 << 10
# webdataset's ((?:.*/|)[^.]+)[.]([^/]*), which takes hours for a long name without a dot, in linear time
_KEY = re.compile(rb"((?:.*/|)(?:[^./]+|[^./]*/))[.]([^/]*)", re.DOTALL)
_META = re.compile(rb"__[^/]*__(?:/|$)")
_MAX_EXTENSION = 1 << 20
_CHUNK = 1 << 24  # bytes that are asked of a stream at once, whatever size a header claims
_REGULAR, _PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = (b"0", b"\0", b"7"), (b"x", b"X"), b"g", b"L", b"K"
_EXTENSIONS = (*_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK)
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


# -- opening a shard --------------------------------------------------------------------------------------------------


@contextmanager
def open_shard(shard: Shard, timeout: float = TIMEOUT) -> Iterator[Members]:
    """Yield the members of a shard, from a plain or gzip tar; raises ShardError where it cannot be read.

    A remote store may take `timeout` seconds for the next bytes before it is asked again.
    """
    _check_named(shard)
    with ExitStack() as stack:
        try:
            stored = Stored(stack.enter_context(_raw(shard, timeout)))
            stream: Any = io.BufferedReader(stored, _BUFFER)
            compressed = stream.peek(2)[:2] == b"\x1f\x8b"
        except MemoryError:
            raise
        except Exception as e:  # fsspec's back ends raise what they like
            raise _unreadable(shard.name, e) from e
        if compressed:
            stream = gzip.GzipFile(fileobj=stream, mode="rb")
        members = Members(stream, shard.name, compressed)
        members.stored = stored
        yield members


def content_digest(shard: Shard, timeout: float = TIMEOUT) -> str:
    """Return the digest of a shard's bytes as they are stored; raises ShardError where they cannot be read."""
    _check_named(shard)
    try:
        with _raw(shard, timeout) as raw:
            stored, buffer = Stored(raw), bytearray(_CHUNK)
            while stored.readinto(buffer):
                pass
            return stored.digest
    except MemoryError:
        raise
    except Exception as e:  # fsspec's back ends raise what they like
        raise _unreadable(shard.name, e) from e


def _check_named(shard: Shard) -> None:
    if not shard.may_read:
        raise ShardError(f"{shard.name}: {NOT_NAMED}")


class Stored(io.RawIOBase):
    """A shard's bytes as they are stored, compressed or not, counted and digested as they are read."""

    def __init__(self, raw: IO[bytes] | io.RawIOBase) -> None:
        super().__init__()
        self._raw: Any = raw
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes and return their number, less than it holds at the end alone."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (count := self._raw.readinto(view[filled:])):
            filled += count
        self._digest.update(view[:filled])
        self.size += filled
        return filled

    @property
    def digest(self) -> str:
        """The xxh3-128 hex digest of what was read so far: of the whole shard, once its members were."""
        return self._digest.hexdigest()


def _unreadable(name: str, error: Exception) -> ShardError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return ShardError(f"{name}: the gzip stream is cut or damaged ({in_one_line(error)}); {REMEDY}")
    if isinstance(error, Changed):
        return ShardError(f"{name}: {error}; run the same command again")
    # an OSError's own text holds the path, which is no part of a result
    cause = (isinstance(error, OSError) and error.strerror) or in_one_line(error)
    if isinstance(error, FileNotFoundError):
        cause = "listed, then gone"
    return ShardError(f"{name}: cannot be read: {cause}; {REMEDY}")


@contextmanager
def _raw(shard: Shard, timeout: float) -> Iterator[IO[bytes] | io.RawIOBase]:
    url = shard.url
    if is_local(url) and os.path.exists(url) and not os.path.isfile(url):
        raise OSError("is no file")  # a named pipe would wait for ever
    if not url.startswith("pipe:"):
        with RemoteStream(url, shard.size, timeout) if SCHEME.match(url) else open(url, "rb", buffering=0) as f:
            yield f
        return
    with subprocess.Popen(url[len("pipe:") :], shell=True, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        failure: ShardError | None = None
        try:
            yield process.stdout
        except ShardError as e:  # the command's own failure is the better cause
            failure = e
        process.stdout.close()
        if process.wait():
            cause = f"the command ended with exit code {process.returncode}: {shown(url)}"
            raise ShardError(f"{failure or shard.name}: {cause}") from failure
        if failure:
            raise failure


# -- members ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Member:
    """One tar member.  Its body can be read while it is the reader's current member.

    `key` and `suffix` are empty, and `index` is -1, for members that belong to no sample (folders, names without a
    dot, pax global headers).
    """

    name: bytes
    kind: bytes
    size: int
    head: bytes
    key: bytes = b""
    suffix: str = ""
    index: int = -1
    supported: bool = True
    reader: Members = field(repr=False, default=None)  # type: ignore[assignment]

    @property
    def is_global(self) -> bool:
        """True for a pax global header, which applies to every member after it."""
        return self.kind == _PAX_GLOBAL

    def read(self) -> bytes:
        """Return the member's data, once."""
        data = self.reader.take(self.size, "a member")
        self.reader.left = -self.size % BLOCK
        return data

    def raw(self) -> Iterator[bytes]:
        """Yield the member as it stands in the tar: extension headers, header, data, padding."""
        yield self.head
        yield from self.reader.rest()


class Members:
    """Iterate over a tar's members to its end-of-archive, and raise ShardError unless that end is sound."""

    stored: Stored  # of a shard that was opened by `open_shard`

    def __init__(self, stream: IO[bytes], name: str, compressed: bool = False) -> None:
        self.name, self.compressed = name, compressed
        self._stream = stream
        self._offset = 0
        self.left = 0  # bytes of the current member's body that nobody has read
        self.samples = 0

    def __iter__(self) -> Iterator[Member]:
        key: bytes = b""
        suffixes: set[str] = set()
        while (member := self._next()) is not None:
            match = _KEY.fullmatch(member.name) if member.kind not in (b"5", _PAX_GLOBAL) else None
            if match and not _META.match(member.name):
                member.key = match[1]
                member.suffix = match[2].decode("utf-8", "backslashreplace").lower()
                if self.samples == 0 or member.key != key or member.suffix in suffixes:
                    key, suffixes = member.key, set()
                    self.samples += 1
                suffixes.add(member.suffix)
                member.index = self.samples - 1
            yield member
            if self.left:
                for _ in self.rest():
                    pass
        self._check_end()

    def take(self, size: int, where: str) -> bytes:
        """Return exactly `size` bytes; raises ShardError naming the place where the tar ends instead."""
        data = self._read(size)
        if len(data) < size:
            raise ShardError(f"{self.name}: ends inside {where} at byte {self._offset:,}; {REMEDY}")
        return data

    def _read(self, size: int) -> bytes:
        """Return up to `size` bytes, fewer only where the stream ends."""
        chunks: list[bytes] = []
        left = size
        try:
            while left and (chunk := self._stream.read(min(left, _CHUNK))):
                chunks.append(chunk)
                left -= len(chunk)
        except MemoryError:
            raise
        except Exception as e:  # fsspec's back ends raise what they like
            raise _unreadable(self.name, e) from e
        self._offset += size - left
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def rest(self) -> Iterator[bytes]:
        """Yield what is left of the current member's data and padding."""
        while self.left:
            size = min(self.left, 1 << 20)
            self.left -= size
            yield self.take(size, "a member")

    def _fail(self, what: str) -> ShardError:
        return ShardError(f"{self.name}: {what} at byte {self._offset:,}; {REMEDY}")

    def _next(self) -> Member | None:
        head = b""
        own: dict[bytes, bytes] = {}  # what extension headers say of this member
        while (block := self._header(first=not head)) is not None:
            kind, size = block[156:157], self._number(block[124:136])
            head += block
            if len(head) > 4 * _MAX_EXTENSION:
                raise self._fail(f"extension headers of {len(head):,} bytes")
            if kind not in _EXTENSIONS:
                return self._member(block, kind, size, head, own)
            if size > _MAX_EXTENSION:
                raise self._fail(f"an extension header of {size:,} bytes")
            data = self.take(size, "an extension header")
            head += data + self.take(-size % BLOCK, "an extension header")
            if kind == _PAX_GLOBAL:
                for keyword, _ in self._pax(data):
                    if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse."):
                        raise self._fail(f"a pax header that sets {keyword[:20]!r} of every member")
                return Member(b"", kind, 0, head, reader=self)
            if kind in _PAX:
                own.update(self._pax(data))
            elif kind == _LONG_NAME:
                own[b"path"] = data.split(b"\0", 1)[0]
        return None

    def _member(self, block: bytes, kind: bytes, size: int, head: bytes, own: dict[bytes, bytes]) -> Member:
        supported = kind in _REGULAR
        if kind == b"S":
            extended = block[482]
            while extended:
                more = self.take(BLOCK, "a sparse header")
                head, extended = head + more, more[504]
                if len(head) > 4 * _MAX_EXTENSION:
                    raise self._fail(f"sparse headers of {len(head):,} bytes")
        if own:
            if any(k.startswith(b"GNU.sparse.") for k in own):
                supported = False
                own[b"path"] = own.get(b"GNU.sparse.name", own.get(b"path", b""))
            if b"size" in own:
                if not own[b"size"].isdigit() or len(own[b"size"]) > 20:
                    raise self._fail(f"a pax size of {own[b'size'][:20]!r}")
                size = int(own[b"size"])
        if kind in _NO_DATA:
            size = 0
        name = own.get(b"path") or self._name(block)
        if kind in _REGULAR and name.endswith(b"/"):
            kind = b"5"
        self.left = size + -size % BLOCK
        return Member(name, kind, size, head, supported=supported, reader=self)

    def _header(self, first: bool) -> bytes | None:
        """Return the next header block, or None at the first of the two zero blocks that end the archive."""
        block = self._read(BLOCK)
        if not block:
            if not self._offset:
                raise ShardError(f"{self.name}: is empty (0 bytes); {REMEDY}")
            where = "without its end-of-archive" if first else "after an extension header"
            raise ShardError(f"{self.name}: ends {where} at byte {self._offset:,}; {REMEDY}")
        if len(block) < BLOCK:
            what = "is not a tar" if self._offset < BLOCK else "ends inside a header"
            raise ShardError(f"{self.name}: {what} at byte {self._offset:,}; {REMEDY}")
        total = sum(block)
        if not total:
            if not first:
                raise self._fail("the archive ends after an extension header")
            return None
        unsigned = total - sum(block[148:156]) + 8 * 32
        try:
            stored = int(block[148:156].strip(b" \0"), 8)
        except ValueError:
            stored = -1
        if stored != unsigned and stored != unsigned - 256 * sum(b > 127 for b in block[:148] + block[156:]):
            self._offset -= BLOCK
            what = "a damaged header" if self._offset else "is not a tar: no header"
            raise self._fail(what)
        return block

    def _check_end(self) -> None:
        if any(self.take(BLOCK, "its end-of-archive")):
            raise self._fail("the archive ends with one zero block instead of two")
        while chunk := self._read(1 << 20):
            if any(chunk):
                raise self._fail("data after the end-of-archive")

    def _number(self, text: bytes) -> int:
        if text[0] == 0x80:
            return int.from_bytes(text[1:], "big")
        try:
            number = int(text.strip(b" \0") or b"0", 8)
        except ValueError:
            number = -1
        if number < 0:
            raise self._fail(f"a header with size {text!r}")
        return number

    @staticmethod
    def _name(block: bytes) -> bytes:
        name = block[:100].split(b"\0", 1)[0]
        prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
        return prefix + b"/" + name if prefix else name

    def _pax(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        at, end = 0, len(data.rstrip(b"\0"))
        while at < end:
            length, space, _ = data[at : at + 8].partition(b" ")
            size = int(length) if length.isdigit() else 0
            record = data[at : at + size]
            keyword, equals, value = record[len(length) + 1 : -1].partition(b"=")
            if not (space and equals and record.endswith(b"\n") and len(record) == size):
                raise self._fail("a damaged pax header")
            yield keyword, value
            at += size


# -- identity ---------------------------------------------------------------------------------------------------------


def sample_uid(shard: str, key: bytes) -> bytes:
    """Return the 16-byte uid of a sample: blake2b-128 of shard and key, each prefixed by its length (8 bytes, big)."""
    digest = _begun_uid(shard).copy()
    digest.update(len(key).to_bytes(8, "big") + key)
    return digest.digest()


@lru_cache(maxsize=1024)
def _begun_uid(shard: str) -> hashlib.blake2b:
    name = shard.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(len(name).to_bytes(8, "big") + name, digest_size=16)


def printable_key(key: bytes) -> str:
    """Return the key as text: itself where it is UTF-8, else with its other bytes escaped as `\\xNN`."""
    return key.decode("utf-8", "backslashreplace")
