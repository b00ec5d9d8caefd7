"""What the caller of a command named, against what a run directory names: that is data, of whoever wrote it.

A place, a host or code that `run.json` alone names is not used: nothing is run, imported, contacted, or read outside of
the run directory, but for input shards that are plain local files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import Config, read_yaml
from .denoisers import ModelFiles
from .encoders import image_encoder
from .encoders.captions import caption_encoder
from .encoders.recorded import Encoders, Recorded, RecordedCaptions
from .errors import ConfigError, InputError, shown
from .generality import RecordedRater, Scored, find_rater
from .records import Shard
from .shards import is_local, list_shards, path_of

MODEL = ("magnitude.model", "magnitude.denoiser", "magnitude.lora", "magnitude.single_file_config")
"""The keys that say where a model lies."""

_DEFAULTS = Config().model_dump(mode="json")


@dataclass(frozen=True)
class Given:
    """The dotted keys and the input patterns that the caller gave; with `trust`, also all that `run.json` names."""

    path: Path  # the run directory
    keys: frozenset[str]
    inputs: tuple[str, ...] = ()
    trust: bool = False

    @classmethod
    def by(
        cls,
        path: Path,
        config_file: str | Path | None = None,
        generalise: Iterable[str] = (),
        inputs: Sequence[str] = (),
        trust: bool = False,
    ) -> Given:
        """Return what was given by a configuration file, by keys of `generalise`, by patterns and by trust."""
        values = read_yaml(config_file) if config_file is not None else {}
        keys = {f"{section}.{key}" for section, own in values.items() if isinstance(own, dict) for key in own}
        return cls(path, frozenset(keys | {f"generalise.{key}" for key in generalise}), tuple(inputs), trust)

    def has(self, config: Config, *keys: str) -> bool:
        """Whether these keys of the configuration may be followed: they are defaults, or the caller's."""
        return not self._missing(config, keys)

    def check(self, config: Config, *keys: str) -> None:
        """Raise ConfigError where one of these keys may not be followed."""
        if missing := self._missing(config, keys):
            value = config.model_dump(mode="json")[missing[0].split(".")[0]][missing[0].split(".")[1]]
            raise ConfigError(
                f"{missing[0]} = {value!r}: is needed, and named by {self.path / 'run.json'} alone; name it in "
                "--config too, or give --trust where the run directory is yours"
            )

    def _missing(self, config: Config, keys: tuple[str, ...]) -> list[str]:
        values = config.model_dump(mode="json")
        split = [(key, *key.split(".")) for key in keys if key not in self.keys and not self.trust]
        return [key for key, section, name in split if values[section][name] != _DEFAULTS[section][name]]

    # -- inputs -------------------------------------------------------------------------------------------------------

    def shards(self, shards: list[Shard], config: Config) -> list[Shard]:
        """Return the shards of a run with the places that the caller gave, and with what may be read told.

        Raises InputError for patterns that name none of them, and what `list_shards` raises.
        """
        allow_pipe = config.input.allow_pipe and self.has(config, "input.allow_pipe")
        shards = [replace(s, may_read=self._may_read(s.url, allow_pipe)) for s in shards]
        if not self.inputs:
            return shards
        names: set[str] = {s.name for s in shards}
        places: dict[str, str] = {}
        for url in list_shards(self.inputs, allow_pipe):
            path = path_of(url)
            ends = (path[at + 1 :] for at in range(len(path)) if path[at] == "/")
            name = next((end for end in ends if end in names), None)
            if name is not None and places.setdefault(name, url) != url:
                raise InputError(
                    f"--inputs: {shown(url)} and {shown(places[name])} both end in {name}; name one of them"
                )
        if not places:
            raise InputError(f"--inputs: none of these is a shard of {self.path}, such as {min(names, default='')}")
        return [replace(s, url=places[s.name], may_read=True) if s.name in places else s for s in shards]

    def _may_read(self, url: str, allow_pipe: bool) -> bool:
        if url.startswith("pipe:"):
            return self.trust and allow_pipe
        return self.trust or is_local(url)

    # -- what shaped the run's files ----------------------------------------------------------------------------------

    def encoders(self, stored: Any, before: Config, config: Config) -> Encoders:
        """Return the encoders: as the run has recorded them, or by the specs that the caller gave.

        Raises ConfigError where a run of an earlier version has recorded nothing and the caller gave no spec.
        """
        spec, known = config.images.encoder, Recorded.read_from(stored)
        if spec is None:
            images = None
        elif known is not None and spec == before.images.encoder != "builtin":
            images = known
        else:
            self.check(config, "images.encoder")
            images = Recorded.of(image_encoder(spec))
        if "semantic" not in config.captions.tiers:
            return Encoders(images, None)
        spec, own = config.captions.encoder or "", RecordedCaptions.read_from(stored)
        if own is not None and not self.has(config, "captions.encoder"):
            return Encoders(images, replace(own, refuse=lambda: self.check(config, "captions.encoder")))
        self.check(config, "captions.encoder")
        return Encoders(images, caption_encoder(spec))

    def rater(self, stored: Any, config: Config) -> Scored | None:
        """Return what captions are scored by: as the run has recorded it, or by the spec that the caller gave."""
        about = stored.get("rater") if isinstance(stored, dict) else None
        keys = ("generality.tagger", "generality.wordnet")
        if config.generality.tagger is None:
            return None
        if self.has(config, *keys) or not isinstance(about, dict):
            self.check(config, *keys)
            return find_rater(config)
        about = {**about, "abstraction": config.generality.abstraction}
        return RecordedRater(about, lambda: self.check(config, *keys))

    def model(self, model: ModelFiles | None, config: Config) -> ModelFiles | None:
        """Return the model of a run, with whether it may be read: where the configuration names it too, or by trust."""
        if model is None:
            return None
        names = ("model", "denoiser", "lora", "lora_scale", "single_file_config")
        is_named = [model.spec, *model.parts] == [getattr(config.magnitude, name) for name in names]
        return replace(model, may_read=self.trust or (is_named and self.has(config, *MODEL)))
