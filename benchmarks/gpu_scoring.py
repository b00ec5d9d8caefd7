"""How close scoring captions on a GPU comes to the bare loop over a compiled UNet, and to the card's matrix peak.

    python benchmarks/gpu_scoring.py --json benchmarks/results/gpu_scoring.json
    python benchmarks/gpu_scoring.py --dry-run --json benchmarks/results/gpu_scoring_dry_run.json

Pipelines with the exact shapes of Stable Diffusion 1.5 and SDXL and random weights are saved and loaded as a user's
are, in float16 and bfloat16.  Of each:

* `bare`: the UNet alone, called again and again with the inputs that it gets from memfilter, which stay on the card;
* `end_to_end`: captions, as strings, to scores; what is loaded once (the model, the unconditional) does not count;
* both eager, and compiled with channels-last weights and CUDA graphs.  `ratio` is that of captions per second, and in
  the compiled rounds the two take turns.

The batch size is the one of a few at which the eager UNet is fastest: compiling for each of them would take too long.
`share_of_peak` is the UNet's floating point operations, as torch counts them, over those of the fastest of a few matrix
products in the same precision and process.  `seconds_per_batch` has the parts of a batch measured one by one, the card
idle before and after; `other` is the end-to-end time without them, below zero where they overlap.

Each section runs in a process of its own within its share of the time.  One that fails or is stopped leaves its cause
under `error`, beside what it had measured.  `--dry-run` takes the same steps with small shapes, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import write_result

RATIO, SHARE = 0.90, 0.50
"""The marks: end to end against the bare loop, and the UNet against the matrix peak."""

NOTE = "a dry run on a CPU with small shapes: it shows that the script works, and its figures say nothing of a GPU"

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A pipeline's class, and the configs of its UNet and of its text encoders."""

    pipeline: str
    unet: dict[str, Any]
    clips: tuple[dict[str, Any], ...]
    batch_sizes: tuple[int, ...]
    weight: int  # of its sections in the time


_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

_XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}

