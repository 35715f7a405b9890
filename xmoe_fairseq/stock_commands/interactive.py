"""What stock ``fairseq-interactive`` reads: as many sentences as the input has lines, whatever its bytes are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType
from typing import Any, BinaryIO

from fairseq import utils

from ..errors import UserError

logger = logging.getLogger(__name__)

# Bytes of a line that are read; what has more is no sentence, and too long for any model.
_LONGEST_LINE = 1 << 20
# What the command would print behind the probabilities of a soft alignment.
_SOFT = "\0"


def running(command: str) -> Iterator[Any]:
    """Yields the module of a command of fairseq, which has another name under ``python -m``."""
    for name in (command, "__main__"):
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "name", None) == command:
            yield module


class _Utils(ModuleType):
    """``fairseq.utils``, but for soft alignments: the command prints pairs only, so each token's probabilities are put
    into a pair that `show` takes apart."""

    @staticmethod
    def post_process_prediction(*args: Any, **kwargs: Any) -> tuple[Any, str, Any]:
        """Is fairseq's function, with the soft alignment as pairs."""
        tokens, text, alignment = utils.post_process_prediction(*args, **kwargs)
        if isinstance(alignment, list) and alignment and isinstance(alignment[0], list):
            alignment = [(",".join(probabilities), _SOFT) for probabilities in alignment]
        return tokens, text, alignment

    def __getattr__(self, name: str) -> Any:
        return getattr(utils, name)


UTILS = _Utils("fairseq.utils")


def show(line: str) -> None:
    """Prints a line of the command's output."""
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
