"""What a run found, in figures for `manifest.json` and in lines for the terminal."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import printable
from .records import ACTIONS, CAPTION_METHODS, DUPLICATION, METHODS, Decisions, Groups, Ints, Samples, Scores
from .store import Store, read_table

_LARGEST = 10
_MANY = 3  # samples, and captions, from which on a plain picture is a placeholder
_DOUBTED = 0.2  # share of the samples that may be dropped as copies without a doubt, byte for byte equal ones apart
_CROWD = 50  # different files with a caption in a group, above which it is doubted if over half of the captions differ


def statistics(
    samples: Samples, groups: Groups, decisions: Decisions, scores: Scores | None, store: Store
) -> dict[str, Any]:
    """Return the figures of a run: samples by reason, groups, duplication kinds, bad samples by cause."""
    found: dict[str, Any] = {
        "reasons": {c: int(f.sum()) for c, f in zip(decisions.codes, decisions.reasons, strict=True)},
        **_image_groups(samples, groups, store),
        "inexact_dropped": int(((decisions.action == ACTIONS.index("drop")) & (groups.method > 0)).sum()),
        **_caption_groups(samples, groups),
        "duplication": dict(
            zip(DUPLICATION, np.bincount(decisions.duplication[samples.good], minlength=4).tolist(), strict=True)
        ),
        "down_weighted": int((decisions.weight % 1 > 0).sum()),
        "mitigated": int(decisions.mitigate.sum()),
        "bad": dict(sorted(_counts(samples.table["bad"].cast("string")))),
        "blank": int(pc.sum(samples.table["blank"]).as_py() or 0),
        "without_caption": int((samples.good & samples.table["fingerprint"].is_null().to_numpy()).sum()),
    }
    if scores is not None:
        own = scores.samples[~np.isnan(scores.samples)]
        levels = (0.5, 0.9, 0.99, 0.999)
        found["magnitude_quantiles"] = (
            {str(q): round(float(np.quantile(own, q)), 6) for q in levels} if len(own) else {}
        )
    return found


def _caption_groups(samples: Samples, groups: Groups) -> dict[str, Any]:
    """Return the figures of the caption groups of two or more, and of what images and captions have in common."""
    copies = groups.caption_method >= 0
    by_tier = np.bincount(groups.caption_method[copies], minlength=len(CAPTION_METHODS)).tolist()
    captions = (groups.caption_group == np.arange(len(samples))) & (groups.caption_count > 1)
    images = (groups.image_group == np.arange(len(samples))) & (groups.image_count > 1)
    shared = {"images_a_caption": groups.caption_images[captions], "captions_an_image": groups.image_captions[images]}
    return {
        "caption_groups": int(captions.sum()),
        "caption_copies": dict(zip(CAPTION_METHODS, by_tier, strict=True)),
        **{k: {"mean": round(float(n.mean()), 3), "most": int(n.max())} if len(n) else None for k, n in shared.items()},
    }


def _image_groups(samples: Samples, groups: Groups, store: Store) -> dict[str, Any]:
    """Return the figures of the groups of two or more, those of blank images and of placeholders apart.

    A placeholder is one plain picture (lettering on one ground, and the like) that is there three times or more under
    as many captions.  A group that is not blank is doubtful if over 50 files with a caption are in it, byte for byte
    equal ones apart, and over half of their captions differ.
    """
    rows = np.flatnonzero(groups.image_count > 1)
    heads, place, members = np.unique(groups.image_group[rows], return_inverse=True, return_counts=True)
    captions = _different(place, groups.caption_group[rows], len(heads))
    is_blank = samples.table["blank"].fill_null(False).to_numpy()[heads]
    is_plain = samples.table["look"].is_valid().to_numpy()[heads]
    is_placeholder = is_plain & ~is_blank & (members >= _MANY) & (captions >= _MANY)
    kind = np.select([is_blank, is_placeholder], ["blank", "placeholder"], "picture")
    largest = np.lexsort((heads, -members))[:_LARGEST].tolist()
    # a sample without a caption is a caption group of its own, and tells nothing
    is_captioned = samples.table["fingerprint"].is_valid().to_numpy()[rows]
    captioned = np.bincount(place[is_captioned], minlength=len(heads))
    different = _different(place[is_captioned], groups.caption_group[rows][is_captioned], len(heads))
    crowded = np.bincount(place[is_captioned & (groups.method[rows] != 0)], minlength=len(heads)) > _CROWD
    crowds = np.flatnonzero(crowded & ~is_blank & (2 * different > captioned))
    of_pictures = np.bincount(groups.method[rows][kind[place] == "picture"] + 1, minlength=len(METHODS) + 1)
    return {
        "image_groups": int((kind == "picture").sum()),
        "image_copies": dict(zip(METHODS[:-1], of_pictures[1:-1].tolist(), strict=True)),
        "blank_groups": int(is_blank.sum()),
        "placeholder_groups": int(is_placeholder.sum()),
        "placeholders": int(members[is_placeholder].sum()),
        "largest_groups": [
            {
                **_keeper(samples, int(heads[i]), store),
                "kind": str(kind[i]),
                "count": int(members[i]),
                "captions": int(captions[i]),
            }
            for i in largest
        ],
        "doubtful_groups": [
            {**_keeper(samples, int(heads[i]), store), "count": int(captioned[i]), "captions": int(different[i])}
            for i in crowds[np.argsort(-captioned[crowds], kind="stable")][:_LARGEST].tolist()
        ],
    }


def _different(place: Ints, caption: Ints, n: int) -> Ints:
    """Return how many different captions there are in each of n places."""
    found: Ints = np.bincount(np.unique(np.stack([place, caption]), axis=1)[0], minlength=n)
    return found


def _keeper(samples: Samples, row: int, store: Store) -> dict[str, str]:
    shard = int(np.searchsorted(samples.first, row, "right")) - 1
    name = samples.shards[shard].name
    key = read_table(store.signatures(name), ["key"])["key"][row - int(samples.first[shard])].as_py()
    return {"shard": name, "key": key, "caption": samples.table["caption"][row].as_py()[:200]}


def _counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    return [(c["values"], c["counts"]) for c in column.drop_null().value_counts().to_pylist()]


def changes(before: dict[str, Any] | None, info: dict[str, Any]) -> list[str]:
    """Return what a decision was and is, by action and by reason; nothing where it is the first or as before."""
    if before is None or before == {name: value for name, value in info.items() if name != "digest"}:
        return []
    text = []
    for told, was, now in (
        ("was → is", before["counts"], info["counts"]),
        ("reasons", before["found"]["reasons"], info["found"]["reasons"]),
    ):
        names = (name for name in ("read", *ACTIONS, *now) if name in now)
        pairs = {name: (was.get(name, 0), now[name]) for name in names}
        text.append(f"{told:10}" + ", ".join(f"{n} {a:,} → {b:,}" for n, (a, b) in pairs.items() if a or b))
    return text


def lines(info: dict[str, Any], out: str) -> list[str]:
    """Return the summary of a finished run, the reconciliation last."""
    found, counts, config = info["found"], info["counts"], info["config"]
    copies = found["image_copies"]
    text = [
        f"images    {sum(copies.values()):,} copies of {found['image_groups']:,} pictures ({copies['exact']:,} exact, "
        f"{copies['hash']:,} by hash, {copies['embedding']:,} by embedding)",
        f"apart     {found['blank']:,} blank images, in {found['blank_groups']:,} groups, "
        f"and {found['placeholders']:,} placeholders, in {found['placeholder_groups']:,}",
        *([embedding_line(info["embedding_join"])] if info["embedding_join"] else []),
        _captions(info),
        _together(found),
        _magnitude(info, out),
    ]
    if info["generality"]:
        text.append(generality_line(info["generality"]))
    if info["generalised"]:
        text.append(generalised_line(info["generalised"]))
    text += [_group(i, largest) for i, largest in enumerate(found["largest_groups"])]
    text += _doubts(found, counts["read"])
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


def _doubts(found: dict[str, Any], read: int) -> list[str]:
    """Return lines that warn of what looks as if different pictures were taken for copies."""
    text, dropped = [], found["inexact_dropped"]
    if dropped > _DOUBTED * read:
        text.append(
            f"look      {dropped:,} of {read:,} samples ({dropped / read:.0%}) are dropped as copies of other files"
        )
    for group in found["doubtful_groups"]:
        name = printable(f"{group['shard']} {group['key']}")
        text.append(f"look      {group['count']:,} samples joined {name} with {group['captions']:,} different captions")
    if text:
        text.append(
            "          check the manifest's pairs of uid and canonical_uid, those of the lowest match_score first; if"
            " they are no copies, raise images.match_threshold or set policy.image_duplicate: record, then rethreshold"
        )
    return text


def _captions(info: dict[str, Any]) -> str:
    found = info["found"]
    copies = found["caption_copies"]
    by_tier = ", ".join(f"{n:,} {tier}" for tier, n in copies.items() if tier in info["config"]["captions"]["tiers"])
    text = f"captions  {sum(copies.values()):,} repeats in {found['caption_groups']:,} groups ({by_tier}); "
    return f"{text}{found['without_caption']:,} samples without a caption"


def _together(found: dict[str, Any]) -> str:
    text = "together  " + ", ".join(f"{n:,} {kind}" for kind, n in found["duplication"].items())
    if images := found["images_a_caption"]:
        text += f"; a repeated caption has {images['mean']:.1f} images (at most {images['most']:,})"
    if captions := found["captions_an_image"]:
        text += f"; a repeated image has {captions['mean']:.1f} captions (at most {captions['most']:,})"
    for what in ("down_weighted", "mitigated"):
        if found[what]:
            text += f"; {found[what]:,} samples {what.replace('_', '-')}"
    return text


def embedding_line(join: dict[str, Any]) -> str:
    """Return the line that tells how many of the true pairs the embedding join found."""
    recall = join["recall"]
    how = f"{join['probes']} of {join['cells']:,} cells probed for each"
    if join["cells"] == 1:
        how = "every row compared with every other"
    if recall["share"] is None:
        found = f"; recall unknown: no true pair of {recall['rows']:,} sampled rows"
    else:
        interval = f"{recall['low']:.3f}-{recall['high']:.3f}, from {recall['rows']:,} sampled rows"
        found = f", recall {recall['share']:.3f} ({interval})"
    return f"embedding {join['pairs']:,} pairs{found}; {how}"


def generality_line(found: dict[str, Any]) -> str:
    """Return the line that tells how general the samples' captions are, from 0 to 10."""
    if found["mean"] is None:
        return "generality of no caption: none has a word"
    spread = ", ".join(f"{float(q):.0%} {value:.2f}" for q, value in found["quantiles"].items())
    text = f"generality {found['mean']:.2f} on average; quantiles {spread}"
    if (rewritten := found["rewritten"]) and None not in rewritten.values():
        text += f"; rewritten captions {rewritten['before']:.2f} before, {rewritten['after']:.2f} after"
    return text


