"""How a model was trained to see languages: these options of its checkpoint hold unless a command is given others."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from . import options, reading

logger = logging.getLogger(__name__)

# Options of the multilingual tasks that change what a model reads, and none of its parameters.
OPTIONS = ("encoder_langtok", "decoder_langtok", "lang_tok_style", "lang_tok_replacing_bos_eos")


def adopt(parser: argparse.ArgumentParser, parsed: argparse.Namespace, words: Sequence[str] | None) -> None:
    """Sets the options that were not given to what the checkpoints of ``--path`` were trained with.

    Stock fairseq translates with the defaults of the command, and a model that was trained with others translates badly
    and in silence. What is given holds, with a warning if the model was trained with something else.

    Args:
        parser: of the command, with the options of its task.
        parsed: what it made of the words; is changed.
        words: of the command line; None for those of the program.

    Raises:
        UserError: the checkpoints were trained with different ones.
    """
    from fairseq import utils

    paths = utils.split_paths(getattr(parsed, "path", None) or "")
    found = {path: trained for path in paths if os.path.isfile(path) and (trained := _trained(path))}
    if not found or not hasattr(parsed, OPTIONS[0]):
        return
    given = _given(parser, parsed, words)
    for name in filter(lambda one: hasattr(parsed, one), OPTIONS):  # stock multilingual_translation has two of them
        values = {path: trained[name] for path, trained in found.items() if name in trained}
        path, value = next(iter(values.items()), ("", getattr(parsed, name)))
        other = next((one for one in values if values[one] != value), None)
        if name in given:
            if given[name] != value:
                logger.warning(
                    f"{_flag(name)} is {_shown(given[name])}, but {path} was trained with {_shown(value)}: it reads "
                    "what it never saw"
                )
        elif other is not None:
            raise UserError(
                f"{path} was trained with {_flag(name)} {_shown(value)}, {other} with {_shown(values[other])}: models "
                "that see languages differently do not translate together"
            )
        else:
            setattr(parsed, name, value)


def warn_of_others(state: Mapping[str, Any], path: str, task: argparse.Namespace) -> None:
    """Says that training resumes with other options than before, which fine-tuning may want.

    Args:
        state: of the checkpoint.
        path: of its file.
        task: options of the task that goes on.
    """
    for name, value in _of_task(state).items():
        if hasattr(task, name) and getattr(task, name) != value:
            logger.warning(
                f"{path} was trained with {_flag(name)} {_shown(value)}, training resumes with "
                f"{_shown(getattr(task, name))}: the model has to learn again what languages look like"
            )


def _trained(path: str) -> Mapping[str, Any]:
    """Returns the options of a checkpoint's task; none if fairseq will refuse the file."""
    try:
        return _of_task(reading.peek(path))
    except UserError:
        return {}


def _of_task(state: Mapping[str, Any]) -> Mapping[str, Any]:
    task = options.sections(state).get("task", {})
    return {name: task[name] for name in OPTIONS if name in task}


def _given(parser: argparse.ArgumentParser, parsed: argparse.Namespace, words: Sequence[str] | None) -> dict[str, Any]:
    """Returns the options that are among the words, as `fairseq.options` finds them for fairseq-validate."""
    without_defaults = argparse.ArgumentParser(add_help=False, allow_abbrev=False, parents=[parser])
    without_defaults.set_defaults(**dict.fromkeys(vars(parsed)))
    known, _ = without_defaults.parse_known_args(words)
    return {name: getattr(known, name) for name in OPTIONS if getattr(known, name, None) is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return {None: "none", True: "on", False: "off"}.get(value, str(value))
