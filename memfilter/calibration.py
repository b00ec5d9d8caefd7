"""How well a score tells memorized captions from others, and the threshold that belongs to a false-positive rate.

A caption is taken for memorized when its score is at or above the threshold.  Every measure takes the scores of the
memorized captions and those of the others, finite and at least one of each.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import ConfigError
from .records import Floats

RATE = 0.01
"""The false-positive rate below which TPR@1%FPR is taken."""
_RESAMPLES = 1000
_LEVEL = 0.95
_TEXTS = ("caption", "prompt", "text")
_LABELS = ("label", "memorized")


def roc_auc(memorized: Floats, others: Floats) -> float:
    """Return the chance that a memorized caption scores higher than another one; of equal scores a half counts."""
    ranked = np.sort(others)
    below, not_above = (np.searchsorted(ranked, memorized, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(ranked)))


def tpr_at_fpr(memorized: Floats, others: Floats, rate: float = RATE) -> float:
    """Return the largest share of memorized captions found among thresholds with a false-positive rate below `rate`.

    `rate` is from 0 to 1.  The definition of Wen et al. 2024: strictly below, so of 100 others none may be found.
    """
    allowed = ceil(_share(rate) * len(others)) - 1
    return float((memorized > np.sort(others)[::-1][allowed]).mean()) if allowed >= 0 else 0.0


def threshold_at_fpr(others: Floats, rate: float) -> float:
    """Return the lowest float32 value that at most this share of the others reach, `rate` from 0 to below 1."""
    highest = np.sort(others)[::-1]
    return float(np.nextafter(highest[int(_share(rate) * len(highest))], np.float32(np.inf)))


def _share(rate: float) -> Fraction:
    # the share as it was written: in floats 0.29 * 100 < 29
    return Fraction(str(rate))


def bootstrap_interval(
    measure: Callable[[Floats, Floats], float], memorized: Floats, others: Floats, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of a measure over 1,000 resamples, the same for the same seed.

    Each kind of caption is drawn anew from its own kind, so that a resample has as many of either.  Where all resamples
    agree, as with scores that are set apart, the interval is a point, which says nothing of other captions.
    """
    random = np.random.default_rng(seed)
    values = [
        measure(random.choice(memorized, len(memorized)), random.choice(others, len(others))) for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def measures(memorized: Floats, others: Floats, seed: int = 0) -> dict[str, Any]:
    """Return AUC and TPR@1%FPR with their bootstrap intervals, and the number of captions of either kind, as JSON."""
    return {
        "memorized": len(memorized),
        "others": len(others),
        "auc": roc_auc(memorized, others),
        "auc_interval": list(bootstrap_interval(roc_auc, memorized, others, seed)),
        "tpr_at_1_fpr": tpr_at_fpr(memorized, others),
        "tpr_at_1_fpr_interval": list(bootstrap_interval(tpr_at_fpr, memorized, others, seed)),
        "bootstrap": {"level": _LEVEL, "resamples": _RESAMPLES, "seed": seed},
    }


def operating_point(memorized: Floats, others: Floats, rate: float) -> dict[str, Any]:
    """Return the threshold of this false-positive rate, as JSON, with how many captions of either kind reach it."""
    threshold = threshold_at_fpr(others, rate)
    found, false = (int((scores >= np.float32(threshold)).sum()) for scores in (memorized, others))
    return {"threshold": threshold, "found": found, "false_positives": false}


# -- labelled captions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledCaptions:
    """The captions of a labelled list in its order, and which of them are memorized."""

    captions: list[str]
    is_memorized: npt.NDArray[np.bool_]


def read_labelled(path: Path) -> LabelledCaptions:
    """Return the captions of a CSV with a header: a column `caption`, `prompt` or `text`, and a `label` or `memorized`.

    A label is 1 for memorized, else 0; the separator is a comma, a semicolon or a tab, and the case of the header does
    not matter.  Raises ConfigError naming file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _parse(path, file.read())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: the labelled captions cannot be read: {e}") from e


def _parse(path: Path, text: str) -> LabelledCaptions:
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    captions, labels = [], []
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        at_text, at_label = (_column(path, names, wanted) for wanted in (_TEXTS, _LABELS))
        for row in filter(None, reader):
            where = f"{path}: line {reader.line_num}"
            if len(row) != len(names):
                raise ConfigError(f"{where} has {len(row)} fields and the header {len(names)}; quote what separates")
            caption, label = row[at_text].strip(), row[at_label].strip()
            if not caption:
                raise ConfigError(f"{where} has no {names[at_text]}; leave the line out")
            if label not in ("0", "1"):
                raise ConfigError(f"{where}: {names[at_label]} is {label[:60]!r}; give 1 for memorized, else 0")
            captions.append(caption)
            labels.append(label == "1")
    except csv.Error as e:
        raise ConfigError(f"{path}: line {reader.line_num} is not CSV: {e}") from e
    if len({*labels}) < 2:
        raise ConfigError(f"{path}: of {len(labels)} captions {sum(labels)} are labelled 1; give some of either kind")
    return LabelledCaptions(captions, np.array(labels))


def _column(path: Path, names: list[str], wanted: tuple[str, ...]) -> int:
    found = [i for i, name in enumerate(names) if name in wanted]
    if len(found) != 1:
        raise ConfigError(f"{path}: line 1, the header, has {len(found)} columns named {' or '.join(wanted)}; give one")
    return found[0]


def read_reference(path: Path) -> pa.ChunkedArray:
    """Return the captions of a file, one a line; raises ConfigError for one that holds none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: the reference captions cannot be read: {e}") from e
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{path}: holds no reference caption; give one a line")
    return pa.chunked_array([lines])
