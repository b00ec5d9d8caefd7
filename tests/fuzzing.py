"""A fuzz target over the reader and the signer, the inputs to start from, and seeded mutations of them."""

from __future__ import annotations

import gzip
import io
from itertools import groupby
from typing import Any

import hostile_images
import hostile_samples  # noqa: F401
import hostile_shards  # noqa: F401
import numpy as np
from hostile import SAMPLES, SHARDS, Draw, Random, between, member, one_of
from tars import BLOCK, ended, mended

from memfilter import Config, ShardError
from memfilter.images import SUFFIXES
from memfilter.records import BAD_CODES
from memfilter.signatures import Signer
from memfilter.source import Members

AS_TAR, AS_MENDED_TAR, AS_GZIP, AS_IMAGE, AS_CAPTION, AS_JSON, AS_FIELDS = range(7)
"""What an input's first byte, modulo seven, makes of the others."""

LARGEST = 1 << 16


class Target:
    """Reads arbitrary bytes as a shard: they are refused, or every sample is a good row or a bad one with a cause."""

    def __init__(self) -> None:
        limits = {"max_pixels": 1 << 20, "max_bytes": 1 << 20}
        fields = {"caption": "json", "uid_field": "uid", **limits}
        self.signer = Signer(Config.parse({"input": limits, "images": {"encoder": None}}))
        self.of_fields = Signer(Config.parse({"input": fields, "images": {"encoder": None, "decode": "full"}}))

    def __call__(self, data: bytes) -> int:
        """Return the number of rows; raises AssertionError where one is neither, and whatever the code raises."""
        mode, body = data[0] % 7 if data else 0, data[1:]
        stream: Any = io.BytesIO(tar_of_body(mode, body))
        if mode == AS_GZIP:
            stream = gzip.GzipFile(fileobj=io.BytesIO(body))
        members = Members(stream, "0.tar", mode == AS_GZIP)
        signer = self.of_fields if mode == AS_FIELDS else self.signer
        rows = []
        try:
            for index, sample in groupby((m for m in members if m.index >= 0), key=lambda m: m.index):
                rows.append(signer.read("0.tar", index, sample)[1])
        except ShardError as e:
            return check(str(e).startswith("0.tar: ") and str(e).isprintable(), e) - 1
        check(members.samples == len(rows) == signer.table(rows).num_rows, members.samples)
        for row in rows:
            check("picture" in row or (row["bad"] in BAD_CODES and row["detail"].isprintable()), row)
        return len(rows)


def check(true: bool, what: object) -> int:
    """Return 1, or raise AssertionError telling what it was."""
    if not true:
        raise AssertionError(what)
    return 1


def tar_of_body(mode: int, body: bytes) -> bytes:
    """Return the tar that an input stands for."""
    if mode == AS_MENDED_TAR:
        at = 0
        while len(body) >= at + BLOCK and any(body[at : at + BLOCK]):
            body = mended(body, at)
            size = body[at + 124 : at + 136].strip(b" \0")
            at += BLOCK + (-(-int(size, 8) // BLOCK) * BLOCK if size.isdigit() and not size.strip(b"01234567") else 0)
        return ended(body)
    if mode == AS_IMAGE:
        return ended(member("a.jpg", body))
    if mode == AS_CAPTION:
        return ended(member("a.jpg", IMAGE) + member("a.txt", body))
    if mode in (AS_JSON, AS_FIELDS):
        return ended(member("a.jpg", IMAGE) + member("a.json", body))
    return body


IMAGE = hostile_images.photo(np.random.default_rng(0))


def seeds() -> list[bytes]:
    """Return an input for what each kind of malformed or odd input holds, if it is not large."""
    found = []
    for kind, plant in SAMPLES.items():
        tar = ended(b"".join(data for data, _ in plant(Draw(kind, 0).random, "key").members))
        if len(tar) > 2 * LARGEST:
            continue
        found += [bytes([mode]) + tar for mode in (AS_TAR, AS_MENDED_TAR)]
        for one in Members(io.BytesIO(tar), kind):  # type: ignore[arg-type]
            if one.index >= 0 and one.supported:
                modes = [AS_IMAGE] if one.suffix in SUFFIXES else {"txt": [AS_CAPTION], "json": [AS_JSON, AS_FIELDS]}
                chosen = modes if isinstance(modes, list) else modes.get(one.suffix, [])
                data = one.read()
                found += [bytes([mode]) + data for mode in chosen]
    for kind, make in SHARDS.items():
        data = make(Draw(kind, 0).random).data
        packed = data[:2] == b"\x1f\x8b"
        found += [bytes([mode]) + data for mode in ([AS_GZIP] if packed else [AS_TAR, AS_MENDED_TAR])]
    return sorted({one for one in found if len(one) <= LARGEST})


def mutated(random: Random, corpus: list[bytes]) -> bytes:
    """Return an input of the corpus with some of its bytes changed, lost, repeated, or taken from another."""
    data = bytearray(one_of(random, corpus))
    for _ in range(between(random, 1, 6)):
        at = between(random, 0, len(data))
        end = min(len(data), at + one_of(random, [1, 1, 2, 4, 12, 100, 512, 512 * between(random, 1, 9)]))
        way = between(random, 0, 6)
        if way <= 2 and at < len(data):
            data[at] = one_of(random, [data[at] ^ 1 << between(random, 0, 7), 0, 255, between(random, 0, 255)])
        elif way == 3:
            del data[at:end]
        elif way == 4:
            data[at:at] = data[at:end] * between(random, 1, 3)
        elif way == 5:
            other = one_of(random, corpus)
            start = between(random, 0, len(other))
            data[at:end] = other[start : start + between(random, 0, 600)]
        else:
            data[at:end] = random.bytes(end - at)
    return bytes(data[:LARGEST])
