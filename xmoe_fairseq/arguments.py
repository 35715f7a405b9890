"""The parser of ``xmoe``'s commands."""

from __future__ import annotations

import argparse
import logging
import warnings
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


def comma_list(text: str) -> list[str]:
    """Reads words between commas, as ``--pairs en-ca,ca-en`` has them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def quiet_libraries() -> None:
    """Leaves only warnings of this project and errors on the terminal: importing fairseq turns debugging on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.|fairseq\.")
