"""fairseq's commands with the plugin, as a user runs them from the project's folder."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# All that takes long to import; torch.optim imports torch._dynamo late. The tests' own modules are not found there.
CONTEXT.set_forkserver_preload(["torch._dynamo", "fairseq_cli.train", "fairseq_cli.generate", "xmoe_fairseq"])


def heed_interrupts() -> None:
    """Is to be called in a new process: what a shell starts in the background is told to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: str, *args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, which must be a good one."""
    program = Path(sys.executable).parent / command
    words = [str(program), *map(str, args)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **kwargs)
    assert result.returncode == 0, result.stderr[-5000:]
    return result


def run_warm(
    command: str, *args: str | Path, check: bool = True, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Does the same in a process that has imported what takes seconds to import; it may fail if not checked.

    Args:
        command: of fairseq, or ``xmoe``.
        args: its words.
        check: whether it must end well.
        before: is called in the new process, before the command.
    """
    program = Path(sys.executable).parent / command
    words = [str(program), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_program, args=(words, folder, before))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{words} did not end")
        said = [(Path(folder) / name).read_text() for name in ("out", "err")]
    result = subprocess.CompletedProcess(words, process.exitcode, *said)
    assert not check or result.returncode == 0, result.stderr[-5000:]
    return result


def say_to(out: Path, err: Path) -> None:
    """Sends what this process says to files."""
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("a") as file:
            os.dup2(file.fileno(), descriptor)


def _program(words: list[str], folder: str, before: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    say_to(Path(folder) / "out", Path(folder) / "err")
    sys.argv = words
    if before is not None:
        before()
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:  # as Python does at the end of a program; multiprocessing has a way of its own
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
