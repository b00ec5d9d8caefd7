"""Each further signal against a plain implementation of its formula, a caption at a time, and in every family."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import FAMILIES, LATENT_SIDE, write_family, write_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from memfilter import ModelError
from memfilter.denoisers import Condition, find_model, load_denoiser
from memfilter.magnitude import eps_factor
from memfilter.signals import (
    anisotropy,
    anisotropy_weights,
    attention_entropy,
    entropy_layer,
    late_timestep,
    sharpness,
)

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

TWO = ["a dog on a mat", "Ein Hund, 漢字"]
CAPTIONS = [*TWO, "the van gogh cafe terrace " * 30]
SHAPE = (4, LATENT_SIDE, LATENT_SIDE)
TYPES = ("epsilon", "v_prediction", "sample")
LAYERS: dict[str, Callable[[Any], Any]] = {
    "epsilon": lambda d: d._unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2,
    "sdxl": lambda d: d._unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2,
    "pixart": lambda d: d._transformer.transformer_blocks[0].attn2,
    "sana": lambda d: d._transformer.transformer_blocks[0].attn2,
}
JOINT = [family for family in FAMILIES if family not in LAYERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small pipeline of each family, and of Stable Diffusion one of each prediction type."""
    root = tmp_path_factory.mktemp("signals")
    stable = {kind: write_pipeline(root / kind, kind) for kind in TYPES}
    return stable | {family: write_family(root / family, family) for family in FAMILIES}


def load(folder: Path, dtype: str = "float32") -> Any:
    denoiser = load_denoiser(find_model(str(folder)), dtype)
    denoiser.latent_shape = SHAPE  # where the transformer takes any size, as small as the others
    return denoiser


def noise(denoiser: Any, count: int) -> torch.Tensor:
    one = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return one.to(denoiser.dtype).expand(count, *one.shape)


def conditions(denoiser: Any, captions: list[str] = CAPTIONS) -> tuple[Condition, Condition]:
    with torch.no_grad():
        return denoiser.encode(captions), denoiser.unconditional(len(captions))


# -- attention entropy ------------------------------------------------------------------------------------------------


def plain_entropy(layer: Any, states: torch.Tensor, text: torch.Tensor, kept: np.ndarray) -> float:
    """Return the entropy of one caption's attention, a head at a time, over the positions that are not masked."""
    query, key = (part[0].double().unflatten(-1, (layer.heads, -1)) for part in (layer.to_q(states), layer.to_k(text)))
    heads = []
    for h in range(layer.heads):
        logits = (query[:, h] @ key[:, h].T).numpy() / math.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True)) * kept
        heads.append((weights / weights.sum(axis=1, keepdims=True)).mean(axis=0))
    p = np.mean(heads, axis=0)[kept]
    assert p.sum() == pytest.approx(1)
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("family", LAYERS)
def test_the_entropy_is_that_of_the_layers_own_queries_and_keys(folders: dict[str, Path], family: str) -> None:
    denoiser = load(folders[family])
    layer, x, t = LAYERS[family](denoiser), noise(denoiser, len(CAPTIONS)), denoiser.first_timestep(50)
    condition, _ = conditions(denoiser)
    with torch.inference_mode():
        before = denoiser.predict(x, t, condition)
        with attention_entropy(denoiser) as read:
            within = denoiser.predict(x, t, condition)
        after = denoiser.predict(x, t, condition)
    assert torch.equal(before, within)
    assert torch.equal(before, after)
    assert read().dtype == torch.float32

    fed: list[dict[str, torch.Tensor]] = []
    hook = layer.register_forward_hook(
        lambda module, args, kwargs, out: fed.append({"hidden_states": args[0], **kwargs} if args else kwargs),
        with_kwargs=True,
    )
    with torch.no_grad():
        for i, caption in enumerate(CAPTIONS):
            one = denoiser.encode([caption])
            denoiser.predict(x[:1], t, one)
            length = one.states.shape[1]
            kept = np.ones(length, bool) if one.mask is None else one.mask[0].bool().numpy()
            expected = plain_entropy(layer, fed[-1]["hidden_states"], fed[-1]["encoder_hidden_states"], kept)
            assert float(read()[i]) == pytest.approx(expected, rel=1e-5)
            assert 0 < expected <= math.log(kept.sum())
    hook.remove()


@pytest.mark.parametrize("family", JOINT)
def test_there_is_no_entropy_where_text_and_image_attend_jointly(folders: dict[str, Path], family: str) -> None:
    denoiser = load(folders[family])
    with (
        pytest.raises(ModelError, match=rf"^attention entropy is not defined for {type(denoiser).__name__}: .*$"),
        attention_entropy(denoiser),
    ):
        pass


def test_a_second_attention_of_the_image_to_itself_is_no_cross_attention() -> None:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    assert any(name.endswith("attn2") for name, _ in transformer.named_modules())
    with pytest.raises(ModelError):
        entropy_layer(SimpleNamespace(_transformer=transformer))


