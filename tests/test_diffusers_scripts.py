"""The changes to diffusers' scripts in docs/diffusers_scripts.md, executed in equivalent loops of real small models."""

from __future__ import annotations

import itertools
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from pipelines import FAMILIES, LATENT_SIDE, WIDTH, _unet
from torch.utils.data import default_collate
from torchvision.transforms.functional import resize, to_tensor

import memfilter
from memfilter import Manifest
from memfilter.training import MaskedLoss, harmless, masked_loss

pytestmark = pytest.mark.usefixtures("one_thread")

DOC = Path(__file__).resolve().parents[1] / "docs" / "diffusers_scripts.md"
WEIGHT = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])  # with prior preservation: of three instances and their images
KEPT = torch.tensor([0, 2, 3, 5])
PRIOR = 0.7
Names = dict[str, Any]


# -- the document -----------------------------------------------------------------------------------------------------


def changes(section: str) -> list[str]:
    """Return the section's changes, in order."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", DOC.read_text(encoding="utf-8"), re.M | re.S)
    found: list[str] = re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S)
    assert found
    return found


def executed(change: str, side: str, names: Names, stays: tuple[str, ...] = ()) -> Names:
    """Execute a change's lines before ("-") or after ("+") it; `stays` takes the place of its dots, in order."""
    left, lines = list(stays), []
    for line in change.splitlines():
        if line[0] in (" ", side):
            code = line[1:]
            stands_for = textwrap.indent(left.pop(0), code[: -len("...")]) if code.strip() == "..." else code
            lines.append(stands_for)
    assert not left
    names = {"torch": torch, "F": F, "memfilter": memfilter, "wds": wds, "masked_loss": masked_loss, **names}
    exec(compile("\n".join(lines), f"{DOC.name} {side}", "exec"), names)
    return names


def test_the_document_changes_few_lines() -> None:
    text = DOC.read_text(encoding="utf-8")
    code = [line for change in re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S) for line in change.splitlines()]
    assert {line[0] for line in code} == {" ", "+", "-"}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)), {})  # the imports


# -- the losses -------------------------------------------------------------------------------------------------------


class Loop:
    """A batch of a diffusers script up to the loss: the names that its lines use, with a graph to leaf and model."""

    def __init__(self, kind: str, prediction_type: str | None = None, snr_gamma: float | None = None) -> None:
        draw = torch.Generator().manual_seed(1)
        shape = (len(WEIGHT), 4, LATENT_SIDE, LATENT_SIDE)
        self.latents, self.noise = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        self.states = torch.randn(len(WEIGHT), 7, WIDTH * (1 if kind in ("full", "lora") else 2), generator=draw)
        self.pooled = torch.randn(len(WEIGHT), WIDTH * (2 if kind == "sd3" else 1), generator=draw)
        self.timesteps = torch.tensor([20, 999, 400, 700, 3, 120])
        self.kind, self.model = kind, model_of(kind)
        self.args = SimpleNamespace(prediction_type=prediction_type, snr_gamma=snr_gamma, prior_loss_weight=PRIOR)
        self.scheduler = DDPMScheduler(prediction_type=prediction_type or "epsilon")

    def names(self, kept: torch.Tensor | slice = slice(None), prior: bool = False, scheme: str = "none") -> Names:
        """Return what the script's lines before the loss leave, for these of the samples."""
        latents, noise = self.latents[kept].clone().requires_grad_(), self.noise[kept].clone().requires_grad_()
        t, states, pooled = self.timesteps[kept], self.states[kept], self.pooled[kept]
        made: Names = {"latents": latents, "noise": noise, "timesteps": t, "encoder_hidden_states": states}
        self.args.with_prior_preservation = prior
        if self.kind == "sd3":
            t = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[999 - t]
            sigmas = (t / 1000).view(-1, 1, 1, 1)
            noisy, made["target"] = (1 - sigmas) * latents + sigmas * noise, noise - latents
            made["weighting"] = compute_loss_weighting_for_sd3(scheme, sigmas)
            arguments: Names = {"hidden_states": noisy, "timestep": t, "pooled_projections": pooled}
        else:
            velocity = self.args.prediction_type == "v_prediction"
            made["target"] = self.scheduler.get_velocity(latents, noise, t) if velocity else noise
            arguments = {"sample": self.scheduler.add_noise(latents, noise, t), "timestep": t}
            if self.kind == "sdxl":
                arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(len(t), 6)}
        made["model_pred"] = self.model(encoder_hidden_states=states, return_dict=False, **arguments)[0]
        made["min_snr"] = lambda: min_snr(self.scheduler, t.chunk(2)[0] if prior else t, self.args.snr_gamma)
        return {**made, "args": self.args, "unet": self.model, "noise_scheduler": self.scheduler}

    def loss(self, change: str, side: str, names: Names, weight: torch.Tensor | None = None) -> torch.Tensor:
        stays = ("loss, mse_loss_weights = F.mse_loss(model_pred, target, reduction='none'), min_snr()",)
        batch = {"loss_weight": weight}
        return executed(change, side, {**names, "batch": batch}, stays if "..." in change else ())["loss"]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad]))


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind in ("sdxl", "sd3"):
        pipe = FAMILIES[kind](**({"t5": False} if kind == "sd3" else {}))
        return (pipe.unet if kind == "sdxl" else pipe.transformer).train()
    unet = _unet().train()
    if kind == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"]))
    return unet


