"""Samples on their way into training -> the same samples with verdicts, from what the stream itself has shown so far.

A filter without a run: signatures are those of a run, and images are compared with those that came before, as far as a
bounded memory goes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import xxhash

from . import recent
from .captions import FORMS
from .config import Config, Policy, SavedThreshold
from .errors import ConfigError, shown
from .images import SUFFIXES
from .loader import carried_weight
from .manifest import path_of
from .records import ACTIONS, DROP, KEEP, MASK, METHODS
from .signatures import Signer, check_hash, versions
from .thresholds import Threshold

if TYPE_CHECKING:
    from .magnitude import Scorer

log = logging.getLogger(__name__)

Sample = dict[str, Any]

_ACTION = {"record": KEEP, "mask": MASK, "drop": DROP}
_MOST = 1 << 31
_READ = ("input.caption", "input.caption_field", "input.uid_field", "input.max_pixels", "input.max_bytes")
_COMPARED = ("images.hash", "images.hash_radius", "images.decode", "images.ground", "images.match_threshold")
_SCORED = ("model", "denoiser", "lora", "lora_scale", "mode", "seeds", "steps", "guidance", "dtype")


class OnlineFilter:
    """A webdataset stage that finds duplicates and memorized captions as samples pass, without a run before.

    >>> data = wds.WebDataset(urls).compose(OnlineFilter()).decode("pil", partial=True)  # doctest: +SKIP

    It stands right after the shards are read: it takes the members' bytes, `__key__` and `__url__`.  Each sample is
    signed as a run signs it and gets

    * `loss_weight`: 1.0, or 0.0 where it is masked, times the weight that it came with, a Python float;
    * `reasons`: codes as in the manifest, of `exact_duplicate`, `hash_duplicate`, `blank_duplicate`,
      `caption_duplicate` and `magnitude`;
    * `image_count` and `caption_count`: how many samples of its image and its caption there were so far, itself too;
    * `duplicate_of`: SHARD/KEY of the sample whose image it repeats, "" for none;
    * `magnitude`, where there is a model to score with.

    What differs from a run: the first copy that comes is the one kept, as a stream cannot know of a better one; there
    are no edges by embedding, and captions repeat where their normal forms are equal, without the wider tiers; bad
    samples never come out, as nothing could decode them, and are counted by their cause, the first, tenth, hundredth
    and so on of a process with a warning.  `counts` tells what became of how many samples and for which reasons; each
    pass over the stream logs its own at INFO.

    At most `capacity` images, captions and samples are remembered each; those go first that were not met for longest,
    so that what is repeated much stays; an image with its caption and its sample takes about 5 kB.  A copy of a
    forgotten image passes.  A sample that comes again with the same bytes, as in the next epoch, is itself and keeps
    its verdict for as long as it is remembered; beyond that it is judged as new, and counted again.  A key that is
    repeated within a shard, which a run calls bad, looks the same.  Shards are told apart by their URLs, or commands of
    `pipe:`, without queries, which signing changes; a command that changes otherwise is another shard.

    A sample that comes with weight 0 does not train: it passes with no reasons and no magnitude (NaN), is no copy and
    has none, with both its counts 1, and is a `mask` of `counts`.  One that trained before leaves its image and its
    caption to the next copy that trains; what such a change concerns is judged as new.  So `Manifest.attach` belongs
    before this stage: what it masks behind it may be the only copy that was kept here.

    Each worker of a loader, and each rank, has a memory of its own and sees no shard but its own: copies in other
    shards than its own stay unfound.  One worker that reads all shards finds them; so does a run.  Workers that are
    started anew in each epoch begin with what the stage holds in the main process, unless the loader is told
    `persistent_workers=True`.  `counts` and `state_dict` are those of the process that asks.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        capacity: int = 100_000,
        image_duplicate: Policy = "mask",
        caption_duplicate: Policy = "record",
        magnitude: Policy = "mask",
        scorer: Scorer | None = None,
    ) -> None:
        """Make a filter that reads, compares and scores by `config` and has nothing open yet: it can be pickled.

        Of each kind of finding the policy is record, mask (weight 0) or drop, whatever the config's, which are a
        run's; among several ranks dropping makes them uneven.  A caption that comes again is masked or dropped only
        under another image than that of the first sample kept with it.  The threshold is `magnitude.threshold`, a
        number or a saved one, and captions are scored by `magnitude.model`, loaded where the first sample comes, or by
        a `scorer` of this process.  Raises ConfigError for what it cannot obey.
        """
        self.config = config or Config()
        self.policies = {"image_duplicate": image_duplicate, "caption_duplicate": caption_duplicate}
        self.policies["magnitude"] = magnitude
        for name, policy in self.policies.items():
            if policy not in get_args(Policy):
                raise ConfigError(f"OnlineFilter({name}={policy!r}): it is one of {', '.join(get_args(Policy))}")
        if not isinstance(capacity, int) or not 0 < capacity < _MOST:
            raise ConfigError(f"OnlineFilter(capacity={capacity!r}): it is a number from 1 to below 2^31")
        check_hash(self.config)
        self.capacity, self._given = capacity, scorer
        self._threshold = _threshold(self.config, scorer)
        self._counts: Counter[str] = Counter()
        self._images = recent.images(capacity, 256 if self.config.images.hash == "pdq" else 64)
        # the first sample that is kept with a caption, and the image that it has
        self._captions = recent.Recent(capacity, count="i8", place=object, image="i8")
        # a sample that is remembered was met no earlier than its image and its caption: their rows are still theirs
        self._samples = recent.Recent(
            capacity, image="i4", caption="i4", method="i1", repeats="?", magnitude="f4", action="i1"
        )
        self._scores = recent.Recent(capacity, magnitude="f4")

    @property
    def counts(self) -> dict[str, int]:
        """How many samples were read, = keep + mask + drop + bad, and how many for each reason and cause."""
        return {name: self._counts[name] for name in ("read", *ACTIONS)} | dict(sorted(self._counts.items()))

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that are kept or masked, in their order; they are read some ahead, but judged one by one.

        Raises ConfigError for samples without texts as `__url__` and `__key__`, whose members are no longer bytes, or
        whose weight is no number of 0 or more.
        """
        before, waiting = Counter(self._counts), list[_Waiting]()
        try:
            for sample in samples:
                if "__key__" in sample:
                    waiting.append(_Waiting.of(sample))
                if "__key__" not in sample or len(waiting) == self.config.magnitude.batch_size:
                    yield from self._filtered(waiting)
                    waiting = []
                if "__key__" not in sample:  # webdataset marks the end of a shard by an empty sample
                    yield sample
            yield from self._filtered(waiting)
        finally:
            found = Counter(self._counts) - before
            log.info("online filter: %s", ", ".join(f"{name} {n:,}" for name, n in found.items()) or "no samples")

    def _filtered(self, waiting: list[_Waiting]) -> Iterator[Sample]:
        self._sign([w for w in waiting if w.identity not in self._samples])
        for w in waiting:
            row = self._samples.meet(w.identity)
            if row is None or self._is_outdated(w, row):
                row = self._enter(w)
            if row is not None and self._judge(w, row):
                yield w.sample
            w.signature = None  # large

    # -- what a sample holds --

    def _sign(self, waiting: list[_Waiting]) -> None:
        """Find the signatures of these samples, and the magnitudes of their captions."""
        for w in waiting:
            w.signature = self._signer.read(w.place, 0, w.members)[1]
        good = [w for w in waiting if w.signature and "bad" not in w.signature]
        self._signer.finish([w.signature for w in good if w.signature])
        trained = [w for w in good if w.weight]
        if self._scorer and trained:
            magnitudes = self._score([w.signature["caption"] for w in trained if w.signature])
            for w, magnitude in zip(trained, magnitudes, strict=True):
                w.magnitude = magnitude

    def _score(self, captions: list[str]) -> list[float]:
        """Return the magnitudes of captions; those with equal token ids are scored once while they are remembered."""
        from .denoisers import token_digest

        assert self._scorer
        ids = [token_digest(i) for i in self._scorer.denoiser.token_ids(captions)]
        known: dict[bytes, float] = {}
        for key in ids:
            if (row := self._scores.meet(key)) is not None:
                known[key] = float(self._scores["magnitude"][row])
        texts = {key: caption for key, caption in zip(ids, captions, strict=True) if key not in known}
        norms = self._scorer.score(list(texts.values()))
        for key, magnitude in zip(texts, norms.mean(axis=(1, 2), dtype=np.float64).astype(np.float32), strict=True):
            known[key] = float(magnitude)
            self._scores.add(key, magnitude=magnitude)
        return [known[key] for key in ids]

    # -- what becomes of it --

    def _is_outdated(self, waiting: _Waiting, row: int) -> bool:
        """Tell whether a verdict is of a time when this sample, or the one it was compared with, had another weight."""
        image, caption = int(self._samples["image"][row]), int(self._samples["caption"][row])
        if not waiting.weight or image < 0:
            return bool(waiting.weight) == (image < 0)
        alone = self._samples["repeats"][row] and not self._captions["place"][caption]
        return bool(alone or not self._images["place"][image])

    def _enter(self, waiting: _Waiting) -> int | None:
        """Return the row of a new sample, compared with what came before it; None for a bad one."""
        if waiting.signature is None:  # remembered when it was read ahead, forgotten since
            self._sign([waiting])
        signature, place = waiting.signature, waiting.place
        assert signature
        if "bad" in signature:
            self._counts.update(["read", "bad", signature["bad"]])
            if str(self._counts["bad"]).strip("0") == "1":  # 1, 10, 100, ...
                message = "%s: left out as bad, %s: %s; %d of %d samples so far were bad"
                told = signature["bad"], signature["detail"], self._counts["bad"], self._counts["read"]
                log.warning(message, shown(place), *told)
            return None
        found = recent.find_image(
            self._images, signature, self.config.images.hash_radius, self.config.images.match_threshold
        )
        if not waiting.weight:
            self._leave(place, found, signature["fingerprint"])
            values = {"image": -1, "caption": -1, "method": -1, "repeats": False, "action": MASK}
            return self._samples.put(waiting.identity, magnitude=float("nan"), **values)
        if found is None:
            image, method = recent.add_image(self._images, signature, place), -1
        else:
            image, method = found
            first = self._images["place"][image]
            self._images["count"][image] += first != place
            if first in ("", place):  # left by its first, or itself, whose verdict was forgotten
                self._images["place"][image], method = place, -1
        action = _ACTION[self.policies["image_duplicate"]] if method >= 0 else KEEP
        if self._is_memorized(waiting.magnitude):
            action = max(action, _ACTION[self.policies["magnitude"]])
        caption, repeats = -1, False
        if signature["fingerprint"] is not None:
            caption, repeats, action = self._enter_caption(signature["fingerprint"], place, image, action)
        values = {"image": image, "caption": caption, "method": method, "repeats": repeats, "action": action}
        return self._samples.put(waiting.identity, magnitude=waiting.magnitude, **values)

    def _leave(self, place: str, image: tuple[int, int] | None, fingerprint: bytes | None) -> None:
        """Let a sample that does not train be the first of neither this image nor this caption."""
        caption = None if fingerprint is None else self._captions.meet(fingerprint)
        for table, row in ((self._images, image and image[0]), (self._captions, caption)):
            if row is not None and table["place"][row] == place:
                table["place"][row] = ""

    def _enter_caption(self, fingerprint: bytes, place: str, image: int, action: int) -> tuple[int, bool, int]:
        """Return the row of a caption, whether a sample was kept with it before, and what now becomes of this one."""
        table, born = self._captions, self._images["born"][image]
        row = table.meet(fingerprint)
        if row is None:
            row = table.add(fingerprint, count=0, place="", image=-1)
        first = table["place"][row]
        if first == place:  # itself
            return row, False, action
        table["count"][row] += 1
        if first and table["image"][row] != born:
            action = max(action, _ACTION[self.policies["caption_duplicate"]])
        elif not first and action == KEEP:
            table["place"][row], table["image"][row] = place, born
        return row, bool(first), action

    def _is_memorized(self, magnitude: float) -> bool:
        return self._threshold is not None and bool(np.float32(magnitude) >= np.float32(self._threshold.magnitude))

    def _judge(self, waiting: _Waiting, row: int) -> bool:
        """Put its verdict into a remembered sample and count it; tell whether it stays in the stream."""
        sample = waiting.sample
        verdict = {name: self._samples[name][row].item() for name in ("image", "caption", "method", "action")}
        for name, table in (("image", self._images), ("caption", self._captions)):
            known = verdict[name] >= 0
            sample[f"{name}_count"] = int(table["count"][verdict[name]]) if known else 1
            if known:
                table.touch(verdict[name])
        magnitude = float(self._samples["magnitude"][row])
        reasons = [f"{METHODS[verdict['method']]}_duplicate"] if verdict["method"] >= 0 else []
        reasons += ["caption_duplicate"] if self._samples["repeats"][row] else []
        reasons += ["magnitude"] if self._is_memorized(magnitude) else []
        self._counts.update(["read", ACTIONS[verdict["action"]], *reasons])
        sample["loss_weight"] = waiting.weight if verdict["action"] == KEEP else 0.0
        sample["reasons"] = reasons
        sample["duplicate_of"] = self._images["place"][verdict["image"]] if verdict["method"] >= 0 else ""
        if self._scorer:
            sample["magnitude"] = magnitude
        return bool(verdict["action"] != DROP)

    # -- what it opens where it works --

    @cached_property
    def _signer(self) -> Signer:
        images = self.config.images.model_copy(update={"encoder": None})
        return Signer(self.config.model_copy(update={"images": images}))

    @cached_property
    def _scorer(self) -> Scorer | None:
        settings = self.config.magnitude
        if self._given or settings.model is None:
            scorer, files = self._given, None
        else:
            from .denoisers import find_model
            from .magnitude import warm_scorer

            parts = settings.denoiser, settings.lora, settings.lora_scale, settings.single_file_config
            model = find_model(settings.model, False, *parts)
            scorer, files = warm_scorer(model, settings, (settings.devices or (None,))[0]), model.files
        if scorer and isinstance(settings.threshold, SavedThreshold) and self._threshold:
            info = json.loads(json.dumps(asdict(scorer.scoring)))
            # a scorer that was given does not tell of its files
            self._threshold.check(
                {"files": files or self._threshold.depends["files"], **info}, settings.threshold.saved
            )
        return scorer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what each process opens for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_signer", "_scorer")}

    # -- its state --

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on behind the last sample that came out, for torch.save.

        It holds tensors and plain values only.  `counts` tells the place in the stream: that many samples were `read`;
        what was read ahead of them is to be given again.

        It is the state of this process, and where the workers of a loader read the samples it is none: a warning says
        so.  Take it with `num_workers=0`, or in the worker: torchdata's StatefulDataLoader asks each worker's copy of
        the data set for `state_dict()`, which then has to return this one too.
        """
        if "_signer" not in self.__dict__:
            log.warning(
                "the state of an online filter that read no sample in this process: where a loader's workers read, ask "
                "in the worker, or set num_workers=0"
            )
        tables = {name: table.state() for name, table in self._tables.items()}
        return {"settings": self._settings, "counts": dict(self._counts), **tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a filter with the same settings was; raises ConfigError, naming the first one that differs."""
        if missing := {"settings", "counts", *self._tables} - state.keys():
            raise ConfigError(
                f"not a state of OnlineFilter, it has no {min(missing)}; give what its state_dict() returned, whole"
            )
        own, other = self._settings, state["settings"]
        for name in sorted(own.keys() | other.keys()):
            if own.get(name) != other.get(name):
                raise ConfigError(
                    f"the state of the online filter was saved with {name} = {other.get(name)}, and here it is "
                    f"{own.get(name)}; make the filter as it was, or go on without its state"
                )
        self._counts = Counter(state["counts"])
        for name, table in self._tables.items():
            table.restore(state[name])

    @property
    def _tables(self) -> dict[str, recent.Recent]:
        return {"images": self._images, "captions": self._captions, "samples": self._samples, "scores": self._scores}

    @property
    def _settings(self) -> dict[str, str]:
        """Return all that shapes a verdict beside the samples, as texts."""
        dump = self.config.model_dump(mode="json")
        found = {key: dump[key.split(".")[0]][key.split(".")[1]] for key in (*_READ, *_COMPARED)}
        found |= {f"magnitude.{name}": dump["magnitude"][name] for name in _SCORED}
        found["magnitude.threshold"] = self._threshold and self._threshold.magnitude
        found["scorer"] = self._given and asdict(self._given.scoring)
        found |= {"capacity": self.capacity, **self.policies, "captions": FORMS, **versions(self.config.images.hash)}
        return {name: json.dumps(value) for name, value in found.items()}


@dataclass
class _Member:
    """One member of a webdataset sample, as `Signer.read` asks for it."""

    key: bytes
    suffix: str
    data: bytes
    kind: bytes = b"0"
    supported: bool = True

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


@dataclass
class _Waiting:
    """A sample that was read, and what tells it from all others: where it is, and its bytes."""

    sample: Sample
    place: str
    identity: bytes
    members: list[_Member]
    weight: float
    signature: dict[str, Any] | None = None
    magnitude: float = float("nan")

    @classmethod
    def of(cls, sample: Sample) -> _Waiting:
        """Return a sample of webdataset's; raises ConfigError where it is not as it was read."""
        if "__url__" not in sample:
            raise ConfigError(
                "a sample has no __url__; put OnlineFilter right after the shards are read, before any map"
            )
        url, key = sample["__url__"], sample["__key__"]
        for name, value in (("__url__", url), ("__key__", key)):
            if not isinstance(value, str):
                raise ConfigError(
                    f"{shown(f'{url}/{key}')}: its {name} is of type {type(value).__name__}, not a text; put "
                    "OnlineFilter right after the shards are read, or make it one"
                )
        place = f"{path_of(url)}/{key}"
        identity, members = xxhash.xxh3_128(place.encode("utf-8", "surrogatepass")), []
        for suffix, data in sample.items():
            if suffix in (*SUFFIXES, "txt", "json"):
                if not isinstance(data, bytes):
                    raise ConfigError(
                        f"{shown(place)}: its {suffix} is a {type(data).__name__}, not bytes; put OnlineFilter before "
                        "decode"
                    )
                identity.update(data)
                members.append(_Member(key.encode("utf-8", "surrogateescape"), suffix, data))
        # a copy: one that comes again, from a list, must not come with the weight that it got
        return cls(dict(sample), place, identity.digest(), members, carried_weight(sample))


def _threshold(config: Config, scorer: Scorer | None) -> Threshold | None:
    """Return the threshold that captions are compared with; raises ConfigError for one that a stream cannot have."""
    settings = config.magnitude
    mode = scorer.scoring.mode if scorer else settings.mode
    if mode == "pair" and (scorer or settings.model):
        raise ConfigError("OnlineFilter scores captions without their images; set magnitude.mode: prompt or trajectory")
    if settings.threshold is None:
        return None
    if not scorer and settings.model is None:
        raise ConfigError("magnitude.threshold is given and no model to score with; give magnitude.model or a scorer")
    if isinstance(settings.threshold, SavedThreshold):
        return Threshold.load(settings.threshold.saved)
    if not isinstance(settings.threshold, float):
        raise ConfigError(
            "magnitude.threshold: a quantile or a rate is taken of all scores, which a stream does not have; give a "
            "number, or {saved: DIR/manifest/threshold.json} of a run"
        )
    return Threshold(settings.threshold, None, {})
