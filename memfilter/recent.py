"""What a stream met most recently: keys with a row of values each, and the look-up of like images among them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from .details import MOST_BYTES, unpacked
from .looks import most_levels
from .records import LOOK_BYTES

_HASHED, _BLANK = 1, 2
_TRIED = 32  # images with a near hash that are compared, the earliest


class Recent:
    """At most `capacity` keys of 16 bytes, each with a row in every column; a new key beyond evicts the stalest.

    `table["count"]` is the column of that name, (capacity, ...); a row keeps its place for as long as its key stays.
    `added` tells how many keys there ever were.
    """

    def __init__(self, capacity: int, **columns: Any) -> None:
        """Make an empty table with these columns, each a numpy type or a pair of type and shape of a value."""
        self.capacity, self.added = capacity, 0
        # memory that is not written to is not taken
        self._columns = {name: np.zeros(capacity, dtype) for name, dtype in columns.items()}
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._keys: list[bytes] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the rows that hold nothing."""
        return self.__dict__ | {"_columns": {name: column[: len(self)] for name, column in self._columns.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, held in self._columns.items():
            column = np.zeros((self.capacity, *held.shape[1:]), held.dtype)
            column[: len(held)] = held
            self._columns[name] = column

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, column: str) -> npt.NDArray[Any]:
        return self._columns[column]

    def meet(self, key: bytes) -> int | None:
        """Return the row of a key, which is now the most recent, or None."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def key(self, row: int) -> bytes:
        """Return the key of a row."""
        return self._keys[row]

    def touch(self, row: int) -> None:
        """Make the key of this row the most recent."""
        self._rows.move_to_end(self._keys[row])

    def add(self, key: bytes, **values: Any) -> int:
        """Return the row of a new key, with these values."""
        if len(self._keys) < self.capacity:
            row = len(self._keys)
            self._keys.append(key)
        else:
            row = self._rows.popitem(last=False)[1]
            self._keys[row] = key
        self._rows[key] = row
        self.added += 1
        for name, value in values.items():
            self._columns[name][row] = value
        return row

    def put(self, key: bytes, **values: Any) -> int:
        """Return the row of a key, known or new, with these values, all that a row has."""
        if (row := self.meet(key)) is None:
            return self.add(key, **values)
        for name, value in values.items():
            self._columns[name][row] = value
        return row

    def state(self) -> dict[str, Any]:
        """Return all that it holds as tensors of bytes, lists of texts and a number."""
        n = len(self)
        columns = {name: _packed(column[:n]) for name, column in self._columns.items()}
        order = np.fromiter(self._rows.values(), np.int64, n)
        return {"added": self.added, "keys": _packed(_voids(self._keys)), "order": _packed(order), **columns}

    def restore(self, state: dict[str, Any]) -> None:
        """Hold exactly what `state` returned."""
        self.added = int(state["added"])
        self._keys = _unpacked(state["keys"], np.dtype("V16")).tolist()
        order = _unpacked(state["order"], np.dtype(np.int64)).tolist()
        self._rows = OrderedDict((self._keys[row], row) for row in order)
        for name, column in self._columns.items():
            column[: len(self)] = _unpacked(state[name], column.dtype).reshape(-1, *column.shape[1:])


def _voids(keys: list[bytes]) -> npt.NDArray[np.void]:
    return np.frombuffer(b"".join(keys), "V16")


def _packed(values: npt.NDArray[Any]) -> Any:
    """Return values as torch.load(weights_only=True) takes them: bytes in a tensor, or objects in a list."""
    import torch

    if values.dtype.hasobject:
        return values.tolist()
    return torch.from_numpy(np.frombuffer(values.tobytes(), np.uint8).copy())


def _unpacked(values: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype.hasobject:
        return np.array([*values, None], object)[:-1]
    return np.frombuffer(values.numpy().tobytes(), dtype)


# -- images -----------------------------------------------------------------------------------------------------------


def images(capacity: int, hash_bits: int) -> Recent:
    """Return an empty table of images, keyed by the digest of their content.

    `born` numbers them in the order in which they came; `place` tells where, and `count` how often.
    """
    hashes, look, picture = ("u8", hash_bits // 64), ("u1", LOOK_BYTES), ("u1", MOST_BYTES)
    return Recent(capacity, hash=hashes, look=look, picture=picture, kind="u1", born="i8", count="i8", place=object)


def add_image(table: Recent, signature: dict[str, Any], place: str) -> int:
    """Return the row of a new image, of which one sample was met."""
    blank, hash = signature["blank"], signature["hash"]
    return table.add(
        signature["digest"],
        hash=0 if hash is None else words_of(hash, table["hash"].shape[1]),
        look=np.frombuffer(signature["look"], np.uint8) if blank else 0,
        picture=np.frombuffer(signature["picture"].ljust(MOST_BYTES, b"\0"), np.uint8),  # a JPEG tells where it ends
        kind=_BLANK if blank else 0 if hash is None else _HASHED,
        born=table.added,
        count=1,
        place=place,
    )


def find_image(table: Recent, signature: dict[str, Any], radius: int, threshold: float) -> tuple[int, int] | None:
    """Return the row of the earliest image that this one is a copy of, and a position in METHODS; or None.

    The edges are those of a run without an encoder: equal content, else a hash within the radius and a score of the
    threshold, or of two blank images like looks.  All hashes in the table are compared.
    """
    row = table.meet(signature["digest"])
    if row is not None:
        return row, 0
    n = len(table)
    if signature["blank"]:
        rows = np.flatnonzero(table["kind"][:n] == _BLANK)
        look = np.frombuffer(signature["look"], np.uint8).astype(np.int16)
        rows, method = rows[(np.abs(table["look"][rows] - look) <= most_levels(threshold)).all(1)], 3
    elif signature["hash"] is None:
        return None
    else:
        from .hash_kernels import near  # only now: it takes a second to import

        found = near(words_of(signature["hash"], table["hash"].shape[1]), table["hash"][:n], radius)
        rows, method = _copies(table, signature, found[table["kind"][found] == _HASHED], threshold), 1
    if not len(rows):
        return None
    earliest = int(rows[np.argmin(table["born"][rows])])
    table.touch(earliest)
    return earliest, method


def _copies(table: Recent, signature: dict[str, Any], rows: npt.NDArray[Any], threshold: float) -> npt.NDArray[Any]:
    """Return the earliest of these rows that the image is a copy of in detail, and no other."""
    from . import comparison

    own = comparison.planes(unpacked(signature["picture"]))
    for row in rows[np.argsort(table["born"][rows])][:_TRIED]:
        pair = [comparison.planes(unpacked(table["picture"][row].tobytes())), own]
        shown = np.stack(pair if table.key(row) <= signature["digest"] else pair[::-1])  # in the order of a run
        if comparison.compared(shown)[0] >= np.float32(threshold):
            return np.array([row])
    return rows[:0]


def words_of(hash: int | bytes, words: int) -> npt.NDArray[np.uint64]:
    """Return a hash as 64-bit words, (words,)."""
    return np.array([hash], np.uint64) if isinstance(hash, int) else np.frombuffer(hash, np.uint64)
