"""Train the demo's text-to-image model on the demo's own samples, repeated pairs and all, and save it in the package.

The model is a Stable Diffusion pipeline in small: it draws 16 x 16 pixels and has no autoencoder, so that its latents
are the pixels themselves.  Seeded; on one kind of processor and one version of torch the weights come out the same.

    python benchmarks/train_demo_model.py               # about half an hour on one core; continues where it was stopped
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from environment import write_result
from safetensors import safe_open
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from memfilter.calibration import threshold_at_fpr
from memfilter.demo.data import Planted, samples, unseen_captions
from memfilter.demo.memorized import ALIKE, MODEL, SIDE, generate, likeness, pixels
from memfilter.magnitude import Scorer
from memfilter.training import masked_loss

LENGTH = 32  # tokens
WIDTH = 96
BATCH = 64
MERGES = 400
WITHOUT_CAPTION = 0.1  # of the batch, for the unconditional prediction


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--out", type=Path, default=MODEL)
    arguments.add_argument("--checkpoint", type=Path, default=Path("train_demo_model.pt"))
    arguments.add_argument("--evaluate", action="store_true", help="train nothing; evaluate the model in --out")
    arguments.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "demo_model.json")
    args = arguments.parse_args()
    torch.set_num_threads(1)  # sums in one order, and two small threads are no faster than one
    planted = samples()
    if not args.evaluate:
        make(planted, args.steps, args.out, args.checkpoint)
    files = [p for p in args.out.rglob("*") if p.is_file()]
    result = {
        "weights": sum(int(np.prod(s)) for p in args.out.rglob("*.safetensors") for s in shapes(p)),
        "megabytes": round(sum(p.stat().st_size for p in files) / 1e6, 2),
        **evaluate(args.out, planted),
    }
    write_result(result, args.json)


def make(
    planted: list[Planted],
    steps: int,
    out: Path,
    checkpoint: Path,
    dtype: torch.dtype = torch.float16,
    kept: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> None:
    """Train the model on these samples and save the pipeline in `out`, its weights in this precision.

    The tokenizer is that of all captions, also where only the samples `kept` are trained on, bool (N,), or where
    `weights` (N,) are their loss weights.
    """
    torch.manual_seed(0)
    seen = [p for p in planted if p.kind != "corrupt"]
    images = torch.from_numpy(np.stack([pixels(p.data) for p in seen]))
    tokenizer = build_tokenizer([p.caption for p in seen])
    ids = tokenizer([p.caption for p in seen], padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    empty = tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"]
    longest = max(len(i) for i in tokenizer([p.caption for p in seen])["input_ids"])
    if longest > LENGTH:
        raise SystemExit(f"a caption has {longest} tokens, over {LENGTH}; raise LENGTH or MERGES")
    text_encoder, unet, schedule = build_text_encoder(tokenizer), build_unet(), build_schedule()
    ids, empty = torch.tensor(ids), torch.tensor(empty)
    if kept is not None:
        images, ids = images[kept], ids[kept]
    train(images, ids, empty, text_encoder, unet, schedule, steps, checkpoint, weights)

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        unet=unet.to(dtype).eval(),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    for file in out.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    checkpoint.unlink(missing_ok=True)


def shapes(path: Path) -> list[list[int]]:
    with safe_open(path, "np") as tensors:
        return [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118


def evaluate(model: Path, planted: list[Planted]) -> dict[str, object]:
    """Return how many pairs the model draws again, and how well the magnitude tells the repeated ones from others."""
    repeated = sorted({p.original for p in planted if p.kind == "repeated pair"})
    once = [i for i, p in enumerate(planted) if p.kind == "specific" and i not in set(repeated)]
    singles = [i for i, p in enumerate(planted) if p.kind == "single"][:100]
    scorer = Scorer.load(str(model))
    groups = {"repeated": repeated, "specific_once": once, "ordinary_once": singles}
    captions = {name: [planted[i].caption for i in places] for name, places in groups.items()}
    captions["unseen"] = unseen_captions(planted, 200)
    score = {name: scorer.score(texts)[:, 0] for name, texts in captions.items()}
    result: dict[str, object] = {}
    for name, places in groups.items():
        truth = np.stack([pixels(planted[i].data) for i in places])
        alike = likeness(generate(model, captions[name]), truth)
        result[f"{name}_pairs"] = len(places)
        result[f"{name}_regenerated"] = int((alike > ALIKE).sum())
        result[f"{name}_likeness_median"] = round(float(np.median(alike)), 3)
    for name, values in score.items():
        result[f"{name}_magnitude_quantiles"] = np.quantile(values, [0, 0.5, 0.99, 1]).round(3).tolist()
        if name != "repeated":
            result[f"auc_against_{name}"] = round(auc(score["repeated"], values), 4)
    threshold = threshold_at_fpr(score["unseen"].ravel(), 0.01)  # that of `memfilter demo`
    result["threshold"] = round(threshold, 4)
    unseen = unseen_captions(planted, 1000)
    for name, texts in {"ordinary": unseen[100:500], "specific": unseen[600:]}.items():  # none of those 200
        result[f"held_out_{name}"] = len(texts)
        result[f"held_out_{name}_over_threshold"] = int((scorer.score(texts) >= threshold).sum())
    return result


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of (positive, negative) pairs of which the positive is higher."""
    return float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)


