"""The examples, run as they stand on a real run with masked samples."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import encoded, picture, sample, write_tar
from diffusers import UNet2DModel

import memfilter
from memfilter import Config, Manifest

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train_with_manifest.py"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards of eight samples; of the second, three repeat pictures of the first and are masked, one is broken."""
    folder = tmp_path_factory.mktemp("examples")
    pictures = [*range(12), 0, 1, 2]
    # of two equal pictures the one with the longer caption is kept: the first
    captions = ["a " + "very " * (20 - i) + "small picture" for i in range(len(pictures))]
    members = [m for i, p in enumerate(pictures) for m in sample(f"{i:02}", encoded(picture(p)), captions[i])]
    members += sample("broken", b"\xff\xd8\xff", "no picture")
    write_tar(folder / "data" / "00000.tar", members[:16])
    write_tar(folder / "data" / "00001.tar", members[16:])
    config = Config.parse({"images": {"encoder": None}, "policy": {"image_duplicate": "mask"}})
    return memfilter.run([str(folder / "data")], folder / "out", config, workers=1)


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_with_manifest", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output(*arguments: str | Path) -> list[str]:
    command = [sys.executable, str(TRAIN), *map(str, arguments)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_training_prints_a_loss_a_step_and_the_share_that_was_masked(run: Manifest) -> None:
    assert run.counts == {"read": 16, "keep": 12, "mask": 3, "drop": 0, "bad": 1}
    *steps, share = output(run.path, "--steps", "4")
    losses = [float(match[1]) for i, line in enumerate(steps) if (match := re.fullmatch(rf"step {i}: loss (.+)", line))]
    assert len(losses) == len(steps) == 4
    assert all(0 < loss < 2 for loss in losses)
    # 15 samples an epoch, in batches of 8 and 7
    assert share == "masked: 6 of 30 samples, 20%"


@pytest.mark.parametrize("filtered", [True, False])
def test_batches_carry_the_weights_of_the_filtered_shards_and_of_the_original_ones(
    run: Manifest, train: ModuleType, filtered: bool
) -> None:
    assert run.root is not None
    folder = run.path / "shards" if filtered else Path(run.root)
    shards = sorted(map(str, folder.glob("*.tar")))[: 2 if filtered else 1]  # the second has the broken image
    count = 15 if filtered else 8
    data = iter(train.batches(run, shards, count))
    (pixels, weight), again = next(data), next(data)
    assert pixels.shape == (count, 3, train.SIDE, train.SIDE)
    assert -1 <= pixels.min() < -0.3 < 0.3 < pixels.max() <= 1
    assert weight.dtype == torch.float32
    assert weight.tolist() == ([1.0] * 12 + [0.0] * 3)[:count]
    assert torch.equal(pixels, again[0])
    if filtered:  # the masked copies are still there
        assert torch.equal(pixels[12:], pixels[:3])


def trained(train: ModuleType, pixels: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(train.SIDE, block_out_channels=(32, 64), layers_per_block=1, **blocks)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    for _ in range(2):
        train.step(unet, optimizer, pixels, weight)
    return [parameter.detach() for parameter in unet.parameters()]


def test_a_masked_samples_pixels_do_not_change_a_bit_of_the_model(run: Manifest, train: ModuleType) -> None:
    shards = sorted(map(str, (run.path / "shards").glob("*.tar")))
    pixels, weight = next(iter(train.batches(run, shards[1:], 7)))
    assert weight.tolist() == [1.0] * 4 + [0.0] * 3
    masked, kept = pixels.clone(), pixels.clone()
    masked[weight == 0] = torch.randn(3, *pixels.shape[1:])
    kept[0] = torch.randn(pixels.shape[1:])
    before = trained(train, pixels, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, trained(train, masked, weight), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, trained(train, kept, weight), strict=True))
