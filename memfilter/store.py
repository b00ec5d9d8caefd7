"""Where each artefact of a run lives, and how it comes to be there whole or not at all.

A file is written under a temporary name and renamed.  A table is *done* when it is there with the digest of
everything that shaped it in its metadata; a stage asks `done` before it works, so the same command continues a run.

A decision is made in `next/`, beside the run's own files, which it reads where they are done already.  It takes their
place once it is whole; from the first filtered shard that is replaced to the last file, a journal says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .config import digest_of
from .errors import RunError
from .lock import locked

FORMAT = 2
"""Version of the run directory's layout; another version's directory is refused."""

_DIGEST = b"memfilter.digest"
_NOTE = b"memfilter.note"
_SEAL = b"memfilter.seal"
_BLANK_SEAL = b"0" * 32
_TEMPORARY = re.compile(r"\..+\.\d+\.memfilter\.tmp")  # as `replacing` names a file
_RESTORE = "bring it back from a copy, or give another --out"
_DICTIONARIES = ["bad", "detail", "shard", "action", "reasons", "match_method", "duplication", "caption_match"]


class Store:
    """The paths of a run directory; with a `base`, of a decision that is to take the place of that one's files."""

    def __init__(self, path: str | Path, base: Store | None = None) -> None:
        self.path, self.base = Path(path), base
        self.run_file = self.path / "run.json"
        self.edges = self.path / "edges"
        self.captions = self.path / "captions" / "captions.parquet"
        self.caption_groups = self.path / "captions" / "groups.parquet"
        self.scores = self.path / "scores"
        self.generalised = self.path / "generalised" / "captions.parquet"
        self.generality = self.path / "generality"
        self.manifest = self.path / "manifest"
        self.threshold = self.manifest / "threshold.json"
        run = self.path if base is None else base.path
        self.shards = run / "shards"  # replaced one by one
        self.journal = run / "manifest" / "journal.json"  # in the folder that is copied to serve a loader
        self.answers = run / "generalised"  # of rewriters: they are added to, whatever becomes of a decision

    def beside(self) -> Store:
        """Return the paths of a decision about this run, beside its own files."""
        return Store(self.path / "next", self)

    def check_own(self) -> None:
        """Raise RunError where the folder of a decision holds something else, which would be removed with it."""
        is_folder = self.path.is_dir() and not self.path.is_symlink()
        is_new = not os.path.lexists(self.path) or (is_folder and not any(self.path.iterdir()))
        # the run.json of a run, as of one that was given this folder as its --out, has no `earlier`
        if not is_new and not (is_folder and "earlier" in (read_sealed(self.run_file) or {})):
            raise RunError(
                f"{self.path}: in the way, and not written by this run (or its run.json is damaged); move it away and "
                "run the same command again"
            )

    def clear(self) -> None:
        """Remove the folder of a decision; its run.json, by which it is known to be one, goes last."""
        for path in self.path.iterdir():
            if path != self.run_file:
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def at(self, path: Path) -> Path:
        """Return where a file of this decision is read: its own, or else the run's."""
        if self.base is None or path.exists():
            return path
        return self.base.path / path.relative_to(self.path)

    def places(self, path: Path) -> list[Path]:
        """Return where a file of this decision may be: its own, and the run's."""
        return [path] if self.base is None else [path, self.base.path / path.relative_to(self.path)]

    def place(self, path: Path, digest: str) -> Path:
        """Return where a table is to be: the run's own where that is `done` under this digest, else `path`."""
        if self.base is None or not done(own := self.base.path / path.relative_to(self.path), digest):
            return path
        path.unlink(missing_ok=True)  # of another digest, which `at` would find
        return own

    def name(self, path: Path) -> str:
        """Return the name in the run directory of a file of this decision or the run's."""
        inside = self.base is None or path.is_relative_to(self.path)
        return path.relative_to(self.path if inside or self.base is None else self.base.path).as_posix()

    def signatures(self, shard: str) -> Path:
        """Return the path of a shard's signature part."""
        return self.at(self.own_signatures(shard))

    def own_signatures(self, shard: str) -> Path:
        """Return the path at which this decision has a shard's signature part where it needs another."""
        return self.path / "signatures" / f"{shard}.parquet"

    def has_signatures(self) -> bool:
        """Tell whether any shard has been read."""
        return next((self.path / "signatures").rglob("*.parquet"), None) is not None

    def pair_scores(self, shard: str) -> Path:
        """Return the path of the scores of a shard's pairs."""
        return self.scores / "pairs" / f"{shard}.parquet"

    def manifest_part(self, shard: str) -> Path:
        """Return the path of a shard's manifest part."""
        return self.manifest / "parts" / f"{shard}.parquet"

    @contextmanager
    def locked(self, linked_shards: bool = False) -> Iterator[None]:
        """Hold the run directory for this process alone; the lock dies with the process.

        Raises RunError when another run holds it, it cannot be written, `next/` holds what no decision left there, or a
        folder in it is a link, by which what is written there would land elsewhere.  That of the filtered shards may be
        `linked_shards`, on another disk, where the caller says so.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
            except OSError as e:
                raise RunError(f"{self.path}: cannot be written: {e.strerror}; choose another --out") from e
            self._clear_temporary(linked_shards)
            self.beside().check_own()
            yield

    def _clear_temporary(self, linked_shards: bool) -> None:
        """Remove the files that a killed call left half written; raises RunError for a folder that is a link."""
        allowed = {self.beside().path, *([self.shards] if linked_shards else [])}  # `check_own` tells of the first
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in folders):
                if path.is_symlink() and path not in allowed:
                    advice = "; give --trust if that is meant" if path == self.shards else ""
                    raise RunError(
                        f"{path}: is a link, which leads out of the run directory; put the folder itself there{advice}"
                    )
            for name in files:
                if _TEMPORARY.fullmatch(name):
                    Path(folder, name).unlink()

    def read_run(self) -> dict[str, Any] | None:
        """Return what the first run stored, None for a new directory; raises RunError for another version's."""
        try:
            stored = json.loads(read_bytes(self.run_file))
        except FileNotFoundError:
            others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
            if others:
                raise RunError(
                    f"{self.path}: holds '{min(others)}' and no memfilter run; give an empty --out"
                ) from None
            return None
        except NotADirectoryError:
            raise RunError(f"{self.path}: is a file; give a folder as --out") from None
        except (OSError, ValueError) as e:
            raise RunError(f"{self.run_file}: cannot be read: {e}; {_RESTORE}") from e
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise RunError(
                f"{self.path}: was written in format {stored.get('format') if isinstance(stored, dict) else None}, "
                f"this version writes format {FORMAT}; give another --out"
            )
        if not is_sealed(self.run_file):
            raise RunError(f"{self.run_file}: its bytes have changed; {_RESTORE}")
        del stored["digest"]
        if not isinstance(stored.get("root"), str | None):
            raise RunError(f"{self.run_file}: damaged, its root is no folder's name; {_RESTORE}")
        return stored

    def write_run(self, values: dict[str, Any]) -> None:
        """Store what later commands on this directory need; for its owner's eyes alone where it holds a command."""
        shards = [*values.get("shards", []), *values.get("earlier", [])]
        is_private = any(str(url).startswith("pipe:") for _, url, *_ in shards)
        write_sealed(self.run_file, {**values, "format": FORMAT}, is_private)

    def settings(self) -> dict[str, Any] | None:
        """Return what the run stored, or the decision that is taking its place; raises what `read_run` does."""
        stored, following = self.read_run(), self.beside().run_file
        return (read_sealed(following) or stored) if self.journal.exists() else stored

    def is_finished(self) -> bool:
        """Tell whether a decision stands that is not to be changed by accident."""
        return (self.manifest / "manifest.json").exists()

    def read_journal(self) -> Journal | None:
        """Return the journal of a decision that is taking the run's place, None where there is none."""
        if not self.journal.exists():
            return None
        values = read_sealed(self.journal) or {}  # one that is damaged still says that not all fits together
        return Journal(values.get("command", "run"), values.get("kept", []))


