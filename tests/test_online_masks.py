"""Masks that are found while training, against plain implementations, and what they learn in a manifest."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from conftest import encoded, picture, sample, write_tar
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import FAMILIES, LATENT_SIDE, WIDTH, _unet, write_pipeline

import memfilter
from memfilter import Config, ConfigError, InputError, Manifest, Threshold
from memfilter.training import AntiGradientControl, MagnitudeMask, MaskedLoss, Schedule, Sightings

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

BATCH = 6
NAN = float("nan")
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return _unet().train()


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    shape = (BATCH, 4, LATENT_SIDE, LATENT_SIDE)
    return {
        "latents": torch.randn(shape, generator=draw),
        "noise": torch.randn(shape, generator=draw),
        "timesteps": torch.tensor([20, 999, 400, 5, 730, 120]),
        "weight": torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0]),
        "states": torch.randn(BATCH, 7, WIDTH, generator=draw),
        "empty": torch.randn(1, 7, WIDTH, generator=draw),
    }


def loss_under(loss_of: MaskedLoss, denoiser: Any, b: Batch) -> torch.Tensor:
    condition = {"encoder_hidden_states": b["states"]}
    return loss_of(denoiser, b["latents"], b["noise"], b["timesteps"], b["weight"], condition)


def magnitudes(unet: Any, scheduler: DDPMScheduler, b: Batch) -> list[float]:
    """Return the norms as the paper has them, one sample at a time."""
    norms = []
    with torch.no_grad():
        for i in range(BATCH):
            t = b["timesteps"][i : i + 1]
            x = scheduler.add_noise(b["latents"][i : i + 1], b["noise"][i : i + 1], t)
            d = unet(x, t, b["states"][i : i + 1]).sample - unet(x, t, b["empty"]).sample
            norms.append(float((d**2).sum().sqrt()))
    return norms


def between(values: list[float]) -> float:
    """Return a number with half of the values below it."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


# -- the magnitude ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["raw", "epsilon"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samples_are_masked_where_the_norm_reaches_the_threshold(
    unet: Any, batch: Batch, prediction_type: str, scale: Any
) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    values = magnitudes(unet, scheduler, batch)
    if scale == "epsilon":
        abar = scheduler.alphas_cumprod[batch["timesteps"]]
        factor = {"epsilon": abar**0, "v_prediction": abar**0.5, "sample": (abar / (1 - abar)) ** 0.5}[prediction_type]
        values = [float(v * f) / (4 * LATENT_SIDE**2) ** 0.5 for v, f in zip(values, factor, strict=True)]
    mask = MagnitudeMask(between(values), {"encoder_hidden_states": batch["empty"]}, scale=scale)
    loss = loss_under(MaskedLoss(scheduler, online=mask, snr_gamma=5.0), unet, batch)
    expected = torch.tensor([float(value < between(values)) for value in values])
    expected[2] = 1  # the manifest masks it: the mask has no say
    assert mask.last is not None
    assert torch.equal(mask.last, expected)
    assert 0 < expected.sum() < BATCH
    counted = expected[batch["weight"] > 0]
    assert (mask.seen, mask.kept) == (5, counted.sum())
    assert mask.kept_fraction == pytest.approx(counted.mean().item())
    offline = {**batch, "weight": batch["weight"] * expected}
    assert torch.equal(loss, loss_under(MaskedLoss(scheduler, snr_gamma=5.0), unet, offline))


def test_a_norm_of_exactly_the_threshold_is_masked() -> None:
    unconditional = torch.randn(3, 4, 2, 2)
    unconditional[:, 0, 0, 0] = 0
    conditional = unconditional.clone()
    conditional[:, 0, 0, 0] = torch.tensor([2.0, 2 - 2**-23, -2.0])
    weights = MagnitudeMask(2.0, {}).weights(conditional, unconditional, torch.full((3,), 10))
    assert weights.tolist() == [0, 1, 0]
    points = MagnitudeMask({0: 1.0, 20: 3.0}, {}).weights(conditional, unconditional, torch.full((3,), 10))
    assert points.tolist() == [0, 1, 0]


