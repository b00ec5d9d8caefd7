"""Three further memorization signals of a caption, beside its magnitude and from the passes that give it.

Attention entropy is that of Ren et al. 2024, *Unveiling and Mitigating Memorization in Text-to-image Diffusion Models
through Cross Attention*; anisotropy of Asthana & Belagiannis 2026, *Detecting and Mitigating Memorization in Diffusion
Models through Anisotropy of the Log-Probability*; sharpness of Jeon et al. 2025, *Understanding and Mitigating
Memorization in Generative Models via Sharpness of Probability Landscapes*.  Each is one number a caption and noise.
Higher means memorized; of the entropy this is what the paper found of Stable Diffusion, and not so of every model.
Notation: d = e(x, t, caption) - e(x, t, unconditional), the raw predictions' difference.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .denoisers import Condition, Denoiser
from .errors import ModelError

if TYPE_CHECKING:
    import torch

_LOWEST_FACTOR = 0.01  # below it the scale of noise predictions says nothing


# -- attention entropy ------------------------------------------------------------------------------------------------


@contextmanager
def attention_entropy(denoiser: Denoiser) -> Iterator[Callable[[], torch.Tensor]]:
    """Watch the predictions made within, and give a function that returns the last one's entropies, (B,) float32.

    The entropy, in nats, of the mean over heads and queries of one layer's cross-attention probabilities, over all
    token positions, start and padding included; what the model masks has probability 0.  With a mask (PixArt, Sana) a
    longer caption thus has a greater entropy to have.  The layer is `entropy_layer`'s.  Which way memorized captions
    deviate is the model's: upwards in the paper's Stable Diffusion 1 and 2, downwards in this package's demo.  Take a
    threshold and its direction from labelled captions.

    The predictions stay as they are to the bit, and the denoiser as it was when the context ends, by an exception as
    well.  Raises ModelError where there is no cross-attention, and, by the function, before a prediction was seen: a
    compiled denoiser shows none.
    """
    import torch

    _, layer = entropy_layer(denoiser)
    seen: dict[str, torch.Tensor] = {}
    forward = inspect.signature(layer.forward)

    def keep(name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        return lambda module, args, out: seen.update({name: out})

    def measure(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        bias = forward.bind(*args, **kwargs).arguments.get("attention_mask")
        p = _mean_probabilities(layer, seen.pop("query"), seen.pop("key"), bias)
        seen["entropy"] = torch.special.entr(p).sum(dim=-1)

    def read() -> torch.Tensor:
        if "entropy" not in seen:
            raise ModelError("no cross-attention was seen: no prediction was made, or a compiled denoiser made it")
        return seen["entropy"]

    hooks = [
        (layer.to_q if layer.norm_q is None else layer.norm_q).register_forward_hook(keep("query")),
        (layer.to_k if layer.norm_k is None else layer.norm_k).register_forward_hook(keep("key")),
        layer.register_forward_hook(measure, with_kwargs=True),
    ]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def entropy_layer(denoiser: Denoiser) -> tuple[str, Any]:
    """Return the name and the module of the cross-attention layer a quarter of the way through the denoiser.

    That is the 4th of Stable Diffusion 1's and 2's 16, which the paper takes for its first-step score: early, where
    the states are still little more than the noise.  Raises ModelError where image and text attend jointly, in one
    sequence, which is not what the signal is defined on.
    """
    import torch
    from diffusers.models.attention_processor import Attention

    parts = dict.fromkeys(part for part in vars(denoiser).values() if isinstance(part, torch.nn.Module))
    layers = [
        (name, module)
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    ]
    if not layers:
        raise ModelError(f"attention entropy is not defined for {type(denoiser).__name__}: it has no cross-attention")
    # a UNet names its blocks on the way up before the one in the middle
    layers.sort(key=lambda layer: "up_blocks" in layer[0])
    return layers[math.ceil(len(layers) / 4) - 1]


def _mean_probabilities(layer: Any, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return (B, L) float32, the mean over heads and queries; `bias` (B, 1, L) is added to the logits."""
    import torch

    query, key = (
        part if part.ndim == 4 else part.reshape(*part.shape[:2], layer.heads, -1).transpose(1, 2)
        for part in (query, key)
    )
    rows = []
    for i in range(len(query)):  # a caption at a time: those of a batch would take gigabytes
        logits = query[i].float() @ key[i].float().mT * layer.scale
        rows.append((logits if bias is None else logits + bias[i].float()).softmax(dim=-1).mean(dim=(0, 1)))
    return torch.stack(rows)


# -- anisotropy -------------------------------------------------------------------------------------------------------

_STEPS = 50
_LATE = 0.2018  # noise to image at t = 41 of Stable Diffusion, the last step but two of 50


def anisotropy(
    magnitude: torch.Tensor, unconditional: torch.Tensor, difference: torch.Tensor, weights: tuple[float, float]
) -> torch.Tensor:
    """Return g1 * magnitude + g2 * the mean over places of the cosine over channels of e_u and d, (B,) float32.

    `magnitude` (B,) is the raw one of the first timestep; `unconditional`, (B, C, H, W) or of one row, and
    `difference` (B, C, H, W) are the raw e(x, t, unconditional) and d for the same noise at `late_timestep`; `weights`
    (g1, g2) are `anisotropy_weights`, or the caller's own.  Where d is zero, so is its cosine.
    """
    import torch

    cosines: torch.Tensor = torch.cosine_similarity(unconditional.float(), difference.float(), dim=1)
    return weights[0] * magnitude.float() + weights[1] * cosines.mean(dim=(1, 2))


