"""What a training loop does with the manifest."""

from .losses import MaskedLoss, check_finite, harmless, masked_loss, total_weight
from .online import AntiGradientControl, MagnitudeMask, OnlineMask, Step
from .schedules import Schedule
from .sightings import Sightings

__all__ = [
    "AntiGradientControl",
    "MagnitudeMask",
    "MaskedLoss",
    "OnlineMask",
    "Schedule",
    "Sightings",
    "Step",
    "check_finite",
    "harmless",
    "masked_loss",
    "total_weight",
]