def test_a_loss_of_exactly_the_average_is_kept() -> None:
    mask = AntiGradientControl(factor=1.25, decay=0.5)
    mask.weights(torch.tensor([2.0]), torch.tensor([7]))  # its average becomes 1
    assert mask.weights(torch.tensor([0.8, 0.75, 0.0]), torch.tensor([7, 7, 9])).tolist() == [1, 0, 1]


def test_epsilon_scale_of_a_flow_is_one_minus_sigma() -> None:
    schedule = Schedule(FlowMatchEulerDiscreteScheduler())
    assert schedule.eps_factor(torch.tensor([1000.0, 250.0, 0.0])).tolist() == [0.0, 0.75, 1.0]


def test_a_transformers_pooled_condition_is_replaced_as_well(batch: Batch) -> None:
    torch.manual_seed(0)
    sd3 = FAMILIES["sd3"](t5=False).transformer
    calls: list[dict[str, torch.Tensor]] = []

    def denoise(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        calls.append(condition)
        return sd3(hidden_states=x, timestep=t, return_dict=False, **condition)[0]

    own = {"encoder_hidden_states": torch.randn(BATCH, 7, 2 * WIDTH), "pooled_projections": torch.randn(BATCH, 64)}
    empty = {name: torch.randn(1, *value.shape[1:]) for name, value in own.items()}
    mask = MagnitudeMask(1e-6, empty)
    loss_of = MaskedLoss(FlowMatchEulerDiscreteScheduler(), online=mask)
    args = batch["latents"], batch["noise"], batch["timesteps"].float(), torch.ones(BATCH)
    assert loss_of(denoise, *args, own) == 0
    assert mask.kept_fraction == 0
    assert len(calls) == 2
    for name, value in empty.items():
        assert torch.equal(calls[1][name], value.expand_as(own[name]))


def test_nested_conditions_keep_what_the_unconditional_does_not_name(batch: Batch) -> None:
    seen: list[dict[str, Any]] = []

    def denoise(x: torch.Tensor, t: torch.Tensor, **condition: Any) -> torch.Tensor:
        seen.append(condition)
        return x + condition["added"]["text_embeds"].mean()

    sizes, pooled = torch.randn(BATCH, 6), torch.randn(BATCH, 3)
    loss_of = MaskedLoss(DDPMScheduler(), online=MagnitudeMask(2.0, {"added": {"text_embeds": torch.zeros(1, 3)}}))
    condition = {"added": {"text_embeds": pooled, "time_ids": sizes}, "states": batch["states"]}
    loss_of(denoise, batch["latents"], batch["noise"], batch["timesteps"], batch["weight"], condition)
    assert torch.equal(seen[1]["added"]["time_ids"], sizes)
    assert not seen[1]["added"]["text_embeds"].any()
    assert seen[1]["added"]["text_embeds"].shape == pooled.shape
    assert torch.equal(seen[1]["states"], batch["states"])


def test_thresholds_of_timesteps_are_joined_by_straight_lines() -> None:
    mask = MagnitudeMask({500: 4.0, 100: 2.0, 900: 3.0}, {})
    timesteps = torch.tensor([0, 100, 200, 500, 700, 900, 999])
    assert mask.threshold(timesteps).tolist() == [2.0, 2.0, 2.5, 4.0, 3.5, 3.0, 3.0]
    assert MagnitudeMask(2, {}).threshold(timesteps).tolist() == [2.0] * 7


@pytest.fixture(scope="module")
def threshold(tmp_path_factory: pytest.TempPathFactory) -> Threshold:
    """The threshold of a run that scores pairs at two timesteps."""
    folder = tmp_path_factory.mktemp("pairs")
    members = [m for i in range(4) for m in sample(f"{i}", encoded(picture(i)), f"picture {'abcd'[i]}")]
    write_tar(folder / "data" / "0.tar", members)
    model = str(write_pipeline(folder / "model"))
    magnitude = {"model": model, "mode": "pair", "timesteps": [100, 500], "threshold": {"quantile": 0.5}}
    config = Config.parse({"images": {"encoder": None}, "magnitude": magnitude})
    memfilter.run([str(folder / "data")], folder / "out", config, workers=1)
    return Threshold.load(folder / "out" / "manifest" / "threshold.json")


def test_a_runs_threshold_is_taken_at_its_timesteps(threshold: Threshold, unet: Any, batch: Batch) -> None:
    assert threshold.by_timestep is not None
    (_, first), (_, second) = threshold.by_timestep
    mask = MagnitudeMask(threshold, {"encoder_hidden_states": batch["empty"]})
    expected = torch.tensor([first, first, (first + second) / 2, second, second])
    torch.testing.assert_close(mask.threshold(torch.tensor([0, 100, 300, 500, 900])), expected)
    loss_under(MaskedLoss(DDPMScheduler(), online=mask), unet, batch)
    assert mask.seen == 5


def test_a_threshold_that_was_measured_otherwise_is_refused(threshold: Threshold, batch: Batch) -> None:
    empty = {"encoder_hidden_states": batch["empty"]}
    of_prompts = replace(threshold, depends={**threshold.depends, "mode": "prompt"})
    for scale, given in (("raw", of_prompts), ("epsilon", threshold)):
        with pytest.raises(ConfigError, match=r"take one of a run with magnitude\.mode: pair"):
            MagnitudeMask(given, empty, scale=scale)  # type: ignore[arg-type]
    mask, timesteps = MagnitudeMask(threshold, empty), torch.tensor([5])
    with pytest.raises(ConfigError, match="measured on latents of 1,024 elements, and these have 256"):
        mask.weights(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), timesteps)
    other = Schedule(DDPMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ConfigError, match="that predicts epsilon, and this one v_prediction"):
        mask.weights(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16), timesteps, other)


