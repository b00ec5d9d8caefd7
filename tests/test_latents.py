"""Images as latents, noised latents and steps, against plain calls of the autoencoders, schedulers and pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import FAMILIES, LATENT_SIDE, write_family, write_pipeline

from memfilter import ModelError
from memfilter.attribution import attribute
from memfilter.demo.memorized import MODEL
from memfilter.denoisers import Denoiser, find_model, load_denoiser

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

FLOWS = ("sd3", "flux", "sana", "lumina2", "z_image", "qwen_image")
SHAPE = (4, LATENT_SIDE, LATENT_SIDE)
SIDE = 2 * LATENT_SIDE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    others = {family: write_family(root / family, family) for family in FAMILIES}
    return {"sd": write_pipeline(root / "sd"), **others}


def warm(folder: Path, dtype: str = "float32", shape: tuple[int, int, int] = SHAPE) -> Denoiser:
    denoiser = load_denoiser(find_model(str(folder)), dtype)
    denoiser.latent_shape = shape
    return denoiser


def images(count: int = 2, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- images to latents ------------------------------------------------------------------------------------------------


@torch.no_grad()
def plainly(folder: Path, family: str, pixels: torch.Tensor) -> torch.Tensor:
    """The latents as each family's image-to-image pipeline has them, but for the draw from the posterior."""
    kind = {"sana": "AutoencoderDC", "qwen_image": "AutoencoderKLQwenImage"}.get(family, "AutoencoderKL")
    vae = getattr(diffusers, kind).from_pretrained(folder / "vae")
    if family == "sana":
        return vae.encode(pixels).latent * 0.41407
    if family == "qwen_image":
        mean, std = torch.tensor([0.1, -0.2, 0.3, -0.4]), torch.tensor([1.1, 2.2, 1.3, 0.4])
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        return (latents - mean[:, None, None]) / std[:, None, None]
    latents = vae.encode(pixels).latent_dist.mode()
    if family in FLOWS:
        return (latents - 0.1159) * 0.3611
    return latents * (0.13025 if family == "sdxl" else 0.18215)


@pytest.mark.parametrize("family", ["sd", *FAMILIES])
def test_latents_are_the_autoencoders_mean_in_the_familys_normalisation(folders: dict[str, Path], family: str) -> None:
    denoiser = warm(folders[family], shape=(4, LATENT_SIDE, LATENT_SIDE // 2))
    assert denoiser.image_size == (SIDE, SIDE // 2)
    pixels = images(width=SIDE // 2)
    latents = denoiser.encode_images(pixels)
    assert (latents.shape, latents.dtype) == ((2, *denoiser.latent_shape), torch.float32)
    torch.testing.assert_close(latents, plainly(folders[family], family, pixels), rtol=1e-5, atol=1e-6)
    assert torch.equal(denoiser.encode_images(pixels), latents)
    assert latents.std() > 1e-3  # the images do something


def test_means_and_deviations_of_channels_are_taken_off_as_sdxl_takes_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    mean, std = [0.5, -0.5, 1.0, 0.0], [2.0, 4.0, 1.0, 0.5]
    change(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    before = plainly(folder, "sdxl", images())
    expected = (before - 0.13025 * torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(warm(folder).encode_images(images()), expected, rtol=1e-4, atol=1e-6)


def test_an_autoencoder_that_overflows_in_half_precision_runs_in_float32(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    exact = warm(folders["sdxl"]).encode_images(images())
    assert torch.equal(warm(folders["sdxl"], "float16").encode_images(images()), exact)
    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    change(folder / "vae" / "config.json", force_upcast=False)
    half = warm(folder, "float16").encode_images(images())
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.02, atol=1e-3)


def test_the_pixels_are_the_latents_of_a_pipeline_without_an_autoencoder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    demo = load_denoiser(find_model(str(MODEL), images=True), "float32")
    pixels = images(height=16, width=16)
    assert demo.image_size == (16, 16)
    assert torch.equal(demo.encode_images(pixels), pixels)
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "model"))
    change(folder / "model_index.json", vae=[None, None])
    with pytest.raises(ModelError, match=r"no autoencoder \(vae\), and its denoiser takes 4 channels, not the 3 of"):
        warm(folder).encode_images(images())


def test_latents_of_another_shape_are_refused_with_both(folders: dict[str, Path]) -> None:
    denoiser = warm(folders["sd"])
    with pytest.raises(ModelError) as size:
        denoiser.encode_images(images(width=SIDE + 8))
    assert str(size.value) == (
        "images of (3, 32, 40) become latents of (4, 16, 20), and the denoiser takes (4, 16, 16); "
        "it takes images of (3, 32, 32)"
    )
    denoiser.latent_shape = (5, 16, 16)
    with pytest.raises(ModelError, match=r"latents of \(4, 16, 16\), and the denoiser takes \(5, 16, 16\)"):
        denoiser.encode_images(images())


def test_the_autoencoder_counts_and_must_be_there_only_where_images_are_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "model"))
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert weights not in find_model(str(folder)).files
    with_images = find_model(str(folder), images=True).files
    assert {*with_images} - {*find_model(str(folder)).files} == {weights, "vae/config.json"}
    (folder / weights).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="vae holds no safetensors file"):
        find_model(str(folder), images=True)
    with pytest.raises(ModelError, match="the autoencoder cannot be loaded"):
        warm(folder).encode_images(images())
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match="has no vae folder: not a whole StableDiffusionPipeline"):
        find_model(str(folder), images=True)
    warm(folder)


