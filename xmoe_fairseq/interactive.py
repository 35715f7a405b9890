"""What stock ``fairseq-interactive`` reads: as many sentences as the input has lines, whatever its bytes are."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

from .errors import UserError

logger = logging.getLogger(__name__)

# Bytes of a line that are read; what has more is no sentence, and too long for any model.
_LONGEST_LINE = 1 << 20


def whole_lines(add_interactive_args: Any) -> Any:
    """Stock fairseq ends a line of a file at a carriage return too, takes a byte order mark for text, and ends where a
    byte is not UTF-8. Wraps what the command calls before it reads."""

    @functools.wraps(add_interactive_args)
    def add(*args: Any, **kwargs: Any) -> Any:
        for module in running("fairseq_cli.interactive"):
            module.buffered_read = buffered_read
        return add_interactive_args(*args, **kwargs)

    return add


def running(command: str) -> Iterator[Any]:
    """Gives the module of a command of fairseq, which has another name under ``python -m``."""
    for name in (command, "__main__"):
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "name", None) == command:
            yield module


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
