"""The configuration of a run: frozen values, read from YAML, with a digest of any set of keys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import ConfigError

KEEP = ("resolution", "bytes", "caption_length", "uid")
"""What images.keep knows of every sample."""

JSON = "json:"
"""What stands before the name of a json's field, in images.keep and as a column of the signatures."""

STEPS = 50
"""Steps of the schedule on which magnitudes are measured."""

GUIDANCE = 7.5
"""The guidance of a trajectory, as in the paper."""

MAX_VALUE = 255
"""Characters of a value in the json that are compared."""

Policy = Literal["record", "mask", "drop"]
DuplicatePolicy = Literal["record", "down_weight", "mitigate", "mask", "drop"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Input(_Section):
    """How shards and captions are read."""

    root: str | None = None
    caption: Literal["txt", "json"] = "txt"
    caption_field: str = "caption"
    uid_field: str | None = None
    allow_pipe: bool = False
    max_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = 178_956_970  # Pillow refuses more
    max_bytes: Annotated[int, Field(gt=0)] = 256 * 2**20
    max_memory: Annotated[int, Field(gt=0)] | None = None
    on_bad_shard: Literal["stop", "skip"] = "stop"
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 60.0  # seconds in which the next bytes of a remote shard come


def _keep_key(key: str) -> str:
    name = key.removeprefix("-")
    if name not in KEEP and (name == JSON or not name.startswith(JSON)):
        raise PydanticCustomError("keep_key", "No such key")
    return key


def _distinct(values: tuple[str | bool | int, ...]) -> tuple[str | bool | int, ...]:
    if len({v if isinstance(v, str) else json.dumps(v) for v in values}) < len(values):
        raise PydanticCustomError("twice", "A value is named twice")
    return values


class NamedOrder(_Section):
    """Of a json's field, the values in their order, the best first; others come behind them, none at all last."""

    field: Annotated[str, Field(min_length=1)]
    order: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_VALUE)] | bool | int, ...],
        Field(min_length=1, strict=False),
        AfterValidator(_distinct),
    ]


KeepKey = Annotated[str, AfterValidator(_keep_key)] | NamedOrder


def _colour(value: Any) -> str:
    from PIL import ImageColor  # only where a colour is given

    try:
        levels = bytes(ImageColor.getrgb(value))
    except (ValueError, AttributeError, TypeError):  # the last two where it is no text
        levels = b""
    if len(levels) != 3:
        raise PydanticCustomError("colour", "No opaque colour; give its name, or '#rrggbb' in quotes")
    return f"#{levels.hex()}"


class Images(_Section):
    """How images are compared, and which of a group is kept."""

    hash: Literal["phash", "dhash", "ahash", "whash", "pdq"] = "phash"
    hash_radius: Annotated[int, Field(ge=0, le=31)] = 4  # 31 with pdq
    decode: Literal["fast", "full"] = "fast"
    ground: Annotated[str, BeforeValidator(_colour)] = "#ffffff"  # behind transparent pixels; kept as '#rrggbb'
    encoder: str | None = "builtin"
    encoder_similarity: Annotated[float, Field(gt=0, le=2)] | None = None
    match_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5  # score of the comparison from which images are copies
    keep: Annotated[tuple[KeepKey, ...], Field(min_length=1, strict=False)] = KEEP

    @property
    def json_fields(self) -> tuple[str, ...]:
        """The fields of the json that `keep` names, sorted."""
        names = {k.field if isinstance(k, NamedOrder) else k.removeprefix("-") for k in self.keep}
        return tuple(sorted(n.removeprefix(JSON) for n in names - {*KEEP}))

    @model_validator(mode="before")
    @classmethod
    def _default_radius(cls, values: Any) -> Any:
        is_pdq = isinstance(values, dict) and values.get("hash") == "pdq"
        return {"hash_radius": 31, **values} if is_pdq else values

    @field_validator("hash_radius")
    @classmethod
    def _within_method(cls, radius: int, info: ValidationInfo) -> int:
        if radius > 16 and info.data.get("hash") not in ("pdq", None):
            raise PydanticCustomError("radius", "Input should be less than or equal to 16, or 31 with hash: pdq")
        return radius


