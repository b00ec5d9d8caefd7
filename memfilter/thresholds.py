"""The magnitude at or above which a sample counts as memorized, and the file that carries it to another run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import calibration
from .config import Config, FalsePositiveRate, LabelledRate, Quantile, SavedThreshold
from .errors import ConfigError
from .records import Floats, Scores
from .store import is_sealed, write_sealed

_DEPENDS = (
    *("files", "mode", "prediction_type", "timesteps", "latent_shape", "seeds", "dtype", "guidance", "denoiser"),
)


@dataclass(frozen=True)
class Threshold:
    """A magnitude, that of each timestep where a score is measured at several, and what both depend on."""

    magnitude: float
    by_timestep: list[tuple[float, float]] | None  # timestep and magnitude
    depends: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Threshold:
        """Return the threshold that a run left in its manifest/threshold.json; raises ConfigError for no such file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            sealed = is_sealed(Path(path))
            by_timestep = values["by_timestep"] and [(float(t), float(m)) for t, m in values["by_timestep"]]
            found = cls(float(values["magnitude"]), by_timestep, dict(values["depends"]))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConfigError(f"{path}: holds no threshold that a run saved ({e}); give its threshold.json") from e
        if not sealed:
            raise ConfigError(f"{path}: its bytes have changed since a run saved it; give the number itself instead")
        return found

    def save(self, path: Path) -> None:
        """Write the threshold to a file that `load` reads."""
        write_sealed(path, asdict(self))

    def check(self, info: dict[str, Any], origin: str) -> None:
        """Raise ConfigError unless scores with this `info` are of the same model and measured the same way."""
        for name in _DEPENDS:
            own, other = self.depends.get(name), info.get(name)
            if own == other:
                continue
            if isinstance(own, dict) and isinstance(other, dict):
                key = min(k for k in own.keys() | other.keys() if own.get(k) != other.get(k))
                name, own, other = (f"{name}: {key}", own.get(key), other.get(key))
            raise ConfigError(
                f"{origin}: was measured otherwise, {name} {_short(own)}, and here it is {_short(other)}; take a "
                "threshold of this model and these settings"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_threshold(config: Config) -> None:
    """Raise ConfigError when the threshold cannot be had: no model to score with, or no captions to take it from."""
    settings = config.magnitude
    wanted = settings.threshold
    if wanted is not None and settings.model is None:
        raise ConfigError("magnitude.threshold is given and no model to score with; give --model or magnitude.model")
    if isinstance(wanted, FalsePositiveRate | LabelledRate) and settings.mode == "pair":
        raise ConfigError(
            "magnitude.threshold: a false-positive rate is of captions, and in mode 'pair' these need images; "
            "give {quantile: Q}, a number, or {saved: DIR/manifest/threshold.json}"
        )
    if isinstance(wanted, FalsePositiveRate):
        calibration.read_reference(Path(wanted.reference))
    elif isinstance(wanted, LabelledRate):
        calibration.read_labelled(Path(wanted.labelled))
    elif isinstance(wanted, SavedThreshold):
        Threshold.load(wanted.saved)


def find_threshold(config: Config, scores: Scores | None, good: npt.NDArray[np.bool_]) -> Threshold | None:
    """Return the threshold that the configuration asks for; None when it asks for none.

    A quantile is taken of the good samples' magnitudes but those of 0, which is what no caption has.  For a
    false-positive rate it is the lowest value that at most that share of the reference captions, or of those labelled
    0, reach; both likewise at each timestep, where there are several.  Raises ConfigError for one below the noise floor
    of the precision, and for a saved one of another model, precision or schedule.
    """
    wanted = config.magnitude.threshold
    if wanted is None or scores is None:
        return None
    depends = {name: scores.info[name] for name in _DEPENDS}
    if isinstance(wanted, SavedThreshold):
        found = Threshold.load(wanted.saved)
        found.check(scores.info, wanted.saved)
    elif isinstance(wanted, float):
        found = Threshold(wanted, None, depends)
    else:
        own = scores.samples[good] if isinstance(wanted, Quantile) else scores.reference
        assert own is not None
        own = own[own > 0] if isinstance(wanted, Quantile) else own[~np.isnan(own)]
        if not len(own):
            return None
        by_timestep = None
        if scores.by_timestep is not None:
            columns = zip(scores.info["timesteps"], scores.by_timestep.T, strict=True)
            by_timestep = [(float(t), _limit(wanted, column)) for t, column in columns]
        found = Threshold(_limit(wanted, own), by_timestep, depends)
    _refuse_noise(found.magnitude, scores.info)
    return found


def _limit(wanted: Quantile | FalsePositiveRate | LabelledRate, scores: Floats) -> float:
    if isinstance(wanted, Quantile):
        return float(np.quantile(scores, wanted.quantile, method="higher"))
    return calibration.threshold_at_fpr(scores, wanted.false_positive_rate)


def _refuse_noise(limit: float, info: dict[str, Any]) -> None:
    floor = info.get("noise_floor")
    if floor is not None and limit < floor:
        raise ConfigError(
            f"magnitude.threshold comes to {limit:.4g}, below the noise floor of {info['dtype']}, {floor:.4g}, "
            "which rounding alone may reach; give a higher one, or set magnitude.dtype: float32"
        )
