"""Mitigations around real small pipelines, against plain calls of the same pipelines and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import write_family, write_pipeline
from scipy.stats import kstest

from memfilter import ConfigError, ModelError
from memfilter.denoisers import find_model, load_denoiser
from memfilter.inference import (
    Mitigated,
    magnitudes,
    with_delayed_guidance,
    with_embedding_noise,
    with_optimised_embeddings,
    with_random_numbers,
    with_random_tokens,
    with_repeated_words,
)
from memfilter.insertions import insert_numbers, insert_tokens, repeat_words, seeded, vocabulary

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

FAMILIES = ("sd", "v", "sdxl", "sd3")
PROMPTS = ["a dog on a cat", "of one dog", "a very red house, 1987"]
SHAPE = (4, 8, 8)  # of images of 16 x 16
STEPS = 3
DRAWN: dict[str, Any] = {"num_inference_steps": STEPS, "height": 16, "width": 16, "output_type": "latent"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": write_pipeline(root / "sd"),
        "v": write_pipeline(root / "v", "v_prediction"),
        "sdxl": write_family(root / "sdxl", "sdxl"),
        "sd3": write_family(root / "sd3", "sd3"),
        "sana": write_family(root / "sana", "sana"),
    }


def load(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    return {family: load(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def sd(pipes: dict[str, Any]) -> Any:
    return pipes["sd"]


def noise(count: int = len(PROMPTS), seed: int = 5) -> torch.Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed))


def call(count: int = len(PROMPTS), **more: Any) -> dict[str, Any]:
    return {"latents": noise(count), **DRAWN, **more}


def images(found: Mitigated) -> torch.Tensor:
    drawn: torch.Tensor = found.output.images
    return drawn


def unet_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


# -- magnitudes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_magnitude_is_that_of_the_denoiser_on_the_calls_own_noise(
    folders: dict[str, Path], pipes: dict[str, Any], family: str
) -> None:
    denoiser = load_denoiser(find_model(str(folders[family])), "float32")
    denoiser.latent_shape = SHAPE
    with torch.no_grad():
        t, x = denoiser.first_timestep(STEPS), noise()
        d = denoiser.predict(x, t, denoiser.encode(PROMPTS)) - denoiser.predict(x, t, denoiser.unconditional(3))
    expected = d.flatten(1).norm(dim=1).numpy()
    found = magnitudes(pipes[family], PROMPTS, generator=torch.Generator().manual_seed(5), **DRAWN)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-5)
    assert magnitudes(pipes[family], PROMPTS, **call()) == pytest.approx(expected, rel=1e-5)
    assert len({round(float(x), 3) for x in expected}) == 3


def test_measuring_draws_nothing_from_the_generators_that_the_images_are_drawn_with(sd: Any) -> None:
    one, several = torch.Generator().manual_seed(1), [torch.Generator().manual_seed(i) for i in range(3)]
    before = one.get_state()
    magnitudes(sd, PROMPTS, generator=one, **DRAWN)
    assert torch.equal(one.get_state(), before)
    for generator in (lambda: torch.Generator().manual_seed(1), lambda: [g.manual_seed(7) for g in several]):
        found = with_repeated_words(sd, PROMPTS, generator=generator(), eta=1.0, **DRAWN)
        expected = sd(found.prompts, generator=generator(), eta=1.0, **DRAWN)
        assert torch.equal(images(found), expected.images)
    torch.manual_seed(2)
    found = with_repeated_words(sd, PROMPTS, **DRAWN)
    torch.manual_seed(2)
    assert torch.equal(images(found), sd(found.prompts, **DRAWN).images)


def test_another_scheduler_is_measured_where_it_starts(folders: dict[str, Path]) -> None:
    pipe = load(folders["sd"])
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    found = magnitudes(pipe, PROMPTS, **call())
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    x = scheduler.scale_model_input(noise() * scheduler.init_noise_sigma, t)
    with torch.no_grad():
        e_c, e_u = (pipe.unet(x, t, e).sample for e in pipe.encode_prompt(PROMPTS, "cpu", 1, True))
    assert found == pytest.approx((e_c - e_u).flatten(1).norm(dim=1).numpy(), rel=1e-5)


def test_the_unconditional_is_the_pipelines_own_also_of_a_negative_prompt(sd: Any) -> None:
    usual, other = (magnitudes(sd, PROMPTS, negative_prompt=text, **call()) for text in ("", PROMPTS[0]))
    assert usual == pytest.approx(magnitudes(sd, PROMPTS, **call()))
    assert other[0] == pytest.approx(0, abs=1e-4)
    assert (other[1:] > 0.1).all()


def test_several_images_of_a_prompt_have_a_magnitude_each(sd: Any) -> None:
    prompts = PROMPTS[:2]
    found = with_optimised_embeddings(sd, prompts, target=[1e-3, 1e3], steps=2, num_images_per_prompt=2, **call(4))
    singly = magnitudes(sd, [text for text in prompts for _ in range(2)], **call(4))
    assert found.before == pytest.approx(singly, rel=1e-5)
    assert found.steps.tolist() == [2, 2, 0, 0]
    assert len(images(found)) == len(found.embeddings) == len(found.after) == 4
    assert not torch.equal(found.embeddings[0], found.embeddings[1])  # each for its own noise
    assert with_random_numbers(sd, prompts, num_images_per_prompt=2, **call(4)).after.shape == (4,)
    noisy = with_embedding_noise(sd, "a dog", num_images_per_prompt=2, **call(2))
    assert not torch.equal(noisy.embeddings[0], noisy.embeddings[1])


# -- less of a key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "count"), [("sd", 4), ("sdxl", 2), ("sd3", 2)])
@pytest.mark.parametrize("mitigation", [with_random_tokens, with_repeated_words, with_random_numbers])
def test_images_are_those_of_the_prompts_with_what_was_put_in(
    pipes: dict[str, Any], family: str, count: int, mitigation: Callable[..., Mitigated]
) -> None:
    pipe = pipes[family]
    tokens = vocabulary(pipe.tokenizer)
    inserted: dict[Any, Callable[[str, np.random.Generator], str]] = {
        with_random_tokens: lambda text, random: insert_tokens(text, tokens, random, count),
        with_repeated_words: lambda text, random: repeat_words(text, random, count),
        with_random_numbers: lambda text, random: insert_numbers(text, random, count),
    }
    found = mitigation(pipe, PROMPTS, count=count, seed=8, **call())
    assert found.prompts == [inserted[mitigation](text, seeded(8, i, text)) for i, text in enumerate(PROMPTS)]
    assert [len(text.split()) for text in found.prompts] == [len(text.split()) + count for text in PROMPTS]
    assert torch.equal(images(found), pipe(found.prompts, **call()).images)
    assert found.before == pytest.approx(magnitudes(pipe, PROMPTS, **call()))
    assert found.after == pytest.approx(magnitudes(pipe, found.prompts, **call()))
    assert found.steps.tolist() == [0, 0, 0]


def test_what_is_put_in_repeats_from_its_seed_alone(sd: Any) -> None:
    one, again = (with_random_tokens(sd, PROMPTS, seed=1, **call()) for _ in range(2))
    assert one.prompts == again.prompts
    assert torch.equal(images(one), images(again))
    assert with_random_tokens(sd, PROMPTS, seed=2, **call()).prompts != one.prompts
    alone = with_random_tokens(sd, PROMPTS[0], seed=1, **call(1))
    assert alone.prompts == one.prompts[:1]
    twice = with_random_tokens(sd, [PROMPTS[0]] * 2, seed=1, **call(2)).prompts
    assert twice[0] != twice[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_on_the_embeddings_is_normal_of_the_scale(pipes: dict[str, Any], family: str) -> None:
    pipe = pipes[family]
    found, plain = (with_embedding_noise(pipe, PROMPTS, scale=scale, seed=3, **call()) for scale in (0.1, 0.0))
    assert torch.equal(images(plain), pipe(PROMPTS, **call()).images)
    added = (found.embeddings - plain.embeddings).numpy() / 0.1
    for one in added:
        assert kstest(one.ravel(), "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(added.reshape(3, -1)) - np.eye(3)).max() < 5 / added[0].size ** 0.5
    again = with_embedding_noise(pipe, PROMPTS, seed=3, **call())
    assert torch.equal(images(found), images(again))
    assert not torch.equal(images(found), images(with_embedding_noise(pipe, PROMPTS, seed=4, **call())))
    assert found.before == pytest.approx(plain.after)
    assert (found.after != found.before).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_embeddings_that_are_returned(pipes: dict[str, Any], family: str) -> None:
    pipe = pipes[family]
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            PROMPTS,
            **{"prompt_2": None, "prompt_3": None}
            if family == "sd3"
            else {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True},
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, encoded, strict=False))
    start = with_embedding_noise(pipe, PROMPTS, scale=0, **call())
    assert torch.equal(start.embeddings, given["prompt_embeds"])
    limit = float(start.before.min() / 2)
    for found in (
        with_embedding_noise(pipe, PROMPTS, **call()),
        with_optimised_embeddings(pipe, PROMPTS, target=limit, steps=2, **call()),
    ):
        expected = pipe(**given | {"prompt_embeds": found.embeddings}, **call())
        assert torch.equal(images(found), expected.images)


# -- under a target ---------------------------------------------------------------------------------------------------


def plain_loop(pipe: Any, prompt: str, x: torch.Tensor, target: float, steps: int = 10) -> tuple[torch.Tensor, int]:
    """The paper's optimisation of one prompt, written out; the start token's row is put back after each update."""
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        e_c, e_u = pipe.encode_prompt([prompt], "cpu", 1, True)
        unconditional = pipe.unet(x, t, e_u).sample
    own = e_c.clone().requires_grad_()
    optimizer = torch.optim.AdamW([own], lr=0.05)
    for step in range(steps):
        norm = (pipe.unet(x, t, own).sample - unconditional).norm()
        if norm < target:
            return own.detach(), step
        (own.grad,) = torch.autograd.grad(norm, own)
        optimizer.step()
        with torch.no_grad():
            own[:, 0] = e_c[:, 0]
    return own.detach(), steps


def assert_alike(a: torch.Tensor, b: torch.Tensor) -> None:
    # where a gradient is all but zero, its sign, and so the step, is that of the rounding
    apart = (a - b).abs()
    assert apart.max() < 0.02
    assert apart.mean() < 1e-5


def test_the_optimisation_is_the_papers_of_each_prompt_alone(sd: Any) -> None:
    pipe = sd
    before = magnitudes(pipe, PROMPTS, **call())
    targets = [float(m * share) for m, share in zip(before, (0.6, 1.01, 0.05), strict=True)]
    found = with_optimised_embeddings(pipe, PROMPTS, target=targets, **call())
    assert 1 < found.steps[0] < 10
    assert found.steps[1:].tolist() == [0, 10]
    for i, text in enumerate(PROMPTS):
        own, steps = plain_loop(pipe, text, noise()[i : i + 1], targets[i])
        assert found.steps[i] == steps
        assert_alike(found.embeddings[i], own[0])
        single = with_optimised_embeddings(pipe, text, target=targets[i], **call(1) | {"latents": noise()[i : i + 1]})
        assert_alike(single.embeddings[0], found.embeddings[i])
        assert single.steps.tolist() == [steps]
    assert found.before == pytest.approx(before)
    assert found.after[0] < targets[0]
    assert found.after[1] == pytest.approx(before[1], rel=1e-5)
    assert targets[2] < found.after[2] < before[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_stop_before_the_update_and_start_tokens_never_move(pipes: dict[str, Any], family: str) -> None:
    pipe = pipes[family]
    start = with_embedding_noise(pipe, PROMPTS, scale=0, **call())
    targets = (start.before * [0.9, 2, 0.01]).tolist()
    found = with_optimised_embeddings(pipe, PROMPTS, target=targets, **call())
    assert torch.equal(found.embeddings[:, 0], start.embeddings[:, 0])
    assert torch.equal(found.embeddings[1], start.embeddings[1])
    assert found.steps[1] == 0
    moved = (found.embeddings != start.embeddings).all(-1)[:, 1:]
    assert moved[[0, 2]].all()
    assert found.after[0] < targets[0]
    # one update less is not enough
    less = with_optimised_embeddings(pipe, PROMPTS, target=targets, steps=int(found.steps[0]) - 1, **call())
    assert less.after[0] >= targets[0] * (1 - 1e-5)


def test_the_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    pipe = load(folders["sd"])
    weights = list(pipe.unet.parameters())
    for i, weight in enumerate(weights):
        weight.requires_grad_(i % 2 == 0)
    before = [weight.detach().clone() for weight in weights]
    pipe.set_progress_bar_config(desc="images", disable=True)
    with_optimised_embeddings(pipe, PROMPTS, target=1e-3, steps=2, **call())
    with_delayed_guidance(pipe, PROMPTS, **call())
    assert [weight.requires_grad for weight in weights] == [i % 2 == 0 for i in range(len(weights))]
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert not pipe.unet._forward_hooks
    assert pipe._progress_bar_config == {"desc": "images", "disable": True}


def test_a_pipeline_in_half_precision_is_optimised_in_full(folders: dict[str, Path]) -> None:
    pipe = load(folders["sd"]).to(torch.bfloat16)
    half = call(latents=noise().bfloat16())
    start = with_embedding_noise(pipe, PROMPTS, scale=0, **half)
    # steps that bfloat16 would lose: it has 8 bits, and a number near 1 does not change by 0.0005
    found = with_optimised_embeddings(pipe, PROMPTS, target=1e-3, learning_rate=5e-4, **half)
    assert found.embeddings.dtype == torch.bfloat16
    moved = (found.embeddings.float() - start.embeddings.float()).abs()[:, 1:]
    big = start.embeddings[:, 1:].float().abs() > 0.6
    assert (moved[big] > 0).float().mean() > 0.5
    usual = with_optimised_embeddings(pipe, PROMPTS, target=1e-3, steps=4, **half)
    assert (usual.after < usual.before).all()
    assert usual.steps.tolist() == [4] * 3


def test_the_optimisation_runs_where_gradients_are_off(sd: Any) -> None:
    expected = with_optimised_embeddings(sd, PROMPTS, target=0.5, steps=3, **call())
    with torch.inference_mode():
        found = with_optimised_embeddings(sd, PROMPTS, target=0.5, steps=3, **call())
    torch.testing.assert_close(found.embeddings, expected.embeddings)


# -- later guidance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_that_never_waits_is_the_plain_call_and_one_that_never_begins_is_none(
    pipes: dict[str, Any], family: str
) -> None:
    pipe = pipes[family]
    at_once = with_delayed_guidance(pipe, PROMPTS, below=float("inf"), **call())
    assert torch.equal(images(at_once), pipe(PROMPTS, **call()).images)
    assert at_once.after == pytest.approx(at_once.before)
    assert at_once.before == pytest.approx(magnitudes(pipe, PROMPTS, **call()))
    never = with_delayed_guidance(pipe, PROMPTS, below=0, **call())
    torch.testing.assert_close(images(never), pipe(PROMPTS, **call(guidance_scale=1.0)).images, rtol=1e-3, atol=1e-4)
    assert never.steps.tolist() == [STEPS] * 3
    assert np.isnan(never.after).all()
    assert not torch.allclose(images(never), images(at_once), atol=1e-2)


def written_out(pipe: Any, prompt: str, x: torch.Tensor, steps: int, below: float | None) -> tuple[torch.Tensor, int]:
    """Delayed guidance of one prompt, step by step: the final latents, and the step at which guidance begins."""
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    norms: list[float] = []
    begun = None
    with torch.no_grad():
        states, empty = pipe.encode_prompt([prompt], "cpu", 1, True)
        for i, t in enumerate(scheduler.timesteps):
            e_c, e_u = pipe.unet(x, t, states).sample, pipe.unet(x, t, empty).sample
            norms.append(float((e_c - e_u).norm()))
            is_past_minimum = any(a < b for a, b in pairwise(norms)) or t < 500
            if begun is None and (is_past_minimum if below is None else t < below):
                begun = i
            x = scheduler.step(e_c if begun is None else e_u + 7.5 * (e_c - e_u), t, x).prev_sample
    return x, steps if begun is None else begun


@pytest.mark.parametrize("below", [None, 650])
def test_guidance_begins_for_each_image_after_its_own_minimum(pipes: dict[str, Any], below: float | None) -> None:
    starts = set()
    for family in ("sd", "v"):
        found = with_delayed_guidance(pipes[family], PROMPTS, below=below, **call(num_inference_steps=8))
        for i, text in enumerate(PROMPTS):
            expected, begun = written_out(pipes[family], text, noise()[i : i + 1], 8, below)
            assert found.steps[i] == begun
            torch.testing.assert_close(images(found)[i], expected[0], rtol=1e-3, atol=1e-4)
            starts.add(begun)
    assert (len(starts) > 1) == (below is None)


def test_a_delay_adds_no_pass(sd: Any) -> None:
    passes = []
    hook = sd.unet.register_forward_hook(lambda *_: passes.append(1))
    try:
        with_delayed_guidance(sd, PROMPTS, **call())
    finally:
        hook.remove()
    assert len(passes) == STEPS


def test_what_is_given_as_none_is_not_given(pipes: dict[str, Any]) -> None:
    nothing = {"guidance_scale": None, "negative_prompt": None}
    found = magnitudes(pipes["sd"], PROMPTS, **{**call(), **nothing})
    assert found.tolist() == magnitudes(pipes["sd"], PROMPTS, **call()).tolist()
    assert not pipes["sd"].interrupt


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_what_cannot_be_mitigated_is_refused_in_one_line(pipes: dict[str, Any]) -> None:
    sd = pipes["sd"]
    optimised = with_optimised_embeddings
    refused: list[tuple[Callable[..., Any], Any, Any, dict[str, Any], str]] = [
        (with_random_tokens, pipes["sana"], PROMPTS, {}, "a SanaPipeline cannot be mitigated while it samples"),
        (magnitudes, pipes["sana"], PROMPTS, {}, "a SanaPipeline cannot be mitigated"),
        (with_delayed_guidance, sd, PROMPTS, call(guidance_scale=1), r"3 predictions for 3 images.*\(it is 1\)"),
        (with_random_numbers, sd, PROMPTS, call(guidance_scale=0.5), "give a guidance_scale over 1"),
        (with_random_numbers, sd, PROMPTS, {"count": 0}, "0 insertions in a prompt"),
        (with_embedding_noise, sd, PROMPTS, {"scale": float("nan")}, "noise of scale nan"),
        (with_embedding_noise, sd, PROMPTS, {"scale": float("inf")}, "noise of scale inf"),
        (optimised, sd, PROMPTS, {"target": 1, "learning_rate": -1}, "learning_rate=-1, steps=10: above 0"),
        (optimised, sd, PROMPTS, {"target": 1, "steps": -1}, "learning_rate=0.05, steps=-1: above 0"),
        (with_embedding_noise, sd, [], {}, "0 prompts of which not each is a text"),
        (with_embedding_noise, sd, ["a", None], {}, "2 prompts of which not each is a text"),
        (with_repeated_words, pipes["sdxl"], "a", {"prompt_2": "b"}, "prompt_2 beside the prompts is not mitigated"),
        *((optimised, sd, PROMPTS, {"target": t}, "the target .* for 3 prompts") for t in (0, -1.0, [1, 2], [1, 2, 0])),
        (optimised, sd, PROMPTS, {"target": float("nan")}, "the target nan for 3 prompts"),
    ]
    for function, pipe, prompts, more, message in refused:
        with pytest.raises(ConfigError, match=message) as error:
            function(pipe, prompts, **more)
        assert "\n" not in str(error.value)
    assert not sd.unet._forward_hooks


def test_predictions_that_are_not_finite_are_refused_with_the_prompt(folders: dict[str, Path]) -> None:
    pipe = load(folders["sd"])
    latents = noise()
    latents[1] = torch.nan
    for mitigation in (with_delayed_guidance, with_random_tokens, with_embedding_noise):
        with pytest.raises(ModelError, match="the prediction for 'of one dog' is not finite in float32; its weights"):
            mitigation(pipe, PROMPTS, **call(latents=latents))
    with pytest.raises(ModelError, match="'of one dog' is not finite"):
        with_optimised_embeddings(pipe, PROMPTS, target=1, **call(latents=latents))
