"""Magnitudes of real small pipelines against the formula written out, and the stage, its thresholds and its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import encoded, picture, sample, write_tar
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import LATENT_SIDE, rounding, write_pipeline
from safetensors.torch import load_file, save_file

import memfilter
from memfilter import Config, ConfigError, ModelError
from memfilter.denoisers import find_model
from memfilter.magnitude import Scorer, eps_factor
from memfilter.records import Scores
from memfilter.scores import Progress, score_captions
from memfilter.store import Store
from memfilter.thresholds import check_threshold, find_threshold

CAPTIONS = ["a dog on a mat", "cat", "Ein Hund über Öl 漢字 🐕", "", "the van gogh cafe terrace " * 4, "x"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BATCH = 4
UNET = "unet/diffusion_pytorch_model.safetensors"


pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline of each prediction type, with the same weights."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_pipeline(folder / kind, kind) for kind in PREDICTION_TYPES}


@pytest.fixture(scope="session")
def model(models: dict[str, Path]) -> Path:
    return models["epsilon"]


@pytest.fixture(scope="session")
def scorer(model: Path) -> Scorer:
    return Scorer.load(str(model), seeds=2, batch_size=BATCH)


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline for a test to break."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


# -- the score --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def by_formula(folder: Path, caption: str, seeds: int) -> tuple[float, float]:
    """The mean over seeds of ||e_c - e_u|| at the first of 50 DDIM steps, and that of ||e_c||."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[0]
    conditional, unconditional = pipe.encode_prompt([caption], "cpu", 1, True, [""])
    differences, norms = [], []
    for seed in range(seeds):
        shape = (1, 4, LATENT_SIDE, LATENT_SIDE)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        e_c = pipe.unet(x, t, encoder_hidden_states=conditional).sample
        e_u = pipe.unet(x, t, encoder_hidden_states=unconditional).sample
        differences.append(float((e_c - e_u).square().sum().sqrt()))
        norms.append(float(e_c.square().sum().sqrt()))
    return float(np.mean(differences)), float(np.mean(norms))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_score_is_the_papers_formula(models: dict[str, Path], kind: str) -> None:
    scorer = Scorer.load(str(models[kind]), seeds=3, batch_size=BATCH)
    scores = scorer.score(CAPTIONS)
    assert scorer.scoring.prediction_type == kind
    assert scorer.scoring.timesteps == (981,)
    assert scores.shape == (len(CAPTIONS), 3, 1)
    assert scores.dtype == np.float32
    for caption, score in zip(CAPTIONS, scores.mean((1, 2)), strict=True):
        expected, norm = by_formula(models[kind], caption, seeds=3)
        assert abs(score - expected) < 1e-5 * norm
    assert len({f"{s:.3f}" for s in scores.mean((1, 2))}) == len(CAPTIONS)  # the captions tell apart


def test_each_seed_is_a_column_of_its_own(scorer: Scorer, model: Path) -> None:
    one = Scorer.load(str(model), seeds=1, batch_size=BATCH).score(CAPTIONS)
    two = scorer.score(CAPTIONS)
    assert np.array_equal(two[:, :1], one)
    assert (two[:3, 0] != two[:3, 1]).all()


def test_the_empty_caption_scores_exactly_zero(scorer: Scorer) -> None:
    assert not scorer.score(["cat", ""])[1].any()


def test_no_caption_gives_no_score(scorer: Scorer) -> None:
    assert scorer.score([]).shape == (0, 2, 1)


