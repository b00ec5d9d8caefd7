"""Samples of one shard -> one parquet part of signatures: everything that later stages know of the pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import features

from . import details, images
from .captions import FORMS, fingerprint
from .config import Config, digest_of
from .encoders import image_encoder
from .errors import ConfigError, RunError, ShardError
from .keeping import field_texts
from .phash import phash_bits
from .records import Shard, signature_schema
from .shards import REMEDY, check_side_cars
from .source import Members, open_shard, printable_key, sample_uid
from .store import done, read_note, write_table

_BATCH = 256
_MAX_TEXT = 16 * 2**20  # bytes; as a json's objects they take up to thirty times as many
_MAX_NESTING = 100
_LOWEST_QUALITY = 49  # of PDQ, up to which its authors discard a hash
_CONFIG_KEYS = (
    "input.caption",
    "input.caption_field",
    "input.uid_field",
    "input.max_pixels",
    "input.max_bytes",
    "images.hash",
    "images.decode",
    "images.ground",
)
_LIBRARIES = ("imagededup", "numpy", "pillow", "pywavelets", "scipy", "simplejpeg")
_CODECS = ("avif", "jpg_2000", "libjpeg_turbo", "libtiff", "webp")


@dataclass(frozen=True)
class Signed:
    """What signing one shard came to: its samples, the bad ones among them, and the start of each content digest."""

    samples: int
    bad: int
    contents: npt.NDArray[np.uint64]


@cache
def versions(hash: str) -> dict[str, str]:
    """Return the versions of the libraries that shape the numbers of a signature with this hash."""
    return {name: version(name) for name in (*_LIBRARIES, *(("pdqhash",) if hash == "pdq" else ()))}


@cache
def codecs() -> dict[str, str]:
    """Return the versions of the decoders that Pillow was built with, which its own version does not tell."""
    known = {*features.features, *features.codecs, *features.modules}
    found = {name: features.version(name) for name in _CODECS if name in known}
    return {name: str(number) for name, number in found.items() if number}


def instruction_set() -> str:
    """Return the class of the processor's instructions that a network's sums depend on, never which processor it is.

    A lower class than the processor has is set by ONEDNN_MAX_CPU_ISA, which torch obeys.
    """
    has: dict[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    at_most = next((i for i, name in enumerate(_INSTRUCTIONS) if limit.startswith(name)), 0)
    allowed = list(_INSTRUCTIONS.items())[at_most:]
    return next((name for name, needs in allowed if all(map(has.get, needs))), platform.machine().lower())


_INSTRUCTIONS = {  # the highest first
    "avx512": ("AVX512F", "AVX512BW", "AVX512VL", "AVX512DQ"),
    "avx2": ("AVX2",),
    "avx": ("AVX",),
    "sse41": ("SSE41",),
    "sve": ("SVE",),
}


def made_by(config: Config) -> dict[str, str]:
    """Return all that shapes a signature's numbers beside the sample and the configuration's own values."""
    found = {"signatures": "signatures-6", "forms": FORMS, **versions(config.images.hash), **codecs()}
    if encoder := image_encoder(config.images.encoder):
        found |= {"torch": version("torch"), "instructions": instruction_set(), "encoder": encoder.identity}
    return found


def recorded(path: Path) -> dict[str, str]:
    """Return by what a part was made; one of a version that did not record it tells that."""
    by: dict[str, str] = read_note(path).get("by", EARLIER)
    return by


EARLIER = {"signatures": "an earlier version of memfilter"}


def check_hash(config: Config) -> None:
    """Raise ConfigError where the package of the configured hash is missing."""
    if config.images.hash == "pdq":
        try:
            import pdqhash  # noqa: F401
        except ImportError as e:
            raise ConfigError("images.hash = 'pdq' needs a package; pip install 'memfilter[pdq]'") from e


def signature_digest(shard: Shard, content: str | None, config: Config, by: dict[str, str] | None = None) -> str:
    """Return the digest of everything that shapes a shard's signatures; `content` is the digest of its bytes.

    They are made by what is installed, or `by` what a part has recorded.
    """
    return digest_of([shard.name, content, signed_keys(config), made_by(config) if by is None else by])


def signed_keys(config: Config) -> list[Any]:
    """Return what the configuration says of signatures, for a digest."""
    return [config.digest(*_CONFIG_KEYS), list(config.images.json_fields)]


def is_signed(shard: Shard, path: Path, config: Config, by: dict[str, str]) -> bool:
    """Tell whether a shard's part is done, and made `by` this; one skipped as bad is, where the config says skip."""
    try:
        note = read_note(path)
    except RunError:
        return False
    if ("skipped" in note and config.input.on_bad_shard == "stop") or note.get("by", EARLIER) != by:
        return False
    same_size = shard.size is None or shard.size == note.get("bytes", shard.size)
    return same_size and (by == EARLIER or done(path, signature_digest(shard, note.get("digest"), config, by)))


