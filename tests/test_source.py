from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset.tariterators
from conftest import write_tar
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tars import BLOCK, FORMATS, Entry, ended, header_places, mended, patched, special, tar_of

from memfilter.errors import ConfigError, InputError, ShardError
from memfilter.records import Shard
from memfilter.shards import check_side_cars, find_shards
from memfilter.source import Member, Members, open_shard, printable_key, sample_uid

NAME = "part/00000.tar"
KEYS = ["000", "001", "002"]
THREE = [(f"{key}.{suffix}", f"{key} {suffix} ".encode() * 25) for key in KEYS for suffix in ("jpg", "txt")]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    # pytest's own exception, because the reader turns an ordinary one into a ShardError
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of its own on fsspec's memory file system."""
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    fs, path = fsspec.core.url_to_fs(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def put(url: str, data: bytes = b"") -> str:
    with fsspec.open(url, "wb") as f:
        f.write(data)
    return url


def shard_at(folder: Path, data: bytes, name: str = "00000.tar") -> Shard:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Shard(name, str(path), len(data))


def names(found: tuple[list[Shard], str]) -> list[str]:
    return [shard.name for shard in found[0]]


def reader(data: bytes) -> Members:
    return Members(io.BytesIO(data), NAME)


def contents(members: Members) -> list[tuple[bytes, bytes]]:
    """Return name and data of what a plain extraction writes."""
    return [(m.name, m.read()) for m in members if m.supported and m.kind in (b"0", b"\0", b"7")]


def contents_by_tarfile(data: bytes) -> list[tuple[bytes, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            if info.isreg() and (file := tar.extractfile(info)):
                found.append((os.fsencode(info.name), file.read()))
    return found


def raw(members: Members) -> bytes:
    return b"".join(chunk for member in members for chunk in member.raw())


def indices(entries: list[Entry]) -> list[tuple[str, int]]:
    return [(m.name.decode(), m.index) for m in reader(tar_of(entries))]


def assert_refused(members: Members, because: str = "") -> None:
    with pytest.raises(ShardError) as caught:
        raw(members)
    assert_in_one_line(caught.value, members.name)
    assert because in str(caught.value)


def assert_in_one_line(error: ShardError, name: str) -> None:
    assert str(error).startswith(f"{name}: ")
    assert len(str(error).splitlines()) == 1


# -- finding shards ---------------------------------------------------------------------------------------------------


def test_braces_name_each_shard(tmp_path: Path) -> None:
    for i in range(4):
        write_tar(tmp_path / f"{i:05}.tar", [])
    shards, root = find_shards([f"{tmp_path}/{{00001..00003}}.tar"])
    assert [s.name for s in shards] == ["00001.tar", "00002.tar", "00003.tar"]
    assert root == str(tmp_path)
    assert [Path(s.url) for s in shards] == [tmp_path / s.name for s in shards]
    assert {s.size for s in shards} == {10240}


def test_a_glob_names_what_it_matches_in_order(tmp_path: Path) -> None:
    for name in ("b/1.tar", "a/2.tar", "a/1.tar", "a/1.json", "c/deep/1.tar"):
        write_tar(tmp_path / name, [])
    assert names(find_shards([f"{tmp_path}/*/*.tar"])) == ["a/1.tar", "a/2.tar", "b/1.tar"]
    assert names(find_shards([f"{tmp_path}/**/1.tar"])) == ["a/1.tar", "b/1.tar", "c/deep/1.tar"]


def test_a_folder_is_searched_to_its_depths_for_tars_alone(tmp_path: Path) -> None:
    for name in ("0.tar", "a/b/1.tar.gz", "a/2.tgz", "a/3.TAR", "a/3_stats.json", "a/4.tar.part", "tar"):
        write_tar(tmp_path / name, [])
    (tmp_path / "folder.tar").mkdir()
    found = find_shards([str(tmp_path)])
    assert names(found) == ["0.tar", "a/2.tgz", "a/3.TAR", "a/b/1.tar.gz"]
    assert found[1] == str(tmp_path)


def test_a_memory_url_names_one_shard(memory: str) -> None:
    put(f"{memory}/x.tar", tar_of(THREE))
    shards, _ = find_shards([f"{memory}/x.tar"])
    assert [(s.name, s.size) for s in shards] == [("x.tar", len(tar_of(THREE)))]
    with open_shard(shards[0]) as members:
        assert [(name.decode(), data) for name, data in contents(members)] == THREE


def test_memory_urls_take_braces_globs_and_folders(memory: str) -> None:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/0.json"):
        put(f"{memory}/{name}")
    assert names(find_shards([f"{memory}/a/{{0..1}}.tar"])) == ["0.tar", "1.tar"]
    assert names(find_shards([f"{memory}/*/0.tar"])) == ["a/0.tar", "b/0.tar"]
    assert names(find_shards([memory])) == ["a/0.tar", "a/1.tar", "b/0.tar"]


def test_the_root_is_the_deepest_common_folder(tmp_path: Path) -> None:
    for name in ("data/set/aa/0.tar", "data/set/ab/0.tar"):
        write_tar(tmp_path / name, [])
    shards, root = find_shards([f"{tmp_path}/data"])
    assert root == f"{tmp_path}/data/set"
    assert [s.name for s in shards] == ["aa/0.tar", "ab/0.tar"]


def test_the_root_of_one_shard_is_its_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/0.tar", [])
    shards, root = find_shards([f"{tmp_path}/a/0.tar"])
    assert (shards[0].name, root) == ("0.tar", f"{tmp_path}/a")


def test_shards_with_nothing_but_the_scheme_in_common_have_relative_names(memory: str) -> None:
    found = find_shards([put(f"{memory}-a/0.tar"), put(f"{memory}-b/0.tar")])
    bucket = memory.removeprefix("memory://")
    assert names(found) == [f"{bucket}-a/0.tar", f"{bucket}-b/0.tar"]


def test_a_given_root_names_the_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/b/0.tar", [])
    shards, root = find_shards([f"{tmp_path}/a/b"], root=f"{tmp_path}/")
    assert ([s.name for s in shards], root) == (["a/b/0.tar"], str(tmp_path))


def test_a_given_root_may_be_a_url(memory: str) -> None:
    put(f"{memory}/a/0.tar")
    assert names(find_shards([f"{memory}/a/*.tar"], root=memory)) == ["a/0.tar"]


def test_a_shard_outside_the_given_root_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "ab/0.tar", [])
    with pytest.raises(InputError, match="not below the input root"):
        find_shards([f"{tmp_path}/ab"], root=f"{tmp_path}/a")


def test_a_shard_given_twice_counts_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/0.tar", [])
    assert names(find_shards([str(tmp_path), f"{tmp_path}/a/../a/0.tar"])) == ["0.tar"]


def test_a_linked_shard_keeps_the_name_of_its_link(tmp_path: Path) -> None:
    # a hub's cache holds its files as links to blobs that are named by their digest
    write_tar(tmp_path / "blobs/5d41402a", [])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/00000.tar").symlink_to("../blobs/5d41402a")
    assert names(find_shards([f"{tmp_path}/snapshot"])) == ["00000.tar"]


def test_one_stem_for_two_shards_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    write_tar(tmp_path / "x.tar.gz", [], "w:gz")
    with pytest.raises(InputError, match=r"x\.tar.* and .*x\.tar"):
        find_shards([str(tmp_path)])


def test_one_relative_name_for_two_inputs_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(InputError, match=r"have the same name 'x\.tar'"):
        find_shards([f"{tmp_path}/x.tar", f"pipe:cat {tmp_path}/x.tar"], allow_pipe=True)


@pytest.mark.parametrize("pattern", ["missing", "missing.tar", "empty", "*.tar", "empty/{0..2}.tar", "{0.tar"])
def test_what_names_no_shard_is_refused_by_name(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/{pattern.split('{')[0]}")) as caught:
        find_shards([f"{tmp_path}/{pattern}"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("pattern", ["0.tar", "*.tar", ""])
def test_a_url_that_names_no_shard_is_refused_by_name(memory: str, pattern: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{memory}/{pattern}")) as caught:
        find_shards([f"{memory}/{pattern}"])
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match=r"^nowhere://x/0\.tar: "):
        find_shards(["nowhere://x/0.tar"])


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no shards given"):
        find_shards([])


# -- pipes ------------------------------------------------------------------------------------------------------------


def test_a_pipe_is_refused_unless_allowed_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow_pipe"):
        find_shards([f"pipe:touch {tmp_path}/ran; cat {tmp_path}/x.tar"])
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_read_when_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/x.tar", THREE)
    shards, root = find_shards([f"pipe:cat {tmp_path}/a/x.tar"], allow_pipe=True)
    assert [(s.name, s.size, root) for s in shards] == [("x.tar", None, f"{tmp_path}/a")]
    with open_shard(shards[0]) as members:
        assert [(name.decode(), data) for name, data in contents(members)] == THREE


def test_a_gzip_from_a_pipe_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", THREE)
    (shard,), _ = find_shards([f"pipe:gzip -c {tmp_path}/x.tar"], allow_pipe=True)
    with open_shard(shard) as members:
        assert members.compressed
        assert len(contents(members)) == len(THREE)


@pytest.mark.parametrize("command", ["cat {}; exit 3", "false {}; exit 3"])
def test_a_pipe_that_fails_is_refused_with_its_exit_code(tmp_path: Path, command: str) -> None:
    path = write_tar(tmp_path / "x.tar", THREE)
    shard = Shard("x.tar", "pipe:" + command.format(path), None)
    with pytest.raises(ShardError, match=r"^x\.tar: .*exit code 3"), open_shard(shard) as members:
        raw(members)


def test_a_pipe_without_a_tar_to_be_known_by_is_refused() -> None:
    with pytest.raises(InputError, match=r"names no \.tar"):
        find_shards(["pipe:cat data"], allow_pipe=True)


# -- members ----------------------------------------------------------------------------------------------------------


def awkward_names(format: str) -> list[str]:
    always = [
        "a.jpg",
        "Ünï/cödé 図.txt",
        "sp ace/b.c.JSON",
        "d" * 98 + ".e",
        "p/" * 60 + "long.jpg",
        "raw-\udcff\udcfe.bin",
    ]
    longer = ["f" * 101 + ".jpg", "g" * 300 + ".txt", "h/" * 400 + "é.json"]
    return always if format == "ustar" else always + longer


def awkward_tar(format: str) -> bytes:
    sizes = (0, 1, 511, 512, 513, 1500)
    entries: list[Entry] = [(special("folder", tarfile.DIRTYPE), b"")]
    entries += [(name, bytes([i + 1]) * sizes[i % 6]) for i, name in enumerate(awkward_names(format))]
    return tar_of([*entries, (special("links/z.jpg", tarfile.SYMTYPE, "a.jpg"), b"")], format)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_that_tarfile_reads(tmp_path: Path, format: str, compressed: bool) -> None:
    data = awkward_tar(format)
    with open_shard(shard_at(tmp_path, gzip.compress(data) if compressed else data)) as members:
        assert members.compressed == compressed
        assert contents(members) == contents_by_tarfile(data)
    assert [n for n, _ in contents_by_tarfile(data)] == [os.fsencode(n) for n in awkward_names(format)]


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax"])
def test_members_written_by_the_tar_command_are_those_that_tarfile_reads(tmp_path: Path, format: str) -> None:
    for name in ("a/0.jpg", "a/0.txt", "é.json", "a/" + "b" * 90 + ".txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 100)
    subprocess.run(["tar", f"--format={format}", "-C", tmp_path / "in", "-cf", tmp_path / "x.tar", "."], check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert contents(reader(data)) == contents_by_tarfile(data)
    assert ended(raw(reader(data))) == data


@pytest.mark.parametrize("format", FORMATS)
def test_the_raw_members_and_the_end_of_archive_are_the_input(format: str) -> None:
    data = awkward_tar(format)
    assert ended(raw(reader(data))) == data


def test_raw_members_hold_pax_headers_of_each_and_of_all() -> None:
    noted = special("a.jpg", tarfile.REGTYPE, comment="ünïcode", mtime="1.25")
    data = tar_of([(noted, b"x" * 700), ("a.txt", b"y")], set="0.1")
    members = [(m.name, m.is_global, b"".join(m.raw())) for m in reader(data)]
    assert [(name, is_global) for name, is_global, _ in members] == [(b"", True), (b"a.jpg", False), (b"a.txt", False)]
    assert b"set=0.1" in members[0][2]
    assert "comment=ünïcode".encode() in members[1][2]
    assert ended(b"".join(part for *_, part in members)) == data


def test_a_pax_size_overrides_the_header(tmp_path: Path) -> None:
    body = b"x" * 600
    data = tar_of([(special("a.jpg", tarfile.REGTYPE, size="600"), body), ("a.txt", b"y")])
    place = next(at for at in header_places(data) if data[at + 156 : at + 157] == b"0")
    data = mended(patched(data, place + 124, b"%011o\0" % 0), place)
    assert contents(reader(data)) == [(b"a.jpg", body), (b"a.txt", b"y")]


def test_a_size_in_base_256_is_read() -> None:
    data = patched(tar_of([("a.jpg", b"x" * 600)], "gnu"), 124, b"\x80" + (600).to_bytes(11, "big"))
    assert contents(reader(mended(data, 0))) == [(b"a.jpg", b"x" * 600)]


def test_a_signed_checksum_is_accepted() -> None:
    data = tar_of([("é.jpg", b"x")], "gnu")
    block = bytearray(data[:BLOCK])
    block[148:156] = b" " * 8
    signed = sum(b - 256 if b > 127 else b for b in block)
    assert contents(reader(patched(data, 148, b"%06o\0 " % signed))) == [("é.jpg".encode(), b"x")]


def test_a_gnu_header_has_no_prefix() -> None:
    # an incremental dump keeps two times where ustar keeps the first part of a long name
    data = mended(patched(tar_of([("a.jpg", b"x")], "gnu"), 345, b"14000000000\0" * 2), 0)
    assert contents(reader(data)) == [(b"a.jpg", b"x")]


def test_a_link_has_no_data_whatever_size_its_header_tells() -> None:
    entries: list[Entry] = [(special("b.jpg", tarfile.LNKTYPE, "a.jpg"), b""), ("c.jpg", b"c")]
    data = mended(patched(tar_of(entries), 124, b"%011o\0" % 600), 0)
    assert contents(reader(data)) == contents_by_tarfile(data) == [(b"c.jpg", b"c")]


class ShortReads(io.BytesIO):
    """Never gives more than three bytes at once."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(3 if size is None or size < 0 else min(3, size))


@pytest.mark.parametrize("format", FORMATS)
def test_streams_that_give_short_reads_are_read_whole(format: str) -> None:
    data = awkward_tar(format)
    assert raw(Members(ShortReads(data), NAME)) == raw(reader(data))  # type: ignore[arg-type]
    assert contents(Members(ShortReads(data), NAME)) == contents_by_tarfile(data)  # type: ignore[arg-type]


class OneBigMember:
    """A tar of one member of zeros that exists nowhere."""

    def __init__(self, size: int) -> None:
        info = tarfile.TarInfo("big.bin")
        info.size = size
        self.start, self.left = info.tobuf(), size + -size % BLOCK + 2 * BLOCK

    def read(self, size: int) -> bytes:
        if self.start:
            start, self.start = self.start[:size], self.start[size:]
            return start
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


@pytest.mark.parametrize("use", [lambda m: sum(len(chunk) for chunk in m.raw()), lambda m: BLOCK + m.size])
def test_a_big_member_is_streamed_or_passed_over_in_constant_memory(use: Callable[[Member], int]) -> None:
    size = 200 * 2**20
    tracemalloc.start()
    total = sum(use(member) for member in Members(OneBigMember(size), NAME))  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == BLOCK + size
    assert peak < 8 * 2**20


def test_a_member_that_is_read_in_part_does_not_shift_the_next() -> None:
    data = tar_of([("a.jpg", bytes(3 * 2**20)), ("b.jpg", b"b")])
    seen = []
    for member in reader(data):
        chunks = member.raw()
        next(chunks), next(chunks)
        seen.append(member.name)
    assert seen == [b"a.jpg", b"b.jpg"]


# -- samples ----------------------------------------------------------------------------------------------------------


def samples_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    own = {"__key__", "__url__", "__local_path__"}
    samples = webdataset.tariterators.tarfile_samples([{"url": str(path)}])
    return [(s["__key__"], {k: v for k, v in s.items() if k not in own}) for s in samples]


def samples_by_memfilter(members: Members) -> list[tuple[str, dict[str, bytes]]]:
    samples: dict[int, tuple[str, dict[str, bytes]]] = {}
    for member in members:
        if member.index >= 0:
            sample = samples.setdefault(member.index, (member.key.decode(), {}))
            sample[1][member.suffix] = member.read()
    assert list(samples) == list(range(members.samples))
    return list(samples.values())


NAMES = st.text("abB./_", min_size=1, max_size=7) | st.sampled_from(
    ["a.jpg", "a.JPG", "a.txt", "a.b.txt", "./a.json", "d.e/a.jpg", "__m__", "__m__/a.jpg", "__m__.jpg", "d/__m__.jpg"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.lists(NAMES, max_size=8))
@example(["a.jpg", "a.TXT", "b/c.d.e", "a.jpg", "__m__/a.jpg", "nodot", ".hidden", "d.e/nodot", "a.", "../a.b"])
def test_samples_are_those_that_webdataset_groups(tmp_path: Path, members: list[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [(name, f"{i} {name}".encode()) for i, name in enumerate(members)])
    try:
        expected = samples_by_webdataset(path)
    except ValueError:  # a suffix that comes back: webdataset gives up
        assume(False)
    with open_shard(Shard("x.tar", str(path), None)) as found:
        assert samples_by_memfilter(found) == expected


def test_a_key_ends_at_the_first_dot_of_the_base_name() -> None:
    (member,) = reader(tar_of([("v1.0/img.0001.JPG.Json", b"")]))
    assert (member.key, member.suffix) == (b"v1.0/img", "0001.jpg.json")


def test_a_suffix_that_comes_back_begins_the_next_occurrence() -> None:
    members: list[Entry] = [(n, b"") for n in ("a.jpg", "a.txt", "a.JPG", "a.json", "a.txt", "b.txt")]
    assert [index for _, index in indices(members)] == [0, 0, 1, 1, 1, 2]


def test_a_key_that_is_not_adjacent_is_a_new_occurrence() -> None:
    assert [i for _, i in indices([(n, b"") for n in ("a.jpg", "b.jpg", "a.txt", "b.txt")])] == [0, 1, 2, 3]


def test_members_of_no_sample_neither_count_nor_part_a_sample() -> None:
    entries: list[Entry] = [
        ("a.jpg", b""),
        (special("d.ir", tarfile.DIRTYPE), b""),
        ("README", b""),
        ("d.ir/LICENSE", b""),
        (".hidden", b""),
        ("__index__", b""),
        ("__meta__/a.jpg", b""),
        ("__meta.json__", b""),
        ("a.txt", b""),
        ("b.jpg", b""),
    ]
    assert [i for _, i in indices(entries)] == [0, -1, -1, -1, -1, -1, -1, -1, 0, 1]
    assert [m.key for m in reader(tar_of(entries)) if m.index < 0] == [b""] * 7


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"]
)
def test_what_is_no_file_is_part_of_its_sample_and_not_supported(kind: bytes) -> None:
    entries: list[Entry] = [("a.txt", b"t"), (special("a.jpg", kind, "other"), b""), ("b.jpg", b"b")]
    found = [(m.name, m.index, m.supported) for m in reader(tar_of(entries))]
    assert found == [(b"a.txt", 0, True), (b"a.jpg", 0, False), (b"b.jpg", 1, True)]


@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=pax", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_a_sparse_file_is_not_supported_and_copied_whole(tmp_path: Path, options: list[str]) -> None:
    with open(tmp_path / "a.jpg", "wb") as f:
        for i in range(60):  # more holes than one header block can list
            f.seek(i * 65536)
            f.write(b"x" * 4096)
        f.truncate(64 * 65536)
    (tmp_path / "b.jpg").write_bytes(b"b")
    subprocess.run(["tar", *options, "-S", "-C", tmp_path, "-cf", tmp_path / "x.tar", "a.jpg", "b.jpg"], check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert len(data) < 60 * 65536, "the file system stored no holes"
    assert [(m.name, m.supported) for m in reader(data)] == [(b"a.jpg", False), (b"b.jpg", True)]
    assert ended(raw(reader(data))) == data


def test_a_folder_is_a_folder_by_its_slash_alone() -> None:
    old = mended(patched(tar_of([("a.jpg/", b"")], "ustar"), 156, b"\0"), 0)
    assert [(m.kind, m.index) for m in reader(old)] == [(b"5", -1)]


# -- damage -----------------------------------------------------------------------------------------------------------

SMALL = tar_of(THREE)
END = len(raw(reader(SMALL))) + 2 * BLOCK
CUTS = range(0, len(SMALL), 128)


@pytest.mark.parametrize("cut", [c for c in CUTS if c < END])
def test_a_cut_tar_is_refused(tmp_path: Path, cut: int) -> None:
    with open_shard(shard_at(tmp_path, SMALL[:cut])) as members:
        assert_refused(members)


def test_a_tar_cut_in_its_trailing_padding_is_read_whole(tmp_path: Path) -> None:
    cuts = [c for c in CUTS if c >= END]
    assert cuts
    for cut in [END, END + 1, *cuts]:
        with open_shard(shard_at(tmp_path, SMALL[:cut])) as members:
            assert [(name.decode(), data) for name, data in contents(members)] == THREE


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_with_extension_headers_cut_anywhere_is_refused(format: str) -> None:
    data = awkward_tar(format)
    end = len(raw(reader(data))) + 2 * BLOCK
    for cut in [*range(0, end, 512), *range(1, end, 1021)]:
        assert_refused(reader(data[:cut]))


def test_a_cut_is_refused_to_one_who_reads_the_members(tmp_path: Path) -> None:
    for cut in range(0, END, 128):
        with pytest.raises(ShardError, match=f"^{NAME}: "):
            contents(reader(SMALL[:cut]))


def test_a_cut_names_the_byte_and_the_next_step() -> None:
    assert_refused(reader(SMALL[:600]), "ends inside a member at byte 600; fetch it again or pass on_bad_shard: skip")


def test_a_cut_gzip_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(SMALL, mtime=0)
    for cut in [*range(12), *range(12, len(data) - 9, 29), *range(len(data) - 9, len(data))]:
        with open_shard(shard_at(tmp_path, data[:cut])) as members:
            assert_refused(members)


def test_a_gzip_with_a_wrong_checksum_or_garbage_behind_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(SMALL, mtime=0)
    for damaged in (
        patched(data, len(data) - 8, b"\0\1\2\3"),
        data + b"garbage",
        patched(data, len(data) // 2, b"?" * 9),
    ):
        with open_shard(shard_at(tmp_path, damaged)) as members:
            assert_refused(members, "gzip")


def test_a_gzip_of_several_streams_is_read_whole(tmp_path: Path) -> None:
    data = gzip.compress(SMALL[:700]) + gzip.compress(SMALL[700:])
    with open_shard(shard_at(tmp_path, data)) as members:
        assert len(contents(members)) == len(THREE)


def test_a_missing_end_of_archive_is_refused() -> None:
    assert_refused(reader(SMALL[: END - 2 * BLOCK]), "without its end-of-archive")


def test_one_zero_block_is_no_end_of_archive() -> None:
    assert_refused(reader(SMALL[: END - BLOCK]), "end-of-archive")
    more = tar_of([("more.jpg", b"m")])
    assert_refused(reader(SMALL[: END - BLOCK] + more), "one zero block")


def test_data_after_the_end_of_archive_is_refused() -> None:
    assert_refused(reader(SMALL[:END] + tar_of([("more.jpg", b"m")])), "data after the end-of-archive")
    assert_refused(reader(SMALL + b"\n"), "data after the end-of-archive")


def test_an_archive_that_ends_after_an_extension_header_is_refused() -> None:
    data = tar_of([("é" * 80 + ".jpg", b"")])
    assert data[156:157] == b"x"
    assert_refused(reader(ended(data[: 2 * BLOCK])), "after an extension header")
    assert_refused(reader(data[: 2 * BLOCK]), "after an extension header")


@pytest.mark.parametrize("number", range(len(header_places(SMALL))))
def test_a_flipped_byte_in_a_header_is_refused(number: int) -> None:
    place = header_places(SMALL)[number]
    for offset in [*range(0, BLOCK, 7), *range(124, 158)]:
        at = place + offset
        assert_refused(reader(patched(SMALL, at, bytes([SMALL[at] ^ 255]))))


@pytest.mark.parametrize("flip", [1, 16, 128, 255])
def test_a_flipped_bit_in_the_fields_of_an_extension_header_is_refused(flip: int) -> None:
    data = tar_of([("é" * 80 + ".jpg", b"x")])
    for place in header_places(data):
        for offset in range(148):
            at = place + offset
            assert_refused(
                reader(patched(data, at, bytes([data[at] ^ flip]))), "damaged header" if place else "not a tar"
            )


@pytest.mark.parametrize("size", [b"-0000000017\0", b"0000000008x\0", b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_a_size_that_cannot_be_is_refused(size: bytes) -> None:
    assert_refused(reader(mended(patched(SMALL, 124, size), 0)))


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"12 path=a.jpg\n",
        b"99 path=a\n",
        b"0 path=a\n",
        b"x path=a\n",
        b"-9 path=a\n",
        b"9 path:a\n",
        b"9999999999 a=b\n",
    ],
)
def test_a_damaged_pax_header_is_refused(records: bytes) -> None:
    data = tar_of([(special("a.jpg", tarfile.REGTYPE, comment="c" * 40), b"x")])
    damaged = patched(data, BLOCK, (records or b"? ").ljust(20, b"?"))
    assert_refused(reader(damaged), "damaged pax header")


def test_a_pax_size_that_is_no_number_is_refused() -> None:
    data = tar_of([(special("a.jpg", tarfile.REGTYPE, size="1e3"), b"x")])
    assert_refused(reader(data), "pax size")


@pytest.mark.parametrize("digits", [21, 5000])
def test_a_pax_size_of_more_digits_than_any_file_has_bytes_is_refused(digits: int) -> None:
    data = tar_of([(special("a.jpg", tarfile.REGTYPE, size="9" * digits), b"x")])
    assert_refused(reader(data), "pax size of b'99999")


@pytest.mark.parametrize("size", [600 * 2**20, 2**63, 2**87])
def test_a_size_beyond_the_tar_is_refused_to_one_who_reads_without_the_memory_for_it(size: int) -> None:
    data = mended(patched(tar_of([("a.jpg", b"x" * 600)], "gnu"), 124, b"\x80" + size.to_bytes(11, "big")), 0)
    tracemalloc.start()
    with pytest.raises(ShardError, match="ends inside a member at byte 10,240"):
        contents(reader(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


@pytest.mark.parametrize("records", [{"path": "a.jpg"}, {"size": "1"}, {"GNU.sparse.size": "1"}])
def test_a_pax_header_that_renames_or_resizes_every_member_is_refused(records: dict[str, str]) -> None:
    assert_refused(reader(tar_of([("a.jpg", b"x")], **records)), "of every member")


def test_a_damaged_pax_header_for_all_members_is_refused() -> None:
    data = tar_of([("a.jpg", b"x")], comment="c" * 40)
    assert data[156:157] == b"g"
    assert_refused(reader(patched(data, BLOCK, b"9 comment:")), "damaged pax header")


@pytest.mark.parametrize("name", [b"/" * 1_000_000, b"a/" * 500_000, b"_" * 1_000_000, b"__" + b"a" * 1_000_000])
def test_a_name_of_a_million_bytes_is_taken_apart_in_passable_time(name: bytes) -> None:
    start = time.process_time()
    (member,) = reader(ended(raw_entry(b"L", name + b"\0") + raw_entry(b"0", b"")))
    assert (member.name, member.index) == (name, -1)
    assert time.process_time() - start < 3


def raw_entry(kind: bytes, data: bytes) -> bytes:
    info = special("x", kind)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def test_an_extension_header_beyond_measure_is_refused() -> None:
    info = special("pax", tarfile.XHDTYPE)
    info.size = 2**33 - 1
    assert_refused(reader(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)), "extension header of 8,589,934,591 bytes")


def test_extension_headers_without_end_are_refused_in_bounded_memory() -> None:
    info = special("long", tarfile.GNUTYPE_LONGNAME)
    info.size = 2**20
    data = (info.tobuf(tarfile.GNU_FORMAT) + b"n" * info.size) * 48 + tar_of([("a.jpg", b"x")])
    tracemalloc.start()
    assert_refused(reader(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


def test_a_pax_header_of_many_records_is_read_in_passable_time() -> None:
    info = special("pax", tarfile.XHDTYPE)
    records = b"5 a=\n" * 200_000
    info.size = len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK) + tar_of([("a.jpg", b"x")])
    start = time.process_time()
    assert contents(reader(data)) == [(b"a.jpg", b"x")]
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("data", "because"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\n", "is not a tar"),
        (b"\x1f\x8b", "gzip"),
        (b"a caption\n" * 10, "is not a tar"),
        (b"a caption\n" * 5000, "is not a tar"),
        (b"<!DOCTYPE html>\n<html>404</html>".ljust(2000), "is not a tar"),
        (gzip.compress(b"a caption\n" * 5000), "is not a tar"),
        (gzip.compress(b""), "is empty (0 bytes)"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes, because: str) -> None:
    with open_shard(shard_at(tmp_path, data)) as members:
        assert_refused(members, because)


def test_an_empty_archive_holds_no_member() -> None:
    assert contents(reader(tar_of([]))) == []


@pytest.mark.parametrize("url", ["gone.tar", "memory://gone/0.tar", "."])
def test_a_shard_that_cannot_be_opened_is_refused(tmp_path: Path, url: str) -> None:
    url = url if "://" in url else str(tmp_path / url)
    with (
        pytest.raises(ShardError, match=r"^00000\.tar: cannot be read: .") as caught,
        open_shard(Shard("00000.tar", url, 1)),
    ):
        pass
    assert len(str(caught.value).splitlines()) == 1


class Breaks(io.BytesIO):
    """Raises what a network file system might, at the second read."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise ConnectionResetError("the peer went\naway")
        return super().read(size)


def test_a_stream_that_breaks_is_refused_in_one_line() -> None:
    assert_refused(Members(Breaks(SMALL), NAME), "away")


class Short(io.BytesIO):
    """Stands for a machine that has no memory left."""

    def read(self, size: int | None = -1) -> bytes:
        raise MemoryError


def test_that_memory_is_short_is_no_fault_of_the_shard() -> None:
    with pytest.raises(MemoryError):
        raw(Members(Short(SMALL), NAME))


# -- fuzzing ----------------------------------------------------------------------------------------------------------


def drain(data: bytes, stream: Callable[[bytes], Members] = reader) -> None:
    """Read the tar: either a ShardError in one line, or every byte is accounted for."""
    members = stream(data)
    try:
        copied = raw(members)
    except ShardError as e:
        assert_in_one_line(e, NAME)
        return
    assert data.startswith(copied)
    assert not any(data[len(copied) :])
    assert len(data) - len(copied) >= 2 * BLOCK


MIXED = tar_of(
    [
        ("0.jpg", b"j" * 600),
        (special("folder", tarfile.DIRTYPE), b""),
        ("é" * 70 + ".txt", b"t" * 512),
        (special("0.jpg", tarfile.REGTYPE, comment="c"), b"k"),
        (special("1.jpg", tarfile.LNKTYPE, "0.jpg"), b""),
    ],
    set="s",
)
GNU = tar_of([("0.jpg", b"j"), ("n" * 300 + ".txt", b"t" * 600)], "gnu")
VALID = st.sampled_from([MIXED, GNU, SMALL])


@FUZZ
@given(data=st.binary(max_size=4 * BLOCK))
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    drain(data)
    drain(mended(data.ljust(BLOCK, b"\0"), 0) + bytes(2 * BLOCK))


@FUZZ
@given(data=VALID, random=st.data())
def test_random_edits_of_a_tar_are_refused_or_read(data: bytes, random: st.DataObject) -> None:
    for _ in range(random.draw(st.integers(1, 4))):
        at = random.draw(st.integers(0, len(data)))
        removed = random.draw(st.sampled_from([0, 1, 12, 511, BLOCK, 2 * BLOCK]))
        added = random.draw(st.binary(max_size=8) | st.sampled_from([bytes(BLOCK), data[:BLOCK], data[-BLOCK:]]))
        data = data[:at] + added + data[at + removed :]
    drain(data)


FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "kind": (156, 1),
    "magic": (257, 8),
    "sparse": (482, 1),
    "prefix": (345, 155),
}
SIZES = st.integers(0, 10_000).map(lambda n: b"%011o\0" % n)
VALUES = st.binary(min_size=1, max_size=12) | st.sampled_from([*b"01234567LKxgXSZ"]).map(lambda n: bytes([n])) | SIZES


@FUZZ
@given(data=VALID, random=st.data())
def test_headers_of_random_fields_and_right_checksums_are_refused_or_read(data: bytes, random: st.DataObject) -> None:
    places = header_places(data)
    for _ in range(random.draw(st.integers(1, 3))):
        place = random.draw(st.sampled_from(places))
        start, length = FIELDS[random.draw(st.sampled_from(sorted(FIELDS)))]
        data = mended(patched(data, place + start, random.draw(VALUES)[:length]), place)
    drain(data)


@FUZZ
@given(at=st.integers(0, 200), new=st.binary(min_size=1, max_size=12) | st.from_regex(rb"[0-9]{1,3} ?[a-z]*=?\n?"))
def test_random_pax_records_are_refused_or_read(at: int, new: bytes) -> None:
    pax = next(place for place in header_places(MIXED) if MIXED[place + 156 : place + 157] == b"x")
    drain(patched(MIXED, pax + BLOCK + at, new))


@FUZZ
@given(at=st.integers(0, 2000), new=st.binary(min_size=1, max_size=4))
def test_random_bytes_in_a_gzip_are_refused_or_read(at: int, new: bytes) -> None:
    data = gzip.compress(MIXED, mtime=0)
    damaged = patched(data, at % len(data), new)
    try:
        expected = raw(Members(gzip.GzipFile(fileobj=io.BytesIO(damaged)), NAME))  # type: ignore[arg-type]
    except ShardError:
        return
    # what passes gzip's own checksum is the tar that was packed
    assert expected == raw(reader(MIXED))


# -- side-cars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "00000.tgz"])
def test_a_stats_file_that_counts_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    shard = shard_at(tmp_path, SMALL, name)
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
    with pytest.raises(ShardError, match=rf"^{name}: holds 3 samples, 00000_stats\.json counts 4") as caught:
        check_side_cars(shard, KEYS)
    assert len(str(caught.value).splitlines()) == 1
    check_side_cars(shard, [*KEYS, "003"])


def test_a_stats_file_beside_a_url_is_asked(memory: str) -> None:
    put(f"{memory}/0_stats.json", json.dumps({"successes": 4}).encode())
    (shard,), _ = find_shards([put(f"{memory}/0.tar", SMALL)])
    check_side_cars(shard, [*KEYS, "003"])
    with pytest.raises(ShardError, match=r"^0\.tar: "):
        check_side_cars(shard, KEYS)


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "not json", "[3]", "[" * 99_999, '{"count": 9}'),
        *('{"successes": null}', '{"successes": true}', '{"successes": 3}'),
    ],
)
def test_no_stats_file_or_one_of_another_kind_passes(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "00000_stats.json").write_text(text)
    check_side_cars(shard_at(tmp_path, SMALL), KEYS)


def side_car(folder: Path, name: str = "00000.parquet", **columns: object) -> None:
    pq.write_table(pa.table(columns), folder / name)


FAILED = ["failed_to_download", "failed_to_resize"]
LISTED = {"key": ["002", "777", "000", "888", "001"], "status": ["success", FAILED[0], "success", FAILED[1], "success"]}


@pytest.mark.parametrize("type", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_parquet_that_lists_the_keys_in_any_order_among_failed_ones_passes(tmp_path: Path, type: pa.DataType) -> None:
    side_car(tmp_path, key=pa.array(LISTED["key"], type), status=pa.array(LISTED["status"], type))
    check_side_cars(shard_at(tmp_path, SMALL), KEYS)


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "a?b.tar", "a#b.tgz"])
def test_a_parquet_that_lists_other_keys_is_refused_with_their_number_and_the_first(tmp_path: Path, name: str) -> None:
    shard, stem = shard_at(tmp_path, SMALL, name), name.split(".")[0]
    side_car(tmp_path, f"{stem}.parquet", **LISTED)
    for keys, told in (
        (["000", "001"], "1 missing (first '002')"),
        ([*KEYS, "b", "777"], "2 extra (first '777')"),
        (["000", "a"], "2 missing (first '001'), 1 extra (first 'a')"),
    ):
        with pytest.raises(ShardError) as caught:
            check_side_cars(shard, keys)
        assert str(caught.value) == (
            f"{name}: its keys are not those that {stem}.parquet lists as success: {told}; "
            "fetch it again or pass on_bad_shard: skip"
        )
    check_side_cars(shard, KEYS)


def test_a_parquet_beside_a_url_is_asked(memory: str, tmp_path: Path) -> None:
    side_car(tmp_path, **LISTED)
    put(f"{memory}/0.parquet", (tmp_path / "00000.parquet").read_bytes())
    (shard,), _ = find_shards([put(f"{memory}/0.tar", SMALL)])
    check_side_cars(shard, KEYS)
    with pytest.raises(ShardError, match=r"^0\.tar: its keys are .*: 1 missing"):
        check_side_cars(shard, KEYS[:2])


@pytest.mark.parametrize(
    "columns",
    [{"key": ["a"]}, {"status": ["success"]}, {"key": [1], "status": ["success"]}, {"key": ["a"], "status": [1.5]}],
)
def test_a_parquet_of_other_columns_is_nothing_to_check_against(tmp_path: Path, columns: dict[str, object]) -> None:
    side_car(tmp_path, **columns)
    check_side_cars(shard_at(tmp_path, SMALL), KEYS)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-9], lambda d: d[:40] + b"?" * 30 + d[70:]])