def test_one_pass_more_a_batch_without_a_graph_and_none_while_warming_up(unet: Any, batch: Batch) -> None:
    passes: list[bool] = []
    hook = unet.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    mask = MagnitudeMask(1e-9, {"encoder_hidden_states": batch["empty"]}, warmup=2)
    loss_of = MaskedLoss(DDPMScheduler(), online=mask)
    losses = [loss_under(loss_of, unet, batch) for _ in range(4)]
    hook.remove()
    assert passes == [True, True, True, False, True, False]
    assert [bool(loss > 0) for loss in losses] == [True, True, False, False]
    assert mask.kept_fraction == 0.5


def test_warm_up_goes_on_where_it_was(unet: Any, batch: Batch) -> None:
    empty = {"encoder_hidden_states": batch["empty"]}
    first, second = MagnitudeMask(1e-9, empty, warmup=2), MagnitudeMask(1e-9, empty, warmup=2)
    loss_under(MaskedLoss(DDPMScheduler(), online=first), unet, batch)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    losses = [loss_under(MaskedLoss(DDPMScheduler(), online=second), unet, batch) for _ in range(2)]
    assert [bool(loss > 0) for loss in losses] == [True, False]
    assert second.kept_fraction == 2 / 3


def test_a_batch_that_is_masked_online_as_a_whole_still_has_a_graph(unet: Any, batch: Batch) -> None:
    mask = MagnitudeMask(1e-9, {"encoder_hidden_states": batch["empty"]})
    for denominator in ("batch", "weights"):
        loss = loss_under(MaskedLoss(DDPMScheduler(), online=mask, denominator=denominator), unet, batch)
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(unet.parameters())))


def test_a_magnitude_that_is_nan_masks_nothing_so_that_it_shows() -> None:
    mask = MagnitudeMask(1.0, {})
    prediction = torch.tensor([[NAN, 0.0], [3.0, 4.0], [0.3, 0.4]])
    assert mask.weights(prediction, torch.zeros(3, 2), torch.zeros(3)).tolist() == [1, 0, 1]


def test_a_mask_that_cannot_be_had_is_told(batch: Batch) -> None:
    with pytest.raises(ConfigError, match="numbers over 0"):
        MagnitudeMask({}, {})
    with pytest.raises(ConfigError, match="numbers over 0"):
        MagnitudeMask(NAN, {})
    with pytest.raises(ConfigError, match="raw or epsilon"):
        MagnitudeMask(2.0, {}, scale="eps")  # type: ignore[arg-type]
    mask = MagnitudeMask(2.0, {}, scale="epsilon")
    with pytest.raises(ConfigError, match="needs the schedule"):
        mask.weights(batch["latents"], batch["noise"], batch["timesteps"])
    with pytest.raises(ConfigError, match="give MaskedLoss the denoiser"):
        loss_under(MaskedLoss(DDPMScheduler(), online=mask), batch["noise"], batch)
    with pytest.raises(ConfigError, match="at least 1"):
        AntiGradientControl(factor=0.8)
    with pytest.raises(ConfigError, match="a state of 7 timesteps"):
        AntiGradientControl().load_state_dict(AntiGradientControl(timesteps=7).state_dict())


