"""Malformed and odd input by the thousand: named kinds, each a function of a seeded generator, with its outcome.

A *sample* kind plants members among good neighbours of a shard and tells the rows that they come to; a *shard* kind
makes a whole shard, with its side-cars, and tells why it is refused or which rows it holds.  `lay_out` writes draws as
shards, `find_faults` compares a run on them with what was expected and with a run on the good neighbours alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import encoded, picture
from tars import BLOCK, ended, mended

import memfilter
from memfilter import Config, Manifest
from memfilter.signatures import Signer
from memfilter.store import Store, read_table

Random = np.random.Generator
Rows = Sequence[tuple[str, str]]  # printable key, and "good" or the code of a bad sample

LEFT_OUT, STAYS = -1, -2
"""In place of a row's number: members that no filtered shard holds, and members that every one holds."""

CONFIGS = {
    "txt": Config.parse({"input": {"max_bytes": 18 * 2**20, "on_bad_shard": "skip"}, "images": {"encoder": None}}),
    "json": Config.parse(
        {"input": {"caption": "json", "uid_field": "uid", "on_bad_shard": "skip"}, "images": {"encoder": None}}
    ),
}
MAX_BYTES = CONFIGS["txt"].input.max_bytes
NEIGHBOURS = 6


@dataclass(frozen=True)
class Planted:
    """Members as they stand in the tar, each with the number of its row, and the rows that they come to."""

    members: Sequence[tuple[bytes, int]]
    rows: Rows
    upright: bytes | None = None  # an image that has the perceptual hash of the first row's


@dataclass(frozen=True)
class Whole:
    """A shard's bytes and side-cars, by what follows its stem; the words of its refusal, or the rows that it holds."""

    data: bytes
    refusal: str | None = None
    rows: Rows = ()
    side_cars: dict[str, bytes] = field(default_factory=dict)
    suffix: str = ".tar"


SAMPLES: dict[str, Callable[[Random, str], Planted]] = {}
SHARDS: dict[str, Callable[[Random], Whole]] = {}
JSON: set[str] = set()
"""The sample kinds that are read under CONFIGS["json"]; all others are under CONFIGS["txt"]."""


# -- members ----------------------------------------------------------------------------------------------------------


