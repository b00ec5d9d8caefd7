"""What a training loop does with the manifest."""

from .captions import (
    GeneralCaption,
    Mitigation,
    MultipleCaptions,
    RandomCaption,
    RandomTokens,
    RepeatedWords,
    sample_seed,
)
from .embeddings import ObjectPool, add_noise, dual_fusion, mix_up
from .losses import MaskedLoss, check_finite, harmless, masked_loss, total_weight
from .online import AntiGradientControl, MagnitudeMask, OnlineMask, Step
from .schedules import Schedule
from .sightings import Sightings

__all__ = [
    "AntiGradientControl",
    "GeneralCaption",
    "MagnitudeMask",
    "MaskedLoss",
    "Mitigation",
    "MultipleCaptions",
    "ObjectPool",
    "OnlineMask",
    "RandomCaption",
    "RandomTokens",
    "RepeatedWords",
    "Schedule",
    "Sightings",
    "Step",
    "add_noise",
    "check_finite",
    "dual_fusion",
    "harmless",
    "masked_loss",
    "mix_up",
    "sample_seed",
    "total_weight",
]
