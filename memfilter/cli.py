"""The command line: one function a command, each a single call."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from . import __version__
from .errors import MemfilterError, printable, without_secrets

_CONFIG = click.option("--config", type=click.Path(path_type=Path), help="YAML file; keys not given have defaults.")
_WORKERS = click.option("--workers", type=click.IntRange(min=1), help="Worker processes (default: one per CPU).")
_INPUTS = click.option(
    "--inputs", multiple=True, metavar="PATTERNS", help="Where input shards lie that are no local files, or have moved."
)
_TRUST = click.option("--trust", is_flag=True, help="Use all that DIRECTORY names: hosts, commands, code.")


class _Plain(logging.Formatter):
    """Lines for the terminal: a stranger's names may stand in them, and an HTTP client's URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(without_secrets(printable(line)) for line in super().format(record).split("\n"))


def _tell(lines: list[str]) -> None:
    """Print lines, in which what a stranger wrote may stand."""
    click.echo("\n".join(map(printable, lines)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log what the stages do.")
def cli(verbose: bool) -> None:
    """Find and prune the training samples that text-to-image diffusion models memorize."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if verbose:  # of this package: an HTTP client's log tells whole URLs
        logging.getLogger("memfilter").setLevel(logging.INFO)


@cli.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run directory.")
@_CONFIG
@click.option("--model", help="A diffusers pipeline's folder or hub id that has seen the data.")
@click.option("--update", is_flag=True, help="Change a finished run: other shards, configuration or model.")
@_WORKERS
def run(
    shards: tuple[str, ...], out: Path, config: Path | None, model: str | None, update: bool, workers: int | None
) -> None:
    """Read SHARDS (brace expansions, globs, folders, URLs) and write manifest and filtered shards to --out.

    The same command continues an interrupted run.
    """
    from . import pipeline, summary
    from .config import Config
    from .manifest import read_info

    given = Config.load(config)
    if model:
        given = Config.parse(
            {**given.model_dump(mode="json"), "magnitude": {**given.magnitude.model_dump(), "model": model}}
        )
    before = read_info(out)
    manifest = pipeline.run(list(shards), out, given, workers, update)
    _tell([*summary.changes(before, manifest.info), *summary.lines(manifest.info, str(out))])


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@_CONFIG
@_INPUTS
@_TRUST
@_WORKERS
def rethreshold(
    directory: Path, config: Path | None, inputs: tuple[str, ...], trust: bool, workers: int | None
) -> None:
    """Decide again in a run's DIRECTORY with the keys in --config, without reading the pixels again."""
    from . import pipeline, summary
    from .manifest import read_info

    before = read_info(directory)
    manifest = pipeline.rethreshold(directory, config, workers, inputs, trust)
    _tell([*summary.changes(before, manifest.info), *summary.lines(manifest.info, str(directory))])


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@_CONFIG
@click.option("--model", help="A transformers language model's folder, or the name of the endpoint's model.")
@click.option("--endpoint", metavar="URL", help="An OpenAI-compatible endpoint; its key is OPENAI_API_KEY.")
@click.option("--rule", is_flag=True, help="No model: remove names, numbers and rare words.")
@_INPUTS
@_TRUST
@_WORKERS
def generalise(
    directory: Path,
    config: Path | None,
    model: str | None,
    endpoint: str | None,
    rule: bool,
    inputs: tuple[str, ...],
    trust: bool,
    workers: int | None,
) -> None:
    """Rewrite the captions of flagged samples in a run's DIRECTORY as general ones, for the pools of captions.

    The same command continues one that was interrupted, and asks again for what had no answer.
    """
    from . import pipeline, summary
    from .manifest import read_info

    if rule and (model or endpoint):
        raise click.UsageError("--rule takes no --model and no --endpoint")
    given = {name: value for name, value in (("model", model), ("endpoint", endpoint)) if value}
    settings = {"model": None, "endpoint": None, **given} if rule or model else given
    before = read_info(directory)
    manifest = pipeline.generalise(directory, config, workers, settings, inputs, trust)
    generality = manifest.info["generality"]
    _tell(
        [
            *summary.changes(before, manifest.info),
            summary.generalised_line(manifest.info["generalised"]),
            *([summary.generality_line(generality)] if generality else []),
        ]
    )


@cli.command()
@click.argument("sample", nargs=-1, metavar="[DIRECTORY [SHARD] KEY]")
@click.option("--prompt", help="Explain this prompt in place of a run's sample; --model is needed.")
@click.option("--model", help="A diffusers pipeline's folder or hub id: where the run's own lies.")
@_TRUST
@click.option("--steps", type=click.IntRange(1, 50), default=1, show_default=True, help="First steps of 50 to average.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the weight of every token.")
def explain(
    sample: tuple[str, ...], prompt: str | None, model: str | None, trust: bool, steps: int, as_json: bool
) -> None:
    """Show which words of a caption carry its magnitude: of the sample KEY of a run's DIRECTORY, or of any --prompt.

    SHARD is needed where samples of several shards have the same key.
    """
    from . import attribution

    if prompt is not None:
        if sample or model is None:
            raise click.UsageError("--prompt takes --model, and no DIRECTORY")
        found = attribution.explain_prompt(prompt, model, steps)
    else:
        if len(sample) not in (2, 3):
            raise click.UsageError("give DIRECTORY KEY, DIRECTORY SHARD KEY, or --prompt TEXT --model PATH")
        directory, *shard, key = sample
        found = attribution.explain(directory, key, shard[0] if shard else None, model, steps, trust)
    _tell(json.dumps(found, indent=2).split("\n") if as_json else attribution.lines(found))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Check every byte and count of a finished run in DIRECTORY."""
    from .manifest import Manifest
    from .summary import reconciliation
    from .verification import verify as check

    problems = check(directory, lambda names: tqdm(names, desc="verify", unit="file", disable=None))
    if problems:
        raise MemfilterError("\n".join(f"{directory}: {p}" for p in problems))
    _tell([f"{directory}: sound; {reconciliation(Manifest.load(directory).counts)}"])


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["datacomp", "energon", "keys", "open_clip"]))
@click.option("--out", required=True, type=click.Path(), help="The file to write.")
def export(directory: Path, to: str, out: str) -> None:
    """Write what trains, by the manifest in a run's DIRECTORY, as another loader reads it.

    \b
    datacomp   a .npy of sorted uids for its resharder
    energon    a split.yaml that excludes what does not train, for ROOT/.nv-meta,
               where ROOT is the run's input root (input.root sets another)
    keys       a text file: shard, tab, key
    open_clip  the sizes.json of the filtered shards
    """
    from .exporters import export as write
    from .manifest import Manifest

    manifest = Manifest.load(directory)
    count = write(manifest, to, out)
    _tell([f"{out}: {count} of {manifest.counts['read']} samples train"])
    if to == "energon":
        root = manifest.root or "ROOT"
        _tell([f"it belongs in {root}/.nv-meta: the run's input root is {root}; another needs a run with input.root"])


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("memfilter-demo"), show_default=True)
@_WORKERS
def demo(out: Path, workers: int | None) -> None:
    """Make shards with planted copies, run on them, and print planted against found."""
    from . import demo as demonstration

    click.echo("\n".join(demonstration.run(out, workers)))


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit with 0 done, 1 a clear error, 2 usage, 130 interrupted."""
    try:
        code = cli.main(arguments, standalone_mode=False)
    except click.ClickException as e:
        e.show()
        code = e.exit_code
    except (click.Abort, KeyboardInterrupt):
        exec("")  # CPython ends by the signal, whatever is caught, once one met it in an exec of text: this resets that
        click.echo("memfilter: interrupted; run the same command again to continue", err=True)
        code = 130
    except MemfilterError as e:
        click.echo(f"memfilter: {e}", err=True)
        code = 1
    except MemoryError:
        click.echo("memfilter: out of memory; run the same command again with fewer --workers or more memory", err=True)
        code = 1
    except OSError as e:  # a full disk, a folder that may not be written
        cause = printable(f"{e.filename or 'file system'}: {e.strerror or e}")
        click.echo(f"memfilter: {cause}; run the same command again after mending", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
