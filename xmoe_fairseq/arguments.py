"""The parser of ``xmoe``'s commands."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from .errors import UserError


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

    def error(self, message: str) -> NoReturn:
        """Refuses the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; see {self.prog} --help")
