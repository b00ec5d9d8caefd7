from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset.tariterators
from conftest import encoded, picture, sample
from tars import BLOCK, FORMATS, Entry, ended, spans, special, tar_of

from memfilter.config import Config
from memfilter.errors import ShardError
from memfilter.records import Shard
from memfilter.signatures import sign
from memfilter.sink import is_written, kept_digest, marker, read_marker, remove_shard, write_shard, write_sizes

CONFIG = Config.parse({"images": {"encoder": None}})


Change = Callable[[list[Entry]], list[Entry]]


class Signed:
    """A shard in a folder of its own, with its signatures."""

    def __init__(self, folder: Path, data: bytes, name: str = "part/00000.tar") -> None:
        self.path = folder / "in" / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(data)
        self.shard = Shard(name, str(self.path), len(data))
        self.signatures = folder / "signatures" / f"{name}.parquet"
        self.samples = sign(self.shard, self.signatures, CONFIG).samples
        self.out = folder / "out"
        self.tar, self.marker = self.out / name, marker(self.out, name)

    def write(self, kept: Iterable[int], held: list[int] | None = None) -> None:
        standing = None if held is None else np.array(held)
        indices = np.array(list(kept), np.int64)
        write_shard(self.shard, self.out, self.signatures, indices, "digest", held=standing)

    def filtered(self, kept: Iterable[int]) -> bytes:
        self.write(kept)
        return self.tar.read_bytes()


def pictures(count: int = 4) -> list[Entry]:
    entries: list[Entry] = []
    for i in range(count):
        entries += sample(f"{i:03}", encoded(picture(i)), f"caption {i}", json=b"{}")
    return entries


def awkward() -> list[Entry]:
    """Four samples of six members that need extension headers, and members of no sample among them."""
    noted = special("a/000.jpg", tarfile.REGTYPE, comment="ünïcode", mtime="1234567890.125")
    noted.uid, noted.mode, noted.uname = 3_000_000, 0o600, "née"
    return [
        (special("a", tarfile.DIRTYPE), b""),
        (noted, b"j" * 700),
        ("a/000.txt", b"zero"),
        ("a/" + "é" * 120 + ".txt", b"one"),
        ("README", b"of no sample"),
        ("a/002.jpg", b""),
        (special("a/002.txt", tarfile.LNKTYPE, "a/000.txt"), b""),
        ("a/003.bin", b"b" * 512),
    ]


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_keeping_all_gives_the_same_file(tmp_path: Path, format: str) -> None:
    data = tar_of(pictures(), format)
    signed = Signed(tmp_path, data)
    assert signed.samples == 4
    signed.write(range(4))
    assert signed.tar.read_bytes() == data


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("kept", [[0], [1], [2, 3], [0, 1, 2, 3], [3, 0]])
def test_kept_samples_are_copied_raw_with_their_extension_headers(tmp_path: Path, format: str, kept: list[int]) -> None:
    data = tar_of(awkward(), format)
    part = spans(data)
    long = "a/" + "é" * 120 + ".txt"
    of_sample = [["a/000.jpg", "a/000.txt"], [long], ["a/002.jpg", "a/002.txt"], ["a/003.bin"]]
    expected = b"".join(part[name] for index in sorted(kept) for name in of_sample[index])
    assert Signed(tmp_path, data).filtered(kept) == ended(expected)


def test_pax_global_headers_stay(tmp_path: Path) -> None:
    data = tar_of(pictures(), set="LAION", version="1")
    start = 2 * BLOCK  # the global header and its one block of records
    assert data[156:157] == b"g"
    assert b"set=LAION" in data[BLOCK:start]
    part = spans(data)
    kept = b"".join(part[f"002.{suffix}"] for suffix in ("jpg", "txt", "json"))
    assert Signed(tmp_path, data).filtered([2]) == ended(data[:start] + kept)


