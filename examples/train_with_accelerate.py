"""Fine-tune a Stable Diffusion pipeline with accelerate on a run's filtered shards; masked samples teach it nothing."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset as wds
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

import memfilter
from memfilter.training import MaskedLoss, total_weight


def batches(pipe: StableDiffusionPipeline, run: Path, size: int) -> Iterator[list[torch.Tensor]]:
    """Return this process's pixels (B, 3, H, W), token ids (B, 77) and loss weights (B,), without end."""
    shards = sorted(str(path) for path in (run / "shards").rglob("*.tar"))
    samples = wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node)
    samples = samples.compose(memfilter.Manifest.load(run).attach()).decode("pil", partial=True)
    side, tokens = pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.tokenizer
    tensors = samples.to_tuple("jpg;jpeg;png;webp", "txt", "loss_weight").map_tuple(
        lambda image: normalize(center_crop(resize(to_tensor(image), side), side), [0.5], [0.5]),
        lambda text: tokens(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0],
        torch.tensor,
    )
    return iter(tensors.batched(size).repeat())


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pipeline", help="folder of a Stable Diffusion pipeline")
parser.add_argument("run", type=Path, help="the --out of memfilter run")
parser.add_argument("tuned", help="folder for the fine-tuned pipeline")
parser.add_argument("--steps", type=int, default=4)
args, accelerator = parser.parse_args(), Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(accelerator.process_index)  # noise of its own
pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True).to(accelerator.device)
unet, optimizer = accelerator.prepare(pipe.unet.train(), torch.optim.AdamW(pipe.unet.parameters(), 1e-5))
loss_of = MaskedLoss(scheduler := DDPMScheduler.from_config(pipe.scheduler.config), snr_gamma=5.0)
data = batches(pipe, args.run, size=2)  # not prepared: each process reads shards of its own
for step in range(args.steps):
    parts = [[tensor.to(accelerator.device) for tensor in part] for part in itertools.islice(data, 2)]
    total, losses = total_weight(*(weight for *_, weight in parts)), []  # of the step's batches in all processes
    for pixels, ids, weight in parts:
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            states, noise = {"encoder_hidden_states": pipe.text_encoder(ids)[0]}, torch.randn_like(latents)
            t = torch.randint(len(scheduler), (len(latents),), device=latents.device)
        with accelerator.accumulate(unet):
            losses.append(loss_of(unet, latents, noise, t, weight, states, total))
            accelerator.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
    masked = torch.cat([weight == 0 for *_, weight in parts]).float().mean()
    loss, share = accelerator.reduce(torch.stack([torch.stack(losses).mean().detach(), masked]), "mean").tolist()
    accelerator.print(f"step {step}: loss {loss:.4f}, masked {share:.0%}")
if accelerator.is_main_process:
    pipe.save_pretrained(args.tuned)
