"""Generality against a plain reading of its formulas, WordNet's files, real spaCy pipelines, and whole runs with it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from conftest import encoded, picture, sample, write_tar

import memfilter
from memfilter import Config, ConfigError, Manifest, ModelError
from memfilter.cli import cli
from memfilter.config import digest_of
from memfilter.generality import LONGEST, Rater, generality_outcome, score_generality
from memfilter.records import GENERALITY
from memfilter.store import Store
from memfilter.tagging import Spacy, Token, find_tagger
from memfilter.wordnet import FILES, Place, WordNet

REAL = Path(os.environ.get("MEMFILTER_WORDNET", "/usr/share/wordnet"))

# -- captions with tags checked by hand -------------------------------------------------------------------------------

# word/POS, then what more it is: a name (*), a verb's tense and mood, and the noun of WordNet that it is a form of (=)
TAGGED = """
    a/DET dog/NOUN=dog runs/VERB:Pres:Ind in/ADP a/DET park/NOUN=park
    two/NUM dogs/NOUN=dog are/AUX:Pres:Ind running/VERB:Pres: through/ADP the/DET grass/NOUN=grass ./PUNCT
    portrait/NOUN=portrait of/ADP Anna/PROPN*=anna Smith/PROPN*=smith ,/PUNCT 1997/NUM*
    the/DET children/NOUN=child played/VERB:Past:Ind with/ADP toys/NOUN=toy
    a/DET house/NOUN=house built/VERB:Past: in/ADP Paris/PROPN*=paris
    an/DET animal/NOUN=animal
    something/PRON happens/VERB:Pres:Ind
    look/VERB::Imp at/ADP me/PRON
    men/NOUN=men and/CCONJ women/NOUN=woman walking/VERB:Pres: and/CCONJ talked/VERB:Past:Ind
    very/ADV red/ADJ
    it/PRON was/AUX:Past:Ind blue/ADJ
    600TC/NUM bed/NOUN=bed sheet/NOUN=sheet with/ADP 2/NUM pillow/NOUN=pillow covers/NOUN=cover
    New/PROPN*=? York/PROPN*=york
    boxes/NOUN=box of/ADP cherries/NOUN=cherry and/CCONJ knives/NOUN=knife
    flurbles/NOUN=? on/ADP a/DET zorp/NOUN=?
    Hunde/NOUN=? laufen/VERB:Pres:Ind
    🐶/SYM 🐶/SYM
    entity/NOUN=entity
    He/PRON would/AUX go/VERB
    /X
