"""Kill runs with SIGKILL, at every commit point and at random moments, run the same again, and compare every byte.

    python benchmarks/kills.py --json benchmarks/results/kills.json

A commit point is the instant before or after a file is renamed into place.  Most runs are forks of this process, which
has imported everything already, so that the moments fall into the stages and not into the imports; `--workers-kills` of
the random ones are runs of the command line with two worker processes, all killed at once.
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
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from environment import write_result
from tqdm import tqdm

import memfilter
from memfilter import Config
from memfilter.demo.data import samples, write_shards
from memfilter.demo.memorized import MODEL
from memfilter.magnitude import Scorer  # noqa: F401  with the imports below: so that forks have them
from memfilter.signatures import hasher

STAGES = ("signatures", "edges", "captions", "scores", "manifest", "shards")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=200, help="random kills, those of --workers-kills among them")
    arguments.add_argument("--workers-kills", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=400)
    arguments.add_argument("--without-model", action="store_true", help="leave the magnitudes out")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", type=Path)
    args = arguments.parse_args()
    import_all()
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), args.samples, None if args.without_model else MODEL)
        points = trial.commit_points()
        kills, stages, different = trial.random_kills(args.kills, args.workers_kills, random.Random(args.seed))
    result = {
        "commit_points": len(points),
        "commit_points_survived": [point for point, (killed, _) in points.items() if not killed],
        "commit_points_with_other_bytes": [point for point, (_, same) in points.items() if not same],
        "random_kills": kills,
        "random_kills_by_newest_stage": {stage: stages[stage] for stage in ("nothing", *STAGES) if stages[stage]},
        "random_kills_with_other_bytes": different,
    }
    write_result(result, args.json)
    if different or result["commit_points_with_other_bytes"] or result["commit_points_survived"]:
        sys.exit(1)


def import_all() -> None:
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    from diffusers import DDIMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    hasher("phash")


class Trial:
    """Two shards, and what an undisturbed run leaves of them."""

    def __init__(self, folder: Path, count: int, model: Path | None) -> None:
        self.folder, self.out = folder, folder / "out"
        planted = samples()[:count]
        write_shards(planted[: count // 2], folder / "data" / "a")
        write_shards(planted[count // 2 :], folder / "data" / "b")
        self.config = folder / "config.yaml"
        self.config.write_text(f"magnitude: {{model: {model}, threshold: {{quantile: 0.95}}}}\n" if model else "")
        started = time.monotonic()
        self.finish()
        self.seconds = time.monotonic() - started
        self.expected = tree(self.out)

    def run(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Return the process id of a fork that runs the main job and leaves."""
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)  # here as well: it may be killed before it comes to that
            return pid
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            prepare()
            memfilter.run([str(self.folder / "data")], self.out, Config.load(self.config), workers=1)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def finish(self) -> None:
        """Run the main job undisturbed."""
        _, status = os.waitpid(self.run(), 0)
        if status:
            raise SystemExit(f"a run that nobody disturbed ended with {status}:\n{(self.folder / 'log').read_text()}")

    def is_same(self) -> bool:
        """Finish the run, tell whether every byte is as expected, and clear the table."""
        self.finish()
        same = tree(self.out) == self.expected
        shutil.rmtree(self.out)
        return same

    def commit_points(self) -> dict[str, tuple[bool, bool]]:
        """Return of every commit point whether a run could be killed there, and whether the next one mended it."""
        shutil.rmtree(self.out)
        _, status = os.waitpid(self.run(lambda: record_renames(self.folder / "renames")), 0)
        names = (self.folder / "renames").read_text().splitlines()
        assert status == 0
        found = {}
        shutil.rmtree(self.out)
        for i, name in enumerate(tqdm(names, desc="commit points", unit="file", disable=None)):
            for after in (False, True):
                _, status = os.waitpid(self.run(lambda i=i, after=after: die_at_rename(i, after)), 0)
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                relative = Path(name).relative_to(self.out).as_posix()
                found[f"{i} {'after' if after else 'before'} {relative}"] = killed, self.is_same()
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


def record_renames(path: Path) -> None:
    def hook(event: str, details: tuple[object, ...]) -> None:
        if event == "os.rename":
            os.write(log, f"{details[1]}\n".encode())

    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def die_at_rename(number: int, after: bool) -> None:
    """Die of SIGKILL when the file of this number is to be renamed into place, or with the next thing done after."""
    seen = 0

    def hook(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen
        if seen > number or (event == "os.rename" and seen == number and not after):
            signal.raise_signal(signal.SIGKILL)
        seen += event == "os.rename"

    sys.addaudithook(hook)


def newest(out: Path) -> str:
    """Return the last stage of which a run directory holds a file."""
    return next((s for s in reversed(STAGES) if any(p.is_file() for p in (out / s).rglob("*"))), "nothing")


def tree(folder: Path) -> dict[str, str]:
    """Return the digests of all files but the lock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


if __name__ == "__main__":
    main()
