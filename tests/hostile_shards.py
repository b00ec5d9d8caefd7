"""Whole shards that are malformed or odd, and side-cars that disagree, by kind."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
from hostile import (
    MAX_BYTES,
    SHARDS,
    Random,
    Rows,
    Whole,
    between,
    block,
    long_name,
    member,
    one_of,
    pax,
    photo,
    seed_of,
)
from tars import BLOCK, ended, header_places, mended, patched

Make = Callable[[Random], Whole]


def shard_kind(make: Make) -> Make:
    """Enter a function as a kind of shards."""
    SHARDS[make.__name__] = make
    return make


def keys_of(random: Random, low: int = 2, high: int = 4) -> list[str]:
    start = between(random, 0, 9999)
    return [f"{start + i:09}" for i in range(between(random, low, high))]


def body(random: Random, keys: list[str]) -> bytes:
    """Return the members of good samples, one with extension headers."""
    parts = []
    for key in keys:
        parts.append(member(f"{key}.jpg", photo(random)))
        head = one_of(random, [b"", pax(comment="ü" * between(random, 1, 400)), long_name(f"{key}.txt".encode())])
        parts.append(head + member(f"{key}.txt", f"a caption, {seed_of(random)}".encode()))
    return b"".join(parts)


def good(keys: list[str]) -> Rows:
    return [(key, "good") for key in keys]


def tar(random: Random) -> bytes:
    """Return a good tar, trailing padding and all."""
    return ended(body(random, keys_of(random)))


# -- cut and spliced --------------------------------------------------------------------------------------------------


def places(data: bytes) -> tuple[list[int], int]:
    """Return where each header stands, and where the end-of-archive begins."""
    heads = header_places(data)
    last = heads[-1]
    size = int(data[last + 124 : last + 135], 8)
    return heads, last + BLOCK + size + -size % BLOCK


@shard_kind
def cut_between_members(random: Random) -> Whole:
    data = tar(random)
    heads, end = places(data)
    ends = [at for at in [*heads[1:], end] if data[at - BLOCK :][:1] and not _after_extension(data, heads, at)]
    return Whole(data[: one_of(random, ends)], "ends without its end-of-archive at byte ")


def _after_extension(data: bytes, heads: list[int], at: int) -> bool:
    before = max(head for head in heads if head < at)
    return data[before + 156 : before + 157] in b"xL"


@shard_kind
def cut_behind_an_extension_header(random: Random) -> Whole:
    data = body(random, keys_of(random)) + pax(comment="c" * between(random, 1, 2000))
    return Whole(data, "ends after an extension header at byte ")


@shard_kind
def cut_at_a_block_boundary(random: Random) -> Whole:
    data = tar(random)
    _, end = places(data)
    return Whole(data[: BLOCK * between(random, 1, end // BLOCK + 1)], ": ends ")


@shard_kind
def cut_inside_a_header(random: Random) -> Whole:
    data = tar(random)
    return Whole(
        data[: one_of(random, places(data)[0][1:]) + between(random, 1, BLOCK - 1)], "ends inside a header at byte "
    )


@shard_kind
def cut_inside_a_member(random: Random) -> Whole:
    data = tar(random)
    at = data.index(b"\xff\xd8\xff") if random.random() < 0.5 else data.rindex(b"\xff\xd8\xff")
    return Whole(data[: at + between(random, 0, 500)], "ends inside a member at byte ")


@shard_kind
def cut_inside_padding(random: Random) -> Whole:
    data = body(random, keys_of(random)) + member("last.txt", b"a" * between(random, 1, 500))
    return Whole(data[: -between(random, 1, 11)], "ends inside a member at byte ")


@shard_kind
def cut_inside_an_extension_header(random: Random) -> Whole:
    data = body(random, keys_of(random)) + pax(comment="c" * 700)
    return Whole(data[: -between(random, 1, 2 * BLOCK - 1)], "ends inside an extension header at byte ")


@shard_kind
def cut_inside_the_end_of_archive(random: Random) -> Whole:
    data = body(random, keys_of(random)) + bytes(BLOCK + between(random, 0, BLOCK - 1))
    return Whole(data, "ends inside its end-of-archive at byte ")


@shard_kind
def cut_in_the_first_block(random: Random) -> Whole:
    return Whole(tar(random)[: between(random, 1, BLOCK - 1)], "is not a tar at byte ")


@shard_kind
def cut_in_its_trailing_padding(random: Random) -> Whole:
    keys = keys_of(random)
    data = body(random, keys)
    return Whole(data + bytes(2 * BLOCK + between(random, 0, 9000)), rows=good(keys))


@shard_kind
def spliced_off_the_blocks(random: Random) -> Whole:
    head, tail = tar(random), tar(random)
    at = BLOCK * between(random, 2, 6) + between(random, 1, BLOCK - 1)
    return Whole(head[:at] + tail[BLOCK * between(random, 0, 4) :], "")


@shard_kind
def spliced_inside_a_member(random: Random) -> Whole:
    # the rest of the member swallows the header that follows, and data stand where a header is looked for
    data = b"j" * BLOCK * between(random, 6, 9)
    head = body(random, keys_of(random)) + member("cut.jpg", data)[: BLOCK * between(random, 4, 5)]
    return Whole(head + ended(member("tail.jpg", b"k" * BLOCK * 30)), "a damaged header at byte ")


@shard_kind
def spliced_between_members_with_stats(random: Random) -> Whole:
    first, second = keys_of(random, 2, 4), [f"b{key}" for key in keys_of(random, 2, 4)]
    data = body(random, first) + ended(body(random, second))
    stats = {"count": 9, "successes": len(first + second) + one_of(random, [-1, 1, 7]), "failed_to_download": 2}
    told = f"holds {len(first + second)} samples, "
    return Whole(data, told, side_cars={"_stats.json": json.dumps(stats).encode()})


@shard_kind
def concatenated(random: Random) -> Whole:
    return Whole(tar(random) + tar(random), "data after the end-of-archive at byte ")


@shard_kind
def garbage_after_the_end(random: Random) -> Whole:
    return Whole(tar(random) + one_of(random, [b"\n", b"x", random.bytes(999) + b"x"]), "data after the end-of-archive")


@shard_kind
def more_after_one_zero_block(random: Random) -> Whole:
    data = body(random, keys_of(random)) + bytes(BLOCK) + tar(random)
    return Whole(data, "the archive ends with one zero block instead of two at byte ")


@shard_kind
def blocks_lost(random: Random) -> Whole:
    data = body(random, keys_of(random)) + member("long.bin", b"j" * BLOCK * 20)
    heads = header_places(data)
    at = heads[-1] + BLOCK * between(random, 1, 5)
    after = member("after.bin", b"k" * BLOCK * 20)
    return Whole(ended(data[:at] + data[at + BLOCK * between(random, 1, 5) :] + after), "a damaged header at byte ")


# -- damaged headers --------------------------------------------------------------------------------------------------


@shard_kind
def header_byte_flipped(random: Random) -> Whole:
    data = tar(random)
    at = one_of(random, places(data)[0]) + between(random, 0, 147)
    flipped = patched(data, at, bytes([data[at] ^ between(random, 1, 255)]))
    return Whole(flipped, "a damaged header at byte " if at >= BLOCK else "is not a tar: no header at byte ")


@shard_kind
def header_checksum_wrong(random: Random) -> Whole:
    data = tar(random)
    at = one_of(random, places(data)[0][1:])
    wrong = one_of(random, [b"%06o\0 " % between(random, 0, 999), b"garbage!", b"\xff" * 8, bytes(8), b"-00001\0 "])
    return Whole(patched(data, at + 148, wrong), "a damaged header at byte ")


def with_size(random: Random, size: bytes) -> bytes:
    data = tar(random)
    at = one_of(random, [h for h in places(data)[0] if data[h + 156 : h + 157] == b"0"])
    return mended(patched(data, at + 124, size.ljust(12, b"\0")), at)


@shard_kind
def size_negative_or_no_number(random: Random) -> Whole:
    sizes = [b"-%010o" % between(random, 1, 999), b"\xff" * 12, b"0000000008x", b"9" * 11, b"\xfe" + random.bytes(11)]
    return Whole(with_size(random, one_of(random, sizes)), "a header with size b")


@shard_kind
def size_beyond_the_file(random: Random) -> Whole:
    return Whole(with_size(random, b"%011o" % between(random, 30_000, 8**11 - 1)), "ends inside a member at byte ")


@shard_kind
def size_that_overflows(random: Random) -> Whole:
    size = b"\x80" + (2 ** between(random, 40, 87) - between(random, 0, 1)).to_bytes(11, "big")
    return Whole(with_size(random, size), "ends inside a member at byte ")


@shard_kind
def size_a_little_wrong(random: Random) -> Whole:
    data = body(random, keys_of(random)) + block("a.jpg", BLOCK * (5 - between(random, 1, 4))) + b"j" * BLOCK * 5
    return Whole(ended(data), "a damaged header at byte ")


@shard_kind
def pax_size_that_cannot_be(random: Random) -> Whole:
    size = one_of(random, ["9" * between(random, 21, 9000), "1e3", "-5", "", "0x10", "٣"])
    return Whole(ended(body(random, keys_of(random)) + pax(size=size) + member("a.jpg", b"x")), "a pax size of b")


@shard_kind
def pax_size_beyond_the_file(random: Random) -> Whole:
    data = pax(size=str(10 ** between(random, 6, 19) + between(random, 0, 9999))) + member("a.jpg", b"x")
    return Whole(ended(body(random, keys_of(random)) + data), "ends inside a member at byte ")


@shard_kind
def pax_records_damaged(random: Random) -> Whole:
    records = [
        b"12 path=a.jpg\n",
        b"99 path=a\n",
        b"0 path=a\n",
        b"x path=a\n",
        b"-9 path=a\n",
        b"9 path:a\n",
        b"9999999999 a=b\n",
    ]
    damaged = member("pax", one_of(random, records) + random.bytes(9), one_of(random, [b"x", b"g"]))
    return Whole(
        ended(body(random, keys_of(random)) + damaged + member("a.jpg", b"x")), "a damaged pax header at byte "
    )


@shard_kind
def pax_header_for_all_that_renames(random: Random) -> Whole:
    records = one_of(random, [{"path": "a.jpg"}, {"size": "9"}, {"GNU__sparse__size": "9"}])
    return Whole(ended(pax(b"g", **records) + body(random, keys_of(random))), "a pax header that sets b")


@shard_kind
def extension_header_beyond_measure(random: Random) -> Whole:
    head = block("pax", between(random, (1 << 20) + 1, 8**11 - 1), one_of(random, [b"x", b"g", b"L", b"K"]))
    return Whole(body(random, keys_of(random)) + head + bytes(4096), "an extension header of ")


@shard_kind
def extension_headers_without_end(random: Random) -> Whole:
    head = member("long", b"n" * (1 << 20), b"L") * between(random, 5, 9)
    return Whole(body(random, keys_of(random)) + head, "extension headers of ")


@shard_kind
def sparse_headers_without_end(random: Random) -> Whole:
    head = mended(patched(block("a.jpg", 0, b"S"), 482, b"\1"), 0) + (bytes(504) + b"\1" + bytes(7)) * 9000
    return Whole(ended(body(random, keys_of(random)) + head), "sparse headers of ")


@shard_kind
def archive_ends_behind_an_extension_header(random: Random) -> Whole:
    head = one_of(random, [pax(path="a.jpg"), long_name(b"a.jpg"), long_name(b"a.jpg", b"K")])
    return Whole(ended(body(random, keys_of(random)) + head), "the archive ends after an extension header at byte ")


# -- no tar -----------------------------------------------------------------------------------------------------------


def zipped(random: Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("000.jpg", photo(random))
    return out.getvalue()


OTHERS: dict[str, Callable[[Random], bytes]] = {
    "html": lambda r: (b"<!DOCTYPE html>\n<html><body>%d</body></html>" % between(r, 400, 599)).ljust(
        between(r, 512, 3000)
    ),
    "text": lambda r: b"a caption\n" * between(r, 60, 5000),
    "a_photo": lambda r: photo(r).ljust(600, b"\0"),
    "a_zip": zipped,
    "a_7z": lambda r: b"7z\xbc\xaf\x27\x1c\0\x04" + r.bytes(between(r, 600, 3000)),
    "a_rar": lambda r: b"Rar!\x1a\x07\x01\0" + r.bytes(between(r, 600, 3000)),
    "a_bz2": lambda r: bz2.compress(tar(r)),
    "an_xz": lambda r: lzma.compress(tar(r)),
    "zstd": lambda r: b"\x28\xb5\x2f\xfd" + r.bytes(between(r, 600, 3000)),
    "noise": lambda r: b"n" + r.bytes(between(r, 512, 9000)),
    "a_parquet": lambda r: parquet(keys_of(r, 100, 200), ["success"]),
}

for _name, _make in OTHERS.items():
    SHARDS[f"shard_is_{_name}"] = lambda random, make=_make: Whole(make(random), "is not a tar")  # type: ignore[misc]


def noted(random: Random) -> dict[str, bytes]:
    """Return a stats file, which is not asked of a shard that cannot be read."""
    return {"_stats.json": json.dumps({"successes": seed_of(random)}).encode()}


@shard_kind
def shard_is_few_zeros(random: Random) -> Whole:
    return Whole(bytes(between(random, 1, BLOCK - 1)), "is not a tar", side_cars=noted(random))


@shard_kind
def shard_is_empty(random: Random) -> Whole:
    data, suffix = one_of(random, [(b"", ".tar"), (b"", ".tgz"), (packed(b"") * between(random, 1, 999), ".tar.gz")])
    return Whole(data, "is empty (0 bytes)", side_cars=noted(random), suffix=suffix)


@shard_kind
def shard_is_one_zero_block(random: Random) -> Whole:
    data = bytes(BLOCK + between(random, 0, BLOCK - 1))
    return Whole(data, "ends inside its end-of-archive", side_cars=noted(random))


@shard_kind
def shard_is_zeros(random: Random) -> Whole:
    return Whole(bytes(between(random, 2 * BLOCK, 99_999)))


def packed(data: bytes, level: int = 6) -> bytes:
    """Return the data as a gzip stream, without the clock."""
    return gzip.compress(data, level, mtime=0)


# -- gzip -------------------------------------------------------------------------------------------------------------

DAMAGED = "the gzip stream is cut or damaged ("


@shard_kind
def gzip_cut(random: Random) -> Whole:
    data = packed(tar(random))
    return Whole(data[: between(random, 3, len(data) - 1)], DAMAGED, suffix=one_of(random, [".tar.gz", ".tgz", ".tar"]))


@shard_kind
def gzip_with_garbage_behind(random: Random) -> Whole:
    return Whole(packed(tar(random)) + b"x" + random.bytes(between(random, 0, 99)), DAMAGED, suffix=".tar.gz")


@shard_kind
def gzip_with_a_wrong_checksum(random: Random) -> Whole:
    data = packed(tar(random))
    at = len(data) - between(random, 1, 8)
    return Whole(patched(data, at, bytes([data[at] ^ between(random, 1, 255)])), DAMAGED, suffix=".tar.gz")


@shard_kind
def gzip_with_a_damaged_header(random: Random) -> Whole:
    data = packed(tar(random))
    return Whole(patched(data, 2, bytes([between(random, 9, 255)])), DAMAGED, suffix=".tar.gz")


@shard_kind
def gzip_of_several_streams(random: Random) -> Whole:
    keys = keys_of(random)
    data = ended(body(random, keys))
    at = between(random, 1, len(data) - 1)
    empty = packed(b"") * between(random, 0, 50)
    streams = packed(data[:at]) + empty + packed(data[at:]) + bytes(between(random, 0, 99))
    return Whole(streams, rows=good(keys), suffix=".tar.gz")


@shard_kind
def gzip_of_gzip(random: Random) -> Whole:
    return Whole(packed(packed(random.bytes(600) + tar(random))), "is not a tar", suffix=".tar.gz")


@shard_kind
def gzip_with_a_bomb_in_it(random: Random) -> Whole:
    keys = keys_of(random)
    suffix = one_of(random, ["jpg", "json", "txt"])
    bomb = member(f"bomb.{suffix}", bytes(MAX_BYTES + between(random, 1, 20 << 20)))
    data = packed(ended(bomb + body(random, keys)), 1)
    return Whole(data, rows=[("bomb", "too_many_bytes"), *good(keys)], suffix=".tgz")


@shard_kind
def gzip_padded_with_zeros(random: Random) -> Whole:
    keys = keys_of(random)
    data = ended(body(random, keys)) + bytes(between(random, 1, 20 << 20))
    return Whole(packed(data, 1), rows=good(keys), suffix=".tar.gz")


# -- side-cars --------------------------------------------------------------------------------------------------------


@shard_kind
def stats_that_disagree(random: Random) -> Whole:
    keys = keys_of(random)
    wrong = one_of(random, [0, len(keys) - 1, len(keys) + 1, -1, 10**6, 10**30])
    stats = json.dumps({"count": 99, "successes": wrong}).encode()
    return Whole(ended(body(random, keys)), f"_stats.json counts {wrong:,}", side_cars={"_stats.json": stats})


@shard_kind
def stats_of_another_kind(random: Random) -> Whole:
    keys = keys_of(random)
    texts = [b"", b"{", b"[3]", b"null", random.bytes(99), b'{"successes": null}', b'{"successes": "9"}', b"[" * 99_999]
    texts += [b'{"count": 9}', b'{"successes": true}', b'{"successes": 9.5}', b'{"successes": %s}' % (b"9" * 9999)]
    return Whole(ended(body(random, keys)), rows=good(keys), side_cars={"_stats.json": one_of(random, texts)})


def parquet(keys: list[str], status: list[str], type: pa.DataType | None = None) -> bytes:
    """Return a side-car as img2dataset writes it, with the statuses repeated over the keys."""
    states = [status[i % len(status)] for i in range(len(keys))]
    columns = {"url": ["https://example.org"] * len(keys), "key": pa.array(keys, type or pa.string())}
    columns["status"] = pa.array(states, pa.string())
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def listed(random: Random, keys: list[str]) -> bytes:
    """Return a side-car that lists these keys as success, among failed ones, in the order of completion."""
    failed = [f"9{between(random, 0, 99_999_999):08}" for _ in range(between(random, 0, 5))]
    rows = [(k, "success") for k in keys] + [(k, "failed_to_download") for k in failed]
    rows = [rows[i] for i in random.permutation(len(rows))]
    type = one_of(random, [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    return parquet([k for k, _ in rows], [s for _, s in rows] or ["success"], type)


@shard_kind
def parquet_that_agrees(random: Random) -> Whole:
    keys = keys_of(random)
    return Whole(ended(body(random, keys)), rows=good(keys), side_cars={".parquet": listed(random, keys)})


@shard_kind
def parquet_with_more_keys(random: Random) -> Whole:
    keys = keys_of(random, 3, 6)
    lost = between(random, 1, 2)
    told = f"lists as success: {lost} missing (first '{keys[0]}')"
    return Whole(ended(body(random, keys[lost:])), told, side_cars={".parquet": listed(random, keys)})


@shard_kind
def parquet_with_fewer_keys(random: Random) -> Whole:
    keys = keys_of(random, 3, 6)
    more = between(random, 1, len(keys))
    told = f"lists as success: {more} extra (first '{keys[0]}')"
    return Whole(ended(body(random, keys)), told, side_cars={".parquet": listed(random, keys[more:])})


@shard_kind
def parquet_of_another_kind(random: Random) -> Whole:
    keys = keys_of(random)
    whole = listed(random, ["other"] * 50)
    others = io.BytesIO()
    pq.write_table(pa.table({"key": ["a", "b"], "text": ["c", "d"]}), others)
    numbers = io.BytesIO()
    pq.write_table(pa.table({"key": [1, 2], "status": ["success"] * 2}), numbers)
    texts = [b"", b"PAR1", random.bytes(500), b"PAR1" + random.bytes(500) + b"PAR1", whole[: len(whole) // 2]]
    texts += [others.getvalue(), numbers.getvalue(), whole[:-9] + bytes(9)]
    return Whole(ended(body(random, keys)), rows=good(keys), side_cars={".parquet": one_of(random, texts)})


@shard_kind
def spliced_between_members_with_parquet(random: Random) -> Whole:
    first, second = keys_of(random, 2, 4), [f"b{key}" for key in keys_of(random, 2, 4)]
    data = body(random, first) + ended(body(random, second))
    return Whole(
        data,
        f"lists as success: {len(second)} extra (first '{second[0]}')",
        side_cars={".parquet": listed(random, first)},
    )
