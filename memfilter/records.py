"""The schemas of a run's tables, and the codes that appear in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import without_secrets

Ints = npt.NDArray[np.int64]
Indices = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
Pairs = tuple[Ints, Ints, Floats]  # rows a < b, and their distance

UID = pa.binary(16)

THUMBNAIL_SIDE = 32
"""Side in pixels of the grey thumbnails that are hashed and aligned."""

LOOK_SIDE = 8
"""Cells on a side of a plain image's look, by which blank images are compared."""

LOOK_BYTES = LOOK_SIDE**2 + 2
"""Bytes of a look: the mean grey levels of its cells, and the picture's mean blue and red differences, plus 128."""

BAD_CODES = (
    "repeated_key",  # the key comes back in its shard
    "no_image",  # no member with an image suffix
    "unsupported_member",  # a link, device or sparse file under the sample's key
    "too_many_bytes",  # a member over input.max_bytes, or a text over 16 MiB
    "empty_image",  # an image member of zero bytes
    "unreadable_image",  # no decoder reads it to its end
    "too_many_pixels",  # over input.max_pixels, or what a slow decoder is given, by its header
    "bad_caption",  # the caption is not UTF-8, or not text
    "bad_json",  # the json member is not a JSON object
    "bad_uid",  # input.uid_field is named and the sample has no such 128-bit value
)


@dataclass(frozen=True)
class Shard:
    """One input tar: its `name` relative to the input root, and where to open it.

    `size` in bytes and `version`, a token that changes when the file does, are what its listing tells, None where that
    tells nothing.  The version is no part of a result.
    """

    name: str
    url: str
    size: int | None
    version: str | None = None
    may_read: bool = True
    """Whether the caller of this command named it, or it is a local file: `run.json` alone opens nothing else."""

    @property
    def stored(self) -> list[Any]:
        """What `run.json` holds of it: a command as it stands, another URL without what may be secret."""
        url = self.url if self.url.startswith(("pipe:", "/")) else without_secrets(self.url)
        return [self.name, url, self.size, self.version]


