"""Sampling that is less likely to draw a memorized image: each mitigation is a function around `pipe(...)`.

They take a diffusers pipeline of Stable Diffusion 1, 2, XL, 3 or 3.5 that is loaded already, prompts, and what else
`pipe(...)` takes, and return what it returned, with the magnitudes before and after:

* `with_random_tokens`, `with_repeated_words`, `with_random_numbers` and `with_embedding_noise` make a prompt less of a
  key (Somepalli et al. 2023, *Understanding and Mitigating Copying in Diffusion Models*).
* `with_optimised_embeddings` moves a prompt's embedding until its magnitude is under a target (Wen et al. 2024,
  *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*).
* `with_delayed_guidance` leads nowhere while the guidance would lead to one image (Jain et al. 2025,
  *Classifier-Free Guidance inside the Attraction Basin May Cause Memorization*).

A magnitude here is that of the very generation: the raw norm of e(x_T, t, prompt) - e(x_T, t, unconditional), at the
first timestep of the schedule and from the noise that `generator` or `latents` give this call.  The unconditional is
what the pipeline's guidance leads away from: that of a `negative_prompt`, where one is given, and such magnitudes are
not to be compared with a run's.  Both predictions are read where the pipeline makes them, in one batch, so that
guidance must be on: `guidance_scale` over 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, ModelError
from .insertions import insert_numbers, insert_tokens, repeat_words, seeded, vocabulary
from .records import Floats, Ints

if TYPE_CHECKING:
    import torch

_OTHER_TEXTS = ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds")
_NEGATIVE = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
_LATEST = 500  # the timestep below which a delayed guidance begins without a minimum


@dataclass(frozen=True)
class Mitigated:
    """What a pipeline returned under a mitigation; N counts its images, `num_images_per_prompt` for each prompt."""

    output: Any
    prompts: list[str]  # as the text encoders were given them: one for each that was asked for
    embeddings: torch.Tensor  # (N, L, D), of which the images were drawn, in the pipeline's dtype
    before: Floats  # (N,) magnitudes of the prompts that were asked for, at the first step
    after: Floats  # (N,) at the first step that guidance leads, NaN where none is
    steps: Ints  # (N,) updates of the embedding, or steps before guidance began; else 0


def magnitudes(pipe: Any, prompts: str | Sequence[str], **call: Any) -> Floats:
    """Return the magnitudes (N,) of the prompts at the first step of this call, which goes no further.

    All are in one batch: give many in parts.  A high quantile of those of ordinary prompts is a target for
    `with_optimised_embeddings`.  Generators are left as they are.  Raises ConfigError and ModelError as that does.
    """
    texts, call, images = _prepared(prompts, call)
    return _first_step(pipe, call, images).magnitudes(texts)


# -- less of a key ----------------------------------------------------------------------------------------------------


def with_random_tokens(
    pipe: Any, prompts: str | Sequence[str], count: int = 2, seed: int = 0, **call: Any
) -> Mitigated:
    """Draw images of the prompts with so many random tokens of the pipeline's first tokenizer in each (RT).

    The paper's counts are 2 and 4.  What is put into a prompt, and where, depends on the seed, the prompt and its place
    among them alone.  Raises ConfigError and ModelError as `with_optimised_embeddings` does.
    """
    _denoiser(pipe)  # of a family that has a tokenizer
    tokens = vocabulary(pipe.tokenizer)

    def insert(text: str, random: np.random.Generator, count: int) -> str:
        return insert_tokens(text, tokens, random, count)

    return _with_prompts(pipe, prompts, insert, count, seed, call)


def with_repeated_words(
    pipe: Any, prompts: str | Sequence[str], count: int = 2, seed: int = 0, **call: Any
) -> Mitigated:
    """Draw images of the prompts with so many of a prompt's own words in it once more (CWR); else as RT."""
    return _with_prompts(pipe, prompts, repeat_words, count, seed, call)


