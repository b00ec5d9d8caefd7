"""What a run records of its encoders: all that is needed to decide again, so that nobody has to have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Config
from . import Encoder, image_encoder
from .captions import CaptionEncoder, caption_encoder


@dataclass(frozen=True)
class Recorded:
    """An image encoder, as far as the stages behind the signatures need it."""

    identity: str
    similarity: float | None
    gain: float
    weights: str | None
    preprocessing: dict[str, Any] = field(hash=False)

    @classmethod
    def of(cls, encoder: Encoder | None) -> Recorded | None:
        """Return what is recorded of an encoder."""
        if encoder is None:
            return None
        preprocessing = getattr(encoder, "preprocessing", None)
        if preprocessing is None:
            preprocessing = {"side": encoder.side, "colour": encoder.frame is not None}
        gain, weights = float(getattr(encoder, "gain", 0.0)), getattr(encoder, "weights", None)
        return cls(encoder.identity, encoder.similarity, gain, weights, preprocessing)

    @classmethod
    def read_from(cls, stored: Any) -> Recorded | None:
        """Return what the `encoders` of a `run.json` hold, None where that is nothing of the kind."""
        try:
            found = cls(**stored["images"])
        except (KeyError, TypeError):
            return None
        is_sound = isinstance(found.gain, float) and 0 <= found.gain <= 1 and isinstance(found.preprocessing, dict)
        return found if is_sound and _is_sound(found) else None


@dataclass(frozen=True)
class RecordedCaptions:
    """A caption encoder whose code may not run: what it has encoded is used, other texts raise ConfigError."""

    identity: str
    similarity: float | None
    weights: str | None
    dim: int = 0
    refuse: Callable[[], None] = field(default=lambda: None, compare=False)
    """Raises the ConfigError that says what to give."""

    @classmethod
    def read_from(cls, stored: Any) -> RecordedCaptions | None:
        """Return what the `encoders` of a `run.json` hold, None where that is nothing of the kind."""
        try:
            values = stored["captions"]
            found = cls(values["identity"], values["similarity"], values["weights"])
        except (KeyError, TypeError):
            return None
        return found if _is_sound(found) else None

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Raise ConfigError."""
        self.refuse()
        raise NotImplementedError(f"{self.identity}: cannot encode {len(texts)} texts")


def _is_sound(found: Recorded | RecordedCaptions) -> bool:
    similarity = found.similarity
    is_cosine = similarity is None or (isinstance(similarity, float) and 0 < similarity <= 1)
    return isinstance(found.identity, str) and isinstance(found.weights, str | None) and is_cosine


@dataclass(frozen=True)
class Encoders:
    """What images and captions were, or are to be, encoded by; None where they are not."""

    images: Recorded | None
    captions: CaptionEncoder | None

    @classmethod
    def of(cls, config: Config) -> Encoders:
        """Return those that a configuration names; raises ConfigError and ModelError for one that cannot be had."""
        is_semantic = "semantic" in config.captions.tiers
        captions = caption_encoder(config.captions.encoder or "") if is_semantic else None
        return cls(Recorded.of(image_encoder(config.images.encoder)), captions)

    @property
    def stored(self) -> dict[str, Any]:
        """What `run.json` holds."""
        captions = self.captions
        about = captions and {
            "identity": captions.identity,
            "similarity": captions.similarity,
            "weights": getattr(captions, "weights", None),
        }
        return {"images": self.images and vars(self.images), "captions": about}