def test_a_captions_company_changes_its_score_by_rounding_alone_and_their_order_by_nothing(scorer: Scorer) -> None:
    scores = scorer.score(CAPTIONS)
    assert np.array_equal(scores[::-1], scorer.score(CAPTIONS[::-1]))
    twice = [c for c in CAPTIONS for _ in range(2)]
    assert np.array_equal(scores.repeat(2, 0), scorer.score(twice))
    alone = np.concatenate([scorer.score([caption]) for caption in CAPTIONS])
    others = [f"another caption, number {i}" for i in range(7)]
    for elsewhere in (alone, scorer.score(others + CAPTIONS)[7:]):
        np.testing.assert_allclose(elsewhere, scores, rtol=0, atol=rounding(scorer))
        assert not elsewhere[CAPTIONS.index("")].any()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A Dog ON a mat", "a dog on a mat", True),
        ("a  dog on\ta mat ", "a dog on a mat", True),
        ("z" * 75 + " one end", "z" * 75 + " another", True),
        ("z" * 60 + " one end", "z" * 60 + " another", False),
        ("a dog on a mat", "a dog on a map", False),
        ("漢", "字", False),
    ],
)
def test_captions_are_one_condition_when_the_model_sees_the_same_ids(
    scorer: Scorer, one: str, other: str, equal: bool
) -> None:
    first, second = scorer.denoiser.token_ids([one, other])
    assert (first == second) is equal
    apart = np.abs(np.subtract(*scorer.score([one, other])))
    assert not apart.any() if equal else apart.min() > rounding(scorer)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_comes_close_to_float32(scorer: Scorer, model: Path, dtype: str, tolerance: float) -> None:
    captions = CAPTIONS[:3]
    scores = Scorer.load(str(model), seeds=2, dtype=dtype, batch_size=2).score(captions)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, scorer.score(captions), rtol=tolerance)


@pytest.mark.parametrize("alpha_bar", [0.0058, 0.3, 0.99])
def test_the_epsilon_factor_turns_a_difference_of_predictions_into_one_of_noise(alpha_bar: float) -> None:
    x, one, other = 0.7, 0.4, 0.1
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    recovered: dict[str, Callable[[float], float]] = {
        "epsilon": lambda prediction: prediction,
        "v_prediction": lambda prediction: signal * prediction + noise * x,
        "sample": lambda prediction: (x - signal * prediction) / noise,
    }
    for kind, noise_of in recovered.items():
        assert eps_factor(kind, alpha_bar) * 0.3 == pytest.approx(abs(noise_of(one) - noise_of(other)))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ModelError, match="'score'"):
        eps_factor("score", 0.3)


