"""Words' weights against finite differences and a plain implementation, and `memfilter explain` on real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encoded, picture, sample, write_tar
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pipelines import LATENT_SIDE, write_family, write_pipeline
from safetensors.torch import load_file, save_file

import memfilter
from memfilter import Config, ConfigError, ModelError, RunError
from memfilter.attribution import Attribution, attribute, explain, explain_prompt, lines
from memfilter.cli import main
from memfilter.demo.data import samples
from memfilter.demo.memorized import MODEL
from memfilter.denoisers import Condition, Denoiser, find_model, load_denoiser
from memfilter.magnitude import Scorer

CAPTION = "A dog, on a Mät"
UNET = "unet/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline of each prediction type, with the same weights."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_pipeline(folder / kind, kind) for kind in ("epsilon", "v_prediction", "sample")}


def warm(folder: Path, dtype: str = "float64") -> Denoiser:
    return load_denoiser(find_model(str(folder)), dtype)


@pytest.fixture(scope="module")
def denoiser(models: dict[str, Path]) -> Denoiser:
    return warm(models["epsilon"])


def weights(found: Attribution) -> list[float]:
    return [weight for _, weight in found.tokens]


# -- the weights ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_differences(denoiser: Denoiser, caption: str, row: int, step: float = 1e-4) -> float:
    """The norm of the gradient of ||e_c - e_u|| by one row of the caption's states, by central differences."""
    x = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0)).double()[None]
    t = denoiser.first_timestep(50)
    condition = denoiser.encode([caption])
    e_u = denoiser.predict(x, t, denoiser.unconditional(1))
    width = condition.states.shape[-1]
    moves = torch.zeros(2 * width, *condition.states.shape[1:], dtype=torch.float64)
    moves[:, row] = torch.cat([torch.eye(width), -torch.eye(width)]).double() * step
    pooled = None if condition.pooled is None else condition.pooled.expand(2 * width, -1)
    mask = None if condition.mask is None else condition.mask.expand(2 * width, -1)
    e_c = denoiser.predict(x.expand(2 * width, -1, -1, -1), t, Condition(condition.states + moves, pooled, mask))
    up, down = (e_c - e_u).flatten(1).norm(dim=1).chunk(2)
    return float(((up - down) / (2 * step)).norm())


def test_a_tokens_weight_is_the_norm_of_its_gradient(models: dict[str, Path]) -> None:
    denoiser = warm(models["epsilon"])
    denoiser.latent_shape = (4, 8, 8)
    found = attribute(denoiser, CAPTION)
    for token in (0, 1, 5):  # the start has row 0
        assert weights(found)[token] == pytest.approx(by_differences(denoiser, CAPTION, token + 1), rel=1e-5)
    assert len({f"{weight:.6e}" for weight in weights(found)}) == len(found.tokens)


def by_formula(
    folder: Path, caption: str, steps: int, seed: int = 0, swapped: bool = False
) -> tuple[list[float], float]:
    """Each token's weight and the mean norm over the first of 50 DDIM steps, by the library's own pipeline.

    `swapped` steps along e_c + s (e_u - e_c), as latents do that walk away from the prompt.
    """
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float64)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        prompt, empty = pipe.encode_prompt([caption], "cpu", 1, True, [""])
    shape = (1, 4, LATENT_SIDE, LATENT_SIDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    count = len(pipe.tokenizer(caption).input_ids) - 2
    total, norms = torch.zeros(count, dtype=torch.float64), []
    for t in scheduler.timesteps[:steps]:
        embedding = prompt.detach().clone().requires_grad_()
        e_c = pipe.unet(x, t, encoder_hidden_states=embedding).sample
        e_u = pipe.unet(x, t, encoder_hidden_states=empty).sample.detach()
        norm = (e_c - e_u).square().sum().sqrt()
        norm.backward()
        assert embedding.grad is not None
        total += embedding.grad[0, 1 : count + 1].square().sum(1).sqrt()
        norms.append(float(norm.detach()))
        away, towards = (e_c.detach(), e_u) if swapped else (e_u, e_c.detach())
        x = scheduler.step(away + 7.5 * (towards - away), t, x).prev_sample
    return (total / steps).tolist(), float(np.mean(norms))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_steps_are_the_papers_in_the_prompts_direction(models: dict[str, Path], kind: str) -> None:
    found = attribute(warm(models[kind]), CAPTION, steps=2)
    expected, norm = by_formula(models[kind], CAPTION, steps=2)
    assert found.timesteps == [981, 961]
    assert weights(found) == pytest.approx(expected, rel=1e-5)
    assert found.magnitude == pytest.approx(norm, rel=1e-5)
    walked_away, _ = by_formula(models[kind], CAPTION, steps=2, swapped=True)
    assert weights(found) != pytest.approx(walked_away, rel=1e-4)


def test_latents_are_not_clipped_where_the_scheduler_does_not_say_so(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["epsilon"], tmp_path / "silent"))
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("clip_sample") is False
    file.write_text(json.dumps(settings))
    assert attribute(warm(folder), CAPTION, steps=2) == attribute(warm(models["epsilon"]), CAPTION, steps=2)


