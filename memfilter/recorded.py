"""What a run was made of, as it has recorded it, against what it is to be made of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .commit import names_of
from .config import Config, digest_of
from .denoisers import ModelFiles
from .encoders.recorded import Recorded
from .errors import ConfigError, RunError, in_one_line, printable
from .records import Shard, signature_schema
from .shards import is_local, leads_out
from .signatures import EARLIER, is_signed, recorded, signed_keys
from .store import Store

_FREE: dict[str, set[str]] = {  # keys that decide nothing; of models the files are compared
    "input": {"root", "allow_pipe", "max_memory", "timeout"},
    "magnitude": {"model", "denoiser", "lora", "single_file_config", "devices"},
    "generalise": {*Config.model_fields["generalise"].annotation.model_fields},  # type: ignore[union-attr]
}
_UPDATE = "'memfilter run' with --update"


def stored_shards(path: Path, lists: list[list[Any]]) -> list[Shard]:
    """Return the shards of a run.json; raises RunError for a name that leads out of the run directory."""
    shards = []
    for values in lists:
        try:
            name, url, size, version = values
            shards.append(Shard(name, url, size, version, may_read=is_local(url)))
            fault = "lies outside" if leads_out(name) else "" if name.isprintable() else "is no text"
        except (AttributeError, TypeError, ValueError) as e:
            raise RunError(f"{path}: its run.json is damaged ({in_one_line(e)}); read the input with {_UPDATE}") from e
        if fault:
            raise RunError(f"{path}: its run.json names the shard {name!r}, which {fault}; give another --out")
    return shards


def parse_stored(path: Path, stored: dict[str, Any]) -> tuple[Config, list[Shard], ModelFiles | None]:
    """Return configuration, shards and model of a run; raises RunError for a run.json that does not hold them."""
    try:
        model = ModelFiles.read(stored["model"])
        return Config.parse(stored["config"]), stored_shards(path, stored["shards"]), model
    except (ConfigError, KeyError, TypeError) as e:
        raise RunError(
            f"{path}: its run.json is damaged, or of another version of memfilter ({e}); read the input again with "
            f"{_UPDATE}"
        ) from e


def unchanged(
    path: Path, stored: dict[str, Any], shards: list[Shard], model: ModelFiles | None, config: Config
) -> Config:
    """Return the configuration of a finished run, with this one's keys that decide nothing.

    Raises RunError where another key, the model or the names of the shards differ: a finished run is not changed by
    accident.
    """
    before, listed, known = parse_stored(path, stored)
    values, given = before.model_dump(mode="json"), config.model_dump(mode="json")
    told = []
    for section, keys in values.items():
        deciding = keys.keys() - _FREE.get(section, set())
        was, now = ({f"{section}.{k}": of[section][k] for k in deciding} for of in (values, given))
        told += [differences(was, now)] if was != now else []
    if (known and known.files) != (model and model.files):
        names = [one.name if one else "none" for one in (known, model)]
        told.append(f"the model {names[0]} → {names[1]}" if names[0] != names[1] else f"other files of {names[0]}")
    was_there, is_there = ({s.name for s in some} for some in (listed, shards))
    told += [f"shards more: {names_of(more)}"] if (more := is_there - was_there) else []
    told += [f"shards fewer: {names_of(fewer)}"] if (fewer := was_there - is_there) else []
    if told:
        raise RunError(
            f"{path}: is finished, and this is another run ({'; '.join(told)}); give --update (update=True) to change "
            "it, or another --out"
        )
    for section in ("input", "magnitude"):
        values[section].update({key: given[section][key] for key in _FREE[section]})
    return Config.parse(values)


def differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two mappings for a message."""
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    names = ["signatures"] if "signatures" in names else names  # of another version, which tells of all else
    return ", ".join(f"{printable(name)} {_short(was.get(name))} → {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return printable(text if len(text) <= 40 else f"{text[:37]}...")


def recorded_by(store: Store, shards: list[Shard]) -> dict[str, str] | None:
    """Return by what the signatures of a run were made, None where there are none.

    Raises RunError where some were made otherwise than others, or are without a column that is read now.
    """
    view = store.beside() if store.journal.exists() else store
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for shard in shards:
        path = view.signatures(shard.name)
        try:
            by = recorded(path)
        except RunError:  # missing or damaged: told, or made again, by those who need it
            continue
        if not found and (missing := set(signature_schema(0).names) - set(pq.read_schema(path).names)):
            raise RunError(f"{path}: has no column '{min(missing)}', which is read now; read the input with {_UPDATE}")
        found.setdefault(digest_of(by), (shard.name, by))
    if len(found) > 1:
        (one, a), (other, b), *_ = found.values()
        told = differences(a, b)
        raise RunError(
            f"{store.path}: the signatures of {one} were made otherwise than those of {other} ({told}); make all of "
            f"them again by {_UPDATE}"
        )
    return next((by for _, by in found.values()), None)


def check_signed(
    store: Store,
    shards: list[Shard],
    before: Config,
    config: Config,
    encoder: Recorded | None,
    by: dict[str, str] | None,
    origin: str,
) -> None:
    """Raise RunError where a shard was not read, ConfigError where it was read under another configuration.

    `encoder` is that of the configuration.
    """
    view = store.beside() if store.journal.exists() else store
    same_keys = signed_keys(before) == signed_keys(config)
    if same_keys and config.images.encoder != before.images.encoder:
        same_keys = (encoder.identity if encoder else None) == (by or {}).get("encoder")
    for shard in shards:
        path = view.signatures(shard.name)
        if not path.exists():
            raise RunError(f"{store.path}: the run is not finished, {shard.name} was not read; finish it first")
        if not same_keys or not is_signed(shard, path, config, by or EARLIER):
            raise ConfigError(
                f"{origin}: {shard.name} has no signatures under this configuration; keys of 'input', images.hash, "
                f"decode, ground and encoder, and other fields of the json in images.keep, need {_UPDATE}"
            )