def test_the_filtered_shard_reads_back_as_the_kept_samples(tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    signed.write([1, 3])
    samples = list(webdataset.tariterators.tarfile_samples([{"url": str(signed.tar)}]))
    assert [s["__key__"] for s in samples] == ["001", "003"]
    assert [s["jpg"] for s in samples] == [encoded(picture(1)), encoded(picture(3))]
    assert [s["txt"] for s in samples] == [b"caption 1", b"caption 3"]


IN = "8db66907aa2825e55f15b7d26a8f5ef94487e24fb478d3ae58f45bdbb2374eda"
OUT = "d7f8a7387e259385e08f48266a7c3d41ed19531b7df422859ceb0b98710f270e"


def test_the_bytes_of_a_filtered_shard_are_fixed(tmp_path: Path) -> None:
    data = tar_of(awkward(), set="0.1")
    assert hashlib.sha256(data).hexdigest() == IN, "tarfile writes the input otherwise"
    assert hashlib.sha256(Signed(tmp_path, data).filtered([0, 2])).hexdigest() == OUT


# -- gzip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["00000.tar.gz", "00000.tgz", "00000.tar"])
def test_a_gzip_shard_stays_one_whatever_its_name(tmp_path: Path, name: str) -> None:
    data = tar_of(pictures())
    signed = Signed(tmp_path, gzip.compress(data), name)
    filtered = signed.filtered(range(4))
    assert gzip.decompress(filtered) == data
    assert signed.marker.name == "00000_stats.json"


def test_a_gzip_shard_depends_on_the_kept_samples_alone(tmp_path: Path) -> None:
    data = tar_of(pictures())
    first = Signed(tmp_path / "1", gzip.compress(data, compresslevel=1, mtime=1), "a.tar.gz").filtered([0, 2])
    second = Signed(tmp_path / "2", gzip.compress(data, compresslevel=9, mtime=2), "b/c.tgz").filtered([0, 2])
    assert first == second
    flags, mtime = first[3], first[4:8]
    assert (flags, mtime) == (0, bytes(4)), "a file name or the clock is in the gzip header"


# -- what is left behind ----------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_keeping_none_leaves_no_tar_and_no_marker(tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    signed.write([0])
    assert files(signed.out) == ["part/00000.tar", "part/00000_stats.json"]
    signed.write([])
    assert files(signed.out) == []


def test_the_marker_counts_and_identifies_the_tar(tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    data = signed.filtered([0, 3])
    assert json.loads(signed.marker.read_text()) == {
        "count": 2,
        "successes": 2,
        "bytes": len(data),
        "digest": hashlib.blake2b(data, digest_size=16).hexdigest(),
        "kept": "digest",
    }


def test_a_shard_is_written_when_its_marker_and_size_say_so(tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    assert not is_written(signed.shard, signed.out, "digest")
    data = signed.filtered([0])
    assert is_written(signed.shard, signed.out, "digest")
    assert not is_written(signed.shard, signed.out, "another")
    signed.tar.write_bytes(data[:-BLOCK])
    assert not is_written(signed.shard, signed.out, "digest")
    signed.tar.unlink()
    assert not is_written(signed.shard, signed.out, "digest")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"kept": "digest"}'])
def test_a_damaged_marker_is_none(tmp_path: Path, text: str) -> None:
    signed = Signed(tmp_path, tar_of(pictures(1)))
    signed.write([0])
    signed.marker.write_text(text)
    assert not is_written(signed.shard, signed.out, "digest")


def test_what_is_kept_shapes_the_digest() -> None:
    shard = Shard("0.tar", "elsewhere/0.tar", 1)
    kept = np.array([1, 2])
    digest = kept_digest(shard, "s", kept)
    assert digest == kept_digest(Shard("0.tar", "/moved/0.tar", None), "s", kept)
    others = [
        kept_digest(Shard("1.tar", shard.url, 1), "s", kept),
        kept_digest(shard, "t", kept),
        kept_digest(shard, "s", np.array([1])),
    ]
    assert len({digest, *others}) == 4


# -- a source that changed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: [*entries, ("004.jpg", b"more")],
        lambda entries: entries[:-3],
        lambda entries: [("000x.jpg", b"renamed"), *entries[3:]],
        lambda entries: entries[3:] + entries[:3],
        lambda entries: [],
    ],
    ids=["a sample more", "a sample less", "a sample renamed", "another order", "emptied"],
)
def test_a_source_that_changed_since_it_was_signed_is_refused(
    tmp_path: Path, change: Callable[[list[Entry]], list[Entry]]
) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    before = signed.filtered([0])
    signed.path.write_bytes(tar_of(change(pictures())))
    with pytest.raises(ShardError, match=r"^part/00000\.tar: has changed") as caught:
        signed.write([0, 1])
    assert len(str(caught.value).splitlines()) == 1
    assert files(signed.out) == ["part/00000.tar", "part/00000_stats.json"]
    assert signed.tar.read_bytes() == before
    assert is_written(signed.shard, signed.out, "digest")


@pytest.mark.parametrize("place", ["start", "header", "member", "end-of-archive"])
def test_a_source_that_was_cut_since_it_was_signed_leaves_nothing(tmp_path: Path, place: str) -> None:
    data = tar_of(pictures())
    body = len(b"".join(spans(data).values()))
    signed = Signed(tmp_path, data)
    signed.path.write_bytes(data[: {"start": 0, "header": 100, "member": 700, "end-of-archive": body + BLOCK}[place]])
    with pytest.raises(ShardError, match=r"^part/00000\.tar: "):
        signed.write([0])
    assert files(signed.out) == []


