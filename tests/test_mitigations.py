"""Mitigations in training against their definitions: what is drawn, how often, and that it is drawn again exactly."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import encoded, picture, sample, write_tar
from diffusers import DDPMScheduler, StableDiffusionPipeline
from pipelines import LATENT_SIDE, write_pipeline
from scipy.stats import beta, chisquare, kstest

import memfilter
from memfilter import Config, ConfigError, InputError, Manifest, RunError
from memfilter.insertions import vocabulary
from memfilter.training import (
    GeneralCaption,
    MaskedLoss,
    Mitigation,
    MultipleCaptions,
    ObjectPool,
    RandomCaption,
    RandomTokens,
    RepeatedWords,
    add_noise,
    dual_fusion,
    harmless,
    mix_up,
    sample_seed,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["red", "blue", "green", "violet", "grey"]
TOKENS = [f"{word} " for word in WORDS]  # each ends a word
CAPTION = "a photo of one cat"
POOL = [CAPTION, "a cat", "an animal on a sofa"]
DRAWS = 2000
AT_RANDOM = 1e-4  # a seeded test fails by chance for one seed in so many


def drawn(*changes: Any, pool: list[str] | None = None) -> list[str]:
    """Return what becomes of CAPTION in one sample after another."""
    mitigation = Mitigation(*changes)
    return [mitigation.change(CAPTION, sample_seed(0, 0, i), pool) for i in range(DRAWS)]


def fits(values: Iterable[Any], expected: dict[Any, float]) -> bool:
    counts = Counter(values)
    assert counts.keys() <= expected.keys()
    shares = [p * counts.total() for p in expected.values()]
    return bool(chisquare([counts[v] for v in expected], shares).pvalue > AT_RANDOM)


# -- each change of captions ------------------------------------------------------------------------------------------


def test_of_several_captions_each_is_drawn_as_often() -> None:
    assert fits(drawn(MultipleCaptions(), pool=POOL), dict.fromkeys(POOL, 1 / 3))
    assert {*drawn(MultipleCaptions())} == {*drawn(MultipleCaptions(), pool=[])} == {CAPTION}


def test_a_random_caption_of_four_tokens_takes_the_place_of_a_tenth() -> None:
    made = drawn(RandomCaption(TOKENS))
    assert fits((text == CAPTION for text in made), {True: 0.9, False: 0.1})
    replaced = [text.split() for text in made if text != CAPTION]
    assert {len(words) for words in replaced} == {4}
    assert fits((word for words in replaced for word in words), dict.fromkeys(WORDS, 1 / 5))


def places(made: list[str], allowed: list[str]) -> list[tuple[int, str]]:
    """Return where one word was put into CAPTION, and which, for the captions that were changed."""
    own, found = CAPTION.split(), []
    for words in (text.split() for text in made if text != CAPTION):
        ways = [i for i in range(len(words)) if words[:i] + words[i + 1 :] == own and words[i] in allowed]
        found.append((ways[0], words[ways[0]]))
    return found


def test_two_tokens_are_inserted_anywhere_in_a_tenth() -> None:
    made = drawn(RandomTokens(TOKENS))
    assert fits((text == CAPTION for text in made), {True: 0.9, False: 0.1})
    assert {len(text.split()) for text in made} == {5, 7}
    one = places(drawn(RandomTokens(TOKENS, probability=1, count=1)), WORDS)
    assert fits(one, {(at, word): 1 / 30 for at in range(6) for word in WORDS})


def test_two_of_its_own_words_are_repeated_anywhere_in_a_tenth() -> None:
    made = drawn(RepeatedWords())
    assert fits((text == CAPTION for text in made), {True: 0.9, False: 0.1})
    own = Counter(CAPTION.split())
    more = [Counter(text.split()) - own for text in made if text != CAPTION]
    assert {counts.total() for counts in more} == {2}
    assert fits((word for counts in more for word in counts.elements()), dict.fromkeys(own, 1 / 5))
    # a word put before or after itself looks the same
    words, expected = CAPTION.split(), Counter[tuple[int, str]]()
    for at in range(6):
        for word in words:
            expected[places([" ".join([*words[:at], word, *words[at:]])], words)[0]] += 1 / 30
    assert fits(places(drawn(RepeatedWords(probability=1, count=1)), words), dict(expected))


def test_the_general_caption_is_taken_from_the_pool_alone() -> None:
    general = ["an animal", "a vehicle"]
    assert {*drawn(GeneralCaption(general), pool=[*POOL, "an animal"])} == {"an animal"}
    assert {*drawn(GeneralCaption(general), pool=POOL)} == {*drawn(GeneralCaption(general))} == {CAPTION}
    # its own form stands behind that of a copy's caption
    assert {*drawn(GeneralCaption(general), pool=[*POOL, "a vehicle", "an animal"])} == {"an animal"}
    some = drawn(GeneralCaption(general, probability=0.25), pool=[*POOL, "an animal"])
    assert fits(some, {CAPTION: 0.75, "an animal": 0.25})


@pytest.mark.parametrize("probability", [0, 1])
def test_a_probability_of_0_is_never_and_of_1_always(probability: int) -> None:
    for change in (RandomCaption(TOKENS, probability), RandomTokens(TOKENS, probability), RepeatedWords(probability)):
        assert sum(text != CAPTION for text in drawn(change)) == probability * DRAWS


def test_changes_are_made_in_order_and_a_further_one_does_not_change_the_draws_of_the_others() -> None:
    chain = drawn(MultipleCaptions(), RandomTokens(TOKENS), pool=POOL)
    only = drawn(MultipleCaptions(), pool=POOL)
    kept = [one == other for one, other in zip(chain, only, strict=True)]
    assert fits(kept, {True: 0.9, False: 0.1})
    assert kept == [text == CAPTION for text in drawn(RandomTokens(TOKENS))]
    assert drawn(RandomCaption(TOKENS, 1), RepeatedWords(1))[0].count(" ") == 5
    twice = drawn(RandomTokens(TOKENS, 0.5), RandomTokens(TOKENS, 0.5))  # with draws of their own
    assert fits((text.count(" ") for text in twice), {4: 0.25, 6: 0.5, 8: 0.25})


def shout(caption: str, pool: Any, random: np.random.Generator) -> str:
    return caption.upper()


def test_a_function_is_a_change_too() -> None:
    assert {*drawn(shout)} == {CAPTION.upper()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomTokens(TOKENS, -0.1), r"RandomTokens\(probability=-0.1\): from 0 to 1"),
        (lambda: RepeatedWords(1.5), r"RepeatedWords\(probability=1.5\)"),
        (lambda: GeneralCaption([], float("nan")), r"GeneralCaption\(probability=nan\)"),
        (lambda: RandomCaption([]), r"RandomCaption: the vocabulary holds no token; take memfilter.insertions"),
        (lambda: RandomTokens(TOKENS, count=0), r"RandomTokens\(count=0\): at least 1"),
        (lambda: add_noise(torch.zeros(2, 3), [1, 2], -0.1), r"add_noise\(scale=-0.1\): 0 or more"),
        (lambda: add_noise(torch.zeros(2, 3), [1, 2, 3]), r"3 seeds for 2 embeddings"),
        (lambda: mix_up(torch.zeros(2, 3), [1, 2], 0), r"mix_up\(alpha=0\): above 0"),
        (lambda: mix_up(torch.zeros(2, 3), [1, 2], 1, torch.ones(3)), r"3 weights for 2 embeddings"),
        (lambda: dual_fusion(*torch.zeros(4, 2, 3), latent_weight=1.1), r"latent_weight=1.1\): from 0 to 1"),
        (lambda: dual_fusion(*torch.zeros(4, 2, 3), text_weight=-1), r"text_weight=-1\): from 0 to 1"),
        (
            lambda: dual_fusion(torch.zeros(2, 3), torch.zeros(2, 7, 4), torch.zeros(2, 3), torch.zeros(2, 4)),
            r"states \(2, 7, 4\) and the objects' \(2, 4\) differ",
        ),
        (lambda: ObjectPool([]), r"no image of an object"),
        (lambda: ObjectPool.folder("nowhere"), r"nowhere: holds no folder with images"),
    ],
)
def test_what_cannot_be_obeyed_is_told_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_an_integer_of_any_library_is_that_integer() -> None:
    for one in (np.int64(7), torch.tensor(7)):
        assert sample_seed(0, one, "a") == sample_seed(0, 7, "a") != sample_seed(0, 7, b"a")  # type: ignore[arg-type]
        stage = Mitigation(RandomTokens(TOKENS, 1))
        assert stage.change("a photo", one) == stage.change("a photo", 7)  # type: ignore[arg-type]


def test_a_sample_has_another_seed_in_each_epoch_and_none_of_another_samples() -> None:
    seeds = [sample_seed(s, epoch, f"{i}") for s in range(3) for epoch in range(3) for i in range(200)]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.tensor(seeds).tolist() == seeds


# -- in a loader, on a real run ---------------------------------------------------------------------------------------

SHARDS, EACH = 4, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four shards of six samples, keys from 0 in each; the first of each shard has three copies with other captions.

    The second of the first two shards are a full duplicate, which the policy hands over.
    """
    folder = tmp_path_factory.mktemp("mitigated")
    for shard in range(SHARDS):
        members = [m for i in range(EACH) for m in sample(f"{i}", encoded(picture(10 * shard + i)), CAPTION)]
        if shard < 2:
            members[2:4] = sample("1", encoded(picture(99)), "a dog of 1999 near Paris")
        for copy in range(3):
            members += sample(f"{EACH + copy}", encoded(picture(10 * shard), quality=70), f"copy {copy} of {shard}")
        write_tar(folder / "data" / f"{shard}.tar", members)
    policy = {"partial_duplicate": "drop", "full_duplicate": "mitigate", "image_duplicate": "record"}
    config = Config.parse({"images": {"encoder": None, "keep": ["bytes", "uid"]}, "policy": policy})
    memfilter.run([str(folder / "data")], folder / "out", config, workers=1)
    return memfilter.generalise(folder / "out")


