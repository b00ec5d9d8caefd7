"""How general a caption is: the scores of Li et al., *Mitigate Replication and Copying in Diffusion Models with
Generalized Caption and Dual Fusion Enhancement*, as their code computes them (generality.py of
github.com/HowardLi0816/dual-fusion-diffusion).

Four sub-scores from 0 (specific) to 10 (general), and their mean.  Of a caption's tokens, punctuation among them:

* specificity    10 * (1 - share of the tokens that belong to a named entity or are a number)
* broadness      hyponyms of the first sense of each noun, summed, per token; 0 is 0, twice an ordinary word's or more
                 is 10, an ordinary word having all the hierarchy's hyponyms over 30,000; 0 without nouns
* tense          10 * share of the verbs (no auxiliaries) in the present tense or the indicative mood; 5 without verbs
* abstraction    from the mean depth of the nouns' first senses: 10 at the root, 0 at twice the hierarchy's mean depth
                 or more; 5 without nouns that the hierarchy has

The reference gives deeper nouns, which are the more specific ones, the higher abstraction; `abstraction="reference"`
does as it does: 10 minus ours.  It tags twice, by spaCy for names, numbers and verbs and by NLTK for nouns and words;
here one tagger does both, so that a noun is NOUN or PROPN, and white space is no token.  Its plurals
are found by NLTK, which also turns -ves to -f, and ours by WordNet's own rules.  It divides by zero without tokens;
here such a caption has no score.  Of a longer caption the first 10,000 characters are judged.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import Config, digest_of
from .errors import ModelError
from .records import GENERALITY, Floats, GeneralityScores, Ints
from .store import Store, done, read_table, write_table
from .tagging import Tagger, Token, find_tagger
from .wordnet import Nouns, Place, WordNet

log = logging.getLogger(__name__)

LONGEST = 10_000
"""Characters of a caption that are judged."""

_CHUNK = 4096  # distinct captions a checkpoint
_LEVELS = (0.1, 0.5, 0.9)


class Rater:
    """A tagger and a noun hierarchy, by which captions are scored.

    Usable on its own: `Rater(find_tagger("spacy:en_core_web_sm"), WordNet("/usr/share/wordnet")).score(["a dog"])`.
    """

    def __init__(self, tagger: Tagger, nouns: Nouns, abstraction: str = "corrected") -> None:
        self.tagger, self.nouns, self.abstraction = tagger, nouns, abstraction

    @property
    def about(self) -> dict[str, str]:
        """All that shapes a score beside its caption."""
        return {"tagger": self.tagger.identity, "nouns": self.nouns.identity, "abstraction": self.abstraction}

    def score(self, captions: list[str]) -> Floats:
        """Return (N, 5) float32: the mean, specificity, broadness, tense and abstraction; NaN without any token.

        Raises ModelError for a tagger that returns anything but a list of `Token` for each caption.
        """
        tagged = self.tagger.tag([caption[:LONGEST] for caption in captions])
        if len(tagged) != len(captions) or not all(isinstance(t, Token) for tokens in tagged for t in tokens):
            raise ModelError(f"{self.tagger.identity}: its tags are not one list of Token for each of the captions")
        return self.score_tagged(tagged)

    def score_tagged(self, tagged: list[list[Token]]) -> Floats:
        """Return what `score` does for captions that are tagged already."""
        scores = np.full((len(tagged), len(GENERALITY)), np.nan)
        for i, tokens in enumerate(tagged):
            if tokens:
                places = [p for t in tokens if t.pos in ("NOUN", "PROPN") and (p := self.nouns.find(t.text))]
                broadness, abstraction = self._broadness(places, len(tokens)), self._abstraction(places)
                scores[i, 1:] = _specificity(tokens), broadness, _tense(tokens), abstraction
        scores[:, 0] = scores[:, 1:].mean(axis=1)
        return scores.astype(np.float32)

    def _broadness(self, places: list[Place], tokens: int) -> float:
        hyponyms = sum(place.hyponyms for place in places) / tokens
        return 10 * min(hyponyms / (2 * self.nouns.typical_hyponyms), 1.0)

    def _abstraction(self, places: list[Place]) -> float:
        if not places:
            return 5.0
        depth = sum(place.depth for place in places) / len(places)
        deep = 10 * min(depth / (2 * self.nouns.mean_depth), 1.0)
        return deep if self.abstraction == "reference" else 10 - deep


class Scored(Protocol):
    """What the stage needs of a rater."""

    @property
    def about(self) -> dict[str, str]:
        """All that shapes a score beside its caption."""
        ...

    def score(self, captions: list[str]) -> Floats:
        """Return what `Rater.score` does."""
        ...


@dataclass(frozen=True)
class RecordedRater:
    """A rater whose code may not run: captions that it has scored keep their scores, others raise ConfigError."""

    about: dict[str, str]
    refuse: Callable[[], None]
    """Raises the ConfigError that says what to give."""

    def score(self, captions: list[str]) -> Floats:
        """Raise ConfigError."""
        self.refuse()
        raise NotImplementedError(f"{self.about}: cannot score {len(captions)} captions")


def _specificity(tokens: list[Token]) -> float:
    return 10 * (1 - sum(token.entity or token.pos == "NUM" for token in tokens) / len(tokens))


def _tense(tokens: list[Token]) -> float:
    verbs = [token for token in tokens if token.pos == "VERB"]
    return 10 * sum(v.tense == "Pres" or v.mood == "Ind" for v in verbs) / len(verbs) if verbs else 5.0


# -- the stage --------------------------------------------------------------------------------------------------------


Progress = Callable[[Iterator[int], int], Iterator[int]]


def find_rater(config: Config) -> Rater | None:
    """Return what captions are to be scored by, None without a tagger; cheap: no more than its files' digests are read.

    Raises ConfigError for a tagger or a noun hierarchy that is not here.
    """
    settings = config.generality
    if settings.tagger is None:
        return None
    return Rater(find_tagger(settings.tagger), WordNet(settings.wordnet), settings.abstraction)


def score_generality(
    texts: pa.ChunkedArray,
    captions_digest: str,
    rater: Scored | None,
    store: Store,
    progress: Progress,
    generalised: pa.ChunkedArray | None = None,
) -> GeneralityScores | None:
    """Return the generality of the distinct captions, computed now or by an earlier run; None without a rater.

    That of `generalised` captions has a table of its own.  Scoring goes through fixed chunks in the order of the
    captions; each finished chunk is a file.  Raises ModelError.
    """
    if rater is None:
        return None
    base = digest_of(["generality-1", rater.about])
    own = _table(texts, digest_of([base, captions_digest]), "captions", store, rater, progress)
    general = None
    if generalised is not None:
        digest = digest_of([base, "generalised", generalised.to_pylist()])
        general = _table(generalised, digest, "generalised", store, rater, progress)
    return GeneralityScores(own, general, {**rater.about, "captions": len(texts)})


def _table(texts: pa.ChunkedArray, digest: str, name: str, store: Store, rater: Scored, progress: Progress) -> Floats:
    """Return the (N, 5) scores in the table of this name, computed now or before."""
    path, chunks = store.place(store.generality / f"{name}.parquet", digest), store.generality / name
    if not done(path, digest):
        parts = [GENERALITY.empty_table()]
        starts = range(0, len(texts), _CHUNK)
        log.info("scoring the generality of %d captions", len(texts))
        for start in progress(iter(starts), len(starts)):
            part = chunks / f"{start // _CHUNK:06}.parquet"
            part_digest = digest_of([digest, start, _CHUNK])
            if not done(part, part_digest):
                scores = rater.score(texts.slice(start, _CHUNK).to_pylist())
                columns = [pa.array(column, mask=np.isnan(column)) for column in scores.T]
                write_table(part, pa.table(columns, schema=GENERALITY), part_digest)
            parts.append(read_table(part))
        write_table(path, pa.concat_tables(p.replace_schema_metadata(None) for p in parts), digest)
    shutil.rmtree(chunks, ignore_errors=True)
    return np.stack([column.to_numpy() for column in read_table(path).columns], axis=1)


def generality_outcome(
    found: GeneralityScores | None, samples: Ints, captions: pa.Table, rewritten: pa.Table | None
) -> dict[str, Any] | None:
    """Return what shaped the scores, and the samples' mean and quantiles; None where nothing was scored.

    `samples` holds the caption of each good sample.  With `rewritten` captions also their mean, before and after.
    """
    if found is None:
        return None
    own = found.values[samples, 0]
    own = own[~np.isnan(own)]
    told = {**found.info, "mean": _mean(own), "quantiles": {}, "rewritten": None}
    if len(own):
        told["quantiles"] = {str(q): round(float(np.quantile(own, q)), 6) for q in _LEVELS}
    if rewritten is not None and found.generalised is not None and len(found.generalised):
        before = rewritten["text"].filter(rewritten["general"].is_valid()).combine_chunks()
        rows = pc.index_in(before, captions["text"].combine_chunks()).to_numpy()
        told["rewritten"] = {"before": _mean(found.values[rows, 0]), "after": _mean(found.generalised[:, 0])}
    return told


def _mean(scores: Floats) -> float | None:
    known = scores[~np.isnan(scores)].astype(np.float64)
    return round(float(known.mean()), 6) if len(known) else None
