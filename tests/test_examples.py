"""The examples, run as they stand on a real run with masked samples."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from conftest import encoded, picture, sample, write_tar
from diffusers import StableDiffusionPipeline, UNet2DModel
from pipelines import write_pipeline

from memfilter import Manifest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMANDS = {  # every example, in how many processes it is run and with what; {out} is a folder of its own
    "mask_online.py": (1, "{pipeline} {out}/sightings.parquet {shards} --threshold 3.3 --run {run}"),
    "train_ddp.py": (2, "{run} {out}/unet"),
    "train_with_accelerate.py": (2, "{pipeline} {run} {out}/tuned"),
    "train_with_manifest.py": (1, "{run}"),
}
ELSEWHERE = {  # and the file that runs it
    "sample_safely.py": "test_inference_examples.py",
    "train_with_mitigations.py": "test_mitigation_examples.py",
}
Printed = Callable[[str], list[str]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each example has a folder of its own, by its name."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def printed(masked_run: Manifest, pipeline: Path, out: Path) -> Printed:
    """Run an example once with its command, and return the lines that it printed."""
    shards = " ".join(map(str, sorted((masked_run.path / "shards").glob("*.tar"))))

    @functools.cache
    def run(name: str) -> list[str]:
        (out / name).mkdir()
        places = {"pipeline": pipeline, "run": masked_run.path, "shards": shards, "out": out / name}
        processes, arguments = COMMANDS[name]
        start = here if processes == 1 else functools.partial(in_processes, processes)
        return start(name, *arguments.format(**places).split())

    return run


def here(name: str, *arguments: object) -> list[str]:
    """Run an example as the main program of this process, which has imported what it imports, and return its lines."""
    told = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]), contextlib.redirect_stdout(told):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return told.getvalue().splitlines()


def in_processes(count: int, name: str, *arguments: object) -> list[str]:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {count}".split()
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    # without a GPU accelerate takes several processes for such only where it is told to use the CPU
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_with_manifest", EXAMPLES / "train_with_manifest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_and_has_at_most_60_lines() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.name for file in files] == sorted([*COMMANDS, *ELSEWHERE])
    assert all(f'"{name}"' in Path(__file__).with_name(test).read_text("utf-8") for name, test in ELSEWHERE.items())
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 60
        assert re.fullmatch('""".+[.]"""|""".+ [.][.][.]"""', lines[0])


# -- train_with_manifest.py -------------------------------------------------------------------------------------------


def test_training_prints_a_loss_a_step_and_the_share_that_was_masked(masked_run: Manifest, printed: Printed) -> None:
    assert masked_run.counts == {"read": 16, "keep": 12, "mask": 3, "drop": 0, "bad": 1}
    *steps, share = printed("train_with_manifest.py")
    losses = [float(match[1]) for i, line in enumerate(steps) if (match := re.fullmatch(rf"step {i}: loss (.+)", line))]
    assert len(losses) == len(steps) == 4
    assert all(0 < loss < 2 for loss in losses)
    # 15 samples an epoch, in batches of 8 and 7
    assert share == "masked: 6 of 30 samples, 20%"


@pytest.mark.parametrize("filtered", [True, False])
def test_batches_carry_the_weights_of_the_filtered_shards_and_of_the_original_ones(
    masked_run: Manifest, train: ModuleType, filtered: bool
) -> None:
    assert masked_run.root is not None
    folder = masked_run.path / "shards" if filtered else Path(masked_run.root)
    shards = sorted(map(str, folder.glob("*.tar")))[: 2 if filtered else 1]  # the second has the broken image
    count = 15 if filtered else 8
    data = iter(train.batches(masked_run, shards, count))
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


def test_a_masked_samples_pixels_do_not_change_a_bit_of_the_model(masked_run: Manifest, train: ModuleType) -> None:
    shards = sorted(map(str, (masked_run.path / "shards").glob("*.tar")))
    pixels, weight = next(iter(train.batches(masked_run, shards[1:], 7)))
    assert weight.tolist() == [1.0] * 4 + [0.0] * 3
    masked, kept = pixels.clone(), pixels.clone()
    masked[weight == 0] = torch.randn(3, *pixels.shape[1:])
    kept[0] = torch.randn(pixels.shape[1:])
    before = trained(train, pixels, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, trained(train, masked, weight), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, trained(train, kept, weight), strict=True))


# -- train_ddp.py -----------------------------------------------------------------------------------------------------


def test_two_processes_come_to_the_parameters_of_one_with_all_samples(
    masked_run: Manifest, train: ModuleType, printed: Printed, out: Path
) -> None:
    lines = printed("train_ddp.py")
    digests = [[line.split()[-1] for line in lines if line.startswith(f"process {rank}: ")] for rank in (0, 1)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 1
    assert "process 1, step 1: loss 0.0000, masked 100%" in lines
    assert {line.split(", ")[-1] for line in lines if line.startswith("process 0, ")} == {"masked 0%"}
    trained = UNet2DModel.from_pretrained(out / "train_ddp.py" / "unet")
    for one, other in zip(trained.parameters(), trained_alone(masked_run, train, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def trained_alone(masked_run: Manifest, train: ModuleType, steps: int) -> list[torch.Tensor]:
    """Return what one process with the batches of both comes to, with a loss of its own: the weighted mean."""
    shards = sorted(map(str, (masked_run.path / "shards").glob("*.tar")))
    models, drawn = [], []
    for rank in (0, 1):
        torch.manual_seed(rank)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        models.append(UNet2DModel(16, block_out_channels=(32, 64), **blocks))
        data = iter(train.batches(masked_run, [shards[rank]], 2))
        batches = [next(data) for _ in range(2 * steps)]
        drawn.append([(p, w, torch.randn_like(p), torch.randint(1000, (len(p),))) for p, w in batches])
    unet, optimizer = models[0], torch.optim.SGD(models[0].parameters(), 0.1)
    for step in range(steps):
        parts = [part for rank in (0, 1) for part in drawn[rank][2 * step : 2 * step + 2]]
        pixels, weight, noise, t = (torch.cat(column) for column in zip(*parts, strict=True))
        prediction = unet(train.SCHEDULER.add_noise(pixels, noise, t), t).sample
        ((prediction - noise).square().mean((1, 2, 3)) * weight).sum().div(weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in unet.parameters()]


# -- train_with_accelerate.py -----------------------------------------------------------------------------------------


def test_two_processes_fine_tune_one_pipeline(printed: Printed, pipeline: Path, out: Path) -> None:
    steps = [re.fullmatch(r"step (\d): loss (.+), masked (\d+)%", line) for line in printed("train_with_accelerate.py")]
    assert [match and (match[1], match[3]) for match in steps] == [("0", "0"), ("1", "50"), ("2", "0"), ("3", "50")]
    before = StableDiffusionPipeline.from_pretrained(pipeline)
    after = StableDiffusionPipeline.from_pretrained(out / "train_with_accelerate.py" / "tuned")
    assert not same(before.unet, after.unet)
    assert same(before.vae, after.vae)
    assert same(before.text_encoder, after.text_encoder)
    assert after("a small picture", num_inference_steps=2, output_type="np").images[0].shape == (32, 32, 3)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_masked_samples_picture_and_caption_do_not_change_a_bit_of_the_pipeline(
    masked_run: Manifest, pipeline: Path, tmp_path: Path
) -> None:
    def tuned(name: str, first_changed: int) -> StableDiffusionPipeline:
        """Return the pipeline fine-tuned on shards of which the last samples are others."""
        run = shutil.copytree(masked_run.path, tmp_path / name)
        seeds = [i + 100 * (i >= first_changed) for i in [*range(8, 12), 20, 21, 22]]
        samples = [sample(f"{8 + i:02}", encoded(picture(s)), f"picture {s}") for i, s in enumerate(seeds)]
        write_tar(run / "shards" / "00001.tar", [member for s in samples for member in s])
        (run / "shards" / "00000.tar").unlink()
        here("train_with_accelerate.py", pipeline, run, tmp_path / f"tuned {name}")
        return StableDiffusionPipeline.from_pretrained(tmp_path / f"tuned {name}")

    first = tuned("as it is", 1000)
    assert same(first.unet, tuned("masked changed", 20).unet)
    assert not same(first.unet, tuned("trained changed", 11).unet)


# -- mask_online.py ---------------------------------------------------------------------------------------------------


def test_what_is_masked_online_has_weight_zero_in_the_manifest(
    masked_run: Manifest, printed: Printed, out: Path
) -> None:
    *steps, told = printed("mask_online.py")
    kept = [re.fullmatch(rf"step {i}: loss (.+), kept so far (\d+)%", line) for i, line in enumerate(steps)]
    assert len(kept) == 4
    assert all(kept)
    rows = pq.read_table(out / "mask_online.py" / "sightings.parquet").to_pylist()
    seen, masked = sum(row["seen"] for row in rows), sum(row["masked"] for row in rows)
    assert seen == 15  # batches of 4, 4, 4 and 3
    assert 0 < masked < seen
    assert kept[-1] is not None
    assert int(kept[-1][2]) == round(100 * (1 - masked / seen))
    online = masked_run.with_online(out / "mask_online.py" / "sightings.parquet")
    places = [(row, masked_run.shard_of(row["shard"])) for row in rows]
    zero = {row["key"] for row, shard in places if online.weight(shard, row["key"]) == 0}
    assert zero == {row["key"] for row in rows if row["masked"]} | {"12", "13", "14"}
    assert told == f"weight 0 in the manifest: {len(zero)} of 15 samples"


def test_without_a_threshold_the_loss_tells_and_no_manifest_is_needed(
    masked_run: Manifest, pipeline: Path, tmp_path: Path
) -> None:
    assert masked_run.root is not None
    shard = Path(masked_run.root) / "00000.tar"
    lines = here("mask_online.py", pipeline, tmp_path / "sightings.parquet", shard, "--steps", 2)
    assert [line.split(", ")[-1] for line in lines] == [
        "kept so far 100%"
    ] * 2  # each timestep is the first of its kind
    rows = pq.read_table(tmp_path / "sightings.parquet")
    assert rows["seen"].to_pylist() == [1] * 8
    assert rows["masked"].to_pylist() == [0] * 8
