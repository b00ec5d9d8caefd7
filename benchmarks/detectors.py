"""The methods that are compared: what each makes of an image, and how alike it calls two of them.

A signature is made once an image and cached; several methods may read one.  A score is higher for the likelier pair:
a cosine, or a distance in bits with its sign turned.
"""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from copy_set import ImageSet
from PIL import Image
from scoring import Edges, Scores

from memfilter import comparison, details, images
from memfilter.alignment import align
from memfilter.config import Config
from memfilter.edges import find_candidates
from memfilter.encoders import image_encoder
from memfilter.encoders.builtin import Builtin
from memfilter.groups import load_samples
from memfilter.records import Samples
from memfilter.shards import find_shards
from memfilter.signatures import hasher, sign
from memfilter.store import Store, read_note, read_table

Rows = npt.NDArray[Any]

_MAX_PIXELS = Config().input.max_pixels
_BATCH = 256


@dataclass(frozen=True)
class Signed:
    """A signature of each image, and the milliseconds of one core an image took, of which `decode` in its pixels."""

    rows: Rows
    milliseconds: float
    decode: float


@dataclass(frozen=True)
class Method:
    """A signature and the score of two; `default` is the threshold that its users are given."""

    signature: str
    score: Callable[[Rows, Rows], Scores]
    default: float


# -- signatures -------------------------------------------------------------------------------------------------------


def signatures(image_set: ImageSet, name: str) -> Signed:
    """Return a signature of all images of a set, from its cache, which is filled with all that it lacks."""
    if not signature_file(image_set, name).exists():
        wanted = {method.signature for method in METHODS.values()} - {"fastdup"}
        missing = sorted(other for other in wanted if not signature_file(image_set, other).exists())
        for other, signed in sign_all(image_set, missing).items():
            np.savez(signature_file(image_set, other), **asdict(signed))
    stored = np.load(signature_file(image_set, name))
    return Signed(stored["rows"], float(stored["milliseconds"]), float(stored["decode"]))


def signature_file(image_set: ImageSet, name: str) -> Path:
    """Return where a signature of a set's images is kept."""
    encoder = image_encoder("builtin")
    assert encoder
    folder = image_set.folder / "signatures"
    folder.mkdir(exist_ok=True)
    return folder / f"{encoder.identity.replace('/', '-') if name == 'builtin' else name}.npz"


def sign_all(image_set: ImageSet, names: list[str]) -> dict[str, Signed]:
    """Return these signatures of all images of a set, each file read and decoded to RGB once for all the peers."""
    peers: dict[str, Callable[[Rows], Rows]] = {name: _peer(name) for name in names if name != "builtin"}
    rows: dict[str, list[Rows]] = {name: [] for name in peers}
    spent = dict.fromkeys([*peers, "decode"], 0.0)
    for file in image_set.files if peers else ():
        data = file.read_bytes()
        started = time.process_time()
        # as imagededup decodes, to the same pixels
        opened = Image.open(io.BytesIO(data))
        pixels = np.asarray(opened if opened.mode == "RGB" else opened.convert("RGBA").convert("RGB"))
        spent["decode"] += time.process_time() - started
        for name, encode in peers.items():
            started = time.process_time()
            rows[name].append(encode(pixels))
            spent[name] += time.process_time() - started
    each = 1000 / len(image_set.files)
    decode = spent["decode"] * each
    signed = {name: Signed(np.stack(rows[name]), spent[name] * each + decode, decode) for name in peers}
    if "builtin" in names:
        signed["builtin"] = embed("builtin", image_set.files)
    return signed


def _peer(name: str) -> Callable[[Rows], Rows]:
    """Return a function from RGB pixels to a hash in 64-bit words; that of PDQ is followed by its mirror image's."""
    if name == "pdq":
        import pdqhash

        return lambda pixels: _words(np.stack(pdqhash.compute_dihedral(pixels)[0])[[0, 5]])
    method = hasher(name)
    return lambda pixels: np.array([int(method.encode_image(image_array=pixels), 16)], np.uint64)


def _words(bits: Rows) -> Rows:
    return np.packbits(bits.astype(bool)).view(np.uint64)


