"""Caption encoders by spec string: texts -> L2-normalised embeddings whose cosine is their likeness in meaning."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError
from . import weights


class CaptionEncoder(Protocol):
    """What the tier `semantic` needs of an encoder; each of the properties may be a plain attribute."""

    @property
    def identity(self) -> str:
        """Names everything that shapes its numbers."""
        ...

    @property
    def dim(self) -> int:
        """The number of components of an embedding."""
        ...

    @property
    def similarity(self) -> float | None:
        """The cosine at or above which two captions say the same, None where nobody has measured it."""
        ...

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length; of zeros for a text in which nothing is known."""
        ...


def caption_encoder(spec: str) -> CaptionEncoder:
    """Return the encoder that a spec string names; cheap: no weights are read, but for their digest.

    Raises ConfigError for a spec that is unknown or needs a library that is not installed, ModelError for a model that
    is not here and cannot be had, or that would run code or be unpickled.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in (*_LIBRARIES, "local-dir") and not Path(spec).is_dir():
        if not colon or not rest or "/" in kind:
            raise ConfigError(f"captions.encoder = {spec!r}: unknown, and no folder here; it is {_FORMS}")
        from .own import own_caption_encoder

        return own_caption_encoder(spec)
    if kind in _LIBRARIES:
        _require(kind)
        folder = _folder(kind, rest)
    else:
        folder = Path(rest if kind == "local-dir" else spec)
        kind = _kind_of(folder)
        _require(kind)
    from .texts import SavedEncoder

    encoder = SavedEncoder(kind, folder)
    if encoder.identity not in _warm:
        _warm.clear()  # one model at a time
        _warm[encoder.identity] = encoder
    warm: CaptionEncoder = _warm[encoder.identity]
    return warm


_warm: dict[str, Any] = {}
_LIBRARIES = {
    "sentence-transformers": "sentence_transformers",
    "model2vec": "model2vec",
    "transformers": "transformers",
}
_FORMS = (
    "'sentence-transformers:MODEL', 'model2vec:MODEL' or 'transformers:MODEL' with a folder or the hub's ORG/NAME, "
    "'local-dir:FOLDER', a folder, or 'package.module:function'"
)
_ON_HUB = ("*.json", "*.safetensors", "*.txt", "*.model")
_MODEL2VEC_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def public_caption_name(spec: str | None) -> str | None:
    """Return a spec without the folders of this machine, as the manifest tells it."""
    if spec is None:
        return None
    kind, colon, rest = spec.partition(":") if spec.partition(":")[0] in (*_LIBRARIES, "local-dir") else ("", "", spec)
    return kind + colon + (Path(rest).resolve().name if kind == "local-dir" or Path(rest).is_dir() else rest)


def _require(kind: str) -> None:
    if find_spec(_LIBRARIES[kind]) is None:
        raise ConfigError(
            f"captions.encoder needs {kind}, which is not installed; install it with pip install 'memfilter[captions]'"
        )


def _folder(kind: str, name: str) -> Path:
    """Return the folder of a model, a hub repository's fetched if need be."""
    path = Path(name)
    if path.is_dir():
        return path
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name or kind}: no such folder; save a model there, or fetch one with 'hf download'")
    # as the library itself has it
    repository = f"{kind}/{name}" if kind == "sentence-transformers" and "/" not in name else name
    return weights.fetched_folder(repository, _ON_HUB)


def _kind_of(folder: Path) -> str:
    """Return which library saved a folder, as its files tell."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; save a model there, or fetch one with 'hf download'")
    config = weights.read_config(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is not None and (config.get("model_type") == "model2vec" or _has_model2vec_tensors(folder)):
        return "model2vec"
    if (folder / "modules.json").is_file() or (folder / "config_sentence_transformers.json").is_file():
        return "sentence-transformers"
    if config is not None and "model_type" in config:
        return "transformers"
    raise ModelError(f"{folder}: not a model that sentence-transformers, model2vec or transformers saved")


def _has_model2vec_tensors(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in _MODEL2VEC_FILES):
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            return "embeddings" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{folder / 'model.safetensors'}: damaged: {e}; save or fetch it again") from e
