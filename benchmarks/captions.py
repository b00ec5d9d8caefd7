"""How fast captions are grouped, what the near tier finds of what brute force finds, and which edits it groups.

    python benchmarks/captions.py ../shared/data --json benchmarks/results/captions.json

Near duplicates are taken by brute force (a sparse product of all captions' features) and by datasketch's MinHashLSH on
the same captions.  A million captions are made by perturbing the real ones; each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from environment import write_result
from scipy import sparse

from memfilter.caption_groups import forms
from memfilter.caption_join import NO_EDGES, banding, buckets, caption_join
from memfilter.captions import fingerprint, normalise
from memfilter.records import CAPTION_METHODS

JACCARD = 0.7
EDITED = 2000  # captions of each kind of edit
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


def read_captions(data: Path) -> list[str]:
    lines = (data / "captions" / "flickr8k.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return list(dict.fromkeys(line.split("\t")[-1].strip() for line in lines))


# -- edits ------------------------------------------------------------------------------------------------------------


def edits(captions: list[str]) -> dict[str, Callable[[str, random.Random], str]]:
    """Return the kinds of edits; a word that is added is drawn as often as captions use it."""
    vocabulary = [w for c in captions for w in c.split() if w.isalpha()]

    def added(caption: str, draw: random.Random) -> str:
        words = caption.split()
        words.insert(draw.randrange(len(words) + 1), draw.choice(vocabulary))
        return " ".join(words)

    def removed(caption: str, draw: random.Random) -> str:
        words = caption.split()
        del words[draw.choice([i for i, w in enumerate(words) if w.isalpha()])]
        return " ".join(words)

    def swapped(caption: str, draw: random.Random) -> str:
        words = caption.split()
        at = draw.choice([i for i, w in enumerate(words[:-1]) if w.isalpha() and words[i + 1].isalpha()])
        words[at], words[at + 1] = words[at + 1], words[at]
        return " ".join(words)

    def renumbered(caption: str, draw: random.Random) -> str:
        return re.sub(r"\d+", lambda m: str(int(m[0]) + draw.randrange(1, 5000)), caption)

    return {
        "case": lambda c, draw: draw.choice([str.upper, str.title, str.swapcase])(c),
        "punctuation": lambda c, draw: re.sub(r"[ .]*$", draw.choice(["!", "", "...", " ;"]), c).replace(" ", ", ", 1),
        "one word added": added,
        "one word removed": removed,
        "two words swapped": swapped,
        "numbers changed": renumbered,
    }


def planted(captions: list[str]) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return all captions, edited ones among them, and of each kind the pairs of caption and edited caption.

    They have eight words or more, and none is edited twice: of two edits of one caption, one may be the keeper and too
    far from the other.  Where numbers change, number words of the caption are made digits first.
    """
    draw = random.Random(5)
    words = r"\b(two|three|four|five|six)\b"
    left = [c for c in captions if sum(w.isalpha() for w in c.split()) >= 8]
    pairs = {}
    for kind, edit in reversed(edits(captions).items()):
        fit = [c for c in left if re.search(words, c)] if kind == "numbers changed" else left
        chosen = draw.sample(fit, min(EDITED, len(fit)))
        left = sorted({*left} - {*chosen})
        if kind == "numbers changed":
            chosen = [re.sub(words, lambda m: str(NUMBERS[m[0]]), c) for c in chosen]
        pairs[kind] = [(c, edit(c, draw)) for c in chosen]
    everything = [*captions, *(c for some in pairs.values() for two in some for c in two)]
    return list(dict.fromkeys(everything)), pairs


def perturbed(captions: list[str], count: int) -> list[str]:
    """Return so many distinct captions: real ones with up to four words replaced, added or removed."""
    draw = random.Random(7)
    vocabulary = [w for c in captions for w in c.split() if w.isalpha()]
    found = dict.fromkeys(captions[:count])
    while len(found) < count:
        words = draw.choice(captions).split()
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(words))
            words[at : at + draw.randrange(2)] = [draw.choice(vocabulary)] * draw.randrange(2)
            words = words or [draw.choice(vocabulary)]
        found[" ".join(words)] = None
    return list(found)


