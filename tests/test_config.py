"""Configuration: its defaults, its refusals, its overlay and its digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from memfilter.config import Config, digest_of
from memfilter.errors import ConfigError, MemfilterError

DEFAULTS: dict[str, dict[str, Any]] = {
    "input": {
        "root": None,
        "caption": "txt",
        "caption_field": "caption",
        "uid_field": None,
        "allow_pipe": False,
        "max_pixels": 178_956_970,
        "max_bytes": 268_435_456,
        "max_memory": None,
        "on_bad_shard": "stop",
        "timeout": 60.0,
    },
    "images": {
        "hash": "phash",
        "hash_radius": 4,
        "decode": "fast",
        "ground": "#ffffff",
        "encoder": "builtin",
        "encoder_similarity": None,
        "match_threshold": 0.5,
        "keep": ["resolution", "bytes", "caption_length", "uid"],
    },
    "captions": {
        "tiers": ["exact", "template", "near"],
        "near_jaccard": 0.7,
        "encoder": None,
        "encoder_similarity": None,
    },
    "magnitude": {
        "model": None,
        "denoiser": None,
        "lora": None,
        "lora_scale": 1.0,
        "single_file_config": None,
        "mode": "prompt",
        "seeds": 1,
        "timesteps": [200, 400, 600, 800],
        "steps": 50,
        "guidance": 7.5,
        "signals": [],
        "dtype": "auto",
        "batch_size": 64,
        "compile": False,
        "devices": None,
        "threshold": None,
    },
    "policy": {
        "image_duplicate": "drop",
        "full_duplicate": None,
        "partial_duplicate": None,
        "caption_duplicate": "record",
        "magnitude": "mask",
        "pool_captions": True,
    },
    "output": {"shards": True},
    "generalise": {
        "joint_count": 2,
        "image_count": None,
        "caption_count": None,
        "generality": None,
        "magnitude": None,
        "model": None,
        "endpoint": None,
        "timeout": 60.0,
        "batch_size": 8,
    },
    "generality": {"tagger": None, "wordnet": "/usr/share/wordnet", "abstraction": "corrected"},
}

# another value of every key
OTHERS: dict[str, Any] = {
    "input.root": "/data",
    "input.caption": "json",
    "input.caption_field": "text",
    "input.uid_field": "uid",
    "input.allow_pipe": True,
    "input.max_pixels": 1,
    "input.max_bytes": 1,
    "input.max_memory": 2_000_000_000,
    "input.on_bad_shard": "skip",
    "input.timeout": 0.5,
    "images.hash": "whash",
    "images.hash_radius": 0,
    "images.decode": "full",
    "images.ground": "#102030",
    "images.encoder": None,
    "images.encoder_similarity": 1.0,
    "images.match_threshold": 0.8,
    "images.keep": ["uid"],
    "captions.tiers": ["exact", "near"],
    "captions.near_jaccard": 0.5,
    "captions.encoder": "model2vec:a/folder",
    "captions.encoder_similarity": 0.9,
    "magnitude.model": "some/model",
    "magnitude.denoiser": "some/folder",
    "magnitude.lora": "some.safetensors",
    "magnitude.lora_scale": 0.5,
    "magnitude.single_file_config": "some/pipeline",
    "magnitude.mode": "pair",
    "magnitude.timesteps": [500, 100],
    "magnitude.steps": 10,
    "magnitude.guidance": 2.0,
    "magnitude.signals": ["sharpness", "anisotropy"],
    "magnitude.compile": True,
    "magnitude.devices": ["cuda:1", "cuda:0"],
    "magnitude.seeds": 4,
    "magnitude.dtype": "bfloat16",
    "magnitude.batch_size": 1,
    "magnitude.threshold": 0.5,
    "policy.image_duplicate": "mask",
    "policy.full_duplicate": "down_weight",
    "policy.partial_duplicate": "mitigate",
    "policy.caption_duplicate": "drop",
    "policy.magnitude": "record",
    "policy.pool_captions": False,
    "output.shards": False,
    "generalise.joint_count": None,
    "generalise.image_count": 5,
    "generalise.caption_count": 10,
    "generalise.generality": 3.5,
    "generalise.magnitude": 2.0,
    "generalise.model": "a/folder",
    "generalise.endpoint": "http://localhost:8000/v1",
    "generalise.timeout": 5.0,
    "generalise.batch_size": 64,
    "generality.tagger": "spacy:en_core_web_sm",
    "generality.wordnet": "/data/wordnet",
    "generality.abstraction": "reference",
}
KEYS = [f"{section}.{key}" for section, keys in DEFAULTS.items() for key in keys]


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str, base: Config | None = None) -> Config:
    return Config.load(written(folder, text), base)


def refusal(folder: Path, text: str) -> str:
    """Return the error that this YAML raises, which is one line and names the file."""
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    message = str(caught.value)
    assert isinstance(caught.value, MemfilterError)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def nested(key: str, value: Any) -> dict[str, Any]:
    section, name = key.split(".")
    return {section: {name: value}}


# -- values -----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones() -> None:
    assert Config().model_dump(mode="json") == DEFAULTS


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "{}", "images:\n", "images: {}\ninput:\n"])
def test_a_file_that_says_nothing_gives_the_defaults(text: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, text) == Config()


def test_the_order_names_fields_of_the_json_sorted_and_once(tmp_path: Path) -> None:
    text = "images: {keep: ['-json:b', {field: a, order: [CC0, 4, true]}, uid, 'json:b', -bytes]}"
    config = loaded(tmp_path, text)
    assert config.images.json_fields == ("a", "b")
    assert Config.parse(config.model_dump(mode="json")) == config
    assert Config().images.json_fields == ()


def test_no_file_gives_the_defaults() -> None:
    assert Config.load(None) == Config()


@pytest.mark.parametrize("key", OTHERS)
def test_every_key_is_read_from_its_section(key: str, tmp_path: Path) -> None:
    config = loaded(tmp_path, yaml.safe_dump(nested(key, OTHERS[key])))
    section, name = key.split(".")
    assert config.model_dump(mode="json") == DEFAULTS | {section: DEFAULTS[section] | {name: OTHERS[key]}}


def test_the_defaults_written_as_yaml_are_read_back(tmp_path: Path) -> None:
    assert loaded(tmp_path, yaml.safe_dump(DEFAULTS)) == Config()


@pytest.mark.parametrize(
    "value",
    [
        "null",
        "0",
        "0.25",
        "{quantile: 0}",
        "{quantile: 0.99}",
        "{false_positive_rate: 0, reference: captions.txt}",
        "{false_positive_rate: 0.01, reference: captions.txt}",
        "{false_positive_rate: 0.01, labelled: captions.csv}",
        "{saved: run/manifest/threshold.json}",
    ],
)
def test_a_threshold_is_a_number_a_quantile_or_a_false_positive_rate(value: str, tmp_path: Path) -> None:
    config = loaded(tmp_path, f"magnitude: {{threshold: {value}}}")
    assert config.model_dump(mode="json")["magnitude"]["threshold"] == yaml.safe_load(value)


def test_text_in_any_script_is_read_as_it_is(tmp_path: Path) -> None:
    assert loaded(tmp_path, "input: {caption_field: подпись, root: 画像/shards}").input.root == "画像/shards"


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_section_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, "image: {hash: phash}")
    assert message == f"unknown key 'image'; the keys there are: {', '.join(DEFAULTS)}"


def test_an_unknown_section_without_keys_is_refused_too(tmp_path: Path) -> None:
    assert "unknown key 'image'" in refusal(tmp_path, "image:\n")


@pytest.mark.parametrize("section", DEFAULTS)
def test_an_unknown_key_is_named_beside_the_known_ones_of_its_section(section: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{section}: {{radius: 3}}")
    assert message == f"unknown key '{section}.radius'; the keys there are: {', '.join(DEFAULTS[section])}"


def test_an_unknown_key_is_named_before_a_value_out_of_range(tmp_path: Path) -> None:
    assert "unknown key 'output.shard'" in refusal(tmp_path, "images: {hash_radius: -1}\noutput: {shard: true}")


WRONG = {
    "generalise.joint_count": ["0", "two"],
    "generalise.generality": ["11.0", "-1.0"],
    "generalise.magnitude": ["-1.0", ".inf"],
    "generalise.endpoint": ["localhost", "'ftp://a/b'"],
    "generalise.timeout": ["0.0"],
    "generalise.batch_size": ["0", "null"],
    "generality.tagger": ["3", "[a]"],
    "generality.wordnet": ["null"],
    "generality.abstraction": ["inverted", "null"],
    "input.root": ["3", "[a]"],
    "input.caption": ["text", "null", "1"],
    "input.caption_field": ["null", "3"],
    "input.allow_pipe": ["maybe", "null", "[true]"],
    "input.max_pixels": ["0", "-5", "178956971", "many", "1.5", "null", "true"],
    "input.max_bytes": ["0", "-1", "1 GB"],
    "input.max_memory": ["0", "-1", "1 GB"],
    "input.on_bad_shard": ["ignore", "false"],
    "input.timeout": ["0", "-1", "86401", ".inf", ".nan", "null", "1m", "true"],
    "images.hash": ["md5", "PHASH", "null"],
    "images.hash_radius": ["-1", "17", "4.5", "four", "null", "[4]", "true"],
    "images.decode": ["slow", "null"],
    "images.ground": ["whitish", "''", "'#12345'", "'#ffffff80'", "transparent", "'rgb(0, 0, 256)'", "#ffffff\n", "7"],
    "images.encoder": ["3", "[builtin]"],
    "images.match_threshold": ["0", "1", "-1", "high", ".nan", "true"],
    "images.encoder_similarity": ["0", "2.01", "-1", "high", ".nan", "true"],
    "images.keep": [
        "[]",
        "[size]",
        "bytes",
        "null",
        "[bytes, 3]",
        "[--bytes]",
        "['json:']",
        "[license]",
        "[{field: license}]",
        "[{field: license, order: []}]",
        "[{field: license, order: CC0}]",
        "[{field: license, order: [1.5]}]",
        "[{field: license, order: [true, 'true']}]",
        "[{field: '', order: [a]}]",
        "[{field: a, order: [b], best: c}]",
    ],
    "captions.tiers": ["[fuzzy]", "exact"],
    "captions.near_jaccard": ["0", "0.29", "1.01", "-1", "high", ".nan", "true"],
    "captions.encoder": ["3", "[model2vec]"],
    "captions.encoder_similarity": ["0", "1.01", "-1", "high", ".nan", "true"],
    "magnitude.model": ["3", "{}"],
    "magnitude.denoiser": ["3"],
    "magnitude.lora": ["3"],
    "magnitude.lora_scale": [".nan", "big", "null"],
    "magnitude.single_file_config": ["3"],
    "magnitude.mode": ["image", "null"],
    "magnitude.seeds": ["0", "-1", "2.5"],
    "magnitude.timesteps": ["[]", "[1001]", "[-1]", "[5, 5]", "[1.5]", "5"],
    "magnitude.steps": ["0", "51", "null"],
    "magnitude.guidance": ["-1.0", ".inf"],
    "magnitude.signals": ["[entropy]", "[sharpness, sharpness]", "sharpness"],
    "magnitude.compile": ["'yes'", "null"],
    "magnitude.devices": ["[]", "3"],
    "magnitude.dtype": ["float64", "null"],
    "magnitude.batch_size": ["0", "big"],
    "magnitude.threshold": [
        "-0.1",
        "high",
        ".nan",
        "true",
        "[0.5]",
        "{quantile: 1}",
        "{quantile: -0.1}",
        "{quantile: null}",
        "{false_positive_rate: 1, reference: a.txt}",
    ],
    "policy.image_duplicate": ["keep", "bad", "null"],
    "policy.full_duplicate": ["delete"],
    "policy.partial_duplicate": ["0.5"],
    "policy.caption_duplicate": ["delete"],
    "policy.magnitude": ["down-weight"],
    "policy.pool_captions": ["some"],
    "output.shards": ["some", "null"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_type_or_range_names_its_key_and_value(key: str, value: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    message = refusal(tmp_path, f"{section}: {{{name}: {value}}}")
    assert message.startswith(f"{key} = ")
    assert len(message) > len(f"{key} = ")


def test_a_value_out_of_range_is_told_with_the_range(tmp_path: Path) -> None:
    message = refusal(tmp_path, "images: {hash_radius: 17}")
    assert message == "images.hash_radius = 17: Input should be less than or equal to 16, or 31 with hash: pdq"


def test_a_ground_has_one_form_and_one_digest_however_it_is_named(tmp_path: Path) -> None:
    for name in ("white", "White", "#fff", "#FFFFFF", "rgb(100%, 100%, 100%)", "hsl(0, 0%, 100%)"):
        config = loaded(tmp_path, f"images: {{ground: '{name}'}}")
        assert config.images.ground == "#ffffff"
        assert config.digest("images.ground") == Config().digest("images.ground")
    assert loaded(tmp_path, "images: {ground: navy}").images.ground == "#000080"
    message = refusal(tmp_path, "images:\n  ground: #ffffff\n")  # in YAML that is a comment
    assert message == "images.ground = None: No opaque colour; give its name, or '#rrggbb' in quotes"


def test_the_semantic_tier_needs_an_encoder(tmp_path: Path) -> None:
    message = refusal(tmp_path, "captions: {tiers: [exact, semantic]}")
    assert message == "captions.encoder = None: The tier 'semantic' needs one, as in 'model2vec:FOLDER'"
    config = loaded(tmp_path, "captions: {tiers: [exact, semantic], encoder: 'model2vec:a/folder'}")
    assert config.captions.tiers == ("exact", "semantic")


def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "images: phash").startswith("images = 'phash': ")
    assert refusal(tmp_path, "images: [hash, phash]").startswith("images = ['hash', 'phash']: ")


def test_a_false_positive_rate_without_its_reference_is_told_what_is_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path, "magnitude: {threshold: {false_positive_rate: 0.01}}")
    assert "reference" in message
    assert "unknown key" not in message


def test_a_wrong_key_of_the_order_is_told_the_keys_that_there_are(tmp_path: Path) -> None:
    keys = "resolution, bytes, caption_length, uid, json:FIELD, each with or without a '-' before it, or {field: FIELD,"
    for wrong, cause in [
        ("[bytes, size]", "'size': No such key"),
        ("[{field: license, order: [CC0, CC0]}]", "['CC0', 'CC0']: A value is named twice"),
    ]:
        message = refusal(tmp_path, f"images: {{keep: {wrong}}}")
        assert message == f"images.keep = {cause}; a key is {keys} order: [VALUES]}}"


def test_an_unknown_key_of_a_threshold_is_told_the_keys_of_thresholds(tmp_path: Path) -> None:
    message = refusal(tmp_path, "magnitude: {threshold: {quantil: 0.9}}")
    assert "magnitude.threshold" in message
    assert "quantile" in message
    assert "batch_size" not in message


@pytest.mark.parametrize("text", ["- images\n", "images", "3", "[]", "0", "false", "''", "2024-01-01"])
def test_yaml_that_is_not_a_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith("must hold sections such as 'images:', not a ")


@pytest.mark.parametrize(
    "text",
    [
        "images: {hash: phash",
        "images:\n\thash: phash",
        "a: b: c",
        "input: {root: !!python/object/apply:os.getcwd []}",
        "input: {root: *nowhere}",
        "\x00",
    ],
    ids=["unclosed", "tab", "colons", "python", "alias", "nul"],
)
def test_what_is_not_yaml_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith("not YAML: ")


def test_a_date_that_does_not_exist_is_refused_in_one_line(tmp_path: Path) -> None:
    refusal(tmp_path, "input: {root: 2024-13-45}")


@pytest.mark.parametrize("text", ["1: {hash: phash}", "null: {hash: phash}", "images: {1: phash}", "[a, b]: {}"])
def test_a_key_that_is_no_text_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    refusal(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        Config.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_file_that_is_not_utf8_are_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("input: {root: é}".encode("latin-1"))
    for path in (tmp_path, latin):
        with pytest.raises(ConfigError, match="cannot be read"):
            Config.load(path)


def test_values_given_as_dictionaries_are_checked_alike() -> None:
    assert Config.parse({"images": {"hash_radius": 2}}).images.hash_radius == 2
    with pytest.raises(ConfigError, match=r"^configuration: unknown key 'images.radius'; "):
        Config.parse({"images": {"radius": 2}})


# -- overlay ----------------------------------------------------------------------------------------------------------


def test_a_file_is_laid_over_the_base_key_by_key(tmp_path: Path) -> None:
    base = Config.parse({"images": {"hash": "dhash", "hash_radius": 2, "keep": ["bytes", "uid"]}})
    config = loaded(tmp_path, "images: {hash_radius: 6, keep: [uid]}\npolicy: {magnitude: drop}", base)
    assert config == Config.parse(
        {"images": {"hash": "dhash", "hash_radius": 6, "keep": ["uid"]}, "policy": {"magnitude": "drop"}}
    )


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_that_the_file_does_not_name_keeps_the_value_of_the_base(key: str, tmp_path: Path) -> None:
    base = Config.parse(nested(key, OTHERS[key]))
    beside = sorted((k for k in OTHERS if k != key), key=lambda k: k.split(".")[0] != key.split(".")[0])
    other = beside[0]  # in the same section, where that has another
    config = loaded(tmp_path, yaml.safe_dump(nested(other, OTHERS[other])), base)
    assert config.digest(key) == base.digest(key) != Config().digest(key)
    assert config.digest(other) != base.digest(other)


@pytest.mark.parametrize("text", ["", "images:\n", "images: {}"])
def test_a_file_that_says_nothing_leaves_the_base(text: str, tmp_path: Path) -> None:
    base = Config.parse({"images": {"hash_radius": 2}, "magnitude": {"threshold": {"quantile": 0.9}}})
    assert loaded(tmp_path, text, base) == base
    assert Config.load(None, base) == base


def test_null_takes_a_value_of_the_base_away_and_a_threshold_is_replaced_whole(tmp_path: Path) -> None:
    base = Config.parse({"images": {"encoder": "builtin"}, "magnitude": {"threshold": {"quantile": 0.9}}})
    config = loaded(tmp_path, "images: {encoder: null}\nmagnitude: {threshold: null}", base)
    assert (config.images.encoder, config.magnitude.threshold) == (None, None)
    other = loaded(tmp_path, "magnitude: {threshold: {false_positive_rate: 0.1, reference: a.txt}}", base)
    assert other.model_dump()["magnitude"]["threshold"] == {"false_positive_rate": 0.1, "reference": "a.txt"}


def test_laying_a_file_over_a_base_leaves_the_base_alone(tmp_path: Path) -> None:
    base = Config.parse({"images": {"hash_radius": 2}})
    loaded(tmp_path, "images: {hash_radius: 6}", base)
    assert base.images.hash_radius == 2


# -- digests ----------------------------------------------------------------------------------------------------------


def test_the_keys_tested_here_are_all_keys() -> None:
    assert set(KEYS) == set(OTHERS)


@pytest.mark.parametrize("key", OTHERS)
def test_a_digest_changes_with_the_keys_that_it_names_and_no_other(key: str) -> None:
    changed = Config.parse(nested(key, OTHERS[key]))
    others = [k for k in KEYS if k != key]
    assert changed.digest(key) != Config().digest(key)
    assert changed.digest(*KEYS) != Config().digest(*KEYS)
    assert changed.digest(*others) == Config().digest(*others)


def test_digests_of_different_keys_differ_though_their_values_are_equal() -> None:
    config = Config()
    assert config.input.root is config.input.uid_field is None
    assert config.digest("input.root") != config.digest("input.uid_field")


def test_a_digest_asks_for_no_order_and_no_spelling(tmp_path: Path) -> None:
    one = loaded(tmp_path, "images: {hash_radius: 3, encoder_similarity: 1}\ninput: {root: a}")
    two = loaded(tmp_path, "input:\n  root: 'a'\nimages:\n  encoder_similarity: 1.0\n  hash_radius: 0x3\n")
    assert one.digest(*KEYS) == two.digest(*reversed(KEYS))


def test_a_digest_is_the_same_in_every_process_and_version() -> None:
    assert Config().digest("images.hash", "images.hash_radius") == digest_of(
        {"images.hash": "phash", "images.hash_radius": 4}
    )
    canonical = '{"a":0.5,"b":[1,null,"é"]}'.encode()
    assert digest_of({"b": [1, None, "é"], "a": 0.5}) == hashlib.blake2b(canonical, digest_size=16).hexdigest()
    assert digest_of({"b": [1, None, "é"], "a": 0.5}) == "7ebb53a08bfe09c781a8c31678ea5b3d"


def test_a_digest_of_a_key_that_does_not_exist_raises() -> None:
    with pytest.raises(KeyError):
        Config().digest("images.radius")


# -- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_no_value_can_be_set(key: str) -> None:
    config = Config()
    section, name = key.split(".")
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(config, section), name, OTHERS.get(key))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, section, getattr(Config(), section))
    assert config == Config()


def test_a_configuration_can_be_a_dictionary_key() -> None:
    assert len({Config(), Config(), Config.parse({"output": {"shards": False}})}) == 2
