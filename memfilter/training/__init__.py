"""What a training loop does with the manifest."""

from .losses import masked_loss

__all__ = ["masked_loss"]
