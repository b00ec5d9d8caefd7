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

import re

_PLACES = r"(?:abfss?|adl|az|github|gitlab|hf|git)://"  # where what stands before the @ is a container or a repository
_USERINFO = re.compile(rf"(?!{_PLACES})\b([a-z][a-z0-9+.-]{{0,30}}://)[^/\s?#'\"]*@", re.IGNORECASE)
_WORD = re.compile(r"[^\s'\"<>|]+")  # whole words, so that a text of any length takes time in proportion
_QUERY = re.compile(r"\?[\w.%~-]+=")


def printable(text: str) -> str:
    """Return a text for the terminal and for logs: what a stranger wrote may hold a terminal's control codes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def without_secrets(text: str) -> str:
    """Return a text whose URLs have no userinfo and no query, in which passwords and signatures stand."""
    text = _USERINFO.sub(r"\1", text) if "@" in text else text
    return _WORD.sub(_without_query, text) if "?" in text else text


def _without_query(word: re.Match[str]) -> str:
    before = word[0].partition("?")[0]
    return before if "://" in before else _QUERY.split(word[0], maxsplit=1)[0]


def shown(url: str) -> str:
    """Return a shard's URL for a message or a log; of a `pipe:` command its program and the shard alone."""
    url = printable(url)
    if not url.startswith("pipe:"):
        return without_secrets(url)
    words = url.removeprefix("pipe:").split()
    program = words[0] if words and "=" not in words[0] and "://" not in words[0] else "…"
    shards = [word.strip("'\"") for word in words[1:] if ".tar" in word]
    name = without_secrets(shards[-1]) if shards else "…"
    return f"pipe:{program} {name}" if len(words) == 2 else f"pipe:{program} … {name}"


def in_one_line(error: Exception) -> str:
    """Return an error's text without line breaks, control codes and secrets, or its kind where it has none."""
    return without_secrets(printable(" ".join(str(error).split()))) or type(error).__name__


class MemfilterError(Exception):
    """The base of all errors that the command line prints as one line.

    Its text holds no secret of a URL, and no control code but the ends of its lines.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(without_secrets(printable(line)) for line in message.split("\n")))


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
