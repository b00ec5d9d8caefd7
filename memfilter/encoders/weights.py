"""Files of weights: found here or fetched once, known by their digest; only tensors are read, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ..errors import ModelError, in_one_line

if TYPE_CHECKING:
    import torch


def digest(path: Path) -> str:
    """Return the sha256 hex digest of a file's bytes; computed again only when the file's stat has changed."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(64)
def _sha256(path: Path, *_stat: int) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def check(path: Path) -> None:
    """Raise ModelError for a file that is missing, or plainly something else than weights."""
    try:
        with open(path, "rb") as f:
            start = f.read(64).lstrip()
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e.strerror}") from e
    if not start:
        raise ModelError(f"{path}: is empty, no weights; download it again")
    if start.startswith(b"<"):
        raise ModelError(f"{path}: is a web page, not weights; download it again, as with 'curl -fLO URL'")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a git-lfs pointer, not the weights; run 'git lfs pull' in its folder")


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors or PyTorch file by name, those of a checkpoint's model; raises ModelError."""
    import torch
    from safetensors.torch import load_file

    check(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the readers raise what they like on damaged bytes
        raise ModelError(f"{path}: holds no weights that can be read ({in_one_line(e)[:200]})") from e
    for part in ("state_dict", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(part), dict):
            tensors = tensors[part]
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(f"{path}: holds a {type(tensors).__name__}, not tensors by name")
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a JSON file; raises ModelError where it holds none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}, not settings by name")
    return config


def first_of(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of these files that a folder has; raises ModelError."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder}: has none of {', '.join(names)}: not a whole model; save or fetch it again")


def fetched(repository: str, names: tuple[str, ...]) -> Path:
    """Return the first of these files that a hub repository (`ORG/NAME`, `ORG/NAME@REVISION`) has.

    What is in the hub's cache on this machine is taken without a look at the network; raises ModelError where there is
    nothing and it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = repository.partition("@")
    cause: Exception | None = None
    for local in (True, False):
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, revision=revision or None, local_files_only=local))
            except LocalEntryNotFoundError as e:
                cause = e
                if not local:  # out of reach: so are the other names
                    break
            except EntryNotFoundError as e:
                cause = e
            except Exception as e:  # the hub's client raises what it likes
                cause = e
                break
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    raise ModelError(
        f"{repository}: no {' or '.join(names)} in the hub's cache here, nor to be had from the hub "
        f"({type(cause).__name__}); run '{command}' where there is a network, and bring its HF_HOME here"
    ) from cause


def fetched_folder(repository: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of a hub repository (`ORG/NAME`, `ORG/NAME@REVISION`), with its files of these patterns.

    What is in the hub's cache on this machine is taken without a look at the network, if it has weights; raises
    ModelError where there is nothing and it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = repository.partition("@")
    cause = "no *.safetensors"
    for local in (True, False):
        try:
            folder = snapshot_download(
                repo, revision=revision or None, allow_patterns=list(patterns), local_files_only=local
            )
        except Exception as e:  # the hub's client raises what it likes
            cause = type(e).__name__
            continue
        if any(Path(str(folder)).rglob("*.safetensors")):
            return Path(str(folder))
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    raise ModelError(
        f"{repository}: no weights in the hub's cache here, nor to be had from the hub ({cause}); run '{command}' "
        "where there is a network, and bring its HF_HOME here"
    )


def downloaded(url: str) -> Path:
    """Return the file of a URL in torch's cache, downloaded if need be; raises ModelError."""
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.is_file():
        return path
    # its publishers put the digest, or its beginning, into the name
    known = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8,64})\.", url)
    sha256 = (known[1] or known[2]) if known else ""
    cause = "HF_HUB_OFFLINE is set"
    if not HF_HUB_OFFLINE:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256 or None, progress=False)
            return path
        except Exception as e:  # urllib's errors, a full disk, another digest
            cause = in_one_line(e)[:200]
    expected = f" (its sha256 starts with {sha256})" if sha256 else ""
    raise ModelError(
        f"{url}: not here and not downloaded ({cause}); run 'curl -fL --create-dirs -o {path} {url}'{expected}"
    )
