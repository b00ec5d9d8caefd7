"""What a training loop does with a manifest, in whatever version of webdataset stands first on the path.

    python tests/webdataset_versions.py RUN URL...

It prints as JSON the version and, for each way to attach, the weight of every sample by its key.
"""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import webdataset as wds
from torch.utils.data import DataLoader

from memfilter import Manifest


def pair(sample: dict[str, Any]) -> tuple[str, float]:
    return sample["__key__"], sample["loss_weight"]


def composed(manifest: Manifest, urls: list[str], **options: Any) -> Any:
    return wds.WebDataset(urls, shardshuffle=False, **options).compose(manifest.attach()).map(pair)


def pipeline(manifest: Manifest, urls: list[str]) -> Any:
    stages = (wds.SimpleShardList(urls), wds.split_by_worker, wds.tarfile_to_samples())
    return wds.DataPipeline(*stages, manifest.attach(), wds.map(pair))


def main() -> None:
    folder, *urls = sys.argv[1:]
    manifest = Manifest.load(folder)
    stage = pickle.loads(pickle.dumps(manifest.attach()))
    read = wds.WebDataset(urls, shardshuffle=False)
    markers = sum("__key__" not in sample for sample in manifest.attach()([{}, *read, {}]))
    found = {
        "composed": list(composed(manifest, urls)),
        "pipeline": list(pipeline(manifest, urls)),
        "pickled": [pair(sample) for sample in stage(read)],
        "batched": [
            pair for keys, weights in composed(manifest, urls).batched(2) for pair in zip(keys, weights, strict=True)
        ],
        "decoded": [
            pair(s) for s in wds.WebDataset(urls, shardshuffle=False).compose(stage).decode("rgb", partial=True)
        ],
        "forked": list(DataLoader(composed(manifest, urls), None, num_workers=2, multiprocessing_context="fork")),
        "spawned": list(DataLoader(pipeline(manifest, urls), None, num_workers=1, multiprocessing_context="spawn")),
    }
    weights = {name: {key: float(weight) for key, weight in pairs} for name, pairs in found.items()}
    print(json.dumps({"file": wds.__file__, "markers": markers, "weights": weights}))


if __name__ == "__main__":
    main()
