"""The embeddings of texts by a model that sentence-transformers, model2vec or transformers saved in a folder.

Only tensors and settings are read: what would be unpickled, or names code of its own, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..config import digest_of
from ..errors import ConfigError, MemfilterError, ModelError, in_one_line
from . import weights

if TYPE_CHECKING:
    import torch
    from torch import nn

_LIBRARIES = {
    "sentence-transformers": ("sentence-transformers", "transformers", "tokenizers", "torch"),
    "model2vec": ("model2vec", "tokenizers", "numpy"),
    "transformers": ("transformers", "tokenizers", "torch"),
}
_READ = {".json", ".safetensors", ".txt", ".model"}  # of settings, weights, and vocabularies
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_MODULES = {"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "StaticEmbedding", "Dropout"}
_WITH_WEIGHTS = {"Transformer", "Dense", "LayerNorm", "StaticEmbedding"}
_BATCH = {"cpu": 16, "cuda": 256}  # of one size always: a row's neighbours change it by rounding at most
_TOKENS = 512  # of a text that are seen, at most


class _Model(Protocol):
    dim: int

    def rows(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Return (N, dim) rows of any length, each of its text alone."""
        ...


class SavedEncoder:
    """The embeddings of a saved model, on the GPU in half precision if there is one, else on the CPU.

    A network sees the first 512 tokens of a text, or fewer where it has room for fewer; model2vec runs on the CPU.  The
    weights are read when the first embedding, or its size, is asked for.
    """

    similarity: float | None = None

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        _check(kind, folder)
        self._device = "cpu" if kind == "model2vec" else _device()
        self.dtype = "float16" if self._device == "cuda" else "float32"
        self.weights = _digest(folder)  # of all its files
        about = digest_of([_BATCH, [[name, version(name)] for name in _LIBRARIES[kind]]])
        self.identity = f"{kind}/files-{self.weights}/{_TOKENS}-tokens/{self.dtype}-{self._device}/{about}"

    @property
    def dim(self) -> int:
        """The number of components of an embedding."""
        return self._model.dim

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32 rows of unit length; of zeros for a text without a token that the model knows.

        Raises ModelError for a model that cannot be loaded or gives no finite numbers.
        """
        try:
            rows = self._model.rows(texts)
        except MemfilterError:
            raise
        except Exception as e:  # the libraries raise what they like
            cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
            raise ModelError(f"{self._folder}: cannot embed captions: {cause}") from e
        if not np.isfinite(rows).all():
            raise ModelError(f"{self._folder}: an embedding is not finite; its weights are damaged")
        lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1, keepdims=True))
        unit: npt.NDArray[np.float32] = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return unit

    @cached_property
    def _model(self) -> _Model:
        load = {"model2vec": _Model2vec, "sentence-transformers": _sentence_transformer, "transformers": _transformer}
        try:
            model = load[self._kind](self._folder, self._device)
        except MemfilterError:
            raise
        except ImportError as e:
            raise ConfigError(
                f"captions.encoder needs {self._kind}, which cannot be imported ({in_one_line(e)[:200]}); install it "
                "with pip install 'memfilter[captions]'"
            ) from e
        except Exception as e:  # the libraries raise what they like
            cause = f"{type(e).__name__}: {in_one_line(e)[:200]}"
            raise ModelError(f"{self._folder}: cannot be loaded by {self._kind}: {cause}") from e
        if _digest(self._folder) != self.weights:
            raise ModelError(f"{self._folder}: has changed since the run began; run the same command again")
        return model


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _digest(folder: Path) -> str:
    """Return a digest of the names and the sha256 of all files that a library may read."""
    files = [p for p in folder.rglob("*") if p.suffix in _READ and p.is_file()]
    return digest_of(sorted([p.relative_to(folder).as_posix(), weights.digest(p)] for p in files))


# -- what is not loaded -----------------------------------------------------------------------------------------------


def _check(kind: str, folder: Path) -> None:
    """Raise ModelError for a folder that lacks weights, or from which more than tensors and settings would be read."""
    parts = [folder]
    if kind == "sentence-transformers" and (folder / "modules.json").exists():
        parts = _module_folders(folder)
    elif kind == "model2vec" and not any(folder.glob("*.safetensors")) and (folder / "0_StaticEmbedding").is_dir():
        parts = [folder / "0_StaticEmbedding"]
    for part in parts:
        if (part / "adapter_config.json").exists():
            raise ModelError(f"{part}: is an adapter to another model; merge the two, and save the result")
        _refuse_kernels(part)
        found = sorted(part.glob("*.safetensors"))
        for file in found:
            weights.check(file)
        if not found and any(p.suffix in _PICKLED for p in part.glob("*")):
            raise ModelError(f"{part}: holds pickled weights, which may run code; save them as safetensors")
        if not found:
            raise ModelError(f"{part}: has no *.safetensors: not a whole model; save or fetch it again")


def _refuse_kernels(part: Path) -> None:
    """Raise ModelError for settings at which transformers fetches compiled code from the hub."""
    for path in (part / "config.json", *sorted(part.glob("sentence_*_config.json"))):
        if path.is_file():
            try:
                pairs = list(_pairs(json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError) as e:
                raise ModelError(f"{path}: cannot be read: {in_one_line(e)[:200]}") from e
            for key, value in pairs:
                plain = key.endswith("attn_implementation") and value in ("eager", "sdpa", None)
                if key.endswith(("attn_implementation", "quantization_config")) and not plain:
                    raise ModelError(f"{path}: sets {key}, which may run code of others; remove it, or save without it")


def _pairs(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    if isinstance(settings, dict):
        yield from settings.items()
    for value in settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ():
        yield from _pairs(value)


def _module_folders(folder: Path) -> list[Path]:
    """Return the folders of those modules of a sentence-transformers model that have weights."""
    path = folder / "modules.json"
    try:
        modules = [(str(m["type"]), str(m["path"])) for m in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{path}: cannot be read: {type(e).__name__}: {in_one_line(e)[:200]}") from e
    for kind, place in modules:
        # the namespace has moved with the versions, and holds functions that import what they are told to
        if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in _MODULES:
            known = ", ".join(sorted(_MODULES))
            raise ModelError(f"{path}: names the module {kind!r}: only sentence-transformers' own are loaded: {known}")
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise ModelError(f"{path}: names the folder {place!r}, which is outside of the model")
    return [folder / place for kind, place in modules if kind.rpartition(".")[2] in _WITH_WEIGHTS]


# -- the libraries ----------------------------------------------------------------------------------------------------


class _Model2vec:
    """Means of the vectors of a text's tokens."""

    def __init__(self, folder: Path, device: str) -> None:
        from model2vec import StaticModel

        self._static = StaticModel.from_pretrained(folder)
        self.dim = int(self._static.dim)

    def rows(self, texts: list[str]) -> npt.NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        return np.asarray(self._static.encode(texts, use_multiprocessing=False)).astype(np.float32)