def unflagged(samples: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for s in samples:
        s.pop("mitigate", None)
        yield s


Row = tuple[str, str, str, int]
entry = itemgetter("__url__", "__key__", "txt", "seed")


def shards_of(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def attached(run: Manifest, stage: Mitigation) -> Any:
    data = wds.WebDataset(shards_of(run.path / "shards"), shardshuffle=False)
    return data.compose(run.attach(captions="pool")).compose(stage).decode(partial=True)


def stream(run: Manifest, decode: bool = True, folder: Path | None = None, seed: int = 3) -> tuple[Any, Mitigation]:
    """Return every sample with two tokens in its caption, and the stage that puts them in; no manifest is attached."""
    shards = shards_of(folder or run.path / "shards")
    data = wds.WebDataset(shards, shardshuffle=False)
    stage = Mitigation(RandomTokens(TOKENS, 1), seed=seed)
    return (data.decode(partial=True) if decode else data).compose(stage).map(entry), stage


def rows(data: Iterable[Any]) -> list[Row]:
    return sorted((Path(url).name, key, text, seed) for url, key, text, seed in data)


def test_pools_and_the_flag_say_what_is_changed(run: Manifest) -> None:
    assert run.counts == {"read": 36, "keep": 24, "mask": 0, "drop": 12, "bad": 0}
    data = attached(run, Mitigation(shout))
    flagged = {(Path(s["__url__"]).name, s["__key__"]): (s["mitigate"], s["txt"]) for s in data}
    assert len(flagged) == 24
    for place, (mitigate, text) in flagged.items():
        assert mitigate == (place in {("0.tar", "1"), ("1.tar", "1")})
        assert text.isupper() == mitigate


def test_without_the_flag_every_sample_is_changed_and_draws_from_its_pool(run: Manifest) -> None:
    data = wds.WebDataset(shards_of(run.path / "shards"), shardshuffle=False).compose(run.attach(captions="pool"))
    data = data.compose(unflagged).compose(Mitigation(MultipleCaptions())).decode(partial=True)
    seen = Counter[tuple[str, str]]()
    for _ in range(40):
        for s in data:
            assert s["txt"] in s.get("captions", [s["txt"]])
            if s["__key__"] == "0":
                assert len(s["captions"]) == 4
                seen[Path(s["__url__"]).name, s["txt"]] += 1
    assert len(seen) == SHARDS * 4
    assert fits(seen.elements(), dict.fromkeys(seen, 1 / len(seen)))


def test_the_runs_general_captions_are_taken_from_its_pools(run: Manifest, tmp_path: Path) -> None:
    change = GeneralCaption.load(run.path)
    assert len(change.general) == 1
    made = {(shard, key): text for shard, key, text, _ in rows(map(entry, attached(run, Mitigation(change))))}
    assert {made.pop(("0.tar", "1")), made.pop(("1.tar", "1"))} == {*change.general}
    assert {*made.values()} == {CAPTION}
    with pytest.raises(RunError, match="holds no general captions; make them with 'memfilter generalise"):
        GeneralCaption.load(tmp_path)
    (tmp_path / "generalised").mkdir()
    (tmp_path / "generalised" / "captions.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(RunError, match=r"captions\.parquet: damaged"):
        GeneralCaption.load(tmp_path)


@pytest.fixture(scope="module")
def expected(run: Manifest) -> list[list[Row]]:
    """Three epochs in one process."""
    data, _ = stream(run)
    return [rows(data) for _ in range(3)]


def test_every_sample_and_epoch_draws_anew(expected: list[list[Row]]) -> None:
    assert [len(epoch) for epoch in expected] == [24] * 3
    seen = [row for epoch in expected for row in epoch]
    assert len({seed for *_, seed in seen}) == 72
    same = [text for _, _, text, _ in seen if "photo" in text]  # one caption, of many samples
    assert len({*same}) > 0.8 * len(same)


@pytest.mark.parametrize(
    ("workers", "more"),
    [
        (2, {"persistent_workers": True}),
        (3, {}),
        (1, {"persistent_workers": True, "multiprocessing_context": "spawn"}),
    ],
    ids=["persistent", "new workers", "spawned"],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_draw_the_same_in_every_epoch(
    run: Manifest, expected: list[list[Row]], workers: int, more: dict[str, Any]
) -> None:
    data, stage = stream(run)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, **more)
    assert [rows(loader) for _ in range(2)] == expected[:2]
    stage.set_epoch(2)
    assert rows(loader) == expected[2]
    stage.set_epoch(1)  # as a training does that goes on
    assert rows(loader) == expected[1]


def test_a_look_at_the_data_before_the_loader_moves_no_workers_epoch(run: Manifest, expected: list[list[Row]]) -> None:
    data, _ = stream(run)
    next(iter(data))
    assert rows(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)) == expected[0]


def test_a_stream_without_an_end_draws_anew_where_its_first_sample_comes_again(run: Manifest) -> None:
    shards = shards_of(run.path / "shards")
    data = wds.WebDataset(shards, resampled=True).compose(Mitigation(RandomTokens(TOKENS, 1), seed=3)).map(entry)
    seen = Counter((key, seed) for _, key, _, seed in itertools.islice(data, 600))
    keys = Counter(key for key, _ in seen)
    assert min(keys.values()) > 3  # seeds of one key
    assert max(seen.values()) < 60


def test_samples_in_memory_keep_their_captions(run: Manifest) -> None:
    samples = list(wds.WebDataset(shards_of(run.path / "shards"), shardshuffle=False).decode(partial=True))
    stage, own = Mitigation(RandomTokens(TOKENS, 1)), [(s["txt"], set(s)) for s in samples]
    for _ in range(2):
        assert all(
            len(s["txt"].split()) == len(text.split()) + 2 for s, (text, _) in zip(stage(samples), own, strict=True)
        )
    assert [(s["txt"], set(s)) for s in samples] == own


def test_a_stream_that_repeats_counts_its_passes(run: Manifest, expected: list[list[Row]]) -> None:
    seen = list(stream(run)[0].repeat(3))
    assert [rows(seen[24 * i : 24 * i + 24]) for i in range(3)] == expected


def test_order_place_and_decoding_change_nothing(run: Manifest, expected: list[list[Row]]) -> None:
    assert rows(stream(run)[0].shuffle(20)) == expected[0]
    undecoded = rows(stream(run, decode=False)[0])
    assert [(*row[:2], row[2].decode(), row[3]) for row in undecoded] == expected[0]  # type: ignore[attr-defined]
    assert run.root is not None
    originals = {row[:2]: row for row in rows(stream(run, folder=Path(run.root))[0])}
    assert [originals[row[:2]] for row in expected[0]] == expected[0]
    assert rows(stream(run, seed=4)[0]) != expected[0]


def test_a_pickled_stage_draws_the_same(run: Manifest, expected: list[list[Row]]) -> None:
    assert rows(pickle.loads(pickle.dumps(stream(run)[0]))) == expected[0]


def test_a_memorized_caption_never_stays_where_its_pool_trains_in_its_place() -> None:
    pool = ["safe", "sound"]
    samples = [
        {"__key__": f"{i}", "txt": CAPTION, "captions": pool, "mitigate": i % 2 == 0, "loss_weight": 1.0}
        for i in range(2000)
    ]
    made = [s["txt"] for s in Mitigation(GeneralCaption(["other"], 0.5))(samples)]
    assert fits(made[::2], dict.fromkeys(pool, 0.5))
    assert fits(made[1::2], dict.fromkeys(pool, 0.5))


def test_a_sample_without_text_is_told_and_a_stream_without_pools_too(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"sample '7' has no text in 'caption': name the member .*caption=\.\.\."):
        list(Mitigation(caption="caption")([{}, {"__key__": "7", "txt": "a cat"}]))
    assert list(Mitigation(RepeatedWords())([{}])) == [{}]
    assert not caplog.messages
    list(Mitigation(MultipleCaptions())([{"__key__": "7", "txt": "a cat"}]))
    assert caplog.messages == ["none of 1 samples has a pool of captions; take attach(captions='pool')"]


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_noise_is_normal_of_the_papers_scale_and_independent_between_samples() -> None:
    seeds = torch.tensor([sample_seed(0, 0, i) for i in range(40)])
    zero = torch.zeros(40, 9, 32)
    noise = add_noise(zero, seeds)
    assert kstest(noise.flatten().numpy() / 0.1, "norm").pvalue > AT_RANDOM
    assert kstest(add_noise(zero, seeds, 2.5).flatten().numpy() / 2.5, "norm").pvalue > AT_RANDOM
    assert np.abs(np.corrcoef(noise.flatten(1)) - np.eye(40)).max() < 0.3
    other = add_noise(torch.zeros(40, 32), seeds)
    assert not torch.isclose(other, noise[:, 0]).any(1).all()


def test_noise_is_added_and_is_a_samples_own_in_any_batch() -> None:
    states, seeds = torch.randn(5, 7, 8), [3, 1, 4, 15, 9]
    noise = add_noise(torch.zeros_like(states), seeds)
    torch.testing.assert_close(add_noise(states, seeds), states + noise)
    assert torch.equal(add_noise(states, seeds), add_noise(states, torch.tensor(seeds)))
    assert torch.equal(add_noise(states.flip(0), seeds[::-1]).flip(0), add_noise(states, seeds))
    assert torch.equal(add_noise(states[1:2], seeds[1:2]), add_noise(states, seeds)[1:2])
    assert not torch.equal(add_noise(states, [3, 1, 4, 15, 8])[4], add_noise(states, seeds)[4])
    half = states.bfloat16()
    assert add_noise(half, seeds).dtype == torch.bfloat16
    assert torch.equal(add_noise(half, seeds), (half.float() + noise).bfloat16())
    assert torch.equal(add_noise(states, seeds, 0), states)


def shares(alpha: float, count: int = 500) -> tuple[list[float], list[tuple[int, ...]]]:
    """Return what was drawn for batches of three: the own embedding's share, and the partners."""
    found: list[float] = []
    partners: list[tuple[int, ...]] = []
    for i in range(count):
        mixed = mix_up(torch.eye(3, dtype=torch.float64), [3 * i, 3 * i + 1, 3 * i + 2], alpha)
        away = mixed - torch.diag(mixed.diagonal())
        partner = torch.where(away.any(1), away.argmax(1), torch.arange(3))
        partners.append(tuple(partner.tolist()))
        found += mixed.diagonal()[partner != torch.arange(3)][:1].tolist()
        torch.testing.assert_close(mixed.sum(1), torch.ones(3, dtype=torch.float64))
    return found, partners


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_mix_up_draws_its_share_from_the_beta_distribution_and_any_permutation(alpha: float) -> None:
    found, partners = shares(alpha)
    assert kstest(found, beta(alpha, 1).cdf).pvalue > AT_RANDOM
    permutations = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert fits(partners, dict.fromkeys(permutations, 1 / 6))


def test_mix_up_is_the_same_in_any_order_of_the_batch_and_for_all_its_tensors() -> None:
    states, seeds = torch.randn(6, 7, 8), [30, 10, 40, 15, 90, 20]
    mixed = mix_up(states, seeds, 1.0)
    assert not torch.equal(mixed, states)
    order = torch.randperm(6)
    again = mix_up(states[order], torch.tensor(seeds)[order], 1.0)
    assert torch.equal(again, mixed[order])
    assert torch.equal(mix_up(states[:, 0], seeds, 1.0), mixed[:, 0])
    assert torch.equal(mix_up(states[:1], seeds[:1], 1.0), states[:1])


@pytest.mark.parametrize("shape", [(6,), (6, 1, 4, 4)])
def test_a_masked_sample_has_no_part_in_mix_up(shape: tuple[int, ...]) -> None:
    states, seeds = torch.randn(6, 7, 8), [30, 10, 40, 15, 90, 20]
    kept = torch.tensor([True, False, True, True, False, True])
    weight = torch.zeros(shape)
    weight[kept] = 0.5
    alone = mix_up(states[kept], torch.tensor(seeds)[kept], 1.0)
    states[1], states[4], seeds[4] = float("nan"), float("inf"), 77
    states.requires_grad_()
    mixed = mix_up(states, seeds, 1.0, weight)
    assert torch.equal(mixed[kept], alone)
    assert mixed[1].isnan().all()
    harmless(mixed, weight).square().sum().backward()
    assert states.grad is not None
    assert states.grad.isfinite().all()
    assert not states.grad[~kept].any()
    nobody = states.detach()[kept]
    assert torch.equal(mix_up(nobody, [1, 2, 3, 4], 1.0, torch.zeros(4)), nobody)


# -- dual fusion, on a real pipeline ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@pytest.fixture
def objects(tmp_path: Path) -> ObjectPool:
    for i in range(6):
        name = ["garbage_truck", "church", "dog"][i % 3]
        (tmp_path / name / "deep").mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / name / ("deep" if i == 5 else ".") / f"{i}.png")
    (tmp_path / "church" / "notes.txt").write_text("no image")
    (tmp_path / "stray.png").write_bytes(b"in no class")
    return ObjectPool.folder(tmp_path)


def test_objects_are_drawn_uniformly_with_the_text_of_their_class(objects: ObjectPool, tmp_path: Path) -> None:
    assert len(objects) == 6
    found = Counter[tuple[bytes, str]]()
    for i in range(600):
        image, text = objects.draw(sample_seed(0, 0, i))
        assert image.mode == "RGB"
        found[image.tobytes(), text] += 1
    names = ["garbage truck", "church", "dog"]
    assert fits(found.elements(), {(picture(i).tobytes(), f" with {names[i % 3]}"): 1 / 6 for i in range(6)})
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert [text for _, text in map(ObjectPool.folder(moved).draw, range(50))] == [
        text for _, text in map(pickle.loads(pickle.dumps(ObjectPool.folder(moved))).draw, range(50))
    ]


def test_a_broken_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(InputError, match=r"dog\.png: cannot be read as an image of 'dog'"):
        ObjectPool([(tmp_path / "dog.png", "dog")]).draw(0)


def encode(pipe: Any, texts: list[str]) -> torch.Tensor:
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def latents_of(pipe: Any, images: Iterable[Any]) -> torch.Tensor:
    pixels = pipe.image_processor.preprocess([*images], 2 * LATENT_SIDE, 2 * LATENT_SIDE)
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor


def test_fusion_is_the_papers_sum_and_the_loss_that_of_the_fused_latents(pipe: Any, objects: ObjectPool) -> None:
    latents, states = latents_of(pipe, map(picture, (20, 21, 22))), encode(pipe, ["a cat", "a dog", "on"])
    images, texts = zip(*map(objects.draw, (1, 2, 3)), strict=True)
    x, c = dual_fusion(latents, states, latents_of(pipe, images), encode(pipe, [*texts]))
    torch.testing.assert_close(x, 0.9 * latents + 0.1 * latents_of(pipe, images))
    torch.testing.assert_close(c, 0.5 * states + 0.5 * encode(pipe, [*texts]))
    noise, t, weight = torch.randn_like(x), torch.tensor([10, 500, 900]), torch.ones(3)
    for kind, target in (("epsilon", noise), ("sample", x)):
        loss_of = MaskedLoss(DDPMScheduler(prediction_type=kind))
        loss = loss_of(pipe.unet, x, noise, t, weight, {"encoder_hidden_states": c})
        noised = loss_of.schedule.noised(x, noise, t)
        expected = (pipe.unet(noised, t, encoder_hidden_states=c).sample - target).square().mean()
        torch.testing.assert_close(loss, expected)


def gradients(pipe: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, list(pipe.unet.parameters()), allow_unused=True) if g is not None]


