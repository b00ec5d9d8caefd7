"""The example of training with mitigations, run as it stands on a real run and a small real pipeline."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import encoded, picture, sample, write_tar
from pipelines import write_pipeline

import memfilter
from memfilter import Config

FIRST = ["a calm lake", "boats at rest", "fog before sunrise"]
TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train_with_mitigations.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, the first there three times with captions of its own, and one that is masked."""
    folder = tmp_path_factory.mktemp("run")
    members = [m for i in range(3) for m in sample(f"{i}", encoded(picture(0), quality=92 - i), FIRST[i])]
    members += [m for i in range(3, 8) for m in sample(f"{i}", encoded(picture(i)), f"a picture {i}")]
    members += sample("8", encoded(picture(7)), "a picture 7")
    write_tar(folder / "data" / "0.tar", members)
    policy = {"partial_duplicate": "drop", "full_duplicate": "mask"}
    config = Config.parse({"images": {"encoder": None, "keep": ["bytes", "uid"]}, "policy": policy})
    manifest = memfilter.run([str(folder / "data")], folder / "out", config, workers=1)
    assert manifest.counts == {"read": 9, "keep": 6, "mask": 1, "drop": 2, "bad": 0}
    return manifest.path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    for i, name in enumerate(("dog", "garbage_truck")):
        (folder / name).mkdir()
        picture(30 + i).save(folder / name / "0.png")
    return folder


def steps(printed: str) -> list[tuple[float, str]]:
    """Return each step's loss and first caption."""
    found = [re.fullmatch(r"step \d+: loss ([\d.]+), first caption: (.+)", line) for line in printed.splitlines()]
    return [(float(match[1]), match[2]) for match in found if match]


def test_it_trains_with_several_captions_tokens_noise_and_fusion_and_repeats_exactly(
    run: Path, pipeline: Path, objects: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(*arguments: str | Path) -> list[tuple[float, str]]:
        monkeypatch.setattr(sys, "argv", [str(TRAIN), str(run), str(pipeline), *map(str, arguments)])
        runpy.run_path(str(TRAIN), run_name="__main__")
        return steps(capsys.readouterr().out)

    everything = ["--tokens", "1", "--objects", objects]
    every = trained("--steps", "8", *everything)
    assert len(every) == 8
    assert all(0 < loss < 5 for loss, _ in every)
    words = [{*text.split()} for _, text in every]
    assert all(text.count(" ") == 4 for _, text in every)
    assert len({text for _, text in every}) > 4  # each epoch, one batch here, draws anew
    assert len({text for text in FIRST if any({*text.split()} <= w for w in words)}) > 1

    assert trained("--steps", "3", *everything) == every[:3]

    plain = trained("--steps", "3", "--tokens", "0", "--noise", "0")
    assert {text for _, text in plain} <= {*FIRST}
    assert [loss for loss, _ in plain] != [loss for loss, _ in every[:3]]
