"""The example of sampling under a mitigation, run as it stands, and the benchmark of mitigations in short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import write_pipeline

from memfilter.demo.data import samples
from memfilter.demo.memorized import ALIKE, MODEL
from memfilter.inference import magnitudes, with_optimised_embeddings

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import inference as benchmark
from magnitudes import ONCE, REPEATED, by_times

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sample_safely.py"
PROMPTS = ["a dog on a cat", "of one dog"]


def test_the_example_prints_magnitudes_and_saves_the_images(tmp_path: Path) -> None:
    folder, out = write_pipeline(tmp_path / "model"), tmp_path / "images"
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def call() -> dict[str, object]:
        return {"generator": [torch.Generator().manual_seed(i) for i in (3, 4)], "num_inference_steps": 2}

    before = magnitudes(pipe, PROMPTS, **call())
    target = float(before.mean())
    expected = with_optimised_embeddings(pipe, PROMPTS, target=target, **call())
    assert sorted(expected.steps > 0) == [False, True]
    options = ["--target", repr(target), "--steps", "2", "--seed", "3", "--out", str(out)]
    command = [sys.executable, str(EXAMPLE), str(folder), *PROMPTS, *options]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    lines = [re.fullmatch(r"(\d+\.\d+) -> (\d+\.\d+), (\d+) steps: (.+)", line) for line in done.stdout.splitlines()]
    for i, line in enumerate(lines):
        assert line is not None
        assert line[4] == PROMPTS[i]
        assert float(line[1]) == pytest.approx(float(expected.before[i]), abs=2e-3)
        assert float(line[2]) == pytest.approx(float(expected.after[i]), abs=2e-3)
        assert int(line[3]) == expected.steps[i]
        with Image.open(out / f"{i:03}.png") as image:
            apart = np.abs(np.asarray(image, int) - np.asarray(expected.output.images[i], int))
        assert apart.max() <= 2
    assert len(lines) == 2


def test_the_benchmark_counts_what_is_drawn_again_under_each_mitigation() -> None:
    by = by_times(samples())
    pairs = {kind: by[kind][:3] for kind in (REPEATED, ONCE)}
    only = ("random tokens, 4", "optimised, learning rate 0.2")
    result = benchmark.evaluate(MODEL, pairs, [p.caption for p in by[ONCE][3:20]], only, rounds=1)
    assert list(result["mitigations"]) == [benchmark.NONE, *only]
    assert result["mitigations"][benchmark.NONE]["cost"] == [1, 1, 1]
    none, optimised = (result["mitigations"][name]["kinds"] for name in (benchmark.NONE, only[1]))
    assert (none[REPEATED]["drawn_again"], none[ONCE]["drawn_again"]) == (3, 0)
    assert none[REPEATED]["likeness_to_picture"][0] > ALIKE + 0.03
    assert none[ONCE]["likeness_to_picture"][2] < 0.5
    assert none[REPEATED]["likeness_to_plain"] == [1, 1, 1]
    assert none[REPEATED]["under_target"] == {"before": 0, "after": 0}
    assert none[ONCE]["under_target"]["before"] == 3
    assert optimised[REPEATED]["magnitude_after"][2] < optimised[REPEATED]["magnitude_before"][0]
    assert optimised[REPEATED]["drawn_again"] < 3
    assert optimised[REPEATED]["likeness_to_picture"][0] < ALIKE - 0.1
    assert optimised[REPEATED]["under_target"]["after"] > 0
    assert optimised[ONCE]["steps"] == [0, 0, 0]
    assert optimised[ONCE]["magnitude_before"][2] < 0.9 * result["reference"]["target"]
    assert optimised[ONCE]["likeness_to_plain"] == [1, 1, 1]