def signature_schema(dim: int, hash: str = "phash", fields: tuple[str, ...] = ()) -> pa.Schema:
    """One row per sample of one shard; a bad sample has `bad` set and nulls from `digest` to `captions`.

    `hash` is 32 bytes for the method `pdq`, null for an image of low quality, and 64 bits for all others.
    `embedding` has `dim` float16 components, is L2-normalised, and is absent when `dim` is 0.  `fields`
    are those of the json that `images.keep` names; each has a column of texts.
    """
    columns = [
        pa.field("uid", UID, nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("bad", pa.dictionary(pa.int8(), pa.string())),
        pa.field("detail", pa.string()),
        pa.field("digest", pa.binary(16)),  # the first half of the sha256 of the image member's bytes
        pa.field("hash", pa.binary(32) if hash == "pdq" else pa.uint64()),  # the perceptual hash, first bit highest
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes", pa.int64()),  # of the image member
        pa.field("blank", pa.bool_()),  # one colour, as far as is seen
        pa.field("look", pa.binary(LOOK_BYTES)),  # of an image with hardly any structure
        pa.field("picture", pa.binary()),  # the content in detail and in colour: see `details`
        pa.field("caption", pa.string()),
        pa.field("fingerprint", pa.binary(16)),  # of the normalised caption; null for an empty caption
        pa.field("captions", pa.list_(pa.string())),  # further captions, from the json member
    ]
    columns += [pa.field(f"json:{name}", pa.string()) for name in fields]
    if dim:
        columns.append(pa.field("embedding", pa.list_(pa.float16(), dim)))
    return pa.schema(columns)


EDGES = pa.schema(
    [
        # ordinals of two representative rows, a < b
        pa.field("a", pa.int64(), nullable=False),
        pa.field("b", pa.int64(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
    ]
)

HUBS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("hub", pa.int64(), nullable=False),  # the members of a hub are candidates of each other
    ]
)

JUDGED = pa.schema(
    [
        # ordinals of two rows that were compared, the one whose content digest is smaller first
        pa.field("a", pa.int64(), nullable=False),
        pa.field("b", pa.int64(), nullable=False),
        pa.field("evidence", pa.float32(), nullable=False),  # of the alignment of their thumbnails, from 0 to 1
        pa.field("score", pa.float32()),  # null where evidence and cosine gave no cause to look closer
    ]
)

SIGNALS = ("attention_entropy", "anisotropy", "sharpness")
"""What may be measured of a caption beside its magnitude."""

SCORES = pa.schema(
    [
        pa.field("token_ids", pa.binary(16), nullable=False),  # blake2b-128 of the token ids
        pa.field("magnitude", pa.float32(), nullable=False),
        pa.field("magnitude_eps", pa.float32()),
        pa.field("values", pa.list_(pa.float32()), nullable=False),  # of each seed those of its timesteps
        *(pa.field(name, pa.float32()) for name in SIGNALS),  # the mean over seeds, null unless asked for
    ]
)

PAIR_SCORES = pa.schema(
    [
        # one row a sample, all null but the first for a bad one
        pa.field("uid", UID, nullable=False),
        pa.field("magnitude", pa.float32()),
        pa.field("magnitude_eps", pa.float32()),
        pa.field("values", pa.list_(pa.float32())),  # of each seed those of its timesteps
        pa.field("cause", pa.string()),  # why a good sample has no score
    ]
)

ROUNDING = pa.schema([pa.field("error", pa.float32(), nullable=False)])
"""How far a precision below float32 moves the predictions for a few captions."""

GENERALISED = pa.schema(
    [
        pa.field("text", pa.large_string(), nullable=False),  # a flagged caption, distinct and sorted
        pa.field("general", pa.large_string()),  # as it was rewritten
        pa.field("cause", pa.string()),  # why it could not be
        pa.field("by", pa.string(), nullable=False),  # the rewriter
    ]
)

GENERALITY = pa.schema(
    [
        # from 0, specific, to 10, general; null for a caption without a token
        pa.field("generality", pa.float32()),  # the mean of the others
        pa.field("generality_specificity", pa.float32()),
        pa.field("generality_broadness", pa.float32()),
        pa.field("generality_tense", pa.float32()),
        pa.field("generality_abstraction", pa.float32()),
    ]
)

MANIFEST = pa.schema(
    [
        pa.field("uid", UID, nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("loss_weight", pa.float32(), nullable=False),
        pa.field("reasons", pa.list_(pa.string()), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("canonical_uid", UID),
        pa.field("match_method", pa.string()),
        pa.field("match_distance", pa.float32()),
        pa.field("image_group", pa.int64(), nullable=False),
        pa.field("caption_group", pa.int64(), nullable=False),
        pa.field("image_count", pa.int32(), nullable=False),
        pa.field("caption_count", pa.int32(), nullable=False),
        pa.field("joint_count", pa.int32(), nullable=False),
        pa.field("duplication", pa.string(), nullable=False),
        pa.field("magnitude", pa.float32()),
        pa.field("magnitude_eps", pa.float32()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("caption_match", pa.string()),
        pa.field("caption_distance", pa.float32()),
        pa.field("caption_images", pa.int32(), nullable=False),
        pa.field("image_captions", pa.int32(), nullable=False),
        pa.field("mitigate", pa.bool_(), nullable=False),
        *GENERALITY,
        *(pa.field(name, pa.float32()) for name in SIGNALS),
        pa.field("match_score", pa.float32()),
        pa.field("match_threshold", pa.float32()),
    ]
)

METHODS = ("exact", "hash", "embedding", "blank")
"""How an edge between two images was verified, the strongest first; `blank` by the looks of two blank ones."""


CAPTION_METHODS = ("exact", "template", "near", "semantic")
"""How an edge between two captions was verified, each a tier of `captions.tiers`."""

CAPTION_KEEPERS = pa.schema(
    [
        pa.field("keeper", pa.int64(), nullable=False),  # row in the table of distinct captions, -1 for none
        pa.field("method", pa.int8(), nullable=False),  # of the edge to it: a position in CAPTION_METHODS
        pa.field("distance", pa.float32(), nullable=False),  # 1 - Jaccard index if near, 1 - cosine if semantic, else 0
    ]
)


@dataclass(frozen=True)
class Samples:
    """The signature columns of every sample, rows sorted by (shard, index); `good` is False for bad samples."""

    shards: list[Shard]
    first: Ints  # of each shard, the ordinal of its first row; one more at the end
    good: npt.NDArray[np.bool_]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.good)

    @property
    def compared(self) -> npt.NDArray[np.bool_]:
        """Tell which are compared by hash and embedding: the good ones with enough structure."""
        return self.good & ~self.flags("blank")

    def flags(self, name: str) -> npt.NDArray[np.bool_]:
        """Return a column of flags, False for null."""
        flags: npt.NDArray[np.bool_] = self.table[name].fill_null(False).to_numpy()
        return flags

    def ints(self, name: str) -> Ints:
        """Return a column as int64, 0 for null."""
        column: Ints = pc.fill_null(self.table[name], 0).to_numpy().astype(np.int64)
        return column


def voids(column: pa.ChunkedArray) -> npt.NDArray[np.void]:
    """Return a column of fixed-size binaries as numpy values that sort and compare as bytes do; nulls as zeros."""
    array = pc.fill_null(column, bytes(column.type.byte_width)).combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    width = array.type.byte_width
    return np.frombuffer(array.buffers()[1], np.dtype(f"V{width}"), len(array), array.offset * width)


@dataclass(frozen=True)
class Groups:
    """One row per sample.  A bad sample is its own group of one."""

    rank: Ints  # place in the order `images.keep`, 0 the best; bad samples last
    image_group: Ints  # ordinal of the keeper
    method: npt.NDArray[np.int8]  # of the edge to the keeper: a position in METHODS, -1 for keepers
    distance: npt.NDArray[np.float32]
    caption_group: Ints  # ordinal of the sample that stands for the caption group
    caption: Ints  # row in the table of distinct captions, -1 where bad
    image_count: Ints
    caption_count: Ints
    joint_count: Ints
    caption_method: npt.NDArray[
        np.int8
    ]  # of the edge to the keeper's caption, -1 for the one that stands for the group
    caption_distance: Floats
    caption_images: Ints  # distinct images in its caption group
    image_captions: Ints  # distinct captions in its image group
    score: Floats  # of the edge to the keeper, NaN for keepers
    threshold: float  # that scores were compared with


@dataclass(frozen=True)
class Scores:
    """Magnitudes, NaN where there is none, and what they depend on."""

    captions: Floats  # of each distinct caption; of one scored in pairs the highest of its samples', -inf for none
    samples: Floats
    samples_eps: Floats  # on the epsilon scale
    info: dict[str, Any]
    reference: Floats | None = None  # of the captions from which the threshold is taken, where it asks for some
    generalised: Floats | None = None  # of the generalised captions, where there are any
    by_timestep: Floats | None = None  # (N, timesteps), of what the threshold is a quantile of
    unscored: pa.ChunkedArray | None = None  # of each sample, why a good one has none
    signals: dict[str, Floats] = field(default_factory=dict)  # of each sample


@dataclass(frozen=True)
class GeneralityScores:
    """Of each distinct caption the columns of GENERALITY, (N, 5), NaN without a score, and what they depend on."""

    values: Floats
    generalised: Floats | None  # those of the generalised captions, where there are any
    info: dict[str, Any]


ACTIONS = ("keep", "mask", "drop", "bad")
KEEP, MASK, DROP, BAD = range(4)
DUPLICATION = ("none", "caption", "partial", "full")


@dataclass(frozen=True)
class Decisions:
    """One row per sample."""

    action: npt.NDArray[np.int8]  # a position in ACTIONS
    reasons: list[npt.NDArray[np.bool_]]  # one flag column per code of `codes`
    codes: list[str]
    canonical: Ints  # ordinal of the sample kept in its place, -1 for none
    duplication: npt.NDArray[np.int8]  # a position in DUPLICATION
    weight: Floats  # loss weight
    pool_weight: Floats  # that with pooled captions: not 0 where only its own is memorized and another is safe
    mitigate: npt.NDArray[np.bool_]  # handed over to caption mitigation in training
    pooled: pa.ListArray  # pooled captions, null where none were pooled
