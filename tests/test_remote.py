"""Shards in remote stores that fail, stall, stop short or change, over real HTTP; and input that changes meanwhile."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import xxhash
from conftest import encoded, picture, sample
from tars import tar_of

import memfilter
from memfilter import Config, InputError, Manifest, ShardError
from memfilter.records import Shard
from memfilter.remote import RemoteStream
from memfilter.shards import check_side_cars, find_shards
from memfilter.source import open_shard

Fault = tuple[str, int]
Faults = Iterator["Fault | None"]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    yield
    signal.alarm(0)


# -- a store that can be told to fail ---------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; each answer to a path that has faults takes the next of them, None for a sound answer.

    `status N` answers with N instead; `reset N` and `close N` break the connection when byte N is due, the second in
    an orderly way; `end N` does not tell the length and ends there; `stall N` sends no more; `flip N` alters that byte;
    `change N` sends that much, puts the file named FILE.new in the object's place and breaks off.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.heads: dict[str, Faults] = {}
        self.gets: dict[str, Faults] = {}
        self.before_head: dict[str, Callable[[], object]] = {}
        self.ranges, self.tells = True, {"ETag", "Last-Modified"}
        self.log: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()

    def put(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"{self.url}/{name}"

    def asked(self, method: str, name: str) -> list[str | None]:
        """The ranges of the requests for this path."""
        return [span for asked, path, span in self.log if (asked, path) == (method, name)]

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Write no log."""

    def do_HEAD(self) -> None:
        name = self._name()
        if before := self.server.before_head.get(name):
            before()
        self._answer(name, next(self.server.heads.get(name, iter(())), None), body=False)

    def do_GET(self) -> None:
        name = self._name()
        self._answer(name, next(self.server.gets.get(name, iter(())), None), body=True)

    def _name(self) -> str:
        name = self.path.split("?")[0].lstrip("/")
        self.server.log.append((self.command, name, self.headers.get("Range")))
        return name

    def _answer(self, name: str, fault: Fault | None, body: bool) -> None:
        kind, at = fault or ("", 0)
        path = self.server.folder / name
        if kind == "status" or not path.exists():
            self.send_response(at if kind == "status" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            data = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in sorted(path.iterdir())).encode()
        else:
            data = path.read_bytes()
        start, end, size = 0, len(data), len(data)
        if self.server.ranges and (span := self.headers.get("Range")):
            start, end = (int(n) for n in span.removeprefix("bytes=").split("-"))
            end = min(end + 1, size)
        partial = end - start < size
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        if "ETag" in self.server.tells:
            self.send_header("ETag", hashlib.md5(data).hexdigest())
        if "Last-Modified" in self.server.tells:
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if kind == "end":
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self._body(data, start, end, kind, at)

    def _body(self, data: bytes, start: int, end: int, kind: str, at: int) -> None:
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
        breaks = kind in ("reset", "close", "end", "stall", "change") and at < end
        self.wfile.write(data[start : max(start, at) if breaks else end])
        if not breaks:
            return
        self.close_connection = True
        if kind == "stall":
            self.server.closing.wait(60)
        if kind == "change":
            path = self.server.folder / self.path.lstrip("/")
            os.replace(f"{path}.new", path)
        if kind in ("reset", "close", "change"):
            time.sleep(0.05)  # what was sent arrives
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as started:
        started.folder.mkdir()
        threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield started
        started.closing.set()
        started.shutdown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "store") as started:
        yield started