# -- what is found ----------------------------------------------------------------------------------------------------


def features(caption: str) -> set[str]:
    """Return the features of the near tier, by the book; words are marked to be told from characters."""
    text = normalise(caption)
    words = text.split()
    found = {text[i : i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1)}
    return found | {"\0" + " ".join(words[i : i + n]) for n in (1, 2) for i in range(len(words) - n + 1)}


def brute_force(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs a < b of texts whose features' Jaccard index is at least the threshold."""
    number: dict[str, int] = {}
    rows = [[number.setdefault(f, len(number)) for f in sorted(features(t))] for t in texts]
    sizes = np.array([len(r) for r in rows])
    ends = np.r_[0, np.cumsum(sizes)]
    ones = np.ones(ends[-1], np.int32)
    matrix = sparse.csr_matrix((ones, np.concatenate(rows), ends), (len(texts), len(number)))
    found = []
    for start in range(0, len(texts), 500):
        shared = (matrix[start : start + 500] @ matrix.T).tocoo()
        a, b = shared.row + start, shared.col
        near = (a < b) & (shared.data / (sizes[a] + sizes[b] - shared.data) >= JACCARD)
        found.append(np.stack([a[near], b[near]]))
    a, b = np.concatenate(found, axis=1)
    return a, b


def greedy(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return of each text its keeper, the first of the earlier keepers that it is near to."""
    keeper = np.arange(n)
    earlier: dict[int, list[int]] = {}
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        earlier.setdefault(other, []).append(one)
    for i in range(n):
        keeper[i] = next((j for j in sorted(earlier.get(i, ())) if keeper[j] == j), i)
    return keeper


def ordered(captions: list[str], templates: bool) -> tuple[list[str], pa.Array, np.ndarray]:
    """Return distinct normal forms, as Arrow text too, and the numbers of their templates."""
    texts = list({normalise(c): c for c in reversed(captions)}.values())
    texts.sort()
    return texts, *forms(pa.chunked_array([pa.array(texts, pa.large_string())]), templates)


def quality(captions: list[str]) -> dict[str, Any]:
    everything, pairs = planted(captions)
    texts, normal, no_template = ordered(everything, False)
    a, b = brute_force(texts)
    keys = buckets(normal, JACCARD)
    shares_a_band = (keys[a] == keys[b]).any(1)
    found = caption_join(normal, no_template, JACCARD, NO_EDGES)
    joined = np.flatnonzero(found.keeper != np.arange(len(texts)))
    true = set(zip(a.tolist(), b.tolist(), strict=True))
    precise = [(k, i) in true for i, k in zip(joined.tolist(), found.keeper[joined].tolist(), strict=True)]
    used = banding(len(texts), JACCARD)
    _, normal, template = ordered(everything, True)
    with_template = caption_join(normal, template, JACCARD, NO_EDGES)
    place = {normalise(t): i for i, t in enumerate(texts)}
    by_kind = {}
    for kind, some in pairs.items():
        at = np.array([[place[normalise(c)] for c in two] for two in some])
        by_kind[kind] = {
            "near alone": round(float((found.keeper[at[:, 0]] == found.keeper[at[:, 1]]).mean()), 4),
            "all tiers": round(float((with_template.keeper[at[:, 0]] == with_template.keeper[at[:, 1]]).mean()), 4),
        }
    return {
        "captions": len(everything),
        "distinct normal forms": len(texts),
        "pairs at or over the threshold, by brute force": len(a),
        "of these in a common bucket": round(float(shares_a_band.mean()), 5),
        "expected at the threshold": round(used.recall(JACCARD), 5),
        "bands": used.bands,
        "rows": used.rows,
        "captions that joined a keeper": len(joined),
        "of these edges true": round(float(np.mean(precise)), 5),
        "captions with the keeper that brute force gives": round(
            float((found.keeper == greedy(len(texts), a, b)).mean()), 5
        ),
        "edits in one group with their caption": by_kind,
    }


# -- how fast ---------------------------------------------------------------------------------------------------------


def rate(captions: list[str], function: Callable[[str], object], seconds: float = 2.0) -> int:
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for caption in captions:
            function(caption)
        done += len(captions)
    return round(done / spent)


def by_datasketch(captions: list[str]) -> int:
    """Return how many captions datasketch's index finds a near one for among those before them."""
    from datasketch import MinHash, MinHashLSH

    index, near = MinHashLSH(threshold=JACCARD, num_perm=128), 0
    for i, caption in enumerate(captions):
        signature = MinHash(num_perm=128)
        signature.update_batch([f.encode() for f in features(caption)])
        near += bool(index.query(signature))
        index.insert(i, signature)
    return near


def by_memfilter(captions: list[str], threads: int) -> int:
    _, normal, template = ordered(captions, True)
    found = caption_join(normal, template, JACCARD, NO_EDGES, threads=threads)
    return int((found.keeper != np.arange(len(normal))).sum())


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def speed(captions: list[str]) -> dict[str, Any]:
    everything, _ = planted(captions)
    by_memfilter(everything, 1)  # compiles
    ours, _ = timed(lambda: by_memfilter(everything, 1))
    theirs, near = timed(lambda: by_datasketch(everything))
    return {
        "exact tier, captions/s on one core": rate(captions, fingerprint),
        "captions": len(everything),
        "memfilter, normal forms to groups, one thread, captions/s": round(len(everything) / ours),
        "datasketch MinHashLSH, features to candidates, captions/s": round(len(everything) / theirs),
        "datasketch, captions with a candidate": near,
        "times faster": round(theirs / ours, 1),
    }


def boilerplate() -> list[dict[str, Any]]:
    """Return what captions cost that are alike but not near: three made-up words before one frame."""
    draw = random.Random(1)

    def word() -> str:
        return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))

    frame = "royalty free stock photo, picture and image download in high resolution"
    found = []
    for count in (2000, 4000, 8000):
        captions = [f"{word()} {word()} {word()} {frame}" for _ in range(count)]
        texts, normal, template = ordered(captions, True)
        seconds, joined = timed(lambda n=normal, t=template: caption_join(n, t, JACCARD, NO_EDGES, threads=2))
        keepers = int((joined.keeper == np.arange(len(texts))).sum())
        found.append({"captions": count, "seconds": round(seconds, 2), "keepers": keepers})
        found[-1]["crowded"] = int(joined.crowded.sum())
    return found


