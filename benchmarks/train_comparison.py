"""Train the trees that decide whether two pictures are copies, on photos and on pictures that are no photos.

    python benchmarks/train_comparison.py ../shared/data --graphics FOLDER ... --out memfilter/comparison.safetensors

Copies are made of each picture; unlike pairs are those that an embedding or a hash would call candidates.  Graphics are
PNG files below the folders given (see memfilter/encoders/README.md for those that were used), and the drawn documents
of `documents.TUNING`; a mirrored or recoloured graphic is another picture, a mirrored or recoloured photo is a copy.
Photos are those that the descriptor was trained and calibrated on, with the kinds of edits that its training has seen.
Signatures and features are kept in --cache; a set that is there is not made again.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from documents import TUNING, documents
from edits import Picture
from environment import write_result
from pen import font, words, wrapped
from PIL import Image, ImageDraw, ImageOps
from safetensors.numpy import save_file
from tqdm import tqdm
from transformations import KINDS, STRENGTHS, copy_of

from memfilter import Config, details
from memfilter.alignment import align
from memfilter.comparison import FEATURES, TREES, features, planes, thumbnails
from memfilter.signatures import Signer

PHOTOS = ("photos/00000.tar", "photos/00001.tar")
SMALL = ("tiny/*.tar", "unlabelled/0000[01].tar")
SEEN = [kind for kind, made in KINDS.items() if made.training != "no"]
OFTEN = ("mirror", "mirror_crop", "hue_saturation", "tint", "duotone", "grey")  # as a graphic, it would be another
NEAR, RADIUS = 0.45, 6  # cosine and bits of a candidate
COPIES = (24, 4)  # of a photo, and of a small one
UNLIKE = {"openclipart-stars": 9}
"""Weight of the unlike pairs of a set, 1 that of its copies: 9 for a series that is close, 4 for documents, else 3."""
WEIGHT = {"photos": 3, "openclipart-stars": 0.5, "signal": 0.2}
"""Weight of a set's pairs, else 1: less for what is only there to tell series apart."""
SERIES = {"ledger": 96, "signal": 240}
"""Number of documents of a kind, else 45."""
MIRRORED = 3
"""Weight of a mirrored photo, 1 that of another copy."""
OFTENER = (2.5, 1.5, 1, 1, 1, 1)
"""Weights of the kinds of `copies`: what is encoded again or halved is met most, and is the hardest to tell."""
CUT_OUT = ("tuxpaint-stamps",)
"""Sets of things that were cut out of photos, which may be copies in the mirror, or not."""
FOLDS = 5
ITERATIONS, LEAVES, RATE = 800, 24, 0.06

RISING = (
    *("evidence", "correlation", "fine", "middle", "colour_correlation", "worst", "median", "quarter", "tenth"),
    *("grain", "grain_worst", "grain_tenth"),
)
FREE = (
    *("inside", "area", "log_gain", "colour_less", "colour_more", "flat_less", "flat_more", "strong", "textured"),
    *("deviation_less", "deviation_more", "fine_less", "fine_more"),
    *("ground_less", "ground_more"),
)
"""Features that say more for a copy the higher they are, and those that may say either; all others say less."""

ONE_PICTURE = {("photos", pair) for pair in ((64, 4052), (845, 1485), (190, 13635), (7178, 13979), (61, 1307))}
"""Pairs of different files that show one photo, by their places in the set."""


