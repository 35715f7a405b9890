"""What a user sees when a command ends early: one line, whatever happened, and an exit code that is not 0."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

from ..errors import UserError

# What a shell gives a program that Ctrl-C, or a reader that has gone, ended.
INTERRUPTED, BROKEN_PIPE = 130, 141
_SHOWN = 300
_PACKAGE = __name__.partition(".")[0]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory")
# Where torchrun lets a process that fails say why.
_TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"
_handle_error = logging.Handler.handleError


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends what is run in it as a command ends: with one line if something goes wrong.

    Raises:
        SystemExit: see `ending`; one that was raised inside stays as it is.
    """
    try:
        yield
    except SystemExit as end:
        if end.code in (None, 0):
            _check_written()
        raise
    except Exception as error:  # an interrupt is left to what called this, and at the end to `_hook`
        raise ending(error) from error
    _check_written()


def _check_written() -> None:
    end = _flush()
    if end is not None:
        raise end


@contextlib.contextmanager
def told_to_torchrun() -> Iterator[None]:
    """Hands torchrun the last line of a process: torchrun ends with a table of failures, which shows this
    line."""
    try:
        yield
    except UserError as end:
        _tell_torchrun(end)
        raise


def _tell_torchrun(end: SystemExit) -> None:
    path = os.environ.get(_TORCHRUN_FILE)
    if path and isinstance(end, UserError):
        message = {"message": str(end), "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def install() -> None:
    """Makes fairseq's commands end so, too, for the plugin is imported after they started, and ours while they import.

    Other programs that import the plugin, such as a notebook or pytest, keep their own ways.
    """
    if sys.excepthook is sys.__excepthook__ or sys.excepthook.__module__ == "hydra_plugins.xmoe_fairseq_errors":
        sys.excepthook = _hook
        logging.Handler.handleError = _log_not_written  # type: ignore[method-assign, assignment]
        atexit.register(_flush_at_end)


def ending(error: BaseException) -> SystemExit:
    """Returns what ends the program instead of an exception.

    Args:
        error: any but ``SystemExit``.
    """
    if isinstance(error, KeyboardInterrupt):
        print("xmoe_fairseq: interrupted", file=sys.stderr)
        return SystemExit(INTERRUPTED)
    return (output_ending(error) if isinstance(error, OSError) else None) or UserError(_line(error))


def output_ending(error: OSError) -> SystemExit | None:
    """Returns what ends the program if standard output could not be written; None for an error of something else."""
    if isinstance(error, BrokenPipeError) and _has_no_reader():
        _flush()
        return SystemExit(BROKEN_PIPE)
    end = _flush()
    # If output is not buffered, nothing is left to be written, and only the statement tells.
    if end is None and _statement(error).startswith("print("):
        end = _not_written(error)
    return end if error.filename is None else None


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not is_command():
        sys.__excepthook__(kind, error, trace)
        return
    end = ending(error)
    _tell_torchrun(end)
    raise end


def _log_not_written(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Ends a command whose log cannot be written; logging itself would go on, with a traceback for each line."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError) or not is_command():
        _handle_error(handler, record)
        return
    _flush()
    if isinstance(handler, logging.FileHandler):
        raise UserError(f"the log {handler.baseFilename} cannot be written: {error.strerror}")
    raise _not_written(error)  # of standard error, nothing can be said


def is_command() -> bool:
    """Returns whether this program is a command of fairseq or of this package, rather than, say, a notebook."""
    program = Path(sys.argv[0] if sys.argv else "")
    return (
        program.name.startswith(("fairseq-", "xmoe"))
        or program.parent.name == "fairseq_cli"
        or Path(__file__).parents[1] in program.absolute().parents
    )


def _flush_at_end() -> None:
    """Python would end with a message of its own, and code 120, if the last output cannot be written."""
    if not is_command():
        return
    end = _flush()
    if end is not None:
        if isinstance(end, UserError):
            print(end, file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(1 if isinstance(end, UserError) else BROKEN_PIPE)


def _flush() -> SystemExit | None:
    """Writes what is left to standard output; if that fails, gives what ends the program, and drops what comes."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return _not_written(error)
    except (AttributeError, ValueError):  # there is none, or it is closed
        pass
    return None


def _not_written(error: OSError) -> SystemExit:
    if isinstance(error, BrokenPipeError):
        return SystemExit(BROKEN_PIPE)
    return UserError(f"standard output cannot be written: {error.strerror}")


def _has_no_reader() -> bool:
    """Returns whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such call, or no such file
        return False


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, FileNotFoundError | FileExistsError) and error.errno is None and text:  # of fairseq itself
        return f"{text}: {os.strerror(errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EEXIST)}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"standard output, or a file, cannot be written: {error.strerror}"
    if isinstance(error, ValueError) and "embedded null byte" in text:
        return (
            "the name of a file or folder holds a NUL byte, which no file system takes: check the names that are given"
        )
    if is_no_memory(error):
        return (
            f"there is not enough memory ({text or 'MemoryError'}): use a smaller --max-tokens, a smaller model, fewer "
            "lines, or a machine with more memory"
        )
    module = _origin(error)
    if isinstance(error, ValueError) and module.startswith("xmoe_fairseq.moe"):
        return text
    if isinstance(error, AssertionError | ValueError) and module.startswith("fairseq") and "--" in text:
        return text  # fairseq's own words about an option
    what = f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}: {_statement(error)}"
    log = _write_log(error)
    program, place = _program(error)
    if program in ("fairseq", "fairseq_cli"):
        return f"fairseq cannot continue ({what}, in {place}): check the options and the data; {log} has the details"
    return f"this is a fault of xmoe_fairseq ({what}): please report it with {log}, which has the traceback"


def is_no_memory(error: BaseException) -> bool:
    """Returns whether there was no memory, of the machine or a GPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def _origin(error: BaseException) -> str:
    """Names the module in which an exception was raised."""
    frames = _frames(error)
    return _module(frames[-1][0]) if frames else ""


def _program(error: BaseException) -> tuple[str, str]:
    """Names whose code, fairseq's or this package's, ran last, whatever library it called, and its module."""
    modules = [_module(frame) for frame, _ in _frames(error)]
    programs = [(module.partition(".")[0], module) for module in modules]
    ours = [one for one in programs if one[0] in ("fairseq", "fairseq_cli", _PACKAGE)]
    return ours[-1] if ours else ("", "")


def _module(frame: FrameType) -> str:
    """Names a frame's module, also that of a program that Python was started with, ``python -m fairseq_cli.train``."""
    name, spec = str(frame.f_globals.get("__name__", "")), frame.f_globals.get("__spec__")
    return str(spec.name) if name == "__main__" and spec is not None else name


def _statement(error: BaseException) -> str:
    """Returns the line of code that failed, for an error without words such as that of ``assert x > 0``."""
    trace = traceback.extract_tb(error.__traceback__)
    return (trace[-1].line or "").strip()[:_SHOWN] if trace else ""


def _write_log(error: BaseException) -> str:
    """Writes the traceback to a file of its own, and gives the file's name."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="xmoe_fairseq-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{sys.argv}\n{text}")
    except OSError:
        return "the command"
    return file.name