"""


def parsed(word: str) -> tuple[Token, str | None]:
    """Return a token, and the noun of WordNet that it is a form of."""
    text, _, more = word.rpartition("/")
    more, _, noun = more.partition("=")
    pos, tense, mood = [*more.replace("*", "").split(":"), "", ""][:3]
    return Token(text, pos, "*" in more, tense, mood), noun or None


LINES = [[parsed(word) for word in line.split() if word != "/X"] for line in TAGGED.strip().split("\n")]
CAPTIONS = [" ".join(token.text for token, _ in line) for line in LINES]


class ByHand:
    """A tagger that knows these captions, and tags every word of others as nothing."""

    identity = "by hand"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def tag(self, captions: list[str]) -> list[list[Token]]:
        self.seen += captions
        known = {c: [token for token, _ in line] for c, line in zip(CAPTIONS, LINES, strict=True)}
        return [known[c] if c in known else [Token(word, "X") for word in c.split()] for c in captions]


def by_hand() -> ByHand:
    return ByHand()


# -- a hierarchy in the format of the real one ------------------------------------------------------------------------

# lemmas, hypernyms and instance hypernyms, the first sense of a lemma first
SENSES: list[tuple[str, list[int], list[int]]] = [
    ("entity", [], []),
    ("animal creature", [0], []),
    ("dog domestic_dog", [1, 3], []),
    ("thing", [0], []),
    ("house home", [3], []),
    ("child kid", [1], []),
    ("work_force men", [3], []),
    ("man", [1], []),
    ("woman", [1], []),
    ("city", [3], []),
    ("Paris", [], [9]),
    ("box", [3], []),
    ("cherry", [3], []),
    ("knife", [4], []),
    ("corgi Welsh_corgi", [2], []),
    ("dog frump", [8], []),
    ("glass", [3], []),
    ("spoonful", [16], []),
    ("~", [3], []),
    ("bus", [17], []),
]


def write_wordnet(folder: Path, senses: list[tuple[str, list[int], list[int]]] = SENSES) -> Path:
    """Write these senses as WordNet's three noun files."""
    licence = "".join(f"  {i:2} a licence of many lines @ 00000000 n 0000  \n" for i in range(1, 30))

    def lines(offsets: list[int]) -> list[str]:
        found = []
        for i, (lemmas, above, instances) in enumerate(senses):
            pointers = [f"@ {offsets[a]:08} n 0000" for a in above] + [f"@i {offsets[a]:08} n 0000" for a in instances]
            pointers += [f"~ {offsets[j]:08} n 0000" for j, s in enumerate(senses) if i in s[1]]
            pointers += [f"~i {offsets[j]:08} n 0000" for j, s in enumerate(senses) if i in s[2]]
            pointers += [f"+ {offsets[0]:08} v 0101", f"#m {offsets[0]:08} n 0000"]
            words = lemmas.split()
            head = f"{offsets[i]:08} 03 n {len(words):02x} {' '.join(f'{w} 0' for w in words)} {len(pointers):03}"
            found.append(f"{head} {' '.join(pointers)} | a gloss with ~ 00001740 n 0000 in it  \n")
        return found

    widths = np.cumsum([len(licence), *map(len, lines([0] * len(senses)))]).tolist()
    index: dict[str, list[int]] = {}
    for offset, (lemmas, _, _) in zip(widths, senses, strict=False):
        for lemma in lemmas.lower().split():
            index.setdefault(lemma, []).append(offset)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.noun").write_text(licence + "".join(lines(widths)))
    rows = [f"{lemma} n {len(o)} 2 @ ~ {len(o)} 1 {' '.join(f'{x:08}' for x in o)}  \n" for lemma, o in index.items()]
    (folder / "index.noun").write_text(licence + "".join(sorted(rows)))
    (folder / "noun.exc").write_text("children child\nkine cow\nknives knife\nmen man\nwomen woman\nwomen child\n")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordnet(tmp_path_factory.mktemp("wordnet"))


class Plain:
    """The hierarchy by a slow reading of its files, field by field."""

    def __init__(self, folder: Path) -> None:
        self.hyponyms: dict[int, int] = {}
        self.above: dict[int, list[int]] = {}
        self.first: dict[str, int] = {}
        for line in (folder / "data.noun").read_text("latin-1").split("\n"):
            if line[:1].isdigit():
                fields = line.split(" | ")[0].split()
                at = 4 + 2 * int(fields[3], 16)
                pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
                self.hyponyms[int(fields[0])] = len([p for p in pointers if p[0] == "~"])
                self.above[int(fields[0])] = [int(p[1]) for p in pointers if p[0] in ("@", "@i")]
        for line in (folder / "index.noun").read_text("latin-1").split("\n"):
            if line and line[0] != " ":
                fields = line.split()
                self.first[fields[0]] = int(fields[len(fields) - int(fields[2])])
        self.depths: dict[int, int] = {}

    def depth(self, sense: int) -> int:
        if sense not in self.depths:
            self.depths[sense] = 1 + min(map(self.depth, self.above[sense])) if self.above[sense] else 0
        return self.depths[sense]


def expected(line: list[tuple[Token, str | None]], plain: Plain, reference: bool) -> list[float]:
    """Return the five numbers by the formulas, read plainly."""
    tokens = [token for token, _ in line]
    if not tokens:
        return [float("nan")] * 5
    names = len([t for t in tokens if t.entity and t.pos != "NUM"])
    numbers = len([t for t in tokens if t.pos == "NUM"])
    specificity = (1 - (names + numbers) / len(tokens)) * 10
    senses = [plain.first[noun] for _, noun in line if noun in plain.first]
    ordinary = sum(plain.hyponyms.values()) / 30000
    broadness = np.interp(sum(plain.hyponyms[s] for s in senses) / len(tokens), (0, 2 * ordinary), (0, 10))
    verbs = [t for t in tokens if t.pos == "VERB"]
    tense = 10 * np.mean([t.tense == "Pres" or t.mood == "Ind" for t in verbs]) if verbs else 5
    middle = np.mean([plain.depth(s) for s in plain.above])
    mean = np.mean([plain.depth(s) for s in senses]) if senses else middle
    abstraction = np.interp(mean, (0, 2 * middle), (0, 10) if reference else (10, 0))
    return [float(np.mean([specificity, broadness, tense, abstraction])), specificity, broadness, tense, abstraction]