# -- anti-gradient control --------------------------------------------------------------------------------------------


def plain_agc(batches: list[tuple[list[float], list[int]]], factor: float, decay: float) -> list[list[float]]:
    """Return the masks of batches of losses and timesteps, as the paper's algorithm finds them."""
    average: dict[int, float] = {}
    masks = []
    for losses, timesteps in batches:
        pairs = list(zip(losses, timesteps, strict=True))
        masks.append([float(loss * factor >= average.get(t, 0.0)) for loss, t in pairs])
        for loss, t in pairs:
            average[t] = decay * average.get(t, 0.0) + (1 - decay) * loss
    return masks


def losses_at_distinct_timesteps(count: int) -> list[tuple[list[float], list[int]]]:
    draw = torch.Generator().manual_seed(4)
    losses = torch.rand(count, 8, generator=draw)
    return [(row.tolist(), torch.randperm(20, generator=draw)[:8].tolist()) for row in losses]


@pytest.mark.parametrize(("factor", "decay"), [(1.25, 0.8), (2.0, 0.5)])
def test_the_masks_are_those_of_the_papers_algorithm(factor: float, decay: float) -> None:
    batches, agc = losses_at_distinct_timesteps(60), AntiGradientControl(factor, decay)
    found = [agc.weights(torch.tensor(losses), torch.tensor(t)).tolist() for losses, t in batches]
    expected = plain_agc(batches, factor, decay)
    assert found == expected
    kept = torch.tensor(expected).mean()
    assert 0.3 < kept < 0.99
    assert agc.kept_fraction == pytest.approx(kept.item())
    assert torch.tensor(found[0]).all()  # the averages start at 0


def test_losses_at_one_timestep_count_as_the_mean_over_their_orders() -> None:
    agc, decay = AntiGradientControl(), 0.8
    agc.weights(torch.tensor([3.0]), torch.tensor([7]))
    agc.weights(torch.tensor([1.0, 2.0]), torch.tensor([7, 7]))
    orders = []
    for first, second in ((1.0, 2.0), (2.0, 1.0)):
        average = 0.2 * 3.0
        for loss in (first, second):
            average = decay * average + (1 - decay) * loss
        orders.append(average)
    assert agc.average[7].item() == pytest.approx(sum(orders) / 2)
    assert not agc.average[:7].any()


def test_losses_that_are_masked_by_the_manifest_or_not_finite_move_nothing() -> None:
    agc, inf = AntiGradientControl(), float("inf")
    weights = agc.weights(torch.tensor([NAN, inf, 5.0, 1.0]), torch.arange(4), torch.tensor([True, True, False, True]))
    assert weights.tolist() == [1, 1, 1, 1]
    assert agc.average[:4].tolist() == pytest.approx([0, 0, 0, 0.2])
    assert agc.seen == 3


def test_agc_in_the_loss_uses_mean_square_errors_and_no_further_pass(unet: Any, batch: Batch) -> None:
    scheduler, passes = DDPMScheduler(), []
    batch["latents"][2] = NAN  # of weight 0
    agc = AntiGradientControl(decay=0.0)  # the averages are the last losses
    loss_of = MaskedLoss(scheduler, online=agc, snr_gamma=5.0)
    hook = unet.register_forward_hook(lambda *_: passes.append(1))
    first = loss_under(loss_of, unet, batch)
    assert agc.average[batch["timesteps"][2]] == 0
    times = batch["timesteps"][[0, 1, 3, 4, 5]]
    b = {name: value[[0, 1, 3, 4, 5]] for name, value in batch.items() if name != "empty"}
    x = scheduler.add_noise(b["latents"], b["noise"], times)
    plain = (unet(x, times, b["states"]).sample - b["noise"]).square().mean((1, 2, 3))
    torch.testing.assert_close(agc.average[times], plain.detach())
    agc.average[times[1]] *= 2  # its loss is now half of what is usual
    second = loss_under(loss_of, unet, batch)
    hook.remove()
    assert agc.last is not None
    assert agc.last.tolist() == [1, 0, 1, 1, 1, 1]
    assert len(passes) == 3
    offline = {**batch, "weight": batch["weight"] * agc.last}
    assert torch.equal(second, loss_under(MaskedLoss(scheduler, snr_gamma=5.0), unet, offline))
    assert second < first