# -- noise and steps --------------------------------------------------------------------------------------------------


def test_noise_is_added_as_the_scheduler_adds_it(folders: dict[str, Path]) -> None:
    x, noise = torch.randn((2, 2, *SHAPE), generator=torch.Generator().manual_seed(0))
    expected = diffusers.DDPMScheduler.from_pretrained(folders["sd"], subfolder="scheduler")
    noisy = expected.add_noise(x, noise, torch.tensor([301, 301]))
    torch.testing.assert_close(warm(folders["sd"]).add_noise(x, noise, 301), noisy)
    flow = warm(folders["sd3"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folders["sd3"], subfolder="scheduler")
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    torch.testing.assert_close(flow.add_noise(x, noise, float(t)), scheduler.scale_noise(x, t[None], noise))


@pytest.mark.parametrize(
    ("family", "is_dynamic"),
    # Sana's pipeline cannot shift by size
    [*((family, False) for family in FLOWS), *((family, True) for family in FLOWS if family != "sana")],
)
def test_a_flows_timesteps_are_those_of_its_own_pipeline(
    folders: dict[str, Path], tmp_path: Path, family: str, is_dynamic: bool
) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    change(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=is_dynamic)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    height, width = (side * pipe.vae_scale_factor for side in (LATENT_SIDE, 2 * LATENT_SIDE))
    more = {"use_resolution_binning": False} if family == "sana" else {}
    pipe("a dog", height=height, width=width, num_inference_steps=4, output_type="latent", **more)
    denoiser = warm(folder, shape=(4, LATENT_SIDE, 2 * LATENT_SIDE))
    assert denoiser.timesteps(4) == pytest.approx(pipe.scheduler.timesteps.tolist(), rel=1e-6)
    assert denoiser.first_timestep(4) == round(float(pipe.scheduler.timesteps[0]))


@pytest.mark.parametrize(("family", "guidance"), [("flux", None), ("sd3", 4.0)])
@torch.no_grad()
def test_a_flows_steps_lead_where_its_pipeline_leads(
    folders: dict[str, Path], family: str, guidance: float | None
) -> None:
    x = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    scale = {} if guidance is None else {"guidance_scale": guidance}
    given = pipe._pack_latents(x, 1, *SHAPE) if family == "flux" else x
    drawn = pipe("a dog", height=SIDE, width=SIDE, num_inference_steps=4, latents=given, output_type="latent", **scale)
    expected = drawn.images
    if family == "flux":
        expected = pipe._unpack_latents(expected, SIDE, SIDE, pipe.vae_scale_factor)
    denoiser = warm(folders[family])
    text, nothing = denoiser.encode(["a dog"]), denoiser.unconditional(1)
    for t in denoiser.timesteps(4):
        v = denoiser.predict(x, t, text)
        if guidance is not None:
            v_u = denoiser.predict(x, t, nothing)
            v = v_u + guidance * (v - v_u)
        x = denoiser.step(v, t, x)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)


def test_a_flow_is_explained_along_its_own_trajectory(folders: dict[str, Path]) -> None:
    denoiser = warm(folders["flux"], "float64", (4, 8, 8))
    one, two = attribute(denoiser, "a dog", steps=1), attribute(denoiser, "a dog", steps=2)
    first, second = two.timesteps
    assert first == one.timesteps[0] == 1000
    assert 900 < second < 1000
    x = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0)).double()[None]
    with torch.no_grad():
        text, nothing = denoiser.encode(["a dog"]), denoiser.unconditional(1)
        e_c, e_u = (denoiser.predict(x, first, condition) for condition in (text, nothing))
        x = x - (first - second) / 1000 * (e_u + 7.5 * (e_c - e_u))
        after = denoiser.predict(x, second, text) - denoiser.predict(x, second, nothing)
    assert two.magnitude == pytest.approx((one.magnitude + float(after.norm())) / 2, rel=1e-5)
    assert [word for word, _ in two.words] == ["a", "dog"]