def min_snr(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    snr = compute_snr(scheduler, timesteps)
    return snr.clamp(max=gamma) / (snr + (scheduler.config.prediction_type == "v_prediction"))


def assert_obeyed(loop: Loop, change: str, prior: bool = False, scheme: str = "none", before: Any = None) -> None:
    """Assert that a change does what it says; `before` gives the loss before it where the change's lines cannot."""
    before = before or (lambda names: loop.loss(change, "-", names))
    names = loop.names(prior=prior, scheme=scheme)
    ones = loop.loss(change, "+", names, torch.ones(len(WEIGHT)))
    assert ones.item() == pytest.approx(before(names).item(), rel=1e-6, abs=1e-6)
    # a mean over fewer samples is larger by the ratio of their counts
    alone = before(loop.names(KEPT, prior, scheme)) * len(KEPT) / len(WEIGHT)
    masked = loop.loss(change, "+", names, WEIGHT)
    assert masked.item() == pytest.approx(alone.item(), rel=1e-6, abs=1e-6)
    for leaf in torch.autograd.grad(masked, [names["latents"], names["noise"]], retain_graph=True):
        assert not leaf[WEIGHT == 0].any()
        assert leaf[WEIGHT > 0].flatten(1).any(1).all()
    expected = loop.gradients(alone)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for one, other in zip(loop.gradients(masked), expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-6 * max(1.0, largest)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize(("kind", "prediction"), [("full", "epsilon"), ("lora", "epsilon"), ("sdxl", "v_prediction")])
def test_text_to_image(kind: str, prediction: str, snr_gamma: float | None) -> None:
    change, _ = changes("Full fine-tuning, LoRA, SDXL")
    assert_obeyed(Loop(kind, prediction, snr_gamma), change)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_in_one_call_is_that_of_the_scripts_lines(snr_gamma: float | None) -> None:
    lines, call = changes("Full fine-tuning, LoRA, SDXL")
    loop = Loop("full", "v_prediction", snr_gamma)

    def loss(names: Names, weight: torch.Tensor) -> torch.Tensor:
        names = {**names, "MaskedLoss": MaskedLoss, "batch": {"loss_weight": weight}}
        return executed(call, "+", names, ("pass",))["loss"]

    names = loop.names()
    before = loop.loss(lines, "-", names)
    assert loss(names, torch.ones(len(WEIGHT))).item() == pytest.approx(before.item(), abs=1e-6)
    expected = loop.loss(lines, "+", names, WEIGHT)
    loop.latents[WEIGHT == 0] = float("nan")
    assert loss(loop.names(), WEIGHT).item() == pytest.approx(expected.item(), abs=1e-6)
    assert loop.loss(lines, "+", loop.names(), WEIGHT).isnan()
    (line,) = re.findall("`(latents = harmless.*?)`", DOC.read_text(encoding="utf-8"))
    batch = {"loss_weight": WEIGHT}
    loop.latents = executed(f"+{line}", "+", {"harmless": harmless, "latents": loop.latents, "batch": batch})["latents"]
    assert loop.loss(lines, "+", loop.names(), WEIGHT).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_prior_preservation(snr_gamma: float | None, prior: bool) -> None:
    _, change = changes("Prior preservation")
    assert_obeyed(Loop("sdxl", "epsilon", snr_gamma), change, prior)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal"])
def test_sd3(scheme: str, prior: bool) -> None:
    (change,) = changes("SD3")
    loop = Loop("sd3")

    def before(names: Names) -> torch.Tensor:
        """Return the sum of the halves' losses, each of them without prior preservation."""
        loop.args.with_prior_preservation = False
        halves = [
            loop.loss(change, "-", {**names, **dict(zip(PARTED, parts, strict=True))})
            for parts in zip(*(names[name].chunk(2) for name in PARTED), strict=True)
        ]
        loop.args.with_prior_preservation = True
        return halves[0] + PRIOR * halves[1]

    assert_obeyed(loop, change, prior, scheme, before if prior else None)


PARTED = ("model_pred", "target", "weighting")


def test_sd3s_script_fails_as_the_document_says_and_not_for_one_instance() -> None:
    (change,) = changes("SD3")
    loop = Loop("sd3")
    with pytest.raises(RuntimeError, match="must match"):
        loop.loss(change, "-", loop.names(prior=True))
    names = loop.names(slice(0, 2), prior=True)
    before, after = loop.loss(change, "-", names), loop.loss(change, "+", names, torch.ones(2))
    assert after.item() == pytest.approx(before.item(), abs=1e-6)


# -- the weights ------------------------------------------------------------------------------------------------------


def test_rows_of_a_hugging_face_data_set_carry_their_weights(
    masked_run: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    load, collate, join = changes("The weight in the batch")
    monkeypatch.chdir(masked_run.path.parent)
    assert masked_run.path.name == "run"
    args = SimpleNamespace(cache_dir=str(tmp_path))
    data = executed(load, "+", {"args": args, "load_dataset": datasets.load_dataset})["dataset"]["train"]
    assert data.column_names == ["image", "text", "loss_weight"]

    def preprocess_train(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples["pixel_values"] = [to_tensor(resize(image, [16, 16])) for image in examples["image"]]
        examples["input_ids"] = [torch.tensor([len(text)]) for text in examples["text"]]
        return examples

    stays = "pixel_values, input_ids = (torch.stack([e[n] for e in examples]) for n in ('pixel_values', 'input_ids'))"
    collate_fn = executed(collate, "+", {}, (stays,))["collate_fn"]
    loader = torch.utils.data.DataLoader(data.with_transform(preprocess_train), batch_size=15, collate_fn=collate_fn)
    (batch,) = loader
    assert batch["pixel_values"].shape == (15, 3, 16, 16)
    assert batch["loss_weight"].tolist() == [1.0] * 12 + [0.0] * 3
    assert batch["loss_weight"].dtype == torch.float32
    # SDXL: what is stored has the weights of another manifest
    stored = data.remove_columns("loss_weight").add_column("loss_weight", [1.0] * 15)
    embedded, encoded = stored.add_column("prompt_embeds", [1] * 15), stored.add_column("model_input", [2] * 15)
    names = {"train_dataset_with_embeddings": embedded, "train_dataset_with_vae": encoded, "dataset": {"train": data}}
    names["concatenate_datasets"] = datasets.concatenate_datasets
    joined = executed(join, "+", names)["precomputed_dataset"]
    assert joined.column_names == ["image", "text", "prompt_embeds", "model_input", "loss_weight"]
    assert joined["loss_weight"][:] == data["loss_weight"][:]
    with pytest.raises(ValueError, match="duplicated"):
        executed(join, "-", names)


@pytest.mark.parametrize("prior", [False, True])
def test_dreambooths_examples_carry_their_weights(prior: bool) -> None:
    change, _ = changes("Prior preservation")
    stays = (
        "images = [image for image in dataset['train']['image'] for _ in range(repeats)]; "
        "self.instance_images, self.num_instance_images = images, len(images)",
        "example = {'instance_images': self.instance_images[index % self.num_instance_images], 'class_images': index}",
        "images = [example['instance_images'] for example in examples]",
        "images += [example['class_images'] for example in examples]",
        "batch = {'images': images}",
    )
    dataset = {"train": {"image": ["a", "b", "c"], "loss_weight": [1.0, 0.0, 0.5]}}
    made = executed(change, "+", {"Dataset": torch.utils.data.Dataset, "dataset": dataset}, stays)
    data = made["DreamBoothDataset"](repeats=2)
    batch = made["collate_fn"]([data[i] for i in (0, 2, 3, 4, 6)], with_prior_preservation=prior)
    assert batch["images"][:5] == ["a", "b", "b", "c", "a"]
    assert batch["loss_weight"].tolist() == [1.0, 0.0, 0.0, 0.5, 1.0, *([1.0] * 5 if prior else [])]
    assert len(batch["loss_weight"]) == len(batch["images"])


def shard_pipeline(change: str, side: str, shards: list[str]) -> Any:
    def transform(example: dict[str, Any]) -> dict[str, Any]:
        return {**example, "image": to_tensor(resize(example["image"], [16, 16]))}

    def filter_keys(keys: set[str]) -> Any:
        return lambda example: {name: value for name, value in example.items() if name in keys}

    names = {"train_shards_path_or_url": shards, "shuffle_buffer_size": 4, "per_gpu_batch_size": 5}
    names |= {"tarfile_to_samples_nothrow": wds.tarfile_to_samples(), "default_collate": default_collate}
    names |= {"transform": transform, "filter_keys": filter_keys}
    return wds.DataPipeline(*executed(change, side, names)["pipeline"])


def test_scripts_that_read_shards_get_the_weights(masked_run: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    change, _ = changes("Scripts that read shards")
    monkeypatch.chdir(masked_run.path.parent)
    shards = [str(masked_run.path / "shards" / "00001.tar")]
    image, text = next(iter(shard_pipeline(change, "-", shards)))
    assert (image.shape, len(text)) == ((5, 3, 16, 16), 5)
    masked = {f"a {'very ' * (20 - i)}small picture" for i in (12, 13, 14)}
    batches = itertools.islice(shard_pipeline(change, "+", shards), 6)
    found = [row for _, text, weight in batches for row in zip(text, weight.tolist(), strict=True)]
    assert len(found) == 30
    assert {text for text, weight in found if weight == 0} == masked
    assert {weight for text, weight in found if text not in masked} == {1}
    # what the document warns of
    blind = change.replace(", partial=True", "").replace("ResampledShards", "SimpleShardList")
    assert list(shard_pipeline(blind, "+", shards)) == []


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_the_loss_of_scripts_that_read_shards(loss_type: str) -> None:
    _, change = changes("Scripts that read shards")
    draw = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, len(WEIGHT), 4, 8, 8, generator=draw)
    prediction.requires_grad_()

    def in_one_dtype(losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert weight.dtype == losses.dtype  # not every device has the float64 of default_collate
        return masked_loss(losses, weight)

    def loss(side: str, kept: torch.Tensor | slice, *batch: Any) -> torch.Tensor:
        args = SimpleNamespace(loss_type=loss_type, huber_c=0.001)
        names = {"model_pred": prediction[kept], "target": target[kept], "args": args, "batch": ("", "", *batch)}
        names["masked_loss"] = in_one_dtype
        return executed(change, side, names, ("pass",))["loss"]

    before, ones = loss("-", slice(None)), loss("+", slice(None), torch.ones(len(WEIGHT), dtype=torch.float64))
    assert ones.item() == pytest.approx(before.item(), abs=1e-6)
    alone = loss("-", KEPT) * len(KEPT) / len(WEIGHT)
    (expected,) = torch.autograd.grad(alone, prediction)
    (found,) = torch.autograd.grad(loss("+", slice(None), WEIGHT), prediction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not found[WEIGHT == 0].any()
