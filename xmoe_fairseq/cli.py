"""The command ``xmoe``: ``xmoe COMMAND ...``, each command a module with ``main(argv)``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from . import info
from .analysis import command as analysis
from .checkpoints import command
from .errors import UserError

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "info": info.main,
    "checkpoint": command.main,
    "analyze": analysis.main,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: the words after ``xmoe``; by default the program's own.

    Raises:
        UserError: the command is unknown, or refuses its arguments.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(_help())
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        raise UserError(f"xmoe has no command {command!r}: choose {', '.join(COMMANDS)}, or see xmoe --help")


def _help() -> str:
    lines = [f"  {name:11} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: xmoe COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            "xmoe COMMAND --help says more. Training and translation are fairseq's own commands with",
            "--user-dir xmoe_fairseq. Example: xmoe info --arch xmoe_transformer --vocab 32000",
        )
    )
