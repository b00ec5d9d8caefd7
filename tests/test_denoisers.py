"""Every family's magnitudes against its pipeline's own encoding and denoiser, called plainly, a caption at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import FAMILIES, LATENT_SIDE, write_family

from memfilter import ModelError
from memfilter.denoisers import find_model, load_denoiser
from memfilter.magnitude import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a dog on a mat", "Ein Hund, 漢字", "the van gogh cafe terrace " * 30]
SHAPE = (4, LATENT_SIDE, LATENT_SIDE)
Prediction = torch.Tensor


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: write_family(root / family, family) for family in FAMILIES}


def scorer(folder: Path, seeds: int = 1, batch_size: int = 4) -> Scorer:
    denoiser = load_denoiser(find_model(str(folder)), "float32")
    denoiser.latent_shape = SHAPE  # where the transformer takes any size, as small as the others
    return Scorer(denoiser, seeds, batch_size)


# -- the plain way: (pipeline, caption, x, t) -> the conditional and the unconditional prediction ------------------------


def sdxl(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    text, none, pooled, none_pooled = pipe.encode_prompt([caption], device="cpu")
    size = (LATENT_SIDE * pipe.vae_scale_factor,) * 2
    ids = pipe._get_add_time_ids(size, (0, 0), size, x.dtype, pipe.text_encoder_2.config.projection_dim)

    def predict(states: torch.Tensor, pooled: torch.Tensor) -> Prediction:
        added = {"text_embeds": pooled, "time_ids": ids}
        return pipe.unet(x, int(t), encoder_hidden_states=states, added_cond_kwargs=added).sample

    return predict(text, pooled), predict(none, none_pooled)


def sd3(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    text, none, pooled, none_pooled = pipe.encode_prompt([caption], None, None, device="cpu")

    def predict(states: torch.Tensor, pooled: torch.Tensor) -> Prediction:
        return pipe.transformer(x, states, pooled, torch.tensor([float(t)])).sample

    return predict(text, pooled), predict(none, none_pooled)


def flux(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    packets = pipe._pack_latents(x, 1, *SHAPE)
    places = pipe._prepare_latent_image_ids(1, LATENT_SIDE // 2, LATENT_SIDE // 2, "cpu", x.dtype)
    guidance = torch.tensor([3.5]) if pipe.transformer.config.guidance_embeds else None

    def predict(text: str) -> Prediction:
        states, pooled, ids = pipe.encode_prompt([text], device="cpu")
        out = pipe.transformer(
            packets, states, pooled, torch.tensor([t / 1000]), img_ids=places, txt_ids=ids, guidance=guidance
        ).sample
        pixels = LATENT_SIDE * pipe.vae_scale_factor
        return pipe._unpack_latents(out, pixels, pixels, pipe.vae_scale_factor)

    return predict(caption), predict("")


def pixart(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    text, mask, none, none_mask = pipe.encode_prompt([caption], device="cpu")
    side = float(LATENT_SIDE * pipe.vae_scale_factor)
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.use_additional_conditions:
        sizes = {"resolution": torch.tensor([[side, side]]), "aspect_ratio": torch.tensor([[1.0]])}

    def predict(states: torch.Tensor, mask: torch.Tensor) -> Prediction:
        out = pipe.transformer(x, states, torch.tensor([int(t)]), sizes, encoder_attention_mask=mask).sample
        return out.chunk(2, dim=1)[0]

    return predict(text, mask), predict(none, none_mask)


def sana(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    import inspect

    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    text, mask, none, none_mask = pipe.encode_prompt([caption], device="cpu", complex_human_instruction=instruction)
    time = torch.tensor([t]) * pipe.transformer.config.timestep_scale

    def predict(states: torch.Tensor, mask: torch.Tensor) -> Prediction:
        return pipe.transformer(x, states, time, encoder_attention_mask=mask).sample

    return predict(text, mask), predict(none, none_mask)


def lumina2(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    text, mask, none, none_mask = pipe.encode_prompt([caption], device="cpu")

    def predict(states: torch.Tensor, mask: torch.Tensor) -> Prediction:
        return -pipe.transformer(x, torch.tensor([1 - t / 1000]), states, mask).sample

    return predict(text, mask), predict(none, none_mask)


def z_image(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    text, none = pipe.encode_prompt([caption], device="cpu")

    def predict(states: list[torch.Tensor]) -> Prediction:
        out = pipe.transformer([x[0].unsqueeze(1)], torch.tensor([(1000 - t) / 1000]), states, return_dict=False)[0]
        return -out[0].squeeze(1)[None]

    return predict(text), predict(none)


def qwen_image(pipe: Any, caption: str, x: torch.Tensor, t: float) -> tuple[Prediction, Prediction]:
    def predict(text: str) -> Prediction:
        states, mask = pipe.encode_prompt([text], device="cpu", max_sequence_length=512)
        out = pipe.transformer(
            pipe._pack_latents(x, 1, *SHAPE),
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            timestep=torch.tensor([t / 1000]),
            img_shapes=[[(1, LATENT_SIDE // 2, LATENT_SIDE // 2)]],
        ).sample
        pixels = LATENT_SIDE * pipe.vae_scale_factor
        return pipe._unpack_latents(out, pixels, pixels, pipe.vae_scale_factor)[:, :, 0]

    return predict(caption), predict("")


PLAIN: dict[str, Callable[..., tuple[Prediction, Prediction]]] = {
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "lumina2": lumina2,
    "z_image": z_image,
    "qwen_image": qwen_image,
}
FIRST = {"sdxl": 981, "pixart": 999, "sana": 999}  # of a flow 1000, but for the solver that Sana comes with


@torch.inference_mode()
def check(folder: Path, family: str) -> Scorer:
    """Hold the scores of a pipeline to its own predictions."""
    ours = scorer(folder, seeds=2)
    timestep = ours.scoring.timestep
    assert timestep == FIRST.get(family, 1000)
    scores = ours.score(CAPTIONS)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    for caption, row in zip(CAPTIONS, scores, strict=True):
        for seed, score in enumerate(row):
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]
            e_c, e_u = PLAIN[family](pipe, caption, x, timestep)
            assert e_c.shape == x.shape
            assert abs(score - float((e_c - e_u).norm())) < 1e-5 * float(e_c.norm())
    assert (scores > 1e-3 * float(e_c.norm())).all()  # the text does something
    assert len({f"{score:.4f}" for score in scores[:, 0]}) == len(CAPTIONS)
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_that_of_the_pipelines_own_predictions(folders: dict[str, Path], family: str) -> None:
    check(folders[family], family)
