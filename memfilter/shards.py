"""Find the shards that a user names, name them below one root, and check them against img2dataset's side-cars."""

from __future__ import annotations

import glob
import io
import json
import os
import posixpath
import re
import shlex
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

import braceexpand
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import ConfigError, InputError, ShardError, in_one_line, shown, without_secrets
from .records import Shard
from .remote import TIMEOUT, RemoteStream, Told, cause, retried

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
_MAX_STATS = 1 << 20  # bytes that are read of a `_stats.json`
REMEDY = "fetch it again or pass on_bad_shard: skip"
NOT_NAMED = "where it lies, run.json alone says; name it with --inputs PATTERNS, or give --trust"
"""Why a shard is not read that the caller of this command did not name."""

T = TypeVar("T")


def find_shards(
    patterns: Iterable[str], root: str | None = None, allow_pipe: bool = False, settled: str | None = None
) -> tuple[list[Shard], str]:
    """Return the shards that brace expansions, globs, folders and fsspec URLs name, by name, and the input root.

    A root that an earlier call has returned is `settled`: no file system is asked what it means.

    Raises InputError when a pattern matches nothing or two inputs share a relative name, ConfigError for a `pipe:` URL
    that was not allowed.
    """
    urls = list_shards(patterns, allow_pipe)
    paths = {url: path_of(url) for url in urls}
    if root is not None:
        root = path_of(_canonical(root.removeprefix("file://"))).rstrip("/")
    else:
        root = _common_folder(paths.values()) if settled is None else without_secrets(settled)
    shards: dict[str, Shard] = {}
    for url, path in paths.items():
        if not path.startswith(root.rstrip("/") + "/"):
            raise InputError(f"{shown(url)}: not below the input root {root}; give another --out or set input.root")
        name = path[len(root.rstrip("/")) :].lstrip("/")
        if not name.isprintable():
            raise InputError(f"{name!r}: a shard's name must be UTF-8 text; rename it")
        if leads_out(name):
            raise InputError(
                f"{shown(url)}: is listed as {name!r}, which would lead out of the run directory; rename it"
            )
        stem = posixpath.normpath(shard_stem(name))  # of a store, a//b and a/b are two
        if stem in shards:
            raise InputError(
                f"{shown(url)} and {shown(shards[stem].url)} have the same name '{name}'; set input.root to tell apart"
            )
        shards[stem] = Shard(name, url, *urls[url])
    return sorted(shards.values(), key=lambda s: s.name), root


def list_shards(patterns: Iterable[str], allow_pipe: bool = False) -> dict[str, Told]:
    """Return the URLs of the shards that patterns name, and what is told of each; raises what `find_shards` does."""
    urls: dict[str, Told] = {}
    for pattern in (p.removeprefix("file://") for p in patterns):
        if not pattern:
            raise InputError("an empty name was given for a shard; is a variable of the shell unset?")
        if pattern.startswith("pipe:"):
            if not allow_pipe:
                raise ConfigError(f"{shown(pattern)}: runs a command; set input.allow_pipe: true to allow it")
            urls[pattern] = Told(None, None)
            continue
        try:
            expanded = list(braceexpand.braceexpand(pattern))
        except ValueError as e:
            raise InputError(f"{pattern}: its braces are not balanced") from e
        for one in expanded:
            urls.update(_expand(one))
    if not urls:
        raise InputError("no shards given; name .tar files, folders, globs or URLs")
    return urls


def leads_out(name: str) -> bool:
    """Whether a name is none of a place below a folder, here or on another system: `..`, absolute, with a drive."""
    parts = re.split(r"[/\\]", name)
    return not parts[0] or ".." in parts or re.match("[A-Za-z]:", name) is not None


def shard_stem(name: str) -> str:
    """Return a shard's name without its tar suffix."""
    return next((name[: -len(s)] for s in TAR_SUFFIXES if name.lower().endswith(s)), name)


def _expand(pattern: str) -> dict[str, Told]:
    if SCHEME.match(pattern):
        return _expand_remote(pattern)
    path = Path(pattern)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.name.lower().endswith(TAR_SUFFIXES) and p.is_file()]
        if not files:
            raise InputError(f"{pattern}: the folder holds no {', '.join(TAR_SUFFIXES)} file")
    elif path.is_file():
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not files:
            missing = "the pattern matches no file" if glob.has_magic(pattern) else "no such file or folder"
            raise InputError(f"{pattern}: {missing}")
    # a link keeps the name that it was given
    return {os.path.abspath(p): Told(s.st_size, str(s.st_mtime_ns)) for p, s in ((p, p.stat()) for p in files)}


