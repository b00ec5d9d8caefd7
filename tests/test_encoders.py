from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pytest
import timm
import torch
from conftest import encoded, picture, sample, write_tar
from open_clip.push_to_hf_hub import save_for_hf as save_open_clip
from PIL import Image
from pipelines import _tokenizer
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf as save_timm
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

import memfilter
from memfilter import images
from memfilter.config import Config
from memfilter.encoders import Encoder, image_encoder, sscd
from memfilter.errors import ConfigError, MemfilterError, ModelError
from memfilter.records import Shard
from memfilter.signatures import Signer, signature_digest

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

SHAPES = [(96, 80), (80, 96), (400, 130), (33, 57), (160, 160)]
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1},
}


def pictures() -> list[Image.Image]:
    return [picture(seed, *shape) for seed, shape in enumerate(SHAPES)]


def embeddings(encoder: Encoder, shown: list[Image.Image]) -> npt.NDArray[np.float32]:
    """Return the embeddings of what is decoded from lossless files of the images."""
    assert encoder.frame is not None
    squares = []
    for image in shown:
        decoded = images.decode(encoded(image, "PNG"), False, 10**8, colour=encoder.frame.edge)
        assert decoded.colour is not None
        squares.append(images.framed(decoded.colour, encoder.side, encoder.frame))
    return encoder.encode(np.stack(squares))


def encoder_of(spec: str) -> Encoder:
    encoder = image_encoder(spec)
    assert encoder is not None
    return encoder


def expected(model: Callable[[Tensor], Tensor], transform: Any, shown: list[Image.Image]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        rows = torch.cat([model(transform(image)[None]) for image in shown])
    return nn.functional.normalize(rows).numpy()


def timm_folder(path: Path, name: str = "test_vit", safe: bool = True, **data: object) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    save_timm(model, str(path), safe_serialization=safe)
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"] |= data
    (path / "config.json").write_text(json.dumps(config))
    return path


def open_clip_folder(path: Path, **preprocessing: object) -> Path:
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(CLIP)))
    open_clip.factory.set_model_preprocess_cfg(model, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)})
    save_open_clip(model, _tokenizer(), CLIP, str(path))
    config = json.loads((path / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= preprocessing
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


class ReferenceGeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.clamp(min=1e-6) ** 3, x.shape[-2:]) ** (1 / 3)


def sscd_model(resnet: ResNet) -> ResNet:
    """Return a ResNet made into SSCD's network, its batch norms with statistics and scales of their own."""
    resnet.avgpool = ReferenceGeM()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return resnet.eval()


def small_sscd(seed: int = 0, **settings: int) -> ResNet:
    torch.manual_seed(seed)
    return sscd_model(ResNet(Bottleneck, [1, 2, 1, 1], 512, **{"width_per_group": 4} | settings))


def sscd_file(path: Path, model: ResNet) -> Path:
    torch.save({f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return path


def classy_name(name: str) -> str:
    """Return Classy Vision's name, as SSCD's `.classy.pt` files have it, of a weight of torchvision's ResNet."""
    part, _, rest = name.partition(".")
    if part == "fc":
        return f"embeddings.1.{rest}"
    if not part.startswith("layer"):
        return f"backbone.initial_block._module.{['conv1', 'bn1'].index(part)}.{rest}"
    layer, (block, module, rest) = int(part[5:]) - 1, rest.split(".", 2)
    inside = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}
    place = f"convolutional_block.{inside[module]}" if module in inside else {"bn3": "bn"}.get(module, module)
    return f"backbone.blocks.{layer}.block{layer}-{block}.{place}.{rest}"


# -- the numbers are those of the libraries ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize(
    "data",
    [
        {"crop_mode": "center", "crop_pct": 0.875},
        {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3]},
        {"crop_mode": "border", "crop_pct": 0.9},
    ],
    ids=lambda data: data["crop_mode"],
)
def test_a_folder_of_timm_gives_timms_own_embeddings(tmp_path: Path, name: str, data: dict[str, object]) -> None:
    folder = timm_folder(tmp_path / "model", name, **data)
    encoder = encoder_of(f"local-dir:{folder}")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_data_config(model=model))
    found, wanted = embeddings(encoder, pictures()), expected(model, transform, pictures())
    assert found.shape == wanted.shape == (5, encoder.dim)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert encoder.similarity is None
    assert encoder.identity == encoder_of(f"timm:local-dir:{folder}").identity


