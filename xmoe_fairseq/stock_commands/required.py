"""Options that a command of stock fairseq cannot do without: named before it reads anything."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from ..errors import UserError

# What fairseq gives an option of text that was not given and has no default.
MISSING = "???"


def require(parser: argparse.ArgumentParser) -> None:
    """Makes a parser refuse a command line that lacks one of these options.

    Stock fairseq fails without --arch before it has looked at --task, and without --optimizer after it has built the
    model.

    Args:
        parser: of a command of fairseq.
    """
    needed = ("task", "path") if _loads(parser) else ("task", "arch", "optimizer")
    for action in parser._actions:
        action.required |= action.dest in needed and action.default is None


def check_given(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Looks for options that another one needs, such as ``--bpe sentencepiece`` the name of its model.

    Raises:
        UserError: names what is missing, and what needs it.
    """
    from fairseq.registry import REGISTRIES

    built = ("bpe", "tokenizer") if hasattr(parsed, "beam") else () if _loads(parser) else ("optimizer", "lr_scheduler")
    for kind in built:
        choice = getattr(parsed, kind, None)
        part = REGISTRIES[kind]["dataclass_registry"].get(choice)
        for field in dataclasses.fields(part) if part is not None else ():
            value = getattr(parsed, field.name, "")
            if value == MISSING or (value is None and not _may_be_none(field.type)):
                raise UserError(f"--{_dashes(field.name)} is missing: --{_dashes(kind)} {choice} needs it")


def _loads(parser: argparse.ArgumentParser) -> bool:
    """Returns whether a command loads a trained model, rather than trains one."""
    return "--path" in parser._option_string_actions


def _may_be_none(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _dashes(name: str) -> str:
    return name.replace("_", "-")