def block(name: bytes | str, size: int = 0, kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """Return a ustar header with these bytes, however odd, and a right checksum."""
    raw = name.encode() if isinstance(name, str) else name
    fields = (raw[:100].ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size, b"%011o\0" % 0)
    head = b"".join(
        (*fields, bytes(8), kind, bytes(100), b"ustar\00000", bytes(64), bytes(16), prefix.ljust(155, b"\0"))
    )
    return mended(head.ljust(BLOCK, b"\0"), 0)


def member(name: bytes | str, data: bytes = b"", kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """Return header, data and padding."""
    return block(name, len(data), kind, prefix) + data + bytes(-len(data) % BLOCK)


def pax(kind: bytes = b"x", **records: bytes | str) -> bytes:
    """Return a pax header with these records; `__` in a keyword stands for a dot."""
    lines = b""
    for keyword, value in records.items():
        raw = value.encode() if isinstance(value, str) else value
        rest = b" " + keyword.replace("__", ".").encode() + b"=" + raw + b"\n"
        length = len(rest) + 1
        while length != len(b"%d" % length) + len(rest):
            length = len(b"%d" % length) + len(rest)
        lines += b"%d" % length + rest
    return member("pax", lines, kind)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    """Return a GNU header that gives the next member this name."""
    return member("././@LongLink", name + b"\0", kind)


# -- small content ----------------------------------------------------------------------------------------------------


def seed_of(random: Random) -> int:
    """Return a seed for a picture that no other draw shows."""
    return int(random.integers(1 << 40, 1 << 50))


def photo(random: Random, format: str = "JPEG", **options: object) -> bytes:
    """Return a small image that is like no other."""
    width, height = random.integers(56, 120, 2).tolist()
    return encoded(picture(seed_of(random), width, height), format, **options)


def between(random: Random, low: int, high: int) -> int:
    """Return a number from `low` to `high`, both included."""
    return int(random.integers(low, high + 1))


def one_of(random: Random, choices: Sequence[Any]) -> Any:
    """Return one of the choices."""
    return choices[between(random, 0, len(choices) - 1)]


def cut(random: Random, data: bytes, low: float = 0.02, high: float = 0.9) -> bytes:
    """Return the data up to somewhere between these shares of it."""
    return data[: between(random, int(low * len(data)) + 1, int(high * len(data)))]


def of_files(key: str, files: dict[str, bytes], outcome: str = "good", upright: bytes | None = None) -> Planted:
    """Return one sample of plain files, by suffix."""
    return Planted([(member(f"{key}.{s}", data), 0) for s, data in files.items()], [(key, outcome)], upright)


# -- draws ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One input of a kind: what a seed gives."""

    kind: str
    seed: int

    @property
    def random(self) -> Random:
        """A generator that is the draw's own."""
        return np.random.default_rng([self.seed, zlib.crc32(self.kind.encode())])


@dataclass
class Laid:
    """A shard as it lies in a folder: the draws in it, its rows in order, and each row's draw (None: a neighbour)."""

    name: str
    draws: list[Draw]
    rows: list[tuple[str, str]]
    owners: list[Draw | None]
    members: list[tuple[bytes, int]] | None = None  # None where the bytes of the filtered shard are not foretold
    refusal: str | None = None
    upright: dict[int, bytes] = field(default_factory=dict)


@cache
def neighbour(shard: int, number: int) -> tuple[str, bytes]:
    """Return the key of a good sample and its members."""
    key = f"good{number}"
    image = encoded(picture(1000 * shard + number))
    text = f'{{"caption": "neighbour {number} of {shard}", "uid": "{shard:016x}{number:016x}"}}'
    caption = f"a neighbour, number {number} of {shard}".encode()
    files = {"jpg": image, "txt": caption, "json": text.encode()}
    return key, b"".join(member(f"{key}.{suffix}", data) for suffix, data in files.items())


def lay_out(draws: Iterable[Draw], folder: Path, together: int = 12) -> list[Laid]:
    """Write the draws as shards of one folder, `together` sample draws in each among good neighbours."""
    folder.mkdir(parents=True)
    samples, shards = [], []
    for draw in draws:
        (samples if draw.kind in SAMPLES else shards).append(draw)
    groups = [samples[i : i + together] for i in range(0, len(samples), together)]
    laid = [_lay_samples(group, i, folder) for i, group in enumerate(groups)]
    for i, draw in enumerate(shards, len(groups)):
        whole = SHARDS[draw.kind](draw.random)
        name = f"{i:05}{whole.suffix}"
        (folder / name).write_bytes(whole.data)
        for suffix, data in whole.side_cars.items():
            (folder / f"{i:05}{suffix}").write_bytes(data)
        laid.append(Laid(name, [draw], list(whole.rows), [draw] * len(whole.rows), refusal=whole.refusal))
    return laid


def _lay_samples(draws: list[Draw], shard: int, folder: Path) -> Laid:
    laid = Laid(f"{shard:05}.tar", draws, [], [], [])
    assert laid.members is not None
    places = np.linspace(0, len(draws), NEIGHBOURS, dtype=int).tolist()
    for i in range(len(draws) + 1):
        for number in (n for n, place in enumerate(places) if place == i):
            key, data = neighbour(shard, number)
            laid.members.append((data, len(laid.rows)))
            laid.rows.append((key, "good"))
            laid.owners.append(None)
        if i < len(draws):
            planted = SAMPLES[draws[i].kind](draws[i].random, f"planted{i:02}")
            if planted.upright:
                laid.upright[len(laid.rows)] = planted.upright
            laid.members += [(data, n + len(laid.rows) if n >= 0 else n) for data, n in planted.members]
            laid.rows += planted.rows
            laid.owners += [draws[i]] * len(planted.rows)
    (folder / laid.name).write_bytes(ended(b"".join(data for data, _ in laid.members)))
    return laid


def lay_out_neighbours(laid: list[Laid], folder: Path) -> None:
    """Write the shards that hold neighbours again, under the same names, without what was planted."""
    folder.mkdir(parents=True)
    for shard, one in enumerate(one for one in laid if None in one.owners):
        (folder / one.name).write_bytes(ended(b"".join(neighbour(shard, n)[1] for n in range(NEIGHBOURS))))


# -- what came of them ------------------------------------------------------------------------------------------------

Fault = tuple[Draw | None, str]


def run_on(draws: Sequence[Draw], work: Path) -> list[Fault]:
    """Run memfilter on the draws, and on their neighbours alone; return everything that is not as it should be."""
    faults: list[Fault] = []
    for mode, config in CONFIGS.items():
        of_mode = [d for d in draws if (d.kind in JSON) == (mode == "json")]
        if not of_mode:
            continue
        laid = lay_out(of_mode, work / mode / "in")
        manifest = memfilter.run([str(work / mode / "in")], work / mode / "out", config, workers=1)
        alone = None
        if any(None in one.owners for one in laid):
            lay_out_neighbours(laid, work / mode / "neighbours")
            alone = memfilter.run([str(work / mode / "neighbours")], work / mode / "alone", config, workers=1)
        faults += find_faults(laid, manifest, alone, config)
        if strays := list(work.parent.rglob("*escaped*")):
            faults.append((None, f"something was written outside: {strays}"))
    return faults


def find_faults(laid: list[Laid], manifest: Manifest, alone: Manifest | None, config: Config) -> list[Fault]:
    """Return where the manifest and the filtered shards differ from what is expected."""
    faults: list[Fault] = [(None, f"verify: {problem}") for problem in memfilter.verify(manifest.path)]
    counts = manifest.counts
    if counts["read"] != counts["keep"] + counts["mask"] + counts["drop"] + counts["bad"]:
        faults.append((None, f"does not reconcile: {counts}"))
    if counts["read"] != sum(len(one.rows) for one in laid if one.refusal is None):
        faults.append((None, f"another number of samples: {counts}"))
    skipped = {s["name"]: s.get("skipped") for s in manifest.info["shards"]}
    store = Store(manifest.path)
    for one in laid:
        cause = skipped[one.name]
        if one.refusal is not None or cause is not None:
            wrong = cause is None or one.refusal is None or one.refusal not in cause or not cause.startswith(one.name)
            if wrong or "\n" in cause:
                faults += [(d, f"refused for {cause!r}, expected {one.refusal!r}") for d in one.draws]
            continue
        faults += _row_faults(one, read_table(store.manifest_part(one.name)).to_pylist())
        faults += _hash_faults(one, read_table(store.signatures(one.name), ["hash"])["hash"].to_pylist(), config)
        if one.members is not None and alone is not None:
            faults += _neighbour_faults(one, manifest, alone)
    return faults


def _row_faults(one: Laid, rows: list[dict[str, Any]]) -> Iterable[Fault]:
    found = [(r["key"], r["reasons"][0] if r["action"] == "bad" else "good") for r in rows]
    if len(found) != len(one.rows):
        told = [pair for pair in found if pair not in one.rows], [pair for pair in one.rows if pair not in found]
        yield from ((d, f"another number of rows in {one.name}: {told}") for d in one.draws)
        return
    for (key, outcome), (found_key, found_outcome), owner, row in zip(one.rows, found, one.owners, rows, strict=True):
        if key != found_key or found_outcome not in outcome.split("|"):
            yield owner, f"row {found_key, found_outcome, row['detail']}, expected {key, outcome}"
        detail = row["detail"]
        if (detail is None) == (row["action"] == "bad") or (detail is not None and not detail.isprintable()):
            yield owner, f"the cause is {detail!r}"


def _hash_faults(one: Laid, hashes: list[int], config: Config) -> Iterable[Fault]:
    for row, image in one.upright.items():
        signer = Signer(config)
        upright = signer.table([{"uid": bytes(16), "index": 0, "key": ""} | signer._image(image)])["hash"][0].as_py()
        if hashes[row] != upright:
            yield one.owners[row], f"hash {hashes[row]:016x}, upright it is {upright:016x}"


def _neighbour_faults(one: Laid, manifest: Manifest, alone: Manifest) -> Iterable[Fault]:
    """Compare the neighbours' rows with those of a run without the planted samples, and the whole filtered shard."""
    assert one.members is not None
    rows = read_table(Store(manifest.path).manifest_part(one.name)).to_pylist()
    expected = iter(read_table(Store(alone.path).manifest_part(one.name)).to_pylist())
    moved = {"index", "image_group", "caption_group"}
    for i, (row, owner) in enumerate(zip(rows, one.owners, strict=True)):
        if owner is None and {k: v for k, v in row.items() if k not in moved} != {
            k: v for k, v in next(expected).items() if k not in moved
        }:
            yield None, f"{one.name}: the neighbour {row} is not as it is without the planted samples"
        if row["index"] != i:
            yield owner, f"{one.name}: row {i} has index {row['index']}"
    kept = [n for n, row in enumerate(rows) if row["action"] in ("keep", "mask")]
    members = b"".join(data for data, n in one.members if n == STAYS or n in kept)
    if (manifest.path / "shards" / one.name).read_bytes() != ended(members):
        yield None, f"{one.name}: the filtered shard is not its kept members, byte for byte"
