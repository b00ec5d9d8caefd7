"""What takes the place of a pipeline's own weights: a fine-tuned denoiser, a LoRA, a single file; and captions cut."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import encoded, picture, sample, write_tar
from pipelines import FAMILIES, LATENT_SIDE, write_family, write_pipeline
from safetensors.torch import load_file, save_file

import memfilter
from memfilter import Config, ConfigError, ModelError
from memfilter.attribution import explain
from memfilter.denoisers import Denoiser, ModelFiles, find_model, load_denoiser
from memfilter.magnitude import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")

CAPTIONS = ["a dog on a mat", "the van gogh cafe"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    others = {family: write_family(root / family, family) for family in FAMILIES}
    return {"sd": write_pipeline(root / "sd"), **others}


def warm(spec: Path | str, **parts: Any) -> Denoiser:
    denoiser = load_denoiser(find_model(str(spec), **parts), "float32")
    denoiser.latent_shape = (4, LATENT_SIDE, LATENT_SIDE)
    return denoiser


def scores(spec: Path | str, **parts: Any) -> Any:
    return Scorer(warm(spec, **parts), batch_size=2).score(CAPTIONS)


def refused(spec: Path | str, **parts: Any) -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        warm(spec, **parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# -- a fine-tuned denoiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "part"), [("sd", "unet"), ("sd3", "transformer")])
def test_a_fine_tuned_denoiser_takes_the_place_of_the_pipelines_own(
    folders: dict[str, Path], tmp_path: Path, family: str, part: str
) -> None:
    other = write_pipeline(tmp_path / "o", seed=1) if family == "sd" else write_family(tmp_path / "o", family, seed=1)
    tuned = copied(other / part, tmp_path / "checkpoint-500")
    expected = copied(folders[family], tmp_path / "expected")
    shutil.copy(tuned / WEIGHTS, expected / part / WEIGHTS)
    base = copied(folders[family], tmp_path / "base")
    shutil.rmtree(base / part)  # is not needed
    assert np.array_equal(scores(base, denoiser=str(tuned)), scores(expected))
    assert not np.allclose(scores(folders[family]), scores(expected), rtol=1e-3)
    found = find_model(str(base), denoiser=str(tuned))
    assert {name for name in found.files if "denoiser" in name} == {f"denoiser/{WEIGHTS}", "denoiser/config.json"}
    assert not any(name.startswith(f"{part}/") for name in found.files)
    assert found.name == "base"


def test_a_denoiser_that_does_not_belong_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "a FluxTransformer2DModel; the pipeline's unet is a UNet2DConditionModel" in refused(
        folders["sd"], denoiser=str(folders["flux"] / "transformer")
    )
    assert "no unet: magnitude.denoiser takes a folder" in refused(folders["sd"], denoiser=str(tmp_path))
    # SDXL's UNet is of the same class, and attends to wider states
    assert "text states are 32 wide, and its unet takes 64 (cross_attention_dim)" in refused(
        folders["sd"], denoiser=str(folders["sdxl"] / "unet")
    )
    tuned = copied(folders["sd"] / "unet", tmp_path / "tuned")
    weights = load_file(tuned / WEIGHTS)
    del weights["conv_in.weight"]
    save_file(weights, tuned / WEIGHTS)
    assert "tuned lacks 1 weights, such as conv_in.weight" in refused(folders["sd"], denoiser=str(tuned))
    (tuned / WEIGHTS).rename(tuned / "diffusion_pytorch_model.bin")
    assert "holds no safetensors file" in refused(folders["sd"], denoiser=str(tuned))


@pytest.mark.parametrize(
    ("family", "encoder", "width", "part"),
    [("flux", "text_encoder_2", 64, "transformer"), ("pixart", "text_encoder", 64, "transformer")],
)
def test_text_states_of_another_width_are_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, encoder: str, width: int, part: str
) -> None:
    folder = copied(folders[family], tmp_path / "model")
    shutil.rmtree(folder / encoder)
    shutil.copytree(folders["sd3"] / "text_encoder_3", folder / encoder)
    assert f"its text states are {width} wide, and its {part} takes 32" in refused(folder)


# -- a LoRA -----------------------------------------------------------------------------------------------------------


def low_rank(weights: Tensors, modules: list[str], rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    sizes = {module: weights[f"{module}.weight"].shape for module in modules}
    return {
        module: (torch.randn((rank, size[1]), generator=draw) / 2, torch.randn((size[0], rank), generator=draw) / 2)
        for module, size in sizes.items()
    }


def fused_by_hand(file: Path, lora: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
    weights = load_file(file)
    for module, (down, up) in lora.items():
        weights[f"{module}.weight"] += scale * up @ down
    save_file(weights, file, {"format": "pt"})


def attention(weights: Tensors, *endings: str) -> list[str]:
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return [name for name in names if name.endswith(endings)]


PARTS = {"sd": {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj",)}}
PARTS["sdxl"] = {"unet": ("to_q", "to_v"), "text_encoder_2": ("q_proj",)}
PARTS["sd3"] = {"transformer": ("attn.to_q",), "text_encoder": ("q_proj",), "text_encoder_2": ("v_proj",)}
PARTS["flux"] = {"transformer": ("attn.to_q",), "text_encoder": ("q_proj",)}
PARTS["sana"] = PARTS["z_image"] = PARTS["lumina2"] = {"transformer": ("to_v",)}
PARTS["qwen_image"] = {"transformer": ("attn.to_q",)}


def write_lora(folder: Path, family: str, expected: Path, scale: float) -> Tensors:
    """Return a LoRA for a pipeline in the layout of PEFT, and fuse it by hand into the pipeline in `expected`."""
    keys = {}
    for part, endings in PARTS[family].items():
        file = next((folder / part).glob("*.safetensors"))
        lora = low_rank(load_file(file), attention(load_file(file), *endings))
        assert lora
        fused_by_hand(expected / part / file.name, lora, scale)
        for module, (down, up) in lora.items():
            keys |= {f"{part}.{module}.lora_A.weight": down, f"{part}.{module}.lora_B.weight": up}
    return keys


@pytest.mark.parametrize("family", PARTS)
def test_a_lora_is_fused_into_denoiser_and_text_encoders(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft")
    expected = copied(folders[family], tmp_path / "expected")
    save_file(write_lora(folders[family], family, expected, 0.5), tmp_path / "own.safetensors")
    found = scores(folders[family], lora=str(tmp_path / "own.safetensors"), lora_scale=0.5)
    np.testing.assert_allclose(found, scores(expected), rtol=2e-4)
    assert not np.allclose(found, scores(folders[family]), rtol=1e-2)


def test_loras_of_other_trainers_are_fused_with_their_alpha(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    expected = copied(folders["sd"], tmp_path / "expected")
    keys: Tensors = {}
    for part, mark, endings in (
        ("unet", "unet", ("attn2.to_k", "attn2.to_out.0")),
        ("text_encoder", "te", ("q_proj", "k_proj", "v_proj", "out_proj")),
    ):
        file = next((expected / part).glob("*.safetensors"))
        lora = low_rank(load_file(file), attention(load_file(file), *endings))
        fused_by_hand(file, lora, 0.25)  # alpha / rank
        for module, (down, up) in lora.items():
            name = module if part == "unet" or module.startswith("text_model.") else f"text_model.{module}"
            start = f"lora_{mark}_{name.replace('.', '_')}"
            keys |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
            keys[f"{start}.alpha"] = torch.tensor(0.5)
    (tmp_path / "lora").mkdir()
    save_file(keys, tmp_path / "lora" / "kohya.safetensors")
    found = scores(folders["sd"], lora=str(tmp_path / "lora"))  # the only file in its folder
    np.testing.assert_allclose(found, scores(expected), rtol=2e-4)
    assert not np.allclose(found, scores(folders["sd"]), rtol=1e-2)


def test_a_lora_of_which_not_all_fits_is_refused_with_how_much(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    expected = copied(folders["sd"], tmp_path / "expected")
    keys = write_lora(folders["sd"], "sd", expected, 1)
    file = tmp_path / "lora.safetensors"

    def error(keys: Tensors) -> str:
        save_file({key: tensor.contiguous() for key, tensor in keys.items()}, file)
        return refused(folders["sd"], lora=str(file))

    other = {key.replace("down_blocks.0", "down_blocks.7"): tensor for key, tensor in keys.items()}
    moved = sum("down_blocks.7" in key for key in other)
    assert 0 < moved < len(keys)
    assert f"{moved} of the LoRA's {len(keys)} keys do not fit the model, such as unet.down_blocks.7" in error(other)
    wide = {key: torch.cat([tensor, tensor], 1) if "lora_A" in key else tensor for key, tensor in keys.items()}
    assert f"{len(keys) // 2} of the LoRA's {len(keys)} keys do not fit" in error(wide)
    named = {f"transformer.{key}": tensor for key, tensor in keys.items()}
    assert f"{len(keys)} of the LoRA's {len(keys)} keys do not fit" in error(named)
    whole = load_file(folders["sd"] / "unet" / WEIGHTS)
    assert f"{len(whole)} of the LoRA's {len(whole)} keys do not fit" in error(whole)
    kohya = {
        "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 32),
        "lora_unet_nowhere.lora_up.weight": torch.zeros(32, 2),
    }
    assert "lora.safetensors: " in error(kohya)
    assert "diffusers loads no LoRA into a PixArtAlphaPipeline" in refused(folders["pixart"], lora=str(file))


def test_loras_that_are_none_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folders["sd"]
    assert "no such file; magnitude.lora takes a LoRA's safetensors file" in refused(model, lora=str(tmp_path / "no"))
    assert "a folder with 0 safetensors files; magnitude.lora" in refused(model, lora=str(tmp_path))
    torch.save({}, tmp_path / "lora.bin")
    assert "a .bin file; magnitude.lora takes" in refused(model, lora=str(tmp_path / "lora.bin"))
    for name in "ab":
        save_file({}, tmp_path / f"{name}.safetensors")
    assert "a folder with 2 safetensors files; magnitude.lora" in refused(model, lora=str(tmp_path))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'memfilter[lora]'" in refused(model, lora=str(tmp_path / "a.safetensors"))


def test_scores_of_another_lora_are_not_reused_and_the_manifest_names_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    keys = write_lora(folders["sd"], "sd", copied(folders["sd"], tmp_path / "expected"), 1)
    save_file(keys, tmp_path / "mine.safetensors")
    members = [m for i, text in enumerate(CAPTIONS) for m in sample(f"{i}", encoded(picture(i)), text)]
    shard = write_tar(tmp_path / "in" / "0.tar", members)
    lora = str(tmp_path / "mine.safetensors")
    settings = {"model": str(folders["sd"]), "batch_size": 2, "dtype": "float32", "lora": lora}
    config = Config.parse({"magnitude": settings, "images": {"encoder": None}, "output": {"shards": False}})
    found = memfilter.run([str(shard)], tmp_path / "out", config, workers=1)
    expected = scores(folders["sd"], lora=lora).squeeze()
    np.testing.assert_allclose(found.table(["magnitude"])["magnitude"].to_numpy(), expected, rtol=1e-6)
    assert found.info["config"]["magnitude"]["lora"] == "mine.safetensors"
    assert "lora/mine.safetensors * 1.0" in found.info["magnitude"]["files"]
    assert str(tmp_path) not in json.dumps(found.info)
    assert explain(tmp_path / "out", "0", trust=True)["magnitude"] == pytest.approx(float(expected[0]), rel=1e-5)
    again = tmp_path / "again.yaml"
    again.write_text("magnitude: {lora_scale: 0.5}")
    manifest = memfilter.rethreshold(tmp_path / "out", again, workers=1, trust=True)
    halved = manifest.table(["magnitude"])["magnitude"].to_numpy()
    np.testing.assert_allclose(halved, scores(folders["sd"], lora=lora, lora_scale=0.5).squeeze(), rtol=1e-6)
    assert not np.allclose(halved, expected, rtol=1e-3)
    with pytest.raises(ConfigError, match=r"magnitude.lora is given and no model"):
        memfilter.run([str(shard)], tmp_path / "o", Config.parse({"magnitude": {"lora": "x"}}), workers=1)


def test_what_an_earlier_version_stored_of_a_model_is_read(folders: dict[str, Path]) -> None:
    found = find_model(str(folders["sd"]))
    assert ModelFiles(*json.loads(json.dumps(astuple(found)))) == found
    assert ModelFiles(*json.loads(json.dumps(astuple(found)))[:3]) == found


# -- single files -----------------------------------------------------------------------------------------------------


def original_unet(weights: Tensors, blocks: int = 2, layers: int = 1) -> Tensors:
    """A UNet's weights under the names of the original code."""
    places: dict[str, str] = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    attends = {".".join(name.split(".")[:4]) for name in weights if ".attentions." in name}
    for i in range(blocks):
        for j in range(layers):
            n = 1 + i * (layers + 1) + j
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
        for j in range(layers + 1):
            n = i * (layers + 1) + j
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        second = 2 if f"up_blocks.{i}.attentions.0" in attends else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (layers + 1) + layers}.{second}.conv"
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    found = {}
    for name, tensor in weights.items():
        start = max((place for place in places if name.startswith(f"{place}.")), key=len)
        rest = name.removeprefix(f"{start}.")
        if ".resnets." in start:
            first, _, last = rest.partition(".")
            rest = f"{inner[first]}.{last}"
        found[f"model.diffusion_model.{places[start]}.{rest}"] = tensor
    return found