def test_the_layer_is_the_fourth_of_stable_diffusions_sixteen() -> None:
    unet = diffusers.UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=2)
    order: list[str] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(lambda module, args, out, name=name: order.append(name))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, 1280))
    name, layer = entropy_layer(SimpleNamespace(_unet=unet))
    assert len(order) == 16
    assert name == order[3] == "down_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert layer is unet.get_submodule(name)


def test_the_denoiser_is_as_it_was_after_an_error(folders: dict[str, Path]) -> None:
    denoiser = load(folders["epsilon"])
    condition, _ = conditions(denoiser)
    x = noise(denoiser, len(CAPTIONS))
    modules = list(denoiser._unet.modules())
    before = [dict(vars(module)) for module in modules]
    with pytest.raises(RuntimeError), torch.no_grad(), attention_entropy(denoiser) as read:
        denoiser.predict(x, 981, Condition(condition.states[..., :-1]))
    for module, attributes in zip(modules, before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with pytest.raises(ModelError, match="no cross-attention was seen"):
        read()


def test_the_entropies_are_those_of_the_last_pass(folders: dict[str, Path]) -> None:
    denoiser = load(folders["epsilon"])
    condition, _ = conditions(denoiser)
    x = noise(denoiser, len(CAPTIONS))
    found = []
    with torch.inference_mode(), attention_entropy(denoiser) as read:
        for latents in (x, -x, x):
            denoiser.predict(latents, 981, condition)
            found.append(read())
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


# -- anisotropy -------------------------------------------------------------------------------------------------------


def test_the_anisotropy_is_the_norm_and_the_mean_cosine() -> None:
    draw = torch.Generator().manual_seed(0)
    first, unconditional, difference = (torch.randn(3, *SHAPE, generator=draw) for _ in range(3))
    difference[1] = 0
    found = anisotropy(first.flatten(1).norm(dim=1), unconditional[:1], difference, (1.5, 2.5))
    for i in range(3):
        u, d = unconditional[0].double().numpy(), difference[i].double().numpy()
        cosines = [
            0.0 if i == 1 else u[:, h, w] @ d[:, h, w] / np.linalg.norm(u[:, h, w]) / np.linalg.norm(d[:, h, w])
            for h in range(LATENT_SIDE)
            for w in range(LATENT_SIDE)
        ]
        expected = 1.5 * np.linalg.norm(first[i].double().numpy()) + 2.5 * np.mean(cosines)
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
    assert found.dtype == torch.float32


def test_the_late_timestep_is_41_of_stable_diffusion_and_as_noisy_elsewhere(folders: dict[str, Path]) -> None:
    stable = load(folders["v_prediction"])
    assert late_timestep(stable) == stable.timesteps(50)[-3] == 41
    assert late_timestep(load(folders["sdxl"])) == 41
    assert late_timestep(load(folders["pixart"])) == 58
    for flow in ("sd3", "sana"):
        t = late_timestep(load(folders[flow]))
        sigma = t / 1000
        noise_to_image = math.sqrt((1 - stable.alpha_bar(41)) / stable.alpha_bar(41))
        assert sigma / (1 - sigma) == pytest.approx(noise_to_image, abs=0.001)


def test_the_weights_are_the_papers_on_the_scale_of_noise() -> None:
    first = 0.0058  # alpha bar at Stable Diffusion's first timestep
    small, large = (4, 64, 64), (4, 96, 96)
    v = eps_factor("v_prediction", first)
    assert anisotropy_weights("epsilon", 1.0, small) == (1, 2)
    assert anisotropy_weights("epsilon", 1.0, (4, 128, 128)) == (0.5, 2)
    assert anisotropy_weights("v_prediction", v, large) == (v, 0.1)
    assert anisotropy_weights("flow", eps_factor("flow", 0.0), large) == (pytest.approx(v, abs=5e-4), 0.1)


# -- sharpness --------------------------------------------------------------------------------------------------------


def scores(denoiser: Any, t: int, condition: Condition) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return x -> the score at x, of the noise that the raw prediction stands for."""
    a2 = denoiser.alpha_bar(t)
    a, s = math.sqrt(a2), 1 - math.sqrt(a2) if denoiser.prediction_type == "flow" else math.sqrt(1 - a2)

    def score(x: torch.Tensor) -> torch.Tensor:
        raw = denoiser.predict(x, t, condition)
        image = {
            "epsilon": lambda: (x - s * raw) / a,
            "v_prediction": lambda: a * x - s * raw,
            "sample": lambda: raw,
            "flow": lambda: x - s * raw,
        }[denoiser.prediction_type]()
        return -(x - a * image) / s / s

    return score


def double_backward(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return J v by differentiating w -> J^T w."""
    y = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        out = f(y)
        w = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, y, w, create_graph=True)
        return torch.autograd.grad(back, w, v)[0]


