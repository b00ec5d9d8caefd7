"""What a data loader does with a manifest: give each sample its loss weight, one by one, in columns or in batches.

All are picklable callables.  The look-up file is opened in the process that first asks, and its pages are shared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, InputError, printable, shown
from .manifest import Manifest, Roots, known_roots, path_of

_log = logging.getLogger(__name__)
_REMEDY = "give the manifest of these shards, or missing='keep'"
_DOUBT = ": is this the manifest of another data set?"
_WHERE = (("__url__", "__key__"), ("shard", "key"))  # what tells a sample's shard and key


class _Weights:
    """What they share: shards known by their URLs, and samples that the manifest does not know."""

    def __init__(self, manifest: Manifest, missing: str, pipes: Mapping[str, str] | None, roots: Roots = ()) -> None:
        if missing not in ("error", "keep"):
            raise ConfigError(f"missing={missing!r}: error or keep")
        self.manifest, self.missing, self.pipes = manifest, missing, manifest.known_pipes(pipes)
        self.roots = known_roots(roots)
        self.mitigates = "mitigate" in manifest.info["config"]["policy"].values()
        self.unknown = 0  # samples of this process that passed with weight 1 because the manifest does not know them
        self._told = False
        self._shards: dict[str, str | None] = dict(self.pipes)  # by URL, None where the manifest knows no such shard
        self._why: dict[str, str] = {}  # of those URLs

    def __reduce__(self) -> tuple[Any, ...]:
        # without the counter and what was looked up: what is equal has equal bytes, by which datasets finds its caches
        return type(self), (self.manifest, self.missing, self.pipes, self.roots)

    def _shard(self, url: str, named: bool = False) -> str | None:
        """Return the name of the shard at a URL, or of this name, None for one that passes unknown."""
        if url not in self._shards:
            try:
                find = self.manifest.name_of if named else self.manifest.shard_of
                name = find(url, self.roots)
                self._shards[url] = name
                if not named:
                    self._compare(url, name)
            except KeyError as e:
                if self.missing == "error":
                    raise KeyError(f"{e.args[0]}; {_REMEDY}{self._doubt()}") from None
                self._shards[url], self._why[url] = None, e.args[0]
        return self._shards[url]

    def _compare(self, url: str, name: str) -> None:
        if not self._told and self.manifest.is_other(name, path_of(url)):
            self._told = True
            _log.warning("%s: has another size than the manifest's shard %s%s", shown(url), printable(name), _DOUBT)

    def _doubt(self) -> str:
        known = any(self._shards.values())
        return "" if known else f"; no shard so far is known{_DOUBT}"

    def _pass(self, url: str, key: str) -> None:
        """Count a sample that passes although the manifest does not know it; raises KeyError where none may."""
        if self.missing == "error":
            raise KeyError(f"{shown(url)}: the manifest has no sample {key!r}; {_REMEDY}")
        self.unknown += 1
        if str(self.unknown).strip("0") == "1":  # 1, 10, 100, ...
            why = self._why.get(url, f"{shown(url)}: the manifest has no sample {key!r}")
            _log.warning("%s; %d passed with weight 1%s", why, self.unknown, self._doubt())

    def _columns(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the columns (N,) that rows get: `loss_weight`, float32, and `mitigate`, bool, where a policy asks."""
        url, key = _where(rows)
        for row, names in enumerate(zip(rows[url], rows[key], strict=True)):
            if not isinstance(names[0], str) or not isinstance(names[1], str | bytes):
                raise ConfigError(f"row {row} has {url} {names[0]!r} and {key} {names[1]!r}: both must be text")
        shards = [self._shard(u, named=url == "shard") for u in rows[url]]
        places = self.manifest.places([shard or "" for shard in shards], rows[key])
        for row in np.flatnonzero(places < 0).tolist():
            self._pass(rows[url][row], rows[key][row])
        known, lookup = places >= 0, self.manifest.lookup
        weights = np.ones(len(places), np.float32)
        weights[known] = lookup.weights(places[known])
        if not self.mitigates:
            return {"loss_weight": weights}
        mitigate = np.zeros(len(places), bool)
        mitigate[known] = lookup.columns["mitigate"][places[known]]
        return {"loss_weight": weights, "mitigate": mitigate}


