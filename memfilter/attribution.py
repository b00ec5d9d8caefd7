"""Which words of a caption carry its magnitude: the gradient of the magnitude by each token's embedding.

Token attribution of Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*: of each
token k the mean over timesteps t of || d ||e(x_t, t, caption) - e(x_t, t, unconditional)||_2 / d embedding_k ||_2, by
the caption's own text states, which are what the denoiser attends to.  A pooled state, where a family has one, is of
no single token and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import GUIDANCE, STEPS
from .denoisers import Condition, Denoiser, ModelFiles, Token, find_model, load_denoiser
from .errors import ConfigError, ModelError, printable
from .manifest import Manifest
from .store import Store, read_table

if TYPE_CHECKING:
    import torch

_WIDTH = 30  # of the longest bar


@dataclass(frozen=True)
class Attribution:
    """The weights of a caption's words and of its tokens, both in its order and its spelling.

    `magnitude` is the mean over seeds and timesteps of the norm itself; `unread` is what of the caption is beyond the
    tokens that the model takes.
    """

    caption: str
    magnitude: float
    timesteps: list[float]
    seeds: int
    words: list[tuple[str, float]]
    tokens: list[tuple[str, float]]
    unread: str


def attribute(
    denoiser: Denoiser, caption: str, steps: int = 1, seeds: int = 1, guidance: float = GUIDANCE
) -> Attribution:
    """Return how much each word and token of a caption carries its magnitude.

    Computed at the first `steps` timesteps of the 50-step DDIM schedule, or of a flow's own, from the scores' own pure
    noise of each seed: one step, the default, explains the score itself, and 50 are the paper's whole trajectory.  From
    one timestep to the next the latents follow e_u + guidance * (e_c - e_u).  Gradients are taken by the caption's
    states alone and averaged over seeds and timesteps.

    A word is what stands between white space, and weighs as much as the heaviest of its tokens, so that one that is
    spelt in many is not heavier for it.  Start, end and padding have no part.

    Raises ModelError where the family's states are not those of one tokenizer's tokens, and for gradients that are not
    finite or do not fit into memory.
    """
    import torch

    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the caption {caption[:60]!r} is not UTF-8; give it in that encoding") from None
    tokens, read = denoiser.tokens(caption)
    timesteps = _timesteps(denoiser, steps)
    with torch.no_grad():
        condition, nothing = denoiser.encode([caption]), denoiser.unconditional(1)
    magnitudes, gradients = [], []
    try:
        for seed in range(seeds):
            # drawn as the scorer draws it
            noise = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))
            for norm, gradient in _trajectory(denoiser, condition, nothing, noise[None], timesteps, guidance):
                magnitudes.append(norm)
                gradients.append(gradient)
    except torch.cuda.OutOfMemoryError as e:
        raise ModelError("out of memory for the gradients of one caption; take a GPU with more") from e
    rows = torch.stack(gradients).mean(0).tolist()
    magnitude = float(np.mean(magnitudes))
    if not np.isfinite([magnitude, *rows]).all():
        kind = str(denoiser.dtype).removeprefix("torch.")
        raise ModelError(f"the gradients for {caption[:60]!r} are not finite in {kind}; try float32, or bfloat16")
    return Attribution(
        caption,
        magnitude,
        timesteps,
        seeds,
        _words(caption[:read], tokens, rows),
        [(caption[token.start : token.end], rows[token.row]) for token in tokens],
        caption[read:],
    )


def _timesteps(denoiser: Denoiser, steps: int) -> list[float]:
    if not 1 <= steps <= STEPS:
        raise ConfigError(f"{steps} steps; take 1 to {STEPS}")
    return denoiser.timesteps(STEPS)[:steps] if steps > 1 else [denoiser.first_timestep(STEPS)]


def _trajectory(
    denoiser: Denoiser,
    condition: Condition,
    nothing: Condition,
    x: torch.Tensor,
    timesteps: list[float],
    guidance: float,
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield at each timestep the norm, and of each row of the condition's states the gradient's norm, (L,)."""
    import torch

    x = x.to(denoiser.device, torch.promote_types(denoiser.dtype, torch.float32))
    for t in timesteps:
        latents = x.to(denoiser.dtype)
        with torch.no_grad():
            e_u = denoiser.predict(latents, t, nothing).to(x.dtype)
        with torch.enable_grad():
            states = condition.states.detach().clone().requires_grad_()
            e_c = denoiser.predict(latents, t, replace(condition, states=states)).to(x.dtype)
            norm = (e_c - e_u).norm()
            # times the root of the latents' size: float16 would lose gradients as small as a unit vector's parts
            scale = x.numel() ** 0.5
            (gradient,) = torch.autograd.grad(norm * scale, states)
        yield float(norm.detach()), gradient[0].to(x.dtype).norm(dim=1) / scale
        if t != timesteps[-1]:
            x = denoiser.step(e_u + guidance * (e_c.detach() - e_u), t, x)


