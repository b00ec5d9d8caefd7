"""The loss wrapper on real small models: equal to a stock diffusers loop on the trained samples alone, and blind to the
others, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from pipelines import FAMILIES, LATENT_SIDE, WIDTH, _unet

from memfilter import ConfigError
from memfilter.training import MaskedLoss, check_finite, harmless, masked_loss, total_weight

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

BATCH = 5
WEIGHT = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0])
NAN, INF = float("nan"), float("inf")
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return _unet().train()


@pytest.fixture(scope="module")
def sd3() -> Any:
    torch.manual_seed(0)
    return FAMILIES["sd3"](t5=False).transformer.train()


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    shape = (BATCH, 4, LATENT_SIDE, LATENT_SIDE)
    return {
        "latents": torch.randn(shape, generator=draw),
        "noise": torch.randn(shape, generator=draw),
        "timesteps": torch.tensor([20, 999, 400, 0, 730]),
        "states": torch.randn(BATCH, 7, WIDTH, generator=draw),
        "pooled": torch.randn(BATCH, 2 * WIDTH, generator=draw),
    }


def ddpm(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type=prediction_type)


def flow_times(batch: Batch) -> Batch:
    # as SD3's scripts draw them: from the shifted schedule of the scheduler
    times = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[torch.tensor([20, 999, 400, 0, 730])]
    states = torch.nn.functional.pad(batch["states"], (0, WIDTH))
    return {**batch, "timesteps": times, "states": states}


def sd3_denoiser(model: Any) -> Callable[..., torch.Tensor]:
    def denoise(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        return model(hidden_states=x, timestep=t, return_dict=False, **condition)[0]

    return denoise


def unet_condition(batch: Batch) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": batch["states"]}


def sd3_condition(batch: Batch) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": batch["states"], "pooled_projections": batch["pooled"]}


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_equal_gradients(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in other)
    assert largest > 0
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * max(1.0, largest)


def others(batch: Batch, weight: torch.Tensor) -> Batch:
    """Return the batch without its masked samples."""
    return {name: value[weight > 0] for name, value in batch.items()}


def stock_ddpm_loss(unet: Any, b: Batch, prediction_type: str, snr_gamma: float | None) -> torch.Tensor:
    """Return each sample's loss (B, 4, H, W) as diffusers' text-to-image scripts compute it."""
    scheduler = ddpm(prediction_type)
    x = scheduler.add_noise(b["latents"], b["noise"], b["timesteps"])
    target = {
        "epsilon": lambda: b["noise"],
        "v_prediction": lambda: scheduler.get_velocity(b["latents"], b["noise"], b["timesteps"]),
        "sample": lambda: b["latents"],
    }[prediction_type]()
    loss = (unet(x, b["timesteps"], b["states"]).sample - target).square()
    if snr_gamma is None:
        return loss
    snr = compute_snr(scheduler, b["timesteps"])
    weights = snr.clamp(max=snr_gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    return loss * weights.view(-1, 1, 1, 1)


def stock_sd3_loss(model: Any, b: Batch, weighting: str, of_image: bool) -> torch.Tensor:
    sigmas = (b["timesteps"] / 1000).view(-1, 1, 1, 1)
    x = (1 - sigmas) * b["latents"] + sigmas * b["noise"]
    prediction = sd3_denoiser(model)(x, b["timesteps"], **sd3_condition(b))
    target = b["noise"] - b["latents"]
    if of_image:  # the scripts' preconditioned outputs
        prediction, target = prediction * -sigmas + x, b["latents"]
    return compute_loss_weighting_for_sd3(weighting, sigmas) * (prediction - target) ** 2


# -- the loss is that of the stock loops on the samples that are trained ----------------------------------------------


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_gradient_is_that_of_a_stock_loop_without_the_masked_samples(
    unet: Any, batch: Batch, prediction_type: str, snr_gamma: float | None
) -> None:
    loss_of = MaskedLoss(ddpm(prediction_type), snr_gamma=snr_gamma)
    args = batch["latents"], batch["noise"], batch["timesteps"], WEIGHT, unet_condition(batch)
    alone = stock_ddpm_loss(unet, others(batch, WEIGHT), prediction_type, snr_gamma).mean((1, 2, 3))
    expected = (alone * WEIGHT[WEIGHT > 0]).sum()
    loss = loss_of(unet, *args)
    assert loss.item() == pytest.approx(expected.item() / BATCH, rel=1e-5)
    sums = gradients(unet, expected)
    assert_equal_gradients(gradients(unet, loss), [gradient / BATCH for gradient in sums])
    loss_of.denominator = "weights"
    assert_equal_gradients(gradients(unet, loss_of(unet, *args)), [gradient / WEIGHT.sum() for gradient in sums])


@pytest.mark.parametrize(("weighting", "of_image"), [("none", True), ("sigma_sqrt", False), ("cosmap", False)])
def test_the_gradient_is_that_of_sd3s_loop_without_the_masked_samples(
    sd3: Any, batch: Batch, weighting: str, of_image: bool
) -> None:
    batch = flow_times(batch)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])

    def preconditioned(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        return sd3_denoiser(sd3)(x, t, **condition) * (-t / 1000).view(-1, 1, 1, 1) + x

    loss_of = MaskedLoss(
        FlowMatchEulerDiscreteScheduler(shift=3.0), "sample" if of_image else None, weighting=weighting
    )
    denoiser = preconditioned if of_image else sd3_denoiser(sd3)
    loss = loss_of(denoiser, batch["latents"], batch["noise"], batch["timesteps"], weight, sd3_condition(batch))
    alone = stock_sd3_loss(sd3, others(batch, weight), weighting, of_image).mean((1, 2, 3)).sum() / BATCH
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert_equal_gradients(gradients(sd3, loss), gradients(sd3, alone))


def test_schemes_that_draw_timesteps_weigh_every_loss_by_one(batch: Batch) -> None:
    b = flow_times(batch)
    prediction = torch.randn_like(b["latents"])
    args = prediction, b["latents"], b["noise"], b["timesteps"], WEIGHT
    flow = FlowMatchEulerDiscreteScheduler()
    losses = {MaskedLoss(flow, weighting=w)(*args).item() for w in ("none", "logit_normal", "mode")}
    assert len(losses) == 1


@pytest.mark.parametrize("denominator", ["batch", "weights"])
def test_spatial_weights_multiply_before_the_mean(unet: Any, batch: Batch, denominator: Any) -> None:
    weight = torch.rand(BATCH, 1, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(2))
    weight[1], weight[2, :, :8] = 0, 0
    loss_of = MaskedLoss(ddpm("epsilon"), snr_gamma=5.0, denominator=denominator)
    loss = loss_of(unet, batch["latents"], batch["noise"], batch["timesteps"], weight, unet_condition(batch))
    kept = torch.tensor([0, 2, 3, 4])
    alone = stock_ddpm_loss(unet, {n: v[kept] for n, v in batch.items()}, "epsilon", 5.0)
    divisor = BATCH if denominator == "batch" else weight.mean((1, 2, 3)).sum()
    expected = (alone * weight[kept]).mean((1, 2, 3)).sum() / divisor
    assert_equal_gradients(gradients(unet, loss), gradients(unet, expected))


def test_schedules_with_a_signal_of_zero_have_finite_min_snr_weights(batch: Batch) -> None:
    timesteps = torch.full((BATCH,), 999)
    for prediction_type, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        assert scheduler.alphas_cumprod[-1] == 0
        weights = MaskedLoss(scheduler).schedule.min_snr(timesteps, 5.0)
        assert weights.tolist() == [expected] * BATCH


# -- a masked sample is out of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, 3e38])
@pytest.mark.parametrize("place", ["latents", "noise", "states", "prediction"])
def test_nothing_in_a_masked_sample_reaches_the_loss_or_a_gradient(
    unet: Any, batch: Batch, place: str, value: float
) -> None:
    def loss(poison: str | None) -> torch.Tensor:
        b = {name: tensor.clone() for name, tensor in batch.items()}
        if poison in b and not (poison == "states" and value == 3e38):  # a finite caption is let through
            b[poison][1, 0], b[poison][3] = value, value

        def denoise(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
            prediction = unet(x, t, **condition).sample
            bad = torch.zeros_like(prediction)
            bad[1] = value
            return prediction + bad if poison == "prediction" else prediction

        loss_of = MaskedLoss(ddpm("v_prediction"), snr_gamma=5.0, denominator="weights")
        return loss_of(denoise, b["latents"], b["noise"], b["timesteps"], WEIGHT, unet_condition(b))

    clean, poisoned = loss(None), loss(place)
    assert torch.equal(clean, poisoned)
    for one, other in zip(gradients(unet, clean), gradients(unet, poisoned), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_transformers_masked_sample_may_hold_nan_everywhere(sd3: Any, batch: Batch) -> None:
    clean, b = flow_times(batch), flow_times({name: value.clone() for name, value in batch.items()})
    for name in ("latents", "noise", "states", "pooled"):
        b[name][1], b[name][3] = NAN, INF
    b["timesteps"][3] = 0.0  # whose sigma_sqrt weight is infinite
    loss_of = MaskedLoss(FlowMatchEulerDiscreteScheduler(), weighting="sigma_sqrt")

    def loss(b: Batch) -> torch.Tensor:
        return loss_of(sd3_denoiser(sd3), b["latents"], b["noise"], b["timesteps"], WEIGHT, sd3_condition(b))

    assert torch.equal(loss(b), loss(clean))
    for one, other in zip(gradients(sd3, loss(b)), gradients(sd3, loss(clean)), strict=True):
        assert torch.equal(one, other)


def test_nan_in_a_sample_that_is_trained_shows(unet: Any, batch: Batch) -> None:
    batch["latents"][0, 0, 0, 0] = NAN
    loss_of = MaskedLoss(ddpm("epsilon"))
    loss = loss_of(unet, batch["latents"], batch["noise"], batch["timesteps"], WEIGHT, unet_condition(batch))
    assert loss.isnan()


def test_what_is_not_finite_is_named_unless_it_is_masked(unet: Any, batch: Batch) -> None:
    batch["latents"][[2, 3], 0, 0, 0] = torch.tensor([INF, NAN])
    loss_of = MaskedLoss(ddpm("epsilon"))
    loss_of(unet, batch["latents"], batch["noise"], batch["timesteps"], WEIGHT, unet_condition(batch))
    assert loss_of.last is not None
    with pytest.raises(ValueError, match=r"the loss of sample .*'c' \(1 of 5\) is nan; others are finite"):
        check_finite(loss_of.last, WEIGHT, np.array(["a", "b", "c", "d", "e"]))
    check_finite(loss_of.last, WEIGHT * torch.tensor([1, 1, 0, 1, 1]), ["a", "b", "c", "d", "e"])
    with pytest.raises(
        ValueError, match=r"sample 0 in the batch \(3 of 5\) is inf; no sample that trains has a finite one"
    ):
        check_finite(torch.full((5,), INF), WEIGHT)


def test_an_overflow_in_half_precision_is_named(batch: Batch) -> None:
    torch.manual_seed(0)
    half = _unet().half()
    batch["latents"][4] *= 1e5  # beyond what float16 holds
    latents, noise, states = (batch[name].half() for name in ("latents", "noise", "states"))
    loss_of = MaskedLoss(ddpm("epsilon"))
    loss_of(half, latents, noise, batch["timesteps"], WEIGHT, {"encoder_hidden_states": states})
    assert loss_of.last is not None
    with pytest.raises(ValueError, match=r"sample 'e' .* is nan; others are finite, so its image or caption overflows"):
        check_finite(loss_of.last, WEIGHT, ["a", "b", "c", "d", "e"])


def test_a_masked_samples_gradient_is_exactly_zero(unet: Any, batch: Batch) -> None:
    leaves = [batch[name].requires_grad_() for name in ("latents", "noise", "states")]
    loss_of = MaskedLoss(ddpm("epsilon"), snr_gamma=5.0)
    loss_of(unet, *leaves[:2], batch["timesteps"], WEIGHT, {"encoder_hidden_states": leaves[2]}).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad[WEIGHT == 0].any()
        assert leaf.grad[WEIGHT > 0].flatten(1).any(1).all()


@pytest.mark.parametrize("denominator", ["batch", "weights"])
def test_a_fully_masked_batch_gives_a_zero_loss_with_a_graph(unet: Any, batch: Batch, denominator: Any) -> None:
    batch["latents"][:] = NAN
    loss_of = MaskedLoss(ddpm("epsilon"), snr_gamma=5.0, denominator=denominator)
    loss = loss_of(
        unet, batch["latents"], batch["noise"], batch["timesteps"], torch.zeros(BATCH), unet_condition(batch)
    )
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(unet, loss))


def test_a_prediction_from_harmless_inputs_gives_the_same_gradient(unet: Any, batch: Batch) -> None:
    batch["latents"][1], batch["states"][3] = NAN, INF
    scheduler, loss_of = ddpm("epsilon"), MaskedLoss(ddpm("epsilon"))
    latents, states = harmless(batch["latents"], WEIGHT), harmless(batch["states"], WEIGHT)
    x = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    prediction = unet(x, batch["timesteps"], states).sample
    given = loss_of(prediction, latents, batch["noise"], batch["timesteps"], WEIGHT)
    own = loss_of(unet, batch["latents"], batch["noise"], batch["timesteps"], WEIGHT, unet_condition(batch))
    assert_equal_gradients(gradients(unet, given), gradients(unet, own))


def test_nested_conditions_are_made_harmless_and_tables_of_places_stay(batch: Batch) -> None:
    seen: dict[str, Any] = {}

    def denoise(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        seen.update(condition)
        return x.clone()

    places = torch.arange(2.0 * BATCH).view(BATCH, 2)  # no sample's own, though there are as many
    pooled = batch["pooled"].clone()
    pooled[1] = NAN
    condition = {"added": {"text_embeds": pooled}, "ids": places, "length": 7, "none": None}
    MaskedLoss(ddpm("epsilon"))(denoise, batch["latents"], batch["noise"], batch["timesteps"], WEIGHT, condition)
    assert torch.equal(seen["ids"], places)
    assert not seen["added"]["text_embeds"][1].any()
    assert torch.equal(seen["added"]["text_embeds"][3], batch["pooled"][3])
    assert (seen["length"], seen["none"]) == (7, None)


# -- precision and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_bfloat16_gives_a_float32_loss_near_that_of_float32(unet: Any, batch: Batch, cast: str) -> None:
    batch["latents"][1] = NAN
    loss_of = MaskedLoss(ddpm("v_prediction"), snr_gamma=5.0)

    def loss(model: Any, dtype: torch.dtype) -> torch.Tensor:
        latents, noise, states = (batch[name].to(dtype) for name in ("latents", "noise", "states"))
        return loss_of(model, latents, noise, batch["timesteps"], WEIGHT, {"encoder_hidden_states": states})

    expected = loss(unet, torch.float32)
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            low = loss(unet, torch.float32)
    else:
        low = loss(_unet_in_bfloat16(unet), torch.bfloat16)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(expected.item(), rel=0.02)
    assert low.item() != expected.item()


def _unet_in_bfloat16(unet: Any) -> Any:
    copy = _unet()
    copy.load_state_dict(unet.state_dict())
    return copy.to(torch.bfloat16)


@pytest.mark.parametrize("denominator", ["batch", "weights"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_never_asks_the_device_for_a_value(denominator: Any, prediction_type: str) -> None:
    # tensors on the meta device have shapes and no values: whoever asks for one gets an error
    shape = (BATCH, 4, LATENT_SIDE, LATENT_SIDE)
    latents, noise, weight = (torch.empty(s, device="meta") for s in (shape, shape, (BATCH,)))
    timesteps = torch.empty(BATCH, dtype=torch.int64, device="meta")
    states = {"encoder_hidden_states": torch.empty(BATCH, 7, WIDTH, device="meta")}
    unet = _unet().to("meta")
    loss_of = MaskedLoss(ddpm(prediction_type), snr_gamma=5.0, denominator=denominator)
    loss_of(unet, latents, noise, timesteps, weight, states).backward()
    with pytest.raises(RuntimeError, match="meta"):
        weight.sum().item()


# -- the denominator --------------------------------------------------------------------------------------------------


def test_the_total_weight_makes_accumulated_losses_the_weighted_mean_of_all_samples() -> None:
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]), torch.tensor([6.0])]
    weights = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.0])]
    total = total_weight(*weights)
    mean = sum(masked_loss(a, w, total) for a, w in zip(losses, weights, strict=True)) / 3
    assert mean == pytest.approx((1 + 1.5 + 4) / 2.5)
    assert total_weight(*[0 * w for w in weights]) == 1
    assert masked_loss(losses[1], weights[1], "weights") == pytest.approx(5.5 / 1.5)
    assert masked_loss(losses[1], 0 * weights[1], "weights") == 0


def test_prior_preservation_is_one_loss_a_half() -> None:
    losses, weight = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    (own, own_weight), (prior, prior_weight) = zip(losses.chunk(2), weight.chunk(2), strict=True)
    halves = masked_loss(own, own_weight) + 0.5 * masked_loss(prior, prior_weight)
    whole = masked_loss(losses, 2 * torch.cat([own_weight, 0.5 * prior_weight]))
    assert halves == whole == 1 + 0.5 * 3.5


# -- what cannot be obeyed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, NAN])
def test_a_weight_that_is_none_is_an_error_that_names_the_sample(batch: Batch, weight: float) -> None:
    weights = WEIGHT.clone()
    weights[2] = weight
    with pytest.raises(ValueError, match=rf"loss_weight of sample 2 in the batch is {weight}: weights are 0 or more"):
        masked_loss(torch.ones(BATCH), weights)
    spatial = torch.ones(BATCH, 1, LATENT_SIDE, LATENT_SIDE)
    spatial[2, 0, 3, 4] = weight
    with pytest.raises(ValueError, match="loss_weight of sample 2"):
        MaskedLoss(ddpm("epsilon"))(batch["noise"], batch["latents"], batch["noise"], batch["timesteps"], spatial)


def test_shapes_that_do_not_fit_are_told(batch: Batch) -> None:
    loss_of = MaskedLoss(ddpm("epsilon"))
    latents, noise, t = batch["latents"], batch["noise"], batch["timesteps"]
    for weight in (torch.ones(BATCH, 1), torch.ones(4), torch.ones(BATCH, 4, LATENT_SIDE, LATENT_SIDE)):
        with pytest.raises(ValueError, match="do not fit"):
            loss_of(noise, latents, noise, t, weight)
    with pytest.raises(ValueError, match="do not fit"):
        loss_of(noise, latents, noise, t[:1], WEIGHT)
    with pytest.raises(ValueError, match="learned variance"):
        loss_of(torch.cat([noise, noise], 1), latents, noise, t, WEIGHT)
    with pytest.raises(ValueError, match="batch, weights"):
        masked_loss(torch.ones(2), torch.ones(2), "sum")  # type: ignore[arg-type]


def test_schedulers_and_weightings_that_do_not_fit_are_told() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="EDMEulerScheduler is neither"):
        MaskedLoss(EDMEulerScheduler())
    with pytest.raises(ConfigError, match="one of flow, sample"):
        MaskedLoss(flow, "epsilon")
    with pytest.raises(ConfigError, match="takes weighting"):
        MaskedLoss(flow, snr_gamma=5.0)
    with pytest.raises(ConfigError, match="takes snr_gamma"):
        MaskedLoss(ddpm("epsilon"), weighting="cosmap")
    with pytest.raises(ConfigError, match="one of none, sigma_sqrt"):
        MaskedLoss(flow, weighting="sigma")
