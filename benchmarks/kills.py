"""Kill runs with SIGKILL, at every commit point and at random moments, run the same again, and compare every byte.

    python benchmarks/kills.py --json benchmarks/results/kills.json

A commit point is the instant before or after a file is renamed into place, or removed.  A finished run is killed at
each of them too as it is decided again: by `rethreshold`, by `rethreshold` without its inputs, by `run --update` with
other shards and another hash.  Whatever stands then either is the run as it was, to the byte, or says that it is not.

Most runs are forks of this process, which has imported everything already, so that the moments fall into the stages and
not into the imports; `--workers-kills` of the random ones are runs of the command line with two worker processes, all
killed at once.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from environment import write_result
from tqdm import tqdm

import memfilter
from memfilter import Config
from memfilter.demo.data import samples, write_shards
from memfilter.demo.memorized import MODEL
from memfilter.magnitude import Scorer  # noqa: F401  with the imports below: so that forks have them
from memfilter.signatures import hasher

STAGES = ("signatures", "edges", "captions", "scores", "manifest", "shards")
AGAIN = ("rethreshold", "update", "without inputs")
CHANGES = {"os.rename": 1, "os.remove": 0}  # events, and which of their details names the file


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=200, help="random kills, those of --workers-kills among them")
    arguments.add_argument("--workers-kills", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=400)
    arguments.add_argument("--without-model", action="store_true", help="leave the magnitudes out")
    arguments.add_argument("--without-encoder", action="store_true", help="leave the embeddings out")
    arguments.add_argument("--before", action="store_true", help="kill before each change, and not after it too")
    arguments.add_argument("--only", nargs="*", choices=["run", *AGAIN], default=["run", *AGAIN])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", type=Path)
    args = arguments.parse_args()
    import_all()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), args.samples, None if args.without_model else MODEL, not args.without_encoder)
        moments = (False,) if args.before else (False, True)
        result: dict[str, Any] = {}
        faults = 0
        if "run" in args.only:
            result = points_of(trial, moments)
            kills, stages, different = trial.random_kills(args.kills, args.workers_kills, random.Random(args.seed))
            result["random_kills"] = kills
            by_stage = {stage: stages[stage] for stage in ("nothing", *STAGES) if stages[stage]}
            result["random_kills_by_newest_stage"] = by_stage
            result["random_kills_with_other_bytes"] = different
            faults += different
        result["decided_again"] = {}
        for how in (how for how in AGAIN if how in args.only):
            trial.decide_again(how)
            result["decided_again"][how] = points_of(trial, moments)
    for found in (result, *result["decided_again"].values()):
        faults += sum(len(value) for value in found.values() if isinstance(value, list))
    write_result(result, args.json)
    if faults:
        sys.exit(1)


def points_of(trial: Trial, moments: tuple[bool, ...]) -> dict[str, Any]:
    """Return how many commit points a call has, and at which of them something went wrong."""
    points = trial.commit_points(moments)
    found: dict[str, Any] = {"commit_points": len(points)}
    faults = ("survived", "with_other_bytes", "with_neither_the_old_run_nor_a_word")
    for name, is_wrong in zip(faults, (lambda p: not p[0], lambda p: not p[1], lambda p: not p[2]), strict=True):
        found[f"commit_points_{name}"] = [point for point, told in points.items() if is_wrong(told)]
    return found


def import_all() -> None:
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    hasher("phash")


class Trial:
    """Two folders of shards, and what undisturbed calls leave of them."""

    def __init__(self, folder: Path, count: int, model: Path | None, encoder: bool) -> None:
        self.folder, self.out = folder, folder / "out"
        planted = samples()[:count]
        write_shards(planted[: count // 2], folder / "data" / "a")
        write_shards(planted[count // 2 :], folder / "data" / "b")
        self.config = folder / "config.yaml"
        settings: dict[str, Any] = {"images": {} if encoder else {"encoder": None}}
        if model:
            settings["magnitude"] = {"model": str(model), "threshold": {"quantile": 0.95}}
        self.settings = settings
        self.config.write_text(yaml.safe_dump(settings))
        self.call = self.main_job
        self.before: Path | None = None  # the run that is decided again
        started = time.monotonic()
        self.finish()
        self.seconds = time.monotonic() - started
        self.expected = tree(self.out)

    def main_job(self) -> None:
        """Run on all shards."""
        memfilter.run([str(self.folder / "data")], self.out, Config.load(self.config), workers=1)

    def decide_again(self, how: str) -> None:
        """Go on with calls that decide a finished run again."""
        self.before = self.folder / "before"
        self.call, another = self.main_job, self.folder / "another.yaml"
        if not self.before.exists():
            self.reset()
            self.finish()
            shutil.copytree(self.out, self.before)
        if how == "update":
            images = {**self.settings["images"], "hash": "dhash"}
            another.write_text(yaml.safe_dump({**self.settings, "images": images}))
            write_shards(samples()[:9], self.folder / "data" / "c")
            patterns = [str(self.folder / "data" / part) for part in "bc"]
            settings = Config.load(another)
            self.call = lambda: memfilter.run(patterns, self.out, settings, workers=1, update=True)
        else:
            policy = "record" if how == "rethreshold" else "drop, caption_duplicate: drop"
            another.write_text(f"policy: {{image_duplicate: {policy}}}\nimages: {{hash_radius: 8}}\n")
            self.call = lambda: memfilter.rethreshold(self.out, another, workers=1)
        self.reset()
        self.finish()
        self.expected = tree(self.out)
        if how == "without inputs":
            (self.folder / "data").rename(self.folder / "away")

    def reset(self) -> None:
        """Begin from nothing, or from the run that is decided again."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before and self.before.exists():
            shutil.copytree(self.before, self.out)

    def run(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Return the process id of a fork that makes the call and leaves."""
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)  # here as well: it may be killed before it comes to that
            return pid
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            tqdm.set_lock(threading.RLock())  # its own is shared with this process, and stays with one that is killed
            prepare()
            self.call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def finish(self) -> None:
        """Make the call undisturbed."""
        _, status = os.waitpid(self.run(), 0)
        if status:
            raise SystemExit(f"a run that nobody disturbed ended with {status}:\n{(self.folder / 'log').read_text()}")

    def is_same(self) -> bool:
        """Finish the call, tell whether every byte is as expected, and clear the table."""
        self.finish()
        same = tree(self.out) == self.expected
        self.reset()
        return same

    def is_honest(self) -> bool:
        """Tell whether a run that was killed while it was decided again is as it was, or done, or says that it is not.

        What was staged beside it, or is half written under a temporary name, does not count.
        """
        try:
            memfilter.Manifest.load(self.out)
        except memfilter.RunError as e:
            return "is being decided again" in str(e)
        assert self.before
        stands = {n: digest for n, digest in tree(self.out).items() if not n.startswith("next/") and n[-4:] != ".tmp"}
        return stands in (tree(self.before), self.expected)

    def commit_points(self, moments: tuple[bool, ...]) -> dict[str, tuple[bool, bool, bool]]:
        """Return of every commit point whether a call could be killed there, the next one mended it, and in between
        the run was honest about its state.  The moments are before (False) and after (True) a change.
        """
        self.reset()
        _, status = os.waitpid(self.run(lambda: record_changes(self.folder / "changes")), 0)
        names = (self.folder / "changes").read_text().splitlines()
        assert status == 0
        found = {}
        self.reset()
        for i, name in enumerate(tqdm(names, desc="commit points", unit="file", disable=None)):
            for after in moments:
                _, status = os.waitpid(self.run(lambda i=i, after=after: die_at_change(i, after)), 0)
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                honest = self.before is None or self.is_honest()
                found[f"{i} {'after' if after else 'before'} {name}"] = killed, self.is_same(), honest
        return found

    def random_kills(self, kills: int, of_workers: int, moments: random.Random) -> tuple[int, Counter[str], int]:
        """Return how many runs were killed, the newest stage that each had begun, and how often bytes differed."""
        stages: Counter[str] = Counter()
        done = different = 0
        with tqdm(total=kills, desc="random kills", unit="kill", disable=None) as bar:
            while done < kills:
                with_workers = done < of_workers
                # importing in the workers takes its time
                moment = moments.uniform(0, self.seconds + (15 if with_workers else 0))
                if self.kill_after(moment, with_workers):
                    done += 1
                    bar.update()
                    stages[newest(self.out)] += 1
                    if moments.random() < 0.5:  # the next is killed too
                        continue
                if self.out.exists():
                    different += not self.is_same()
        return done, stages, different

    def kill_after(self, seconds: float, with_workers: bool) -> bool:
        """Start a run and kill it after so many seconds; False when it had ended by then."""
        if with_workers:
            command = [sys.executable, "-m", "memfilter", "run", str(self.folder / "data"), "--out", str(self.out)]
            command += ["--config", str(self.config), "--workers", "2"]
            quiet = subprocess.DEVNULL
            pid = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True).pid
        else:
            pid = self.run()
        time.sleep(seconds)
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            return False
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True


def record_changes(path: Path) -> None:
    def hook(event: str, details: tuple[object, ...]) -> None:
        if event in CHANGES:
            os.write(log, f"{event} {Path(str(details[CHANGES[event]])).name}\n".encode())

    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def die_at_change(number: int, after: bool) -> None:
    """Die of SIGKILL when the file of this number is to be renamed or removed, or with the next thing done after."""
    seen = 0

    def hook(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen
        if seen > number or (event in CHANGES and seen == number and not after):
            signal.raise_signal(signal.SIGKILL)
        seen += event in CHANGES

    sys.addaudithook(hook)


def newest(out: Path) -> str:
    """Return the last stage of which a run directory holds a file."""
    places = {stage: [out / stage, out / "next" / stage] for stage in STAGES}
    held = {stage for stage, folders in places.items() if any(p.is_file() for f in folders for p in f.rglob("*"))}
    return next((stage for stage in reversed(STAGES) if stage in held), "nothing")


def tree(folder: Path) -> dict[str, str]:
    """Return the digests of all files but the lock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


if __name__ == "__main__":
    main()
