"""Every error that memfilter raises on purpose.

    MemfilterError          one line that names the file, the number and the next step
    ├── ConfigError         the configuration or the command's arguments cannot be obeyed
    ├── InputError          no input, or inputs that contradict one another
    │   └── ShardError      one shard cannot be read to its end, or as it was read before
    ├── ModelError          a model's weights cannot be had or loaded, or give no usable numbers
    ├── RunError            the run directory is in use, damaged or written by another version
    └── WorkerError         an item brought its worker down twice

A bad *sample* is never an exception outside its shard: it is a manifest row with a cause.
"""

from __future__ import annotations


def in_one_line(error: Exception) -> str:
    """Return an error's text without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class MemfilterError(Exception):
    """The base of all errors that the command line prints as one line."""


class ConfigError(MemfilterError):
    """The configuration or the command's arguments cannot be obeyed."""


class InputError(MemfilterError):
    """There is no input, or the inputs contradict one another."""


class ShardError(InputError):
    """One shard cannot be read to its end; the message starts with its name."""


class ChangedShard(ShardError):
    """A shard's bytes are not those that were read first; it is read again by the next `memfilter run`."""

    def __init__(self, shard: str, advice: str) -> None:
        super().__init__(f"{shard}: has changed since it was read; {advice}")
        self.shard, self.advice = shard, advice

    def __reduce__(self) -> tuple[type[ChangedShard], tuple[str, str]]:
        return ChangedShard, (self.shard, self.advice)


class ModelError(MemfilterError):
    """A model's weights cannot be had or loaded, or give no usable numbers."""


class RunError(MemfilterError):
    """The run directory is in use, damaged, or written by another version."""


class WorkerError(MemfilterError):
    """A worker process died twice over one item; the message names it and the cause."""
