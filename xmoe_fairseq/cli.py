"""The command ``xmoe``: ``xmoe COMMAND ...``, each command a module with ``main(argv)``."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

from .common import guard
from .common.command_line import quiet_libraries
from .errors import UserError

# By command: the module under this package, imported when the command runs, and a line for the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("commands.info", "Parameters and FLOPs per token of an architecture."),
    "checkpoint": (
        "commands.checkpoint",
        "Says what a checkpoint holds; splits, joins, averages checkpoints; adds languages.",
    ),
    "import": ("commands.import_model", "Makes a checkpoint from an M2M-100 or NLLB-200 model of another toolkit."),
    "export": ("commands.export_model", "Makes a folder for transformers from a dense or GShard checkpoint."),
    "upcycle": ("commands.upcycle", "Grows a dense model into an MoE model: by copies, slices or adapters."),
    "sparsify": ("commands.sparsify", "Cuts a dense model's feed-forward networks into experts."),
    "prune": ("commands.prune", "Leaves out the experts that a model needs least, or joins similar ones."),
    "prepare": ("data_prep.prepare", "Prepares text: download, clean, vocabulary, binary files."),
    "translate": ("commands.translate", "Translates a test set in all directions of a model, or in some."),
    "score": ("commands.score", "Translates the test sets with a checkpoint and scores them."),
    "compare": ("commands.compare", "Compares scored systems, with paired bootstrap."),
    "sweep": ("commands.sweep", "Measures quality against computation at many thresholds."),
    "analyze": ("commands.analyze", "Says where the capacity goes: by language, layer, token and position."),
    "study": ("commands.study", "Trains models with several seeds, scores them, tests claims about them."),
    "report": ("commands.report", "One page on a run: curves, scores, where the capacity goes, shaded translations."),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: the words after ``xmoe``; by default the program's own.

    Raises:
        UserError: the command is unknown, refuses its arguments, or fails.
    """
    with guard.one_line():
        _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])


def _run(words: list[str]) -> None:
    command, *rest = words
    if command in ("-h", "--help"):
        print(_help())
    elif command in COMMANDS:
        # Importing fairseq turns debugging on, and then every library tells what it imports.
        logging.disable(logging.INFO)
        # fairseq compiles some functions so, which torch 2.14 and later warn of.
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)
        module = importlib.import_module(f".{COMMANDS[command][0]}", __package__)
        logging.disable(logging.NOTSET)
        quiet_libraries()
        module.main(rest)
    else:
        raise UserError(f"xmoe has no command {command!r}: choose {', '.join(COMMANDS)}, or see xmoe --help")


def _help() -> str:
    return "\n".join(
        (
            "usage: xmoe COMMAND ...",
            "",
            "commands:",
            *(f"  {name:11} {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "xmoe COMMAND --help says more. Training and translation are fairseq's own commands with",
            "--user-dir xmoe_fairseq. Example: xmoe info --arch xmoe_transformer --vocab 32000",
        )
    )