def central_difference(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = 1e-3 / v.norm() * x.norm()
    with torch.no_grad():
        return (f(x + h * v) - f(x - h * v)) / (2 * h)


def found_and_expected(
    denoiser: Any, t: int, product: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    conditional, nothing = conditions(denoiser, TWO)
    x = noise(denoiser, len(TWO))
    s_c, s_u = scores(denoiser, t, conditional), scores(denoiser, t, nothing)
    with torch.no_grad():
        d = denoiser.predict(x, t, conditional) - denoiser.predict(x, t, nothing)
        v = s_c(x) - s_u(x)
    expected = (product(s_c, x, v) - product(s_u, x, v)).flatten(1).norm(dim=1)
    return sharpness(denoiser, x, t, conditional, nothing, d), expected


@pytest.mark.parametrize(("kind", "t"), [("epsilon", 981), ("v_prediction", 981), ("sample", 41)])
def test_the_sharpness_is_of_the_scores(folders: dict[str, Path], kind: str, t: int) -> None:
    denoiser = load(folders[kind], "float64")
    found, expected = found_and_expected(denoiser, t, central_difference)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    found, expected = found_and_expected(denoiser, t, double_backward)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_differentiated_forward(folders: dict[str, Path], family: str) -> None:
    # by double backward alone: parts that stay in float32 leave a finite difference few digits
    found, expected = found_and_expected(load(folders[family], "float64"), 500, double_backward)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_sharpness_takes_what_the_scorer_has(folders: dict[str, Path]) -> None:
    denoiser = load(folders["epsilon"])
    x = noise(denoiser, len(TWO))
    with torch.inference_mode():
        conditional, nothing = denoiser.encode(TWO), denoiser.unconditional(4)
        d = denoiser.predict(x, 981, conditional) - denoiser.predict(x, 981, nothing[:2])
        found = sharpness(denoiser, x, 981, conditional, nothing, d)
        assert not sharpness(denoiser, x, 981, conditional, nothing, torch.zeros_like(d)).any()
    _, expected = found_and_expected(denoiser, 981, double_backward)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("family", "t"), [("sd3", 1000), ("sana", 0), ("zero", 999), ("sd3", 9)])
def test_a_timestep_that_gives_no_score_is_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, t: int
) -> None:
    if family == "zero":
        schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        folders = {family: write_pipeline(tmp_path / "zero", "v_prediction", **schedule)}
    denoiser = load(folders[family])
    conditional, nothing = conditions(denoiser)
    x = noise(denoiser, len(CAPTIONS))
    with pytest.raises(
        ModelError, match=rf"^sharpness is not defined at timestep {t} of a .* take a timestep between$"
    ):
        sharpness(denoiser, x, t, conditional, nothing, x)


def test_a_denoiser_without_forward_differentiation_is_refused(folders: dict[str, Path]) -> None:
    denoiser = load(folders["epsilon"])
    conditional, nothing = conditions(denoiser)
    plain, x = denoiser.predict, noise(denoiser, len(CAPTIONS))

    def fast(*args: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return plain(*args)

    denoiser.predict = fast
    with pytest.raises(ModelError, match=r"^sharpness: StableDiffusion cannot be differentiated forward: [^\n]*$"):
        sharpness(denoiser, x, 981, conditional, nothing, x)


# -- all of them ------------------------------------------------------------------------------------------------------


def all_of_them(denoiser: Any, captions: list[str], t: int, late: int) -> dict[str, np.ndarray]:
    x = noise(denoiser, len(captions))
    with torch.inference_mode():
        conditional, nothing = conditions(denoiser, captions)
        with attention_entropy(denoiser) as read:
            e_c = denoiser.predict(x, t, conditional)
        d = e_c - denoiser.predict(x, t, nothing)
        e_u = denoiser.predict(x, late, nothing)
        d_late = denoiser.predict(x, late, conditional) - e_u
        return {
            "entropy": read().numpy(),
            "anisotropy": anisotropy(d.flatten(1).norm(dim=1), e_u, d_late, (1, 2)).numpy(),
            "sharpness": sharpness(denoiser, x, t, conditional, nothing, d).numpy(),
        }


@pytest.mark.parametrize("family", ["v_prediction", "pixart"])
def test_its_batch_changes_a_captions_signals_by_rounding_alone(folders: dict[str, Path], family: str) -> None:
    denoiser = load(folders[family])
    captions = [f"a dog on mat {i}" + ", and so on" * i for i in range(10)]
    together = all_of_them(denoiser, captions, denoiser.first_timestep(50), late_timestep(denoiser))
    for i in (0, 9):
        alone = all_of_them(denoiser, [captions[i]], denoiser.first_timestep(50), late_timestep(denoiser))
        for name, values in together.items():
            np.testing.assert_allclose(alone[name], values[i : i + 1], rtol=1e-5, err_msg=name)