# -- the stage --------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """The stage on some captions in a run directory; `chunks` holds the sizes of those that it had to score."""

    store: Store
    model: Path
    captions: list[str]

    def __post_init__(self) -> None:
        self.files = find_model(str(self.model))
        self.chunks: list[int] = []

    def progress(self, sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
        for size in sizes:
            self.chunks.append(size)
            yield size

    def __call__(self, progress: Progress | None = None, **magnitude: Any) -> Scores:
        config = Config.parse({"magnitude": {"seeds": 2, "batch_size": BATCH, **magnitude}})
        digest = json.dumps(self.captions)
        texts = pa.chunked_array([self.captions])
        rows = np.arange(len(self.captions))
        return score_captions(texts, rows, digest, self.files, self.store, config, progress or self.progress)


@pytest.fixture
def stage(model: Path, tmp_path: Path) -> Stage:
    # with a copy of the model, so that a test may take it away
    return Stage(Store(tmp_path / "run"), Path(shutil.copytree(model, tmp_path / "model")), [*CAPTIONS, "CAT", "a dog"])


def same(one: Scores, other: Scores) -> bool:
    return np.array_equal(one.captions, other.captions) and one.info == other.info


def test_the_stage_scores_each_caption_and_tells_what_the_scores_depend_on(stage: Stage, scorer: Scorer) -> None:
    scores = stage()
    expected = scorer.score(stage.captions).mean((1, 2), dtype=np.float64).astype(np.float32)
    assert np.array_equal(scores.samples, expected)
    np.testing.assert_allclose(scores.samples_eps, expected / np.sqrt(4 * LATENT_SIDE**2), rtol=1e-6)
    assert scores.info["conditions"] == len(stage.captions) - 1  # "cat" and "CAT" are one
    assert scores.info["files"] == stage.files.files
    assert (scores.info["model"], scores.info["timesteps"], scores.info["seeds"]) == ("model", [981], 2)
    assert (scores.info["prediction_type"], scores.info["dtype"]) == ("epsilon", "float32")
    assert scores.info["latent_shape"] == [4, LATENT_SIDE, LATENT_SIDE]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_the_epsilon_scale_divides_by_the_square_root_of_the_elements(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    scores = Stage(Store(tmp_path), models[kind], CAPTIONS)()
    alpha_bar = float(DDIMScheduler.from_pretrained(models[kind], subfolder="scheduler").alphas_cumprod[981])
    factor = alpha_bar**0.5 if kind == "v_prediction" else (alpha_bar / (1 - alpha_bar)) ** 0.5
    assert factor == pytest.approx(0.07, abs=0.01)
    np.testing.assert_allclose(scores.samples_eps, scores.samples * factor / (4 * LATENT_SIDE**2) ** 0.5, rtol=1e-5)


def test_the_epsilon_scale_is_null_where_it_says_nothing(tmp_path: Path) -> None:
    zero_snr: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scores = Stage(Store(tmp_path / "run"), write_pipeline(tmp_path / "m", "v_prediction", **zero_snr), CAPTIONS)()
    assert scores.info["timesteps"] == [999]
    assert np.isnan(scores.samples_eps).all()
    assert (scores.samples[:3] > 0).all()


def stopped(sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
    yield next(sizes)
    raise KeyboardInterrupt


def test_an_interrupted_stage_goes_on_from_its_finished_chunks(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfilter.scores._PASSES", 8)
    whole = Stage(Store(stage.store.path.with_name("whole")), stage.model, stage.captions)()
    chunks = stage.store.scores / "captions"
    with pytest.raises(KeyboardInterrupt):
        stage(stopped)
    left = {part: part.stat().st_ino for part in chunks.iterdir()}
    assert [part.name for part in left] == ["000000.parquet"]

    def watched(sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
        assert (total, unit) == (3, "caption")  # of seven conditions four are done
        yield from sizes
        assert {part: part.stat().st_ino for part in left} == left
        assert len(list(chunks.iterdir())) == 2

    assert same(stage(watched), whole)
    assert not chunks.exists()
    assert [p.name for p in stage.store.scores.iterdir()] == ["captions.parquet"]


def test_chunks_of_another_size_are_not_taken_for_finished(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfilter.scores._PASSES", 8)
    with pytest.raises(KeyboardInterrupt):
        stage(stopped)
    monkeypatch.undo()
    assert same(stage(), Stage(Store(stage.store.path.with_name("whole")), stage.model, stage.captions)())


def test_a_finished_table_needs_no_model(stage: Stage) -> None:
    before = stage()
    table = stage.store.scores / "captions.parquet"
    written = table.stat().st_ino
    shutil.rmtree(stage.model)
    assert same(stage(), before)
    assert same(stage(threshold=1.0), before)
    assert same(stage(threshold={"quantile": 0.5}), before)
    assert table.stat().st_ino == written
    assert stage.chunks == [7]


def test_a_model_that_was_taken_away_is_missed_once_it_is_needed(stage: Stage) -> None:
    shutil.rmtree(stage.model)
    with pytest.raises(ModelError) as caught:
        stage()
    assert str(caught.value).count(str(stage.model)) == 1


def test_other_seeds_dtype_or_captions_score_again(stage: Stage, scorer: Scorer) -> None:
    before = stage()
    assert not same(stage(seeds=1), before)
    assert not same(stage(dtype="bfloat16"), before)
    assert same(stage(), before)
    stage.captions = stage.captions[1:]
    np.testing.assert_allclose(stage().samples, before.samples[1:], rtol=0, atol=rounding(scorer))
    assert len(stage.chunks) == 5


def test_changed_model_files_score_again(stage: Stage) -> None:
    before = stage()
    weights = load_file(stage.model / UNET)
    weights["conv_out.bias"] += 1  # adds to both predictions alike
    save_file(weights, stage.model / UNET, {"format": "pt"})
    again = Stage(stage.store, stage.model, stage.captions)
    after = again()
    assert again.chunks == [7]
    assert after.info["files"] != before.info["files"]
    np.testing.assert_allclose(after.samples, before.samples, atol=1e-5)


def test_files_that_shape_no_score_do_not_count(broken: Path) -> None:
    before = find_model(str(broken)).files
    assert {name.split("/")[0] for name in before} == {"scheduler", "text_encoder", "tokenizer", "unet"}
    shutil.rmtree(broken / "vae")
    (broken / "another-format.safetensors").touch()
    assert find_model(str(broken)).files == before
    assert Scorer.load(str(broken), batch_size=BATCH).score(["a dog"]) > 0
    (broken / "scheduler" / "scheduler_config.json").write_text("{}")
    assert find_model(str(broken)).files != before


# -- the threshold ----------------------------------------------------------------------------------------------------


def limit(wanted: Any, own: list[float], reference: list[float] | None = None, samples: list[int] | None = None) -> Any:
    magnitudes = np.array(own, np.float32)
    rows = np.array(range(len(own)) if samples is None else samples, np.int64)
    about = dict.fromkeys(
        ["files", "mode", "prediction_type", "timesteps", "latent_shape", "seeds", "dtype", "guidance", "denoiser"]
    )
    own_reference = None if reference is None else np.array(reference, np.float32)
    scores = Scores(magnitudes, magnitudes[rows], magnitudes[rows], about, own_reference)
    found = find_threshold(Config.parse({"magnitude": {"threshold": wanted}}), scores, np.ones(len(rows), bool))
    return found and found.magnitude


def test_a_threshold_by_value_is_that_value() -> None:
    assert limit(2.5, [1, 2, 3]) == 2.5
    assert limit(None, [1, 2, 3]) is None


def test_a_threshold_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model"):
        check_threshold(Config.parse({"magnitude": {"threshold": 2}}))


def test_a_quantile_counts_samples_and_not_captions() -> None:
    assert limit({"quantile": 0.5}, [1, 2, 3, 4, 5]) == 3
    assert limit({"quantile": 0.5}, [1, 5], samples=[0, 1, 1, 1]) == 5
    assert limit({"quantile": 0.0}, [4, 5]) == 4
    assert limit({"quantile": 0.99}, [1, 2, 3]) == 3
    assert limit({"quantile": 0.5}, [1, 2], samples=[]) is None
    assert limit({"quantile": 0.5}, [0, 1, 2, 3], samples=[0, 0, 0, 0, 1, 2, 3]) == 2  # those without a caption apart


floats32 = st.floats(0, 100, width=32)
shares = st.one_of(st.integers(0, 99).map(lambda i: i / 100), st.floats(0, 1, exclude_max=True))


@settings(deadline=None, max_examples=300)
@given(own=st.lists(floats32.filter(bool), min_size=1, max_size=120), share=shares)
def test_a_quantile_is_a_value_with_at_most_the_other_share_above_it(own: list[float], share: float) -> None:
    assert limit({"quantile": share}, own) == sorted(own)[ceil(Fraction(str(share)) * (len(own) - 1))]


@settings(deadline=None, max_examples=300)
@given(reference=st.lists(floats32, min_size=1, max_size=120), share=shares)
def test_at_most_the_share_of_reference_captions_reaches_a_false_positive_threshold(
    reference: list[float], share: float
) -> None:
    allowed = Fraction(str(share)) * len(reference)
    lowest = np.float32(limit({"false_positive_rate": share, "reference": "r.txt"}, [1.0], reference))
    values = np.array(reference, np.float32)
    assert (values >= lowest).sum() <= allowed
    assert (values >= np.nextafter(lowest, np.float32(-1))).sum() > allowed


def test_a_false_positive_rate_holds_on_the_reference_file(stage: Stage, scorer: Scorer, tmp_path: Path) -> None:
    lines = [f"an ordinary caption, number {i}" for i in range(8)]
    reference = tmp_path / "reference.txt"
    reference.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    wanted = {"false_positive_rate": 0.25, "reference": str(reference)}
    scores = stage(threshold=wanted)
    expected = scorer.score(lines).mean((1, 2), dtype=np.float64).astype(np.float32)
    assert scores.reference is not None
    assert np.array_equal(scores.reference, expected)
    lowest = find_threshold(Config.parse({"magnitude": {"threshold": wanted}}), scores, np.ones(8, bool))
    assert lowest is not None
    assert (expected >= lowest.magnitude).sum() == 2
    shutil.rmtree(stage.model)
    assert np.array_equal(stage(threshold={**wanted, "false_positive_rate": 0.5}).reference, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, "", " \n\n", b"\xff\xfe"])
def test_a_reference_file_that_cannot_be_used_is_refused_before_anything_is_scored(
    stage: Stage, tmp_path: Path, content: str | bytes | None
) -> None:
    reference = tmp_path / "reference.txt"
    if content is not None:
        reference.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=r"reference\.txt: [^\n]+$"):
        stage(threshold={"false_positive_rate": 0.1, "reference": str(reference)})
    assert stage.chunks == []


# -- models that cannot be used ---------------------------------------------------------------------------------------


def refused(folder: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        Scorer.load(str(folder), batch_size=BATCH).score(["a dog"])
    message = str(caught.value)
    assert "\n" not in message
    return message


class Exploit:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("part", "safe", "unsafe"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused_and_not_unpickled(
    broken: Path, tmp_path: Path, part: str, safe: str, unsafe: str
) -> None:
    trace = tmp_path / "unpickled"
    torch.save(Exploit(trace), broken / part / unsafe)
    (broken / part / safe).unlink()
    assert "safetensors" in refused(broken)
    assert not trace.exists()


def test_code_in_a_models_folder_does_not_run(broken: Path, tmp_path: Path) -> None:
    trace = tmp_path / "imported"
    index = json.loads((broken / "model_index.json").read_text())
    for folder in (broken, broken / "unet", broken / "text_encoder"):
        (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    (broken / "model_index.json").write_text(json.dumps(index | {"unet": ["own", "UNet"]}))
    assert Scorer.load(str(broken), batch_size=BATCH).score(["a dog"]) > 0
    (broken / "model_index.json").write_text(json.dumps(index | {"_class_name": ["own", "StableDiffusionPipeline"]}))
    assert "'own'" in refused(broken)
    assert not trace.exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "model_index.json" in refused(tmp_path)


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "nowhere", "./no/where"])
def test_a_missing_model_is_refused(spec: str) -> None:
    assert refused(spec).startswith(f"{spec}: no such folder")


def test_a_pipeline_of_another_family_is_refused(tmp_path: Path) -> None:
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert "DDPMPipeline" in refused(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"_class_name": "StableDiffusionXLPipeline", "unet": ["a", "b"]}'])
def test_a_model_index_that_names_no_stable_diffusion_is_refused(broken: Path, index: str) -> None:
    (broken / "model_index.json").write_text(index)
    assert refused(broken).startswith(str(broken))


def test_loading_writes_nothing_to_the_terminal(
    model: Path, broken: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    Scorer.load(str(model), batch_size=BATCH).score(["a very " * 50 + "long caption"])
    shutil.rmtree(broken / "unet")
    refused(broken)
    assert capfd.readouterr() == ("", "")
    assert not [w for w in recwarn if issubclass(w.category, (UserWarning, FutureWarning))]


def test_weights_that_are_not_numbers_are_refused(broken: Path) -> None:
    weights = load_file(broken / UNET)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, broken / UNET, {"format": "pt"})
    assert "not finite in float32" in refused(broken)


@pytest.mark.parametrize(
    ("file", "weight"), [(UNET, "conv_in.bias"), ("text_encoder/model.safetensors", "final_layer_norm.bias")]
)
def test_a_file_that_lacks_a_weight_is_refused(broken: Path, file: str, weight: str) -> None:
    weights = load_file(broken / file)
    save_file({k: v for k, v in weights.items() if k != weight}, broken / file, {"format": "pt"})
    assert weight in refused(broken)


def test_a_damaged_weight_file_is_refused(broken: Path) -> None:
    with open(broken / UNET, "rb+") as file:
        file.truncate(5000)
    assert "cannot be loaded" in refused(broken)


def test_a_unet_that_takes_more_than_noise_is_refused(broken: Path) -> None:
    config = json.loads((broken / "unet/config.json").read_text())
    (broken / "unet/config.json").write_text(json.dumps(config | {"sample_size": None}))
    assert "size None" in refused(broken)


# -- a run ------------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    found = [p for name in ("manifest", "shards") for p in (folder / name).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def run_captions(n: int = 30) -> list[str]:
    subjects = ["a dog", "a cat", "the old harbour", "two people", "an oil painting", "CAFE terrace"]
    return [f"{subjects[i % 6]} {'very ' * (i % 4)}near number {i // 2}" for i in range(n)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    captions = run_captions()
    for shard in range(2):
        rows = range(shard, len(captions), 2)
        members = [m for i in rows for m in sample(f"{i:03}", encoded(picture(i)), captions[i])]
        write_tar(tmp_path / "data" / f"{shard}.tar", members)
    return tmp_path / "data"


def config(model: Path, **magnitude: Any) -> Config:
    return Config.parse(
        {"images": {"encoder": None}, "magnitude": {"model": str(model), "batch_size": BATCH, "seeds": 2, **magnitude}}
    )


def magnitudes(scorer: Scorer) -> npt.NDArray[np.float32]:
    scores: npt.NDArray[np.float32] = scorer.score(run_captions()).mean((1, 2), dtype=np.float64).astype(np.float32)
    return scores


def test_a_run_masks_exactly_the_captions_at_or_above_the_threshold(
    shards: Path, model: Path, scorer: Scorer, tmp_path: Path
) -> None:
    expected = magnitudes(scorer)
    lowest = float(np.sort(expected)[20])
    manifest = memfilter.run([str(shards)], tmp_path / "out", config(model, threshold=lowest), workers=1)
    rows = {int(row["key"]): row for row in manifest.table().to_pylist()}
    assert len(rows) == 30
    for i, row in rows.items():
        assert row["magnitude"] == expected[i]
        assert row["magnitude_eps"] == pytest.approx(expected[i] / (4 * LATENT_SIDE**2) ** 0.5)
        masked = expected[i] >= lowest
        assert row["action"] == ("mask" if masked else "keep")
        assert row["loss_weight"] == (0 if masked else 1)
        assert ("magnitude" in row["reasons"]) == masked
    assert manifest.counts["mask"] == (expected >= lowest).sum() >= 10
    assert manifest.info["threshold"] == lowest
    assert manifest.info["magnitude"]["seeds"] == 2
    assert memfilter.verify(tmp_path / "out") == []


def test_another_threshold_needs_no_model_and_equals_a_fresh_run(shards: Path, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    first, fresh = tmp_path / "first", tmp_path / "fresh"
    memfilter.run([str(shards)], first, config(folder), workers=1)
    wanted = {"quantile": 0.8}
    memfilter.run([str(shards)], fresh, config(folder, threshold=wanted), workers=1)
    folder.rename(tmp_path / "moved away")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"magnitude": {"threshold": wanted}}))
    before = tree(first)
    manifest = memfilter.rethreshold(first, file, workers=1)
    assert manifest.counts["mask"] == 6
    assert tree(first) == tree(fresh) != before
    file.write_text("magnitude: {threshold: null}")
    memfilter.rethreshold(first, file, workers=1)
    assert tree(first) == before


def test_a_manifest_does_not_tell_where_the_model_lay(shards: Path, model: Path, tmp_path: Path) -> None:
    trees = []
    for place in ("here", "there"):
        folder = Path(shutil.copytree(model, tmp_path / place / "model"))
        memfilter.run([str(shards)], tmp_path / place / "out", config(folder, threshold=1.0), workers=1)
        trees.append(tree(tmp_path / place / "out"))
    assert trees[0] == trees[1]


@pytest.mark.parametrize("text", ["[]", "{}", "{cut", '{"_class_name": "StableDiffusionPipeline"}'])
def test_a_folder_that_is_half_a_pipeline_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json does not say|this version scores") as error:
        find_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_pipeline_without_its_parts_names_them(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((models["epsilon"] / "model_index.json").read_bytes())
    with pytest.raises(ModelError, match="has no scheduler, text_encoder, tokenizer, unet folder"):
        find_model(str(tmp_path))
