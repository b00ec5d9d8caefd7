"""Run fastdup over a folder of images; for an environment of its own, as fastdup takes only numpy below 2.

    python -m venv ENV && ENV/bin/pip install fastdup==2.54
    ENV/bin/python benchmarks/fastdup_edges.py IMAGES OUT.npz

Leaves in OUT.npz the files' names, fastdup's features of them, the pairs that it reports, by place, with their
similarity, the seconds of one core that it took, and its version.  Features are of unit length: the similarity is
their cosine.
"""

import csv
import sys
import tempfile
import time
from pathlib import Path

import fastdup  # type: ignore[import-not-found]
import numpy as np

NEIGHBOURS, THRESHOLD = 5, 0.5


def main() -> None:
    images, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        started = time.process_time()
        failed = fastdup.run(
            str(images), work_dir=work, nearest_neighbors_k=NEIGHBOURS, threshold=THRESHOLD, num_threads=1
        )
        seconds = time.process_time() - started
        if failed:
            raise SystemExit(f"fastdup ended with {failed}")
        names, features = fastdup.load_binary_feature(str(Path(work) / "atrain_features.dat"))
        place = {name: i for i, name in enumerate(names)}
        with (Path(work) / "similarity.csv").open() as file:
            rows = [(place[r["from"]], place[r["to"]], float(r["distance"])) for r in csv.DictReader(file)]
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
    edges = np.array(rows, float).reshape(-1, 3)
    np.savez(
        out,
        names=np.array([Path(name).stem for name in names]),
        features=features.astype(np.float32),
        pairs=edges[:, :2].astype(np.int64),
        similarity=edges[:, 2].astype(np.float32),
        seconds=seconds,
        version=fastdup.__version__,
    )


if __name__ == "__main__":
    main()