@dataclass(frozen=True)
class Journal:
    """What is known of a decision from the first to the last file that it replaces."""

    command: str  # that finishes it
    kept: list[str]  # the digests of filtered shards, by which those of the run are known that no part tells of


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Nothing is forced to the disk: what a power failure leaves half written fails its checks and is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.memfilter.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the array of a new .npy file, memory-mapped, for which the disk has room.

    Raises OSError where it has none: a mapped file that runs out of disk as it is written kills the process.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        reserve(file.fileno(), path.stat().st_size)
    return array


def reserve(file: int, size: int) -> None:
    """Give a file's first bytes their room on the disk; raises OSError where it has none."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file, 0, size)


def check_file(path: Path) -> None:
    """Raise OSError for what is no regular file: a named pipe would be waited for for ever, and a device has no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no file", str(path))


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; raises OSError for one that cannot be read, or is none."""
    check_file(path)
    return path.read_bytes()


def canonical(value: Any) -> str:
    """Return the one JSON text in which a value is written."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any, is_private: bool = False) -> None:
    """Write canonical JSON, whole or not at all; one that is private nobody but its owner may read."""
    with replacing(path) as temporary:
        if is_private:
            temporary.touch(0o600)
        temporary.write_text(canonical(value), encoding="utf-8")


def write_sealed(path: Path, values: dict[str, Any], is_private: bool = False) -> None:
    """Write canonical JSON with a digest of its own, by which `is_sealed` knows that no byte has changed."""
    write_json(path, {**values, "digest": digest_of(values)}, is_private)