class Odd(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store in memory whose files cannot seek, and do as they are told: `next(does)` for each that is opened."""

    protocol = "odd"
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}
    does: ClassVar[dict[str, Iterator[Callable[[Any], Any]]]] = {}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name not in self.objects:
            raise FileNotFoundError(path)
        return {"name": name, "size": len(self.objects[name]), "type": "file"}

    def _open(self, path: str, *_: Any, **__: Any) -> io.BytesIO:
        return next(self.does.get(path, iter(())), lambda f: f)(Streamed(self.objects[path]))


class Streamed(io.BytesIO):
    """Bytes that cannot be sought, cut at `size`, with an error that is raised there."""

    size, error = 1 << 40, None

    def read(self, count: int | None = -1) -> bytes:
        left = self.size - self.tell()
        if not left and self.error:
            raise self.error
        return super().read(min(left, 1 << 40 if count is None or count < 0 else count))

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("seek")


fsspec.register_implementation("odd", Odd, clobber=True)


def odd(name: str, data: bytes, *does: Callable[[io.BytesIO], io.BytesIO]) -> str:
    Odd.objects[name], Odd.does[name] = data, iter(does)
    return f"odd://{name}"


def breaking(at: int, error: BaseException | None = None) -> Callable[[Any], Any]:
    def cut(file: Any) -> Any:
        file.size, file.error = at, error
        return file

    return cut


def failing(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


BYTES = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(9000))


def read(url: str, **options: Any) -> bytes:
    with io.BufferedReader(RemoteStream(url, **options)) as stream:
        return stream.read()


BROKEN: dict[str, tuple[Fault, str]] = {
    "status.tar": (("status", 500), "no more came at byte 0 in 5 attempts, the last because: HTTP status 500"),
    "end.tar": (
        ("end", 700),
        r"no more came at byte 700 in 5 attempts, .*: it ended there, short of its 288,000 bytes",
    ),
    "stall.tar": (("stall", 700), r"no more came at byte 700 in 5 attempts, the last because: no byte in 0\.5 s"),
    "reset.tar": (("reset", 0), r"no more came at byte 0 in 5 attempts, the last because: .+"),
    "raises.tar": (("", 0), "no more came at byte 700 in 5 attempts, the last because: raises.tar went away"),
}


def failure(shard: Shard) -> str:
    with pytest.raises(ShardError) as caught, open_shard(shard, timeout=0.5):
        pass
    return str(caught.value)


def halting() -> bytes:
    """What is read of a file that breaks more often than there are attempts, each time a little further on."""
    url = odd("halting", BYTES, failing(ValueError("1")), failing(ValueError("2")))
    Odd.does["halting"] = itertools.chain(Odd.does["halting"], (breaking(n * 40_000, OSError()) for n in range(1, 6)))
    return read(url)


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What comes of shards that stay broken or break often, and of a listing: begun first, as they are waited for."""
    with serving(tmp_path_factory.mktemp("broken") / "store") as server, ThreadPoolExecutor(8) as pool:
        urls = {name: server.put(name, BYTES) for name in BROKEN}
        server.gets |= {name: itertools.repeat(fault) for name, (fault, _) in BROKEN.items()}
        error = RuntimeError("odd://raises.tar went\naway")
        urls["raises.tar"] = odd("raises.tar", BYTES, *[breaking(700, error)] * 9)
        found = {name: pool.submit(failure, Shard(name, url, len(BYTES))) for name, url in urls.items()}
        unlisted = server.put("unlisted.tar", BYTES)
        server.heads["unlisted.tar"] = server.gets["unlisted.tar"] = itertools.repeat(("status", 503))
        found["unlisted.tar"] = pool.submit(find_shards, [unlisted])
        yield {**found, "progress": pool.submit(halting)}


# -- faults that go away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_goes_on_at_the_byte_where_it_stopped(server: Server, ranges: bool) -> None:
    server.ranges = ranges
    kinds = ["reset", "close", "end", "stall"]
    urls = [server.put(kind, BYTES) for kind in kinds]
    server.gets |= {kind: iter([(kind, 100_000)]) for kind in kinds}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(functools.partial(read, timeout=0.5), urls)) == [BYTES] * 4
    for kind in kinds:
        first, second, *rest = server.asked("GET", kind)
        assert first is None, "the first request needs no range"
        assert second is not None
        start = int(re.sub(r"bytes=(\d+)-\d+", r"\1", second))
        assert 0 < start <= 100_000
        assert rest == ([] if ranges else [None]), "a server without ranges is read from the beginning"


def test_progress_lets_the_count_of_attempts_begin_anew(broken: dict[str, Future[Any]]) -> None:
    assert broken["progress"].result() == BYTES


def test_a_fault_between_the_first_two_bytes_hides_no_gzip(server: Server) -> None:
    data = tar_of([("0.txt", b"zero")])
    url = server.put("0.tar", gzip.compress(data))
    server.gets["0.tar"] = iter([("end", 1)])
    with open_shard(Shard("0.tar", url, None)) as members:
        assert members.compressed
        assert [m.read() for m in members] == [b"zero"]
        assert members.stored.size == len(gzip.compress(data))