def test_weights_of_timm_in_pytorchs_own_format_give_the_same_embeddings(tmp_path: Path) -> None:
    one = encoder_of(f"local-dir:{timm_folder(tmp_path / 'safetensors')}")
    other = encoder_of(f"local-dir:{timm_folder(tmp_path / 'bin', safe=False)}")
    assert {p.suffix for p in (tmp_path / "bin").iterdir()} == {".bin", ".json"}
    np.testing.assert_array_equal(embeddings(one, pictures()), embeddings(other, pictures()))
    assert one.identity != other.identity


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_a_folder_of_open_clip_gives_its_own_embeddings(tmp_path: Path, resize_mode: str) -> None:
    folder = open_clip_folder(tmp_path / "model", resize_mode=resize_mode, interpolation="bilinear")
    encoder = encoder_of(f"local-dir:{folder}")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    wanted = expected(model.eval().encode_image, transform, pictures())
    assert encoder.dim == 24
    np.testing.assert_allclose(embeddings(encoder, pictures()), wanted, atol=1e-5)
    assert encoder.identity == encoder_of(f"open_clip:local-dir:{folder}").identity


def test_an_architecture_of_open_clip_takes_a_file_of_weights_here(tmp_path: Path) -> None:
    (tmp_path / "tiny-test.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    folder = open_clip_folder(tmp_path / "model")
    encoder = encoder_of(f"open_clip:tiny-test/{folder / 'open_clip_model.safetensors'}")
    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-test", pretrained=str(folder / "open_clip_model.safetensors")
    )
    wanted = expected(model.eval().encode_image, transform, pictures())
    np.testing.assert_allclose(embeddings(encoder, pictures()), wanted, atol=1e-5)


def test_a_weight_file_of_sscd_gives_the_embeddings_of_its_network(tmp_path: Path) -> None:
    model = small_sscd()
    encoder = encoder_of(f"sscd:{sscd_file(tmp_path / 'sscd_disc_mixup.torchvision.pt', model)}")
    skew_320 = transforms.Compose(
        [
            transforms.Resize([320, 320]),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    np.testing.assert_allclose(
        embeddings(encoder, pictures()[:2]), expected(model, skew_320, pictures()[:2]), atol=1e-5
    )
    assert (encoder.dim, encoder.similarity) == (512, 0.75)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: sscd_model(resnet50(num_classes=512)), id="resnet50"),
        pytest.param(lambda: small_sscd(groups=8, width_per_group=2), id="resnext"),
    ],
)
def test_both_weight_files_of_sscd_are_read_in_the_names_of_their_library(
    tmp_path: Path, model: Callable[[], ResNet]
) -> None:
    torch.manual_seed(0)
    reference = model()
    classy, pixels = tmp_path / "sscd_disc_mixup.classy.pt", torch.rand(2, 3, 64, 64)
    torch.save({classy_name(name): tensor for name, tensor in reference.state_dict().items()}, classy)
    for file in (sscd_file(tmp_path / "sscd_disc_mixup.torchvision.pt", reference), classy):
        with torch.inference_mode():
            torch.testing.assert_close(sscd.network(file).eval()(pixels), reference(pixels), atol=1e-5, rtol=1e-5)