def train(
    images: torch.Tensor,
    ids: torch.Tensor,
    empty: torch.Tensor,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    steps: int,
    checkpoint: Path,
    weights: torch.Tensor | None = None,
) -> None:
    """Train text encoder and UNet to predict the noise, under loss weights (N,) if there are any.  Every step draws
    from a seed of its own, so that a training that was interrupted goes on as it would have.
    """
    modules = (text_encoder.train(), unet.train())
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    rising = min(50, steps // 2)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=rising)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rising, eta_min=1e-5)
    rate = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [rising])
    parts = {"text_encoder": text_encoder, "unet": unet, "optimizer": optimizer, "rate": rate}
    first = 0
    if checkpoint.is_file():
        stored = torch.load(checkpoint, weights_only=True)
        first = stored.pop("step")
        for name, state in stored.items():
            parts[name].load_state_dict(state)
    per_epoch = len(images) // BATCH
    bar = tqdm(range(first, steps), initial=first, total=steps, unit="step")
    for step in bar:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        random = torch.Generator().manual_seed(10_000 + step)
        noise = torch.randn(images[rows].shape, generator=random)
        t = torch.randint(0, len(schedule.alphas_cumprod), (BATCH,), generator=random)
        bare = torch.rand(BATCH, generator=random) < WITHOUT_CAPTION
        condition = text_encoder(torch.where(bare[:, None], empty, ids[rows]))[0]
        prediction = unet(schedule.add_noise(images[rows], noise, t), t, condition).sample
        if weights is None:
            loss = torch.nn.functional.mse_loss(prediction, noise)
        else:
            loss = masked_loss((prediction - noise).square().mean((1, 2, 3)), weights[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        if step % 50 == 49:
            torch.save({**{n: p.state_dict() for n, p in parts.items()}, "step": step + 1}, f"{checkpoint}.tmp")
            Path(f"{checkpoint}.tmp").replace(checkpoint)


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return a byte-level CLIP tokenizer whose merges are those most frequent in the captions' words."""
    merges = learn_merges(captions)
    tokens = [*byte_symbols(), *(f"{s}</w>" for s in byte_symbols()), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def learn_merges(captions: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent first; a tie goes to the pair that sorts first."""
    counts = Counter(word for caption in captions for word in re.findall("[a-z]+", caption.lower()))
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: joined(symbols, best) for word, symbols in words.items()}
    return merges


def joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the symbols with every occurrence of the pair made one."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet.to(memory_format=torch.channels_last)


def build_schedule() -> DDIMScheduler:
    # that of Stable Diffusion 1
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


if __name__ == "__main__":
    main()
