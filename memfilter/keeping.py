"""The total order `images.keep`, by which one sample of a group is kept.

Of a json's fields the signatures hold each value as text: a string as it stands, a number, true or false as json
writes it; null, lists and objects are no value, like a field or a json that is not there.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .config import JSON, MAX_VALUE, NamedOrder
from .errors import printable
from .records import Ints, Samples

log = logging.getLogger(__name__)

_NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def field_texts(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the values of these fields of a json as text, under the names of their columns."""
    return {JSON + name: _text(fields.get(name)) for name in names}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, list | dict):
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_VALUE:
        text = text[:MAX_VALUE] + "…"  # which is no number and no value that a configuration can name
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair is no text


def rank_samples(samples: Samples, uid: Ints, keep: tuple[str | NamedOrder, ...]) -> Ints:
    """Return each sample's place in the order `keep`, 0 the best; bad samples come last.

    `uid` numbers the samples by their uid, which breaks the last tie.  Of resolution, bytes, caption length and
    numbers in the json the greatest comes first, of uids and named values the first, and the other way round behind a
    '-'.  Numbers are compared as 64-bit floats; a value that is none of them comes last either way.
    """
    columns = [_column(samples, uid, key) for key in keep]
    order = np.lexsort([np.arange(len(samples)), uid, *reversed(columns), ~samples.good])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _column(samples: Samples, uid: Ints, key: str | NamedOrder) -> npt.NDArray[Any]:
    """Return values of which the smallest is the best."""
    if isinstance(key, NamedOrder):
        return _named(samples, key)
    name, sign = key.removeprefix("-"), -1 if key.startswith("-") else 1
    if name.startswith(JSON):
        numbers = -sign * _numbers(samples.table[name])
        if len(numbers) and not np.isfinite(numbers).any():
            log.warning("images.keep: no sample has a number as %s; ties go to the next key", printable(name))
        return np.where(np.isfinite(numbers), numbers, np.inf)
    if name == "uid":
        return sign * uid
    if name == "resolution":
        return -sign * samples.ints("width") * samples.ints("height")
    if name == "bytes":
        return -sign * samples.ints("bytes")
    lengths: Ints = pc.fill_null(pc.utf8_length(samples.table["caption"]), 0).to_numpy().astype(np.int64)
    return -sign * lengths


def _named(samples: Samples, key: NamedOrder) -> Ints:
    values = samples.table[JSON + key.field]
    place = pc.index_in(values, pa.array([_text(v) for v in key.order], pa.string()))
    if len(values) and place.null_count == len(values):
        log.warning(
            "images.keep: no sample has any of the values named of '%s'; ties go to the next key", printable(key.field)
        )
    unlisted = pc.if_else(pc.is_valid(values), len(key.order), len(key.order) + 1)
    return np.asarray(pc.coalesce(place, unlisted.cast(pa.int32()))).astype(np.int64)


def _numbers(texts: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Return texts as numbers, NaN or infinite where they are none or over what 64 bits hold."""
    texts = pc.utf8_trim_whitespace(texts)
    is_number = pc.match_substring_regex(texts, _NUMBER)
    numbers = pc.if_else(is_number, texts, pa.scalar(None, pa.string())).cast(pa.float64())
    found: npt.NDArray[np.float64] = numbers.fill_null(np.nan).to_numpy()
    return found
