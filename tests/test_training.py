"""The masked loss on a small real UNet: what a masked sample may not do, and what it may not change for the others."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

from memfilter.training import masked_loss

BATCH = 5


pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 8, 8, generator=random), torch.randn(BATCH, 3, 8, 8, generator=random)


def per_sample_loss(unet: UNet2DModel, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    timesteps = torch.arange(len(x)) * 100
    return (unet(x, timesteps).sample - target).square().mean((1, 2, 3))


def gradients(unet: UNet2DModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(unet.parameters())))


def test_the_loss_is_the_weighted_sum_over_the_whole_batch() -> None:
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert masked_loss(loss, torch.ones(4)) == loss.mean()
    assert masked_loss(loss, torch.tensor([1.0, 0.0, 1.0, 0.0])) == 5 / 4
    assert masked_loss(loss, torch.tensor([1.0, 0.5, 0.25, 0.0])) == 3 / 4


def test_weights_of_another_precision_do_not_change_that_of_the_loss() -> None:
    loss = torch.ones(3, dtype=torch.float16)
    assert masked_loss(loss, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)).dtype == torch.float16
    assert masked_loss(loss.float(), torch.tensor([1, 0, 1])) == pytest.approx(2 / 3)


def test_a_masked_sample_gets_a_gradient_of_exactly_zero(
    unet: UNet2DModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, target = batch[0].requires_grad_(), batch[1]
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    masked_loss(per_sample_loss(unet, x, target), weight).backward()
    assert x.grad is not None
    assert not x.grad[weight == 0].any()
    assert x.grad[weight == 1].flatten(1).any(1).all()


def test_a_masked_sample_has_no_part_in_the_parameters_gradients(
    unet: UNet2DModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, target = batch
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    before = gradients(unet, masked_loss(per_sample_loss(unet, x, target), weight))
    x[1], target[1] = 7 * torch.randn(3, 8, 8), -3.0
    after = gradients(unet, masked_loss(per_sample_loss(unet, x, target), weight))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert any(gradient.any() for gradient in before)


def test_the_gradient_is_that_of_the_other_samples_under_the_same_denominator(
    unet: UNet2DModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, target = batch
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    masked = gradients(unet, masked_loss(per_sample_loss(unet, x, target), weight))
    others = gradients(unet, per_sample_loss(unet, x[:3], target[:3]).sum() / BATCH)
    for one, other in zip(masked, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_fully_masked_batch_gives_a_zero_loss_that_can_still_be_differentiated(
    unet: UNet2DModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    loss = masked_loss(per_sample_loss(unet, *batch), torch.zeros(BATCH))
    assert loss == 0
    assert loss.requires_grad
    assert not any(gradient.any() for gradient in gradients(unet, loss))


@pytest.mark.parametrize(
    ("loss", "weight"),
    [((4, 3, 8, 8), (4,)), ((4,), (3,)), ((4,), (4, 1)), ((4,), ()), ((), ()), ((4, 1), (4, 1))],
)
def test_shapes_that_would_broadcast_in_silence_are_refused(loss: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        masked_loss(torch.zeros(loss), torch.ones(weight))
