"""Which captions are rewritten as general ones, the table of the results, and what of it joins the pools."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .config import Generalise, digest_of
from .errors import ConfigError, RunError
from .records import GENERALISED, Decisions, Scores
from .rewriters import Answer, Rewriter
from .store import Store, done, read_bytes, read_digest, read_note, read_table, replacing, write_table

log = logging.getLogger(__name__)

FLAGS = ("joint_count", "image_count", "caption_count", "magnitude", "generality")
"""The keys of `generalise` that say which samples are flagged; the manifest's columns have the same names."""

Progress = Callable[[Iterator[tuple[int, Answer]], int], Iterator[tuple[int, Answer]]]


def flagged(rows: pa.Table, threshold: float | None, settings: Generalise, rated: bool = True) -> npt.NDArray[np.bool_]:
    """Tell which rows of a manifest are kept or masked and repeat often enough, are specific enough, or have a
    magnitude that is high enough to be rewritten; null is none of these.

    Without a magnitude of its own the run's `threshold` counts.  Raises ConfigError where generality is asked for in a
    run that is not `rated`.
    """
    limits = settings.model_dump(include={*FLAGS})
    if limits["magnitude"] is None:
        limits["magnitude"] = threshold
    found = np.zeros(len(rows), bool)
    for name, limit in limits.items():
        has_any = name in rows.column_names and rows[name].null_count < len(rows)
        if name == "generality" and limit is not None and not rated:
            raise ConfigError(
                "generalise.generality is given and no sample of the run has a generality score; give generality.tagger"
            )
        if limit is not None and has_any:
            compare = pc.less_equal if name == "generality" else pc.greater_equal
            found |= compare(rows[name], pa.scalar(limit, rows[name].type)).fill_null(False).to_numpy()
    return np.asarray(found & pc.is_in(rows["action"], pa.array(["keep", "mask"])).to_numpy())


def rewrite(texts: pa.Array, rewriter: Rewriter, store: Store, note: dict[str, Any], progress: Progress) -> None:
    """Leave the table of these captions, distinct and sorted, as rewritten now or by an earlier call.

    Every answer is kept on disk as soon as it is there.  A caption without one has a row with the cause, and is tried
    again by the next call.
    """
    captions: list[str] = texts.to_pylist()
    note = {**note, "by": rewriter.name}
    digest = digest_of(["generalised-1", rewriter.identity, note, captions])
    path = store.place(store.generalised, digest)
    if done(path, digest) and not read_table(path, ["general"])["general"].null_count:
        return
    file = store.answers / f"{rewriter.identity}.jsonl"
    answers, causes = _read_answers(file), {}
    missing = [caption for caption in captions if caption not in answers]
    log.info("rewriting %d of %d captions by %s", len(missing), len(captions), rewriter.name)
    _write_answers(file, answers)  # a line that was cut off goes
    with open(file, "a", encoding="utf-8") as f:
        for i, (general, cause) in progress(rewriter.rewrite(missing), len(missing)) if missing else ():
            if general is None:
                causes[missing[i]] = cause
            else:
                answers[missing[i]] = general
                f.write(_line(missing[i], general))
                f.flush()
    _write_answers(file, answers)
    columns = [captions, [answers.get(c) for c in captions], [causes.get(c) for c in captions]]
    table = pa.table([*columns, [rewriter.name] * len(captions)], schema=GENERALISED)
    write_table(store.generalised, table, digest, note)


def _line(caption: str, general: str) -> str:
    return json.dumps([caption, general, digest_of([caption, general])], ensure_ascii=False) + "\n"


def _read_answers(file: Path) -> dict[str, str]:
    """Return the general captions that earlier calls were given; a damaged line is none."""
    found: dict[str, str] = {}
    for line in read_bytes(file).splitlines() if file.exists() else ():
        try:
            caption, general, digest = json.loads(line)
            if digest == digest_of([caption, general]):
                found[caption] = general
        except (ValueError, TypeError):
            continue
    return found


def _write_answers(file: Path, answers: dict[str, str]) -> None:
    with replacing(file) as temporary:
        temporary.write_text("".join(_line(c, answers[c]) for c in sorted(answers)), encoding="utf-8")


# -- what later decisions read ----------------------------------------------------------------------------------------


def read_generalised(store: Store) -> pa.Table | None:
    """Return the table of rewritten captions, None where there is none or it is of other captions than the run's."""
    path = store.at(store.generalised)
    if not path.exists():
        return None
    try:
        note = read_note(path)
    except RunError as e:
        raise RunError(f"{path}: damaged; delete it and run 'memfilter generalise' again") from e
    if note.get("captions") != read_digest(store.at(store.captions)):
        log.warning(
            "%s: is of captions that the run no longer has, and not used; run 'memfilter generalise' again", path
        )
        return None
    return read_table(path)


def general_captions(
    generalised: pa.Table | None, captions: pa.Table, scores: Scores | None, threshold: float | None
) -> pa.Array | None:
    """Return of each distinct caption the general one below the threshold, null for none."""
    if generalised is None:
        return None
    rows = generalised.filter(generalised["general"].is_valid())
    if scores is not None and scores.generalised is not None and threshold is not None:
        rows = rows.filter(pa.array(scores.generalised < np.float32(threshold)))
    places = pc.index_in(captions["text"].combine_chunks(), rows["text"].combine_chunks())
    return rows["general"].combine_chunks().take(places)


def outcome(
    generalised: pa.Table | None,
    general: pa.Array | None,
    decisions: Decisions,
    store: Store,
) -> dict[str, Any] | None:
    """Return the figures: captions flagged, rewritten, failed by cause and over the threshold, and how many samples
    were flagged and how many have a general caption in their pools; None where nothing was rewritten.
    """
    if generalised is None or general is None:
        return None
    note = read_note(store.at(store.generalised))
    rewritten = len(generalised) - generalised["general"].null_count
    texts, rows = pc.list_flatten(decisions.pooled), pc.list_parent_indices(decisions.pooled)
    has_general = general.is_valid().to_numpy(zero_copy_only=False)
    return {
        "by": note["by"],
        "flags": note["flags"],
        "flagged": len(generalised),
        "flagged_samples": note["samples"],
        "rewritten": rewritten,
        "failed": dict(sorted(Counter(generalised["cause"].drop_null().to_pylist()).items())),
        "over_threshold": rewritten - int(has_general.sum()),
        "pools": len(pc.unique(rows.filter(pc.is_in(texts, general.drop_null().cast(texts.type))))),
    }