class Attach(_Weights):
    """The stage of `Manifest.attach`: a callable from samples to samples."""

    def __init__(
        self,
        manifest: Manifest,
        missing: str,
        captions: str,
        pipes: Mapping[str, str] | None,
        roots: Roots = (),
    ) -> None:
        if missing not in ("error", "keep") or captions not in ("own", "pool"):
            raise ConfigError(f"attach(missing={missing!r}, captions={captions!r}): error or keep, own or pool")
        super().__init__(manifest, missing, pipes, roots)
        self.captions = captions

    def __reduce__(self) -> tuple[Any, ...]:
        return Attach, (self.manifest, self.missing, self.captions, self.pipes, self.roots)

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield every sample with its weight; a sample that comes again, from a list, comes without what it got."""
        self.manifest.check()  # a loader with one shard meets no other
        for sample in samples:
            # webdataset marks the end of a shard by an empty sample
            yield {**sample, **self._found(sample)} if "__key__" in sample else sample

    def _found(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a sample gets: `loss_weight` and, where they are asked for, `mitigate` and `captions`.

        With pools, a memorized caption that would train gives way to the first of the pool.
        """
        if "__url__" not in sample:
            raise ConfigError("a sample has no __url__; put attach() right after the shards are read, before any map")
        shard, key = self._shard(sample["__url__"]), sample["__key__"]
        earlier = carried_weight(sample)
        place = -1 if shard is None else self.manifest.place(shard, key)
        found: dict[str, Any] = {"mitigate": False} if self.mitigates else {}
        if shard is None or place < 0:
            self._pass(sample["__url__"], key)
            return {"loss_weight": earlier, **found}
        weight = self.manifest.lookup.weight(place)
        if self.mitigates:
            found["mitigate"] = self.manifest.lookup.mitigate(place)
        if self.captions == "pool":
            row = self.manifest.row(shard, key)
            pooled = row["captions"]
            if pooled is not None:
                found["captions"] = pooled
            if pooled or weight:  # runs of before give a masked sample a weight for an empty pool too
                weight = self.manifest.lookup.weight(place, pooled=True)
            if pooled and weight and "magnitude" in row["reasons"]:
                found |= self._captioned(sample, pooled[0])
        return {"loss_weight": earlier * weight, **found}

    def _captioned(self, sample: Mapping[str, Any], text: str) -> dict[str, Any]:
        """Member that holds a sample's caption, with this text in its place; bytes, text or a json as it came."""
        settings = self.manifest.info["config"]["input"]
        suffix, field = settings["caption"], settings["caption_field"]
        old = sample.get(suffix, b"")
        if suffix == "txt":
            return {suffix: text if isinstance(old, str) else text.encode()}
        try:
            fields = json.loads(old or "{}") if isinstance(old, str | bytes) else old
            changed = {**fields, field: text}
        except (ValueError, RecursionError, TypeError) as e:
            where = f"{sample['__url__']}: sample {sample['__key__']!r}"
            raise InputError(f"{where}: its json is no object, and not what the run read; run again") from e
        if isinstance(old, bytes):
            return {suffix: json.dumps(changed).encode()}
        return {suffix: json.dumps(changed) if isinstance(old, str) else changed}


def carried_weight(sample: Mapping[str, Any]) -> float:
    """Return the `loss_weight` that a sample comes with, 1 for none; raises ConfigError for what is no weight."""
    if "loss_weight" not in sample:
        return 1.0
    given = sample["loss_weight"]
    try:
        weight = float("nan") if isinstance(given, str | bytes) else float(given)
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of a tensor of many
        weight = float("nan")
    if not 0 <= weight < float("inf"):
        url = shown(str(sample.get("__url__", "batch")))
        raise ConfigError(
            f"{url}: sample {sample.get('__key__')!r} comes with the loss_weight "
            f"{str(given)[:50]!r}, which is no finite number of 0 or more; set one before, or none"
        )
    return weight


class Weigh(_Weights):
    """The function of `Manifest.weigh`: from rows to their new columns."""

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that are new in a batch of rows, arrays (N,), or in one row, numbers."""
        url, key = _where(rows)
        if isinstance(rows[key], Iterable) and not isinstance(rows[key], str | bytes):
            return dict(self._columns(rows))
        return {name: column[0] for name, column in self._columns({url: [rows[url]], key: [rows[key]]}).items()}


class Collate(_Weights):
    """The function of `Manifest.collate`: from samples to a batch."""

    def __init__(
        self,
        manifest: Manifest,
        collate_fn: Callable[[list[Any]], Any] | None,
        missing: str,
        pipes: Mapping[str, str] | None,
        roots: Roots = (),
    ) -> None:
        super().__init__(manifest, missing, pipes, roots)
        self.collate_fn = collate_fn

    def __reduce__(self) -> tuple[Any, ...]:
        return Collate, (self.manifest, self.collate_fn, self.missing, self.pipes, self.roots)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> MutableMapping[str, Any]:
        """Return a batch with its `loss_weight`, a float32 tensor (B,)."""
        import torch
        from torch.utils.data import default_collate

        weighed = sum("loss_weight" in sample for sample in samples)
        if weighed == len(samples):
            found: dict[str, Any] = {"loss_weight": np.array([carried_weight(s) for s in samples], np.float32)}
        elif weighed:
            raise ConfigError(
                f"{weighed} of a batch's {len(samples)} samples have a loss_weight: give it to all or none"
            )
        else:
            places = [[sample[name] for name in _where(sample)] for sample in samples]
            found = self._columns(dict(zip(_where(samples[0]), zip(*places, strict=True), strict=True)))
        left_out = {*_WHERE[0], *_WHERE[1], *found, "__local_path__"}
        batch = (self.collate_fn or default_collate)(
            [{name: value for name, value in sample.items() if name not in left_out} for sample in samples]
        )
        if not isinstance(batch, MutableMapping):
            raise ConfigError(f"collate_fn returned {type(batch).__name__}: a mapping takes the batch's loss_weight")
        for name, column in found.items():
            batch[name] = torch.from_numpy(column)
        return batch


def _where(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names under which rows hold shard and key; raises ConfigError where they hold none."""
    for names in _WHERE:
        if all(name in row for name in names):
            return names
    if isinstance(row, Mapping):
        raise ConfigError(
            f"rows hold {', '.join(map(repr, row)) or 'nothing'}: keep the columns __url__ and __key__, or shard and "
            "key, by which a sample is found"
        )
    columns = ", ".join(getattr(row, "column_names", ())) or "no names"
    raise ConfigError(f"rows come as a {type(row).__name__} of {columns}: give mappings, in datasets with_format(None)")
