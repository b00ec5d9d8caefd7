"""What a generality score costs apart from the tagger's own time, on one core, with the real WordNet.

    python benchmarks/generality.py ../shared/data/captions/flickr8k.tsv /usr/share/wordnet \
        --json benchmarks/results/generality.json

In turn, on all distinct captions of a file (tab-separated, the caption last): reading WordNet; the stage, with its
chunks and its table on disk, whose tagger hands out tags that were made before; and the tagger itself, with and without
making our tokens of spaCy's.  Without `--tagger` a pipeline of rules is made, which tags common words alone: its
tags do not tell how general the captions are, and its speed is not that of a trained pipeline.  Seconds are those of
the CPU time of the process, medians over the rounds.  It takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from environment import write_result

from memfilter.generality import Rater, score_generality
from memfilter.store import Store
from memfilter.tagging import Spacy, Tagger, Token, find_tagger
from memfilter.wordnet import WordNet


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("captions", type=Path)
    arguments.add_argument("wordnet", type=Path)
    arguments.add_argument("--tagger", help="spacy:NAME, spacy:FOLDER or package.module:function")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    lines = given.captions.read_text(encoding="utf-8").splitlines()[1:]
    captions = sorted({line.rpartition("\t")[2] for line in lines})
    with tempfile.TemporaryDirectory() as work:
        spec = given.tagger or f"spacy:{make_rules(captions, WordNet(given.wordnet), Path(work) / 'by_rules')}"
        found = measure(captions, find_tagger(spec), given.wordnet, Path(work), given.rounds)
    tagger = given.tagger or "a pipeline of rules, as no trained one was given"
    write_result({"captions": len(captions), "rounds": given.rounds, "cores": 1, "tagger": tagger, **found}, given.json)


def make_rules(captions: list[str], nouns: WordNet, folder: Path) -> Path:
    """Save a pipeline that takes for a noun what WordNet has, for a verb what ends in -ing, a capital for a name."""
    import spacy

    words = Counter(word for caption in captions for word in caption.lower().split() if word.isalpha())
    common = [word for word, count in words.items() if count > 1 and len(word) > 2 and nouns.find(word)]
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": {"IN": common}}]], {"POS": "NOUN"})
    rules.add([[{"LOWER": {"REGEX": "^[a-z]+ing$"}}]], {"POS": "VERB", "MORPH": "Tense=Pres|VerbForm=Part"})
    rules.add([[{"LIKE_NUM": True}]], {"POS": "NUM"})
    pipeline.add_pipe("entity_ruler").add_patterns(
        [{"label": "NAME", "pattern": [{"IS_TITLE": True, "LENGTH": {">": 2}}]}]
    )
    pipeline.to_disk(folder)
    return folder


class Tagged:
    """A tagger that hands out tags that were made before."""

    def __init__(self, identity: str, captions: list[str], tags: list[list[Token]]) -> None:
        self.identity, self._tags = identity, dict(zip(captions, tags, strict=True))

    def tag(self, captions: list[str]) -> list[list[Token]]:
        """Return the tags of these captions."""
        return [self._tags[caption] for caption in captions]


def measure(captions: list[str], tagger: Tagger, wordnet: Path, work: Path, rounds: int) -> dict[str, object]:
    tags = tagger.tag(captions)
    ready = Tagged(tagger.identity, captions, tags)
    nouns = WordNet(wordnet)
    texts = pa.chunked_array([pa.array(captions, pa.large_string())])

    def stage() -> None:
        nonlocal scores
        with tempfile.TemporaryDirectory(dir=work) as folder:
            found = score_generality(texts, "captions", Rater(ready, nouns), Store(folder), no_bar)
            assert found is not None
            scores = found.values

    scores = np.empty(0)
    seconds = {
        "reading WordNet": timed(lambda: WordNet(wordnet).find("dog"), rounds),
        "stage apart from the tagger": timed(stage, rounds),
        "tagger with its tokens": timed(lambda: tagger.tag(captions), rounds),
    }
    own = seconds["stage apart from the tagger"]
    if isinstance(tagger, Spacy):
        seconds["spaCy alone"] = timed(lambda: list(tagger._pipeline.pipe(captions, batch_size=256)), rounds)
        own += seconds["tagger with its tokens"] - seconds["spaCy alone"]
    kinds = Counter(token.pos for tokens in tags for token in tokens)
    return {
        "tagger_identity": tagger.identity,
        "tokens_per_caption": round(sum(map(len, tags)) / len(tags), 1),
        "tags": {pos: kinds[pos] for pos in ("NOUN", "PROPN", "VERB", "NUM")},
        "mean_scores": [round(float(x), 4) for x in np.nanmean(scores, axis=0)],
        "cpu_seconds": {name: round(s, 3) for name, s in seconds.items()},
        "captions_per_second_per_core": round(len(captions) / own),  # stage, and tokens made of spaCy's
        "target": "2,000 captions/s per core apart from the tagger's own time",
    }


def timed(work: Callable[[], object], rounds: int) -> float:
    """Return the median CPU seconds, after a round that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def no_bar(chunks: Iterator[int], total: int) -> Iterator[int]:
    return chunks


if __name__ == "__main__":
    main()
