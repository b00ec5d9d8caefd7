"""What the benchmarks share: runs with their peak memory, and the machine and versions that every result carries."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = (
    *("memfilter", "imagededup", "numpy", "pillow", "simplejpeg", "scipy", "faiss-cpu", "pyarrow"),
    *("webdataset", "torch", "diffusers", "transformers"),
)


def machine() -> dict[str, object]:
    """Return processor, cores, memory, Python and library versions."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def run_measured(arguments: list[str]) -> dict[str, Any]:
    """Run the memfilter command line; return its lines, wall-clock seconds and peak memory in MiB.

    `peak_mib` sums the proportional set sizes of all processes, so that pages they share count once.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", "memfilter", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            me = psutil.Process(process.pid)
            peak = max(peak, sum(p.memory_full_info().pss for p in (me, *me.children(recursive=True))))
        except psutil.Error:
            pass  # a process ended between the listing and the question
        time.sleep(0.1)
    assert process.stdout
    lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mib": round(peak / 2**20), "lines": lines}


def write_result(result: dict[str, object], path: Path | None) -> None:
    """Print a result with its command and machine, and write it to `path` if one is given."""
    command = shlex.join(["python", *sys.argv])
    text = json.dumps({"command": command, **result, "machine": machine()}, indent=1) + "\n"
    sys.stdout.write(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
