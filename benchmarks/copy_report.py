"""The results of copy_detection.py as a table in Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformations import KINDS, STRENGTHS

NAMES = {
    "phash": "imagededup pHash",
    "dhash": "imagededup dHash",
    "ahash": "imagededup aHash",
    "whash": "imagededup wHash",
    "pdq": "PDQ",
    "pdq_mirror": "PDQ, also mirrored",
    "fastdup": "fastdup, its features' cosine",
    "fastdup_own_edges": "fastdup, its own pairs",
    "builtin": "memfilter, `builtin` cosine",
    "memfilter": "memfilter, as it decides",
}
_AT = "at_1_false_in_1e7"


def markdown(result: dict[str, Any]) -> str:
    """Return the totals of each method, and recall by kind and strength at one false edge per 10^7 pairs."""
    methods = result["methods"]
    lines = [
        f"{result['copies']:,} copies of {result['photos']} photos, {result['true_pairs']:,} true pairs; "
        f"{result['distractors']:,} distractors, without {result['natural_duplicates_taken_out']} natural duplicates.",
        "",
        "| method | average precision | recall at precision 0.99 | recall at one false edge in 10^7 | the same, unseen "
        "kinds | threshold | recall as it comes | precision as it comes | false edges in 10^7 as it comes | images/s |",
        "|---|" + "---|" * 9,
    ]
    for name, m in methods.items():
        own, wide = m["as_it_comes"], m[_AT]
        cells = [f"{m['average_precision']:.3f}", _cell(m["at_precision_0.99"]["recall"]), _cell(wide["recall"])]
        cells += [_cell(m["recall_of_unseen_kinds"][_AT]), _threshold(name, wide["threshold"])]
        cells += [_cell(own["recall"]), _cell(own["precision"]), f"{m['false_in_1e7_as_it_comes']:,.1f}"]
        cells += [f"{m['images_per_second']:,}"]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Recall at one false edge in 10^7 pairs by kind, weak / middle / strong; the second column tells whether the "
        "training of the built-in descriptor has seen the kind:",
        "",
        "| kind | seen | " + " | ".join(NAMES[name] for name in methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for kind, made in KINDS.items():
        rows = [m["recall_by_kind"][_AT][kind] for m in methods.values()]
        cells = [" / ".join(f"{row[s]:.2f}".replace("0.", ".").replace("1.00", "1") for s in STRENGTHS) for row in rows]
        lines.append(f"| {kind.replace('_', ' ')} | {made.training} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _threshold(name: str, value: float | None) -> str:
    if value is None:
        return "all its pairs"
    if name in ("phash", "dhash", "ahash", "whash", "pdq", "pdq_mirror"):
        return f"radius {int(-value)}" if value <= 0 else "none"
    return f"{value:.3f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw recall by kind at one false edge per 10^7 pairs, over the three strengths, as a heat map."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    methods = ["memfilter", "builtin", "fastdup", "pdq_mirror", "pdq", "phash", "dhash", "whash", "ahash"]
    methods = [name for name in methods if name in result["methods"]]
    tables = {name: result["methods"][name]["recall_by_kind"][_AT] for name in methods}
    kinds = sorted(KINDS, key=lambda kind: ["yes", "in part", "no"].index(KINDS[kind].training))
    values = np.array([[np.mean(list(tables[name][kind].values())) for name in methods] for kind in kinds])
    values = np.vstack([values, [result["methods"][name][_AT]["recall"] for name in methods]])
    figure, axes = plt.subplots(figsize=(1.5 + 1.05 * len(methods), 2.2 + 0.27 * len(values)), layout="constrained")
    axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            bold = "bold" if value >= row.max() - 0.005 else "normal"
            ink = "white" if value > 0.6 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink, weight=bold)
    marks = {"yes": "", "in part": " (in part)", "no": " (unseen)"}
    labels = [kind.replace("_", " ") + marks[KINDS[kind].training] for kind in kinds]
    axes.set_yticks(range(len(values)), [*labels, "all kinds"], fontsize=8)
    heads = [
        NAMES[name].replace("`", "").replace(", ", "\n").replace("imagededup ", "imagededup\n") for name in methods
    ]
    axes.set_xticks(range(len(methods)), heads, fontsize=8, rotation=30, ha="left")
    axes.xaxis.tick_top()
    axes.axhline(len(kinds) - 0.5, color="black", linewidth=1)
    title = "Copies found at no more than one false edge per 10\u2077 pairs of distinct photos"
    axes.set_title(f"{title}\n(mean of three strengths; unseen: not among the training edits)", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
