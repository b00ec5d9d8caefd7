"""Pictures that are no photos: different ones that are dropped, and planted copies that are found, beside the peers.

    python benchmarks/graphics.py ../shared/data --fastdup ENV/bin/python --json benchmarks/results/graphics.json

The sets are clip art, screenshots and emoji, documents drawn by documents.py, and for comparison photos.  First each
set is run as it is: a dropped picture counts as wrong unless graphics_pairs.csv lists it and the kept one as copies.
A pair that the file does not list is "unjudged", counts as wrong too, and is to be looked at: --sheet draws all dropped
pairs.  Then a copy of one kind of each picture is planted, one run a kind: recall is the share of the copies that are
in their original's group, and a group is false if it holds two different pictures.  Originals below 48 pixels are
reported apart.

imagededup and fastdup see the same files, with their defaults: "dropped" is what their own helpers would remove, and a
copy is found if they link it and its original directly.  Beside the JSON comes a table (.md).  Pictures, copies and
the peers' answers are written once to --cache.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import run_measured, write_result
from graphics_peers import Peer, peers
from graphics_report import markdown, sheet
from graphics_set import DOCUMENTS, GRAPHICS, KINDS, PHOTOS, SMALL, Pictures, pictures, planted
from PIL import Image

from memfilter import Manifest

SETS = (*GRAPHICS, *DOCUMENTS, *PHOTOS)
PAIRS = Path(__file__).with_name("graphics_pairs.csv")
TARGET = {"different_share": 0.005, "recall": 0.95}


# -- what is a copy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdicts:
    """What was judged by eye: `copies` maps a picture to the one that stands for it and all its copies.

    Of a `drawn` set all are judged: documents.py draws no picture twice.
    """

    copies: Mapping[str, str] = field(default_factory=dict)
    different: frozenset[frozenset[str]] = frozenset()
    drawn: bool = False

    @classmethod
    def read(cls, name: str, path: Path = PAIRS) -> Verdicts:
        """Return the verdicts on one set, of a CSV file with the columns set, one, other, verdict, note."""
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["set"] == name]
        copies: dict[str, str] = {}
        for row in rows:
            if row["verdict"] == "copy":
                first, second = sorted(copies.setdefault(key, key) for key in (row["one"], row["other"]))
                copies = {key: first if stands == second else stands for key, stands in copies.items()}
        different = frozenset(frozenset((row["one"], row["other"])) for row in rows if row["verdict"] == "different")
        return cls(copies, different, name in DOCUMENTS)

    def picture(self, key: str) -> str:
        """Return the picture that stands for this one and all its copies."""
        return self.copies.get(key, key)

    def of(self, one: str, other: str) -> str:
        """Return "copy", "different" or "unjudged"."""
        if self.picture(one) == self.picture(other):
            return "copy"
        return "different" if self.drawn or frozenset((one, other)) in self.different else "unjudged"


@dataclass(frozen=True)
class Row:
    """One picture in a manifest; `kept` is the key of the one that is kept in its place."""

    key: str
    action: str
    group: int
    kept: str | None = None
    method: str | None = None
    distance: float | None = None
    score: float | None = None
    threshold: float | None = None

    @property
    def edge(self) -> str:
        """Return method and distance of the edge to the kept picture, and its score where the manifest has one."""
        told = "" if self.distance is None else f" {self.distance:.3g}"
        told += "" if self.score is None or self.threshold is None else f" {self.score:.3f} >= {self.threshold:.3f}"
        return f"{self.method}{told}"


def rows_of(manifest: Manifest) -> list[Row]:
    """Return the pictures of a manifest in its order."""
    table = manifest.table().to_pylist()
    key = {row["uid"]: row["key"] for row in table}
    return [
        Row(
            *(row["key"], row["action"], row["image_group"], key.get(row["canonical_uid"])),
            *(row["match_method"], row["match_distance"], row.get("match_score"), row.get("match_threshold")),
        )
        for row in table
    ]


def dropped(pairs: Iterable[tuple[str, str]], images: int, verdicts: Verdicts) -> dict[str, Any]:
    """Return how many of the (kept, dropped) pairs are copies and how many different, the unjudged among these."""
    counts = Counter(verdicts.of(kept, gone) for kept, gone in pairs)
    different = counts["different"] + counts["unjudged"]
    return {
        "dropped": counts.total(),
        "copies": counts["copy"],
        "different": different,
        "unjudged": counts["unjudged"],
        "different_share": round(different / images, 4),
    }


def recalled(copies: Mapping[str, str], hits: set[str], small: set[str]) -> dict[str, Any]:
    """Return the share of the copies, by original, that are found, apart for those whose original is small."""
    result: dict[str, Any] = {}
    for name, keys in (
        ("recall", [copy for copy, original in copies.items() if original not in small]),
        ("recall_small", [copy for copy, original in copies.items() if original in small]),
    ):
        result[name] = round(sum(key in hits for key in keys) / len(keys), 4) if keys else None
    return result


def grouped(rows: list[Row], copies: Mapping[str, str], verdicts: Verdicts) -> tuple[set[str], set[int]]:
    """Return the copies in their original's group, and the groups that hold two different pictures."""
    group = {row.key: row.group for row in rows}
    shown: dict[int, set[str]] = {}
    for row in rows:
        shown.setdefault(row.group, set()).add(verdicts.picture(copies.get(row.key, row.key)))
    hits = {copy for copy, original in copies.items() if group[copy] == group[original]}
    return hits, {number for number, pictures in shown.items() if len(pictures) > 1}


