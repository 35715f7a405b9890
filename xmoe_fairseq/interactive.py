"""What stock ``fairseq-interactive`` reads: as many sentences as the input has lines, whatever its bytes are."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, BinaryIO

from .errors import UserError

logger = logging.getLogger(__name__)

# Bytes of a line that are read; what has more is no sentence, and too long for any model.
_LONGEST_LINE = 1 << 20
# What the command would print behind the probabilities of a soft alignment.
_SOFT = "\0"


def whole_lines(add_interactive_args: Any) -> Any:
    """Stock fairseq ends a line of a file at a carriage return too, takes a byte order mark for text, ends where a byte
    is not UTF-8, makes words of a blank line, and fails on soft alignments.

    Wraps what the command calls before it reads.
    """

    @functools.wraps(add_interactive_args)
    def add(*args: Any, **kwargs: Any) -> Any:
        for module in running("fairseq_cli.interactive"):
            _mend(module)
        return add_interactive_args(*args, **kwargs)

    return add


def running(command: str) -> Iterator[Any]:
    """Gives the module of a command of fairseq, which has another name under ``python -m``."""
    for name in (command, "__main__"):
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "name", None) == command:
            yield module


def _mend(module: Any) -> None:
    from fairseq import utils
    from fairseq.tasks import FairseqTask

    from .tasks.decoding import blank_stays_blank

    module.buffered_read = buffered_read
    module.print = _print
    module.utils = SimpleNamespace(**{**vars(utils), "post_process_prediction": _pairs})
    if FairseqTask.inference_step.__globals__["__name__"] == FairseqTask.__module__:
        FairseqTask.inference_step = blank_stays_blank(FairseqTask.inference_step)


def _pairs(*args: Any, **kwargs: Any) -> tuple[Any, str, Any]:
    """Is fairseq's function, but for soft alignments: the command prints pairs only, so each token's probabilities are
    put into a pair that `_print` takes apart."""
    from fairseq import utils

    tokens, text, alignment = utils.post_process_prediction(*args, **kwargs)
    if isinstance(alignment, list) and alignment and isinstance(alignment[0], list):
        alignment = [(",".join(probabilities), _SOFT) for probabilities in alignment]
    return tokens, text, alignment


def _print(line: str) -> None:
    print(line.replace(f"-{_SOFT}", "") if line.startswith("A-") else line)


def buffered_read(path: str, size: int) -> Iterator[list[str]]:
    """Yields the lines of a file in groups, as fairseq's function of this name.

    Lines end at line feeds alone, as for data_prep/prepare.sh. A byte that is not UTF-8 becomes U+FFFD.

    Args:
        path: of the file, ``-`` for standard input.
        size: lines of a group.

    Raises:
        UserError: the file cannot be read.
    """
    group: list[str] = []
    with ExitStack() as stack:
        try:
            stream = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise UserError(f"--input {path!r} cannot be read: {error.strerror}") from error
        for line in _lines(stream):
            group.append(line)
            if len(group) >= size:
                yield group
                group = []
    if group:
        yield group


def _lines(stream: BinaryIO) -> Iterator[str]:
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(_LONGEST_LINE)):
            pass
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
        if text.count("\ufffd") > line.count("\ufffd".encode()):
            logger.warning(f"line {number} of the input is not UTF-8: each wrong byte is read as U+FFFD")
        yield text.strip()