class Captions(_Section):
    """How captions are compared."""

    tiers: Annotated[
        tuple[Literal["exact", "template", "near", "semantic"], ...], Field(min_length=1, strict=False)
    ] = ("exact", "template", "near")
    near_jaccard: Annotated[float, Field(ge=0.3, le=1)] = 0.7
    encoder: Annotated[str | None, Field(validate_default=True)] = None
    encoder_similarity: Annotated[float, Field(gt=0, le=1)] | None = None

    @field_validator("encoder")
    @classmethod
    def _for_the_tier(cls, encoder: str | None, info: ValidationInfo) -> str | None:
        if encoder is None and "semantic" in info.data.get("tiers", ()):
            raise PydanticCustomError("encoder", "The tier 'semantic' needs one, as in 'model2vec:FOLDER'")
        return encoder


class Quantile(_Section):
    """Mask the scored samples at or above this quantile of their magnitudes."""

    quantile: Annotated[float, Field(ge=0, lt=1)]


class FalsePositiveRate(_Section):
    """Mask what scores higher than all but this share of the captions in a reference file, one a line."""

    false_positive_rate: Annotated[float, Field(ge=0, lt=1)]
    reference: str


class LabelledRate(_Section):
    """Mask what scores higher than all but this share of the captions that a CSV labels as not memorized."""

    false_positive_rate: Annotated[float, Field(ge=0, lt=1)]
    labelled: str


class SavedThreshold(_Section):
    """Take the threshold that another run left in its threshold.json, of the same model scored the same way."""

    saved: str