def test_seeds_are_averaged_and_one_step_is_the_score_itself(models: dict[str, Path], denoiser: Denoiser) -> None:
    found = attribute(denoiser, CAPTION, seeds=2)
    both = [by_formula(models["epsilon"], CAPTION, 1, seed)[0] for seed in (0, 1)]
    assert weights(found) == pytest.approx(np.mean(both, axis=0).tolist(), rel=1e-5)
    score = Scorer.load(str(models["epsilon"]), seeds=2, batch_size=1).score([CAPTION]).mean()
    assert found.magnitude == pytest.approx(float(score), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_precisions_give_the_same_words(models: dict[str, Path], denoiser: Denoiser, dtype: str) -> None:
    found = attribute(warm(models["epsilon"], dtype), CAPTION)
    tolerance = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}[dtype]
    assert weights(found) == pytest.approx(weights(attribute(denoiser, CAPTION)), rel=tolerance)


@pytest.mark.parametrize("family", ["sdxl", "pixart", "flux"])
def test_other_families_weights_are_the_norms_of_gradients(tmp_path: Path, family: str) -> None:
    model = warm(write_family(tmp_path / family, family))
    if family != "pixart":
        model.latent_shape = (4, 8, 8)
    found = attribute(model, "a dog on it")
    assert [word for word, _ in found.words] == ["a", "dog", "on", "it"]
    tokens, _ = model.tokens("a dog on it")
    # these families compute their embeddings of time and place in float32, of which a small difference has few digits
    expected = by_differences(model, "a dog on it", tokens[1].row, step=1e-3)
    assert weights(found)[1] == pytest.approx(expected, rel=1e-3)
    first, second = attribute(model, "a dog", steps=2).timesteps
    assert first > second


@pytest.mark.parametrize("family", ["sd3", "lumina2"])
def test_a_family_without_a_row_a_token_is_told(tmp_path: Path, family: str) -> None:
    with pytest.raises(ModelError, match=r"^words have no weights under (StableDiffusion3|Lumina2): "):
        attribute(warm(write_family(tmp_path / family, family), "float32"), "a dog")


def test_weights_that_are_not_finite_are_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["epsilon"], tmp_path / "broken"))
    tensors = load_file(folder / UNET)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, folder / UNET, {"format": "pt"})
    with pytest.raises(ModelError, match=r"^the gradients for 'cat' are not finite in float32; try float32"):
        attribute(warm(folder, "float32"), "cat")


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_are_in_the_captions_spelling_with_their_heaviest_token(denoiser: Denoiser) -> None:
    caption = "  A DOG,\ton\n a  Mät — 漢字 🐕! Cafe\u0301 <|endoftext|> 'tis"
    found = attribute(denoiser, caption)
    assert [word for word, _ in found.words] == caption.split()
    assert found.unread == ""
    tokens, _ = denoiser.tokens(caption)
    assert [caption[t.start : t.end] for t in tokens[:6]] == ["A", "DOG", ",", "on", "a", "M"]
    by_word = dict(found.words)
    assert by_word["DOG,"] == max(weights(found)[1:3])
    start = caption.index("漢字")
    own = [w for t, w in zip(tokens, weights(found), strict=True) if start <= t.start < start + 2]
    assert len(own) == 6  # of three bytes each
    assert by_word["漢字"] == max(own)


def test_lower_case_that_is_longer_keeps_the_captions_spelling(tmp_path: Path) -> None:
    model = warm(write_family(tmp_path / "pixart", "pixart"))
    caption = " İİ Dogging ON "
    tokens, read = model.tokens(caption)
    assert read == len(caption)
    assert "".join(caption[t.start : t.end] for t in tokens).endswith("DoggingON")
    assert [word for word, _ in attribute(model, caption).words] == ["İİ", "Dogging", "ON"]