@dataclass(frozen=True)
class Signed:
    """Signatures of pictures, row by row."""

    pictures: list[bytes]
    embeddings: npt.NDArray[np.float32]
    hashes: npt.NDArray[np.uint64]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--graphics", type=Path, nargs="*", default=[])
    arguments.add_argument("--most", type=int, default=400, help="pictures of a folder")
    arguments.add_argument("--cache", type=Path, default=Path("/tmp/train_comparison"))
    arguments.add_argument(
        "--bias", type=float, default=-2.85, help="added to the sum of the trees: moves the threshold"
    )
    arguments.add_argument("--out", type=Path, default=TREES)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    sets = {"photos": lambda: photo_pairs(given.data)}
    for folder in given.graphics:
        sets[folder.name] = lambda folder=folder: graphic_pairs(folder.name, pictures_below(folder, given.most))
    sets["captioned"] = lambda: graphic_pairs("captioned", captioned(given.data))
    for name, kind in TUNING.items():
        drawn = documents({name: kind}, SERIES.get(name, 45), seed=77)
        sets[name] = lambda name=name, drawn=drawn: graphic_pairs(name, [on_white(p) for _, p, _ in drawn])
    tables = {}
    for name, make in sorted(sets.items()):  # the trees depend on the order of the rows
        path = given.cache / f"{name}.npz"
        if not path.exists():
            np.savez(path, **make())
        tables[name] = dict(np.load(path))
    trees, result = train(tables, given.bias)
    save_file(trees, given.out)
    write_result(result, given.json)


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures_below(folder: Path, most: int) -> list[Picture]:
    """Return pictures of at least 40 pixels a side, no two of the same pixels, on white."""
    files = sorted(folder.rglob("*.png"))
    Random(folder.name).shuffle(files)
    found: dict[int, Picture] = {}
    for file in files:
        try:
            image = Image.open(file)
        except Image.DecompressionBombError:
            continue
        if min(image.size) >= 40 and image.width * image.height <= 6_000_000:
            picture = on_white(image)
            found.setdefault(zlib.crc32(picture.tobytes()), picture)
        if len(found) == most:
            break
    return list(found.values())


def on_white(picture: Picture) -> Picture:
    whole = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")


def captioned(data: Path) -> list[Picture]:
    """Return photos, each under four texts: no two are copies, as no two memes of one template are."""
    found = []
    for i, photo in enumerate(jpegs([data / PHOTOS[0]])):
        shared = Random(f"captioned {i}")
        share, colour = shared.choice([0.06, 0.08, 0.1]), shared.choice(["white", "yellow"])
        above = shared.random() < 0.7
        for place in range(4):
            picture, random = Image.open(io.BytesIO(photo)).convert("RGB"), Random(f"captioned {i} {place}")
            brush, size = ImageDraw.Draw(picture), round(share * picture.width)
            face = font("sans bold", size)
            for top in (True, False)[1 - above :]:
                text = words(random, random.randrange(2, 7)).upper()
                lines = wrapped(text, face, 0.9 * picture.width)[:3]
                y = 0.03 * picture.height if top else 0.97 * picture.height - 1.2 * size * len(lines)
                at, stroke = (picture.width / 2, y), {"stroke_width": 2, "stroke_fill": "black"}
                brush.multiline_text(at, "\n".join(lines), colour, face, "ma", align="center", **stroke)
            found.append(picture)
    return found


