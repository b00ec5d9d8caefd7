"""The cosine at which an encoder calls a stated share of the pairs of distinct photos copies.

    python benchmarks/calibrate_similarity.py ../shared/data/unlabelled/0000{0,1}.tar --encoder builtin --per-pairs 1e7

Natural duplicates among the photos raise the cosine, unless --ignore lists them (columns `one` and `other`); the pairs
above it are printed, to be looked at.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from copy_set import distractor_set
from detectors import cosine, embed
from environment import write_result
from scoring import blocks, highest, threshold_at_edges


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shards", type=Path, nargs="+")
    arguments.add_argument("--encoder", default="builtin")
    arguments.add_argument("--per-pairs", type=float, default=1e7, help="one false edge in so many pairs")
    arguments.add_argument("--ignore", type=Path)
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/copy_detection"))
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    images = distractor_set(given.shards, given.cache)
    place = {key: i for i, key in enumerate(images.keys)}
    ignored: set[tuple[int, int]] = set()
    if given.ignore:
        with given.ignore.open(newline="") as file:
            pairs = [sorted((place[row["one"]], place[row["other"]])) for row in csv.DictReader(file)]
        ignored = {(first, second) for first, second in pairs}
    rows = embed(given.encoder, images.files).rows
    n = len(rows)
    allowed = int(n * (n - 1) / 2 / given.per_pairs)
    edges, _ = highest(blocks(cosine, rows, 500), allowed + 1, 1.0, ignored)
    above = zip(edges.first[:allowed].tolist(), edges.second[:allowed].tolist(), edges.score.tolist(), strict=False)
    result = {
        "encoder": given.encoder,
        "photos": n,
        "pairs": n * (n - 1) // 2,
        "false_edges": allowed,
        "similarity": round(threshold_at_edges(edges.score, allowed), 5),
        "pairs_above": [[images.keys[i], images.keys[j], round(score, 4)] for i, j, score in above],
    }
    write_result(result, given.json)


if __name__ == "__main__":
    main()
