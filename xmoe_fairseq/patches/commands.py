"""What the stock commands `fairseq-interactive` and `fairseq-generate` read and write."""

from __future__ import annotations

from typing import Any

import fairseq.utils
from fairseq import options
from fairseq.tasks import FairseqTask

from ..stock_commands import generate, interactive, preprocess
from ..tasks import decoding
from .registry import ABSENT, Group, Replacement, install

GROUP = Group("Commands")
INTERACTIVE = Group("fairseq-interactive", "when the command reads its options")
GENERATE = Group("fairseq-generate", "when the command reads its options")
_INTERACTIVE, _GENERATE = "fairseq_cli.interactive", "fairseq_cli.generate"


@GROUP.patch(options, "add_interactive_args", "parser")
def add_interactive_args(stock: Any, parser: Any) -> Any:
    """The patches of `fairseq-interactive` are installed."""
    if any(interactive.running(_INTERACTIVE)):
        install(INTERACTIVE)
    return stock(parser)


@GROUP.patch(options, "add_generation_args", "parser")
def add_generation_args(stock: Any, parser: Any) -> Any:
    """The patches of `fairseq-generate` are installed."""
    if any(interactive.running(_GENERATE)):
        install(GENERATE)
    return stock(parser)


@GROUP.patch(options, "add_preprocess_args", "parser")
def add_preprocess_args(stock: Any, parser: Any) -> Any:
    """`fairseq-preprocess` waits for a named pipe, and answers bytes that are not UTF-8 with a position before the
    file's beginning: its files are checked first."""
    preprocess.check_files(parser)
    return stock(parser)


@INTERACTIVE.patch(FairseqTask, "inference_step", "self generator models sample prefix_tokens constraints")
def inference_step(stock: Any, task: Any, generator: Any, models: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
    """A source without text has an empty translation; a model makes words of it."""
    return decoding.without_text(task, generator, sample, stock(task, generator, models, sample, *args, **kwargs))


def _in_command(group: Group, command: str, name: str, stock: Any, new: Any, why: str) -> None:
    group.changes.append(Replacement(command, lambda: interactive.running(command), name, stock, new, why))


_in_command(
    *(INTERACTIVE, _INTERACTIVE, "buffered_read", None, interactive.buffered_read),
    "Stock ends a line of a file at a carriage return too, takes a byte order mark for text, and ends where a byte is "
    "not UTF-8.",
)
_in_command(
    *(INTERACTIVE, _INTERACTIVE, "utils", fairseq.utils, interactive.UTILS),
    "Stock fails on soft alignments.",
)
_in_command(
    *(INTERACTIVE, _INTERACTIVE, "print", ABSENT, interactive.show),
    "Soft alignments are printed, for which the command has no form.",
)
_in_command(
    *(GENERATE, _GENERATE, "open", ABSENT, generate.open_whole),
    "Stock empties the old output before it reads the checkpoint, and leaves a part where it is killed.",
)
