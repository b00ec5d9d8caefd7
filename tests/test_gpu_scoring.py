"""The GPU benchmark's steps on the CPU, with small shapes; its real shapes, without weights; sections that fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_scoring
from gpu_scoring import DRY, SHAPES


def check(section: dict[str, Any]) -> None:
    rates, eager = section["eager_unet_captions_per_second"], section["eager"]
    assert section["batch_size"] == eager["batch_size"] == int(max(rates, key=rates.get))
    assert eager["scores"]["finite"]
    assert eager["scores"]["least"] > 0
    # every caption of every round was scored, and as itself
    assert eager["scores"]["distinct"] == eager["scores"]["count"] == DRY.rounds * section["captions_per_round"]
    assert eager["ratio"] == pytest.approx(
        eager["end_to_end_captions_per_second"] / eager["bare_captions_per_second"], rel=1e-2
    )
    per_second = section["unet_tflops_per_caption"] * eager["bare_captions_per_second"]
    assert eager["bare_share_of_peak"] == pytest.approx(per_second / section["matrix_peak_tflops"], rel=0.05, abs=1e-3)
    assert set(section["seconds_per_batch_eager"]) == {"tokenising", "text_encoding", "transfer", "unet"}
    assert all(s >= 0 and math.isfinite(s) for s in section["seconds_per_batch_eager"].values())


def test_a_section_measures_a_pipeline_that_was_saved_and_loaded(tmp_path: Path) -> None:
    section: dict[str, Any] = {}
    for part in gpu_scoring.measured(DRY, "sdxl", "float32", tmp_path / "sdxl", is_compiled=False):
        section |= json.loads(json.dumps(part))
    check(section)


def test_a_dry_run_says_that_it_is_one(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, gpu_scoring.__file__, "--dry-run", "--models", "sd15", "--json", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads(out.read_text())
    assert result["dry_run"] is True
    assert "say nothing of a GPU" in result["note"]
    (section,) = result["sections"]
    assert (section["model"], section["dtype"], section["error"]) == ("sd15", "float32", None)
    check(section)


def test_a_section_that_fails_or_takes_too_long_leaves_its_cause(tmp_path: Path) -> None:
    failed = gpu_scoring.run_section("sd15", "float31", tmp_path, ["--dry-run"], 100)
    assert failed["device"]["name"] == "cpu"  # what it had measured before
    assert "float31" in failed["error"]
    stopped = gpu_scoring.run_section("sd15", "float32", tmp_path, ["--dry-run"], 0)
    assert stopped["error"] == "stopped after its 1 s"


def test_captions_are_distinct_and_short_enough_for_the_tokenizer() -> None:
    captions = gpu_scoring.captions(20_000) + gpu_scoring.captions(20_000, 20_000)
    assert len(set(captions)) == 40_000
    tokenizer = gpu_scoring._tokenizer()
    ids = tokenizer(captions[:500])["input_ids"]
    assert max(map(len, ids)) < 77
    assert len({tuple(row) for row in ids}) == 500
    # so that the tokenizer works about as hard as the real one
    assert sum(map(len, ids)) < 2 * sum(len(c.split()) for c in captions[:500])


@pytest.mark.parametrize(
    ("model", "unet", "clips", "tflops"),
    [("sd15", 859_520_964, [123_060_480], 0.80), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840], 6.74)],
)
def test_the_real_shapes_have_the_published_models_weights(
    model: str, unet: int, clips: list[int], tflops: float
) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    shape, tokenizer = SHAPES[model], gpu_scoring._tokenizer()
    with torch.device("meta"):
        made = UNet2DConditionModel(**shape.unet)
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        texts = [k(gpu_scoring.clip_config(c, tokenizer)) for k, c in zip(kinds, shape.clips, strict=False)]
    assert sum(p.numel() for p in made.parameters()) == unet
    assert [sum(p.numel() for p in text.parameters()) for text in texts] == clips

    side, width = shape.unet["sample_size"], shape.unet["cross_attention_dim"]
    kwargs: dict[str, Any] = {"encoder_hidden_states": torch.empty(2, 77, width, device="meta")}
    if model == "sdxl":
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(2, 1280, device="meta"),
            "time_ids": torch.empty(2, 6, device="meta"),
        }
    call = ((torch.empty(2, 4, side, side, device="meta"), 951), kwargs)
    # attention's own products, 0.12 and 0.76, are in them
    assert gpu_scoring.unet_flops(dict(made.config), call) / 2e12 == pytest.approx(tflops, rel=0.01)