def test_a_stream_that_cannot_seek_is_read_from_its_beginning() -> None:
    first = breaking(1000), breaking(3000, RuntimeError("gone away")), breaking(9000, OSError(5, "broken"))
    assert read(odd("seek", BYTES, *first)) == BYTES


def test_a_short_read_is_noticed_by_the_size_that_the_store_tells() -> None:
    assert read(odd("short", BYTES, breaking(len(BYTES) - 1), failing(ValueError("once")))) == BYTES


def test_an_object_of_unknown_size_and_one_of_no_bytes_are_read_to_their_end(server: Server) -> None:
    url = server.put("a.bin", BYTES)
    server.heads["a.bin"], server.gets["a.bin"] = itertools.repeat(("end", 0)), itertools.repeat(("end", 1 << 40))
    assert read(url) == BYTES
    assert read(server.put("empty.bin", b"")) == b""


# -- versions, and what is gone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("kind", ["change", "end"])
def test_two_versions_are_never_spliced(server: Server, tells: str, kind: str) -> None:
    server.tells = {tells}
    url = server.put("a.bin", BYTES)
    new = server.folder / "a.bin.new"
    new.write_bytes(BYTES[::-1])
    os.utime(new, (1, 1))
    server.gets["a.bin"] = iter([(kind, 100_000)])
    if kind == "end":  # not in the middle of an answer, but between two
        heads = iter([lambda: None] * 2 + [lambda: os.replace(new, server.folder / "a.bin")])
        server.before_head["a.bin"] = lambda: next(heads, lambda: None)()
    message = r"^0\.tar: has changed while it was read, before byte 1?\d?\d,\d{3}; run the same command again$"
    with pytest.raises(ShardError, match=message), open_shard(Shard("0.tar", url, len(BYTES))) as members:
        members.take(len(BYTES), "it")


def test_a_change_behind_the_last_byte_is_noticed(server: Server) -> None:
    url = server.put("a.bin", BYTES)
    heads = itertools.count()
    server.before_head["a.bin"] = lambda: next(heads) == 2 and server.put("a.bin", BYTES[::-1])
    with pytest.raises(OSError, match=r"^has changed while it was read, before byte 288,000$"):
        read(url)
    assert len(server.asked("HEAD", "a.bin")) == 3


def test_a_shard_of_another_size_than_was_listed_is_refused(server: Server) -> None:
    url = server.put("0.tar", BYTES)
    with (
        pytest.raises(ShardError, match=r"^0\.tar: had 99 bytes when it was listed, and now has 288,000; run"),
        open_shard(Shard("0.tar", url, 99)),
    ):
        pass


@pytest.mark.parametrize(("status", "cause"), [(404, "listed, then gone"), (410, "listed, then gone"), (403, "HTTP")])
def test_what_is_gone_or_refused_is_not_asked_for_again(server: Server, status: int, cause: str) -> None:
    url = server.put("0.tar", BYTES)
    server.gets["0.tar"] = itertools.repeat(("status", status))
    with pytest.raises(ShardError, match=rf"^0\.tar: cannot be read: {cause}"), open_shard(Shard("0.tar", url, None)):
        pass
    assert len(server.asked("GET", "0.tar")) == 1


@pytest.mark.parametrize("does", [failing, functools.partial(breaking, 700)])
def test_want_of_memory_is_neither_retried_nor_a_bad_shard(does: Any) -> None:
    url = odd("memory", BYTES, does(MemoryError("no more")))
    with pytest.raises(MemoryError), open_shard(Shard("0.tar", url, None)) as members:
        members.take(len(BYTES), "it")


INTERRUPTED = """
import sys, time
from memfilter.remote import RemoteStream
stream = RemoteStream(sys.argv[1])
while stream.read(1 << 16):
    print("reading", flush=True)
"""


def test_ctrl_c_ends_a_stalled_reading_at_once(server: Server) -> None:
    url = server.put("a.bin", BYTES)
    server.gets["a.bin"] = iter([("stall", 300)])
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert "KeyboardInterrupt" in error
    assert process.returncode == -signal.SIGINT


# -- listing ----------------------------------------------------------------------------------------------------------