def test_a_damaged_parquet_is_nothing_to_check_against(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    side_car(tmp_path, key=["other"], status=["success"])
    path = tmp_path / "00000.parquet"
    with pytest.raises(ShardError):
        check_side_cars(shard_at(tmp_path, SMALL), KEYS)
    path.write_bytes(damage(path.read_bytes()))
    check_side_cars(shard_at(tmp_path, SMALL), KEYS)


# -- identity ---------------------------------------------------------------------------------------------------------


def test_a_uid_is_the_digest_of_length_prefixed_shard_and_key() -> None:
    packed = b"\0\0\0\0\0\0\0\x09" + b"00000.tar" + b"\0\0\0\0\0\0\0\x03" + b"007"
    assert sample_uid("00000.tar", b"007") == hashlib.blake2b(packed, digest_size=16).digest()
    assert sample_uid("00000.tar", b"007").hex() == "c72fb42f614ec8a0fa8ec2f15b24f11e"


def test_uids_tell_where_the_shard_ends_and_the_key_begins() -> None:
    assert sample_uid("a", b"bc") != sample_uid("ab", b"c")


def test_a_uid_takes_names_that_are_not_utf_8() -> None:
    packed = b"\0\0\0\0\0\0\0\x01" + b"\xff" + b"\0\0\0\0\0\0\0\x01" + b"\xfe"
    assert sample_uid(os.fsdecode(b"\xff"), b"\xfe") == hashlib.blake2b(packed, digest_size=16).digest()


def test_a_key_is_printed_as_it_is_or_escaped() -> None:
    assert printable_key("été/図".encode()) == "été/図"
    assert printable_key(b"a\xffb\xc3") == r"a\xffb\xc3"
