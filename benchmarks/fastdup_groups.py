"""Run fastdup with its defaults over listed images; for an environment of its own, as fastdup takes only numpy below 2.

    python -m venv ENV && ENV/bin/pip install fastdup==2.54
    ENV/bin/python benchmarks/fastdup_groups.py LIST OUT.json

LIST names an image a line.  Leaves in OUT.json the pairs that fastdup calls similar, its connected components in the
order of LIST, as the images' names, and its version.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

import fastdup  # type: ignore[import-not-found]


def main() -> None:
    listed, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        failed = fastdup.run(str(listed), work_dir=work, num_threads=1)
        if failed:
            raise SystemExit(f"fastdup ended with {failed}")
        name = {row["index"]: Path(row["filename"]).stem for row in _rows(work, "atrain_features.dat.csv")}
        components: dict[str, list[str]] = {}
        for row in _rows(work, "connected_components.csv"):
            components.setdefault(row["component_id"], []).append(name[row["__id"]])
        pairs = [(Path(row["from"]).stem, Path(row["to"]).stem) for row in _rows(work, "similarity.csv")]
    result = {
        "version": fastdup.__version__,
        "pairs": sorted({(min(pair), max(pair)) for pair in pairs}),
        "components": [members for members in components.values() if len(members) > 1],
    }
    out.write_text(json.dumps(result) + "\n")


def _rows(work: str, file: str) -> list[dict[str, str]]:
    with (Path(work) / file).open() as opened:
        return list(csv.DictReader(opened))


if __name__ == "__main__":
    main()
