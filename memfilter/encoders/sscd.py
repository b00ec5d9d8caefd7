"""SSCD, a descriptor for copy detection: Pizzi et al. 2022, *A Self-Supervised Descriptor for Image Copy Detection*.

A ResNet (or ResNeXt), generalised-mean pooling with exponent 3 and a linear layer.  Its publishers have three files of
each model: `.torchvision.pt` and `.classy.pt` hold weights, in the names of two libraries, and are read here; the
`.torchscript.pt` holds a program, and is not.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from ..errors import ModelError, in_one_line
from ..images import Frame
from . import weights
from .pretrained import Recipe

_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection"
_DEFAULT = "sscd_disc_mixup"
_SIDE = 320
_SIMILARITY = 0.75  # its publishers': 90% of the pairs above it are copies, on DISC with sscd_disc_mixup


def recipe(path: Path) -> Recipe:
    """Return the recipe for a published file of weights; raises ModelError, telling what to download."""
    if not path.is_file():
        model = found[0] if (found := re.match(r"sscd_(disc|imagenet)_[a-z]+", path.name)) else _DEFAULT
        library = "classy" if model.endswith("large") else "torchvision"
        size = "178 MB" if model.endswith("large") else "98 MB"
        raise ModelError(f"{path}: no such file; 'curl -fLO {_URL}/{model}.{library}.pt' downloads it ({size})")
    return Recipe(
        kind="sscd",
        settings="gem3-1",
        file=path,
        side=_SIDE,
        frame=Frame(_SIDE, "squash", "bilinear"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        similarity=_SIMILARITY,
        libraries=("torchvision",),
        build=lambda: network(path),
    )


def network(path: Path) -> nn.Module:
    """Return the network of a published file of weights, before its L2 norm; raises ModelError."""
    _refuse_programs(path)
    tensors = {_torchvision_name(name): tensor for name, tensor in weights.read(path).items()}
    try:
        dim, trunk = len(tensors["fc.weight"]), tensors["layer1.0.conv2.weight"]
        layers = [len({n.split(".")[1] for n in tensors if n.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
        groups = trunk.shape[0] // trunk.shape[1]
        resnet: nn.Module = ResNet(Bottleneck, layers, dim, groups=groups, width_per_group=trunk.shape[0] // groups)
        resnet.avgpool = GeM()
        resnet.load_state_dict(tensors)
    except (KeyError, RuntimeError, IndexError) as e:
        cause = f"it has no {e}" if isinstance(e, KeyError) else in_one_line(e)[:200]
        raise ModelError(f"{path}: not the weights of an SSCD model: {cause}") from e
    return resnet


class GeM(nn.Module):
    """Generalised-mean pooling with exponent 3, in float32: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return the cube root of the mean cube of each map."""
        return maps.float().clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3)


def _refuse_programs(path: Path) -> None:
    weights.check(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.partition("/")[2].startswith("code/") for name in archive.namelist()):
                model = path.name.split(".")[0] if path.name.startswith("sscd_") else _DEFAULT
                library = "classy" if model.endswith("large") else "torchvision"
                raise ModelError(
                    f"{path}: a TorchScript program, which is not run here; take the weights of the same model, "
                    f"'curl -fLO {_URL}/{model}.{library}.pt'"
                )


_PLACES = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3"}


def _torchvision_name(name: str) -> str:
    """Return torchvision's name of a weight that either library named."""
    name = name.removeprefix("backbone.")
    for classy, ours in (
        ("initial_block._module.0.", "conv1."),
        ("initial_block._module.1.", "bn1."),
        ("embeddings.1.", "fc."),
    ):
        if name.startswith(classy):
            return ours + name.removeprefix(classy)
    found = re.fullmatch(r"blocks\.(\d)\.block\d-(\d+)\.(.+)", name)
    if found is None:
        return name
    part = re.sub(r"^convolutional_block\.(\d)", lambda m: _PLACES.get(m[1], m[0]), found[3])
    return f"layer{int(found[1]) + 1}.{found[2]}." + re.sub(r"^bn\.", "bn3.", part)