def test_the_other_images_of_a_batch_change_an_embedding_by_rounding_and_threads_by_nothing(tmp_path: Path) -> None:
    encoder = encoder_of(f"local-dir:{timm_folder(tmp_path, 'test_resnet')}")
    squares = np.random.default_rng(0).integers(0, 256, (19, encoder.side, encoder.side, 3), np.uint8)
    together = encoder.encode(squares)
    for part in (slice(0, 3), slice(5, 6), slice(2, 19)):
        np.testing.assert_allclose(encoder.encode(squares[part]), together[part], atol=1e-5)
    assert encoder.encode(squares[:0]).shape == (0, encoder.dim)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        np.testing.assert_array_equal(encoder.encode(squares), together)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -- colour beside grey -----------------------------------------------------------------------------------------------


def test_no_column_but_the_embedding_depends_on_the_encoder(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model", "test_resnet")
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = picture(5, 900, 700)
    files = [
        encoded(wide),
        encoded(wide, exif=turned),
        encoded(wide.convert("L")),
        encoded(wide.convert("CMYK")),
        encoded(wide, "PNG"),
        encoded(wide.convert("LA"), "PNG"),
        encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16), "PNG"),
        encoded(wide, "WEBP"),
        encoded(picture(6, 20, 20)),
        b"no image",
    ]
    for decode in ("fast", "full"):
        tables = []
        for encoder in (None, f"local-dir:{folder}"):
            signer = Signer(Config.parse({"images": {"encoder": encoder, "decode": decode}}))
            rows = [signer._image(data) for data in files[:-1]]
            tables.append(signer.table([*rows, {"bad": "unreadable_image"}]))
        with_embedding = tables[1]["embedding"].combine_chunks()
        assert with_embedding.is_valid().to_pylist() == [True] * 9 + [False]
        for name in tables[0].column_names:
            assert tables[0][name].equals(tables[1][name]), name


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_colour_is_decoded_upright_and_large_enough(format: str, mode: str) -> None:
    image = Image.new("RGB", (1000, 800), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 1000, 400))  # the upper half
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right: the upper half comes to the right
    decoded = images.decode(encoded(image.convert(mode), format, exif=turned), False, 10**8, colour=320)
    assert (decoded.width, decoded.height) == (800, 1000)
    assert decoded.colour is not None
    height, width, _ = decoded.colour.shape
    assert height > width >= 320
    assert decoded.colour.shape < (1000, 800, 3) if format == "JPEG" else decoded.colour.shape == (1000, 800, 3)
    left, right = decoded.colour[height // 2, width // 8], decoded.colour[height // 2, -width // 8]
    if mode == "L":
        assert len(set(left.tolist())) == len(set(right.tolist())) == 1
    else:
        assert left[0] > 200 > left[2] + 100
        assert right[2] > 200 > right[0] + 100
    assert images.decode(encoded(image.convert(mode), format), False, 10**8).colour is None


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (1, 1)])
def test_a_line_of_pixels_is_framed_without_filling_memory(mode: Any, shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 200, np.uint8)
    square = images.framed(pixels, 224, images.Frame(256, mode))
    assert square.shape == (224, 224, 3)
    assert set(square.reshape(-1, 3)[:, 0].tolist()) <= {0, 200}
    assert (square == 200).any()


# -- a run ------------------------------------------------------------------------------------------------------------


def planted(path: Path, edit: Callable[[Image.Image], Image.Image]) -> Path:
    """Write a tar of twelve different pictures, then the edits of four of them."""
    shown = [picture(seed, 160, 160) for seed in range(12)]
    shown += [edit(image) for image in shown[:4]]
    members = [sample(f"{i:03}", encoded(image), f"picture {i}") for i, image in enumerate(shown)]
    return write_tar(path, [m for members_of_one in members for m in members_of_one])


