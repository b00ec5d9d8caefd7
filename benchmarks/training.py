"""What the masks cost in a training step: a small real UNet on one CPU thread.

    python benchmarks/training.py --json benchmarks/results/training.json

Every kind of step is taken in turn, in another order each round, so that a busy machine slows all of them alike; a cost
is the median over the rounds of its time by that of the plain step of the same round.  The plain step is that of
diffusers' text-to-image scripts with min-SNR weights: noise, forward, loss, backward, optimizer.  `masked_loss`
multiplies its losses by weights, `MaskedLoss` takes its place, and the online masks are in that.  `parts` are the
times of the masks' own work by itself, which the paired ratios cannot resolve.  It takes about three minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from environment import write_result

from memfilter.training import AntiGradientControl, MagnitudeMask, MaskedLoss, Schedule, harmless, masked_loss

BATCH, SIDE, WIDTH, GAMMA = 8, 16, 64, 5.0


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = small_unet()
    steps = make_steps(unet)
    for step in steps.values():
        step()
    seconds = measure(steps, given.rounds)
    plain = seconds["plain"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, plain, strict=True)) for name, values in seconds.items()
    }
    plain_step = statistics.median(plain)
    extra = statistics.median(seconds["forward alone"]) / plain_step
    result = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "batch": [BATCH, 4, SIDE, SIDE],
        "rounds": given.rounds,
        "plain_step_ms": round(plain_step * 1e3, 2),
        "time_by_that_of_a_plain_step": {name: round(ratio, 4) for name, ratio in ratios.items() if name != "plain"},
        "magnitude_expected": round(ratios["MaskedLoss"] + extra, 4),  # the step and one more forward pass
        "magnitude_by_expected": round(ratios["magnitude"] / (ratios["MaskedLoss"] + extra), 4),
        "parts_of_a_plain_step": {name: round(s / plain_step, 5) for name, s in measure_parts().items()},
    }
    write_result(result, given.json)


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def make_steps(unet: UNet2DConditionModel) -> dict[str, Callable[[], None]]:
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-6)
    latents, states, empty = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, 77, WIDTH), torch.randn(1, 77, WIDTH)
    weight = torch.tensor([1.0] * (BATCH - 2) + [0.0] * 2)
    condition, unconditional = {"encoder_hidden_states": states}, {"encoder_hidden_states": empty}

    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn_like(latents), torch.randint(0, 1000, (BATCH,))

    def stepped(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def per_sample() -> torch.Tensor:
        noise, t = drawn()
        prediction = unet(scheduler.add_noise(latents, noise, t), t, states).sample
        snr = compute_snr(scheduler, t)
        return (prediction.float() - noise.float()).square().mean((1, 2, 3)) * snr.clamp(max=GAMMA) / snr

    def wrapped(loss_of: MaskedLoss) -> Callable[[], None]:
        return lambda: stepped(loss_of(unet, latents, *drawn(), weight, condition))

    def forward() -> None:
        noise, t = drawn()
        with torch.no_grad():
            unet(noise, t, states)

    magnitude, agc = MagnitudeMask(1e9, unconditional), AntiGradientControl()
    return {
        "plain": lambda: stepped(per_sample().mean()),
        "masked_loss": lambda: stepped(masked_loss(per_sample(), weight)),
        "MaskedLoss": wrapped(MaskedLoss(scheduler, snr_gamma=GAMMA)),
        "magnitude": wrapped(MaskedLoss(scheduler, snr_gamma=GAMMA, online=magnitude)),
        "AGC": wrapped(MaskedLoss(scheduler, snr_gamma=GAMMA, online=agc)),
        "forward alone": forward,
    }


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each step in each round; the order within a round is drawn."""
    order, seconds = random.Random(0), {name: list[float]() for name in steps}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            started = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - started)
    return seconds


def measure_parts(calls: int = 200) -> dict[str, float]:
    """Return the seconds of the masks' own work alone, medians over calls, with what it adds to the backward pass."""
    schedule, agc, magnitude = Schedule(DDPMScheduler()), AntiGradientControl(), MagnitudeMask(2.0, {})
    weight, t = torch.tensor([1.0] * (BATCH - 2) + [0.0] * 2), torch.randint(0, 1000, (BATCH,))
    losses = torch.rand(BATCH, requires_grad=True)
    latents, prediction, noise = (torch.randn(BATCH, 4, SIDE, SIDE) for _ in range(3))
    works: dict[str, Callable[[], object]] = {
        "mean": lambda: losses.mean().backward(),
        "masked_loss": lambda: masked_loss(losses, weight).backward(),
        "harmless inputs": lambda: (harmless(latents, weight), harmless(noise, weight)),
        "AGC": lambda: agc.weights(losses, t),
        "magnitude without its pass": lambda: magnitude.weights(prediction, noise, t, schedule),
    }
    found = {name: statistics.median(values) for name, values in measure_calls(works, calls).items()}
    found["masked_loss"] -= found.pop("mean")  # which a plain step has too
    return found


def measure_calls(works: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    seconds = {name: list[float]() for name in works}
    for _ in range(calls):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
