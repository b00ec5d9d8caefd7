"""Every family's magnitudes against its pipeline's own encoding and denoiser, called plainly, a caption at a time."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pytest
import torch
from pipelines import FAMILIES, LATENT_SIDE, rounding, write_family

from memfilter import Config, ModelError
from memfilter.denoisers import Condition, find_model, load_denoiser
from memfilter.magnitude import Scorer
from memfilter.scores import score_captions
from memfilter.store import Store

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

CAPTIONS = ["a dog on a mat", "Ein Hund, 漢字", "the van gogh cafe terrace " * 30]
SHAPE = (4, LATENT_SIDE, LATENT_SIDE)
Prediction = torch.Tensor


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: write_family(root / family, family) for family in FAMILIES}


def scorer(folder: Path, seeds: int = 1, batch_size: int = 4, dtype: str = "float32") -> Scorer:
    denoiser = load_denoiser(find_model(str(folder)), dtype)
    denoiser.latent_shape = SHAPE  # where the transformer takes any size, as small as the others
    return Scorer(denoiser, seeds, batch_size)


# -- the plain way: (pipeline, caption, x, t) -> the conditional and the unconditional prediction ----------------------


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
    (timestep,) = ours.scoring.timesteps
    assert timestep == FIRST.get(family, 1000)
    scores = ours.score(CAPTIONS)[:, :, 0]
    named = json.loads((folder / "model_index.json").read_text())
    nulls = {part: None for part, kind in named.items() if kind == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **nulls)
    for caption, row in zip(CAPTIONS, scores, strict=True):
        for seed, score in enumerate(row):
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]
            e_c, e_u = PLAIN[family](pipe, caption, x, timestep)
            assert e_c.shape == x.shape
            assert abs(score - float((e_c - e_u).norm())) < 1e-5 * float(e_c.norm())
    assert (scores > 1e-3 * float(e_c.norm())).all()  # the text does something
    for condition, expected in zip(  # and elsewhere than at the first step, with the sign
        (ours.denoiser.encode(CAPTIONS[:1]), ours.denoiser.unconditional(1)),
        PLAIN[family](pipe, CAPTIONS[0], x, 261),
        strict=True,
    ):
        assert (ours.denoiser.predict(x, 261, condition) - expected).norm() < 1e-5 * expected.norm()
    assert len({f"{score:.4f}" for score in scores[:, 0]}) == len(CAPTIONS)
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_that_of_the_pipelines_own_predictions(folders: dict[str, Path], family: str) -> None:
    check(folders[family], family)


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("sdxl", {"zeros": False}, {"unconditional": "empty", "max_tokens": 77}),
        ("sd3", {"t5": False}, {"unconditional": "empty", "max_tokens": [77, 0]}),
        ("flux", {"guidance": False}, {"unconditional": "empty", "max_tokens": [77, 512], "guidance": None}),
        ("pixart", {"kind": "Alpha", "sizes": True}, {"unconditional": "empty", "max_tokens": 120}),
    ],
    ids=["sdxl with an encoded empty caption", "sd3 without a T5", "flux schnell", "pixart alpha told of sizes"],
)
def test_a_familys_variants_are_told_apart_by_the_pipelines_own_files(
    tmp_path: Path, family: str, settings: dict[str, Any], told: dict[str, Any]
) -> None:
    assert check(write_family(tmp_path, family, **settings), family).denoiser.settings == told


class Own:
    """A denoiser of one's own, of which the magnitude is known: it predicts everywhere the length of the caption."""

    prediction_type = "epsilon"
    latent_shape = (1, 2, 2)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"unconditional": "empty"}

    def token_ids(self, captions: list[str]) -> list[bytes]:
        return [caption.encode() for caption in captions]

    def encode(self, captions: list[str]) -> Condition:
        return Condition(torch.tensor([[[float(len(caption))]] for caption in captions]))

    def unconditional(self, count: int) -> Condition:
        return self.encode([""] * count)

    def predict(self, x: torch.Tensor, timestep: float, condition: Condition) -> torch.Tensor:
        return x + condition.states[..., None]

    def first_timestep(self, steps: int) -> int:
        return 1000 - steps

    def alpha_bar(self, timestep: float) -> float:
        return 0.5


