"""Caption encoders on tiny real models of all three libraries, and the edges between captions that they lead to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from memfilter import caption_edges
from memfilter.caption_edges import semantic_edges, semantic_similarity
from memfilter.config import Config
from memfilter.encoders.captions import CaptionEncoder, caption_encoder, public_caption_name
from memfilter.errors import ConfigError, MemfilterError, ModelError
from memfilter.store import Store, read_note

sentence_transformers = pytest.importorskip("sentence_transformers")
model2vec = pytest.importorskip("model2vec")

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_thread")]

WORDS = "a the dog cat runs sleeps on in red green house garden ein hund كلب يجري في الحديقة".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz一只狗在跑庭院"
TEXTS = [
    *("a dog runs in the garden", "the cat sleeps on a red house", "dog", "ein hund", "A DOG RUNS IN THE GARDEN"),
    *("كلب يجري في الحديقة", "一只狗在庭院跑", "the dog كلب runs 一只狗 in the garden", "word " * 20),
]
FORMS = ("transformers", "sentence-transformers", "model2vec")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each library in a folder that the library saved."""
    folder = tmp_path_factory.mktemp("models")
    bert, sentence, static = (folder / name for name in FORMS)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{c}" for c in LETTERS)]
    bert.mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(set(vocabulary)), max_position_embeddings=48, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(bert)
    pieces = BertWordPieceTokenizer({token: i for i, token in enumerate(dict.fromkeys(vocabulary))})
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special).save_pretrained(bert)

    from sentence_transformers.models import Dense, Pooling, Transformer

    modules = [Transformer(str(bert)), Pooling(32), Dense(32, 24)]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(sentence))

    tokens = Tokenizer(WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}, unk_token="[UNK]"))
    tokens.normalizer, tokens.pre_tokenizer = Lowercase(), Whitespace()
    vectors = np.random.default_rng(0).normal(size=(len(WORDS) + 1, 16)).astype(np.float32)
    model2vec.StaticModel(vectors, tokens).save_pretrained(static)
    return {"transformers": bert, "sentence-transformers": sentence, "model2vec": static}


def unit(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_transformers(folder: Path, texts: list[str]) -> npt.NDArray[Any]:
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
            rows.append(network(**inputs).last_hidden_state[0].mean(0).numpy())
    return np.stack(rows)


BY_LIBRARY: dict[str, Callable[[Path, list[str]], npt.NDArray[Any]]] = {
    "transformers": by_transformers,
    "sentence-transformers": lambda folder, texts: sentence_transformers.SentenceTransformer(
        str(folder), device="cpu"
    ).encode(texts),
    "model2vec": lambda folder, texts: model2vec.StaticModel.from_pretrained(folder).encode(texts),
}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="rows are of half precision on a GPU")


@pytest.mark.parametrize("form", FORMS)
@on_cpu
def test_the_rows_are_the_librarys_own(models: dict[str, Path], form: str) -> None:
    texts = [t for t in TEXTS if form != "model2vec" or set(t.lower().split()) & set(WORDS)]
    encoder = caption_encoder(f"{form}:{models[form]}")
    rows = encoder.encode(texts)
    assert rows.dtype == np.float32
    assert rows.shape == (len(texts), encoder.dim)
    np.testing.assert_allclose(rows, unit(BY_LIBRARY[form](models[form], texts)), atol=1e-5)
    assert encoder.similarity is None