def test_what_is_beyond_the_tokenizers_length_is_told(denoiser: Denoiser) -> None:
    caption = " ".join(f"{i:02}" for i in range(60))  # a token a digit
    found = attribute(denoiser, caption)
    assert len(found.tokens) == 75
    assert found.words[-1][0] == "3"  # its other half was cut off
    assert found.unread == caption[len("00 ") * 37 + 1 :]
    text = lines({"model": "m", "timesteps": [981], "seeds": 1, "magnitude": 1.0, "words": [], "unread": found.unread})
    assert text[-1] == f"unread    {len(found.unread)} characters are beyond the tokens that the model takes"


@pytest.mark.parametrize("caption", ["", " \n "])
def test_an_empty_caption_has_no_words(denoiser: Denoiser, caption: str) -> None:
    found = attribute(denoiser, caption)
    assert (found.words, found.tokens, found.magnitude) == ([], [], 0.0)


def test_a_name_weighs_most_in_a_memorized_caption() -> None:
    planted = samples()
    repeated = sorted({p.original for p in planted if p.kind == "repeated pair"})[:12]
    model = warm(MODEL, "float32")
    for caption in (planted[i].caption for i in repeated):
        found = attribute(model, caption)
        values = np.array([weight for _, weight in found.words])
        assert [word for word, _ in found.words] == caption.split()
        assert np.isfinite(values).all()
        names = [0, 1, 4]  # "Quinith Wesfen, composer of Yarjor, 1796"
        assert values[names].max() > 1.05 * np.delete(values, names).max()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two shards, with a copy, a repeated key, a bad sample, an empty caption and hostile names."""
    folder = tmp_path_factory.mktemp("run")
    one = encoded(picture(1))
    members = sample("one", one, "a dog on a cat") + sample("only", encoded(picture(2)), "Ein Hund über Öl")
    members += (
        sample("caf\udce9", encoded(picture(5)), "dog")
        + sample("bad", b"", "a cat")
        + sample("empty", encoded(picture(3)), "")
    )
    write_tar(folder / "in" / "a.tar", members)
    write_tar(
        folder / "in" / "b.tar",
        sample("one", one, "a dog on a cat") + sample("esc", encoded(picture(4)), "\x1b[31m cat"),
    )
    config = Config.parse({"magnitude": {"model": str(models["epsilon"]), "seeds": 2, "dtype": "float32"}})
    memfilter.run([str(folder / "in")], folder / "out", config, workers=1)
    return folder / "out"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(str(end.value.code)), out if end.value.code == 0 else err


def test_the_words_stand_beside_the_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = told(capsys, "explain", str(run), "b.tar", "one", "--json", "--trust")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert [word["text"] for word in found["words"]] == ["a", "dog", "on", "a", "cat"]
    assert len(found["tokens"]) == 5
    row, reasons = found["sample"], ["exact_duplicate", "caption_duplicate"]
    assert (row["shard"], row["key"], row["action"], row["reasons"]) == ("b.tar", "one", "drop", reasons)
    assert row["canonical"] == ["a.tar", "one"]
    assert (row["image_count"], row["caption_count"], row["joint_count"]) == (2, 2, 2)
    assert found["magnitude"] == pytest.approx(row["magnitude"], rel=1e-4)
    magnitudes = memfilter.Manifest.load(run).table(["magnitude"])["magnitude"].drop_null().to_numpy()
    assert row["percentile"] == pytest.approx(100 * (magnitudes < np.float32(row["magnitude"])).mean())
    code, out = told(capsys, "explain", str(run), "b.tar", "one", "--trust")
    assert code == 0
    shown = out.splitlines()
    assert shown[0] == "sample    b.tar one: drop (exact_duplicate, caption_duplicate)"
    assert shown[1] == "kept      a.tar one in its place"
    assert shown[2] == "counts    2 of its image, 2 of its caption, 2 of both"
    assert shown[3].startswith(f"run       magnitude {row['magnitude']:.4g}, over {row['percentile']:.1f}%")
    assert shown[4].endswith("by epsilon at timestep 981, 2 seeds")
    assert [line.split()[-1] for line in shown[5:]] == ["a", "dog", "on", "a", "cat"]
    values = np.array([word["weight"] for word in found["words"]])
    assert [line.count("#") for line in shown[5:]] == np.round(30 * values / values.max()).astype(int).tolist()


def test_a_key_alone_is_enough_where_it_is_unique(run: Path) -> None:
    found = explain(run, "only", trust=True)
    assert [word["text"] for word in found["words"]] == ["Ein", "Hund", "über", "Öl"]
    assert found["sample"]["canonical"] is None
    assert "unread" not in "\n".join(lines(found))


def test_a_key_that_is_not_utf8_is_found(run: Path) -> None:
    assert [word["text"] for word in explain(run, "caf\udce9", trust=True)["words"]] == ["dog"]
    assert explain(run, "caf\\xe9", trust=True)["sample"] == explain(run, "caf\udce9", trust=True)["sample"]


def test_an_empty_caption_is_told(run: Path) -> None:
    found = explain(run, "empty", trust=True)
    assert found["words"] == []
    assert lines(found)[-1] == "words     none: the caption is empty"


def test_a_captions_control_codes_do_not_reach_the_terminal(run: Path) -> None:
    found = explain(run, "esc", trust=True)
    assert found["words"][0]["text"] == "\x1b[31m"
    assert all(line.isprintable() for line in lines(found))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "no sample 'none' in any of its shards; check KEY"),
        (["a.tar", "esc"], "no sample 'esc' in a.tar; check KEY"),
        (["c.tar", "one"], "c.tar: none of the manifest's 2 shards has this name"),
        (["one"], "'one' is a sample of 2 shards; give one before it, such as a.tar"),
        (["bad"], "a.tar: the sample 'bad' has no caption to explain: it is bad (empty_image)"),
    ],
)
def test_a_sample_that_cannot_be_explained_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, err = told(capsys, "explain", str(run), *arguments)
    assert code == 1
    assert err.startswith("memfilter: ")
    assert err.rstrip("\n").endswith(message)
    assert err.count("\n") == 1


def test_another_model_than_the_runs_is_refused_and_a_moved_one_is_not(
    run: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"not the run's model: its scheduler/scheduler_config\.json is another"):
        explain(run, "only", model=str(models["sample"]))
    moved = shutil.copytree(models["epsilon"], tmp_path / "moved")
    assert explain(run, "only", model=str(moved))["words"] == explain(run, "only", trust=True)["words"]


def test_a_run_without_a_model_takes_one(models: dict[str, Path], tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", sample("one", encoded(picture(1)), "a cat"))
    memfilter.run([str(tmp_path / "in")], tmp_path / "out", Config(), workers=1)
    with pytest.raises(ConfigError, match="the run has no model; give one that has seen the data with --model"):
        explain(tmp_path / "out", "one")
    found = explain(tmp_path / "out", "one", model=str(models["epsilon"]))
    assert (found["sample"]["magnitude"], found["sample"]["percentile"]) == (None, None)
    assert [line.split()[0] for line in lines(found)[:3]] == ["sample", "counts", "magnitude"]


def test_a_folder_without_a_finished_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no manifest; finish the run"):
        explain(tmp_path, "one")


def test_a_prompt_needs_a_model_and_no_run(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(models["epsilon"])
    code, out = told(capsys, "explain", "--prompt", "a dog", "--model", model, "--steps", "2", "--json")
    assert code == 0
    assert json.loads(out) == explain_prompt("a dog", model, steps=2)
    assert json.loads(out)["timesteps"] == [981, 961]
    code, out = told(capsys, "explain", "--prompt", "a dog", "--model", model, "--steps", "2")
    assert "at 2 timesteps from 981 to 961, 1 seed" in out.splitlines()[0]
    for wrong in (["--prompt", "a"], ["x", "--prompt", "a", "--model", model], ["x"], [], ["a", "b", "c", "d"]):
        assert told(capsys, "explain", *wrong)[0] == 2


def test_text_that_is_not_utf8_and_steps_out_of_range_are_errors(denoiser: Denoiser) -> None:
    with pytest.raises(ConfigError, match="is not UTF-8"):
        attribute(denoiser, "caf\udce9")
    for steps in (0, 51):
        with pytest.raises(ConfigError, match=f"^{steps} steps; take 1 to 50$"):
            attribute(denoiser, "a", steps)
