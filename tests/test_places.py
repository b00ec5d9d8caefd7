"""Where people run it: containers without a home, file systems without locks, scripts of all kinds, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import encoded, picture, sample, words, write_tar
from test_run import tree

import memfilter
from memfilter import RunError
from memfilter.lock import locked

PACKAGE = Path(memfilter.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four samples, of which three repeat."""
    folder = tmp_path_factory.mktemp("data") / "in"
    for s in range(2):
        seeds = [0, 1, 2, 3 + s]
        members = [m for i in seeds for m in sample(f"{i}", encoded(picture(i, 90 + s, 80)), words(i))]
        write_tar(folder / f"{s}.tar", members)
    return folder


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **options.pop("env", {})}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


# -- a container without a home ---------------------------------------------------------------------------------------


def test_a_run_with_nowhere_to_keep_machine_code(data: Path, tmp_path: Path) -> None:
    """As in the ordinary container: neither the package nor the home can be written."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "memfilter", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    locked_up = [tmp_path / "home", *(p for p in (tmp_path / "site").rglob("*") if p.is_dir())]
    for folder in locked_up:
        folder.chmod(0o555)
    command = [sys.executable, "-m", "memfilter", "run", str(data), "--out", str(tmp_path / "out"), "--workers", "2"]
    if os.geteuid() == 0:  # for whom permissions do not count, but without these rights they do
        if not shutil.which("setpriv"):
            pytest.skip("this machine cannot run a program with fewer rights")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "NUMBA"))}
    place = {**kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=place)
    for folder in locked_up:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("8 read = 5 kept + 0 masked + 3 dropped + 0 bad\n")
    assert not list((tmp_path / "home").rglob("*"))
    memfilter.run([str(data)], tmp_path / "usual", workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "usual")


def test_no_machine_code_is_kept_in_a_run_directory(data: Path, tmp_path: Path) -> None:
    memfilter.run([str(data)], tmp_path / "out", workers=1)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".nbi", ".nbc", ".pyc", ".pkl")]


# -- ends by a signal -------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from memfilter import executors

def work(i, folder):
    Path(folder, f"{i}-started").touch()
    time.sleep(0 if i > 1 else 600)

if __name__ == "__main__":
    list(executors.run(work, [(i, sys.argv[1]) for i in range(2)], 2, str))
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_the_process_that_started_them(end: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    script = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path], env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*-started"))) == 2)
    workers = psutil.Process(script.pid).children(recursive=True)
    assert len(workers) >= 2
    script.send_signal(end)
    script.wait(timeout=20)
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
    assert gone


def wait_until(happened: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- scripts ----------------------------------------------------------------------------------------------------------

CALL = """
import sys, memfilter
manifest = memfilter.run([sys.argv[1]], sys.argv[2], workers=2)
print(manifest.counts["read"])
"""


def test_a_script_from_standard_input_goes_on_in_one_process(data: Path, tmp_path: Path) -> None:
    done = python("-", data, tmp_path / "out", input=CALL)
    assert (done.returncode, done.stdout) == (0, "8\n")
    (line,) = done.stderr.splitlines()
    assert line == "a script from standard input cannot be imported by workers: going on in this process alone"


def test_a_line_of_code_has_its_workers(data: Path, tmp_path: Path) -> None:
    done = python("-c", CALL, data, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_a_script_without_a_guard_is_told_at_once(data: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CALL)
    done = python(tmp_path / "script.py", data, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") <= 2  # the script's own, with its cause
    assert done.stderr.splitlines()[-1] == (
        "memfilter.errors.WorkerError: workers import the script that starts them: call memfilter under "
        "'if __name__ == \"__main__\":' in a script of your own, or ask for one worker"
    )
    assert "died" not in done.stderr
    (tmp_path / "script.py").write_text(CALL.replace("workers=2", "workers=1"))
    assert python(tmp_path / "script.py", data, tmp_path / "out").stdout == "8\n"


# -- shared memory that cannot be written -----------------------------------------------------------------------------


def test_workers_that_cannot_be_started_name_the_place_and_the_way_on(data: Path, tmp_path: Path) -> None:
    inside = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", inside, "sh", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for workers, code in (("2", 1), ("1", 0)):
        command = [sys.executable, "-m", "memfilter", "run", str(data), "--out", str(tmp_path / "out")]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", inside, "sh", *command, "--workers", workers],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == code
        if code:
            assert done.stderr.startswith("memfilter: /dev/shm: workers cannot be started: ")
            assert "run with --workers 1" in done.stderr
            assert done.stderr.count("\n") == 1


# -- locks ------------------------------------------------------------------------------------------------------------

WITHOUT_FLOCK = """
import errno, fcntl, os, sys
def flock(file, how):
    raise OSError(getattr(errno, os.environ["ANSWER"]), os.strerror(getattr(errno, os.environ["ANSWER"])))
fcntl.flock = flock
from memfilter.cli import main
main(sys.argv[1:])
"""


def run_without_flock(data: Path, out: Path, answer: str = "EOPNOTSUPP") -> subprocess.CompletedProcess[str]:
    """Run on a file system that does not lock files, as the operating system tells of one."""
    arguments = ["run", data, "--out", out, "--workers", "1"]
    return python("-c", WITHOUT_FLOCK, *arguments, env={"ANSWER": answer})


@pytest.mark.parametrize("answer", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_is_used(answer: str, data: Path, tmp_path: Path) -> None:
    done = run_without_flock(data, tmp_path / "out", answer)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "out").glob(".lock.owner*"))


def owner(out: Path, **told: Any) -> Path:
    out.mkdir(exist_ok=True)
    values = {"host": socket.gethostname(), "process": os.getpid(), "since": psutil.Process().create_time(), **told}
    (out / ".lock.owner").write_text(json.dumps(values))
    return out / ".lock.owner"


@pytest.mark.parametrize("told", [{}, {"host": "another"}, {"host": 3}, None])
def test_there_a_second_run_is_refused_with_who_holds_it(
    told: dict[str, Any] | None, data: Path, tmp_path: Path
) -> None:
    file = owner(tmp_path / "out", **(told or {}))
    if told is None:  # cut off as it was written
        file.write_text("")
    done = run_without_flock(data, tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "another run is using this directory: this file system cannot lock files (Operation not supported)" in (
        done.stderr
    )
    assert f"{file} names" in done.stderr
    assert "remove that file if the run has ended" in done.stderr
    file.unlink()
    assert run_without_flock(data, tmp_path / "out").returncode == 0


@pytest.mark.parametrize("told", [{"process": 2**22 + 1}, {"since": 1.0}, {"process": -1}])
def test_there_what_a_killed_run_left_is_taken_over(told: dict[str, Any], data: Path, tmp_path: Path) -> None:
    file = owner(tmp_path / "out", **told)
    done = run_without_flock(data, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert not file.exists()


def test_a_lock_that_is_held_is_named_with_a_way_on(tmp_path: Path) -> None:
    message = r"another run is using this directory, it holds .*/\.lock; .* remove that file if the run was on"
    with locked(tmp_path), pytest.raises(RunError, match=message), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_says_why(data: Path) -> None:
    done = python("-m", "memfilter", "run", data, "--out", "/proc/memfilter")
    assert done.returncode == 1
    assert "/proc/memfilter: cannot be written: No such file or directory" in done.stderr
