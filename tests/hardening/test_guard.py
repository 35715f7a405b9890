"""Every end of a command is one line and an exit code that is not 0."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from xmoe_fairseq.common import guard
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.moe import kernels


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which tracebacks are written."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def ended_by(error: BaseException) -> SystemExit:
    with pytest.raises(SystemExit) as end, guard.one_line():
        raise error
    return end.value


ENDS = {
    "a file": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"),
        "x.txt: No such file or directory",
    ),
    "memory": (MemoryError(), "there is not enough memory"),
    "an allocator": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes."),
        "there is not enough memory .*1000 bytes.*--max-tokens",
    ),
    "a GPU": (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "there is not enough memory"),
    "a fault": (KeyError("best_loss"), r"this is a fault of xmoe_fairseq \(KeyError: 'best_loss'\): please report"),
    "lines": (RuntimeError("one\ntwo\n" + "x" * 5000), r"\(RuntimeError: one two x+\.\.\.\)"),
    "nothing": (AssertionError(), r"\(AssertionError: raise error\)"),
}


@pytest.mark.parametrize(("error", "message"), ENDS.values(), ids=ENDS)
def test_an_exception_is_a_line(error: Exception, message: str, logs: Path) -> None:
    end = ended_by(error)
    assert isinstance(end, UserError) and re.search(message, end.message), end.message
    assert "\n" not in end.message and len(end.message) < 600
    written = list(logs.iterdir())
    assert len(written) == ("report" in end.message)
    for log in written:
        assert str(log) in end.message and "Traceback" in log.read_text() and "test_guard.py" in log.read_text()


def test_a_refusal_of_the_layers_is_a_line_as_it_is() -> None:
    with pytest.raises(UserError) as end, guard.one_line():
        kernels.choose("best", torch.zeros(1, 1), cast(Any, None), 1)
    assert end.value.message.startswith("there is no kernel 'best': choose one of ")


def test_what_ends_a_program_already_stays() -> None:
    for error in (UserError("as it is"), SystemExit(3), SystemExit("text")):
        assert ended_by(error) is error


def test_an_interrupt_has_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), guard.one_line():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["xmoe"])
    with pytest.raises(SystemExit) as end:
        guard._hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert end.value.code == 130
    assert capsys.readouterr().err == "xmoe_fairseq: interrupted\n"


def test_nowhere_to_write_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert "report it" in ended_by(KeyError(1)).code


def test_other_programs_keep_their_own_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ValueError("mine")
    for program in ("/usr/bin/pytest", "notebook.py", ""):
        monkeypatch.setattr(sys, "argv", [program])
        guard._hook(ValueError, error, None)
        assert capsys.readouterr().err == "ValueError: mine\n"
    for program in ("/env/bin/fairseq-train", "/site-packages/fairseq_cli/train.py", "xmoe", guard.__file__):
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(UserError, match="ValueError: mine"):
            guard._hook(ValueError, error, None)


def test_a_broken_pipe_of_something_else_is_not_silent() -> None:
    end = ended_by(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
    assert isinstance(end, UserError) and "BrokenPipeError" in end.message


@pytest.mark.parametrize("to_file", [True, False])
def test_a_log_that_cannot_be_written_ends_a_command(to_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.FileHandler("/dev/full")
    logger = logging.getLogger("full")
    monkeypatch.setattr(logger, "handlers", [handler if to_file else logging.StreamHandler(handler.stream)])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(sys, "argv", ["/bin/fairseq-train"])
    with pytest.raises(UserError) as end:
        logger.error("one")
    what = "the log /dev/full" if to_file else "standard output"
    assert end.value.message == f"{what} cannot be written: No space left on device"


def test_a_statement_that_prints_is_told_from_one_that_writes_a_file() -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails, too
        with pytest.raises(UserError) as end, guard.one_line():
            print("x", file=full, flush=True)
        assert end.value.message == "standard output cannot be written: No space left on device"
        with pytest.raises(UserError) as end, guard.one_line():
            full.flush()
        assert end.value.message.startswith("standard output, or a file, cannot be written")


def test_torchrun_shows_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(UserError), guard.told_to_torchrun():
        raise UserError("--moe-expert-parallel 3 does not divide the 2 processes")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    last = str(ChildFailedError("fairseq-train", {0: failure})).splitlines()[-2]
    assert last == "  traceback : xmoe_fairseq: error: --moe-expert-parallel 3 does not divide the 2 processes"
