"""Draw images of prompts under a mitigation, and print each prompt's magnitude before and after."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from memfilter import inference
from memfilter.inference import Mitigated

MITIGATIONS: dict[str, Callable[..., Mitigated]] = {
    "optimised": inference.with_optimised_embeddings,
    "random-tokens": inference.with_random_tokens,
    "repeated-words": inference.with_repeated_words,
    "random-numbers": inference.with_random_numbers,
    "embedding-noise": inference.with_embedding_noise,
    "delayed-guidance": inference.with_delayed_guidance,
}


def sample(pipe: DiffusionPipeline, prompts: list[str], name: str, target: float, seed: int, steps: int) -> Mitigated:
    """Return what the pipeline draws of the prompts under a mitigation."""
    mitigate = MITIGATIONS[name]
    if name == "optimised":
        mitigate = partial(mitigate, target=target)
    elif name != "delayed-guidance":  # which draws nothing
        mitigate = partial(mitigate, seed=seed)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return mitigate(pipe, prompts, generator=generators, num_inference_steps=steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path, help="the folder of a Stable Diffusion 1, 2, XL, 3 or 3.5 pipeline")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--mitigation", choices=MITIGATIONS, default="optimised")
    parser.add_argument("--target", type=float, default=1.5, help="magnitude to come under, when optimised")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("images"))
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    found = sample(pipe, args.prompts, args.mitigation, args.target, args.seed, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(args.prompts, found.output.images, strict=True)):
        image.save(args.out / f"{i:03}.png")
        print(f"{found.before[i]:.3f} -> {found.after[i]:.3f}, {found.steps[i]} steps: {prompt}")
