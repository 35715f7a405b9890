"""fairseq's multilingual options as a dataclass, so that they also work from YAML.

Stock ``translation_multi_simple_epoch`` knows only the command line. Its own parser is read here and not
copied: each option becomes a field of the same name, default and help.
"""

# No `from __future__ import annotations` here: fairseq wants the types of fields, not their names.
import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask


def _stock_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    TranslationMultiSimpleEpochTask.add_args(parser)
    return parser


def stock_dataclass(name: str, leave_out: Collection[str], defaults: Mapping[str, Any]) -> Any:
    """Makes a dataclass of the stock task's options, but for those in ``leave_out``; some with other defaults."""
    fields = []
    for action in _stock_parser()._actions:
        if action.dest in leave_out:
            continue
        default = defaults.get(action.dest, action.default)
        help_text = " ".join((action.help or "").split()).replace("%(default)s", str(action.default))
        metadata = {"help": help_text}
        if len(action.option_strings) > 1:
            metadata["argparse_alias"] = action.option_strings[0]  # -s, -t
        fields.append((action.dest, _type(action, default), dataclasses.field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass(name, fields, bases=(FairseqDataclass,))


def _type(action: argparse.Action, default: Any) -> Any:
    """The field's type; values with a parser of their own stay strings until `stock_namespace`."""
    if isinstance(action, argparse._StoreTrueAction):
        return bool
    if action.choices:
        choices: Any = ChoiceEnum([str(choice) for choice in action.choices])
        return choices if default is not None else Optional[choices]
    plain = action.type if action.type in (int, float) else str
    return plain if default is not None else Optional[plain]


def stock_namespace(values: dict[str, Any]) -> argparse.Namespace:
    """Returns the options of a stock task, completed as its own command line would have completed them.

    Args:
        values: the dataclass's values; options missing there take the stock default.
    """
    parser = _stock_parser()
    for action in parser._actions:
        value = values.get(action.dest, action.default)
        if isinstance(value, str) and callable(action.type):
            value = action.type(value)
        values[action.dest] = value
    return argparse.Namespace(**values)
