"""What a run found, in figures for `manifest.json` and in lines for the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .records import ACTIONS, DUPLICATION, Decisions, Groups, Samples, Scores


def statistics(samples: Samples, groups: Groups, decisions: Decisions, scores: Scores | None) -> dict[str, Any]:
    """Return the figures of a run: samples by reason, groups, duplication kinds, bad samples by cause."""
    heads = groups.image_group[groups.image_group != np.arange(len(samples))]
    caption_heads = groups.caption_group[groups.caption_group != np.arange(len(samples))]
    found: dict[str, Any] = {
        "reasons": {c: int(f.sum()) for c, f in zip(decisions.codes, decisions.reasons, strict=True)},
        "image_groups": len(np.unique(heads)),
        "caption_groups": len(np.unique(caption_heads)),
        "duplication": dict(
            zip(DUPLICATION, np.bincount(decisions.duplication[samples.good], minlength=4).tolist(), strict=True)
        ),
        "bad": dict(sorted(_counts(samples.table["bad"].cast("string")))),
        "blank": int(pc.sum(samples.table["blank"]).as_py() or 0),
        "without_caption": int((samples.good & samples.table["fingerprint"].is_null().to_numpy()).sum()),
    }
    if scores is not None:
        own = scores.magnitude[groups.caption[samples.good]]
        levels = (0.5, 0.9, 0.99, 0.999)
        found["magnitude_quantiles"] = (
            {str(q): round(float(np.quantile(own, q)), 6) for q in levels} if len(own) else {}
        )
    return found


def _counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    return [(c["values"], c["counts"]) for c in column.drop_null().value_counts().to_pylist()]


def lines(info: dict[str, Any], out: str) -> list[str]:
    """Return the summary of a finished run, the reconciliation last."""
    found, counts, config = info["found"], info["counts"], info["config"]
    reasons = found["reasons"]
    copies = sum(reasons[f"{m}_duplicate"] for m in ("exact", "hash", "embedding"))
    text = [
        f"images    {copies:,} copies in {found['image_groups']:,} groups "
        f"({reasons['exact_duplicate']:,} exact, {reasons['hash_duplicate']:,} by hash, "
        f"{reasons['embedding_duplicate']:,} by embedding); {found['blank']:,} blank",
        f"captions  {reasons['caption_duplicate']:,} repeats in {found['caption_groups']:,} groups; "
        f"{found['without_caption']:,} samples without a caption",
        "together  " + ", ".join(f"{n:,} {kind}" for kind, n in found["duplication"].items()),
        _magnitude(info, out),
    ]
    if found["bad"]:
        text.append("bad       " + ", ".join(f"{n:,} {code}" for code, n in found["bad"].items()))
    if found["without_caption"] and found["without_caption"] == counts["read"] - counts["bad"]:
        other = "json" if config["input"]["caption"] == "txt" else "txt"
        text.append(f"          no sample has a caption; if they are elsewhere set input.caption: {other}")
    for shard in info["shards"]:
        if shard.get("skipped"):
            text.append(f"skipped   {shard['skipped']}")
    if emptied := [s["name"] for s in info["shards"] if s.get("emptied")]:
        names = ", ".join([*emptied[:3], *(["…"] if len(emptied) > 3 else [])])
        text.append(f"emptied   {len(emptied):,}, of which no sample is kept: {names}")
    text.append(f"manifest  {out}/manifest" + (f", filtered shards {out}/shards" if config["output"]["shards"] else ""))
    text.append(reconciliation(counts))
    return text


def reconciliation(counts: dict[str, int]) -> str:
    """Return the line that every run ends with; the figures add up, or there is a bug."""
    keep, mask, drop, bad = (counts[a] for a in ACTIONS)
    return f"{counts['read']} read = {keep} kept + {mask} masked + {drop} dropped + {bad} bad"


def _magnitude(info: dict[str, Any], out: str) -> str:
    scoring = info["magnitude"]
    if scoring is None:
        return "magnitude skipped: no model; give one that has seen the data with --model FOLDER_OR_HUB_ID"
    quantiles = info["found"]["magnitude_quantiles"]
    spread = ", ".join(f"{float(q):.1%} {value:.4g}" for q, value in quantiles.items())
    text = f"magnitude {scoring['conditions']:,} distinct captions scored; quantiles {spread}"
    if info["threshold"] is not None:
        return f"{text}; {info['found']['reasons']['magnitude']:,} samples at or above {info['threshold']:.4g}"
    return (
        f"{text}; nothing masked: no threshold.  Choose one, a value or {{quantile: 0.99}} or {{false_positive_rate: "
        f"0.01, reference: captions.txt}}, as magnitude.threshold in a YAML file, then: "
        f"memfilter rethreshold {out} --config FILE"
    )
