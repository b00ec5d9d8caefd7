"""Two processes that train together (DDP, gloo, two accumulated batches a step) against one with the whole batch."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from pipelines import LATENT_SIDE, WIDTH, _unet
from torch.nn.parallel import DistributedDataParallel

from memfilter.training import AntiGradientControl, MagnitudeMask, MaskedLoss, total_weight

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, ACCUMULATED, STEPS, EACH = 2, 2, 3, 3
CASES = ["batch", "weights", "agc", "magnitude", "agc, weights"]
TIMEOUT = 240  # seconds: a process that waits for the other in vain would wait for ever
Batch = dict[str, torch.Tensor]
Result = tuple[list[torch.Tensor], float]


def weights() -> torch.Tensor:
    """Return (STEPS, ACCUMULATED, RANKS, EACH): uneven; the second process fully masked in the first step."""
    draw = torch.Generator().manual_seed(5)
    values = (torch.rand(STEPS, ACCUMULATED, RANKS, EACH, generator=draw) > 0.3).float()
    values[0, :, 1] = 0
    values[1, 0, 0], values[1, 1] = 0, 0  # the first one, then both
    values[2, 0, 0, 0] = 0.5
    return values


def batches(step: int, part: int) -> Batch:
    """Return the batch of both processes, the first one's samples first."""
    draw = torch.Generator().manual_seed(100 * step + part)
    count, shape = RANKS * EACH, (4, LATENT_SIDE, LATENT_SIDE)
    return {
        "latents": torch.randn(count, *shape, generator=draw),
        "noise": torch.randn(count, *shape, generator=draw),
        "timesteps": torch.randint(3, (count,), generator=draw) * 300,  # few, so that they come back
        "loss_weight": weights()[step, part].flatten(),
        "states": torch.randn(count, 7, WIDTH, generator=draw),
    }


def train(case: str, rank: int | None) -> Result:
    """Return the parameters after STEPS, and the share that the online mask kept; `rank` None has the whole batch."""
    torch.manual_seed(0)
    unet = _unet(block_out_channels=(16, 32)).train()
    model: Any = unet if rank is None else DistributedDataParallel(unet)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    empty = {"encoder_hidden_states": torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(9))}
    online = {"agc": AntiGradientControl(1.0, 0.2), "magnitude": MagnitudeMask({0: 2.0, 600: 4.5}, empty)}
    denominator: Any = "weights" if case == "agc, weights" else "batch"
    loss_of = MaskedLoss(DDPMScheduler(), denominator=denominator, online=online.get(case.split(",")[0]))
    for step in range(STEPS):
        parts = [batches(step, part) for part in range(ACCUMULATED)]
        if rank is not None:
            parts = [{name: value[rank * EACH : (rank + 1) * EACH] for name, value in part.items()} for part in parts]
        total = total_weight(*(part["loss_weight"] for part in parts)) if case == "weights" else None
        for i, b in enumerate(parts):
            last = rank is None or i == ACCUMULATED - 1
            with contextlib.nullcontext() if last else model.no_sync():
                condition = {"encoder_hidden_states": b["states"]}
                loss = loss_of(model, b["latents"], b["noise"], b["timesteps"], b["loss_weight"], condition, total)
                (loss / ACCUMULATED).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = float(loss_of.online.kept_fraction) if loss_of.online else 1.0
    return [parameter.detach().clone() for parameter in unet.parameters()], kept


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save({case: train(case, rank) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What each of the two processes came to, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, str(folder))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} processes hang"
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_come_to_the_parameters_of_one(trained: list[dict[str, Result]], case: str) -> None:
    (first, kept_first), (second, kept_second) = (result[case] for result in trained)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    expected, kept = train(case, None)
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if case not in ("batch", "weights"):
        assert 0.2 < kept < 0.95  # something was masked, and not all
        counts = weights().count_nonzero((0, 1, 3))
        both = (kept_first * counts[0] + kept_second * counts[1]) / counts.sum()
        assert both == pytest.approx(kept)


def test_the_cases_come_to_different_parameters(trained: list[dict[str, Result]]) -> None:
    first = [trained[0][case][0] for case in CASES]
    for i, one in enumerate(first):
        for other in first[:i]:
            assert any((a - b).abs().max() > 1e-4 for a, b in zip(one, other, strict=True))