def embed(spec: str, files: list[Path]) -> Signed:
    """Return the embeddings of image files by the encoder of this spec, fed as `memfilter.signatures` feeds it."""
    encoder = image_encoder(spec)
    assert encoder
    side = max(images.HASH_SIDE, 2 * encoder.side)
    decode = encode = 0.0
    embeddings = []
    for start in range(0, len(files), _BATCH):
        held = [file.read_bytes() for file in files[start : start + _BATCH]]
        started = time.process_time()
        decoded = [images.decode(data, False, _MAX_PIXELS, side).pixels for data in held]
        between = time.process_time()
        embeddings.append(encoder.encode(np.stack([images.thumbnail(pixels, encoder.side) for pixels in decoded])))
        decode, encode = decode + between - started, encode + time.process_time() - between
    each = 1000 / len(files)
    return Signed(np.concatenate(embeddings), (decode + encode) * each, decode * each)


def fastdup(image_set: ImageSet, python: Path) -> tuple[Signed, Edges, str]:
    """Return fastdup's features, the pairs that it reports itself, and its version; it runs in its own environment."""
    out = signature_file(image_set, "fastdup")
    if not out.exists():
        script = Path(__file__).with_name("fastdup_edges.py")
        command = [str(python), str(script), str(image_set.folder / "files"), str(out)]
        # without the crash reports that it would send
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "SENTRY_OPT_OUT": "1"})
    stored = np.load(out)
    place = {key: i for i, key in enumerate(image_set.keys)}
    at = np.array([place[name] for name in stored["names"].tolist()], np.int64)
    features = np.zeros((len(place), stored["features"].shape[1]), np.float32)  # an image that it rejects is like none
    features[at] = stored["features"]
    pairs = np.sort(at[stored["pairs"]], axis=1)
    milliseconds = 1000 * float(stored["seconds"]) / len(place)
    edges = Edges(pairs[:, 0], pairs[:, 1], stored["similarity"])
    return Signed(features, milliseconds, float("nan")), distinct(edges), str(stored["version"])


def distinct(edges: Edges) -> Edges:
    """Return each pair once, with the highest of its scores."""
    order = np.lexsort((-edges.score, edges.second, edges.first))
    pairs = np.stack([edges.first, edges.second], 1)[order]
    new = np.append(True, (np.diff(pairs, axis=0) != 0).any(1)) if len(pairs) else np.empty(0, bool)
    return Edges(pairs[new, 0], pairs[new, 1], edges.score[order][new])


# -- scores -----------------------------------------------------------------------------------------------------------


def hamming(a: Rows, b: Rows) -> Scores:
    """Return the distances in bits, turned in sign, between hashes of one or several 64-bit words."""
    total = np.zeros((len(a), len(b)), np.int16)
    for word in range(a.shape[1]):
        total -= np.bitwise_count(a[:, None, word] ^ b[None, :, word])
    return total.astype(np.float32)


def _pdq(a: Rows, b: Rows) -> Scores:
    return hamming(a[:, :4], b[:, :4])


def _pdq_mirror(a: Rows, b: Rows) -> Scores:
    return np.maximum(_pdq(a, b), hamming(a[:, 4:], b[:, :4]))


def cosine(a: Rows, b: Rows) -> Scores:
    """Return the cosines of rows of unit length."""
    scores: Scores = a @ b.T
    return scores


def _builtin() -> Method:
    encoder = image_encoder("builtin")
    assert encoder
    return Method("builtin", cosine, encoder.similarity)


METHODS = {
    "phash": Method("phash", hamming, -10),
    "dhash": Method("dhash", hamming, -10),
    "ahash": Method("ahash", hamming, -10),
    "whash": Method("whash", hamming, -10),
    "pdq": Method("pdq", _pdq, -31),
    "pdq_mirror": Method("pdq", _pdq_mirror, -31),
    "fastdup": Method("fastdup", cosine, 0.9),
    "builtin": _builtin(),
}
"""Every pair has a score.  imagededup's own radius is 10 of 64 bits, PDQ's 31 of 256, fastdup's threshold 0.9."""

SPARSE = ("fastdup_own_edges", "memfilter")
"""Methods that report pairs and leave the rest without a score."""


# -- the library's own decision ---------------------------------------------------------------------------------------