class Magnitude(_Section):
    """The text-conditional prediction magnitude and its threshold."""

    model: str | None = None
    denoiser: str | None = None  # a folder with a fine-tuned UNet or transformer, in place of the model's own
    lora: str | None = None  # a safetensors file, or a folder with one
    lora_scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    single_file_config: str | None = None  # of a model in one file, a pipeline's folder or hub id
    mode: Literal["prompt", "pair", "trajectory"] = "prompt"
    seeds: Annotated[int, Field(ge=1)] = 1
    timesteps: Annotated[  # of mode pair, 0 to 1000
        tuple[Annotated[int, Field(ge=0, le=1000)], ...],
        Field(min_length=1, strict=False),
        AfterValidator(_distinct),
    ] = (200, 400, 600, 800)
    steps: Annotated[int, Field(ge=1, le=STEPS)] = STEPS  # of mode trajectory: how many of the schedule's 50
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = GUIDANCE  # of mode trajectory
    signals: Annotated[  # of mode prompt, beside the magnitude
        tuple[Literal["attention_entropy", "anisotropy", "sharpness"], ...],
        Field(strict=False),
        AfterValidator(_distinct),
    ] = ()
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 64
    compile: bool = False
    devices: Annotated[tuple[str, ...] | None, Field(min_length=1, strict=False)] = None  # None: all GPUs, else the CPU
    threshold: (
        Quantile
        | FalsePositiveRate
        | LabelledRate
        | SavedThreshold
        | Annotated[float, Field(ge=0, allow_inf_nan=False)]
        | None
    ) = None

    @field_validator("compile")
    @classmethod
    def _unseen(cls, compile: bool, info: ValidationInfo) -> bool:
        if compile and "attention_entropy" in info.data.get("signals", ()):
            raise PydanticCustomError("compile", "A compiled denoiser does not show attention_entropy")
        return compile

    @field_validator("signals")
    @classmethod
    def _of_prompts(cls, signals: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if signals and info.data.get("mode") != "prompt":
            raise PydanticCustomError("signals", "They are measured in mode: prompt alone; give signals: []")
        return signals


class Generality(_Section):
    """How general each caption is: by which tagger, and by WordNet's nouns from which folder."""

    tagger: str | None = None
    wordnet: str = "/usr/share/wordnet"
    abstraction: Literal["corrected", "reference"] = "corrected"


class Policies(_Section):
    """What is done with the samples that the stages find."""

    image_duplicate: DuplicatePolicy = "drop"
    full_duplicate: DuplicatePolicy | None = None  # an image again with its caption; None: as image_duplicate
    partial_duplicate: DuplicatePolicy | None = None  # an image again with another caption; None: as image_duplicate
    caption_duplicate: DuplicatePolicy = "record"
    magnitude: Policy = "mask"
    pool_captions: bool = True

    @property
    def full(self) -> DuplicatePolicy:
        """What is done with an image that comes again with its caption."""
        return self.full_duplicate or self.image_duplicate

    @property
    def partial(self) -> DuplicatePolicy:
        """What is done with an image that comes again with another caption."""
        return self.partial_duplicate or self.image_duplicate


class Generalise(_Section):
    """Which captions `memfilter generalise` rewrites, and by what: a local model, an endpoint's, or else a rule."""

    joint_count: Annotated[int, Field(ge=1)] | None = 2  # at or above
    image_count: Annotated[int, Field(ge=1)] | None = None
    caption_count: Annotated[int, Field(ge=1)] | None = None
    generality: Annotated[float, Field(ge=0, le=10)] | None = None  # at or below
    magnitude: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # at or above; None: the run's own
    model: str | None = None
    endpoint: Annotated[str, Field(pattern="^https?://")] | None = None
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 60.0  # seconds in which the endpoint answers
    batch_size: Annotated[int, Field(ge=1)] = 8


class Output(_Section):
    """What is written beside the manifest."""

    shards: bool = True


class Config(_Section):
    """One run's configuration.  Unknown keys are errors."""

    input: Input = Input()
    images: Images = Images()
    captions: Captions = Captions()
    magnitude: Magnitude = Magnitude()
    policy: Policies = Policies()
    output: Output = Output()
    generalise: Generalise = Generalise()
    generality: Generality = Generality()

    @classmethod
    def load(cls, path: str | Path | None, base: Config | None = None) -> Config:
        """Return the configuration in the YAML file at `path`, laid over `base` key by key.

        Raises ConfigError, in one line, for a file that cannot be read, unknown keys and values out of range.
        """
        values = base.model_dump(mode="json") if base else {}
        for section, keys in read_yaml(path).items() if path is not None else ():
            if isinstance(keys, dict):
                values[section] = {**values.get(section, {}), **keys}
            elif keys is not None or section not in cls.model_fields:
                values[section] = keys
        return cls.parse(values, str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "configuration") -> Config:
        """Return the configuration given as nested dictionaries; raises ConfigError naming key and cause."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise ConfigError(f"{origin}: {_first_cause(e)}") from e

    def digest(self, *keys: str) -> str:
        """Return a digest of exactly the values of these dotted keys."""
        dump = self.model_dump(mode="json")
        values = {key: dump[key.split(".")[0]][key.split(".")[1]] for key in sorted(keys)}
        return digest_of(values)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Return what a configuration file holds; raises ConfigError for one that cannot be read or holds no sections."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must hold sections such as 'images:', not a {type(given).__name__}")
    return given


def digest_of(value: Any) -> str:
    """Return the blake2b-128 hex digest of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _first_cause(error: ValidationError) -> str:
    causes = error.errors()
    cause = next((c for c in causes if c["type"] == "extra_forbidden" and len(c["loc"]) <= 2), causes[0])
    where = [str(p) for p in cause["loc"]]
    if where[:2] == ["magnitude", "threshold"]:  # one of several forms, each with a complaint of its own
        forms = (
            "a number >= 0, {quantile: Q}, {false_positive_rate: R, reference: FILE}, {false_positive_rate: R, "
            "labelled: FILE.csv} or {saved: DIR/threshold.json}, Q and R from 0 to below 1"
        )
        return f"magnitude.threshold = {cause['input']!r}: {cause['msg']}; it is {forms}"
    if where[:2] == ["images", "keep"] and len(where) > 2:  # likewise: the deepest complaint is of the form meant
        cause = max(causes, key=lambda c: len(c["loc"]))
        forms = (
            f"{', '.join(KEEP)}, json:FIELD, each with or without a '-' before it, or {{field: FIELD, order: [VALUES]}}"
        )
        return f"images.keep = {cause['input']!r}: {cause['msg']}; a key is {forms}"
    if cause["type"] != "extra_forbidden":
        return f"{'.'.join(where[:2])} = {cause['input']!r}: {cause['msg']}"
    section: Any = Config.model_fields[where[0]].annotation if len(where) > 1 else Config
    known = ", ".join(section.model_fields)
    return f"unknown key '{'.'.join(where)}'; the keys there are: {known}"
