"""What is inserted into captions, against the definitions: which words, how many, and where."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import write_family, write_pipeline
from scipy.stats import binom, chisquare
from transformers import AutoTokenizer, CLIPTokenizer

from memfilter.insertions import insert_numbers, insert_tokens, random_caption, repeat_words, seeded, vocabulary

TOKENS = ["red ", "blue ", "green", "violet ", "grey"]
CAPTION = "a photo  of one cat"
DRAWS = 6000
AT_RANDOM = 1e-4  # a seeded test fails by chance for one seed in so many


def fits(values: list[object], expected: dict[object, float]) -> bool:
    counts = Counter(values)
    assert counts.keys() <= expected.keys()
    return bool(
        chisquare([counts[v] for v in expected], [p * len(values) for p in expected.values()]).pvalue > AT_RANDOM
    )


def inserted(made: str) -> tuple[int, str]:
    """Return where one word was put into CAPTION, and which."""
    words, own = made.split(), CAPTION.split()
    (at,) = [i for i in range(len(words)) if words[:i] + words[i + 1 :] == own]
    return at, words[at]


def test_a_token_is_any_of_the_vocabulary_at_any_place() -> None:
    random = np.random.default_rng(0)
    found = [inserted(insert_tokens(CAPTION, TOKENS, random, 1)) for _ in range(DRAWS)]
    assert fits(found, {(at, token.strip()): 1 / 30 for at in range(6) for token in TOKENS})


def test_a_number_is_uniform_below_a_hundred_thousand_at_any_place() -> None:
    random = np.random.default_rng(1)
    found = [inserted(insert_numbers(CAPTION, random, 1)) for _ in range(DRAWS)]
    assert all(0 <= int(number) < 100_000 for _, number in found)
    assert fits([at for at, _ in found], dict.fromkeys(range(6), 1 / 6))
    assert fits([int(number) // 10_000 for _, number in found], dict.fromkeys(range(10), 1 / 10))


def test_a_repeated_word_is_any_of_the_captions_own() -> None:
    random = np.random.default_rng(2)
    counts = Counter(CAPTION.split())
    more = [(Counter(repeat_words(CAPTION, random, 1).split()) - counts).popitem() for _ in range(DRAWS)]
    assert fits(more, {(word, 1): 1 / 5 for word in counts})


def test_a_random_caption_is_four_tokens_drawn_uniformly() -> None:
    random = np.random.default_rng(3)
    captions = [random_caption([f"{token.strip()} " for token in TOKENS], random).split() for _ in range(DRAWS)]
    assert {len(words) for words in captions} == {4}
    for place in range(4):
        assert fits([words[place] for words in captions], {token.strip(): 1 / 5 for token in TOKENS})


def test_a_token_that_does_not_end_a_word_goes_on_into_the_next() -> None:
    assert random_caption(["un"], np.random.default_rng(0)) == "unununun"
    assert random_caption([" it"], np.random.default_rng(0), count=2) == "it it"
    captions = [random_caption(TOKENS, np.random.default_rng(seed)) for seed in range(DRAWS)]
    # the last needs no space: three of five end a word
    assert fits([len(c.split()) for c in captions], {1 + n: binom.pmf(n, 3, 3 / 5) for n in range(4)})


def written(tokenizer: Any) -> list[int]:
    """Return the tokens that are whole text."""
    ids = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids})
    return [i for i in ids if tokenizer.decode([i]).strip() and "\ufffd" not in tokenizer.decode([i])]


@pytest.mark.parametrize("family", ["sdxl", "sana", "z_image"])  # tokenizers of CLIP, Gemma and Qwen
def test_a_random_caption_is_what_the_tokenizer_makes_of_its_tokens_together(family: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_family(tmp_path, family) / "tokenizer")
    tokens, ids = vocabulary(tokenizer), written(tokenizer)
    assert len(tokens) == len(ids)
    for seed in range(200):
        drawn = np.random.default_rng(seed).integers(len(ids), size=4)
        together = tokenizer.decode([ids[i] for i in drawn], clean_up_tokenization_spaces=False)
        assert random_caption(tokens, np.random.default_rng(seed)) == " ".join(together.split())


@given(st.text(max_size=40), st.integers(0, 6), st.integers(0, 2**32))
def test_the_captions_own_words_stay_in_their_order(caption: str, count: int, seed: int) -> None:
    marked = [f"\u2603{token}" for token in TOKENS]
    own = [word for word in caption.split() if not word.startswith("\u2603")]
    made = insert_tokens(" ".join(own), marked, np.random.default_rng(seed), count).split()
    assert [word for word in made if not word.startswith("\u2603")] == own
    assert len(made) == len(own) + count


def test_two_are_inserted_unless_told_otherwise() -> None:
    for insert in (partial(insert_tokens, tokens=TOKENS), insert_numbers, repeat_words):
        assert len(insert(CAPTION, random=np.random.default_rng(4)).split()) == 7
        assert len(insert(CAPTION, random=np.random.default_rng(4), count=4).split()) == 9


def test_a_caption_without_a_word_has_none_to_repeat() -> None:
    assert repeat_words("", np.random.default_rng(0)) == ""
    assert repeat_words(" \n", np.random.default_rng(0)) == " \n"
    assert insert_tokens("", TOKENS, np.random.default_rng(0)).count(" ") == 1


def test_the_generator_depends_on_every_name_and_on_nothing_else() -> None:
    names = [(0,), (0, 0), (0, "0"), (0, b"0"), (1, 0), (0, 1), (0, "a", "bc"), (0, "ab", "c"), (0, "abc")]
    draws = [tuple(seeded(*name).integers(2**32, size=2).tolist()) for name in names]
    assert len(set(draws)) == len(names)
    assert draws == [tuple(seeded(*name).integers(2**32, size=2).tolist()) for name in names]


def test_the_vocabulary_holds_what_can_be_written_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(write_pipeline(tmp_path) / "tokenizer")
    tokens = vocabulary(tokenizer)
    assert {"cat ", "ca", "dog ", "do", "of ", "z", "z ", "!", "! "} <= {*tokens}
    assert not {*tokens} & {*tokenizer.all_special_tokens}
    assert all(token.strip() and "\ufffd" not in token for token in tokens)