def _expand_remote(pattern: str) -> dict[str, Told]:
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        if glob.has_magic(path.split("?")[0] if path.startswith("http") else path):
            infos = {p: retried(partial(fs.info, p)) for p in sorted(retried(lambda: fs.glob(path)))}
        elif (info := retried(lambda: fs.info(path))).get("type") == "directory":
            tars = [p for p in retried(lambda: fs.find(path)) if p.lower().endswith(TAR_SUFFIXES)]
            infos = {p: retried(partial(fs.info, p)) for p in sorted(tars)}
        else:
            infos = {path: info}
        told = {p if p.startswith("http") else fs.unstrip_protocol(p): Told.of(info) for p, info in infos.items()}
    except MemoryError:
        raise
    except ImportError as e:
        raise InputError(f"{pattern}: {in_one_line(e)}; install the package for this protocol") from e
    except Exception as e:  # fsspec's back ends raise what they like
        raise InputError(f"{pattern}: cannot be listed: {type(e).__name__}: {cause(e)}") from e
    if not told:
        raise InputError(f"{pattern}: the pattern matches no file")
    return told


def told_of(url: str) -> Told:
    """Return what a file system or a store tells of a shard now; raises InputError where it tells nothing."""
    try:
        if SCHEME.match(url):
            fs, path = fsspec.core.url_to_fs(url)
            return Told.of(retried(lambda: fs.info(path)))
        status = os.stat(url)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is no file")
        return Told(status.st_size, str(status.st_mtime_ns))
    except MemoryError:
        raise
    except Exception as e:  # fsspec's back ends raise what they like
        raise InputError(cause(e)) from e


def is_local(url: str) -> bool:
    """Whether a shard's URL is the whole path of a local file, which is what `find_shards` returns of one."""
    return os.path.isabs(url) and not url.startswith("pipe:")


def _canonical(url: str) -> str:
    """Return a URL as its file system itself would write it."""
    if not SCHEME.match(url) or url.startswith("http"):
        return url
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as e:  # an unknown protocol, or one whose package is not installed
        raise InputError(f"{url}: {in_one_line(e)}") from e
    canonical: str = fs.unstrip_protocol(path)
    return canonical


def path_of(url: str) -> str:
    """Return the path by which a shard is named: its URL without the query, or the last tar in a piped command."""
    if url.startswith("pipe:"):
        try:
            words = [w for w in shlex.split(url) if shard_stem(w.split("?")[0]) != w.split("?")[0]]
        except ValueError as e:
            raise InputError(f"{shown(url)}: {in_one_line(e)}") from e
        if not words:
            raise InputError(f"{shown(url)}: the command names no .tar file by which to know the shard")
        return path_of(words[-1])
    if SCHEME.match(url):
        return without_secrets(url.split("?")[0].split("#")[0])
    return os.path.abspath(url)


def _common_folder(paths: Iterable[str]) -> str:
    folders = [p.rsplit("/", 1)[0].split("/") for p in paths]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared)


def check_side_cars(shard: Shard, keys: list[str], timeout: float = TIMEOUT) -> None:
    """Raise ShardError when img2dataset's files beside the shard tell of other samples than these, one key each.

    `STEM_stats.json` counts the successes, `STEM.parquet` lists their keys.  A side-car that cannot be read as such is
    nothing to check against.
    """
    if shard.url.startswith("pipe:"):
        return
    stem = shard_stem(shard.url.split("?")[0] if SCHEME.match(shard.url) else shard.url)
    stats = _read_side_car(f"{stem}_stats.json", timeout, lambda f: json.loads(f.read(_MAX_STATS)))
    expected = stats.get("successes") if isinstance(stats, dict) else None
    if type(expected) is int and expected != len(keys):
        raise ShardError(
            f"{shard.name}: holds {len(keys):,} samples, {PurePosixPath(stem).name}_stats.json counts {expected:,}; "
            f"{REMEDY}"
        )
    listed = _read_side_car(f"{stem}.parquet", timeout, _successes)
    if listed is None:
        return
    held = set(keys)
    differences = {"missing": listed - held, "extra": held - listed}
    told = [f"{len(some):,} {how} (first {min(some)!r})" for how, some in differences.items() if some]
    if told:
        raise ShardError(
            f"{shard.name}: its keys are not those that {PurePosixPath(stem).name}.parquet lists as success: "
            f"{', '.join(told)}; {REMEDY}"
        )


def _read_side_car(path: str, timeout: float, read: Callable[[IO[bytes]], T]) -> T | None:
    try:
        if SCHEME.match(path):
            with RemoteStream(path, timeout=timeout) as stream:
                return read(io.BytesIO(stream.read()))
        with open(path, "rb") as f:
            return read(f)
    except MemoryError:
        raise
    except Exception:  # no side-car, or one that is none of ours
        return None


def _successes(file: IO[bytes]) -> set[str] | None:
    """Return the keys that an img2dataset parquet lists with status `success`; its rows are in no order."""
    table = pq.ParquetFile(file)
    if not all(_is_text(table.schema_arrow.field(name).type) for name in ("key", "status")):
        return None
    keys: set[str] = set()
    for batch in table.iter_batches(columns=["key", "status"]):
        succeeded = batch.filter(pc.fill_null(pc.equal(batch["status"].cast(pa.string()), "success"), False))
        keys.update(succeeded["key"].drop_null().to_pylist())
    return keys


def _is_text(type: pa.DataType) -> bool:
    value = type.value_type if pa.types.is_dictionary(type) else type
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))
