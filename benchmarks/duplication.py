"""The kinds of duplication in real data, with an example of each.

    python benchmarks/duplication.py ../shared/data --json benchmarks/results/duplication.json \
        --figure benchmarks/results/duplication.png

The photos of `coco` with each of their five human captions as a sample, `photos`, and `tiny`; nothing is planted.  Then
the tiers, on the captions of `flickr8k.tsv`.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from environment import write_result
from PIL import Image, ImageDraw, ImageFont

import memfilter
from memfilter import Manifest
from memfilter.caption_groups import forms
from memfilter.caption_join import NO_EDGES, caption_join
from memfilter.captions import normalise
from memfilter.records import CAPTION_METHODS

SIDE, MARGIN = 150, 12


def lay_out(data: Path, folder: Path) -> None:
    """Write the shards, `coco` with a sample for each of a photo's captions."""
    for name in ("photos", "tiny"):
        (folder / name).mkdir(parents=True)
        for tar in sorted((data / name).glob("*.tar")):
            (folder / name / tar.name).symlink_to(tar.resolve())
    (folder / "coco").mkdir()
    with tarfile.open(data / "coco" / "00000.tar") as source, tarfile.open(folder / "coco" / "00000.tar", "w") as tar:
        files = {m.name: f.read() for m in source if (f := source.extractfile(m))}
        for key in sorted({name.split(".")[0] for name in files}):
            for i, caption in enumerate(json.loads(files[f"{key}.json"])["captions"]):
                for suffix, content in (("jpg", files[f"{key}.jpg"]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}-{i}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def examples(rows: list[dict[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return of each kind a sample and the one that stands for its group, of images or, last, of captions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("full", "partial", "caption"):
        group = "caption_group" if kind == "caption" else "image_group"
        copies = (r for r in rows if r["duplication"] == kind and rows[r[group]]["duplication"] == kind)
        if kind == "caption":
            copies = (r for r in copies if r["caption_match"] == "exact")
        else:
            same = kind == "full"
            copies = (r for r in copies if (r["caption_group"] == rows[r["image_group"]]["caption_group"]) == same)
        second = next(r for r in copies if rows[r[group]]["uid"] != r["uid"])
        found[kind] = [{**r, "text": caption(r, folder)} for r in (rows[second[group]], second)]
    return found


def member(row: dict[str, Any], folder: Path, suffix: str) -> bytes:
    with tarfile.open(folder / row["shard"]) as tar:
        file = tar.extractfile(f"{row['key']}.{suffix}")
        assert file
        return file.read()


def caption(row: dict[str, Any], folder: Path) -> str:
    return member(row, folder, "txt").decode().strip()


def figure(found: dict[str, list[dict[str, Any]]], folder: Path, path: Path) -> None:
    """Draw the examples, a row a kind, each picture over its caption."""
    font, height = ImageFont.load_default(13), SIDE + 5 * 16 + MARGIN
    sheet = Image.new("RGB", (90 + 2 * (SIDE + 5 * MARGIN), len(found) * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (kind, pair) in enumerate(found.items()):
        draw.text((MARGIN, MARGIN + y * height), kind, "black", font)
        for x, row in enumerate(pair):
            at = (90 + x * (SIDE + 5 * MARGIN), MARGIN + y * height)
            picture = Image.open(io.BytesIO(member(row, folder, "jpg"))).convert("RGB")
            scale = SIDE / max(picture.size)
            sheet.paste(picture.resize((round(picture.width * scale), round(picture.height * scale))), at)
            draw.multiline_text(
                (at[0], at[1] + picture.height * scale + 3),
                "\n".join(textwrap.wrap(row["text"], 30)[:4]),
                "black",
                font,
            )
    sheet.save(path, optimize=True)


def tiers(data: Path) -> dict[str, Any]:
    """Return how many captions of Flickr8k each tier joins, with an example of each."""
    lines = (data / "captions" / "flickr8k.tsv").read_text(encoding="utf-8").splitlines()[1:]
    use = Counter(line.split("\t")[-1].strip() for line in lines)
    by_form: dict[str, list[str]] = {}
    for text in sorted(use, key=lambda t: (-use[t], t)):
        by_form.setdefault(normalise(text), []).append(text)
    texts = [t[0] for t in sorted(by_form.values(), key=lambda t: (-sum(use[one] for one in t), t[0]))]
    joined = caption_join(*forms(pa.chunked_array([texts], pa.large_string()), True), 0.7, NO_EDGES)
    exact = [t for t in by_form.values() if len(t) > 1]
    found: dict[str, Any] = {
        "captions": sum(use.values()),
        "exact": {"copies": sum(use.values()) - len(by_form), "example": exact[0][:2]},
    }
    for method in (1, 2):
        copies = np.flatnonzero((joined.keeper != np.arange(len(texts))) & (joined.method == method))
        pair = [[texts[joined.keeper[i]], texts[i]] for i in copies[:1]]
        found[CAPTION_METHODS[method]] = {"copies": len(copies), "example": pair[0] if pair else None}
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--figure", type=Path)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, out = Path(work) / "in", Path(work) / "out"
        lay_out(given.data, folder)
        manifest: Manifest = memfilter.run([str(folder)], out, workers=2)
        rows = manifest.table().to_pylist()
        found = examples(rows, folder)
        if given.figure:
            figure(found, folder, given.figure)
    told = ("shard", "key", "text", "image_count", "caption_count", "joint_count", "caption_images", "image_captions")
    info = manifest.info["found"]
    result = {
        "samples": len(rows),
        "duplication": info["duplication"],
        "caption_groups": info["caption_groups"],
        "caption_copies": info["caption_copies"],
        "images_a_caption": info["images_a_caption"],
        "captions_an_image": info["captions_an_image"],
        "examples": {kind: [{k: r[k] for k in told} for r in pair] for kind, pair in found.items()},
        "tiers on Flickr8k": tiers(given.data),
    }
    write_result(result, given.json)


if __name__ == "__main__":
    main()