def was_skipped(path: Path) -> bool:
    """Tell whether a finished part stands for a shard that could not be read."""
    return "skipped" in read_note(path)


def sign(shard: Shard, path: Path, config: Config) -> Signed:
    """Write the signatures of a shard to `path`: one row per sample, in the shard's order.

    A note in it keeps size and digest of the shard's bytes, by which the shard is known when it is read again.
    Raises ShardError for a shard that cannot be read to its end, unless the config says skip: then the part has no
    row and notes the cause.
    """
    encoder = image_encoder(config.images.encoder)
    note: dict[str, Any] = {}
    try:
        with open_shard(shard, config.input.timeout) as members:
            table = _signatures(members, config)
        check_side_cars(shard, table["key"].to_pylist(), config.input.timeout)
        note |= {"bytes": members.stored.size, "digest": members.stored.digest}
    except ShardError as e:
        if config.input.on_bad_shard == "stop":
            raise
        note["skipped"] = str(e).removesuffix(f"; {REMEDY}")
        dim = encoder.dim if encoder else 0
        table = signature_schema(dim, config.images.hash, config.images.json_fields).empty_table()
    bad = table.num_rows - table["bad"].null_count
    by = made_by(config)
    note |= {"samples": table.num_rows, "bad": bad, "by": by}
    write_table(path, table, signature_digest(shard, note.get("digest"), config, by), note)
    digests = b"".join(d for d in table["digest"].to_pylist() if d)
    return Signed(table.num_rows, bad, np.frombuffer(digests, ">u8")[::2].astype(np.uint64))