def encoded(picture: Picture, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def copies(picture: Picture, random: Random) -> Iterator[bytes]:
    """Yield the copies of a graphic that circulate."""
    width, height = picture.size
    border = max(round(random.choice([0.03, 0.06, 0.1]) * min(width, height)), 1)
    share = random.choice([0.85, 0.9])
    x, y = (random.uniform(0.2, 0.8) * side * (1 - share) for side in (width, height))
    yield encoded(picture, "JPEG", quality=random.choice([40, 60, 80]))
    yield encoded(picture.resize((max(width // 2, 1), max(height // 2, 1)), Image.Resampling.LANCZOS))
    yield encoded(picture, "WEBP", quality=80)
    yield encoded(ImageOps.expand(picture, border, "black"))
    yield encoded(ImageOps.expand(picture, border, "white"))
    yield encoded(picture.crop((round(x), round(y), round(x + share * width), round(y + share * height))))


def others(picture: Picture, random: Random, cut_out: bool) -> Iterator[bytes]:
    """Yield pictures that are not the graphic: its mirror image, but of a cut-out, and itself in other colours."""
    mirrored = ImageOps.mirror(picture)
    hue, saturation, value = picture.convert("HSV").split()
    turn = random.randrange(40, 216)
    recoloured = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    for other in (recoloured,) if cut_out else (mirrored, recoloured):
        small = [np.asarray(p.resize((64, 64)), np.int16) for p in (picture, other)]
        if np.abs(small[0] - small[1]).mean() > 6:  # or it looks the same
            yield encoded(other)


# -- pairs ------------------------------------------------------------------------------------------------------------


def signed(files: list[bytes]) -> Signed:
    """Return the signatures of image files as a run makes them."""
    signer = Signer(Config())
    assert signer.encoder
    rows = [signer._image(data) for data in tqdm(files, desc="signatures", mininterval=10)]
    squares = np.stack([row["square"] for row in rows])
    hashes = np.array(signer._hashes([row["hashed"] for row in rows]), np.uint64)
    return Signed([row["picture"] for row in rows], signer.encoder.encode(squares), hashes)


def table(set_: Signed, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], true: bool) -> dict[str, Any]:
    """Return the features of these pairs."""
    found, swap = [], np.random.default_rng(0).random(len(a)) < 0.5  # a run compares in any order
    one_by_one = np.where(swap, b, a), np.where(swap, a, b)
    for start in tqdm(range(0, len(a), 256), desc="features", mininterval=10):
        rows, place = np.unique(np.stack(one_by_one)[:, start : start + 256], return_inverse=True)
        one, other = place.reshape(2, -1)
        shown = np.stack([planes(details.unpacked(set_.pictures[row])) for row in rows])
        found.append(features(shown, one, other, align(thumbnails(shown), one, other)))
    return {"features": np.concatenate(found), "a": a, "b": b, "true": np.full(len(a), true)}


def candidates(set_: Signed, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pairs among the first n that an embedding or a hash would find."""
    pairs = []
    for start in range(0, n, 1000):
        rows = slice(start, min(start + 1000, n))
        cosine = set_.embeddings[rows] @ set_.embeddings[:n].T
        bits = np.bitwise_count(set_.hashes[rows, None] ^ set_.hashes[None, :n])
        a, b = np.nonzero((cosine >= NEAR) | (bits <= RADIUS))
        pairs.append(np.stack([a + start, b])[:, a + start < b])
    return tuple(np.concatenate(pairs, 1))  # type: ignore[return-value]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def graphic_pairs(name: str, pictures: list[Picture]) -> dict[str, Any]:
    random, files, pairs = Random(name), [encoded(p) for p in pictures], {True: [], False: []}
    for i, picture in enumerate(pictures):
        unlike = () if name == "captioned" else others(picture, random, name in CUT_OUT)
        for true, made in ((True, copies(picture, random)), (False, unlike)):
            for data in made:
                pairs[true].append((i, len(files)))
                files.append(data)
    set_ = signed(files)
    near = candidates(set_, len(pictures))
    parts = [table(set_, *near, False)]
    return joined(parts + [table(set_, *np.array(of).T, true) for true, of in pairs.items() if of])


def photo_pairs(data: Path) -> dict[str, Any]:
    large = [photo for name in PHOTOS for photo in jpegs([data / name])]
    small = [photo for pattern in SMALL for photo in jpegs(sorted(data.glob(pattern)))]
    random = Random("photos")
    combinations = [(kind, strength) for kind in SEEN for strength in STRENGTHS]
    often = [(kind, strength) for kind in OFTEN for strength in STRENGTHS]
    files, true = [*large, *small], []
    chosen = [*((i, COPIES[0]) for i in range(len(large)))]
    chosen += [(len(large) + i, COPIES[1]) for i in random.sample(range(len(small)), 1000)]
    for (i, count), (j, _) in zip(chosen, [*chosen[61:], *chosen[:61]], strict=True):
        photo, other = (Image.open(io.BytesIO(files[k])).convert("RGB") for k in (i, j))
        for kind, strength in [*random.sample(combinations, count), *random.sample(often, count // 2)]:
            true.append((i, len(files)))
            files.append(copy_of(photo, other, kind, strength, str(i)))
    set_ = signed(files)
    near = candidates(set_, len(large) + len(small))
    return joined([table(set_, *near, False), table(set_, *np.array(true).T, True)])


def jpegs(shards: list[Path]) -> list[bytes]:
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            found += [f.read() for m in tar if m.name.endswith(".jpg") and (f := tar.extractfile(m))]
    return found


# -- trees ------------------------------------------------------------------------------------------------------------


def train(tables: dict[str, dict[str, Any]], bias: float) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the trees of all sets, and what trees of the other pictures make of each picture."""
    from sklearn.model_selection import GroupKFold

    parts, weights, names, folds = [], [], [], []
    for name, rows in tables.items():
        pairs = zip(rows["a"].tolist(), rows["b"].tolist(), strict=True)
        keep = np.array(
            [true or (name, pair) not in ONE_PICTURE for true, pair in zip(rows["true"], pairs, strict=True)]
        )
        rows = {column: values[keep] for column, values in rows.items()}
        parts.append(rows)
        unlike = UNLIKE.get(name, 4 if name in TUNING else 3)
        true = np.flatnonzero(rows["true"])
        share = np.full(len(rows["true"]), unlike / (~rows["true"]).sum())
        if name == "photos":
            share[true] = np.where(rows["features"][true, FEATURES.index("mirrored")] > 0, MIRRORED, 1) / len(true)
        else:
            kinds = np.resize(OFTENER, len(true))
            share[true] = kinds / kinds.sum()
        weights.append(share / share.mean() * WEIGHT.get(name, 1))
        names += [name] * len(rows["a"])
        folds += [zlib.crc32(f"{name} {a % 50}".encode()) for a in rows["a"].tolist()]
    x, y = (np.concatenate([part[column] for part in parts]) for column in ("features", "true"))
    weight, name = np.concatenate(weights), np.array(names)
    logit = np.empty(len(y))
    for rest, held in GroupKFold(FOLDS).split(x, y, folds):
        logit[held] = fitted(x[rest], y[rest], weight[rest]).decision_function(x[held]) + bias
    report = {
        one: {
            "copies": int(y[name == one].sum()),
            "unlike_candidates": int((~y[name == one]).sum()),
            "by_logit": {
                str(at): {
                    "recall": round(float((logit[(name == one) & y] >= at).mean()), 4),
                    "false": int((logit[(name == one) & ~y] >= at).sum()),
                }
                for at in (-1, 0, 1, 2, 3)
            },
        }
        for one in tables
    }
    return exported(fitted(x, y, weight), bias), {"held_out_by_picture": report, "features": len(FEATURES)}


def fitted(x: npt.NDArray[np.float32], y: npt.NDArray[np.bool_], weight: npt.NDArray[np.float64]) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    sign = [1 if name in RISING else 0 if name in FREE else -1 for name in FEATURES]
    options = {"max_leaf_nodes": LEAVES, "learning_rate": RATE, "min_samples_leaf": 30, "l2_regularization": 1.0}
    model = HistGradientBoostingClassifier(
        max_iter=ITERATIONS, early_stopping=False, random_state=0, monotonic_cst=sign, **options
    )
    return model.fit(x, y, sample_weight=weight)


def exported(model: Any, bias: float) -> dict[str, npt.NDArray[Any]]:
    """Return the trees as arrays over all nodes; a leaf has feature -1 and its value as limit."""
    nodes = {"feature": [-1], "limit": [float(model._baseline_prediction.item()) + bias], "left": [0], "right": [0]}
    roots = [0]
    for predictors in model._predictors:
        start = len(nodes["feature"])
        roots.append(start)
        for node in predictors[0].nodes:
            leaf = bool(node["is_leaf"])
            nodes["feature"].append(-1 if leaf else int(node["feature_idx"]))
            nodes["limit"].append(float(node["value"] if leaf else node["num_threshold"]))
            nodes["left"].append(0 if leaf else start + int(node["left"]))
            nodes["right"].append(0 if leaf else start + int(node["right"]))
    found = {"feature": np.array(nodes["feature"], np.int16), "limit": np.array(nodes["limit"], np.float32)}
    found |= {name: np.array(nodes[name], np.int32) for name in ("left", "right")}
    return found | {"roots": np.array(roots, np.int32)}


if __name__ == "__main__":
    main()