# -- the formulas -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> WordNet:
    if not (REAL / "data.noun").is_file():
        pytest.skip("WordNet is not here; MEMFILTER_WORDNET names its folder")
    return WordNet(REAL)


@pytest.fixture(scope="module")
def plain(real: WordNet) -> Plain:
    return Plain(REAL)


def test_the_sub_scores_equal_a_plain_reading_of_the_formulas(small: Path) -> None:
    compare(WordNet(small), Plain(small))


def test_they_do_on_the_real_hierarchy(real: WordNet, plain: Plain) -> None:
    compare(real, plain)


def compare(nouns: WordNet, plain: Plain) -> None:
    for abstraction in ("corrected", "reference"):
        scores = Rater(ByHand(), nouns, abstraction).score(CAPTIONS)
        wanted = [expected(line, plain, abstraction == "reference") for line in LINES]
        np.testing.assert_allclose(scores, wanted, rtol=1e-6, atol=1e-6)
        assert scores.dtype == np.float32
        assert scores.shape == (len(LINES), 5)
        assert len(LINES) == 20
        known = scores[~np.isnan(scores[:, 0])]
        assert known.min() >= 0
        assert known.max() <= 10


def test_scores_of_the_real_hierarchy_by_hand(real: WordNet) -> None:
    # of 82,115 senses 75,850 hyponyms, so 2.5283 a word, and a mean depth of 7.9551; of dog 18 and 8, of park 2 and 7
    scores = dict(zip(CAPTIONS, Rater(ByHand(), real).score(CAPTIONS).tolist(), strict=True))
    assert scores["a dog runs in a park"] == pytest.approx([7.9695, 10, 6.5920, 10, 5.2861], abs=2e-4)
    assert scores["entity"] == pytest.approx([7.7332, 10, 5.9328, 5, 10], abs=2e-4)
    assert scores["portrait of Anna Smith , 1997"] == pytest.approx([3.9001, 5, 0, 5, 5.6003], abs=2e-4)


def test_what_the_reference_leaves_open_has_a_value(small: Path) -> None:
    scores = dict(zip(CAPTIONS, Rater(ByHand(), WordNet(small)).score(CAPTIONS).tolist(), strict=True))
    assert scores["very red"] == [5, 10, 0, 5, 5]  # neither noun nor verb
    assert scores["flurbles on a zorp"] == [5, 10, 0, 5, 5]  # no noun that is known
    assert scores["New York"] == [2.5, 0, 0, 5, 5]
    assert np.isnan(scores[""]).all()  # no token


def test_general_captions_score_higher_unless_the_reference_is_asked_for(small: Path) -> None:
    deep, shallow = [Token("corgi", "NOUN")], [Token("creature", "NOUN")]
    corrected, reference = (
        Rater(ByHand(), WordNet(small), sign).score_tagged([deep, shallow])[:, 4] for sign in ("corrected", "reference")
    )
    assert corrected[1] > corrected[0]
    np.testing.assert_allclose(corrected + reference, 10, rtol=1e-6)


@pytest.mark.parametrize("returned", [[], [[("dog", "NOUN")]], [["dog"]]])
def test_a_tagger_that_returns_something_else_is_told(returned: list[Any], small: Path) -> None:
    class Wrong:
        identity = "wrong"

        def tag(self, captions: list[str]) -> list[list[Token]]:
            return returned

    with pytest.raises(ModelError, match="wrong: its tags are not one list of Token for each of the captions"):
        Rater(Wrong(), WordNet(small)).score(["a dog"])