class _Network:
    """Texts through a network, in batches of one size and of one number of tokens.

    Nothing is padded, and the other texts of a batch change a text's numbers by rounding at most.
    """

    def __init__(self, device: str, dim: int, tokenize: Any, forward: Callable[[list[str]], torch.Tensor]) -> None:
        self._device, self.dim, self._tokenize, self._forward = device, dim, tokenize, forward

    def rows(self, texts: list[str]) -> npt.NDArray[np.float32]:
        size = _BATCH[self._device]
        counts = np.array(self._tokenize(texts), np.int64)
        rows = np.zeros((len(texts), self.dim), np.float32)
        for count in np.unique(counts[counts > 0]):
            places = np.flatnonzero(counts == count)
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                filled = [texts[i] for i in np.resize(chosen, size)]
                rows[chosen] = self._finite(filled).cpu().numpy()[: len(chosen)]
        return rows

    def _finite(self, texts: list[str]) -> torch.Tensor:
        import torch

        from .pretrained import one_thread

        def forward(half: bool) -> torch.Tensor:
            with torch.autocast(self._device, torch.float16, enabled=half):
                return self._forward(texts).float()

        with torch.inference_mode(), one_thread():
            rows = forward(self._device == "cuda")
            finite = rows.isfinite().all(1, keepdim=True)
            if not finite.all():  # over the range of half precision; the others' numbers stay
                rows = torch.where(finite, rows, forward(False))
            return rows


