"""A picture that is there tens of thousands of times: whether its group stays whole, and what that costs.

    python benchmarks/heavy_group.py ../shared/data --copies 30000 --json benchmarks/results/heavy_group.json

Near copies of one photo, no two with the same bytes: cropped by up to 6% of each side, resized, made darker or lighter,
and encoded at qualities from 25 to 95, so that they differ in hash and embedding.  Among them stand other photos, each
once.  A first run signs everything; its results but the signatures are removed, and the run that follows is measured.
So `seconds` is what a run takes behind signing, filtered shards left out.  `pairs_judged` are those that were aligned,
`pairs_scored` those that were compared in detail as well.  `a_verified_pair` is processor time, all threads together:
of copies with one of them, and of pairs of the other photos that the embedding finds.  Those are unlike, and so take
the longest search; a run compares few of them in detail.

It does not show a group whose copies are edited so much that they are no copies of one keeper, nor hashes of 256
bits, of which nearly every copy has its own.  --work keeps the signatures for the next call.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
from environment import run_measured, write_result
from memory import photos
from PIL import Image, ImageEnhance

from memfilter import Config, Manifest
from memfilter.edges import find_candidates, signatures_digest
from memfilter.groups import load_samples
from memfilter.judge import Judge
from memfilter.records import Shard
from memfilter.store import Store, read_table

SHARD = 1000  # samples


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--copies", type=int, default=3000)
    arguments.add_argument("--others", type=int, default=3000)
    arguments.add_argument("--pairs", type=int, default=2000, help="verified one by one, for the time of a pair")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--work", type=Path, help="folder for the files (default: a temporary one)")
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = (given.work or Path(name)) / f"{given.copies}-{given.others}"
        out = work / "out"
        command = ["run", str(work / "in"), "--out", str(out), "--workers", str(given.workers)]
        command += ["--config", str(work / "config.yaml")]
        if not out.exists():
            shutil.rmtree(work, ignore_errors=True)
            write(work / "in" / "copies", copies(given.data, given.copies))
            write(work / "in" / "others", others(given.data, given.others))
            (work / "config.yaml").write_text("output: {shards: false}\n")
            run_measured(command)
        for part in out.iterdir():
            if part.is_dir() and part.name != "signatures":
                shutil.rmtree(part)
        run = run_measured(command)
        judged = read_table(Store(out).edges / "scores.parquet")
        result: dict[str, object] = {
            "seconds": run["seconds"],
            "peak_mib": run["peak_mib"],
            "pairs_judged": len(judged),
            "pairs_scored": len(judged) - judged["score"].null_count,
            **found(Manifest.load(out)),
            "a_verified_pair": verified(out, given.pairs),
            "target": "the group of 30,000 whole within 120 s behind signing, 8,192 MiB and two cores; a pair in 1 ms",
        }
    write_result(result, given.json)


def copies(data: Path, wanted: int) -> Iterator[bytes]:
    """Yield so many near copies of the first photo, no two of the same bytes."""
    photo = next(photos(data / "photos"))
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    random, seen = np.random.default_rng(0), set()
    while len(seen) < wanted:
        reach = 0.06 * random.random() ** 2  # most are hardly cropped, and near by hash as well
        left, top, right, bottom = random.uniform(0, reach, 4) * (2 * image.size)
        box = (round(left), round(top), round(image.width - right), round(image.height - bottom))
        width = int(random.integers(120, 400))
        size = (width, max(round(width * (box[3] - box[1]) / (box[2] - box[0])), 1))
        copy = image.resize(size, Image.Resampling.BILINEAR, box, 2.0)
        copy = ImageEnhance.Brightness(copy).enhance(random.uniform(0.8, 1.2))
        buffer = io.BytesIO()
        copy.save(buffer, "JPEG", quality=int(random.integers(25, 96)))
        if (content := buffer.getvalue()) not in seen:
            seen.add(content)
            yield content


def others(data: Path, wanted: int) -> Iterator[bytes]:
    """Yield so many other photos, each once: the large ones but for the first, then small ones."""
    seen = {next(photos(data / "photos"))}
    for folder in ("photos", "unlabelled", "tiny"):
        for photo in photos(data / folder):
            if len(seen) <= wanted and photo not in seen:
                seen.add(photo)
                yield photo


def write(folder: Path, images: Iterator[bytes]) -> None:
    """Write shards of a thousand samples."""
    folder.mkdir(parents=True)
    for number in count():
        if not (batch := list(islice(images, SHARD))):
            return
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i, data in enumerate(batch):
                for suffix, content in (("jpg", data), ("txt", f"{folder.name} {number} {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def found(manifest: Manifest) -> dict[str, object]:
    """Return what became of the copies and of the other photos."""
    table = manifest.table(["shard", "key", "image_group", "canonical_uid", "match_method"]).to_pylist()
    is_copy = [row["shard"].startswith("copies/") for row in table]
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(table):
        groups.setdefault(row["image_group"], []).append(place)
    own = [members for members in groups.values() if any(is_copy[i] for i in members)]
    twins = [[f"{table[i]['shard']}/{table[i]['key']}" for i in m] for m in groups.values() if len(m) > 1]
    methods = [row["match_method"] for row, copy in zip(table, is_copy, strict=True) if copy]
    return {
        "copies": sum(is_copy),
        "groups_of_the_copies": len(own),  # 1: whole
        "copies_joined_by": {method: methods.count(method) for method in sorted(set(filter(None, methods)))},
        "others": len(table) - sum(is_copy),
        "others_in_the_group_of_the_copies": sum(not is_copy[i] for members in own for i in members),
        "groups_of_others": [names for names in twins if not names[0].startswith("copies/")],
    }


def verified(out: Path, wanted: int) -> dict[str, object]:
    """Return the processor time of a pair, and how many pairs were accepted, of copies and of the other photos.

    Pairs of the others are compared as a run does, only where the evidence of alignment gives cause, and all.
    """
    store, config = Store(out), Config()
    stored = store.read_run()
    assert stored
    shards = [Shard(*values) for values in stored["shards"]]
    samples = load_samples(shards, store)
    candidates = find_candidates(samples, store, config)
    pairs = candidates.pairs
    first = next(at for shard, at in zip(shards, samples.first, strict=False) if shard.name.startswith("others/"))
    a, b = (pairs[name].to_numpy() for name in ("a", "b"))
    random = np.random.default_rng(0)
    chosen = random.permutation(np.flatnonzero((a >= first) & (b >= first)))[: wanted + 100]
    own = random.permutation(int(first))[: wanted + 101]
    kinds = {
        "copies": (np.full(len(own) - 1, own[0]), own[1:], True),
        "others_as_a_run_does": (a[chosen], b[chosen], False),
        "others_all_compared": (a[chosen], b[chosen], True),
    }
    result: dict[str, object] = {}
    for name, (one, other, by_hash) in kinds.items():
        (store.edges / "scores.parquet").unlink(missing_ok=True)
        rows = np.unique([one, other])
        with Judge(samples, store, config, signatures_digest(shards, store), rows, candidates.encoder) as judge:
            judge.accepts(one[:100], other[:100], np.full(100, by_hash))  # compiled before it is measured
            started = time.process_time()
            accepted = judge.accepts(one[100:], other[100:], np.full(len(one) - 100, by_hash))
            ms = 1000 * (time.process_time() - started) / len(accepted)
        result[name] = {"pairs": len(accepted), "accepted": int(accepted.sum()), "ms": round(ms, 3)}
    return result


if __name__ == "__main__":
    main()