# -- WordNet ----------------------------------------------------------------------------------------------------------


def test_a_noun_has_the_place_of_its_first_sense(small: Path) -> None:
    nouns = WordNet(small)
    assert nouns.find("entity") == Place(2, 0)
    assert nouns.find("dog") == Place(1, 2)
    assert nouns.find("frump") == Place(0, 3)
    assert nouns.find("city") == Place(0, 2)  # Paris is an instance, no hyponym
    assert nouns.find("PARIS") == Place(0, 3)
    assert nouns.find("~") == Place(0, 2)
    assert nouns.typical_hyponyms == sum(len(above) for _, above, _ in SENSES) / 30_000
    assert nouns.mean_depth == pytest.approx(np.mean([0, 1, 2, 1, 2, 2, 2, 2, 2, 2, 3, 2, 2, 3, 3, 3, 2, 3, 2, 4]))


@pytest.mark.parametrize(
    ("form", "noun"),
    [
        *[("dogs", "dog"), ("boxes", "box"), ("cherries", "cherry"), ("buses", "bus"), ("glasses", "glass")],
        *[("children", "child"), ("knives", "knife"), ("women", "woman"), ("spoonsful", "spoonful"), ("Dogs", "dog")],
        ("men", "work_force"),  # the word itself comes first, as in WordNet's own search
        *[("glass", "glass"), ("dogss", None), ("kine", None), ("s", None), ("", None), ("dog\x00s", None)],
    ],
)
def test_plurals_are_found_by_wordnets_own_rules(form: str, noun: str | None, small: Path) -> None:
    nouns = WordNet(small)
    found = nouns.find(form)
    assert found == (None if noun is None else nouns.find(noun))
    assert (found is None) == (noun is None)


def test_the_real_files_are_read_as_a_plain_reading_does(real: WordNet, plain: Plain) -> None:
    assert real.typical_hyponyms == pytest.approx(sum(plain.hyponyms.values()) / 30_000)
    assert real.mean_depth == pytest.approx(np.mean([plain.depth(s) for s in plain.above]))
    assert len(plain.first) > 100_000
    for lemma, sense in plain.first.items():
        assert real.find(lemma) == (plain.hyponyms[sense], plain.depth(sense)), lemma
    assert real.find("dogs") == real.find("dog") == Place(18, 8)
    assert real.find("geese") == real.find("goose")


def test_the_identity_is_that_of_the_files(tmp_path: Path, small: Path) -> None:
    copy = write_wordnet(tmp_path / "elsewhere")
    assert WordNet(copy).identity == WordNet(small).identity
    (copy / "noun.exc").write_text("oxen ox\n")
    assert WordNet(copy).identity != WordNet(small).identity


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_line_with_what_mends_it(name: str, tmp_path: Path) -> None:
    (write_wordnet(tmp_path) / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}; install WordNet .Debian: 'apt install wordnet-base'.") as e:
        WordNet(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "cause"),
    [
        ("data.noun", " 03 n ", " 03 x ", r"data.noun: line 30 is no noun sense"),
        ("data.noun", " @", " !", r"data.noun: its nouns are no hierarchy"),
        ("data.noun", " ~ ", " ! ", r"data.noun: its nouns are no hierarchy"),
        ("index.noun", " n 1 2 @ ~ 1 1 ", " n ", r"index.noun: line 30 names no noun sense"),
        ("index.noun", " n 1 2 ", " n one 2 ", r"index.noun: line 30 names no noun sense"),
        ("index.noun", " n 1 2 @ ~ 1 1 0", " n 1 2 @ ~ 1 1 9", r"index.noun: line 30 names no noun sense"),
    ],
)
def test_damage_is_one_line_with_file_and_line(name: str, old: str, new: str, cause: str, tmp_path: Path) -> None:
    file = write_wordnet(tmp_path) / name
    licence, lines = file.read_text()[: 29 * 49], file.read_text()[29 * 49 :]
    file.write_text(licence + lines.replace(old, new))
    with pytest.raises(ModelError, match=cause) as e:
        WordNet(tmp_path).find("dog")
    assert "\n" not in str(e.value)