def _words(text: str, tokens: list[Token], rows: list[float]) -> list[tuple[str, float]]:
    words = []
    for word in re.finditer(r"\S+", text):
        own = [rows[token.row] for token in tokens if token.start < word.end() and token.end > word.start()]
        words.append((word.group(), max(own, default=0.0)))
    return words


# -- of a run's sample ------------------------------------------------------------------------------------------------


def explain(
    directory: str | Path,
    key: str,
    shard: str | None = None,
    model: str | None = None,
    steps: int = 1,
    trust: bool = False,
) -> dict[str, Any]:
    """Return the attribution of a sample's caption, beside its row in the manifest, as plain data.

    `model` tells where the run's own lies, or takes the place of one in a run that had none; it is used in the run's
    precision and with its seeds.  With `trust`, for a run directory of one's own, it is taken, with its LoRA and other
    parts, from where the run found it.  `sample` is the row with uids in hexadecimal, with `canonical`, the shard and
    key of the sample kept in its place, and `percentile`, the share of the run's good samples with a lower magnitude,
    in percent.

    Raises RunError where there is no finished run, ConfigError for a key that no sample or samples of several shards
    have, a sample without a caption and a run without a model, ModelError for another model than the run's.
    """
    manifest = Manifest.load(directory)
    row = _sample(manifest, key, shard)
    caption = _caption(manifest, row)
    settings, scoring = manifest.info["config"]["magnitude"], manifest.info["magnitude"]
    # the manifest tells the model's name alone, the run where it lay
    own = ModelFiles.read((Store(directory).read_run() or {}).get("model"))
    if model is None and not (own and trust):
        what = f"where its model {own.name} lies, run.json alone says" if own else "the run has no model"
        advice = "say it with --model, or give --trust" if own else "give one that has seen the data with --model"
        raise ConfigError(f"{directory}: {what}; {advice}")
    if own and not trust and (own.denoiser or own.lora or own.single_file_config):
        raise ConfigError(f"{directory}: where the parts of its model lie, run.json alone says; give --trust")
    spec = model or (own and own.spec) or ""
    files = find_model(spec, settings["mode"] == "pair", *(own.parts if own else ()))
    if scoring is not None and (other := {f for f, _ in files.files.items() ^ scoring["files"].items()}):
        raise ModelError(f"{spec}: not the run's model: its {min(other)} is another; say where that lies with --model")
    found = attribute(load_denoiser(files, settings["dtype"]), caption, steps, settings["seeds"])
    return {"model": files.name, **as_data(found), "sample": _about(manifest, row)}


def explain_prompt(prompt: str, model: str, steps: int = 1) -> dict[str, Any]:
    """Return the attribution of any prompt under a pipeline in a folder or under a hub id, as plain data."""
    files = find_model(model)
    return {"model": files.name, **as_data(attribute(load_denoiser(files, "auto"), prompt, steps))}


def as_data(found: Attribution) -> dict[str, Any]:
    """Return an attribution for JSON: words and tokens are lists of {text, weight}."""
    pairs = {
        name: [{"text": text, "weight": weight} for text, weight in getattr(found, name)]
        for name in ("words", "tokens")
    }
    return {**asdict(found), **pairs}


