"""Train the built-in image descriptor: self-supervised copy detection on unlabelled photos.

A photo and an edited copy of it are to have a high cosine, any two photos a low one: InfoNCE over the batch and an
entropy term that pushes nearest neighbours apart, as in SSCD (Pizzi et al. 2022).

    python benchmarks/train_descriptor.py DATA          # over an hour on one core; continues where it was stopped
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from copies import edited
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from memfilter.encoders.network import SIDE, Descriptor, standardised
from memfilter.images import decode, thumbnail

TRAINING = ("unlabelled/0000[01].tar", "tiny/*.tar", "photos/00000.tar")
HELD_OUT = 2000  # photos at the end of those without labels, which calibrate the threshold
BATCH = 256  # photos, each seen twice
TEMPERATURE = 0.05
ENTROPY = 2.0  # weight of the entropy term
RATE = 2e-3
CROWDED = 450  # steps in which many edits come together; then fewer do, as on copies in the wild


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path, help="the folder with unlabelled/, tiny/ and photos/")
    arguments.add_argument("--steps", type=int, default=1700)
    arguments.add_argument("--out", type=Path, default=Path("memfilter/encoders/builtin.safetensors"))
    arguments.add_argument("--checkpoint", type=Path, default=Path("train_descriptor.pt"))
    args = arguments.parse_args()
    torch.set_num_threads(1)  # sums in one order
    network = train(training_photos(args.data), args.steps, args.checkpoint)
    save_file(
        {name: value.half().contiguous() for name, value in network.state_dict().items() if value.is_floating_point()},
        args.out,
    )


def training_photos(data: Path) -> npt.NDArray[np.uint8]:
    """Return the photos that the descriptor learns from."""
    shards = [sorted(data.glob(pattern)) for pattern in TRAINING]
    unlabelled, *others = (photos(found) for found in shards)
    return np.concatenate([unlabelled[:-HELD_OUT], *others])


def photos(shards: list[Path]) -> npt.NDArray[np.uint8]:
    """Return the photos in these shards as the descriptor is given them: (N, side, side) grey."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file:
                    found.append(thumbnail(decode(file.read(), False, 10**8, 2 * SIDE).pixels, SIDE))
    return np.stack(found)


def train(images: npt.NDArray[np.uint8], steps: int, checkpoint: Path) -> Descriptor:
    """Return the network after this many steps, those of an earlier run that was stopped included."""
    torch.manual_seed(0)
    network = Descriptor().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}], RATE
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.06)
    parts = {"network": network, "optimizer": optimizer, "rate": rate}
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first = saved["step"]
    per_epoch = len(images) // BATCH
    bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", mininterval=5)
    for step in bar:
        epoch, place = divmod(step, per_epoch)
        rows = np.random.default_rng(epoch).permutation(len(images))[place * BATCH : (place + 1) * BATCH]
        random = np.random.default_rng([1, step])
        plain, copies, other = edited(images[rows], random, 1.0 if step < CROWDED else 0.5)
        both = standardised(torch.from_numpy(np.concatenate([plain, copies])))
        one, two = network(both.contiguous(memory_format=torch.channels_last)).split(BATCH)
        loss, alike = contrastive(one, two, torch.from_numpy(other))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        rate.step()
        bar.set_postfix_str(f"loss {loss.item():.3f} cosine {alike:.3f}", refresh=False)
        if step % 50 == 49:
            torch.save({**{n: p.state_dict() for n, p in parts.items()}, "step": step + 1}, f"{checkpoint}.tmp")
            Path(f"{checkpoint}.tmp").replace(checkpoint)
    return network.eval()


def contrastive(one: Tensor, two: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """Return the loss of these photos and their copies, and their mean cosine.

    `other` is of each copy the place of the photo that was put beside or into it, -1 for none: no negative.
    """
    n = len(one)
    places = torch.arange(n)
    rows = torch.cat([one, two])
    cosine = rows @ rows.T
    same = torch.eye(2 * n, dtype=torch.bool)
    has = other >= 0
    for shown in (other, other + n):
        same[(places + n)[has], shown[has]] = True
        same[shown[has], (places + n)[has]] = True
    positive = torch.cat([places + n, places])
    logits = cosine.masked_fill(same, -1.0) / TEMPERATURE
    unlike = cosine.detach().masked_fill(same, -1.0)
    unlike[torch.arange(2 * n), positive] = -1.0
    distance = (rows - rows[unlike.argmax(1)]).norm(dim=1)
    entropy = -torch.log(distance + 1e-4).mean()
    return cross_entropy(logits, positive) + ENTROPY * entropy, cosine[places, places + n].mean().item()


if __name__ == "__main__":
    main()