@pytest.mark.parametrize("form", FORMS)
def test_other_texts_change_a_row_by_rounding_alone(models: dict[str, Path], form: str) -> None:
    random = np.random.default_rng(1)
    texts = list(dict.fromkeys(" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(120))) + TEXTS
    encoder = caption_encoder(str(models[form]))
    together = encoder.encode(texts)
    shuffled = random.permutation(len(texts))
    assert np.array_equal(encoder.encode(texts), together)
    np.testing.assert_allclose(encoder.encode([texts[i] for i in shuffled]), together[shuffled], atol=1e-5)
    for i in (0, 50, len(texts) - 3):
        np.testing.assert_allclose(encoder.encode([texts[i]])[0], together[i], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_texts_without_a_known_token_have_rows_of_zeros_and_all_others_unit_length(
    models: dict[str, Path], form: str
) -> None:
    texts = ["", "   ", "🎉", "🐶🐶", "a dog 🎉", "\x00\x07", "dog " * 25_000, "\u202edog"]
    rows = caption_encoder(str(models[form])).encode(texts)
    lengths = np.linalg.norm(rows, axis=1)
    assert not lengths[[0, 1, 2, 3, 5]].any()
    assert lengths[[4, 6]] == pytest.approx([1, 1], abs=1e-6)
    assert caption_encoder(str(models[form])).encode([]).shape == (0, rows.shape[1])


@on_cpu
def test_a_static_embedding_of_sentence_transformers(models: dict[str, Path]) -> None:
    texts = ["a dog runs", "the cat", "dog " * 25_000, "ein hund"]
    rows = caption_encoder(f"sentence-transformers:{models['model2vec']}").encode(texts)
    own = sentence_transformers.SentenceTransformer(str(models["model2vec"]), device="cpu").encode(texts)
    np.testing.assert_allclose(rows, unit(own), atol=1e-5)
    np.testing.assert_allclose(rows, caption_encoder(str(models["model2vec"])).encode(texts), atol=1e-5)


def test_a_long_text_is_seen_as_far_as_there_is_room(models: dict[str, Path]) -> None:
    for form in ("transformers", "sentence-transformers"):
        rows = caption_encoder(str(models[form])).encode(["dog " * 46, "dog " * 25_000, "dog " * 46 + "cat " * 20_000])
        np.testing.assert_allclose(rows[1:], rows[[0, 0]], atol=1e-5)


def test_a_prompt_of_the_models_own_stands_before_every_text(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["sentence-transformers"], tmp_path / "model"))
    path = folder / "config_sentence_transformers.json"
    config = json.loads(path.read_text()) | {"prompts": {"same": "the cat "}, "default_prompt_name": "same"}
    path.write_text(json.dumps(config))
    prompted, plain = caption_encoder(str(folder)), caption_encoder(str(models["sentence-transformers"]))
    expected = plain.encode(["the cat sleeps", "the cat dog runs"])
    np.testing.assert_allclose(prompted.encode(["sleeps", "dog runs"]), expected, atol=1e-5)
    assert not prompted.encode(["🎉"]).any()


def test_the_identity_names_all_that_shapes_the_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    for form, folder in models.items():
        encoder = caption_encoder(f"{form}:{folder}")
        assert (
            encoder.identity == caption_encoder(f"local-dir:{folder}").identity == caption_encoder(str(folder)).identity
        )
        assert encoder.identity.startswith(f"{form}/files-")
        copied = Path(shutil.copytree(folder, tmp_path / form))
        (copied / "README.md").write_text("another text")
        assert caption_encoder(str(copied)).identity == encoder.identity
        (copied / "tokenizer.json").write_text((copied / "tokenizer.json").read_text() + "\n")
        assert caption_encoder(str(copied)).identity != encoder.identity


def test_a_spec_is_told_without_the_folders_of_this_machine(models: dict[str, Path]) -> None:
    folder = models["model2vec"]
    assert public_caption_name(None) is None
    assert public_caption_name(f"model2vec:{folder}") == "model2vec:model2vec"
    assert public_caption_name(str(folder)) == "model2vec"
    assert public_caption_name(f"local-dir:{folder}") == "local-dir:model2vec"
    assert public_caption_name("sentence-transformers:some/model") == "sentence-transformers:some/model"
    assert public_caption_name("package.module:function") == "package.module:function"


# -- what is refused --------------------------------------------------------------------------------------------------


def error_of(spec: str, encode: bool = False) -> str:
    used = (lambda: caption_encoder(spec).encode(["a dog"])) if encode else (lambda: caption_encoder(spec))
    with pytest.raises(MemfilterError) as caught:
        used()
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__} {caught.value}"


@pytest.fixture
def copies(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {form: Path(shutil.copytree(folder, tmp_path / form)) for form, folder in models.items()}


def test_unknown_specs_and_missing_folders(tmp_path: Path) -> None:
    assert error_of("builtin").startswith(
        "ConfigError captions.encoder = 'builtin': unknown, and no folder here; it is"
    )
    assert error_of(f"{tmp_path}/none").startswith(f"ConfigError captions.encoder = '{tmp_path}/none': unknown, and no")
    for spec in ("local-dir:", "model2vec:", "sentence-transformers:"):
        assert error_of(f"{spec}{tmp_path}/none").startswith(f"ModelError {tmp_path}/none: no such folder; ")
    assert error_of(str(tmp_path)) == (
        f"ModelError {tmp_path}: not a model that sentence-transformers, model2vec or transformers saved"
    )


def test_a_missing_library_is_told_with_its_extra(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for form, module in (("sentence-transformers", "sentence_transformers"), ("model2vec", "model2vec")):
        monkeypatch.setitem(sys.modules, module, None)
        expected = f"captions.encoder needs {form}, which is not installed; install it with pip install"
        assert error_of(f"{form}:{models[form]}") == f"ConfigError {expected} 'memfilter[captions]'"
        assert error_of(str(models[form])) == f"ConfigError {expected} 'memfilter[captions]'"


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_damaged_weights(copies: dict[str, Path], form: str) -> None:
    folder, weights = copies[form], copies[form] / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, cause in (
        (b"", "is empty, no weights"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
    ):
        weights.write_bytes(damaged)
        assert error_of(f"{form}:{folder}").startswith(f"ModelError {weights}: {cause}")
    weights.write_bytes(whole[: len(whole) // 2])
    assert error_of(f"{form}:{folder}", encode=True).startswith(f"ModelError {folder}: cannot be loaded by {form}: ")
    weights.unlink()
    assert f"ModelError {folder}: has no *.safetensors: " in error_of(f"{form}:{folder}")
    torch.save({}, folder / "pytorch_model.bin")
    assert f"ModelError {folder}: holds pickled weights, which may run code; " in error_of(f"{form}:{folder}")


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_tokenizer_is_told(copies: dict[str, Path], form: str) -> None:
    (copies[form] / "tokenizer.json").unlink()
    assert error_of(f"{form}:{copies[form]}", encode=True).startswith(f"ModelError {copies[form]}: ")


@pytest.mark.parametrize("form", ["transformers", "sentence-transformers"])
def test_weights_that_the_library_would_make_up_are_missed(copies: dict[str, Path], form: str) -> None:
    path = copies[form] / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("layer.1.output.dense.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    assert f"{copies[form]}: lacks 1 weights, such as " in error_of(str(copies[form]), encode=True)


def test_weights_that_are_not_numbers_are_told(copies: dict[str, Path]) -> None:
    for form in FORMS:
        path = copies[form] / "model.safetensors"
        tensors = load_file(path)
        name = next(n for n in tensors if "embeddings" in n)
        save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})
        assert error_of(f"{form}:{copies[form]}", encode=True).startswith(f"ModelError {copies[form]}: ")


@pytest.mark.parametrize(
    "foreign", ["evil.Module", "sentence_transformers_evil.Pooling", "sentence_transformers.util.import_from_string"]
)
def test_a_module_of_foreign_code_is_refused_and_not_run(
    copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    folder, ran = copies["sentence-transformers"], copies["sentence-transformers"] / "ran"
    for name in ("evil", "sentence_transformers_evil"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Module: ...\nPooling = Module")
    monkeypatch.syspath_prepend(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = foreign
    (folder / "modules.json").write_text(json.dumps(modules))
    assert f"{folder / 'modules.json'}: names the module '{foreign}': only " in error_of(str(folder))
    assert not ran.exists()
    modules[1] |= {"type": "sentence_transformers.models.Dense", "path": "../elsewhere"}
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "names the folder '../elsewhere', which is outside of the model" in error_of(str(folder))


def test_code_that_a_config_names_is_not_run(copies: dict[str, Path]) -> None:
    folder, ran = copies["transformers"], copies["transformers"] / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    for model_type in ("bert", "unheard-of"):
        changed = config | {"model_type": model_type, "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            caption_encoder(str(folder)).encode(["a dog"])
        except ModelError as e:
            assert "\n" not in str(e)  # noqa: PT017
        assert not ran.exists()


@pytest.mark.parametrize("kernel", ["some/kernel", "flash_attention_2", {"": "some/kernel"}])
def test_settings_that_fetch_compiled_code_are_refused(copies: dict[str, Path], kernel: Any) -> None:
    config, sentence = (
        copies["transformers"] / "config.json",
        copies["sentence-transformers"] / "sentence_bert_config.json",
    )
    for path, setting in (
        (config, {"_attn_implementation": kernel}),
        (config, {"text_config": {"attn_implementation": kernel}}),
        (config, {"quantization_config": {"quant_method": "fp8"}}),
        (sentence, {"model_kwargs": {"attn_implementation": kernel}}),
    ):
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | setting))
        assert error_of(str(path.parent)).startswith(f"ModelError {path}: sets ")
        path.write_text(before)
        assert caption_encoder(str(path.parent)).identity


def test_damaged_settings_and_adapters(copies: dict[str, Path]) -> None:
    folder = copies["sentence-transformers"]
    for text in ("{", "[1]", '[{"idx": 0}]'):
        (folder / "modules.json").write_text(text)
        assert error_of(f"sentence-transformers:{folder}").startswith(
            f"ModelError {folder}/modules.json: cannot be read"
        )
    folder = copies["transformers"]
    (folder / "adapter_config.json").write_text("{}")
    assert f"{folder}: is an adapter to another model; " in error_of(str(folder))
    (folder / "config.json").write_text("[]")
    assert f"{folder}/config.json: holds a list" in error_of(str(folder))


def test_files_that_change_after_the_digest_are_told(copies: dict[str, Path]) -> None:
    encoder = caption_encoder(str(copies["model2vec"]))
    (copies["model2vec"] / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has changed since the run began"):
        encoder.encode(["dog"])


OFFLINE = """
import sys
from memfilter.config import Config
from memfilter.encoders.captions import caption_encoder
from memfilter.errors import MemfilterError
for spec in sys.argv[1:]:
    try:
        print(caption_encoder(spec).identity)
    except MemfilterError as e:
        print(type(e).__name__, e)
"""


def test_without_a_network_the_hubs_cache_is_used(models: dict[str, Path], tmp_path: Path) -> None:
    revision = "0123456789abcdef" * 2 + "01234567"
    for name, form in (("some/static", "model2vec"), ("sentence-transformers/tiny", "sentence-transformers")):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        shutil.copytree(models[form], place / "snapshots" / revision)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    specs = ["model2vec:some/static", "sentence-transformers:tiny", "model2vec:some/other@v2"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *specs], env=environment, capture_output=True, text=True, check=True
    )
    static, sentence, other = done.stdout.splitlines()
    assert static == caption_encoder(str(models["model2vec"])).identity
    assert sentence == caption_encoder(str(models["sentence-transformers"])).identity
    assert other.startswith("ModelError some/other@v2: no weights in the hub's cache here, nor to be had from the hub")
    assert "run 'hf download some/other --revision v2' where there is a network" in other


# -- one's own --------------------------------------------------------------------------------------------------------

OWN = '''
import numpy as np

class Letters:
    """The letters of a text, counted: an anagram says the same."""
    dim, identity, similarity = 26, "letters-1", 0.99

    def encode(self, texts):
        rows = np.array([[t.lower().count(chr(97 + c)) for c in range(26)] for t in texts], np.float32)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(lengths > 0, lengths, 1)

def broken(**changed):
    return lambda: type("Broken", (Letters,), changed)()

no_unit = broken(encode=lambda self, texts: np.ones((len(texts), 26), np.float32))
unnamed, unknown_cosine = broken(identity=""), broken(similarity=None)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_captions_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_an_encoder_of_ones_own(own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = caption_encoder(f"{own}:Letters")
    assert semantic_similarity(encoder, Config()) == 0.99
    a, b, distance = semantic_edges(
        ["listen", "", "dog", "silent", "12", "God"], Store(tmp_path), encoder, 0.99, "anagrams"
    )
    assert (a.tolist(), b.tolist()) == ([0, 2], [3, 5])
    assert distance == pytest.approx(0, abs=1e-3)
    unnamed, no_unit = error_of(f"{own}:unnamed"), error_of(f"{own}:no_unit", encode=True)
    assert unnamed.startswith(f"ConfigError captions.encoder = '{own}:unnamed': identity is ''; an encoder's is a text")
    assert no_unit.endswith("encode returned a row of length 5.1; rows are of length 1")
    assert "cannot be imported and called (AttributeError" in error_of(f"{own}:nothing")
    unmeasured = {"encoder": f"{own}:unknown_cosine"}
    for given, expected in (({}, 0.95), ({"encoder_similarity": 0.8}, 0.8)):
        config = Config.parse({"captions": unmeasured | given})
        assert semantic_similarity(caption_encoder(f"{own}:unknown_cosine"), config) == expected
    assert [r.getMessage() for r in caplog.records] == [
        f"{own}:unknown_cosine: the cosine of captions that say the same was never measured; 0.95 is used, or set "
        "captions.encoder_similarity"
    ]


# -- edges ------------------------------------------------------------------------------------------------------------


class Counting:
    """An encoder that counts the texts that it is given."""

    def __init__(self, encoder: CaptionEncoder) -> None:
        self._encoder, self.seen = encoder, 0
        self.identity, self.dim, self.similarity = encoder.identity, encoder.dim, encoder.similarity

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        self.seen += len(texts)
        return self._encoder.encode(texts)


def sentences(count: int) -> list[str]:
    random = np.random.default_rng(2)
    made = {" ".join(random.choice(WORDS, random.integers(1, 7))) for _ in range(2 * count)}
    return ["", "🎉", *sorted(made)[:count]]


@pytest.mark.parametrize("kind", [list, pa.array])
def test_the_edges_are_those_of_all_pairs(models: dict[str, Path], tmp_path: Path, kind: Any) -> None:
    texts, encoder = sentences(400), caption_encoder(str(models["model2vec"]))
    a, b, distance = semantic_edges(kind(texts), Store(tmp_path), encoder, 0.9, "some")
    halves = encoder.encode(texts).astype(np.float16).astype(np.float64)
    rows = halves / np.maximum(np.linalg.norm(halves, axis=1, keepdims=True), 1e-9)
    cosine = np.triu(rows @ rows.T, 1)
    expected = np.nonzero(cosine >= 0.9)
    assert len(a) > 50
    assert np.array_equal(a, expected[0])
    assert np.array_equal(b, expected[1])
    np.testing.assert_allclose(distance, 1 - cosine[expected], atol=1e-6)
    assert not np.isin([0, 1], [a, b]).any()  # of these two nothing is known
    note = read_note(tmp_path / "edges" / "caption.parquet")
    assert (note["rows"], note["pairs"], note["lowest"]) == (402, len(a), 0.9)
    assert note["recall"]["share"] == 1
    assert [p.name for p in (tmp_path / "edges").iterdir()] == ["caption.parquet"]


KILLED = """
import json, os, signal, sys
from memfilter import caption_edges
from memfilter.encoders.captions import caption_encoder
from memfilter.store import Store

class Dying:
    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0
        self.identity, self.dim = encoder.identity, encoder.dim

    def encode(self, texts):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.encoder.encode(texts)

folder, out = sys.argv[1:]
caption_edges._CHUNK = 64
caption_edges.semantic_edges(json.load(sys.stdin), Store(out), Dying(caption_encoder(folder)), 0.9, "some")
"""


def test_a_killed_call_goes_on_from_what_it_embedded(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_edges, "_CHUNK", 64)
    texts, folder = sentences(300), str(models["model2vec"])
    whole = semantic_edges(texts, Store(tmp_path / "whole"), caption_encoder(folder), 0.9, "some")
    command = [sys.executable, "-c", KILLED, folder, str(tmp_path / "killed")]
    killed = subprocess.run(command, input=json.dumps(texts), text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    after = Counting(caption_encoder(folder))
    again = semantic_edges(texts, Store(tmp_path / "killed"), after, 0.9, "some")
    assert after.seen == len(texts) - 128
    assert all(np.array_equal(x, y) for x, y in zip(whole, again, strict=True))
    files = [(tmp_path / name / "edges" / "caption.parquet").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_edges_are_made_again_for_other_texts_and_thresholds_alone(models: dict[str, Path], tmp_path: Path) -> None:
    texts, encoder, store = sentences(100), Counting(caption_encoder(str(models["model2vec"]))), Store(tmp_path)
    for similarity, inputs, seen in ((0.9, "a", 1), (0.9, "a", 1), (0.8, "a", 2), (0.8, "b", 3)):
        semantic_edges(texts, store, encoder, similarity, inputs)
        assert encoder.seen == seen * len(texts)


@pytest.mark.parametrize("texts", [[], ["dog"], ["", "🎉"]])
def test_few_texts_have_no_edges(models: dict[str, Path], tmp_path: Path, texts: list[str]) -> None:
    edges = semantic_edges(texts, Store(tmp_path), caption_encoder(str(models["model2vec"])), 0.5, "few")
    assert [len(column) for column in edges] == [0, 0, 0]


def test_a_config_error_is_what_a_spec_of_no_encoder_gives(own: str) -> None:
    with pytest.raises(ConfigError, match="dim is missing"):
        caption_encoder(f"{own}:broken")
