"""memfilter finds and prunes the training samples that text-to-image diffusion models memorize.

>>> import memfilter
>>> manifest = memfilter.run(["shards/{00000..00099}.tar"], "out")  # doctest: +SKIP
>>> dataset = wds.WebDataset(urls).compose(manifest.attach())  # doctest: +SKIP
"""

from importlib.metadata import version

from .config import Config
from .errors import ConfigError, InputError, MemfilterError, ModelError, RunError, ShardError, WorkerError
from .manifest import Manifest
from .pipeline import generalise, rethreshold, run
from .streaming import OnlineFilter
from .thresholds import Threshold
from .verification import verify

__version__ = version("memfilter")

__all__ = [
    "Config",
    "ConfigError",
    "InputError",
    "Manifest",
    "MemfilterError",
    "ModelError",
    "OnlineFilter",
    "RunError",
    "ShardError",
    "Threshold",
    "WorkerError",
    "__version__",
    "generalise",
    "rethreshold",
    "run",
    "verify",
]