def test_a_denoiser_of_ones_own_is_scored_like_any_other() -> None:
    own = Scorer(Own(), batch_size=2)
    np.testing.assert_allclose(own.score(["four", "", "sixsix"])[:, 0, 0], [8, 0, 12], rtol=1e-6)
    assert (own.scoring.timesteps, own.scoring.denoiser["family"]) == ((950,), "Own")


@pytest.fixture(scope="session")
def scorers(folders: dict[str, Path]) -> dict[str, Scorer]:
    return {family: scorer(folder) for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_scores_the_same_alone_and_in_a_batch(scorers: dict[str, Scorer], family: str) -> None:
    together = scorers[family].score(CAPTIONS)
    alone = np.concatenate([scorers[family].score([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=rounding(scorers[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_scoring_write_nothing_to_the_terminal(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str], family: str
) -> None:
    scorer(folders[family]).score(CAPTIONS[2:])
    assert capfd.readouterr() == ("", "")


# -- one condition or two ---------------------------------------------------------------------------------------------

PAIRS = {
    "equal": ("a dog", "a dog"),
    "another word": ("a dog", "a cat"),
    "another case": ("a Dog", "a dog"),
    "white space around": (" a dog ", "a dog"),
    "unlike long after the limit": ("z" * 700 + " one", "z" * 700 + " other"),
    "unlike before the limit": ("one " + "z" * 700, "two " + "z" * 700),
    "padding written out": ("a dog", "a dog<|endoftext|>"),
    "empty": ("", " "),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_equal_where_conditions_are(scorers: dict[str, Scorer], family: str) -> None:
    denoiser = scorers[family].denoiser
    equal = {}
    for name, pair in PAIRS.items():
        one, other = denoiser.token_ids(list(pair))
        equal[name] = one == other
        with torch.inference_mode():
            condition = denoiser.encode(list(pair))
        parts = [part for part in (condition.states, condition.pooled, condition.mask) if part is not None]
        if condition.mask is not None:  # what the padding holds is seen by none
            parts[0] = parts[0] * condition.mask[..., None]
        apart = max(float((part[0] - part[1]).abs().max()) for part in parts)
        assert apart < 1e-5 if equal[name] else apart > 1e-3, name
    assert equal["equal"]
    assert equal["unlike long after the limit"]
    assert not equal["another word"]
    assert not equal["unlike before the limit"]
    assert equal["another case"] is (family in {"sdxl", "pixart", "sana"})  # CLIP, or the pipeline, lowers all
    assert len(denoiser.encode(["a", "b", "c"])[1:]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_cut_where_the_pipeline_cuts_it(scorers: dict[str, Scorer], family: str) -> None:
    limit = scorers[family].denoiser.settings["max_tokens"]
    longest = max(limit) if isinstance(limit, list) else limit
    assert scorers[family].denoiser.encode([CAPTIONS[2]]).states.shape[1] == longest + (77 if family == "sd3" else 0)


# -- what the scores tell ---------------------------------------------------------------------------------------------

UNCONDITIONAL = {
    "sdxl": "zeros",
    "sana": "empty, without the instruction",
    "lumina2": "empty, without the system prompt",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unconditional_is_the_empty_caption_or_told(scorers: dict[str, Scorer], family: str) -> None:
    told = scorers[family].scoring.denoiser["unconditional"]
    assert told == UNCONDITIONAL.get(family, "empty")
    alone, together = scorers[family].score([""]), scorers[family].score([*CAPTIONS, ""])[-1:]
    assert (alone.item() == 0) is (together.item() == 0) is (told == "empty")


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_epsilon_scale_is_null_at_a_flows_first_step(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    config = Config.parse({"magnitude": {"batch_size": 4, "dtype": "float32"}})
    files = find_model(str(folders[family]))
    rows = np.arange(len(CAPTIONS))
    scores = score_captions(pa.chunked_array([CAPTIONS]), rows, "", files, Store(tmp_path), config, lambda c, *_: c)
    assert np.isnan(scores.samples_eps).all() == (family == "sd3")
    assert scores.info["prediction_type"] == ("flow" if family == "sd3" else "epsilon")
    assert scores.info["denoiser"]["unconditional"] == UNCONDITIONAL.get(family, "empty")


def test_a_flows_share_of_the_image_falls_with_sigma(scorers: dict[str, Scorer]) -> None:
    denoiser = scorers["flux"].denoiser
    assert [denoiser.alpha_bar(t) ** 0.5 for t in (0, 250, 1000)] == [1, 0.75, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_comes_close_to_float32(
    folders: dict[str, Path], scorers: dict[str, Scorer], family: str
) -> None:
    half = scorer(folders[family], dtype="float16").score(CAPTIONS[:1])
    np.testing.assert_allclose(half, scorers[family].score(CAPTIONS[:1]), rtol=0.1)


# -- models that cannot be scored -------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        scorer(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["KandinskyV22Pipeline", "Flux2Pipeline", "StableDiffusionXLRefiner", "SanaSprintPipeline"]
)
def test_a_family_without_an_adapter_is_refused_with_those_that_have_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    message = refused(tmp_path)
    assert f"a {name}; this version scores" in message
    assert all(family in message for family in ("SDXL", "SD3", "Flux", "PixArt", "Sana", "Lumina2", "Qwen-Image"))


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SDXL pipeline for a test to break."""
    return Path(shutil.copytree(folders["sdxl"], tmp_path / "broken"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_pipeline_without_text_conditioning_is_refused(broken: Path) -> None:
    change(broken / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    assert "names no text_encoder, tokenizer" in refused(broken)


def test_half_a_pipeline_is_refused_by_what_it_lacks(broken: Path) -> None:
    shutil.rmtree(broken / "text_encoder_2")
    assert "has no text_encoder_2 folder: not a whole StableDiffusionXLPipeline" in refused(broken)


@pytest.mark.parametrize(("family", "scheduler"), [("sdxl", "EDMEulerScheduler"), ("sd3", "DDIMScheduler")])
def test_a_schedule_of_another_kind_is_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, scheduler: str
) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    change(folder / "scheduler" / "scheduler_config.json", _class_name=scheduler)
    assert scheduler in refused(folder)


def test_what_shapes_a_score_counts_and_the_autoencoders_weights_do_not(broken: Path) -> None:
    before = find_model(str(broken)).files
    assert "vae/config.json" in before
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert find_model(str(broken)).files == before
    change(broken / "model_index.json", force_zeros_for_empty_prompt=False)
    assert find_model(str(broken)).files != before


@pytest.mark.parametrize(
    ("part", "weights"),
    [
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
        ("text_encoder_3", "model"),
        ("transformer", "diffusion_pytorch_model"),
    ],
)
def test_weights_in_another_format_than_safetensors_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str, weights: str
) -> None:
    folder = Path(shutil.copytree(folders["sd3"], tmp_path / "model"))
    (folder / part / f"{weights}.safetensors").unlink()
    torch.save({}, folder / part / ("pytorch_model.bin" if weights == "model" else f"{weights}.bin"))
    assert "safetensors" in refused(folder)


def test_code_in_a_models_folder_does_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, trace = Path(shutil.copytree(folders["flux"], tmp_path / "model")), tmp_path / "imported"
    for part in (".", "transformer", "text_encoder_2", "tokenizer_2", "scheduler"):
        (folder / part / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "own.Own")
    change(folder / "text_encoder_2" / "config.json", auto_map=own)
    change(folder / "tokenizer_2" / "tokenizer_config.json", auto_map=own | {"AutoTokenizer": ["own.Own", "own.Own"]})
    change(folder / "model_index.json", transformer=["own", "Own"])
    assert scorer(folder).score(["a dog"]) > 0
    assert not trace.exists()
