"""The hash join on random and on real hashes, against imagededup's search and faiss, on one core, in one run.

    python benchmarks/hash_join.py ../shared/data --json benchmarks/results/hash_join.json

Real hashes are pHashes of the photos, of which as many as wanted are made by flipping 5 to 20 bits of each: so their
bits are as unequal as those of photos, and buckets as heavy.  In each set 1,000 pairs are planted at distances 1 to 4,
which must all be found.  Each join runs in a process of its own.  It takes three minutes with
10M (`--most 10000000`), most of it for the peers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from environment import write_result

from memfilter import Config
from memfilter.hash_join import hash_join, recall
from memfilter.shards import find_shards
from memfilter.signatures import hasher, sign
from memfilter.store import read_table

Words = npt.NDArray[np.uint64]

PLANTED = 1000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--most", type=int, default=1_000_000, help="the largest set")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--one", nargs=2, metavar=("FILE", "RADIUS"))
    given = arguments.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    logging.disable(logging.INFO)
    if given.one:
        print(json.dumps(one(Path(given.one[0]), int(given.one[1]))))
        return
    with tempfile.TemporaryDirectory() as work:
        write_result(measure(given.data, given.most, Path(work)), given.json)


def measure(data: Path, most: int, work: Path) -> dict[str, object]:
    hash_join(np.arange(2, dtype=np.uint64), 4)  # compiles, if it is the first time
    photos = real_hashes(data, work)
    sizes = [n for n in (10_000, 100_000, 1_000_000, 10_000_000) if n <= most]
    joins = {}
    for kind in ("random", "real"):
        for n in sizes:
            random = np.random.default_rng(n)
            base = random.integers(0, 2**64, n, np.uint64) if kind == "random" else extended(photos, n, random)
            joins[f"{kind} {n}"] = joined(planted(base, random, range(1, 5)), 4, work)
            print(kind, n, joins[f"{kind} {n}"], file=sys.stderr, flush=True)
    return {
        "cores": 1,
        "real_hashes": len(photos),
        "radius_4": joins,
        "target": "1M in 5 s and 10M in 90 s on one core",
        "imagededup_50000": against_imagededup(photos),
        "pdq_1M_radius_31": against_faiss(min(most, 1_000_000), work),
    }


def real_hashes(data: Path, work: Path) -> Words:
    """Return the distinct pHashes of all photos that are not blank."""
    config = Config.parse({"images": {"encoder": None}})
    parts = []
    for shard in find_shards([str(data / f"{name}/*.tar") for name in ("coco", "photos", "tiny", "unlabelled")])[0]:
        sign(shard, work / "signatures.parquet", config)
        table = read_table(work / "signatures.parquet", ["hash", "blank"])
        parts.append(table["hash"].to_numpy()[~table["blank"].to_numpy(zero_copy_only=False)])
    return np.unique(np.concatenate(parts))


def flipped(hashes: Words, bits: npt.NDArray[np.int64], random: np.random.Generator) -> Words:
    """Return hashes, (n, words), with as many bits flipped in each as given."""
    hashes = hashes.copy()
    for i in range(0, len(hashes), 1 << 16):
        some = hashes[i : i + (1 << 16)]
        places = np.argsort(random.random((len(some), 64 * some.shape[1]), np.float32), axis=1)[:, : bits.max()]
        for k, place in enumerate(places.T):
            chosen = np.flatnonzero(k < bits[i : i + (1 << 16)])
            some[chosen, place[chosen] // 64] ^= np.uint64(1) << (place[chosen] % 64).astype(np.uint64)
    return hashes


def extended(photos: Words, n: int, random: np.random.Generator) -> Words:
    source = photos[random.integers(0, len(photos), n)][:, None]
    return flipped(source, random.integers(5, 21, n), random)[:, 0]


def planted(base: Words, random: np.random.Generator, distances: range) -> dict[str, Words | npt.NDArray[np.int64]]:
    """Return the distinct rows, behind them copies of the first at these distances in turn, and whose copy each is."""
    rows = random.permutation(np.unique(base)[:, None]) if base.ndim == 1 else base
    bits = np.resize(np.array(distances), PLANTED)
    copies = flipped(rows[:PLANTED], bits, random)
    if base.ndim == 1:  # one may be there already
        new = ~np.isin(copies, rows)[:, 0]
        new[np.setdiff1d(np.arange(PLANTED), np.unique(copies, return_index=True)[1])] = False
    else:
        new = np.ones(PLANTED, bool)
    return {"rows": np.concatenate([rows, copies[new]]), "partner": np.flatnonzero(new), "bits": bits[new]}


def joined(truth: dict[str, Words | npt.NDArray[np.int64]], radius: int, work: Path) -> dict[str, object]:
    np.savez(work / "rows.npz", **truth)
    command = [sys.executable, __file__, ".", "--one", str(work / "rows.npz"), str(radius)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def one(file: Path, radius: int) -> dict[str, object]:
    """Join the hashes in a file; return seconds, and the share of the planted pairs found at each distance."""
    truth = np.load(file)
    rows, partner, bits = truth["rows"], truth["partner"], truth["bits"]
    hashes = rows[:, 0].copy() if rows.shape[1] == 1 else rows
    hash_join(hashes[:2].copy(), radius)  # loads the machine code
    wall, cpu = time.perf_counter(), time.process_time()
    a, b, distance = hash_join(hashes, radius)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert (np.bitwise_count(rows[a] ^ rows[b]).sum(1) == distance).all()
    hit = np.isin(partner * len(rows) + np.arange(len(rows) - len(partner), len(rows)), a * len(rows) + b)
    shares = {int(d): round(float(hit[bits == d].mean()), 4) for d in np.unique(bits)}
    if rows.shape[1] == 1 and not hit.all():
        raise SystemExit(f"planted pairs were missed: {shares}")
    return {
        "hashes": len(rows),
        "pairs": len(a),
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "hashes_mib": round(rows.nbytes / 2**20, 1),
        "planted_found": shares,
    }


def against_imagededup(photos: Words, n: int = 50_000, part: int = 1000) -> dict[str, object]:
    """Compare with imagededup's own search at this size; its time is that of `part` queries, extrapolated to all."""
    from imagededup.handlers.search.bktree import BKTree

    random = np.random.default_rng(3)
    hashes = planted(extended(photos, n, random), random, range(1, 5))["rows"][:, 0].astype(np.uint64)
    started = time.perf_counter()
    a, b, _ = hash_join(hashes, 4)
    ours = time.perf_counter() - started
    theirs = hasher("phash")
    names = {f"{i}": f"{h:016x}" for i, h in enumerate(hashes.tolist())}
    queries = [f"{i}" for i in range(len(hashes) - part, len(hashes))]
    started = time.perf_counter()
    tree = BKTree(names, theirs.hamming_distance)
    built = time.perf_counter() - started
    started = time.perf_counter()
    found = {q: {name for name, _ in tree.search(names[q], tol=4)} - {q} for q in queries}
    searched = time.perf_counter() - started
    partners: dict[str, set[str]] = {q: set() for q in queries}
    for one, other in zip(map(str, a.tolist()), map(str, b.tolist()), strict=True):
        if one in partners:
            partners[one].add(other)
        if other in partners:
            partners[other].add(one)
    if partners != found:
        raise SystemExit("imagededup finds other pairs")
    whole = built + searched * len(hashes) / part
    return {
        "hashes": len(hashes),
        "seconds": round(ours, 3),
        "imagededup_seconds": round(whole, 1),
        "imagededup_how": f"its BKTree built whole in {built:.1f} s; {part} of {n} searches in {searched:.1f} s",
        "times_faster": round(whole / ours),
        "same_pairs": True,
        "target": 100,
    }


def against_faiss(n: int, work: Path, part: int = 500) -> dict[str, object]:
    """Compare 256 bits at radius 31 with a flat range search, whose time for `part` rows is extrapolated to all."""
    import faiss

    random = np.random.default_rng(4)
    truth = planted(random.integers(0, 2**64, (n, 4), np.uint64), random, range(16, 32, 3))
    rows, ours = truth["rows"], joined(truth, 31, work)
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexBinaryFlat(256)
    flat.add(rows.view(np.uint8))
    started = time.perf_counter()
    flat.range_search(rows[:part].view(np.uint8), 32)  # below 32
    # each pair is looked at from both sides, which a self-join need not do
    whole = (time.perf_counter() - started) * len(rows) / part
    return {
        **ours,
        "recall_by_distance": {d: round(recall(len(rows), 31, d), 5) for d in (8, 16, 20, 24, 28, 31)},
        "faiss_flat_seconds": round(whole, 1),
        "faiss_flat_how": f"{part} of {len(rows)} queries, extrapolated",
        "times_faster": round(whole / float(str(ours["seconds"])), 1),
        "target": 10,
    }


if __name__ == "__main__":
    main()