def _counter(folder: Path, tokenizer: Any, limit: int, prompt: str) -> Callable[[list[str]], list[int]]:
    """Return a function that counts the tokens of texts behind a prompt, 0 for a text without any that is known.

    Raises ModelError for a tokenizer without a vocabulary, as transformers makes where its files are missing.
    """
    special = set(tokenizer.all_special_ids)
    if len(tokenizer) <= len(special):
        raise ModelError(f"{folder}: its tokenizer has no vocabulary; save or fetch the model again")

    def count(texts: list[str]) -> list[int]:
        if not texts:
            return []
        ids = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        whole = (
            tokenizer([prompt + t for t in texts], truncation=True, max_length=limit)["input_ids"] if prompt else ids
        )
        return [0 if special.issuperset(i) else len(w) for i, w in zip(ids, whole, strict=True)]

    return count


def _sentence_transformer(folder: Path, device: str) -> _Model:
    from sentence_transformers import SentenceTransformer

    options = {"trust_remote_code": False, "local_files_only": True, "model_kwargs": {"use_safetensors": True}}
    model = _whole(lambda: SentenceTransformer(str(folder), device="cpu", **options), folder).float().eval().to(device)
    tokenizer, tokenize = model.tokenizer, lambda texts: [1] * len(texts)  # a static embedding's are alike
    if hasattr(tokenizer, "all_special_ids"):
        limit = min(int(model.max_seq_length or _TOKENS), _TOKENS)
        model.max_seq_length = limit
        tokenize = _counter(folder, tokenizer, limit, model.prompts.get(model.default_prompt_name) or "")

    def forward(texts: list[str]) -> torch.Tensor:
        found: torch.Tensor = model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False, device=device
        )
        return found

    return _Network(device, forward(["a"]).shape[1], tokenize, forward)


def _transformer(folder: Path, device: str) -> _Model:
    """Return the means of a network's last hidden states over all tokens of a text."""
    from transformers import AutoModel, AutoTokenizer

    options = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    network: Any = _whole(lambda: AutoModel.from_pretrained(folder, use_safetensors=True, **options), folder)
    network = network.float().eval().requires_grad_(False).to(device)
    positions = getattr(network.config, "max_position_embeddings", None) or _TOKENS
    limit = min(tokenizer.model_max_length, positions, _TOKENS)

    def forward(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, truncation=True, max_length=limit, return_tensors="pt").to(device)
        states: torch.Tensor = network(**inputs).last_hidden_state
        return states.float().mean(1)

    return _Network(device, int(network.config.hidden_size), _counter(folder, tokenizer, limit, ""), forward)


def _whole(load: Callable[[], nn.Module], folder: Path) -> Any:
    """Return the network that `load` makes; raises ModelError where its files leave some of it to chance.

    The libraries fill up what is missing with random numbers, and only log that they do.
    """
    import torch

    from ..denoisers import quiet

    made = []
    with quiet(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            made.append(load())
    first, second = (dict(network.named_parameters()) for network in made)
    # a pooler's output is not looked at
    random = [name for name in first if "pooler" not in name and not torch.equal(first[name], second[name])]
    if random:
        raise ModelError(f"{folder}: lacks {len(random)} weights, such as {random[0]}; save or fetch it again")
    return made[0]
