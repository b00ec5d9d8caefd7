"""Train on several processes with accumulation, each step on the weighted mean: torchrun --nproc-per-node 2 FILE ..."""

import argparse
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset as wds
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import normalize, resize, to_tensor

import memfilter
from memfilter.training import MaskedLoss, total_weight


def batches(run: Path, side: int, size: int) -> Iterator[list[torch.Tensor]]:
    """Return this process's pixels (B, 3, side, side) and loss weights (B,), without end."""
    shards = sorted(str(path) for path in (run / "shards").rglob("*.tar"))  # at least one a process
    samples = wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node)
    samples = samples.compose(memfilter.Manifest.load(run).attach()).decode("pil", partial=True)
    pairs = samples.to_tuple("jpg;jpeg;png;webp", "loss_weight")
    pairs = pairs.map_tuple(lambda image: normalize(resize(to_tensor(image), [side, side]), [0.5], [0.5]), torch.tensor)
    return iter(pairs.batched(size).repeat())


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path, help="the --out of memfilter run")
parser.add_argument("trained", help="folder for the trained UNet")
parser.add_argument("--steps", type=int, default=4)
args = parser.parse_args()
dist.init_process_group()
device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
torch.manual_seed(rank := dist.get_rank())  # DDP starts from the parameters of process 0; the noise is each one's own
blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
model = DistributedDataParallel(UNet2DModel(16, block_out_channels=(32, 64), **blocks).to(device))
optimizer, loss_of = torch.optim.SGD(model.parameters(), 0.1), MaskedLoss(DDPMScheduler())
data = batches(args.run, side=16, size=2)
for step in range(args.steps):
    parts = [[tensor.to(device) for tensor in part] for part in itertools.islice(data, 2)]  # accumulated
    total, losses = total_weight(*(weight for _, weight in parts)), []  # of all processes
    for i, (pixels, weight) in enumerate(parts, start=1):
        noise, t = torch.randn_like(pixels), torch.randint(1000, (len(pixels),), device=device)
        with contextlib.nullcontext() if i == len(parts) else model.no_sync():
            losses.append(loss_of(model, pixels, noise, t, weight, denominator=total) / len(parts))
            losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
    masked = torch.cat([weight == 0 for _, weight in parts]).float().mean()
    print(f"process {rank}, step {step}: loss {sum(losses):.4f}, masked {masked:.0%}\n", end="", flush=True)
digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
print(f"process {rank}: parameters {digest[:16]}\n", end="", flush=True)
if rank == 0:
    model.module.save_pretrained(args.trained)
dist.destroy_process_group()
