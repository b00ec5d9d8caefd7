"""Trajectories and pairs against real pipelines and the formula written out, and what a run makes of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import encoded, picture, sample, write_tar
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from pipelines import LATENT_SIDE, rounding, write_family, write_pipeline
from test_denoisers import PLAIN, Own

import memfilter
from memfilter import Config, ConfigError, ModelError
from memfilter.images import cropped
from memfilter.magnitude import Scorer, release, warm_scorer
from memfilter.records import Floats
from memfilter.scores import score_captions
from memfilter.store import Store
from memfilter.thresholds import Threshold

CAPTIONS = ["a dog on a mat", "cat", "the van gogh cafe terrace"]
KINDS = ("epsilon", "v_prediction", "sample")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("modes")
    return {
        **{kind: write_pipeline(folder / kind, kind) for kind in KINDS},
        **{family: write_family(folder / family, family) for family in ("sdxl", "sd3")},
    }


# -- the trajectory ---------------------------------------------------------------------------------------------------


def plain(pipe: Any, family: str, caption: str, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    if family in PLAIN:
        e_c, e_u = PLAIN[family](pipe, caption, x, t)
        return e_c, e_u
    states = pipe.encode_prompt([caption], "cpu", 1, True, [""])
    return tuple(pipe.unet(x, t, encoder_hidden_states=s).sample for s in states)  # type: ignore[return-value]


@torch.inference_mode()
def along_the_pipeline(folder: Path, family: str, caption: str, seed: int, steps: int) -> list[float]:
    """The norms at the latents that the real pipeline itself goes through with guidance 7.5."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    side = LATENT_SIDE * pipe.vae_scale_factor
    noise = torch.randn((1, 4, LATENT_SIDE, LATENT_SIDE), generator=torch.Generator().manual_seed(seed))
    seen, times = [noise], []

    def keep(_: Any, i: int, t: torch.Tensor, found: dict[str, Any]) -> dict[str, Any]:
        seen.append(found["latents"])
        times.append(float(t))
        pipe._interrupt = i + 1 == steps
        return found

    pipe(
        caption,
        latents=noise,
        num_inference_steps=50,
        guidance_scale=7.5,
        height=side,
        width=side,
        output_type="latent",
        callback_on_step_end=keep,
    )
    norms = []
    for x, t in zip(seen, times[:steps], strict=False):
        e_c, e_u = plain(pipe, family, caption, x, t)
        norms.append(float((e_c - e_u).norm()))
    return norms


@pytest.mark.parametrize("family", [*KINDS, "sdxl", "sd3"])
def test_a_trajectory_is_scored_where_the_pipeline_itself_goes(models: dict[str, Path], family: str) -> None:
    scorer = Scorer.load(str(models[family]), seeds=2, batch_size=4, mode="trajectory", steps=4)
    scores = scorer.score(CAPTIONS)
    assert scores.shape == (3, 2, 4)
    for caption, row in zip(CAPTIONS[:2], scores, strict=False):
        for seed in range(2):
            expected = along_the_pipeline(models[family], family, caption, seed, 4)
            np.testing.assert_allclose(row[seed], expected, rtol=2e-4)


def test_a_trajectorys_first_step_is_the_prompts_own_score(models: dict[str, Path]) -> None:
    prompt = Scorer.load(str(models["epsilon"]), seeds=2, batch_size=4)
    one = Scorer(prompt.denoiser, 2, 4, "trajectory", steps=1)
    assert np.array_equal(one.score(CAPTIONS), prompt.score(CAPTIONS))
    assert one.scoring.guidance == 7.5
    assert prompt.scoring.guidance is None


def test_the_guidance_leads_the_trajectory(models: dict[str, Path]) -> None:
    denoiser = Scorer.load(str(models["epsilon"])).denoiser
    low, high = (Scorer(denoiser, 1, 4, "trajectory", steps=3, guidance=g).score(CAPTIONS) for g in (1.0, 12.0))
    assert np.array_equal(low[:, :, 0], high[:, :, 0])
    assert (low[:, :, 1:] != high[:, :, 1:]).all()


# -- pairs ------------------------------------------------------------------------------------------------------------