def test_a_continued_training_finds_the_same_masks(tmp_path: Path) -> None:
    batches, whole, before, after = losses_at_distinct_timesteps(40), *(AntiGradientControl() for _ in range(3))
    expected = [whole.weights(torch.tensor(losses), torch.tensor(t)) for losses, t in batches]
    for losses, t in batches[:25]:
        before.weights(torch.tensor(losses), torch.tensor(t))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    before.weights(torch.ones(3), torch.arange(3))  # the state is not shared
    found = [after.weights(torch.tensor(losses), torch.tensor(t)) for losses, t in batches[25:]]
    assert torch.equal(torch.stack(found), torch.stack(expected[25:]))
    assert torch.equal(after.average, whole.average)
    assert after.kept_fraction == whole.kept_fraction


def test_no_mask_asks_the_device_for_a_value() -> None:
    # tensors on the meta device have shapes and no values: whoever asks for one gets an error
    shape = (BATCH, 4, LATENT_SIDE, LATENT_SIDE)
    latents, weight, states = (torch.empty(s, device="meta") for s in (shape, (BATCH,), (BATCH, 7, WIDTH)))
    timesteps = torch.empty(BATCH, dtype=torch.int64, device="meta")
    empty = {"encoder_hidden_states": states[:1]}
    unet = _unet().to("meta")
    for mask in (MagnitudeMask({1: 2.0, 900: 3.0}, empty, scale="epsilon"), AntiGradientControl()):
        loss_of = MaskedLoss(DDPMScheduler(), online=mask, denominator="weights")
        for _ in range(2):
            loss_of(unet, latents, latents, timesteps, weight, {"encoder_hidden_states": states}).backward()
        assert mask.kept_fraction.device.type == "meta"


# -- back into a manifest ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("online")
    for name, seeds in (("a", (0, 1, 2, 0)), ("b", (3, 4, 5))):
        members = [m for i, s in enumerate(seeds) for m in sample(f"{i}", encoded(picture(s)), f"caption {name}{i}")]
        write_tar(folder / "in" / name / "00000.tar", members)
    config = Config.parse({"policy": {"image_duplicate": "mask"}, "images": {"encoder": None}})
    return memfilter.run([str(folder / "in")], folder / "out", config, workers=1)


def weights(manifest: Manifest) -> dict[tuple[str, str], float]:
    urls = [f"{manifest.root}/{name}" for name in manifest.shards]
    data = wds.WebDataset(urls, shardshuffle=False).compose(manifest.attach())
    return {(manifest.shard_of(s["__url__"]), s["__key__"]): s["loss_weight"] for s in data}


def test_what_was_masked_often_enough_has_weight_zero(manifest: Manifest, tmp_path: Path) -> None:
    first, second = Sightings(), Sightings()
    a, b = "a/00000.tar", f"{manifest.root}/b/00000.tar"  # by name, or by the URL that a loader gives
    first.add([a, a, b], ["0", "1", "1"], torch.tensor([0.0, 1.0, 0.0]))
    first.add([b, b, a], ["1", "2", "1"], torch.tensor([1.0, 1.0, 0.0]))
    second.add(["b/00000.tar", a], ["1", "2"], torch.tensor([0.0, 1.0]))
    first.save(tmp_path / "first.parquet")
    second.save(tmp_path / "second.parquet")
    before = weights(manifest)
    assert sorted(before.values()) == [0, 1, 1, 1, 1, 1, 1]
    online = manifest.with_online(tmp_path / "first.parquet", tmp_path / "second.parquet")
    # a0 once of once, a1 once of twice, b1 twice of three times
    masked = {("a/00000.tar", "0"), ("a/00000.tar", "1"), ("b/00000.tar", "1")}
    assert weights(online) == {k: 0.0 if k in masked else w for k, w in before.items()}
    assert weights(manifest) == before
    stricter = manifest.with_online(tmp_path / "first.parquet", tmp_path / "second.parquet", share=1)
    assert {k for k, w in weights(stricter).items() if w != before[k]} == {("a/00000.tar", "0")}
    both = stricter.with_online(tmp_path / "second.parquet")
    assert {k for k, w in weights(both).items() if w != before[k]} == masked - {("a/00000.tar", "1")}
    # as a loader's worker gets it
    assert weights(pickle.loads(pickle.dumps(online))) == weights(online)
    assert online.pool_weight("a/00000.tar", "0") == 0
    assert manifest.pool_weight("a/00000.tar", "0") == 1


