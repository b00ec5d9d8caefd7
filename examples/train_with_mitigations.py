"""Fine-tune a Stable Diffusion UNet on a run's filtered shards, with its captions and embeddings mitigated."""

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from diffusers import DDPMScheduler, StableDiffusionPipeline

from memfilter import Manifest, training
from memfilter.insertions import vocabulary


def batches(run: Path, mitigation: training.Mitigation, size: int) -> Iterable[list[Any]]:
    """Return batches of images, captions, loss weights and seeds, over and over again; each pass draws anew."""
    samples = wds.WebDataset([*map(str, sorted((run / "shards").rglob("*.tar")))], shardshuffle=False)
    samples = samples.compose(Manifest.load(run).attach(captions="pool"), mitigation).decode("pil", partial=True)
    rows = samples.to_tuple("jpg;jpeg;png;webp", "txt", "loss_weight", "seed")
    return rows.batched(size, collation_fn=lambda batch: list(zip(*batch, strict=True))).repeat()


@torch.no_grad()
def encode(pipe: Any, images: Iterable[Any], texts: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and text states."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents = pipe.vae.encode(pipe.image_processor.preprocess([*images], side, side)).latent_dist.sample()
    ids = pipe.tokenizer([*texts], padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents * pipe.vae.config.scaling_factor, pipe.text_encoder(ids)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --out of memfilter run")
    parser.add_argument("pipeline", help="the folder of a Stable Diffusion pipeline")
    parser.add_argument("--objects", type=training.ObjectPool.folder, help="a folder with a folder of images a class")
    parser.add_argument("--tokens", type=float, default=0.1, help="the share of captions with two random tokens")
    parser.add_argument("--noise", type=float, default=0.1, help="the scale of the noise on text states")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)
    optimizer = torch.optim.AdamW(pipe.unet.train().parameters(), 1e-5)
    loss_of = training.MaskedLoss(DDPMScheduler.from_config(pipe.scheduler.config))
    changes = training.MultipleCaptions(), training.RandomTokens(vocabulary(pipe.tokenizer), args.tokens)
    data = islice(batches(args.run, training.Mitigation(*changes), size=8), args.steps)
    for i, (images, texts, weights, seeds) in enumerate(data):
        latents, states = encode(pipe, images, texts)
        if args.objects:
            objects = encode(pipe, *zip(*map(args.objects.draw, seeds), strict=True))
            latents, states = training.dual_fusion(latents, states, *objects)
        condition = {"encoder_hidden_states": training.add_noise(states, seeds, args.noise)}
        t, weight = torch.randint(0, 1000, (len(latents),)), torch.tensor(weights)
        loss = loss_of(pipe.unet, latents, torch.randn_like(latents), t, weight, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {i}: loss {loss.item():.4f}, first caption: {texts[0]}")
