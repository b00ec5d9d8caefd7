"""Losses that obey the manifest's `loss_weight`."""

from __future__ import annotations

import torch


def masked_loss(per_sample_loss: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
    """Return the mean over the batch of each sample's loss times its weight, a scalar.

    Both have shape (B,); the loss is the mean over channels and pixels, after any min-SNR or SD3 weighting, and finite
    (0 times NaN is NaN).  The denominator is B, so the other samples' gradients do not grow when one is masked; a
    sample of weight 0 gets a gradient of exactly zero, and a batch of them a zero loss with a graph.  Raises
    ValueError for other shapes.
    """
    if per_sample_loss.ndim != 1 or per_sample_loss.shape != loss_weight.shape:
        raise ValueError(
            f"per_sample_loss {tuple(per_sample_loss.shape)} and loss_weight {tuple(loss_weight.shape)} must both be "
            "(B,): average the loss over channels and pixels first"
        )
    return (per_sample_loss * loss_weight.to(per_sample_loss)).mean()