def with_random_numbers(
    pipe: Any, prompts: str | Sequence[str], count: int = 2, seed: int = 0, **call: Any
) -> Mitigated:
    """Draw images of the prompts with so many random whole numbers below 100,000 in each (RNA); else as RT."""
    return _with_prompts(pipe, prompts, insert_numbers, count, seed, call)


def with_embedding_noise(
    pipe: Any, prompts: str | Sequence[str], scale: float = 0.1, seed: int = 0, **call: Any
) -> Mitigated:
    """Draw images of the prompts' embeddings with `scale` * N(0, 1) added to each number (GN).

    The noise of an image depends on the seed, the prompt and the image's place alone.  A pooled embedding stays as it
    is, and so does the unconditional one.  The paper's code adds noise to the unconditional too; that changes what the
    guidance leads away from, whatever the prompt is, and the magnitude after would be measured from another point than
    that before.  Raises ConfigError and ModelError as `with_optimised_embeddings` does.
    """
    import torch

    if not 0 <= scale < float("inf"):
        raise ConfigError(f"noise of scale {scale}; give one of 0 or more (the paper's is 0.1)")
    texts, call, images = _prepared(prompts, call)
    first = _first_step(pipe, call, images)
    _, states = first.states.chunk(2)
    named = enumerate(text for text in texts for _ in range(images // len(texts)))
    noise = np.stack([seeded(seed, i, text).standard_normal(states.shape[1:], np.float32) for i, text in named])
    noisy = states.float() + scale * torch.from_numpy(noise).to(states.device)
    return _with_embeddings(pipe, call, first, noisy.to(states.dtype), np.zeros(images, np.int64))


def _with_prompts(
    pipe: Any,
    prompts: str | Sequence[str],
    insert: Callable[[str, np.random.Generator, int], str],
    count: int,
    seed: int,
    call: dict[str, Any],
) -> Mitigated:
    if count < 1:
        raise ConfigError(f"{count} insertions in a prompt; give 1 or more (the paper's are 2 and 4)")
    texts, call, images = _prepared(prompts, call)
    before = _first_step(pipe, call, images).magnitudes(texts)
    changed = [insert(text, seeded(seed, i, text), count) for i, text in enumerate(texts)]
    output, first = _generated(pipe, call | {"prompt": changed}, images)
    steps = np.zeros(images, np.int64)
    return Mitigated(output, changed, first.states[images:], before, first.magnitudes(changed), steps)


# -- under a target ---------------------------------------------------------------------------------------------------


def with_optimised_embeddings(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    target: float | Sequence[float],
    learning_rate: float = 0.05,
    steps: int = 10,
    **call: Any,
) -> Mitigated:
    """Draw images of embeddings that were moved from the prompts' until their magnitudes are under the target.

    AdamW, with torch's own weight decay, moves each image's embedding at x_T and the first timestep of the call's
    schedule, in float32 whatever the pipeline's precision is.  The learning rate is the paper's, for Stable Diffusion
    1: a model of much smaller embeddings needs a higher one to get as far.

    An image whose magnitude is under its own target stops before the update, and its embedding stays, while others go
    on; none is updated more than `steps` times, so that `after` can be over the target.  The first row, that of the
    start token, and a pooled embedding never move.

    `target` is one number, or one for each prompt.  A threshold that `memfilter run` found fits where the pipeline is
    the run's model and the first timestep that of 50 steps; `magnitudes` of ordinary prompts tell for any call.  The
    paper's reference code stops at a norm of 3 over 4 images together, which is about 1.5 of each.

    Of its model the pipeline keeps everything, gradients included, as it was.  Raises ConfigError for a pipeline of
    another family, one without guidance, no prompts and a target that is not over 0, ModelError for predictions that
    are not finite.
    """
    texts, call, images = _prepared(prompts, call)
    targets = np.atleast_1d(np.asarray(target, np.float32))
    if targets.shape not in ((1,), (len(texts),)) or not (np.isfinite(targets) & (targets > 0)).all():
        raise ConfigError(f"the target {target} for {len(texts):,} prompts; give a number over 0, or one for each")
    if not 0 < learning_rate < 1 or steps < 0:
        raise ConfigError(f"learning_rate={learning_rate}, steps={steps}: above 0 and below 1, and 0 or more")
    first = _first_step(pipe, call, images)
    first.magnitudes(texts)  # finite ones
    each = np.repeat(targets, images // len(targets))
    states, taken = _optimised(_denoiser(pipe), first, each, learning_rate, steps)
    return _with_embeddings(pipe, call, first, states, taken)


def _optimised(
    network: Any, first: _Pass, targets: Floats, learning_rate: float, steps: int
) -> tuple[torch.Tensor, Ints]:
    """Return the conditional states (N, L, D) after the optimisation, and how often each was updated."""
    import torch

    before = first.states.chunk(2)[1]
    e_u = first.prediction.chunk(2)[0].float()
    taken = np.zeros(len(before), np.int64)
    going = list(range(len(before)))
    with torch.inference_mode(False), torch.enable_grad():
        # one parameter an image: AdamW leaves alone those without a gradient, its moments and its decay too
        rows = [own[1:].float().clone().requires_grad_() for own in before]

        def states(of: list[int]) -> torch.Tensor:
            return torch.stack([torch.cat([before[i, :1].float(), rows[i]]) for i in of]).to(before.dtype)

        optimizer = torch.optim.AdamW(rows, learning_rate)
        for _ in range(steps):
            d = first.conditional(network, going, states(going)).float() - e_u[going]
            norms = d.flatten(1).norm(dim=1)
            is_over = ~(norms.detach().cpu().numpy() < targets[going])
            going = [i for i, is_over in zip(going, is_over, strict=True) if is_over]
            if not going:
                break
            # times the root of the latents' size: float16 would lose gradients as small as a unit vector's parts
            total = norms[torch.from_numpy(is_over).to(norms.device)].sum() * d[0].numel() ** 0.5
            optimizer.zero_grad()
            for i, gradient in zip(going, torch.autograd.grad(total, [rows[i] for i in going]), strict=True):
                rows[i].grad = gradient
            optimizer.step()
            taken[going] += 1
    with torch.no_grad():
        return states(list(range(len(before)))), taken


def _with_embeddings(pipe: Any, call: dict[str, Any], first: _Pass, states: torch.Tensor, steps: Ints) -> Mitigated:
    """Draw images of embeddings in place of the first pass's own, with all else that it was given."""
    texts = call["prompt"]
    given = {name: value for name, value in call.items() if name not in ("prompt", *_NEGATIVE)}
    given |= {"num_images_per_prompt": 1, "prompt_embeds": states, "negative_prompt_embeds": first.states.chunk(2)[0]}
    if first.pooled is not None:
        negative, pooled = first.pooled.chunk(2)
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative}
    output, drawn = _generated(pipe, given, len(states))
    return Mitigated(output, texts, states, first.magnitudes(texts), drawn.magnitudes(texts), steps)


# -- later guidance ---------------------------------------------------------------------------------------------------


def with_delayed_guidance(
    pipe: Any, prompts: str | Sequence[str], below: float | None = None, **call: Any
) -> Mitigated:
    """Draw images with a guidance of 1 at first, and with the call's own from a timestep on.

    That is the first timestep under `below`, or, where it is None, the one after the first local minimum of each
    image's magnitude, at the latest the first under 500; a magnitude that rises from the start has its minimum there.
    The paper's fixed timesteps are 500 to 650.

    No pass of the model is added.  `before` is the magnitude at the first step, `after` that where guidance begins, NaN
    where it never does, and `steps` counts the steps before.  Raises ConfigError and ModelError as
    `with_optimised_embeddings` does.
    """
    texts, call, images = _prepared(prompts, call)
    delay = _Delay(below)
    output, first = _generated(pipe, call, images, delay)
    after, waited = delay.after.cpu().numpy(), delay.waited.cpu().numpy()
    return Mitigated(output, texts, first.states[images:], first.magnitudes(texts), after, waited)


class _Delay:
    """Puts the conditional prediction in the place of the unconditional of each image until its guidance begins."""

    def __init__(self, below: float | None) -> None:
        self.below = below
        self.norms: torch.Tensor | None = None

    def __call__(self, one: _Pass) -> torch.Tensor:
        """Return the predictions (2N, C, H, W) that the pipeline is to have."""
        import torch

        norms = one.norms
        if self.norms is None:
            self.norms, self.guided = norms, torch.zeros_like(norms, dtype=torch.bool)
            self.after, self.waited = torch.full_like(norms, torch.nan), torch.zeros_like(norms, dtype=torch.int64)
        begins = one.timestep < (_LATEST if self.below is None else self.below)
        if self.below is None:
            begins = begins | (norms > self.norms)
        self.after = torch.where(begins & ~self.guided, norms, self.after)
        self.guided = self.guided | begins
        self.waited = self.waited + ~self.guided
        self.norms = norms
        e_u, e_c = one.prediction.chunk(2)
        return torch.cat([torch.where(self.guided[:, None, None, None], e_u, e_c), e_c])


# -- the pipeline's passes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """One call that a pipeline makes of its denoiser for N images: N rows without a prompt, then N with theirs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: torch.Tensor  # (2N, C, H, W)

    @property
    def states(self) -> torch.Tensor:
        """The text states (2N, L, D)."""
        states: torch.Tensor = self.kwargs["encoder_hidden_states"]
        return states

    @property
    def pooled(self) -> torch.Tensor | None:
        """The pooled text states (2N, P) of the families that have some."""
        return self.kwargs.get("pooled_projections", (self.kwargs.get("added_cond_kwargs") or {}).get("text_embeds"))

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep, (1,)."""
        timestep: torch.Tensor = self.kwargs["timestep"] if "timestep" in self.kwargs else self.args[1]
        return timestep.reshape(-1)[:1]

    @property
    def norms(self) -> torch.Tensor:
        """The magnitudes (N,), float32."""
        e_u, e_c = self.prediction.float().chunk(2)
        norms: torch.Tensor = (e_c - e_u).flatten(1).norm(dim=1)
        return norms

    def magnitudes(self, prompts: list[str]) -> Floats:
        """Return the magnitudes (N,); raises ModelError where one is not finite."""
        norms: Floats = self.norms.cpu().numpy()
        if not (finite := np.isfinite(norms)).all():
            worst = prompts[int(np.argmin(finite)) * len(prompts) // len(norms)]
            kind = str(self.prediction.dtype).removeprefix("torch.")
            hint = "its weights are damaged" if kind == "float32" else "load the pipeline in float32, or bfloat16"
            raise ModelError(f"the prediction for {worst[:60]!r} is not finite in {kind}; {hint}")
        return norms

    def conditional(self, network: Any, of: list[int], states: torch.Tensor) -> torch.Tensor:
        """Return the denoiser's prediction for some of the images, with other states in place of theirs."""
        whole = len(self.prediction)
        rows = [whole // 2 + i for i in of]
        kwargs = {**_rows(self.kwargs, rows, whole), "encoder_hidden_states": states}
        prediction: torch.Tensor = network(*_rows(self.args, rows, whole), **kwargs)[0]
        return prediction


def _rows(value: Any, rows: list[int], whole: int) -> Any:
    """Return some rows of every tensor of so many, however deep it lies in dictionaries, lists and tuples."""
    if isinstance(value, dict):
        return {name: _rows(own, rows, whole) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(own, rows, whole) for own in value)
    has_rows = getattr(value, "ndim", 0) and len(value) == whole
    return value[rows] if has_rows else value


def _generated(
    pipe: Any, call: dict[str, Any], images: int, change: Callable[[_Pass], torch.Tensor] | None = None
) -> tuple[Any, _Pass]:
    """Return what the pipeline returns, and the first pass of its denoiser; `change` may change every prediction.

    Raises ConfigError where the first pass is not one of N unconditional and N conditional predictions.
    """
    passes: list[_Pass] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        one = _Pass(args, kwargs, output[0])
        if not passes:
            if len(one.prediction) != 2 * images:
                raise ConfigError(
                    f"the pipeline makes {len(one.prediction)} predictions for {images} images, not an unconditional "
                    f"beside each; give a guidance_scale over 1 (it is {pipe.guidance_scale:g})"
                )
            passes.append(one)
        # further passes, such as that of skip-layer guidance, are the pipeline's own
        return (change(one), *output[1:]) if change and len(one.prediction) == 2 * images else output

    hook = _denoiser(pipe).register_forward_hook(see, with_kwargs=True)
    try:
        output = pipe(**call)
    finally:
        hook.remove()
    return output, passes[0]


def _first_step(pipe: Any, call: dict[str, Any], images: int) -> _Pass:
    """Return the first pass of this call, which goes no further: its generators stay as they are."""

    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    with _untouched(pipe, call.get("generator")) as generator:
        alone = {"generator": generator, "output_type": "latent", "callback_on_step_end": stop}
        return _generated(pipe, call | alone, images)[1]


@contextmanager
def _untouched(pipe: Any, generator: Any) -> Iterator[Any]:
    """Give generators that draw as these will, and put torch's own, and the pipeline's progress bar, back after."""
    import torch

    def copied(one: torch.Generator) -> torch.Generator:
        copy = torch.Generator(one.device)
        copy.set_state(one.get_state())
        return copy

    drawn_on = pipe._execution_device  # where the pipeline draws noise, also one whose models lie elsewhere
    shown, interrupted = getattr(pipe, "_progress_bar_config", {}), getattr(pipe, "_interrupt", False)
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        with torch.random.fork_rng([drawn_on] if drawn_on.type == "cuda" else []):
            yield [copied(one) for one in generator] if isinstance(generator, list) else generator and copied(generator)
    finally:
        pipe.set_progress_bar_config(**shown)
        pipe._interrupt = interrupted


def _prepared(prompts: str | Sequence[str], call: dict[str, Any]) -> tuple[list[str], dict[str, Any], int]:
    """Return the prompts as a list, the call with them, and how many images it makes; raises ConfigError."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{len(texts):,} prompts of which not each is a text; give one, or a list of some")
    if other := [name for name in ("prompt", *_OTHER_TEXTS) if call.get(name) is not None]:
        raise ConfigError(f"{other[0]} beside the prompts is not mitigated; give the prompts alone")
    call = {name: value for name, value in call.items() if value is not None}  # as if it were not given
    # for each, as the prompts are: Stable Diffusion's pipeline takes a text beside a text and a list beside a list
    negative = {name: [call[name]] * len(texts) for name in _NEGATIVE if isinstance(call.get(name), str)}
    return texts, {**call, **negative, "prompt": texts}, len(texts) * int(call.get("num_images_per_prompt") or 1)


def _denoiser(pipe: Any) -> Any:
    """Return the pipeline's denoiser; raises ConfigError for a family that is not known here."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if isinstance(pipe, StableDiffusion3Pipeline):
        return pipe.transformer
    if isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        return pipe.unet
    raise ConfigError(
        f"a {type(pipe).__name__} cannot be mitigated while it samples; give a StableDiffusionPipeline, a "
        "StableDiffusionXLPipeline or a StableDiffusion3Pipeline"
    )
