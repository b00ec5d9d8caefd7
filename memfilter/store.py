"""Where each artefact of a run lives, and how it comes to be there whole or not at all.

A file is written under a temporary name and renamed.  A table is *done* when it is there with the digest of
everything that shaped it in its metadata; a stage asks `done` before it works, so the same command continues a run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import RunError

FORMAT = 1
"""Version of the run directory's layout; another version's directory is refused."""

_DIGEST = b"memfilter.digest"
_NOTE = b"memfilter.note"
_DICTIONARIES = ["bad", "detail", "shard", "action", "reasons", "match_method", "duplication"]


class Store:
    """The paths of a run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.run_file = self.path / "run.json"
        self.edges = self.path / "edges"
        self.captions = self.path / "captions" / "captions.parquet"
        self.scores = self.path / "scores"
        self.manifest = self.path / "manifest"
        self.shards = self.path / "shards"

    def signatures(self, shard: str) -> Path:
        """Return the path of a shard's signature part."""
        return self.path / "signatures" / f"{shard}.parquet"

    def has_signatures(self) -> bool:
        """Tell whether any shard has been read."""
        return next((self.path / "signatures").rglob("*.parquet"), None) is not None

    def manifest_part(self, shard: str) -> Path:
        """Return the path of a shard's manifest part."""
        return self.manifest / "parts" / f"{shard}.parquet"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process alone; the lock dies with the process.

        Raises RunError when another run holds it or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as e:
            raise RunError(f"{self.path}: another run is using this directory; wait for it or choose another") from e
        except OSError as e:
            raise RunError(f"{self.path}: cannot be written: {e.strerror}; choose another --out") from e
        try:
            for left_over in self.path.rglob(".*.tmp"):
                left_over.unlink()
            yield
        finally:
            lock.release()

    def read_run(self) -> dict[str, Any] | None:
        """Return what the first run stored, None for a new directory; raises RunError for another version's."""
        try:
            stored = json.loads(self.run_file.read_text(encoding="utf-8"))
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
            raise RunError(f"{self.run_file}: cannot be read: {e}; delete the directory and run again") from e
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise RunError(
                f"{self.path}: was written in format {stored.get('format') if isinstance(stored, dict) else None}, "
                f"this version writes format {FORMAT}; give another --out"
            )
        return stored

    def write_run(self, values: dict[str, Any]) -> None:
        """Store what later commands on this directory need."""
        write_json(self.run_file, {"format": FORMAT, **values})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends well, and vanishes otherwise.

    Nothing is forced to the disk: what a power failure leaves half written fails its checks and is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_table(path: Path, table: pa.Table, digest: str, note: dict[str, Any] | None = None) -> None:
    """Write a parquet file with page checksums that `done(path, digest)` recognises; `note` is kept beside it."""
    metadata = {**(table.schema.metadata or {}), _DIGEST: digest.encode()}
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
    note: dict[str, Any] = json.loads(_metadata(path).get(_NOTE, b"{}"))
    return note


def _metadata(path: Path) -> dict[bytes, bytes]:
    try:
        return pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as e:
        raise RunError(f"{path}: missing or damaged; run the same command again") from e


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return a table, its pages checked; raises RunError naming a missing or damaged file."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read(columns)
    except (OSError, pa.ArrowException) as e:
        raise RunError(f"{path}: missing or damaged ({e}); delete it and run the same command again") from e


def file_digest(path: Path) -> str:
    """Return the blake2b-128 hex digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