def lines(found: dict[str, Any]) -> list[str]:
    """Return for the terminal what `explain` or `explain_prompt` found: the row, and a bar for each word."""
    text = []
    if row := found.get("sample"):
        reasons = f" ({', '.join(row['reasons'])})" if row["reasons"] else ""
        text.append(f"sample    {printable(row['shard'])} {printable(row['key'])}: {row['action']}{reasons}")
        if row["canonical"]:
            text.append(f"kept      {printable(' '.join(row['canonical']))} in its place")
        text.append(
            f"counts    {row['image_count']:,} of its image, {row['caption_count']:,} of its caption, "
            f"{row['joint_count']:,} of both"
        )
        if row["magnitude"] is not None:
            text.append(f"run       magnitude {row['magnitude']:.4g}, over {row['percentile']:.1f}% of its samples'")
    first, last = found["timesteps"][0], found["timesteps"][-1]
    when = f"timestep {first:g}" if first == last else f"{len(found['timesteps'])} timesteps from {first:g} to {last:g}"
    seeds = "1 seed" if found["seeds"] == 1 else f"{found['seeds']} seeds"
    text.append(f"magnitude {found['magnitude']:.4g} by {printable(found['model'])} at {when}, {seeds}")
    if not found["words"]:
        text.append("words     none: the caption is empty")
    longest = max((word["weight"] for word in found["words"]), default=0) or 1
    for i, word in enumerate(found["words"]):
        bar = "#" * round(_WIDTH * word["weight"] / longest)
        text.append(f"{'' if i else 'words':10}{word['weight']:<10.4g}{bar:{_WIDTH}} {printable(word['text'])}")
    if found["unread"]:
        text.append(f"unread    {len(found['unread']):,} characters are beyond the tokens that the model takes")
    return text


def _sample(manifest: Manifest, key: str, shard: str | None) -> dict[str, Any]:
    shards = manifest.shards
    if shard is not None:
        try:
            shards = [shard] if shard in shards else [manifest.shard_of(shard)]
        except KeyError as e:
            raise ConfigError(str(e.args[0])) from None
    # as the manifest writes a key that is not UTF-8
    key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    rows = list(_rows(manifest, shards, "key", key))
    within = sorted({str(row["shard"]) for row in rows})
    if not rows:
        raise ConfigError(f"{manifest.path}: no sample {key!r} in {shard or 'any of its shards'}; check KEY")
    if len(within) > 1:
        raise ConfigError(f"{key!r} is a sample of {len(within):,} shards; give one before it, such as {within[0]}")
    return rows[0]  # of a key that comes back in its shard, the sample that was read


def _rows(manifest: Manifest, shards: list[str], column: str, value: Any) -> Iterator[dict[str, Any]]:
    """Yield the manifest's rows that have this value."""
    for name in shards:
        part = Store(manifest.path).manifest_part(name)
        for place in np.flatnonzero(pc.equal(read_table(part, [column])[column], value).fill_null(False)):
            yield read_table(part).slice(int(place), 1).to_pylist()[0]


def _caption(manifest: Manifest, row: dict[str, Any]) -> str:
    signatures = read_table(Store(manifest.path).signatures(row["shard"]), ["index", "bad", "caption"])
    (own,) = signatures.filter(pc.equal(signatures["index"], row["index"])).to_pylist()
    if own["caption"] is None:
        cause = f"it is bad ({own['bad']})" if own["bad"] else "it has none"
        raise ConfigError(f"{row['shard']}: the sample {row['key']!r} has no caption to explain: {cause}")
    return str(own["caption"])


def _about(manifest: Manifest, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row for JSON, with the kept sample's place, and the percentile of the magnitude."""
    kept = None
    if row["canonical_uid"] is not None:
        kept = next(_rows(manifest, manifest.shards, "uid", pa.scalar(row["canonical_uid"], pa.binary(16))), None)
    percentile = None
    if row["magnitude"] is not None:
        others = manifest.table(["magnitude"])["magnitude"].drop_null().to_numpy()
        percentile = 100 * float((others < np.float32(row["magnitude"])).mean())
    return {
        **{name: value.hex() if isinstance(value, bytes) else value for name, value in row.items()},
        "canonical": [kept["shard"], kept["key"]] if kept else None,
        "percentile": percentile,
    }