def is_sealed(path: Path) -> bool:
    """Tell whether every byte of a file is as `write_sealed` wrote it; raises OSError for one that cannot be read."""
    return _unsealed(read_bytes(path)) is not None


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, None for a file that is not there or not as it was written."""
    try:
        return _unsealed(read_bytes(path))
    except OSError:
        return None


def _unsealed(data: bytes) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(data)
        text = canonical(values)
        return values if values.pop("digest") == digest_of(values) and text.encode() == data else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def write_table(path: Path, table: pa.Table, digest: str, note: dict[str, Any] | None = None) -> None:
    """Write a parquet file that `done(path, digest)` recognises; `note` is kept beside it.

    Its pages have checksums, and its footer a seal: the digest of all its bytes with the seal itself blank.
    """
    metadata = {**(table.schema.metadata or {}), _DIGEST: digest.encode(), _SEAL: _BLANK_SEAL}
    if note is not None:
        metadata[_NOTE] = json.dumps(note, sort_keys=True).encode()
    with replacing(path) as temporary:
        # most columns hold no value twice: no dictionary is tried for them
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            compression="zstd",
            use_dictionary=_DICTIONARIES,
            write_page_checksum=True,
        )
        with open(temporary, "r+b") as f:
            at, _ = _find_seal(f)
            seal = _digest_without_seal(f, at).encode()
            f.seek(at)
            f.write(seal)


def done(path: Path, digest: str) -> bool:
    """Tell whether `path` is a whole table that was written under this digest."""
    try:
        return read_digest(path) == digest
    except RunError:
        return False


def read_digest(path: Path) -> str:
    """Return the digest under which a table was written; raises RunError when there is none."""
    return _metadata(path).get(_DIGEST, b"").decode()


def read_note(path: Path) -> dict[str, Any]:
    """Return the note written beside a table, empty where there is none; raises RunError for a damaged file."""
    try:
        note: dict[str, Any] = json.loads(_metadata(path).get(_NOTE, b"{}"))
    except ValueError as e:
        raise RunError(f"{path}: missing or damaged; run the same command again") from e
    return note


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        check_file(path)
        return pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as e:
        raise RunError(f"{path}: missing or damaged; run the same command again") from e


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return a table, its pages checked; raises RunError naming a missing or damaged file."""
    try:
        check_file(path)
        return pq.ParquetFile(path, page_checksum_verification=True).read(columns)
    except (OSError, pa.ArrowException) as e:
        raise RunError(f"{path}: missing or damaged ({e}); delete it and run the same command again") from e


def file_digest(path: Path) -> str:
    """Return the blake2b-128 hex digest of a file's bytes; of a table's, with its seal blank.

    Raises RunError for a table that its seal does not fit, OSError for a file that cannot be read.
    """
    check_file(path)
    with open(path, "rb") as f:
        if path.suffix != ".parquet":
            return _digest_without_seal(f, None)
        at, seal = _find_seal(f)
        digest = _digest_without_seal(f, at)
    if seal != digest.encode():
        raise RunError(f"{path}: its bytes have changed; delete it and run the same command again")
    return digest


def _find_seal(f: IO[bytes]) -> tuple[int, bytes]:
    """Return where in a parquet file the seal begins, and the seal; what there is no place for has an empty one."""
    size = f.seek(0, os.SEEK_END)
    f.seek(max(size - 8, 0))
    footer = min(int.from_bytes(f.read(4), "little") + 8, size)
    f.seek(size - footer)
    data = f.read()
    at = data.rfind(_SEAL) + len(_SEAL) + 2  # behind the key come the type and the length of the value
    return (size - footer + at, data[at : at + len(_BLANK_SEAL)]) if at > len(_SEAL) + 1 else (size, b"")


def _digest_without_seal(f: IO[bytes], seal: int | None) -> str:
    digest = hashlib.blake2b(digest_size=16)

    def feed(size: int) -> None:
        while size and (chunk := f.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)

    f.seek(0)
    if seal is not None:
        feed(seal)
        digest.update(_BLANK_SEAL)
        f.seek(len(_BLANK_SEAL), os.SEEK_CUR)
    feed(sys.maxsize)
    return digest.hexdigest()
