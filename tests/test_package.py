"""What the package promises about itself."""

from __future__ import annotations

import subprocess
import sys

import memfilter


def test_every_public_name_is_there() -> None:
    assert all(hasattr(memfilter, name) for name in memfilter.__all__)


def test_importing_loads_no_model_library_and_configures_no_logging() -> None:
    code = (
        "import sys, logging, memfilter, memfilter.inference\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'imagededup') if m in sys.modules])\n"
        "print(logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
