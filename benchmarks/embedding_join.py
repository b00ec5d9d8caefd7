"""The embedding self-join at several sizes: time, memory, and its recall against brute force and planted copies.

    python benchmarks/embedding_join.py --rows 100000 1000000 --json benchmarks/results/embedding_join.json

Rows of 256 components with a falling spectrum, as an encoder's have: scenes of a few to some dozen images, half of them
near one of 300 themes, spread so that half of the scenes hold pairs at a cosine of 0.9; four heavy groups, each one row
in 500; and a tenth of the rows copies of another row at cosines from 0.90 to 0.99, with noise in every direction.

Up to --brute rows all are compared with all in plain float32 products, and what a comparison within the cells alone
would have found of the true pairs is told as well: within the same cells, and within as many as make it cheapest.

The join runs in a process of its own.  `peak_mib` is its proportional set size, in which the pages of the files that it
maps are counted, though the kernel may take them back; `peak_anonymous_mib` is what it cannot.  On two free cores a
million rows take two to three minutes, and 100,000 with all comparisons one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environment import write_result

from memfilter.embedding_join import embedding_join

SIMILARITY = 0.9
SLACK = 1e-5  # more than float32 is off by
DIM = 256
BANDS = (0.90, 0.92, 0.94, 0.96, 0.98, 1.0)

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, nargs="+", default=[100_000])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--brute", type=int, default=100_000, help="rows up to which all are compared with all")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--work", type=Path, help="folder for the files (default: the temporary one)")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--join", nargs=2, help=argparse.SUPPRESS)  # the process that is measured
    given = arguments.parse_args()
    if given.join:
        join(Path(given.join[0]), int(given.join[1]), given.threads)
        return
    result: dict[str, object] = {"components": DIM, "similarity": SIMILARITY, "threads": given.threads}
    for n in given.rows:
        with tempfile.TemporaryDirectory(dir=given.work) as name:
            result[f"{n:,} rows"] = measure(Path(name), n, given)
    result["target"] = "1,000,000 rows in 360 s on two cores and 2,048 MiB, recall 0.99"
    write_result(result, given.json)


def measure(folder: Path, n: int, given: argparse.Namespace) -> dict[str, object]:
    originals, copies = plant(folder / "rows.npy", n, given.seed)
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    measured = run_measured(folder, 16, given.threads)
    keys = np.fromfile(folder / "join" / "keys.u8", np.uint64)
    result: dict[str, object] = {**measured, "planted_copies": planted(rows, originals, copies, keys)}
    if n <= given.brute:
        started = time.perf_counter()
        near, cosine = brute_force(np.asarray(rows, np.float32))
        true = near[cosine >= SIMILARITY + SLACK]
        cell = np.concatenate([np.load(p)[:, 0] for p in sorted((folder / "join").glob("probes-*.npy"))])
        one_probe = run_measured(folder, 1, given.threads)
        alone = np.fromfile(folder / "join" / "keys.u8", np.uint64)
        result["brute_force"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "pairs": len(true),
            "recall": share(np.isin(true, keys)),
            "recall_within_the_same_cells": share(cell[true >> np.uint64(32)] == cell[true & np.uint64(0xFFFFFFFF)]),
            "recall_within_the_cheapest_cells": share(np.isin(true, alone)),
            "cheapest_cells": one_probe["cells"],
            "not_pairs": int((~np.isin(keys, near)).sum()),
        }
    return result


def share(flags: npt.NDArray[np.bool_]) -> float | None:
    return round(float(flags.mean()), 5) if len(flags) else None


# -- the rows ---------------------------------------------------------------------------------------------------------


def plant(path: Path, n: int, seed: int) -> tuple[Ints, Ints]:
    """Write the rows, in no order, and return which are copies and of which."""
    random = np.random.default_rng(seed)
    spectrum = (1 + np.arange(DIM)) ** -0.35
    turned = (np.linalg.qr(random.standard_normal((DIM, DIM)))[0] * (spectrum / np.linalg.norm(spectrum))[:, None]).T

    def noise(count: int) -> Rows:
        return (random.standard_normal((count, DIM), dtype=np.float32) @ turned.T).astype(np.float32)

    heavy, copies, scenes = n // 500, n // 10, n // 8
    themes = noise(300)
    near_theme = random.random(scenes) < 0.5
    theme = random.integers(0, len(themes), scenes)
    spread = np.exp(random.uniform(np.log(0.15), 0, scenes)).astype(np.float32)
    size = np.minimum(random.pareto(1.5, scenes) + 0.1, 5)
    scene = random.choice(scenes, n - copies - 4 * heavy, p=size / size.sum())
    spread = np.concatenate([spread[scene], np.full(4 * heavy, 0.2, np.float32)])
    own = noise(scenes + 4)
    own[:scenes][near_theme] += themes[theme[near_theme]]
    scene = np.concatenate([scene, np.repeat(np.arange(scenes, scenes + 4), heavy)])

    place = random.permutation(n)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (n, DIM))
    for start in range(0, len(scene), 65536):
        step = slice(start, min(start + 65536, len(scene)))
        rows[place[step]] = unit(own[scene[step]] + spread[step, None] * noise(step.stop - start))
    source = random.integers(0, len(scene), copies)
    for start in range(0, copies, 65536):
        step = slice(start, min(start + 65536, copies))
        original = unit(rows[place[source[step]]].astype(np.float32))
        other = random.standard_normal(original.shape, dtype=np.float32)
        other = unit(other - (other * original).sum(1, keepdims=True) * original)
        cosine = random.uniform(0.9, 0.99, (len(original), 1)).astype(np.float32)
        rows[place[len(scene) + start : len(scene) + step.stop]] = cosine * original + np.sqrt(1 - cosine**2) * other
    rows.flush()
    return place[source], place[len(scene) :]


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- what is true -----------------------------------------------------------------------------------------------------


def planted(rows: Any, originals: Ints, copies: Ints, keys: npt.NDArray[np.uint64]) -> dict[str, object]:
    """Return the share of the planted pairs that was found, by their cosine."""
    cosine = np.concatenate(
        [
            np.einsum("ij,ij->i", rows[a].astype(np.float64), rows[b].astype(np.float64))
            for a, b in zip(np.array_split(originals, 64), np.array_split(copies, 64), strict=True)
        ]
    )
    a, b = np.minimum(originals, copies).astype(np.uint64), np.maximum(originals, copies).astype(np.uint64)
    found = np.isin(a << np.uint64(32) | b, keys)
    bands = {}
    for low, high in pairwise(BANDS):
        inside = (cosine >= max(low, SIMILARITY + 1e-4)) & (cosine < high)
        bands[f"cosine {low:.2f} to {high:.2f}"] = {"pairs": int(inside.sum()), "recall": share(found[inside])}
    return bands


def brute_force(rows: Rows) -> tuple[npt.NDArray[np.uint64], Rows]:
    """Return the keys of all pairs that reach the threshold, or may but for rounding, and their cosines."""
    rows = unit(rows)
    found = []
    for start in range(0, len(rows), 2048):
        cosine = rows[start : start + 2048] @ rows[start:].T
        a, b = np.nonzero(cosine >= SIMILARITY - SLACK)
        a, b = a[a < b], b[a < b]
        found.append(((a + start).astype(np.uint64) << np.uint64(32) | (b + start).astype(np.uint64), cosine[a, b]))
    return np.concatenate([keys for keys, _ in found]), np.concatenate([cosine for _, cosine in found])


# -- the process that is measured -------------------------------------------------------------------------------------


def join(folder: Path, probes: int, threads: int) -> None:
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    started = time.perf_counter()
    found = embedding_join(rows, SIMILARITY, folder / "join", probes=probes, exact=1000, threads=threads)
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "seconds": round(time.perf_counter() - started, 1),
        "core_seconds": round(used.ru_utime + used.ru_stime, 1),
        "pairs": len(found.a),
        "cells": found.cells,
        "probes": found.probes,
        "recall_of_the_sample": asdict(found.recall),
        "files_mib": round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20),
    }
    print(json.dumps(result))


def run_measured(folder: Path, probes: int, threads: int) -> dict[str, Any]:
    for left_over in (folder / "join").glob("*"):
        left_over.unlink()
    command = [sys.executable, __file__, "--join", str(folder), str(probes), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {"Pss": 0, "Anonymous": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        for name, value in (line.split()[:2] for line in lines[1:]):
            if name[:-1] in peaks:
                peaks[name[:-1]] = max(peaks[name[:-1]], int(value))
        time.sleep(0.1)
    assert process.stdout
    if process.returncode:
        raise SystemExit(f"the join ended with {process.returncode}")
    measured: dict[str, Any] = json.loads(process.stdout.read())
    return {
        **measured,
        "peak_mib": round(peaks["Pss"] / 1024),
        "peak_anonymous_mib": round(peaks["Anonymous"] / 1024),
    }


if __name__ == "__main__":
    main()