def test_a_listing_that_fails_is_asked_for_again(server: Server) -> None:
    for name in ("a/0.tar", "a/1.tar", "a/1.json"):
        server.put(name, BYTES)
    server.gets["a/"], server.heads["a/1.tar"] = iter([("status", 500)]), iter([("status", 500)])
    server.gets["a/1.tar"] = iter([("status", 502)])
    shards, _ = find_shards([f"{server.url}/a/*.tar"])
    assert [(s.name, s.size) for s in shards] == [("0.tar", len(BYTES)), ("1.tar", len(BYTES))]
    assert {s.version for s in shards} == {hashlib.md5(BYTES).hexdigest()}
    assert [next(server.gets[name], "spent") for name in ("a/", "a/1.tar")] == ["spent"] * 2


def test_a_url_that_is_not_there_is_asked_for_once(server: Server) -> None:
    with pytest.raises(InputError, match=r"none\.tar: cannot be listed: FileNotFoundError: HTTP status 404$"):
        find_shards([f"{server.url}/none.tar"])
    assert len(server.log) == 2, "HEAD and GET are one question"


def test_a_url_with_a_query_is_listed_and_read_like_any_other(server: Server) -> None:
    url = server.put("a.tar", BYTES) + "?token=1&x=[y]"
    server.heads["a.tar"], server.gets["a.tar"] = iter([("status", 500)]), iter([("status", 500)])
    (shard,), _ = find_shards([url])
    assert (shard.name, shard.size) == ("a.tar", len(BYTES))
    assert read(shard.url, size=shard.size) == BYTES


def test_a_local_shard_has_its_time_for_a_version_and_a_pipe_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([]))
    os.utime(tmp_path / "a.tar", ns=(1, 1234567890123456789))
    shards, _ = find_shards([str(tmp_path), f"pipe:cat {tmp_path}/b.tar"], allow_pipe=True)
    assert [s.version for s in shards] == ["1234567890123456789", None]


def test_a_side_car_is_asked_for_again(server: Server) -> None:
    url = server.put("0.tar", BYTES)
    server.put("0_stats.json", b'{"successes": 4}')
    server.gets["0_stats.json"] = iter([("status", 500)])
    with pytest.raises(ShardError, match=r"^0\.tar: holds 3 samples, 0_stats\.json counts 4"):
        check_side_cars(Shard("0.tar", url, None), ["a", "b", "c"])


# -- end to end -------------------------------------------------------------------------------------------------------


