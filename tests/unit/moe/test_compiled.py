"""The Triton programs compile for a GPU, which their interpreter does not show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import NEEDS_TRITON, ROOT

PROGRAMS = "assignments combine gradient multiply settle spread take weight_gradients"


@NEEDS_TRITON
@pytest.mark.slow
def test_the_programs_of_a_step_compile_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "tests/support/helpers_compiled.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == PROGRAMS.split()