class DuplicateGauge:
    """The share of exact duplicates among the contents seen so far, in bounded memory.

    Exact up to 100,000 distinct contents; then estimated from those whose digest starts with enough zero bits.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._total, self._bits = 0, 0

    def add(self, contents: npt.NDArray[np.uint64]) -> None:
        """Count these contents."""
        sampled = [c for c in contents.tolist() if c >> (64 - self._bits) == 0]
        self._total += len(sampled)
        self._seen.update(sampled)
        if len(self._seen) > 100_000:
            self._bits += 1
            self._seen = {c for c in self._seen if c >> (64 - self._bits) == 0}
            self._total //= 2

    @property
    def share(self) -> float:
        """Duplicates among all contents, 0 to 1."""
        return 1 - len(self._seen) / self._total if self._total else 0.0


class _Bad(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


def _signatures(members: Members, config: Config) -> pa.Table:
    signer = Signer(config)
    rows: list[dict[str, Any]] = []
    tables: list[pa.Table] = []
    first: dict[bytes, int] = {}
    repeated: set[int] = set()
    samples = groupby((m for m in members if m.index >= 0), key=lambda m: m.index)
    for index, sample in samples:
        key, row = signer.read(members.name, index, sample)
        if (before := first.setdefault(key, index)) != index:
            repeated |= {before, index}
        rows.append(row)
        if len(rows) == _BATCH:
            tables.append(signer.table(rows))
            rows = []
    tables.append(signer.table(rows))
    for i in sorted({index // _BATCH for index in repeated}):
        tables[i] = _spoil(tables[i], repeated, "repeated_key", "the key comes back in its shard")
    return pa.concat_tables(tables).unify_dictionaries()


def _spoil(table: pa.Table, indices: set[int], code: str, detail: str) -> pa.Table:
    """Return the table with the samples at these indices made bad."""
    spoiled = [index in indices for index in table["index"].to_pylist()]
    made = {"bad": code, "detail": detail}
    for i, field in enumerate(table.schema):
        if field.name in made:
            values = [made[field.name] if s else v for s, v in zip(spoiled, table[i].to_pylist(), strict=True)]
            column = pa.array(values, field.type)
        elif field.name in ("uid", "index", "key"):
            continue
        elif all(spoiled):
            column = _nulls(len(spoiled), field.type)
        else:
            column = pc.if_else(pa.array(spoiled), pa.nulls(len(spoiled), field.type), table[i])
        table = table.set_column(i, field, column)
    return table


@lru_cache(8)
def _nulls(length: int, type: pa.DataType) -> pa.Array:
    """Return nulls that share their memory with all others: an embedding takes half a KiB even where there is none."""
    return pa.nulls(length, type)


def hasher(name: str) -> Any:
    """Return imagededup's hashing method of this name."""
    # importing imagededup brings torch along and takes seconds: processes that never hash do without
    from imagededup.methods import AHash, DHash, PHash, WHash

    for noisy in ("imagededup.methods.hashing", "imagededup.utils.image_utils"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return {"phash": PHash, "dhash": DHash, "ahash": AHash, "whash": WHash}[name](verbose=False)


def pdq(pixels: npt.NDArray[np.uint8]) -> bytes | None:
    """Return the 256 bits of PDQ of grey or RGB pixels, its first bit highest; None where PDQ's quality is 49 or less.

    Such images hold too little detail for it: their hashes match by chance.
    """
    import pdqhash

    rgb = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    bits, quality = pdqhash.compute(np.ascontiguousarray(rgb))
    return np.packbits(bits).tobytes() if quality > _LOWEST_QUALITY else None


class Part(Protocol):
    """What signing asks of a sample's member: `source.Member` has it, wherever else the sample may come from."""

    key: bytes
    suffix: str
    kind: bytes
    supported: bool

    @property
    def size(self) -> int:
        """Bytes of its data."""
        ...

    def read(self) -> bytes:
        """Return its data, asked for once at most."""
        ...


class Signer:
    """Turn the members of samples into rows of signatures, one by one, and the rows into a table, many at a time."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.full = config.images.decode == "full"
        self.hasher: Any = None if config.images.hash == "pdq" else hasher(config.images.hash)
        self.encoder = image_encoder(config.images.encoder)
        self.side, self.colour = images.HASH_SIDE if self.hasher else images.PDQ_SIDE, details.SIDE
        if self.encoder and self.encoder.frame:
            self.colour = max(self.colour, self.encoder.frame.edge)
        elif self.encoder:  # its input is filtered down from twice its size
            self.side = max(self.side, 2 * self.encoder.side)
        dim = self.encoder.dim if self.encoder else 0
        self.schema = signature_schema(dim, config.images.hash, config.images.json_fields)

    def finish(self, rows: list[dict[str, Any]]) -> list[int]:
        """Put into the good rows what is computed of their small images, many at a time; return where these rows are.

        That is the perceptual hash, and the look of an image that is plain.
        """
        good = [i for i, row in enumerate(rows) if "small" in row]
        small = np.stack([rows[i]["small"] for i in good]) if good else np.empty((0, 0, 0), np.uint8)
        if self.hasher:
            hashes = self._hashes([rows[i]["hashed"] for i in good])
            for i, hash in zip(good, hashes, strict=True):
                rows[i]["hash"] = hash
        for i, is_plain in zip(good, images.are_plain(small).tolist(), strict=True):
            if is_plain or rows[i]["blank"]:
                rows[i]["look"] = images.look(rows[i]["small"], rows[i]["colour"])
        return good

    def table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Return the rows as a table, with what is computed of their small images: hash, blankness, embedding."""
        good = self.finish(rows)
        is_good = np.zeros(len(rows), bool)
        is_good[good] = True
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in self.schema.names}
        if self.encoder and not good:
            columns["embedding"] = _nulls(len(rows), self.schema.field("embedding").type)
        elif self.encoder:
            embeddings = np.zeros((len(rows), self.encoder.dim), np.float16)
            embeddings[good] = self.encoder.encode(np.stack([rows[i]["square"] for i in good]))
            flat, missing = pa.array(embeddings.ravel()), pa.array(~is_good)
            columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, self.encoder.dim, mask=missing)
        return pa.table(columns, schema=self.schema)

    def _hashes(self, pixels: list[npt.NDArray[np.uint8]]) -> list[int]:
        """Return the method's own bits of the pixels that its encode_image would bring to this size."""
        if not pixels:
            return []
        if self.config.images.hash == "phash":
            bits = phash_bits(np.stack(pixels), self.hasher._hash_algo)
        else:
            bits = np.stack([np.ravel(self.hasher._hash_algo(p)) for p in pixels])
        return [int.from_bytes(row.tobytes(), "big") for row in np.packbits(bits, axis=1)]

    def read(self, shard: str, index: int, members: Iterable[Part]) -> tuple[bytes, dict[str, Any]]:
        """Return the sample's raw key and its row; a bad sample's row has the cause and nothing else."""
        key = b""
        image: bytes | None = None
        texts: dict[str, bytes] = {}
        fault: _Bad | None = None
        for member in members:
            key = member.key
            is_image = member.suffix in images.SUFFIXES
            if not is_image and member.suffix not in ("txt", "json"):
                continue
            if not member.supported:
                kind = _KINDS.get(member.kind, f"of type {member.kind!r}")
                fault = fault or _Bad("unsupported_member", f"its {member.suffix} is {kind}, not a file")
            elif member.size > self.config.input.max_bytes:
                limit = f"input.max_bytes = {self.config.input.max_bytes:,}"
                fault = fault or _Bad("too_many_bytes", f"its {member.suffix} of {member.size:,} bytes is over {limit}")
            elif member.size > _MAX_TEXT and not is_image:
                limit = f"the {_MAX_TEXT:,} of a text"
                fault = fault or _Bad("too_many_bytes", f"its {member.suffix} of {member.size:,} bytes is over {limit}")
            elif not is_image:
                texts[member.suffix] = member.read()
            elif image is None:
                image = member.read()
        row: dict[str, Any] = {"uid": sample_uid(shard, key), "index": index, "key": printable_key(key)}
        try:
            if fault:
                raise fault
            if image is None:
                raise _Bad("no_image", "the sample has no image member")
            row |= self._caption(texts) | self._image(image)
        except (_Bad, images.BadImage) as e:
            row = {name: row[name] for name in ("uid", "index", "key")} | {"bad": e.code, "detail": e.detail}
        return key, row

    def _image(self, data: bytes) -> dict[str, Any]:
        limit, ground = self.config.input.max_pixels, self.config.images.ground
        decoded = images.decode(data, self.full, limit, self.side, self.colour, ground)
        assert decoded.colour is not None
        small, colour = images.thumbnail(decoded.pixels), details.resized(decoded.colour, details.SIDE)
        box = details.content(colour)
        # what averages to one colour at that size, such as a sky of stars, is not blank
        is_blank = box is None and details.is_one_colour(decoded.colour)
        box = box if box or is_blank else details.WHOLE
        part = None if box == details.WHOLE else box  # without a border nothing is done twice
        row = {
            "digest": hashlib.sha256(data).digest()[:16],
            "width": decoded.width,
            "height": decoded.height,
            "bytes": len(data),
            "blank": is_blank,
            "small": small,
            "colour": colour,
            "picture": details.packed(details.resized(decoded.colour, details.SIDE, part) if part else colour),
            "hashed": small,  # of the size that imagededup's phash takes
        }
        if self.hasher is None:
            row["hash"] = pdq(decoded.pixels)  # at once: a batch of the pixels that it needs is large
        elif self.full or self.config.images.hash != "phash":
            from imagededup.utils.image_utils import preprocess_image

            row["hashed"] = preprocess_image(decoded.pixels, self.hasher.target_size, grayscale=True)
        if self.encoder and self.encoder.frame and decoded.colour is not None:
            row["square"] = images.framed(decoded.colour, self.encoder.side, self.encoder.frame)
        elif self.encoder:
            row["square"] = images.thumbnail(decoded.pixels, self.encoder.side, part)
        return row

    def _caption(self, texts: dict[str, bytes]) -> dict[str, Any]:
        config = self.config.input
        from_json = config.caption == "json"
        fields: Any = {}
        if "json" in texts:
            try:
                if _nests_deeper(texts["json"], _MAX_NESTING):
                    raise ValueError(f"it nests deeper than {_MAX_NESTING}")
                fields = json.loads(texts["json"])
            except (ValueError, RecursionError) as e:
                raise _Bad("bad_json", f"the json member cannot be read: {e}"[:200]) from e
            if not isinstance(fields, dict):
                if from_json or config.uid_field:
                    raise _Bad("bad_json", f"the json member holds a {type(fields).__name__}, not an object")
                fields = {}
        caption = fields.get(config.caption_field) if from_json else _text(texts.get("txt", b""))
        caption = "" if caption is None else caption
        more = fields.get("captions")
        if not isinstance(more, list) or not all(isinstance(c, str) for c in more):
            more = []  # a field of that name with another meaning
        if not isinstance(caption, str):
            raise _Bad("bad_caption", f"{config.caption_field} in the json is a {type(caption).__name__}, not text")
        try:
            "".join((caption, *more)).encode()
        except UnicodeEncodeError as e:
            raise _Bad("bad_caption", "the json holds half of a surrogate pair, which is no text") from e
        row: dict[str, Any] = {"caption": caption, "fingerprint": fingerprint(caption), "captions": more or None}
        row |= field_texts(fields, self.config.images.json_fields)
        if config.uid_field:
            row["uid"] = _own_uid(fields.get(config.uid_field), config.uid_field)
        return row


_KINDS = {
    **{b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"},
    **dict.fromkeys((b"0", b"\0", b"7", b"S"), "a sparse file"),
}
_ESCAPE, _STRING = re.compile(rb"\\.", re.DOTALL), re.compile(rb'"[^"]*(?:"|\Z)')


def _nests_deeper(text: bytes, limit: int) -> bool:
    """Tell whether a json nests deeper: how deep the parser itself goes depends on where it is called from."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    outside = np.frombuffer(_STRING.sub(b"", _ESCAPE.sub(b"", text)), np.uint8)
    steps = np.isin(outside, list(b"[{")).astype(np.int32) - np.isin(outside, list(b"]}"))
    return bool(steps.cumsum().max(initial=0) > limit)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _Bad("bad_caption", f"the txt member is not UTF-8: {e.reason} at byte {e.start:,}") from e


def _own_uid(value: Any, name: str) -> bytes:
    try:
        uid = bytes.fromhex(value)
    except (TypeError, ValueError):
        uid = b""
    if len(uid) != 16:
        raise _Bad("bad_uid", f"{name} in the json is not 32 hexadecimal digits: {value!r}"[:200])
    return uid
