"""The main job on real shards with planted copies: planted, found and false groups per kind, time and memory.

    python benchmarks/main_job.py ../shared/data --json benchmarks/results/main_job.json

The 6,380 samples of `coco`, `photos` and `tiny`, and four copies each of 100 of the photos: to the byte, encoded again
at quality 40, at half size, and 12% brighter.  A group is false when it holds images of two different photos.  Then the
example trains on the result.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from environment import run_measured, write_result
from PIL import Image, ImageEnhance

from memfilter import Manifest, verify

FOLDERS = ("coco", "photos", "tiny")


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def half(data: bytes) -> bytes:
    image = rgb(data)
    return jpeg(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "exact": lambda data: data,
    "quality 40": lambda data: jpeg(rgb(data), 40),
    "half size": half,
    "brightness +12%": lambda data: jpeg(ImageEnhance.Brightness(rgb(data)).enhance(1.12)),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--copies", type=int, default=100)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "in"
        for name in FOLDERS:
            (folder / name).mkdir(parents=True)
            for tar in sorted((given.data / name).glob("*.tar")):
                (folder / name / tar.name).symlink_to(tar.resolve())
        originals = plant(folder, given.copies)
        out = Path(work) / "out"
        run = run_measured(["run", str(folder), "--out", str(out), "--workers", str(given.workers)])
        again = run_measured(["run", str(folder), "--out", str(out), "--workers", str(given.workers)])
        result = judge(Manifest.load(out), originals) | {
            "seconds": run["seconds"],
            "peak_mib": run["peak_mib"],
            "seconds_when_run_again": again["seconds"],
            "problems_found_by_verify": verify(out),
            "summary": [line.replace(work, "") for line in run["lines"]],
            "training_on_the_result": train(out),
        }
    write_result(result, given.json)


def train(out: Path) -> list[str]:
    """Run the example on the filtered shards and return what it prints."""
    example = Path(__file__).parents[1] / "examples" / "train_with_manifest.py"
    command = [sys.executable, str(example), str(out), "--steps", "6"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def plant(folder: Path, copies: int) -> dict[str, tuple[str, str]]:
    """Write copies of the first photos as shards of their own; return the original's (shard, key) by copy's key."""
    originals: dict[str, tuple[str, str]] = {}
    sources = []
    for path in sorted((folder / "photos").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and len(sources) < copies:
                    file = tar.extractfile(member)
                    assert file
                    sources.append((f"photos/{path.name}", member.name[:-4], file.read()))
    (folder / "planted").mkdir()
    for number, (kind, edit) in enumerate(EDITS.items()):
        with tarfile.open(folder / "planted" / f"{number:05}.tar", "w") as tar:
            for i, (shard, key, data) in enumerate(sources):
                name = f"{kind.replace(' ', '-').replace('%', '')}-{i:04}"
                originals[name] = (shard, key)
                for suffix, content in (("jpg", edit(data)), ("txt", f"planted copy {i}".encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return originals


def judge(manifest: Manifest, originals: dict[str, tuple[str, str]]) -> dict[str, object]:
    columns = ["shard", "key", "image_group", "image_count", "match_method"]
    rows = {(r["shard"], r["key"]): r for r in manifest.table(columns).to_pylist()}
    photo: dict[int, set[tuple[str, str]]] = {}
    kinds: dict[str, dict[str, object]] = {}
    for place, row in rows.items():
        photo.setdefault(row["image_group"], set()).add(originals.get(row["key"], place))
    false = {group for group, photos in photo.items() if len(photos) > 1}
    for kind in EDITS:
        prefix = f"{kind.replace(' ', '-').replace('%', '')}-"
        copies = [(row, rows[originals[key]]) for (_, key), row in rows.items() if key.startswith(prefix)]
        found = sum(copy["image_group"] == original["image_group"] for copy, original in copies)
        kinds[kind] = {
            "planted": len(copies),
            "found": found,
            "recall": round(found / len(copies), 4),
            "false_groups": len({copy["image_group"] for copy, _ in copies} & false),
        }
    return {
        "samples": len(rows),
        "kinds": kinds,
        "false_groups": len(false),
        "counts": manifest.counts,
        "target": {"recall": 0.98, "false_groups": 0},
    }


if __name__ == "__main__":
    main()
