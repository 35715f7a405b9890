"""The parser of ``xmoe``'s commands."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import UserError

_Number = TypeVar("_Number", int, float)
# Characters of an argument that a message shows.
_SHOWN = 40


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are a line each, and whose examples stay as they are written.

    Args:
        prog: the command, such as ``xmoe info``.
        epilog: examples.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, epilog: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, epilog=epilog, allow_abbrev=False, **options)

    def print_help(self, file: Any = None) -> None:
        """Prints the help; argparse itself is silent if nothing can be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def comma_list(text: str) -> list[str]:
    """Reads words between commas, as ``--pairs en-ca,ca-en`` has them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def bounded(kind: type[_Number], least: _Number, most: _Number) -> Callable[[str], _Number]:
    """Makes a type of arguments: numbers between two, the ends included; NaN is not between any.

    Args:
        kind: ``int`` or ``float``.
        least, most: the ends, which messages name.
    """
    ends = f"[{least:,}, {most:,}]" if kind is int else f"[{least:g}, {most:g}]"

    def read(text: str) -> _Number:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        try:
            number = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown!r} is not {what} in {ends}") from error
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{shown} is out of range: it must be in {ends}")
        return number

    return read


def file_path(text: str) -> Path:
    """Reads the name of a file or a folder; one that is empty, as of a variable that is not set, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty: was a variable not set?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the name {text!r} is not UTF-8: rename it") from error
    return Path(text)


def quiet_libraries() -> None:
    """Leaves only warnings of this project and errors on the terminal: importing fairseq turns debugging on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|fairseq|hydra)\.")
    # hydra's, too, but told of whoever calls fairseq.
    warnings.filterwarnings("ignore", r"\s*'config' is validated against ConfigStore", UserWarning)