def original_vae(weights: Tensors, blocks: int = 2) -> Tensors:
    """An autoencoder's weights under the names of the original code."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found = {}
    for name, tensor in weights.items():
        for i in range(blocks):
            name = name.replace(f"encoder.down_blocks.{i}.resnets", f"encoder.down.{i}.block")
            name = name.replace(f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample")
            name = name.replace(f"decoder.up_blocks.{i}.resnets", f"decoder.up.{blocks - 1 - i}.block")
            name = name.replace(f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{blocks - 1 - i}.upsample")
        if "mid_block.attentions.0" in name:
            for ours, theirs in attention.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        found[f"first_stage_model.{name.replace('conv_norm_out', 'norm_out')}"] = tensor.contiguous()
    return found


def original_clip(weights: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}


def original_open_clip(weights: Tensors, prefix: str) -> Tensors:
    """A CLIP's weights under the names of OpenCLIP, whose queries, keys and values are one matrix."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer["self_attn.out_proj"] = "attn.out_proj"
    own = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    found = {}
    for name, tensor in own.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif name in names:
            found[names[name]] = tensor
        elif "q_proj" in name:
            whole = torch.cat([own[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            i, kind = name.split(".")[2], name.rsplit(".", 1)[1]
            found[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = whole
        elif "k_proj" not in name and "v_proj" not in name:
            i, rest = name.removeprefix("encoder.layers.").split(".", 1)
            first, kind = rest.rsplit(".", 1)
            found[f"transformer.resblocks.{i}.{layer[first]}.{kind}"] = tensor
    return {prefix + name: tensor for name, tensor in found.items()}


def weights_of(folder: Path, part: str) -> Tensors:
    return load_file(next((folder / part).glob("*.safetensors")))


def original(folder: Path, family: str) -> Tensors:
    keys = original_unet(weights_of(folder, "unet")) | original_vae(weights_of(folder, "vae"))
    if family == "sdxl":
        keys |= original_clip(weights_of(folder, "text_encoder"), "conditioner.embedders.0.transformer.")
        return keys | original_open_clip(weights_of(folder, "text_encoder_2"), "conditioner.embedders.1.model.")
    if family == "sd2":
        return keys | original_open_clip(weights_of(folder, "text_encoder"), "cond_stage_model.model.")
    return keys | original_clip(weights_of(folder, "text_encoder"), "cond_stage_model.transformer.")


def without_weights(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize("layout", ["sd", "sd2", "sdxl"])
def test_a_single_file_scores_as_its_pipeline_does(folders: dict[str, Path], tmp_path: Path, layout: str) -> None:
    file, family = tmp_path / "model.safetensors", layout.removesuffix("2")
    save_file(original(folders[family], layout), file)
    configs = without_weights(folders[family], tmp_path / "model")
    assert np.array_equal(scores(file), scores(folders[family]))
    found = find_model(str(file), images=True)
    assert (found.name, found.files["model.safetensors"]) == (
        "model.safetensors",
        find_model(str(file)).files["model.safetensors"],
    )
    assert "tokenizer/tokenizer.json" in found.files
    assert sum(name.endswith(".safetensors") for name in found.files) == 1
    pixels = torch.rand((1, 3, 32, 32)) * 2 - 1
    latents = warm(folders[family]).encode_images(pixels)
    assert torch.equal(warm(file, images=True).encode_images(pixels), latents)
    # a folder elsewhere, the weights of which are not read
    other = write_pipeline(tmp_path / "o", seed=1) if family == "sd" else write_family(tmp_path / "o", family, seed=1)
    shutil.rmtree(configs)
    assert "has no configs and no tokenizer; put those" in refused(file)
    assert np.array_equal(scores(file, single_file_config=str(other)), scores(folders[family]))
    assert not any("unet/d" in name for name in find_model(str(file), single_file_config=str(other)).files)


def test_a_single_file_may_lack_text_encoders_that_its_folder_has(folders: dict[str, Path], tmp_path: Path) -> None:
    save_file(original_unet(weights_of(folders["sd"], "unet")), tmp_path / "model.safetensors")
    configs = copied(folders["sd"], tmp_path / "model")
    (configs / "unet" / WEIGHTS).unlink()
    assert np.array_equal(scores(tmp_path / "model.safetensors"), scores(folders["sd"]))
    assert "text_encoder/model.safetensors" in find_model(str(tmp_path / "model.safetensors")).files
    (configs / "text_encoder" / "model.safetensors").unlink()
    assert "model.safetensors" in refused(tmp_path / "model.safetensors")


def test_single_files_that_cannot_be_read_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    configs = without_weights(folders["sd"], tmp_path / "model")
    keys = original(folders["sd"], "sd")
    for lost, part in (
        ("model.diffusion_model.input_blocks.0.0.weight", "unet, such as conv_in.weight"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder, such as "),
    ):
        save_file({key: tensor for key, tensor in keys.items() if key != lost}, file)
        assert f"model.safetensors lacks 1 weights of {part}" in refused(file)
    save_file(load_file(folders["sd"] / "unet" / WEIGHTS), file)
    assert "holds no unet of a StableDiffusionPipeline in the original layout" in refused(file)
    file.write_bytes(file.read_bytes()[:1000])
    assert "not a whole safetensors file" in refused(file)
    assert "magnitude.single_file_config is for a model in a safetensors file" in refused(
        folders["sd"], single_file_config=str(configs)
    )
    save_file(keys, file)
    assert "no such folder; magnitude.single_file_config" in refused(file, single_file_config=str(tmp_path / "no"))
    assert "single files are read of Stable Diffusion 1 and 2, SDXL, SD3, Flux, not of a SanaPipeline" in refused(
        file, single_file_config=str(folders["sana"])
    )
    torch.save({}, tmp_path / "model.ckpt")
    assert "a pickle, which can run code and is not read; convert it" in refused(tmp_path / "model.ckpt")


# -- captions that are cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", *FAMILIES])
def test_captions_are_told_that_are_longer_than_the_model_takes(folders: dict[str, Path], family: str) -> None:
    denoiser: Any = warm(folders[family])
    limit = denoiser.settings["max_tokens"]
    longest = min(limit) if isinstance(limit, list) else limit
    captions = ["", "a dog", "z " * 2 * longest, "a mat", "q" * 3 * longest]
    assert denoiser.truncated(captions).tolist() == [False, False, True, False, True]
    assert denoiser.truncated([]).tolist() == []
    ids = denoiser.token_ids(captions)
    assert ids == [denoiser.token_ids([caption])[0] for caption in captions]
    near = ["z " * n for n in range(longest - 8, longest + 2)]
    expected = [
        any(len(tokenizer(text, verbose=False)["input_ids"]) > length for tokenizer, (text,), length in texts)
        for texts in (denoiser._texts([caption]) for caption in near)
    ]
    assert denoiser.truncated(near).tolist() == expected


def test_ids_are_those_that_the_tokenizer_gives_without_telling_what_was_cut(folders: dict[str, Path]) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["sd"] / "tokenizer")
    captions = ["a dog", "z" * 300, "", "a cat of " * 40, "on"]
    expected = tokenizer(captions, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert warm(folders["sd"]).token_ids(captions) == [np.array(ids, ">u4").tobytes() for ids in expected]