def assert_planted_found(manifest: memfilter.Manifest) -> None:
    groups = manifest.table()["image_group"].to_pylist()
    assert groups[12:] == groups[:4]
    assert len(set(groups)) == 12
    assert Counter(manifest.table()["match_method"].to_pylist()) == {None: 12, "embedding": 4}


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image) -> Image.Image:
    """Cut five pixels off each edge: ten or more bits of the hash."""
    return image.crop((5, 5, 155, 155)).resize((160, 160), Image.Resampling.BICUBIC)


OWN = '''
import numpy as np
from memfilter.encoders import Frame

class Colours:
    """Mean colours of the four horizontal strips: a mirror image has the same."""
    side, dim, identity, similarity, frame = 64, 12, "strips-1", 0.9999, Frame(64)

    def encode(self, images):
        rows = images.reshape(len(images), 4, -1, 3).mean(2).reshape(len(images), -1).astype(np.float32) - 128
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

def broken(**changed):
    return lambda: type("Broken", (Colours,), changed)()

text_side, no_unit = broken(side="64"), broken(encode=lambda self, images: np.ones((len(images), 12), np.float32))
grey_frame, wrong_shape = broken(frame="grey"), broken(encode=lambda self, images: np.ones((len(images), 3)))
sure, unnamed, unknown_cosine = broken(similarity=2.0), broken(identity=""), broken(similarity=None)
no_method, no_encoder = broken(encode=None), dict
def failing(): raise OSError("no disk")
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"own_{tmp_path.name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return f"own_{tmp_path.name}"


def test_an_encoder_of_ones_own_finds_what_it_sees_alike(tmp_path: Path, own: str) -> None:
    # mirrored drawings are other pictures to the comparison in detail, which has no say here
    config = Config.parse({"images": {"encoder": f"{own}:Colours", "hash_radius": 0, "match_threshold": 1e-9}})
    manifest = memfilter.run([str(planted(tmp_path / "in" / "a.tar", mirrored))], tmp_path / "out", config, workers=1)
    assert_planted_found(manifest)
    assert manifest.info["encoder"] == {
        "identity": "strips-1",
        "weights": None,
        "preprocessing": {"side": 64, "colour": True},
        "similarity": 0.9999,
    }


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("text_side", "side is '64'; an encoder's is an int over 0"),
        ("grey_frame", "frame is 'grey'; an encoder's is a Frame or None"),
        ("sure", "similarity is 2.0; an encoder's is a float to 1, over 0, or None"),
        ("unnamed", "identity is ''; an encoder's is a text that is not empty"),
        ("no_method", "encode is None; an encoder's is a method"),
        ("no_encoder", "side is missing; an encoder's is an int over 0"),
        ("nowhere", "cannot be imported and called (AttributeError: "),
        ("failing", "cannot be imported and called (OSError: no disk)"),
    ],
)
def test_what_is_no_encoder_is_refused_with_what_is_wrong(own: str, name: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        image_encoder(f"{own}:{name}")
    assert str(caught.value).startswith(f"images.encoder = '{own}:{name}': {cause}")
    assert "\n" not in str(caught.value)


def test_rows_of_another_shape_or_length_are_refused(own: str) -> None:
    squares = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(ModelError, match=r"encode returned float64 \(2, 3\), not float32 \(2, 12\)"):
        encoder_of(f"{own}:wrong_shape").encode(squares)
    with pytest.raises(ModelError, match=r"a row of length 3.46; rows are of length 1"):
        encoder_of(f"{own}:no_unit").encode(squares)


def run_with(folder: Path, shard: Path, out: Path, **settings: object) -> memfilter.Manifest:
    config = Config.parse({"images": {"encoder": f"local-dir:{folder}", **settings}})
    return memfilter.run([str(shard)], out, config, workers=1)


def test_a_run_finds_the_copies_and_tells_the_encoder(tmp_path: Path) -> None:
    shard = planted(tmp_path / "in" / "a.tar", cropped)
    manifests = []
    for place in ("one", "two"):  # where the weights lie is no part of the result
        folder = timm_folder(tmp_path / place / "model")
        manifest = run_with(folder, shard, tmp_path / place / "out", encoder_similarity=0.99)
        manifests.append((manifest.path / "manifest" / "manifest.json").read_bytes())
    assert_planted_found(manifest)
    assert manifests[0] == manifests[1]
    assert manifest.info["config"]["images"]["encoder"] == "local-dir:model"
    about = manifest.info["encoder"]
    assert about["weights"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert about["identity"] == encoder_of(f"local-dir:{folder}").identity
    assert about["weights"] in about["identity"]
    assert about["similarity"] == 0.99
    assert about["preprocessing"] == {
        **{"side": 160, "edge": 168, "mode": "shortest", "filter": "bicubic", "fill": [0, 0, 0]},
        **{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    again = memfilter.rethreshold(manifest.path, None, workers=1)
    assert again.info == manifest.info


def test_the_manifest_tells_the_built_in_encoder_and_that_there_is_none(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "in" / "a.tar", sample("0", encoded(picture(0)), "one"))
    manifest = memfilter.run([str(shard)], tmp_path / "out", workers=1)
    builtin = encoder_of("builtin")
    assert manifest.info["encoder"]["identity"] == builtin.identity
    assert manifest.info["encoder"]["similarity"] == builtin.similarity
    without = Config.parse({"images": {"encoder": None}})
    none = memfilter.run([str(shard)], tmp_path / "out", without, workers=1, update=True)
    assert none.info["encoder"] is None


def test_other_weights_or_settings_in_the_same_place_are_another_encoder(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model")
    config, shard = Config.parse({"images": {"encoder": f"local-dir:{folder}"}}), Shard("/a.tar", "a.tar", 0, "")
    digests, found = [], []
    for change in (None, change_weights, change_crop):
        if change:
            change(folder)
        digests.append(signature_digest(shard, "content", config))
        found.append(embeddings(encoder_of(f"local-dir:{folder}"), pictures()))
    assert len(set(digests)) == 3
    assert signature_digest(shard, "content", config) == digests[-1]
    for one, other in ((0, 1), (1, 2)):
        assert abs(found[one] - found[other]).max() > 1e-3


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["pos_embed"] += torch.linspace(-1, 1, tensors["pos_embed"].numel()).reshape(tensors["pos_embed"].shape)
    save_file(tensors, folder / "model.safetensors")


def change_crop(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))


def test_a_cosine_that_nobody_measured_is_warned_of_once_unless_it_is_set(
    tmp_path: Path, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_tar(tmp_path / "in" / "a.tar", sample("0", encoded(picture(0)), "one"))
    config = {"encoder": f"{own}:unknown_cosine"}
    manifest = memfilter.run([str(shard)], tmp_path / "out", Config.parse({"images": config}), workers=1)
    assert manifest.info["encoder"]["similarity"] == 0.95
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "0.95 is used, or set images.encoder_similarity" in told
    caplog.clear()
    config_set = Config.parse({"images": {**config, "encoder_similarity": 0.9}})
    again = memfilter.run([str(shard)], tmp_path / "out", config_set, workers=1, update=True)
    assert again.info["encoder"]["similarity"] == 0.9
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


# -- what cannot be used ----------------------------------------------------------------------------------------------


def error_of(spec: str) -> str:
    """Return the one line that is raised when a spec's encoder is made and used."""
    with pytest.raises(MemfilterError) as caught:
        encoder_of(spec).encode(np.zeros((1, 1, 1, 3), np.uint8))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("spec", ["nothing", "sscd", "sscd:", "", ":", "timm:"])
def test_an_unknown_spec_is_answered_with_those_there_are(spec: str) -> None:
    assert "'local-dir:FOLDER' or 'package.module:function', or null" in error_of(spec)


def test_an_unknown_name_is_told_where_names_are(tmp_path: Path) -> None:
    assert "timm.list_pretrained() tells names" in error_of("timm:nosuch")
    assert "timm.list_pretrained() tells names" in error_of("timm:resnet18.nosuch")
    assert "open_clip.list_models() tells names" in error_of("open_clip:nosuch/openai")
    assert "neither a file here nor a tag of RN50: openai, yfcc15m, cc12m" in error_of("open_clip:RN50/nosuch")
    assert "cannot be imported and called (ModuleNotFoundError" in error_of("no.such.module:factory")


def test_a_missing_file_of_sscd_is_told_with_the_command_that_downloads_it(tmp_path: Path) -> None:
    url = "https://dl.fbaipublicfiles.com/sscd-copy-detection"
    for name, published, size in (
        ("sscd_imagenet_blur.torchvision.pt", "sscd_imagenet_blur.torchvision.pt", "98 MB"),
        ("sscd_disc_large.classy.pt", "sscd_disc_large.classy.pt", "178 MB"),
        ("my.pt", "sscd_disc_mixup.torchvision.pt", "98 MB"),
    ):
        wanted = f"{tmp_path / name}: no such file; 'curl -fLO {url}/{published}' downloads it ({size})"
        assert error_of(f"sscd:{tmp_path / name}") == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_program_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "sscd_disc_advanced.torchscript.pt"
    torch.jit.save(torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2)), str(file))
    assert error_of(f"sscd:{file}").startswith(f"{file}: a TorchScript program, which is not run here; ")
    assert error_of(f"sscd:{file}").endswith("/sscd_disc_advanced.torchvision.pt'")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_file_of_weights_is_run(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model", safe=False)
    bomb = {"fc.weight": torch.zeros(1), "bomb": Bomb(tmp_path / "exploded")}
    for file, spec in (
        (tmp_path / "sscd.pt", f"sscd:{tmp_path / 'sscd.pt'}"),
        (folder / "pytorch_model.bin", f"local-dir:{folder}"),
    ):
        torch.save(bomb, file)
        assert str(file) in error_of(spec)
        assert not (tmp_path / "exploded").exists()


def spoiled(file: Path) -> dict[str, bytes]:
    whole = file.read_bytes()
    return {
        "is a web page, not weights": b"\n<!DOCTYPE html><html>404</html>",
        "is a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is empty": b"",
        "": whole[: len(whole) // 2],
    }


def test_a_file_that_is_cut_or_no_weights_is_told_by_name(tmp_path: Path) -> None:
    for file, spec in (
        (sscd_file(tmp_path / "sscd.pt", small_sscd()), f"sscd:{tmp_path / 'sscd.pt'}"),
        (timm_folder(tmp_path / "timm") / "model.safetensors", f"local-dir:{tmp_path / 'timm'}"),
        (timm_folder(tmp_path / "bin", safe=False) / "pytorch_model.bin", f"local-dir:{tmp_path / 'bin'}"),
        (open_clip_folder(tmp_path / "clip") / "open_clip_model.safetensors", f"local-dir:{tmp_path / 'clip'}"),
    ):
        for cause, data in spoiled(file).items():
            file.write_bytes(data)
            assert error_of(spec).startswith(f"{file}: {cause}")


def test_the_weights_of_another_network_are_told_by_name(tmp_path: Path) -> None:
    vit, resnet = timm_folder(tmp_path / "vit"), timm_folder(tmp_path / "resnet", "test_resnet")
    clip = open_clip_folder(tmp_path / "clip")
    for folder, file in ((vit, "model.safetensors"), (clip, "open_clip_model.safetensors")):
        (folder / file).write_bytes((resnet / "model.safetensors").read_bytes())
        assert error_of(f"local-dir:{folder}").startswith(f"{folder / file}: not the weights of ")
    file = sscd_file(tmp_path / "sscd.pt", small_sscd())
    tensors = torch.load(file, weights_only=True)
    del tensors["backbone.layer2.1.conv2.weight"]
    torch.save(tensors, file)
    assert "not the weights of an SSCD model: " in error_of(f"sscd:{file}")
    torch.save({"a": torch.zeros(1)}, file)
    assert error_of(f"sscd:{file}") == f"{file}: not the weights of an SSCD model: it has no 'fc.weight'"
    torch.save([torch.zeros(1)], file)
    assert error_of(f"sscd:{file}") == f"{file}: holds a list, not tensors by name"


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model", "test_resnet")
    tensors = load_file(folder / "model.safetensors")
    tensors["bn1.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="an embedding is not finite; its weights are damaged"):
        embeddings(encoder_of(f"local-dir:{folder}"), pictures())


def test_a_folder_that_neither_library_saved_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in error_of(f"local-dir:{tmp_path / 'nowhere'}")
    assert "holds neither open_clip_config.json nor config.json" in error_of(f"local-dir:{tmp_path}")
    for text, cause in (("{", "cannot be read"), ("[]", "holds a list"), ('{"a": 1}', "names no architecture")):
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "model.safetensors").write_bytes(b"?")
        assert error_of(f"local-dir:{tmp_path}").startswith(f"{tmp_path / 'config.json'}: {cause}")
    folder = timm_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert f"{folder}: has none of model.safetensors, " in error_of(f"local-dir:{folder}")


OFFLINE = """
import sys
from memfilter.encoders import image_encoder
from memfilter.errors import MemfilterError
for spec in sys.argv[1:]:
    try:
        encoder = image_encoder(spec)
        print(encoder.identity, encoder.dim)
    except MemfilterError as e:
        print(type(e).__name__, e)
for name in ("timm", "open_clip"):
    sys.modules[name] = None  # as if it were not installed
for spec in ("timm:resnet18", "open_clip:RN50/openai"):
    try:
        image_encoder(spec)
    except MemfilterError as e:
        print(type(e).__name__, e)
"""


def in_hub_cache(home: Path, repository: str, folder: Path) -> None:
    """Put a folder where 'hf download' would have put it."""
    place, revision = home / "hub" / f"models--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    shutil.copytree(folder, place / "snapshots" / revision)


def test_without_a_network_what_is_here_is_used_and_what_is_not_is_told_with_its_command(tmp_path: Path) -> None:
    timm_saved, clip_saved = timm_folder(tmp_path / "vit"), open_clip_folder(tmp_path / "clip")
    in_hub_cache(tmp_path / "home", "some/vit", timm_saved)
    in_hub_cache(tmp_path / "home", "some/clip", clip_saved)
    in_hub_cache(tmp_path / "home", timm.get_pretrained_cfg("test_vit").hf_hub_id, timm_saved)
    specs = ["hf-hub:some/vit", "hf-hub:some/clip", "timm:test_vit"]
    specs += ["hf-hub:some/other@v2", "timm:resnet18", "open_clip:RN50/openai"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *specs], env=environment, capture_output=True, text=True, check=True
    )
    vit, clip, named, revision, by_name, by_tag, *missing = done.stdout.splitlines()
    assert vit == f"{encoder_of(f'local-dir:{timm_saved}').identity} 64"
    assert clip == f"{encoder_of(f'local-dir:{clip_saved}').identity} 24"
    assert named.startswith(f"timm/test_vit/sha256-{encoder_of(f'local-dir:{timm_saved}').weights}/160px-")
    assert named.endswith(" 64")
    assert revision.startswith("ModelError some/other@v2: no open_clip_config.json or config.json in the hub's cache")
    assert "run 'hf download some/other --revision v2' where there is a network" in revision
    assert "run 'hf download timm/resnet18.a1_in1k' where" in by_name
    assert "run 'hf download timm/resnet50_clip.openai' where" in by_tag
    assert [line.split()[0] for line in missing] == ["ConfigError", "ConfigError"]
    assert all("install it with pip install 'memfilter[encoders]'" in line for line in missing)
