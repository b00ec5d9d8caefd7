"""Train a small diffusion model on a run's filtered shards; masked samples stay in the batch and teach it nothing."""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
import webdataset as wds
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torchvision.transforms.functional import normalize, resize, to_tensor

import memfilter
from memfilter.training import masked_loss

SIDE = 16
SCHEDULER = DDPMScheduler()


def pixels_of(image: Image.Image) -> torch.Tensor:
    """Return an image as pixels (3, SIDE, SIDE) in -1..1."""
    return normalize(resize(to_tensor(image), [SIDE, SIDE]), [0.5], [0.5])


def batches(manifest: memfilter.Manifest, shards: list[str], size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of pixels (B, 3, SIDE, SIDE) and loss weights (B,), over and over again."""
    samples = wds.WebDataset(shards, shardshuffle=False).compose(manifest.attach())
    samples = samples.decode("pil", partial=True)  # partial: the weight is no bytes to decode
    pairs = samples.to_tuple("jpg;jpeg;png;webp", "loss_weight").map_tuple(pixels_of, torch.tensor)
    return pairs.batched(size).repeat()


def step(unet: UNet2DModel, optimizer: torch.optim.Optimizer, pixels: torch.Tensor, weight: torch.Tensor) -> float:
    """Take one step of noise prediction and return the loss."""
    noise, t = torch.randn_like(pixels), torch.randint(0, len(SCHEDULER), (len(pixels),))
    prediction = unet(SCHEDULER.add_noise(pixels, noise, t), t).sample
    loss = masked_loss((prediction - noise).square().mean((1, 2, 3)), weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --out of memfilter run")
    parser.add_argument("shards", nargs="*", help="default: the run's filtered shards")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet, masked = UNet2DModel(SIDE, block_out_channels=(32, 64), **blocks), []
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    shards = args.shards or sorted(str(path) for path in (args.run / "shards").rglob("*.tar"))
    data = batches(memfilter.Manifest.load(args.run), shards, size=8)
    for i, (pixels, weight) in enumerate(itertools.islice(data, args.steps)):
        print(f"step {i}: loss {step(unet, optimizer, pixels, weight):.4f}")
        masked += (weight == 0).tolist()
    print(f"masked: {sum(masked)} of {len(masked)} samples, {sum(masked) / max(len(masked), 1):.0%}")