def test_a_source_that_is_gone_is_refused(tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures(1)))
    signed.path.unlink()
    with pytest.raises(ShardError, match=r"^part/00000\.tar: cannot be read"):
        signed.write([0])
    assert files(signed.out) == []


# -- sizes ------------------------------------------------------------------------------------------------------------


def sizes(folder: Path) -> object:
    return json.loads((folder / "sizes.json").read_text())


def test_each_folder_gets_its_sizes(tmp_path: Path) -> None:
    write_sizes(tmp_path, {"0.tar": 3, "a/0.tar": 1, "a/1.tar.gz": 2})
    assert sizes(tmp_path) == {"0.tar": 3}
    assert sizes(tmp_path / "a") == {"0.tar": 1, "1.tar.gz": 2}
    assert files(tmp_path) == ["a/sizes.json", "sizes.json"]


def test_sizes_that_are_right_are_not_written_again(tmp_path: Path) -> None:
    write_sizes(tmp_path, {"0.tar": 3})
    before = (tmp_path / "sizes.json").stat()
    write_sizes(tmp_path, {"0.tar": 3})
    assert (tmp_path / "sizes.json").stat().st_ino == before.st_ino
    write_sizes(tmp_path, {"0.tar": 4})
    assert sizes(tmp_path) == {"0.tar": 4}


def test_sizes_of_earlier_shards_go_once_none_of_these_is_there(tmp_path: Path) -> None:
    earlier = {"a/0.tar": 1, "b/1.tar": 1, "b/2.tar": 1, "c/3.tar": 1}
    write_sizes(tmp_path, earlier)
    (tmp_path / "b" / "2.tar").write_text("still here")
    (tmp_path / "c" / "sizes.json").write_text('{"3.tar": 1, "mine.tar": 7}')
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "sizes.json").write_text('{"mine.tar": 7}')
    write_sizes(tmp_path, {}, earlier)
    assert files(tmp_path) == ["b/2.tar", "b/sizes.json", "c/sizes.json", "d/sizes.json"]
    (tmp_path / "b" / "2.tar").unlink()
    write_sizes(tmp_path, {}, earlier)
    assert files(tmp_path) == ["c/sizes.json", "d/sizes.json"]


def test_a_plain_shard_keeps_the_marker_that_a_gzip_one_of_its_stem_had(tmp_path: Path) -> None:
    for name in ("0.tar", "0.tar.gz", "0_stats.json"):
        (tmp_path / name).write_text("{}")
    remove_shard(tmp_path, "0.tar.gz", {marker(tmp_path, "0.tar")})
    assert files(tmp_path) == ["0.tar", "0_stats.json"]


# -- from the shard that stands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_shard_of_fewer_samples_is_made_from_the_one_that_stands_with_the_same_bytes(
    compressed: bool, tmp_path: Path
) -> None:
    data = tar_of(awkward(), set="0.1")
    data = gzip.compress(data) if compressed else data
    from_input = Signed(tmp_path / "1", data).filtered([0, 3])
    signed = Signed(tmp_path / "2", data)
    signed.write([0, 1, 3])
    signed.path.unlink()
    signed.write([0, 3], held=[0, 1, 3])
    assert signed.tar.read_bytes() == from_input
    signed.tar.write_bytes(from_input[:-1] + b"x")
    with pytest.raises(ShardError, match=r"^part/00000\.tar: cannot be read"):
        signed.write([0], held=[0, 3])


@pytest.mark.parametrize("replaced", [False, True])
def test_what_a_killed_call_left_in_doubt_is_settled_by_the_shard_itself(replaced: bool, tmp_path: Path) -> None:
    signed = Signed(tmp_path, tar_of(pictures()))
    old = signed.filtered([0, 1])
    before = json.loads(signed.marker.read_text())
    write_shard(signed.shard, signed.out, signed.signatures, np.array([0, 2]), "other")
    after, new = json.loads(signed.marker.read_text()), signed.tar.read_bytes()
    assert len(old) == len(new)
    signed.marker.write_text(json.dumps({**after, "was": before}))
    signed.tar.write_bytes(new if replaced else old)
    assert is_written(signed.shard, signed.out, "other") is replaced
    assert is_written(signed.shard, signed.out, "digest") is not replaced
    assert json.loads(signed.marker.read_text()) == (after if replaced else before)
    signed.marker.write_text(json.dumps({**after, "was": before}))
    signed.tar.write_bytes(bytes(len(old)))
    assert read_marker(signed.out, signed.shard.name) == {"kept": "other"}
    signed.marker.write_text(json.dumps({**before, "was": {"kept": "other"}}))  # killed once more
    assert read_marker(signed.out, signed.shard.name) == {"kept": "digest"}
    assert not is_written(signed.shard, signed.out, "other")