def tree(run: Manifest) -> dict[str, str]:
    """Digests of a run's results: of all files but the lock and the note of where the input was."""
    files = [p for p in run.path.rglob("*") if p.is_file() and p.name not in (".lock", "run.json")]
    return {p.relative_to(run.path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def series(*seeds: int) -> bytes:
    """A shard of these pictures, with keys and captions of one length, padded to one size."""
    members = [m for i, s in enumerate(seeds) for m in sample(f"{i:03}", encoded(picture(s, 160, 120)), f"no {s:04}")]
    return tar_of(members).ljust(80 * 512, b"\0")


SHARDS = {
    "part/00000.tar": series(0, 1, 2, 3),
    "part/00001.tar.gz": gzip.compress(series(4, 0, 5), mtime=7),
    "part/00002.tar": series(1, 6, 7),
}
PATIENT = Config.parse({"input": {"timeout": 2}})
SKIP = Config.parse({"input": {"timeout": 2, "on_bad_shard": "skip"}})


FILTERED = ["00000.tar", "00000_stats.json", "00001.tar.gz", "00001_stats.json"]


def serve(server: Server) -> list[str]:
    return [server.put(name, data) for name, data in SHARDS.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in SHARDS.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in" / "part"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A run on local files, to which every disturbed run over the network must come."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, data in SHARDS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return memfilter.run([str(folder / "part")], folder / "out", PATIENT, workers=1)


def test_the_manifest_names_each_shard_with_size_and_digest_of_its_stored_bytes(undisturbed: Manifest) -> None:
    found = {s["name"]: (s["bytes"], s["digest"]) for s in undisturbed.info["shards"]}
    assert found == {
        name.removeprefix("part/"): (len(data), xxhash.xxh3_128(data).hexdigest()) for name, data in SHARDS.items()
    }
    assert undisturbed.counts == {"read": 10, "keep": 8, "mask": 0, "drop": 2, "bad": 0}


def test_faults_that_go_away_leave_no_trace(server: Server, undisturbed: Manifest, tmp_path: Path) -> None:
    urls = serve(server)
    # the first request signs the shard, a later one filters it
    server.gets["part/00000.tar"] = iter([("end", 20_000), None, ("status", 500)])
    server.gets["part/00001.tar.gz"] = iter([("stall", 9_000)])
    server.gets["part/00002.tar"] = iter([("reset", 5_000), None, ("flip", 3_000)])
    run = memfilter.run(urls, tmp_path / "out", PATIENT, workers=2)
    assert [next(server.gets[name], "spent") for name in SHARDS] == ["spent"] * 3
    assert tree(run) == tree(undisturbed)
    assert memfilter.verify(run.path) == []


def test_the_deadline_is_the_configured_one_in_every_stage(server: Server, tmp_path: Path) -> None:
    urls = serve(server)
    server.gets["part/00000.tar"] = iter([("stall", 9_000), None, ("stall", 9_000)])
    start = time.monotonic()
    memfilter.run(urls, tmp_path / "out", Config.parse({"input": {"timeout": 0.5}}), workers=1)
    assert next(server.gets["part/00000.tar"], "spent") == "spent"
    assert time.monotonic() - start < 30


def test_a_pipe_gives_the_results_of_the_file(folder: Path, undisturbed: Manifest, tmp_path: Path) -> None:
    config = Config.parse({"input": {"timeout": 3, "allow_pipe": True}})
    run = memfilter.run([f"pipe:cat {p}" for p in sorted(folder.iterdir())], tmp_path / "out", config, workers=1)
    assert run.info["shards"] == undisturbed.info["shards"]


def test_bytes_that_come_otherwise_twice_are_a_changed_shard(server: Server, tmp_path: Path) -> None:
    urls = serve(server)
    server.gets["part/00002.tar"] = iter([None, ("flip", 3_000), ("flip", 3_001)])
    with pytest.raises(ShardError, match=r"^00002\.tar: has changed since it was read; run the same command again$"):
        memfilter.run(urls, tmp_path / "out", PATIENT, workers=1)
    assert sorted(p.name for p in (tmp_path / "out" / "shards").iterdir()) == FILTERED


GONE = "cannot be read: listed, then gone; fetch it again or pass on_bad_shard: skip"


@pytest.mark.parametrize("workers", [1, 2])
def test_remote_shards_that_vanish_after_the_listing_are_one_clear_line(
    server: Server, tmp_path: Path, workers: int
) -> None:
    urls = serve(server)
    for name in SHARDS:
        server.heads[name] = itertools.chain([None], itertools.repeat(("status", 404)))
        server.gets[name] = itertools.repeat(("status", 404))
    with pytest.raises(ShardError, match=rf"^0000\d\.tar(\.gz)?: {GONE}$"):
        memfilter.run(urls, tmp_path / "out", PATIENT, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_local_shard_that_vanishes_after_the_listing_is_one_clear_line(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    run_file, gone = tmp_path / "out" / "run.json", folder / "00002.tar"

    def remove() -> None:
        while not run_file.exists():  # it is written between listing and reading
            time.sleep(0.001)
        gone.unlink()

    threading.Thread(target=remove, daemon=True).start()
    # when this one is read, the other is gone
    first = f"pipe:while test -e {gone}; do sleep 0.01; done; cat {folder}/00000.tar"
    config = Config.parse({"input": {"allow_pipe": True}})
    with pytest.raises(ShardError, match=rf"^00002\.tar: {GONE}$"):
        memfilter.run([first, str(gone)], tmp_path / "out", config, workers=workers)


def test_shards_that_vanish_are_skipped_by_name_where_the_config_says_so(server: Server, tmp_path: Path) -> None:
    urls = serve(server)
    server.gets["part/00000.tar"] = itertools.repeat(("status", 404))
    run = memfilter.run(urls, tmp_path / "out", SKIP, workers=1)
    skipped = {s["name"]: s.get("skipped") for s in run.info["shards"]}
    gone = "00000.tar: cannot be read: listed, then gone"
    assert skipped == {"00000.tar": gone, "00001.tar.gz": None, "00002.tar": None}
    assert run.counts["read"] == 6
    assert memfilter.verify(run.path) == []


def test_a_shard_that_comes_back_with_its_old_size_is_joined_with_the_others(server: Server, tmp_path: Path) -> None:
    urls = serve(server)
    server.gets["part/00000.tar"] = iter([("status", 404)])
    first = memfilter.run(urls, tmp_path / "out", SKIP, workers=1)
    assert first.counts == {"read": 6, "keep": 6, "mask": 0, "drop": 0, "bad": 0}
    again = memfilter.run(urls, tmp_path / "out", SKIP, workers=1)
    assert tree(again) == tree(memfilter.run(urls, tmp_path / "fresh", SKIP, workers=1))


# -- input that changes between runs ----------------------------------------------------------------------------------


def test_a_shard_replaced_by_one_of_equal_size_and_keys_is_read_again(folder: Path, tmp_path: Path) -> None:
    memfilter.run([str(folder)], tmp_path / "out", workers=1)
    (folder / "00002.tar").write_bytes(series(2, 6, 8))
    again = memfilter.run([str(folder)], tmp_path / "out", workers=1)
    assert tree(again) == tree(memfilter.run([str(folder)], tmp_path / "fresh", workers=1))
    assert again.table(["action"])["action"].to_pylist().count("drop") == 2
    assert memfilter.verify(again.path) == []


def test_a_remote_shard_that_was_replaced_is_read_again(server: Server, tmp_path: Path) -> None:
    urls = serve(server)
    memfilter.run(urls, tmp_path / "out", workers=1)
    server.put("part/00002.tar", series(2, 6, 8))
    asked = Counter(path for method, path, _ in server.log if method == "GET")
    again = memfilter.run(urls, tmp_path / "out", workers=1)
    asked = Counter(path for method, path, _ in server.log if method == "GET") - asked
    assert (asked["part/00001.tar.gz"], asked["part/00002.tar"]) == (0, 2)
    assert tree(again) == tree(memfilter.run(urls, tmp_path / "fresh", workers=1))


def test_a_touched_shard_is_read_again_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    first = memfilter.run([str(folder)], tmp_path / "out", workers=1)
    before, signed = tree(first), (tmp_path / "out" / "signatures" / "00000.tar.parquet").stat().st_ino
    edges = (tmp_path / "out" / "edges" / "hash.parquet").stat().st_ino
    os.utime(folder / "00000.tar", (5, 5))
    again = memfilter.run([str(folder)], tmp_path / "out", workers=1)
    assert tree(again) == before
    assert (tmp_path / "out" / "signatures" / "00000.tar.parquet").stat().st_ino != signed
    assert (tmp_path / "out" / "edges" / "hash.parquet").stat().st_ino == edges


def test_a_shard_that_hides_its_change_is_noticed_before_it_is_filtered(folder: Path, tmp_path: Path) -> None:
    path = folder / "00002.tar"
    memfilter.run([str(folder)], tmp_path / "out", workers=1)
    stamp = path.stat()
    path.write_bytes(series(2, 6, 8))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for filtered in (tmp_path / "out" / "shards").glob("00002*"):
        filtered.unlink()
    with pytest.raises(ShardError, match=r"^00002\.tar: has changed since it was read; run the same command again$"):
        memfilter.run([str(folder)], tmp_path / "out", workers=1)
    assert sorted(p.name for p in (tmp_path / "out" / "shards").iterdir()) == [*FILTERED, "sizes.json"]
    again = memfilter.run([str(folder)], tmp_path / "out", workers=1)
    assert tree(again) == tree(memfilter.run([str(folder)], tmp_path / "fresh", workers=1))


def test_a_run_killed_while_it_forgets_what_changed_loses_nothing(folder: Path, tmp_path: Path) -> None:
    memfilter.run([str(folder)], tmp_path / "out", workers=1)
    (folder / "00002.tar").write_bytes(series(2, 6, 8))
    (tmp_path / "out" / "signatures" / "00002.tar.parquet").unlink()  # and run.json is still the old one
    again = memfilter.run([str(folder)], tmp_path / "out", workers=1)
    assert tree(again) == tree(memfilter.run([str(folder)], tmp_path / "fresh", workers=1))


# -- what stays broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_what_stays_broken_is_one_line_with_byte_attempts_and_cause(broken: dict[str, Future[Any]], name: str) -> None:
    expected = f"{re.escape(name)}: cannot be read: {BROKEN[name][1]}; fetch it again or pass on_bad_shard: skip"
    assert re.fullmatch(expected, message := broken[name].result()), message
    assert "127.0.0.1" not in message


def test_a_listing_that_stays_broken_is_one_line(broken: dict[str, Future[Any]]) -> None:
    with pytest.raises(InputError, match=r"^http://[^ ]*/unlisted\.tar: cannot be listed: \w+: HTTP status 503$"):
        broken["unlisted.tar"].result()