def test_sightings_of_a_command_need_the_callers_mapping(manifest: Manifest, tmp_path: Path) -> None:
    url, sightings = f"pipe:cat {manifest.root}/a/00000.tar", Sightings()
    sightings.add([url], ["0"], torch.zeros(1))
    sightings.save(tmp_path / "s.parquet")
    with pytest.raises(KeyError, match="pipes="):
        manifest.with_online(tmp_path / "s.parquet")
    with pytest.raises(ConfigError, match="none of the manifest's shards"):
        manifest.with_online(tmp_path / "s.parquet", pipes={url: "nope.tar"})
    online = manifest.with_online(tmp_path / "s.parquet", pipes={url: "a/00000.tar"})
    assert online.weight("a/00000.tar", "0") == 0


def test_sightings_of_another_place_need_the_callers_root(manifest: Manifest, tmp_path: Path) -> None:
    sightings = Sightings()
    sightings.add(["s3://mirror/a/00000.tar"], ["0"], torch.zeros(1))
    sightings.save(tmp_path / "s.parquet")
    with pytest.raises(KeyError, match="at another place"):
        manifest.with_online(tmp_path / "s.parquet")
    online = manifest.with_online(tmp_path / "s.parquet", roots=["s3://mirror"])
    assert (manifest.weight("a/00000.tar", "0"), online.weight("a/00000.tar", "0")) == (1, 0)


def test_sightings_are_added_up_in_any_order_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfilter.training.sightings._PENDING", 50)
    draw, sightings, expected = torch.Generator().manual_seed(0), Sightings(), dict[tuple[str, str], list[int]]()
    for _ in range(40):
        shards = [f"{int(i)}.tar" for i in torch.randint(3, (8,), generator=draw)]
        keys = [f"{int(i)}" for i in torch.randint(20, (8,), generator=draw)]
        masks = torch.randint(2, (8,), generator=draw).float()
        sightings.add(shards, keys, masks)
        for shard, key, weight in zip(shards, keys, masks.tolist(), strict=True):
            counts = expected.setdefault((shard, key), [0, 0])
            counts[0] += 1
            counts[1] += weight == 0
    sightings.save(tmp_path / "new" / "s.parquet")
    rows = pq.read_table(tmp_path / "new" / "s.parquet").to_pylist()
    assert {(r["shard"], r["key"]): [r["seen"], r["masked"]] for r in rows} == expected
    assert [(r["shard"], r["key"]) for r in rows] == sorted(expected)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.parquet"]


def test_records_that_do_not_fit_the_manifest_are_told(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 shards, 2 keys and 2 weights"):
        Sightings().add(["a"], ["0", "1"], torch.ones(2))
    with pytest.raises(InputError, match=r"none\.parquet: not a file that Sightings"):
        manifest.with_online(tmp_path / "none.parquet")
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"other\.parquet: not a file"):
        manifest.with_online(tmp_path / "other.parquet")
    pq.write_table(manifest.table(["shard", "key"]), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: not a file"):
        manifest.with_online(tmp_path / "rows.parquet")
    sightings = Sightings()
    sightings.save(tmp_path / "s.parquet")
    assert weights(manifest.with_online(tmp_path / "s.parquet")) == weights(manifest)
    sightings.add(["a/00000.tar"], ["9"], torch.zeros(1))
    sightings.save(tmp_path / "s.parquet")
    with pytest.raises(KeyError, match=r"a/00000\.tar: the manifest has no sample '9'"):
        manifest.with_online(tmp_path / "s.parquet")
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        manifest.with_online(tmp_path / "s.parquet", share=0)