def test_all_of_it_in_one_step_leaves_a_masked_sample_invisible(pipe: Any, objects: ObjectPool) -> None:
    pipe.unet.train()
    seeds = torch.tensor([sample_seed(0, 1, i) for i in range(4)])
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    latents, states = latents_of(pipe, map(picture, range(20, 24))), encode(pipe, ["a cat", "a dog", "on", "of"])
    images, texts = zip(*map(objects.draw, seeds.tolist()), strict=True)
    others = latents_of(pipe, images), encode(pipe, [*texts])
    noise, t = torch.randn_like(latents), torch.tensor([10, 300, 500, 900])

    def loss(states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        mixed = add_noise(mix_up(states, seeds, 2.0, weight), seeds)
        x, c = dual_fusion(latents, mixed, *others)
        return MaskedLoss(DDPMScheduler())(pipe.unet, x, noise, t, weight, {"encoder_hidden_states": c})

    before = gradients(pipe, loss(states, latents))
    assert any(g.any() for g in before)
    states[1], latents[1] = float("nan"), float("inf")
    after = gradients(pipe, loss(states, latents))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_tokenizers_vocabulary_serves_the_changes(pipe: Any) -> None:
    tokens = vocabulary(pipe.tokenizer)
    made = [text.split() for text in drawn(RandomCaption(tokens, 1, count=1))]
    assert len({word for words in made for word in words}) > 0.9 * len({token.strip() for token in tokens})