def late_timestep(denoiser: Denoiser) -> int:
    """Return the timestep at which noise and image are mixed as at Stable Diffusion's t = 41, which the paper takes.

    By the ratio of their factors in x_t, so that a linear schedule's is 51 and a flow's 168.
    """
    timesteps = range(denoiser.first_timestep(_STEPS))
    ratios = (_noise(denoiser, t) / math.sqrt(denoiser.alpha_bar(t)) for t in timesteps)
    return min(zip(timesteps, ratios, strict=True), key=lambda pair: abs(pair[1] - _LATE))[0]


def anisotropy_weights(
    prediction_type: str, eps_factor: float, latent_shape: tuple[int, int, int]
) -> tuple[float, float]:
    """Return (g1, g2) for the raw magnitude and the cosine, given the first timestep's `magnitude.eps_factor`.

    For noise predictions the paper's of Stable Diffusion 1, (1, 2) at its 4 x 64 x 64 latents.  For the others its
    (1, 0.1) of Stable Diffusion 2, v-predictions at 4 x 96 x 96, which are for a magnitude on the scale of noise:
    (eps_factor, 0.1) for the raw one.  Where that scale says nothing, at a flow's first timestep, the magnitude keeps
    the weight that it has there, 0.076.  As a norm grows with the root of the latents' size and a cosine does not, g1
    shrinks with it.  The weights are tuned to a model: compare such scores within one alone.
    """
    size = math.prod(latent_shape)
    if prediction_type == "epsilon":
        return math.sqrt(4 * 64 * 64 / size), 2.0
    factor = eps_factor if eps_factor >= _LOWEST_FACTOR else 0.076
    return factor * math.sqrt(4 * 96 * 96 / size), 0.1


# -- sharpness --------------------------------------------------------------------------------------------------------

_TANGENTS = 8  # captions at a time: attention without flash kernels holds its probabilities, and their tangents


def sharpness(
    denoiser: Denoiser,
    x: torch.Tensor,
    timestep: float,
    condition: Condition,
    unconditional: Condition,
    difference: torch.Tensor,
) -> torch.Tensor:
    """Return ||(J_c - J_u) (s_c - s_u)||_2, (B,) float32, where s is the score at x_t and J its Jacobian by x_t.

    x is (B, C, H, W), both conditions are of B captions, and `difference` (B, C, H, W) is d at this x and timestep.
    In terms of it: s = -(f e + g x) / sigma, where f e + g x is the noise prediction, with f and g of the timestep
    alone, and sigma the noise's factor in x_t.  What x adds to s and to J is with and without the caption the same, so
    that s_c - s_u = -(f / sigma) d, and the whole is (f / sigma)^2 ||J_d d||, with the Jacobian J_d of d by x_t.

    The Jacobian-vector product is exact, by forward-mode differentiation, with attention in plain matrix products: two
    passes a caption, each of which carries its derivative along.  Like d it is a small difference of large numbers: of
    the demo's, float16 moves half by 0.1% or more, bfloat16 by 1%.

    Raises ModelError at a timestep where f or sigma is below 0.01, such as a flow's first, and for a denoiser that
    cannot be differentiated forward.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    scale = _score_scale(denoiser, timestep)
    tangents = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for start in range(0, len(x), _TANGENTS):
            rows = slice(start, min(start + _TANGENTS, len(x)))
            conditions = condition[rows], unconditional[rows]
            tangents.append(_derivative(denoiser, x[rows], timestep, conditions, difference[rows]))
    norms: torch.Tensor = scale**2 * torch.cat(tangents).flatten(1).norm(dim=1)
    return norms


def _derivative(
    denoiser: Denoiser, x: torch.Tensor, timestep: float, conditions: tuple[Condition, Condition], along: torch.Tensor
) -> torch.Tensor:
    """Return the derivative (B, C, H, W) of d by x, along a direction of x's shape; at least in float32."""
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    # along a unit of the latents' own size, which half precision can hold
    size = along.to(wide).flatten(1).norm(dim=1).clamp(min=1e-12) / math.sqrt(along[0].numel())
    size = size[:, None, None, None]

    def d(x: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = (denoiser.predict(x, timestep, c).to(wide) for c in conditions)
        return conditional - unconditional

    try:
        tangent: torch.Tensor = torch.func.jvp(d, (x.contiguous(),), ((along / size).to(x.dtype),))[1]
    except NotImplementedError as e:
        cause = " ".join(str(e).split())[:200]
        raise ModelError(f"sharpness: {type(denoiser).__name__} cannot be differentiated forward: {cause}") from e
    derivative: torch.Tensor = (tangent * size).float()
    return derivative


def _score_scale(denoiser: Denoiser, timestep: float) -> float:
    """Return |f| / sigma, with which a difference of raw predictions becomes one of scores."""
    from .magnitude import eps_factor  # which has this module's signals computed

    factor = eps_factor(denoiser.prediction_type, denoiser.alpha_bar(timestep))
    noise = _noise(denoiser, timestep)
    if min(factor, noise) < _LOWEST_FACTOR:
        raise ModelError(
            f"sharpness is not defined at timestep {timestep} of a {denoiser.prediction_type} model: noise predictions "
            f"are {factor:.2g} times its raw ones, of x_t's noise at {noise:.2g}, and both must be {_LOWEST_FACTOR} or "
            "more; take a timestep between"
        )
    return factor / noise


def _noise(denoiser: Denoiser, timestep: float) -> float:
    """Return the noise's factor in x_t."""
    alpha_bar = denoiser.alpha_bar(timestep)
    return 1 - math.sqrt(alpha_bar) if denoiser.prediction_type == "flow" else math.sqrt(max(1 - alpha_bar, 0))