def over_all(sets: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the recall of each kind and tool over the copies of all sets, without those of small originals."""
    copies, hits = Counter[str](), Counter[tuple[str, str]]()
    for measured in sets.values():
        for kind, found in measured["planted"].items():
            copies[kind] += found["copies"]
            for tool in measured["dropped"]:
                hits[kind, tool] += round(found["copies"] * (found[tool]["recall"] or 0))
    result: dict[str, dict[str, float]] = {kind: {} for kind in copies}
    for (kind, tool), number in hits.items():
        result[kind][tool] = round(number / max(1, copies[kind]), 4)
    return result


# -- the runs ---------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--fastdup", type=Path, help="Python of an environment with fastdup, else left out")
    arguments.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    arguments.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="none: only what is dropped")
    arguments.add_argument("--skip-peers", action="store_true")
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/graphics"))
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--sheet", type=Path, help="the dropped pairs as pictures, one file a set: SHEET-set.png")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    logging.disable(logging.INFO)
    bench = Bench(given.cache, given.workers, {} if given.skip_peers else peers(given.fastdup))
    result: dict[str, Any] = {"target": TARGET, "small_below": SMALL, "sets": {}}
    for name in given.sets:
        originals = pictures(name, given.data, given.cache)
        verdicts = Verdicts.read(name)
        measured, rows = bench.as_it_is(originals, verdicts)
        if given.sheet:
            sheet(rows, originals.files, verdicts.of, given.sheet.with_stem(f"{given.sheet.stem}-{name}"))
        good = {row.key for row in rows if row.action != "bad"}
        kinds = [] if name in PHOTOS else given.kinds
        measured["planted"] = {kind: bench.with_copies(originals, kind, good, verdicts) for kind in kinds}
        result["sets"][name] = measured
    result["recall_of_all_sets"] = over_all(result["sets"])
    write_result(result, given.json)
    if given.json:
        given.json.with_suffix(".md").write_text(markdown(result))


@dataclass(frozen=True)
class Bench:
    """Where files are kept, the workers of a run, and the peers."""

    cache: Path
    workers: int
    peers: Mapping[str, Peer]

    def as_it_is(self, originals: Pictures, verdicts: Verdicts) -> tuple[dict[str, Any], list[Row]]:
        """Return what each tool drops of a set, and memfilter's rows."""
        rows, seconds = self.run(originals.tar)
        gone = [row for row in rows if row.action == "drop"]
        pairs = {row.key: (row.kept or "", row.key) for row in gone}
        images = len(originals.files)
        measured = {"memfilter": dropped(pairs.values(), images, verdicts)}
        measured["memfilter"]["by_method"] = dict(sorted(Counter(str(row.method) for row in gone).items()))
        for name, peer in self.peers.items():
            found = peer(originals, None)
            measured[name] = dropped(found.removed, images, verdicts) | {"version": found.version}
        wrong = [row for row in gone if verdicts.of(*pairs[row.key]) != "copy"]
        return {
            "images": images,
            "bad": sum(row.action == "bad" for row in rows),
            "seconds": seconds,
            "dropped": measured,
            "different_dropped": [f"{row.kept} {row.key} {row.edge}" for row in wrong],
        }, rows

    def with_copies(self, originals: Pictures, kind: str, good: set[str], verdicts: Verdicts) -> dict[str, Any]:
        """Return how many copies of this kind each tool finds, of the originals that are `good`."""
        made = planted(originals, kind)
        copies = {copy: original for copy, original in made.original.items() if original in good}
        small = {original for original in copies.values() if min(_size(originals.files[original])) < SMALL}
        rows, _ = self.run(originals.tar, made.pictures.tar)
        hits, false = grouped(rows, made.original, verdicts)
        group = {row.key: row.group for row in rows}
        measured = recalled(copies, hits, small)
        measured["found_in_false_groups"] = sum(group[copy] in false for copy in hits & copies.keys())
        measured["false_groups"] = len(false)
        result: dict[str, Any] = {
            "copies": sum(original not in small for original in copies.values()),
            "copies_small": sum(original in small for original in copies.values()),
            "memfilter": measured,
        }
        for name, peer in self.peers.items():
            result[name] = recalled(copies, peer(originals, made).copies, small)
        return result

    def run(self, *tars: Path) -> tuple[list[Row], float]:
        """Return the rows of `memfilter run` with defaults, and the seconds that it takes."""
        with tempfile.TemporaryDirectory(dir=self.cache) as work:
            out = Path(work) / "out"
            run = run_measured(["run", *map(str, tars), "--out", str(out), "--workers", str(self.workers)])
            return rows_of(Manifest.load(out)), run["seconds"]


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


if __name__ == "__main__":
    main()