def one_size(data: Path, count: int) -> None:
    """Group so many captions and print seconds and peak memory; the parent reads it."""
    captions = perturbed(read_captions(data), count)
    by_memfilter(captions[:3000], 2)  # compiles, or loads what is compiled
    before = peak_memory()
    seconds, joined = timed(lambda: by_memfilter(captions, 2))
    about = {"captions": count, "seconds": round(seconds, 1), "joined": joined}
    print(json.dumps({**about, "peak GB": peak_memory(), "of which before": before}))


def peak_memory() -> float:
    """Return the most memory that this process has held, in GB; the figure of getrusage would be its parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1e6, 2)


def growth(data: Path, most: int) -> list[dict[str, Any]]:
    found = []
    for count in [n for n in (125_000, 250_000, 500_000, 1_000_000, 4_000_000) if n <= most]:
        command = [sys.executable, __file__, str(data), "--size", str(count)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        one_size(arguments.data, arguments.size)
        return
    captions = read_captions(arguments.data)
    result = {
        "tiers": CAPTION_METHODS[:3],
        "near_jaccard": JACCARD,
        "speed": speed(captions),
        "quality": quality(captions),
        "captions of one boilerplate": boilerplate(),
        "growth": growth(arguments.data, arguments.most),
    }
    write_result(result, arguments.json)


if __name__ == "__main__":
    main()
