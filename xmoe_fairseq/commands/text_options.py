"""The options of commands that read prepared text with a trained model, and what they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..common.command_line import bounded, comma_list
from ..evaluation.direction_dataset import DirectionDataset, directions, read
from ..evaluation.model_directions import Chosen
from ..evaluation.trained_model import TrainedModel

_NO_ALIASES: Mapping[str, str] = MappingProxyType({})


def add_text_options(
    parser: argparse.ArgumentParser,
    subset: str,
    max_tokens: int,
    kind: Callable[[str], str] = str,
    keep_unset: bool = False,
    aliases: Mapping[str, str] = _NO_ALIASES,
) -> None:
    """Adds ``--pairs``, ``--subset``, ``--lines`` and ``--max-tokens``.

    Args:
        parser: of the command.
        subset, max_tokens: the defaults.
        kind: reads the name of a subset.
        keep_unset: leaves options that are not given at None, for a command that has to know.
        aliases: other names of these options.
    """
    allowed = "train, valid, test, test1, ..." if kind is str else "test, valid, test1, ..."
    parser.add_argument(
        "--pairs",
        type=comma_list,
        default=[],
        metavar="SRC-TGT,...",
        help="directions, such as en-de,de-en (default: all trained ones)",
    )
    # A command that has to know whether lines are limited has no number for all of them.
    lines = "the first N (default: all)" if keep_unset else "the first N; 0 for all (default: 0)"
    for name, reads, default, metavar, meaning in (
        ("--subset", kind, subset, "SET", f"{allowed} (default: {subset})"),
        ("--lines", bounded(int, int(keep_unset), 10**9), 0, "N", f"of each direction, {lines}"),
        ("--max-tokens", bounded(int, 1, 10**9), max_tokens, "N", f"the most of a batch (default: {max_tokens})"),
    ):
        parser.add_argument(
            name,
            *([aliases[name]] if name in aliases else []),
            dest=name.removeprefix("--").replace("-", "_"),
            type=reads,
            default=None if keep_unset else default,
            metavar=metavar,
            help=meaning,
        )


def load_model(args: argparse.Namespace) -> tuple[TrainedModel, Chosen | None]:
    """Loads the model for the directions of ``--pairs``, or for all that it was trained on.

    Args:
        args: ``checkpoint``, ``data`` and the options of `add_text_options`.

    Raises:
        UserError: a direction is unknown, or a file is missing or refused.
    """
    chosen = directions(args.checkpoint, args.data, args.subset, [] if args.pairs == ["all"] else args.pairs)
    return TrainedModel.load(args.checkpoint, args.data, chosen.pairs if chosen else ()), chosen


def read_text(trained: TrainedModel, args: argparse.Namespace) -> list[DirectionDataset]:
    """Opens the text of a loaded model, one dataset per direction.

    Raises:
        UserError: as of `direction_dataset.read`.
    """
    return read(trained.task, trained.model, args.subset, args.lines, args.max_tokens)