def generalised_line(found: dict[str, Any]) -> str:
    """Return the line that tells what became of the flagged captions."""
    failed = ", ".join(f"{n:,} {cause}" for cause, n in found["failed"].items())
    text = (
        f"general   {found['flagged']:,} captions of {found['flagged_samples']:,} flagged samples: "
        f"{found['rewritten']:,} rewritten by {found['by']}, {sum(found['failed'].values()):,} failed"
    )
    text += f" ({failed})" if failed else ""
    return f"{text}; {found['over_threshold']:,} over the threshold; in the pools of {found['pools']:,} samples"


def _group(place: int, group: dict[str, Any]) -> str:
    kind = "" if group["kind"] == "picture" else f"{group['kind']} "
    captions = "1 caption" if group["captions"] == 1 else f"{group['captions']:,} captions"
    name = printable(f"{group['shard']} {group['key']}")
    caption = textwrap.shorten(printable(group["caption"]), 60, placeholder=" …")
    return f"{'' if place else 'largest':10}{group['count']:,} x {kind}{name} ({captions}) {caption}".rstrip()


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
    if scoring["noise_floor"] is not None:
        text += f"; noise floor of {scoring['dtype']} {scoring['noise_floor']:.2g}"
    if info["threshold"] is not None:
        text += f"; {info['found']['reasons']['magnitude']:,} samples at or above {info['threshold']:.4g}"
        return text + (calibration_text(scoring["calibration"]) if "calibration" in scoring else "")
    return (
        f"{text}; nothing masked: no threshold.  Choose one, a value or {{quantile: 0.99}} or {{false_positive_rate: "
        f"0.01, reference: captions.txt}}, as magnitude.threshold in a YAML file, then: "
        f"memfilter rethreshold {out} --config FILE"
    )


def calibration_text(found: dict[str, Any]) -> str:
    """Return how well the magnitude tells the captions of a labelled list apart, as the end of a line."""
    figures = [
        f"{name} {found[key]:.3f} ({found[key + '_interval'][0]:.3f}-{found[key + '_interval'][1]:.3f})"
        for name, key in (("AUC", "auc"), ("TPR@1%FPR", "tpr_at_1_fpr"))
    ]
    return (
        f"; of the labelled captions {found['found']:,} of {found['memorized']:,} memorized and "
        f"{found['false_positives']:,} of {found['others']:,} others are, {', '.join(figures)}"
    )