def test_a_circle_is_no_hierarchy(tmp_path: Path) -> None:
    circle = [("entity", [], []), ("hen", [2], []), ("egg", [1], []), ("thing", [0], [])]
    with pytest.raises(ModelError, match="its nouns are no hierarchy"):
        WordNet(write_wordnet(tmp_path, circle)).find("hen")  # type: ignore[arg-type]


# -- spaCy ------------------------------------------------------------------------------------------------------------


def write_spacy(folder: Path, *without: str) -> Path:
    """Save a real pipeline whose components tag by rules."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en", meta={"name": "by_rules", "version": "1.0"})
    if "attribute_ruler" not in without:
        rules = pipeline.add_pipe("attribute_ruler")
        nouns = ["dog", "dogs", "park", "house", "cat", "child", "children", "animal", "city"]
        rules.add([[{"LOWER": {"IN": nouns}}]], {"POS": "NOUN"})
        rules.add([[{"LIKE_NUM": True}]], {"POS": "NUM"})
        rules.add([[{"LOWER": {"IN": ["runs", "sleeps"]}}]], {"POS": "VERB", "MORPH": "Mood=Ind|Tense=Pres"})
        rules.add([[{"LOWER": "ran"}]], {"POS": "VERB", "MORPH": "Tense=Past|VerbForm=Part"})
        rules.add([[{"LOWER": {"IN": ["is", "was"]}}]], {"POS": "AUX", "MORPH": "Mood=Ind|Tense=Pres"})
        rules.add([[{"ORTH": {"IN": ["Paris", "New", "York"]}}]], {"POS": "PROPN"})
    if "entity_ruler" not in without:
        names = [{"label": "GPE", "pattern": "New York"}, {"label": "GPE", "pattern": "Paris"}]
        pipeline.add_pipe("entity_ruler").add_patterns(names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def by_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spacy(tmp_path_factory.mktemp("spacy") / "by_rules")


def test_a_spacy_pipeline_tags_by_its_path(by_rules: Path) -> None:
    tagger = find_tagger(f"spacy:{by_rules}")
    captions = ["a dog runs in New York", " ", "3 dogs\t\nran", "it was Paris", ""]
    runs, blank, ran, was, empty = tagger.tag(captions)
    assert [t.text for t in runs] == ["a", "dog", "runs", "in", "New", "York"]
    assert [t.pos for t in runs] == ["", "NOUN", "VERB", "", "PROPN", "PROPN"]
    assert [t.entity for t in runs] == [False] * 4 + [True] * 2
    assert runs[2] == Token("runs", "VERB", False, "Pres", "Ind")
    assert blank == empty == []
    assert ran == [Token("3", "NUM"), Token("dogs", "NOUN"), Token("ran", "VERB", False, "Past")]
    assert was[1] == Token("was", "AUX")  # an auxiliary is no verb, whatever its tense
    assert tagger.tag([]) == []


def test_a_pipelines_identity_is_that_of_its_files(by_rules: Path, tmp_path: Path) -> None:
    same, other = write_spacy(tmp_path / "a" / "by_rules"), write_spacy(tmp_path / "b" / "by_rules")
    (other / "meta.json").write_text((other / "meta.json").read_text() + "\n")
    assert find_tagger(f"spacy:{same}").identity == find_tagger(f"spacy:{by_rules}").identity
    assert find_tagger(f"spacy:{other}").identity != find_tagger(f"spacy:{same}").identity


@pytest.mark.parametrize(("without", "what"), [("attribute_ruler", "parts of speech"), ("entity_ruler", "named entit")])
def test_a_pipeline_that_lacks_what_is_needed_is_refused(without: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no component of this pipeline tells {what}"):
        find_tagger(f"spacy:{write_spacy(tmp_path / 'p', without)}").tag(["a dog"])


def test_a_damaged_pipeline_is_one_line(tmp_path: Path) -> None:
    folder = write_spacy(tmp_path / "p")
    (folder / "config.cfg").write_text("[nlp]\nlang = \n")
    with pytest.raises(ModelError, match="cannot read this pipeline") as e:
        find_tagger(f"spacy:{folder}").tag(["a dog"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("spacy", "unknown; it is 'spacy:NAME' of an installed pipeline"),
        ("spacy:", "unknown; it is"),
        ("spacy:xx_no_such", "no such pipeline is installed.*python -m spacy download xx_no_such"),
        ("spacy:/no/such/folder", "no such pipeline is installed, and no such folder is here"),
        ("spacy:..", "has no config.cfg; it is no pipeline"),
        ("spacy:json", "has no config.cfg; it is no pipeline"),
        ("no.such.module:tagger", "cannot be imported and called .ModuleNotFoundError"),
        ("test_generality:CAPTIONS", "cannot be imported and called .TypeError"),
        ("test_generality:dict", "cannot be imported and called .AttributeError"),
        ("pathlib:Path", "a tagger has an identity, a text, and a method tag"),
    ],
)
def test_a_tagger_that_cannot_be_had_is_one_line(spec: str, cause: str) -> None:
    pytest.importorskip("spacy")
    with pytest.raises(ConfigError, match=f"generality.tagger = '.*': .*{cause}") as e:
        find_tagger(spec)
    assert "\n" not in str(e.value)


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_nothing_in_a_pipeline_is_unpickled(tmp_path: Path) -> None:
    folder = write_spacy(tmp_path / "pipeline")
    with open(folder / "vocab" / "vectors", "wb") as f:
        np.save(f, np.array([[Payload(tmp_path / "ran")]], object))
    with pytest.raises(ModelError, match="pipeline: "):
        find_tagger(f"spacy:{folder}").tag(["a dog"])
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_without_spacy_its_package_is_named(monkeypatch: pytest.MonkeyPatch, by_rules: Path) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"needs spaCy: pip install 'memfilter\[generality\]'"):
        find_tagger(f"spacy:{by_rules}")


def test_a_tagger_of_ones_own_is_named_by_its_function() -> None:
    assert find_tagger("test_generality:by_hand").tag(["entity"]) == [[Token("entity", "NOUN")]]


BAD = {
    "empty": "",
    "white space": " \t\r\n\u2003",
    "long": "a dog runs in New York " * 5000,
    "control characters": "\x00\x01\x1b[31m\x7f dog\x08",
    "emoji": "🐶👨‍👩‍👧‍👦🏳️‍🌈",
    "mixed directions": "a dog שלום مرحبا \u202e\u2066 runs",
    "combining marks": "e" + "\u0301" * 5000,
    "one word": "x" * 100_000,
}


def test_bad_captions_have_scores_or_none(by_rules: Path, small: Path) -> None:
    rater = Rater(Spacy(str(by_rules)), WordNet(small))
    scores = dict(zip(BAD, rater.score(list(BAD.values())), strict=True))
    assert np.isnan([scores["empty"], scores["white space"]]).all()
    others = np.array([row for name, row in scores.items() if name not in ("empty", "white space")])
    assert ((others >= 0) & (others <= 10)).all()
    assert scores["emoji"].tolist() == [5, 10, 0, 5, 5]
    np.testing.assert_array_equal(scores["long"], rater.score([BAD["long"][:LONGEST]])[0])


# -- the stage --------------------------------------------------------------------------------------------------------


def same(chunks: Any, total: int) -> Any:
    return chunks


def test_a_stage_that_was_stopped_goes_on_where_it_was(tmp_path: Path, small: Path) -> None:
    texts = pa.chunked_array([pa.array([f"caption {i}" for i in range(10_000)], pa.large_string())])
    store, nouns = Store(tmp_path), WordNet(small)

    class Dies(ByHand):
        def tag(self, captions: list[str]) -> list[list[Token]]:
            if len(self.seen) > 5000:
                raise KeyboardInterrupt
            return super().tag(captions)

    with pytest.raises(KeyboardInterrupt):
        score_generality(texts, "digest", Rater(Dies(), nouns), store, same)
    assert len(list((tmp_path / "generality" / "captions").iterdir())) == 2
    tagger = ByHand()
    first = score_generality(texts, "digest", Rater(tagger, nouns), store, same)
    assert len(tagger.seen) == 10_000 - 2 * 4096
    assert [p.name for p in (tmp_path / "generality").iterdir()] == ["captions.parquet"]
    again = score_generality(texts, "digest", Rater(tagger, nouns), store, same)
    assert len(tagger.seen) == 10_000 - 2 * 4096
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.values, again.values)
    assert first.values.shape == (10_000, 5)
    score_generality(texts, "other captions", Rater(tagger, nouns), store, same)
    assert len(tagger.seen) == 20_000 - 2 * 4096


def test_no_captions_have_no_scores(tmp_path: Path, small: Path) -> None:
    texts = pa.chunked_array([pa.array([], pa.large_string())])
    found = score_generality(texts, "d", Rater(ByHand(), WordNet(small)), Store(tmp_path), same)
    assert found is not None
    assert found.values.shape == (0, 5)
    told = generality_outcome(found, np.array([], np.int64), pa.table({"text": texts}), None)
    assert told is not None
    assert (told["mean"], told["quantiles"], told["captions"]) == (None, {}, 0)


# -- whole runs -------------------------------------------------------------------------------------------------------

TEXTS = ["a dog runs in New York", "a dog runs in New York", "an animal sleeps in a house", "3 dogs ran", "", " ", "🐶"]


def make_shards(folder: Path) -> Path:
    """Write a pair that is there twice, single ones, and a sample without an image."""
    seeds = [0, 0, 1, 2, 3, 4, 5]
    rows = [sample(f"{i:03}", encoded(picture(s)), t) for i, (s, t) in enumerate(zip(seeds, TEXTS, strict=True))]
    write_tar(folder / "0.tar", [m for row in rows[:4] for m in row])
    write_tar(folder / "1.tar", [m for row in rows[4:] for m in row] + sample("bad", None, "a house"))
    return folder


def settings(by_rules: Path, small: Path, **more: Any) -> dict[str, Any]:
    given = {"tagger": f"spacy:{by_rules}", "wordnet": str(small), **more}
    return {"images": {"encoder": None}, "output": {"shards": False}, "generality": given}


def columns(manifest: Manifest) -> list[list[float | None]]:
    rows = manifest.table(["key", *GENERALITY.names]).sort_by("key").to_pylist()
    return [[row[name] for name in GENERALITY.names] for row in rows]


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "run.json")]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_run_has_the_columns_and_later_decisions_keep_them(tmp_path: Path, by_rules: Path, small: Path) -> None:
    shards, values = make_shards(tmp_path / "in"), settings(by_rules, small)
    manifest = memfilter.run([str(shards)], tmp_path / "out", Config.parse(values), workers=1)
    found = columns(manifest)
    wanted = Rater(Spacy(str(by_rules)), WordNet(small)).score(TEXTS)
    for row, scores in zip(found, wanted.tolist(), strict=False):  # the bad sample's key sorts last
        assert row == ([None] * 5 if np.isnan(scores).any() else scores)
    assert found[4] == found[5] == found[7] == [None] * 5
    info = manifest.info["generality"]
    assert info["tagger"].startswith("spacy-3.")
    assert "/by_rules/" in info["tagger"]
    assert (info["abstraction"], info["captions"], info["rewritten"]) == ("corrected", 6, None)
    assert info["mean"] == pytest.approx(np.nanmean(wanted[:, 0]), abs=1e-6)
    assert "generality/captions.parquet" in manifest.info["files"]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest" / "manifest.json").read_text()
    assert memfilter.verify(tmp_path / "out") == []

    before = (tmp_path / "out" / "generality" / "captions.parquet").stat().st_mtime_ns
    (tmp_path / "c.yaml").write_text("images: {hash_radius: 2}")
    assert columns(memfilter.rethreshold(tmp_path / "out", tmp_path / "c.yaml", workers=1)) == found
    assert (tmp_path / "out" / "generality" / "captions.parquet").stat().st_mtime_ns == before

    again = {
        "images": {"hash_radius": 4},
        "generality": settings(by_rules, small, abstraction="reference")["generality"],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(again))
    memfilter.rethreshold(tmp_path / "out", tmp_path / "c.yaml", workers=1)
    fresh = memfilter.run(
        [str(shards)], tmp_path / "fresh", Config.parse(settings(by_rules, small, abstraction="reference")), workers=1
    )
    assert columns(fresh) != found
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

    (tmp_path / "c.yaml").write_text("generality: {tagger: null}")
    none = memfilter.rethreshold(tmp_path / "out", tmp_path / "c.yaml", workers=1)
    assert columns(none) == [[None] * 5] * 8
    assert none.info["generality"] is None
    assert "generality/captions.parquet" not in none.info["files"]


def test_missing_pieces_are_told_before_anything_is_written(tmp_path: Path, by_rules: Path, small: Path) -> None:
    shards = make_shards(tmp_path / "in")
    for given in ({"tagger": "spacy:xx_no_such"}, {"wordnet": str(tmp_path / "nowhere")}):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(by_rules, small, **given)))
        command = ["run", str(shards), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]
        error = CliRunner().invoke(cli, command).exception
        assert isinstance(error, ConfigError)
        assert str(error).startswith(f"generality.{next(iter(given))} = ")
        assert not (tmp_path / "out").exists()
    memfilter.run([str(shards)], tmp_path / "out", Config.parse({"images": {"encoder": None}}), workers=1)
    before = tree(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"generality.wordnet = .* has no index.noun"):
        memfilter.rethreshold(tmp_path / "out", tmp_path / "c.yaml")
    assert tree(tmp_path / "out") == before


def test_general_captions_are_scored_beside_those_they_are_made_of(tmp_path: Path, by_rules: Path, small: Path) -> None:
    values = {**settings(by_rules, small), "generalise": {"joint_count": None, "generality": 8.5}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    shards, out = make_shards(tmp_path / "in"), str(tmp_path / "out")
    command = ["run", str(shards), "--out", out, "--config", str(tmp_path / "c.yaml"), "--workers", "1"]
    shown = CliRunner().invoke(cli, command)
    assert "\ngenerality " in shown.output
    own = tree(tmp_path / "out" / "generality")
    low = {
        t for t, row in zip(TEXTS, columns(Manifest.load(out)), strict=False) if row[0] is not None and row[0] <= 8.5
    }
    shown = CliRunner().invoke(cli, ["generalise", out, "--rule", "--trust", "--workers", "1"], catch_exceptions=False)
    rows = pq.read_table(tmp_path / "out" / "generalised" / "captions.parquet").to_pylist()
    assert {row["text"] for row in rows} == low
    done = [row for row in rows if row["general"] is not None]
    assert [row["general"] for row in done] == ["a in"]
    rater = Rater(Spacy(str(by_rules)), WordNet(small))
    table = pq.read_table(tmp_path / "out" / "generality" / "generalised.parquet")
    wanted = rater.score([row["general"] for row in done])
    np.testing.assert_array_equal(np.stack([c.to_numpy() for c in table.columns], axis=1), wanted)
    told = Manifest.load(out).info["generality"]["rewritten"]
    before = rater.score([row["text"] for row in done])
    assert told == {
        "before": pytest.approx(before[:, 0].mean(), abs=1e-5),
        "after": pytest.approx(wanted[:, 0].mean(), abs=1e-5),
    }
    assert f"rewritten captions {told['before']:.2f} before, {told['after']:.2f} after" in shown.output
    assert tree(tmp_path / "out" / "generality")["captions.parquet"] == own["captions.parquet"]
    assert "generality/generalised.parquet" in Manifest.load(out).info["files"]
    assert memfilter.verify(out) == []


def test_what_shapes_a_score_is_in_its_digest(tmp_path: Path, small: Path) -> None:
    texts = pa.chunked_array([pa.array(["entity"], pa.large_string())])
    other = write_wordnet(tmp_path / "other", SENSES[:-1])
    tagger, store = ByHand(), Store(tmp_path / "out")
    for folder, sign in ((small, "corrected"), (small, "corrected"), (other, "corrected"), (other, "reference")):
        score_generality(texts, "digest", Rater(tagger, WordNet(folder), sign), store, same)
    assert len(tagger.seen) == 3
    assert digest_of(Rater(tagger, WordNet(small)).about) != digest_of(Rater(tagger, WordNet(other)).about)