SHAPES = {
    "sd15": Shape(
        "StableDiffusionPipeline",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        ({**_CLIP_L, "projection_dim": 768, "hidden_act": "quick_gelu"},),
        batch_sizes=(32, 64, 128),
        weight=2,
    ),
    "sdxl": Shape(
        "StableDiffusionXLPipeline",
        {
            **_XL_BLOCKS,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (
            {**_CLIP_L, "projection_dim": 768, "hidden_act": "quick_gelu"},
            {**_CLIP_G, "projection_dim": 1280, "hidden_act": "gelu"},
        ),
        batch_sizes=(8, 16, 32),
        weight=3,
    ),
}

SMALL = {
    "sd15": Shape(
        "StableDiffusionPipeline",
        {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 8},
        ({**_CLIP_SMALL, "projection_dim": 32},),
        batch_sizes=(2, 4),
        weight=1,
    ),
    "sdxl": Shape(
        "StableDiffusionXLPipeline",
        {
            **_XL_BLOCKS,
            "sample_size": 8,
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (4, 8, 8),
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        ({**_CLIP_SMALL, "projection_dim": 32}, {**_CLIP_SMALL, "projection_dim": 32}),
        batch_sizes=(2, 4),
        weight=1,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What differs between a run on a GPU and a dry run."""

    shapes: dict[str, Shape]
    device: str
    dtypes: tuple[str, ...]
    matrices: tuple[int, ...]  # sides of the matrix products
    seconds: float  # of each timed round
    rounds: int


ON_GPU = Plan(SHAPES, "cuda", ("float16", "bfloat16"), (4096, 8192, 16384), 3.0, 2)
DRY = Plan(SMALL, "cpu", ("float32",), (128, 256), 0.05, 2)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    arguments.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU alone")
    arguments.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"))
    arguments.add_argument("--seconds", type=float, default=460, help="within which all of it ends")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--section", nargs=3, metavar=("MODEL", "DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    plan = DRY if given.dry_run else ON_GPU
    is_compiled = (not given.dry_run) if given.compile is None else given.compile
    if given.section:
        model, dtype, folder = given.section
        report(plan, model, dtype, Path(folder), is_compiled)
        return
    if not given.dry_run and not _has_gpu():
        arguments.error("there is no GPU here; --dry-run takes the same steps on the CPU")
    pairs = [(model, dtype) for dtype in given.dtypes or plan.dtypes for model in given.models]
    flags = [*(["--dry-run"] if given.dry_run else []), "--compile" if is_compiled else "--no-compile"]
    started = time.perf_counter()
    sections = run_sections(plan, pairs, flags, given.seconds)
    what: dict[str, object] = {"dry_run": given.dry_run, **({"note": NOTE} if given.dry_run else {})}
    what |= {"marks": {"ratio": RATIO, "share_of_peak": SHARE}, "seconds": round(time.perf_counter() - started, 1)}
    write_result({**what, "sections": sections}, given.json)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# -- sections, each in a process --------------------------------------------------------------------------------------


def run_sections(plan: Plan, pairs: list[tuple[str, str]], flags: list[str], seconds: float) -> list[dict[str, Any]]:
    """Return what each section measured; time that one leaves goes to those after it."""
    deadline = time.monotonic() + seconds
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (model, dtype) in enumerate(pairs):
            weights = [plan.shapes[name].weight for name, _ in pairs[i:]]
            limit = (deadline - time.monotonic()) * weights[0] / sum(weights)
            found.append(run_section(model, dtype, Path(folder), flags, limit))
    return found


def run_section(model: str, dtype: str, folder: Path, flags: list[str], limit: float) -> dict[str, Any]:
    """Return what a section measured until its end, or until its time was up."""
    command = [sys.executable, __file__, *flags, "--section", model, dtype, str(folder / model)]
    started, error, limit = time.perf_counter(), None, max(limit, 1)
    out = folder / f"{model}-{dtype}.jsonl"
    with out.open("w") as file:
        try:
            code = subprocess.run(command, stdout=file, timeout=limit).returncode
            error = f"the process ended with {code}" if code else None
        except subprocess.TimeoutExpired:
            error = f"stopped after its {limit:.0f} s"
    found: dict[str, Any] = {"model": model, "dtype": dtype}
    for line in out.read_text().splitlines():
        if line.startswith("{") and line.endswith("}"):  # the last one may be cut off
            found |= json.loads(line)
    return {**found, "seconds": round(time.perf_counter() - started, 1), "error": found.get("error", error)}


def report(plan: Plan, model: str, dtype: str, folder: Path, is_compiled: bool) -> None:
    """Print what is measured of a section, a line of JSON as soon as it is known, and the error that ended it."""
    from memfilter.denoisers import quiet

    try:
        with quiet():
            for part in measured(plan, model, dtype, folder, is_compiled):
                print(json.dumps(part), flush=True)
    except Exception as e:  # the libraries raise what they like, and the other sections go on
        print(json.dumps({"error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}), flush=True)
        raise


def measured(plan: Plan, model: str, dtype: str, folder: Path, is_compiled: bool) -> Iterator[dict[str, Any]]:
    """Yield the parts of a section's result, by name."""
    from memfilter.denoisers import find_model, load_denoiser
    from memfilter.magnitude import Scorer

    yield {"device": device_name(plan.device)}
    peak = matrix_peak(plan, dtype)
    yield {"matrix_peak_tflops": round(peak / 1e12, 3)}
    with spent() as seconds:
        if not (folder / "model_index.json").exists():
            build(plan.shapes[model], folder, plan.device)
    yield {"build_seconds": seconds()}
    with spent() as seconds:
        denoiser: Any = load_denoiser(find_model(str(folder)), dtype, plan.device)
    unet = denoiser._network
    yield {"load_seconds": seconds(), "unet_parameters": sum(p.numel() for p in unet.parameters())}

    rates, calls = eager_rates(plan, denoiser, plan.shapes[model].batch_sizes)
    if not any(rates.values()):
        raise MemoryError(f"no batch of {min(rates)} captions or more fits")
    size = max((n for n in rates if rates[n]), key=lambda n: rates[n] or 0)
    call = calls[size]
    flops = unet_flops(dict(unet.config), call) / size
    yield {
        "eager_unet_captions_per_second": {str(n): rate and round(rate, 2) for n, rate in rates.items()},
        "batch_size": size,
        "unet_tflops_per_caption": round(flops / 1e12, 6),
    }
    batches = max(3, round(plan.seconds * (rates[size] or 0) / size))
    yield {"captions_per_round": batches * size}
    yield {"eager": against_bare(plan, Scorer(denoiser, batch_size=size), call, batches, flops, peak)}
    yield {"seconds_per_batch_eager": parts(plan, denoiser, call, size)}
    if is_compiled:
        with spent() as seconds:
            denoiser.compile()
            scorer = Scorer(denoiser, batch_size=size)
            scorer.score(captions(2 * size))
        yield {"compile_seconds": seconds(), "cuda_graphs_skipped": graphs_skipped()}
        compiled = against_bare(plan, scorer, call, batches, flops, peak)
        yield {"compiled": compiled}
        of_batch = parts(plan, denoiser, call, size)
        other = compiled["end_to_end_seconds"] / batches - sum(of_batch.values())
        yield {"seconds_per_batch": {**of_batch, "other": round(other, 6)}, "graphs_compiled": graphs_compiled()}


# -- measures ---------------------------------------------------------------------------------------------------------


def against_bare(plan: Plan, scorer: Any, call: Call, batches: int, flops: float, peak: float) -> dict[str, Any]:
    """Return the end-to-end and the bare rates over as many captions, which take turns, and what the scores were."""
    import numpy as np
    import torch

    unet = scorer.denoiser._network
    count, found = batches * len(call[0][0]), []
    _reset_peak(plan.device)
    seconds: dict[str, list[float]] = {"bare": [], "end_to_end": []}
    with torch.inference_mode():
        seconds_of(lambda: unet(*call[0], **call[1]), plan.device, 3)
    for turn in range(plan.rounds):
        with torch.inference_mode():
            seconds["bare"].append(batches * seconds_of(lambda: unet(*call[0], **call[1]), plan.device, batches))
        texts = captions(count, turn * count)  # others each time: none is known to the tokenizer's cache
        seconds["end_to_end"].append(seconds_of(lambda texts=texts: found.append(scorer.score(texts)), plan.device))
    bare, whole = (statistics.median(seconds[way]) for way in ("bare", "end_to_end"))
    scores = np.concatenate(found).ravel()
    return {
        "bare_captions_per_second": round(count / bare, 2),
        "end_to_end_captions_per_second": round(count / whole, 2),
        "end_to_end_seconds": round(whole, 4),
        "ratio": round(bare / whole, 4),
        "bare_share_of_peak": round(count / bare * flops / peak, 4),
        "end_to_end_share_of_peak": round(count / whole * flops / peak, 4),
        "batch_size": scorer.batch_size,  # smaller than it was, where memory ran out
        "peak_memory_gib": _peak_memory(plan.device),
        "scores": {
            "count": len(scores),
            "finite": bool(np.isfinite(scores).all()),
            "distinct": len(np.unique(scores)),
            "least": float(scores.min()),
            "greatest": float(scores.max()),
        },
    }


def parts(plan: Plan, denoiser: Any, call: Call, size: int) -> dict[str, float]:
    """Return the seconds that a batch spends in each part, measured alone."""
    import torch

    batches = [captions(size, (1000 + i) * size) for i in range(5)]
    found: dict[str, list[float]] = {"tokenising": [], "text_encoding": [], "transfer": []}
    scores = torch.zeros(size, 1, 1, device=plan.device)
    with torch.inference_mode():
        for texts in batches:
            found["tokenising"].append(seconds_of(lambda texts=texts: denoiser.token_ids(texts), plan.device))
            # whose ids are known by now
            found["text_encoding"].append(seconds_of(lambda texts=texts: denoiser.encode(texts), plan.device))
            ids = [_id_array(size) for _ in denoiser._texts(texts)]
            found["transfer"].append(
                seconds_of(lambda ids=ids: ([denoiser._tensor(i) for i in ids], scores.cpu()), plan.device)
            )
        unet = seconds_of(lambda: denoiser._network(*call[0], **call[1]), plan.device, 3)
    medians = {name: statistics.median(values) for name, values in found.items()}
    # a batch is tokenised twice: for the ids of all captions, and for itself; its ids are sent within its encoding
    medians["tokenising"] *= 2
    medians["text_encoding"] = max(0.0, medians["text_encoding"] - medians["transfer"])
    return {name: round(value, 6) for name, value in {**medians, "unet": unet}.items()}


def _id_array(size: int) -> Any:
    import numpy as np

    return np.zeros((size, 77), np.int64)


def eager_rates(plan: Plan, denoiser: Any, sizes: tuple[int, ...]) -> tuple[dict[int, float | None], dict[int, Call]]:
    """Return by batch size the captions per second of the UNet, None where memory is too small, and its call."""
    import torch

    rates: dict[int, float | None] = {}
    calls: dict[int, Call] = {}
    for size in sizes:
        try:
            calls[size] = args, kwargs = recorded(denoiser, size)
            with torch.inference_mode():
                once = seconds_of(lambda a=args, k=kwargs: denoiser._network(*a, **k), plan.device, 2)
                count = max(2, round(plan.seconds / 3 / once))
                rates[size] = size / seconds_of(lambda a=args, k=kwargs: denoiser._network(*a, **k), plan.device, count)
        except torch.cuda.OutOfMemoryError:
            rates[size] = None
            torch.cuda.empty_cache()
    return rates, calls


def recorded(denoiser: Any, size: int) -> Call:
    """Return the arguments with which scoring a batch of captions calls the UNet."""
    import torch

    from memfilter.magnitude import Scorer

    unet, calls = denoiser._unet, []
    scorer = Scorer(denoiser, batch_size=size)
    if scorer.batch_size != size:
        raise torch.cuda.OutOfMemoryError

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return unet(*args, **kwargs)

    denoiser._unet = recording
    try:
        scorer.score(captions(size))
    finally:
        denoiser._unet = unet
    return calls[-1]


def unet_flops(config: dict[str, Any], call: Call) -> int:
    """Return the floating point operations of one call, two a multiplication with addition, counted without data."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._pytree import tree_map_only
    from torch.utils.flop_counter import FlopCounterMode

    args, kwargs = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), call)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).to(args[0].dtype)
    # attention as plain matrix products, which are counted whatever the device would take in their place
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(*args, **kwargs)
    return int(counter.get_total_flops())


def matrix_peak(plan: Plan, dtype: str) -> float:
    """Return the floating point operations a second of the fastest of a few matrix products."""
    import torch

    best = 0.0
    for side in plan.matrices:
        a, b = (torch.randn(side, side, device=plan.device, dtype=getattr(torch, dtype)) for _ in range(2))
        once = seconds_of(lambda a=a, b=b: torch.mm(a, b), plan.device, 3)
        count = max(3, round(plan.seconds / 5 / once))
        best = max(best, 2 * side**3 / seconds_of(lambda a=a, b=b: torch.mm(a, b), plan.device, count))
    return best


def seconds_of(work: Callable[[], object], device: str, count: int = 1) -> float:
    """Return the mean seconds of so many calls, launched one after the other; the device is idle before and after."""
    if count > 1:
        work()  # warms up
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    _synchronise(device)
    return (time.perf_counter() - started) / count


@contextmanager
def spent() -> Iterator[Callable[[], float]]:
    """Give a function that tells, after the block, how many seconds it took."""
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: round(ended[0] - started, 2)
    ended.append(time.perf_counter())


# -- the device -------------------------------------------------------------------------------------------------------


def device_name(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    of_card = torch.cuda.get_device_properties(0)
    return {"name": of_card.name, "memory_gib": round(of_card.total_memory / 2**30, 1), "cuda": torch.version.cuda}


def graphs_skipped() -> int:
    """Return how many compiled graphs run without CUDA graphs, for a reason that torch logs."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def graphs_compiled() -> int:
    """Return how many graphs torch has compiled: one, where all calls are of one kind and none is cut in pieces."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(device: str) -> dict[str, float] | None:
    import torch

    if device != "cuda":
        return None
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated": round(allocated / 2**30, 2), "reserved": round(reserved / 2**30, 2)}


# -- pipelines and captions -------------------------------------------------------------------------------------------

_WORDS = {
    "style": "photo painting drawing poster sketch print mosaic portrait",
    "first": "red small wooden old bright quiet broken tall golden round striped empty",
    "noun": "dog cat boat house bridge tree horse lamp chair clock kettle train apple tower guitar bicycle",
    "second": "blue large metal new dark loud painted short silver square dotted full",
    "other": "bird fox ship barn road flower cow candle table mirror teapot tram pear castle violin scooter",
    "place": "beach forest kitchen market station garden museum harbour",
}
_VOCABULARY = 49408  # of CLIP's text encoders


def captions(count: int, start: int = 0) -> list[str]:
    """Return so many captions, distinct for all that start below two million, from the start-th on."""
    lists = [words.split() for words in _WORDS.values()]
    found = []
    for i in range(start, start + count):
        words = []
        for choices in lists:
            i, place = divmod(i, len(choices))
            words.append(choices[place])
        style, first, noun, second, other, place_name = words
        found.append(f"a {style} of a {first} {noun} beside a {second} {other} in the {place_name} at noon")
    return found


def build(shape: Shape, folder: Path, device: str) -> None:
    """Save a pipeline of a shape with random weights: in float16 if it is made on a GPU, else in float32."""
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    tokenizer = _tokenizer()
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**shape.unet).to(dtype)
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        encoders = [
            kind(clip_config(clip, tokenizer)).to(dtype) for kind, clip in zip(kinds, shape.clips, strict=False)
        ]
        # of which the depth alone is read
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
        )
    is_xl = len(encoders) > 1
    further: dict[str, Any] = (
        {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer, "add_watermarker": False}
        if is_xl
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    pipeline = getattr(diffusers, shape.pipeline)(
        vae=vae,
        unet=unet,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        **further,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def clip_config(clip: dict[str, Any], tokenizer: Any) -> Any:
    """Return the config of a CLIP text encoder of the real vocabulary and length."""
    from transformers import CLIPTextConfig

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(vocab_size=_VOCABULARY, max_position_embeddings=77, **special, **clip)


def _tokenizer() -> Any:
    """Return a CLIP tokenizer with a token for most words of the captions, as the real one has."""
    from transformers import CLIPTokenizer

    words = sorted({word for line in captions(2000) for word in line.split()})
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(symbols)):
            merges.append(("".join(symbols[:i]), symbols[i]))
    merges = list(dict.fromkeys(merges))
    printable = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    symbols = [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]  # of the 256 bytes
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


if __name__ == "__main__":
    main()