def combined(image_set: ImageSet, among: int | None, lowest: float) -> tuple[Edges, float, float]:
    """Return the pairs that memfilter compares, milliseconds an image to sign, and `lowest`.

    The score is the comparison's, as a logit: a score near 1 has no steps left.  With `among` pairs are sought between
    so many first images and the others, of a cosine of `lowest` or more; else between all, as a run does, which finds
    the lowest cosine that is worth its while itself.
    """
    config = Config.parse({"output": {"shards": False}})
    with tempfile.TemporaryDirectory() as work:
        store, shards = Store(Path(work)), find_shards([str(tar) for tar in image_set.tars])[0]
        started = time.process_time()
        for shard in shards:
            sign(shard, store.signatures(shard.name), config)
        seconds = time.process_time() - started
        samples = load_samples(shards, store)
        if among is None:
            candidates = find_candidates(samples, store, config)
            lowest = read_note(store.edges / "embedding.parquet")["lowest"]
            a, b = candidates.pairs["a"].to_numpy(), candidates.pairs["b"].to_numpy()
            by_hash = _expanded(candidates.hashes, samples)
        else:
            a, b, by_hash = _between(samples, store, among, lowest, config.images.hash_radius)
        one, other = np.concatenate([a, by_hash[0]]), np.concatenate([b, by_hash[1]])
        is_near = np.repeat([False, True], [len(a), len(by_hash[0])])
        edges = Edges(one, other, _scores(samples, store, one, other, is_near))
    return distinct(edges), 1000 * seconds / len(samples), lowest


def _scores(samples: Samples, store: Store, a: Any, b: Any, by_hash: Any) -> Any:
    """Return the logit of each pair's score, -100 where cosine and evidence give no cause to compare it."""
    column: dict[str, list[Any]] = {"picture": [], "embedding": []}
    for shard in samples.shards:
        table = read_table(store.signatures(shard.name), list(column))
        for name, parts in column.items():
            parts += table[name].to_pylist()
    builtin, found = Builtin(), np.full(len(a), -100, np.float32)
    for start in range(0, len(a), 256):
        rows, place = np.unique(np.stack([a, b])[:, start : start + 256], return_inverse=True)
        one, other = place.reshape(2, -1)
        shown = np.stack([comparison.planes(details.unpacked(column["picture"][row])) for row in rows])
        embeddings = np.array([column["embedding"][row] for row in rows], np.float64)
        aligned = align(comparison.thumbnails(shown), one, other)
        support = (embeddings[one] * embeddings[other]).sum(1) + builtin.gain * aligned.evidence
        wanted = np.flatnonzero((support >= builtin.similarity) | by_hash[start : start + 256])
        if len(wanted):
            score = comparison.scores(comparison.features(shown, one[wanted], other[wanted], aligned.of(wanted)))
            score = np.clip(score.astype(np.float64), 1e-9, 1 - 1e-9)
            found[start + wanted] = np.log(score / (1 - score))
    return found


def _between(samples: Samples, store: Store, n: int, lowest: float, radius: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """Return the pairs between the first n images and the others that an embedding finds, and those of near hashes."""
    found: list[Any] = []
    for shard in samples.shards:
        found += read_table(store.signatures(shard.name), ["embedding"])["embedding"].to_pylist()
    nothing = np.zeros(Builtin.dim, np.float16)
    embeddings = np.array([nothing if e is None else e for e in found], np.float32)
    cosine = embeddings[:n] @ embeddings[n:].T
    cosine[:, ~samples.compared[n:]] = -1
    a, b = np.nonzero(cosine >= lowest)
    hashes = samples.table["hash"].fill_null(0).to_numpy()
    bits = np.bitwise_count(hashes[:n, None] ^ hashes[None, n:])
    bits[:, ~samples.compared[n:]] = 64
    c, d = np.nonzero(bits <= radius)
    return a, b + n, (c, d + n)


def _expanded(by_hash: pa.Table, samples: Samples) -> tuple[Any, Any]:
    """Return the pairs of images that edges between hashes stand for, those of equal hashes included."""
    hashes = samples.table["hash"].fill_null(0).to_numpy()
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero(samples.compared).tolist():
        members.setdefault(int(hashes[row]), []).append(row)
    pairs = [(i, j) for rows in members.values() for i in rows for j in rows if i < j]
    for a, b in zip(*(by_hash[name].to_pylist() for name in ("a", "b")), strict=True):
        of = members[int(hashes[a])], members[int(hashes[b])]
        pairs += [(min(i, j), max(i, j)) for i in of[0] for j in of[1]]
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(first, np.int64), np.array(second, np.int64)
