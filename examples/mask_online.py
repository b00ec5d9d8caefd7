"""Mask samples while a model memorizes them, without a run before it; a run's manifest can take over what was found."""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import webdataset as wds
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

from memfilter import Manifest
from memfilter.training import AntiGradientControl, MagnitudeMask, MaskedLoss, Sightings


def batches(shards: list[str], side: int, size: int) -> Iterator[list[Any]]:
    """Return batches of pixels (B, 3, side, side), captions, and the samples' shards and keys, without end."""
    samples = wds.WebDataset(shards, shardshuffle=False).decode("pil")
    rows = samples.to_tuple("jpg;jpeg;png;webp", "txt", "__url__", "__key__")
    rows = rows.map_tuple(lambda image: normalize(center_crop(resize(to_tensor(image), side), side), [0.5], [0.5]))
    return iter(rows.batched(size).repeat())


@torch.no_grad()
def encoded(pipe: StableDiffusionPipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Return the captions as the UNet's condition."""
    return {"encoder_hidden_states": pipe.encode_prompt(list(captions), pipe.device, 1, False)[0]}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pipeline", help="folder of a Stable Diffusion pipeline")
parser.add_argument("sightings", help="parquet file for what was seen and masked")
parser.add_argument("shards", nargs="+")
parser.add_argument("--threshold", type=float, help="mask by magnitude (2 for Stable Diffusion); else by the loss")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--run", help="the --out of a memfilter run over the same shards")
args = parser.parse_args()
torch.manual_seed(0)
pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
mask = MagnitudeMask(args.threshold, encoded(pipe, [""])) if args.threshold else AntiGradientControl()
loss_of, sightings = MaskedLoss(DDPMScheduler.from_config(pipe.scheduler.config), online=mask), Sightings()
optimizer = torch.optim.AdamW(pipe.unet.train().parameters(), 1e-5)
data = batches(args.shards, pipe.unet.config.sample_size * pipe.vae_scale_factor, size=4)
for step, (pixels, captions, shards, keys) in enumerate(itertools.islice(data, args.steps)):
    with torch.no_grad():
        latents = pipe.vae.encode(pixels.to(pipe.device)).latent_dist.sample() * pipe.vae.config.scaling_factor
    noise, t = torch.randn_like(latents), torch.randint(1000, (len(latents),), device=pipe.device)
    loss = loss_of(pipe.unet, latents, noise, t, torch.ones(len(t), device=pipe.device), encoded(pipe, captions))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    sightings.add(shards, keys, mask.last)
    print(f"step {step}: loss {loss:.4f}, kept so far {mask.kept_fraction:.0%}")
sightings.save(args.sightings)
if args.run:
    manifest = Manifest.load(args.run).with_online(args.sightings)  # weight 0 for what was masked half of the time
    weights = [manifest.weight(manifest.shard_of(r["shard"]), r["key"]) for r in sightings.table().to_pylist()]
    print(f"weight 0 in the manifest: {weights.count(0)} of {len(weights)} samples")
