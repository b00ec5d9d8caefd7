"""The main job on the demo's samples, and the table of what was planted and what was found."""

from __future__ import annotations

import time
from pathlib import Path

from .. import pipeline, summary
from ..config import Config
from ..manifest import Manifest
from .data import IMAGE_KINDS, TIMES, Planted, samples, unseen_captions, write_shards
from .memorized import MODEL, Pair, compare, contact_sheet

_UNSEEN = 200
_FALSE_POSITIVE_RATE = 0.01


def run(out: Path, workers: int | None = None) -> list[str]:
    """Write the demo's shards to `out`/input, run on them into `out`/run, and return the lines to print.

    Beside them are the captions by which the threshold was calibrated, `unseen_captions.txt`, and `contact_sheet.png`:
    training picture and generation side by side for the specific pairs.
    """
    started = time.monotonic()
    planted = samples()
    write_shards(planted, out / "input")
    reference = out / "unseen_captions.txt"
    reference.write_text("\n".join(unseen_captions(planted, _UNSEEN)) + "\n")
    threshold = {"false_positive_rate": _FALSE_POSITIVE_RATE, "reference": str(reference)}
    config = Config.parse({"magnitude": {"model": str(MODEL), "threshold": threshold}})
    manifest = pipeline.run([str(out / "input")], out / "run", config, workers, update=True)
    repeated, once = compare(planted, manifest)
    contact_sheet(repeated, once, manifest.info["threshold"], out / "contact_sheet.png")
    lines = [f"{'':26}{'planted':>8}{'found':>8}   how"]
    lines += [f"{kind:26}{n:8,}{found:8,}   {how}" for kind, n, found, how in score(planted, manifest)]
    lines += ["", *_memorization(planted, manifest, repeated, once)]
    lines += ["", *summary.lines(manifest.info, str(out / "run"))[:-1]]
    lines.append(f"pictures  {out / 'contact_sheet.png'}: what the model was trained on, what it draws, and the score")
    lines.append(f"input     {out / 'input'}; took {time.monotonic() - started:.0f} s")
    return [*lines, summary.reconciliation(manifest.counts)]


def _memorization(planted: list[Planted], manifest: Manifest, repeated: list[Pair], once: list[Pair]) -> list[str]:
    """Return the table's last part: pairs planted, drawn again by the model, and found by their magnitude."""
    rows = manifest.table(["key", "reasons"]).to_pylist()
    flagged = {int(row["key"]) for row in rows if "magnitude" in row["reasons"]}
    ordinary = {i for i, p in enumerate(planted) if p.kind == "single"}
    lines = [f"{'specific captions':26}{'pairs':>8}{'drawn':>8}   magnitude over {manifest.info['threshold']:.2f}"]
    for kind, pairs in ((f"seen {TIMES} times", repeated), ("seen once", once)):
        lines.append(
            f"  {kind:24}{len(pairs):8,}{sum(p.is_drawn for p in pairs):8,}   {sum(p.is_over for p in pairs):,} masked"
        )
    lines.append(f"{'ordinary captions':26}{len(ordinary):8,}{'':8}   {len(ordinary & flagged):,} masked")
    return lines


def score(planted: list[Planted], manifest: Manifest) -> list[tuple[str, int, int, str]]:
    """Return (kind, planted, found, how) rows; the last counts samples that were joined and are copies of nothing."""
    table = manifest.table(["key", "action", "reasons", "image_group", "caption_group", "duplication"])
    rows = dict(zip((int(k) for k in table["key"].to_pylist()), table.to_pylist(), strict=True))
    found: dict[str, list[str]] = {}
    total: dict[str, int] = {}
    false = 0
    for i, one in enumerate(planted):
        mine, theirs = rows[i], rows[max(one.original, 0)]
        same_image, same_caption = (mine[g] == theirs[g] for g in ("image_group", "caption_group"))
        if one.kind in ("single", "specific"):
            # an original may be dropped in favour of a better copy of it, never in favour of anything else
            family = [j for j in rows if rows[j]["image_group"] == mine["image_group"] and j != i]
            false += any(planted[j].original != i or planted[j].kind == "repeated caption" for j in family)
            continue
        hit = {"repeated caption": same_caption, "repeated pair": same_image and same_caption}.get(one.kind, same_image)
        if one.kind == "corrupt":
            hit = mine["action"] == "bad"
        total[one.kind] = total.get(one.kind, 0) + 1
        if hit:
            reasons = [r for r in mine["reasons"] + theirs["reasons"] if r != "magnitude"]
            how = [r for r in reasons if one.kind == "repeated caption" or r != "caption_duplicate"]
            found.setdefault(one.kind, []).append(how[0] if how else mine["duplication"])
    result = []
    for kind in (*IMAGE_KINDS, "repeated caption", "repeated pair", "corrupt"):
        hits = found.get(kind, [])
        ways = sorted(set(hits), key=lambda way: (-hits.count(way), way))
        result.append((kind, total[kind], len(hits), ", ".join(f"{hits.count(way)} {way}" for way in ways)))
    return [*result, ("joined wrongly", 0, false, "")]