def photos(count: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(picture(i).resize((width, height)).convert("RGB")) for i in range(count)])


@torch.inference_mode()
def pair_by_formula(folder: Path, caption: str, image: npt.NDArray[np.uint8], seed: int, t: int) -> float:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    alpha_bar = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod[t]
    pixels = torch.tensor(image / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))
    x = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    e_c, e_u = plain(pipe, "sd", caption, x, t)
    return float((e_c - e_u).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_scored_at_its_images_noised_latents(models: dict[str, Path], kind: str) -> None:
    scorer = Scorer.load(str(models[kind]), seeds=2, batch_size=2, mode="pair", timesteps=(100, 700))
    images = photos(3, *scorer.denoiser.image_size)
    scores = scorer.score_pairs(CAPTIONS, images)
    assert scores.shape == (3, 2, 2)
    for i, caption in enumerate(CAPTIONS):
        for seed in range(2):
            for j, t in enumerate((100, 700)):
                expected = pair_by_formula(models[kind], caption, images[i], seed, t)
                assert scores[i, seed, j] == pytest.approx(expected, rel=1e-4)


def test_a_pairs_company_changes_its_score_by_rounding_alone(models: dict[str, Path]) -> None:
    scorer = Scorer.load(str(models["epsilon"]), batch_size=2, mode="pair", timesteps=(500,))
    images = photos(3, *scorer.denoiser.image_size)
    together = scorer.score_pairs(CAPTIONS, images)
    alone = [scorer.score_pairs([c], images[i : i + 1]) for i, c in enumerate(CAPTIONS)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=rounding(scorer))
    assert not scorer.score_pairs(["", "a dog"], images[:2])[0].any()
    assert scorer.score_pairs([], images[:0]).shape == (0, 1, 1)


def test_the_image_matters_and_not_the_caption_alone(models: dict[str, Path]) -> None:
    scorer = Scorer.load(str(models["epsilon"]), batch_size=2, mode="pair", timesteps=(100,))
    one, other = scorer.score_pairs(["a dog", "a dog"], photos(2, *scorer.denoiser.image_size))
    assert one != other


def test_a_scorer_of_one_mode_says_what_the_other_needs(models: dict[str, Path]) -> None:
    pair = Scorer.load(str(models["epsilon"]), mode="pair", timesteps=(100,), batch_size=2)
    with pytest.raises(ConfigError, match="call score_pairs"):
        pair.score(["a dog"])
    with pytest.raises(ConfigError, match=r"images of shape \(1, 7, 7, 3\)"):
        pair.score_pairs(["a dog"], np.zeros((1, 7, 7, 3), np.uint8))
    with pytest.raises(ConfigError, match="call score"):
        Scorer.load(str(models["epsilon"]), batch_size=2).score_pairs(["a"], photos(1, *pair.denoiser.image_size))


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (8, 8), (33, 65)])
def test_an_image_is_scaled_to_cover_and_cut_to_its_middle(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    found = cropped(np.ascontiguousarray(ramp), 16, 24)
    assert found.shape == (16, 24, 3)
    left, right = found[8, 0, 0] / 255, found[8, -1, 0] / 255
    shown = min(1.0, (24 / 16) / (width / height))  # the share of its width that is left
    assert left == pytest.approx((1 - shown) / 2, abs=0.1)
    assert right == pytest.approx((1 + shown) / 2, abs=0.1)


# -- memory -----------------------------------------------------------------------------------------------------------


class Small(Own):
    """A denoiser whose device has room for three captions at a time."""

    def predict(self, x: torch.Tensor, timestep: float, condition: Any) -> torch.Tensor:
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().predict(x, timestep, condition)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    captions = ["x" * i for i in range(1, 12)]
    with caplog.at_level(logging.WARNING):
        scorer = Scorer(Small(), batch_size=3)
        scorer.batch_size = 8  # as if memory had become short since the first batch
        scores = scorer.score(captions)
    np.testing.assert_allclose(scores[:, 0, 0], [2.0 * i for i in range(1, 12)], rtol=1e-6)
    assert scorer.batch_size == 2
    told = [r.getMessage().split(";")[0] for r in caplog.records]
    assert told == ["out of memory with 8 captions", "out of memory with 4 captions"]


class Short(Own):
    """A denoiser whose text encoder has room for three captions at a time."""

    def encode(self, captions: list[str]) -> Any:
        if len(captions) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().encode(captions)


def test_a_text_encoder_that_runs_out_of_memory_halves_the_batch_too() -> None:
    scorer = Scorer(Short(), batch_size=8)
    np.testing.assert_allclose(scorer.score(["four", "", "sixsix"])[:, 0, 0], [8, 0, 12], rtol=1e-6)
    assert scorer.batch_size == 2


class Tiny(Own):
    """A denoiser whose device has room for nothing."""

    def predict(self, x: torch.Tensor, timestep: float, condition: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_single_caption_that_does_not_fit_is_told() -> None:
    with pytest.raises(ModelError, match="out of memory with a single caption"):
        Scorer(Tiny(), batch_size=4)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of distinct pictures; one has no caption, one is damaged behind its header, one is no image."""
    folder = tmp_path_factory.mktemp("pairs")
    for shard in range(2):
        members = []
        for i in range(7):
            number = 7 * shard + i
            members += sample(f"{i:03}", encoded(picture(number, 48 + 4 * i, 64), "PNG"), f"picture number {number}")
        members += sample("bad", b"no image at all", "a broken one")
        write_tar(folder / f"{shard:05}.tar", members)
    return folder


def config(model: Path, **magnitude: Any) -> Config:
    values = {"model": str(model), "mode": "pair", "timesteps": (200, 600), "batch_size": 2, **magnitude}
    return Config.parse({"images": {"encoder": None}, "magnitude": values})


def tree(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("run.json", ".lock")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_a_run_scores_every_pair_and_masks_those_at_or_above_the_threshold(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    manifest = memfilter.run(
        [str(shards)], tmp_path / "out", config(models["epsilon"], threshold={"quantile": 0.75}), 1
    )
    rows = manifest.table().to_pylist()
    scorer = Scorer.load(str(models["epsilon"]), batch_size=2, mode="pair", timesteps=(200, 600))
    for row in rows:
        if row["action"] == "bad":
            assert row["magnitude"] is None
            continue
        number = 7 * int(row["shard"][:5]) + int(row["key"])
        pixels = np.asarray(picture(number, 48 + 4 * int(row["key"]), 64))
        image = cropped(pixels, *scorer.denoiser.image_size)
        expected = scorer.score_pairs([f"picture number {number}"], image[None])
        assert row["magnitude"] == pytest.approx(float(expected.mean()), rel=1e-6)
        assert (row["action"] == "mask") == (row["magnitude"] >= manifest.info["threshold"])
    assert manifest.counts["mask"] == 4
    info = manifest.info["magnitude"]
    assert (info["mode"], info["timesteps"], info["unscored"], info["seeds"]) == ("pair", [200, 600], 0, 1)
    assert any(name.startswith("vae/") for name in info["files"])
    assert memfilter.verify(manifest.path) == []


def test_a_transparent_image_is_scored_as_a_training_script_sees_it(models: dict[str, Path], tmp_path: Path) -> None:
    image = picture(1, 64, 64)
    image.putalpha(picture(2, 64, 64).convert("L"))
    write_tar(tmp_path / "in" / "a.tar", sample("0", encoded(image, "PNG"), "a dog"))
    manifest = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config(models["epsilon"]), 1)
    scorer = Scorer.load(str(models["epsilon"]), batch_size=2, mode="pair", timesteps=(200, 600))
    seen = cropped(np.asarray(image.convert("RGB")), *scorer.denoiser.image_size)
    expected = float(scorer.score_pairs(["a dog"], seen[None]).mean())
    assert manifest.table()["magnitude"].to_pylist() == [pytest.approx(expected, rel=1e-6)]


def test_the_values_of_every_seed_and_timestep_are_kept_by_uid(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    manifest = memfilter.run([str(shards)], tmp_path / "out", config(models["epsilon"], seeds=2), 1)
    table = pq.read_table(tmp_path / "out" / "scores" / "pairs" / "00001.tar.parquet").to_pylist()
    rows = {r["uid"]: r for r in manifest.table().to_pylist()}
    for row in table:
        assert row["magnitude"] == rows[row["uid"]]["magnitude"]
        if row["values"] is not None:
            assert len(row["values"]) == 4
            assert np.mean(row["values"]) == pytest.approx(row["magnitude"], rel=1e-6)
    assert sum(row["values"] is None for row in table) == 1


def test_workers_with_a_device_each_write_what_one_writes(
    models: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process: another number of threads rounds otherwise
    for mode in ("pair", "prompt"):
        one, two = tmp_path / f"one-{mode}", tmp_path / f"two-{mode}"
        memfilter.run([str(shards)], one, config(models["epsilon"], mode=mode), 1)
        with monkeypatch.context() as small:
            small.setattr("memfilter.scores._PASSES", 4)
            memfilter.run([str(shards)], two, config(models["epsilon"], mode=mode, devices=["cpu", "cpu"]), 1)
        assert tree(one) == tree(two)


def test_an_interrupted_run_goes_on_within_a_shard(
    models: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    memfilter.run([str(shards)], whole, config(models["epsilon"]), 1)
    monkeypatch.setattr("memfilter.scores._PASSES", 8)  # parts of two pairs
    scored: list[int] = []
    score_pairs = Scorer.score_pairs

    def interrupted(self: Scorer, captions: list[str], images: npt.NDArray[np.uint8]) -> Floats:
        scored.append(len(captions))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score_pairs(self, captions, images)

    monkeypatch.setattr(Scorer, "score_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memfilter.run([str(shards)], cut, config(models["epsilon"]), 1)
    memfilter.run([str(shards)], cut, config(models["epsilon"]), 1)
    assert sum(scored) == 2 + 2 + 2 + (7 - 4) + 7  # the third time for nothing
    assert tree(cut) == tree(whole)


def test_an_image_that_only_the_whole_decode_finds_broken_is_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encoded(picture(1, 64, 64), "PNG")
    write_tar(
        tmp_path / "in" / "a.tar", sample("0", good, "good") + sample("1", encoded(picture(2, 64, 64), "PNG"), "b")
    )
    out = tmp_path / "out"
    memfilter.run(
        [str(tmp_path / "in")], out, config(models["epsilon"]).model_copy(update={"magnitude": Config().magnitude}), 1
    )
    # signed with a larger bound than the second one is read with
    small = config(models["epsilon"], threshold=0.0)
    from memfilter import images

    decode = images.decode

    def strict(data: bytes, full: bool, *rest: Any, **more: Any) -> Any:
        if full and data != good:
            raise images.BadImage("unreadable_image", "its end is missing")
        return decode(data, full, *rest, **more)

    monkeypatch.setattr(images, "decode", strict)
    rows = memfilter.run([str(tmp_path / "in")], out, small, 1, update=True).table().to_pylist()
    assert [(r["action"], r["detail"]) for r in rows] == [("mask", None), ("keep", "no magnitude: its end is missing")]
    assert rows[1]["magnitude"] is None


def test_a_shard_that_changed_before_its_pairs_are_scored_is_told(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "in"))
    plain_config = Config.parse({"images": {"encoder": None}})
    memfilter.run([str(folder)], tmp_path / "out", plain_config, 1)
    write_tar(folder / "00001.tar", sample("000", encoded(picture(50), "PNG"), "another"))
    (tmp_path / "pair.yaml").write_text(
        yaml.safe_dump({"magnitude": config(models["epsilon"]).model_dump(mode="json")["magnitude"]})
    )
    with pytest.raises(
        memfilter.ShardError, match=r"00001\.tar: has changed since it was read; run 'memfilter run' again"
    ):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "pair.yaml", 1)


def test_no_score_of_another_shards_pictures_stays(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "in"))
    memfilter.run([str(folder)], tmp_path / "out", Config.parse({"images": {"encoder": None}}), 1)
    members = [m for i in range(7) for m in sample(f"{i:03}", encoded(picture(90 + i), "PNG"), "another")]
    write_tar(folder / "00001.tar", [*members, *sample("bad", b"no image", "a broken one")])
    wanted = config(models["epsilon"])
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump({"magnitude": wanted.model_dump(mode="json")["magnitude"]}))
    with pytest.raises(memfilter.ShardError, match=r"00001\.tar: has changed since it was read"):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "pair.yaml", 1)
    shutil.copy(shards / "00001.tar", folder)
    memfilter.rethreshold(tmp_path / "out", tmp_path / "pair.yaml", 1)
    memfilter.run([str(folder)], tmp_path / "fresh", wanted, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_caption_is_kept_out_of_pools_where_a_pair_with_it_is_memorized(
    models: dict[str, Path], tmp_path: Path
) -> None:
    members = sample("0", encoded(picture(0, 64, 64), "PNG"), "one") + sample(
        "1", encoded(picture(0, 64, 64), "PNG"), "two"
    )
    members += sample("2", encoded(picture(3, 64, 64), "PNG"), "two")
    write_tar(tmp_path / "in" / "a.tar", members)
    rows = memfilter.run([str(tmp_path / "in")], tmp_path / "out", config(models["epsilon"]), 1).table().to_pylist()
    high = max(rows, key=lambda r: r["magnitude"])
    between = sorted(r["magnitude"] for r in rows)[-1]
    wanted = config(models["epsilon"], threshold=between)
    rows = memfilter.run([str(tmp_path / "in")], tmp_path / "out", wanted, 1, update=True).table().to_pylist()
    text = ["one", "two", "two"][int(high["key"])]
    pools = [r["captions"] for r in rows if r["captions"] is not None]
    assert pools
    assert all(text not in pool for pool in pools)


def test_a_rate_of_captions_is_refused_for_pairs_before_anything_is_read(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    wanted = {"false_positive_rate": 0.01, "reference": "reference.txt"}
    with pytest.raises(ConfigError, match=r"in mode 'pair' these need images; [^\n]+$"):
        memfilter.run([str(shards)], tmp_path / "out", config(models["epsilon"], threshold=wanted), 1)
    assert not (tmp_path / "out").exists()


# -- thresholds that are kept -----------------------------------------------------------------------------------------


def test_a_quantile_is_taken_at_each_timestep_too_and_saved(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    manifest = memfilter.run(
        [str(shards)], tmp_path / "out", config(models["epsilon"], seeds=2, threshold={"quantile": 0.5}), 1
    )
    saved = Threshold.load(tmp_path / "out" / "manifest" / "threshold.json")
    assert saved.magnitude == manifest.info["threshold"]
    values = [
        row["values"]
        for name in ("00000", "00001")
        for row in pq.read_table(tmp_path / "out" / "scores" / "pairs" / f"{name}.tar.parquet").to_pylist()
        if row["values"]
    ]
    means = np.array(values, np.float32).reshape(-1, 2, 2).mean(1)
    expected = np.quantile(means, 0.5, axis=0, method="higher")
    assert saved.by_timestep is not None
    assert [t for t, _ in saved.by_timestep] == [200, 600]
    np.testing.assert_allclose([m for _, m in saved.by_timestep], expected, rtol=1e-6)


@pytest.fixture
def saved(models: dict[str, Path], shards: Path, tmp_path: Path) -> Path:
    memfilter.run([str(shards)], tmp_path / "first", config(models["epsilon"], threshold={"quantile": 0.5}), 1)
    return tmp_path / "first" / "manifest" / "threshold.json"


def test_a_saved_threshold_is_taken_over_by_a_run_of_the_same_model(
    models: dict[str, Path], shards: Path, tmp_path: Path, saved: Path
) -> None:
    wanted = config(models["epsilon"], threshold={"saved": str(saved)})
    again = memfilter.run([str(shards / "00001.tar")], tmp_path / "second", wanted, 1)
    assert again.info["threshold"] == Threshold.load(saved).magnitude
    assert again.info["config"]["magnitude"]["threshold"] == {"saved": "threshold.json"}
    assert Threshold.load(again.path / "manifest" / "threshold.json") == Threshold.load(saved)


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("v_prediction", {}, "files: scheduler/scheduler_config.json"),
        ("epsilon", {"dtype": "bfloat16"}, "dtype float32, and here it is bfloat16"),
        ("epsilon", {"timesteps": (200, 601)}, r"timesteps \[200, 600\], and here it is \[200, 601\]"),
        ("epsilon", {"seeds": 3}, "seeds 1, and here it is 3"),
    ],
)
def test_a_saved_threshold_is_refused_for_another_model_precision_or_schedule(
    models: dict[str, Path], shards: Path, tmp_path: Path, saved: Path, kind: str, changed: dict[str, Any], told: str
) -> None:
    wanted = config(models[kind], threshold={"saved": str(saved)}, **changed)
    with pytest.raises(ConfigError, match=rf"threshold\.json: was measured otherwise, {told}"):
        memfilter.run([str(shards / "00000.tar")], tmp_path / "second", wanted, 1)


def test_a_threshold_file_that_was_changed_or_is_none_is_refused_in_one_line(
    models: dict[str, Path], shards: Path, tmp_path: Path, saved: Path
) -> None:
    values = json.loads(saved.read_text())
    values["magnitude"] *= 2
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(values))
    other = tmp_path / "other.json"
    other.write_text("[]")
    for path, told in ((changed, "bytes have changed"), (other, "holds no threshold"), (tmp_path / "no", "holds no")):
        wanted = config(models["epsilon"], threshold={"saved": str(path)})
        with pytest.raises(ConfigError, match=rf"{path.name}: [^\n]*{told}[^\n]*$"):
            memfilter.run([str(shards)], tmp_path / "out", wanted, 1)
        assert not (tmp_path / "out").exists()


def test_a_rate_along_a_trajectory_is_held_at_each_timestep(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    reference = tmp_path / "reference.txt"
    lines = [f"an ordinary caption, number {i}" for i in range(8)]
    reference.write_text("\n".join(lines))
    wanted = config(
        models["epsilon"],
        mode="trajectory",
        steps=3,
        threshold={"false_positive_rate": 0.25, "reference": str(reference)},
    )
    memfilter.run([str(shards)], tmp_path / "out", wanted, 1)
    saved = Threshold.load(tmp_path / "out" / "manifest" / "threshold.json")
    scores = Scorer.load(str(models["epsilon"]), batch_size=2, mode="trajectory", steps=3).score(lines)[:, 0]
    assert saved.by_timestep is not None
    assert len(saved.by_timestep) == 3
    for (_, magnitude), column in zip(saved.by_timestep, scores.T, strict=True):
        assert (column >= np.float32(magnitude)).sum() == 2


# -- warm -------------------------------------------------------------------------------------------------------------


def test_a_model_stays_warm_from_run_to_run_and_is_let_go(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    from memfilter.denoisers import find_model

    wanted = config(models["epsilon"])
    memfilter.run([str(shards)], tmp_path / "one", wanted, 1)
    files = find_model(str(models["epsilon"]), images=True)
    warm = warm_scorer(files, wanted.magnitude, "cpu")
    memfilter.run([str(shards / "00000.tar")], tmp_path / "two", config(models["epsilon"], threshold=1.0), 1)
    assert warm_scorer(files, wanted.magnitude, "cpu") is warm
    release()
    assert warm_scorer(files, wanted.magnitude, "cpu") is not warm


def no_progress(sizes: Iterator[int], total: int, unit: str) -> Iterator[int]:
    return sizes


def test_a_compiled_model_scores_as_it_does_uncompiled(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    from memfilter.denoisers import find_model

    files, rows = find_model(str(models["sd3"])), np.arange(3)
    # torch keeps code by its source, and what it wrote for one kind of CPU may not compile for another
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    found = []
    for compile in (False, True):
        values = {"model": str(models["sd3"]), "compile": compile, "batch_size": 2}
        wanted = Config.parse({"magnitude": values})
        store = Store(tmp_path / str(compile))
        found.append(score_captions(pa.chunked_array([CAPTIONS]), rows, "", files, store, wanted, no_progress).samples)
    release()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


# -- further signals --------------------------------------------------------------------------------------------------

SIGNALS = ("attention_entropy", "anisotropy", "sharpness")


def test_further_signals_leave_the_magnitude_as_it_is(models: dict[str, Path]) -> None:
    alone = Scorer.load(str(models["epsilon"]), seeds=2, batch_size=4)
    beside = Scorer(alone.denoiser, 2, 4, signals=SIGNALS)
    found = beside.measure(CAPTIONS)
    assert list(found) == ["magnitude", *SIGNALS]
    assert np.array_equal(found["magnitude"], alone.score(CAPTIONS))
    assert all(found[name].shape == (3, 2) and np.isfinite(found[name]).all() for name in SIGNALS)
    some = Scorer(alone.denoiser, 2, 4, signals=("sharpness",)).measure(CAPTIONS)
    np.testing.assert_allclose(some["sharpness"], found["sharpness"], rtol=1e-5)


def test_a_run_writes_the_signals_that_are_asked_for(models: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    wanted = config(models["epsilon"], mode="prompt", signals=["attention_entropy", "anisotropy"])
    manifest = memfilter.run([str(shards)], tmp_path / "out", wanted, 1)
    scorer = Scorer.load(str(models["epsilon"]), batch_size=2, signals=SIGNALS[:2])
    for row in manifest.table().to_pylist():
        assert row["sharpness"] is None
        if row["action"] == "bad":
            assert row["anisotropy"] is None
            continue
        found = scorer.measure([f"picture number {7 * int(row['shard'][:5]) + int(row['key'])}"])
        for name in SIGNALS[:2]:
            assert row[name] == pytest.approx(float(found[name][0, 0]), rel=1e-5)


def test_signals_of_a_model_or_a_mode_that_has_none_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"attention entropy is not defined for StableDiffusion3[^\n]+$"):
        Scorer.load(str(models["sd3"]), batch_size=2, signals=SIGNALS[:1]).score(["a dog"])
    with pytest.raises(ConfigError, match=r"mode: prompt alone"):
        config(models["epsilon"], signals=["sharpness"])


def test_captions_that_the_model_cuts_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    members = sample("0", encoded(picture(0)), "short") + sample("1", encoded(picture(1)), "a very long one " * 40)
    write_tar(tmp_path / "in" / "a.tar", members)
    wanted = config(models["epsilon"], mode="prompt")
    assert memfilter.run([str(tmp_path / "in")], tmp_path / "out", wanted, 1).info["magnitude"]["cut"] == 1


# -- what cannot be scored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"mode": "image"}, {"mode": "pair"}, {"mode": "trajectory", "signals": ("sharpness",)}, {"signals": ("entropy",)}],
)
def test_a_scorer_of_no_mode_or_signal_is_refused_in_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$"):
        Scorer(Own(), **settings)


def test_a_timestep_beyond_the_models_last_is_told(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"no timestep 1000: the model's are 0 to 999"):
        Scorer.load(str(models["epsilon"]), mode="pair", timesteps=(1000,))


@pytest.mark.parametrize("devices", [["cuda:99"], ["gpu"], ["cpu", "cuda:99"]])
def test_a_device_that_is_not_here_is_told_before_anything_is_read(
    models: dict[str, Path], shards: Path, tmp_path: Path, devices: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"magnitude\.devices: no '(cuda:99|gpu)' here; there is [^\n]+$"):
        memfilter.run([str(shards)], tmp_path / "out", config(models["epsilon"], devices=devices), 1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed_since_the_run_is_not_scored_under_its_old_name(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["epsilon"], tmp_path / "model"))
    memfilter.run([str(shards)], tmp_path / "out", config(folder, mode="prompt"), 1)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\1")
    (tmp_path / "seeds.yaml").write_text("magnitude: {seeds: 2}")
    with pytest.raises(ModelError, match="has changed since the run read its files; bring it back, or"):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "seeds.yaml", 1, trust=True)
    weights.write_bytes(before)
    manifest = memfilter.rethreshold(tmp_path / "out", tmp_path / "seeds.yaml", 1, trust=True)
    assert manifest.info["magnitude"]["seeds"] == 2


def test_a_shard_that_is_gone_when_its_pairs_are_scored_is_told(
    models: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "in"))
    memfilter.run([str(folder)], tmp_path / "out", config(models["epsilon"], mode="prompt"), 1)
    (folder / "00001.tar").unlink()
    (tmp_path / "pair.yaml").write_text("magnitude: {mode: pair}")
    with pytest.raises(
        memfilter.ShardError, match=r"00001\.tar: [^\n]+; bring the shard back, or take another magnitude"
    ):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "pair.yaml", 1, trust=True)
