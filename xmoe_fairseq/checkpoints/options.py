"""What the options that a checkpoint was saved with may be, checked before any of them reaches fairseq.

fairseq builds what a checkpoint names: any task and model that is registered. Here a name must be that of a text task
or a sequence-to-sequence or language model, and the value of each option must have the type that the task's and the
model's own declarations give it. Nothing is imported for a checkpoint, and its ``user_dir`` is not looked at.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import enum
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, open_dict

from ..errors import UserError
from ..models.config_checks import check_sizes

# Stock tasks that read text; the others read speech, with options that name programs to run.
_STOCK_TASKS = frozenset(
    "translation translation_lev translation_multi_simple_epoch translation_from_pretrained_bart "
    "translation_from_pretrained_xlm multilingual_translation semisupervised_translation online_backtranslation "
    "simul_text_to_text denoising multilingual_denoising language_modeling multilingual_language_modeling".split()
)
_NOT_TEXT = ("speech", "text_to_speech", "wav2vec", "hubert", "huggingface")

# Not an option of a checkpoint: --model-overrides "{'ema_weights': True}" takes its parameters' moving averages.
AVERAGES = "ema_weights"

_MOST_CHARACTERS, _MOST_VALUES, _MOST_DEPTH = 1_000_000, 200_000, 16
_SHOWN = 60

Check = Callable[[Any], bool]


class _Refused(Exception):
    """Says what is wrong, without the file."""


def check(state: Mapping[str, Any], path: str) -> None:
    """Checks the options of a checkpoint.

    Args:
        state: what the file holds; options are in ``cfg``, or ``args`` in files of older versions.
        path: of the file.

    Raises:
        UserError: names the option, its value and what it may be.
    """
    try:
        for name in ("cfg", "args"):
            if state.get(name) is not None:
                _check_plain(state[name], name)
        for kind, section in sections(state).items():
            _check_section(kind, section, as_text=state.get("args") is not None)
    except _Refused as error:
        raise UserError(f"checkpoint {path} is refused: {error}. Nothing of it was run") from error


def check_complete(state: Mapping[str, Any], path: str) -> None:
    """Checks that a model can be built from a checkpoint alone.

    Raises:
        UserError: the file does not say what model and task it is of.
    """
    found = sections(state)
    for kind in ("task", "model"):
        if kind not in found:
            raise UserError(
                f"checkpoint {path} does not say of what {kind} it is (no cfg.{kind}): only parameters are in it; use "
                "a file that fairseq-train wrote, or train from its parameters with --finetune-from-model"
            )


def check_overrides(
    state: Mapping[str, Any], overrides: Mapping[Any, Any], path: str, by: str = "--model-overrides"
) -> None:
    """Checks what ``--model-overrides`` changes: options that the checkpoint has, or its task or model declares.

    Args:
        state: what the file holds.
        overrides: values by option.
        path: of the file.
        by: what changes them, for messages.

    Raises:
        UserError: an option is unknown, or its value has the wrong type.
    """
    found = sections(state)
    declared = {kind: dict(_declared(kind, _name(kind, section))) for kind, section in found.items()}
    options = state.get("cfg")
    known = {*_all_names(_values(options) if options is not None else {})}
    known |= {AVERAGES, *(name for section in (*found.values(), *declared.values()) for name in section)}
    if not isinstance(overrides.get(AVERAGES, False), bool):
        raise UserError(f"{by}: {AVERAGES} is {_show(overrides[AVERAGES])}, it must be True or False")
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{by}: {path} has no option {name!r}{near(str(name), known)}")
        for checks in declared.values():
            if name in checks and not checks[name].holds(value):
                raise UserError(f"{by}: {name} is {_show(value)}, it must be {checks[name].text}")
    _check_overridden_sizes(overrides, by)


def override_missing(cfg: Any, overrides: Mapping[Any, Any]) -> None:
    """Sets options that an older checkpoint does not have; fairseq changes only those that it has, and ignores others.

    Args:
        cfg: the checkpoint's options, a ``DictConfig``, which is changed; None in files of older versions.
        overrides: values by option, as they were checked.
    """
    for kind in ("task", "model"):
        section = cfg.get(kind) if isinstance(cfg, DictConfig) else None
        if not isinstance(section, DictConfig) or not overrides:
            continue
        missing = {name: value for name, value in overrides.items() if name not in section}
        declared = dict(_declared(kind, _name(kind, section))) if missing else {}
        with open_dict(section):
            section.update({name: value for name, value in missing.items() if name in declared})


def _check_overridden_sizes(overrides: Mapping[Any, Any], by: str) -> None:
    try:
        check_sizes(overrides)
    except ValueError as error:
        raise UserError(f"{by}: {error}") from error


def sections(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the options of the task and of the model, as far as the file has them."""
    if state.get("args") is not None:
        values = _values(state["args"])
        found = {"task": {"_name": "translation", **_renamed(values, "task")}, "model": _renamed(values, "arch")}
        return {kind: section for kind, section in found.items() if section.get("_name") is not None}
    options = _values(state["cfg"]) if state.get("cfg") is not None else {}
    return {kind: _values(options[kind]) for kind in ("task", "model") if options.get(kind) is not None}


def _renamed(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Old files hold all options side by side; ``name`` is the one that names the class."""
    return {**values, "_name": values[name]} if name in values else dict(values)


def near(name: str, known: Any) -> str:
    """Gives `, did you mean ...?` if a known name is like the one that was given."""
    found = difflib.get_close_matches(name, [one for one in known if isinstance(one, str)], n=1)
    return f", did you mean {found[0]}?" if found else ""


def _values(section: Any) -> Mapping[str, Any]:
    if isinstance(section, argparse.Namespace):
        section = vars(section)
    if not isinstance(section, Mapping):
        raise _Refused(f"its options are {_show(section)}, they must be names with values")
    return section


def _all_names(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield name
        if isinstance(value, (Mapping, argparse.Namespace)):
            yield from _all_names(_values(value))


def _check_plain(options: Any, place: str) -> None:
    """Refuses what is no tree of plain values of a sensible size, or would be replaced by something else."""
    left = [(options, place, 0)]
    seen = 0
    while left:
        value, at, depth = left.pop()
        seen += 1
        if depth > _MOST_DEPTH or seen > _MOST_VALUES:
            raise _Refused(f"its options are nested or repeated without end ({at[:_SHOWN]})")
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if not isinstance(name, (str, int, float, bool)) and name is not None:
                    raise _Refused(f"a name in {at} is {_show(name)}, it must be text")
                left.append((inner, f"{at}.{_show(name) if not isinstance(name, str) else name[:_SHOWN]}", depth + 1))
        elif isinstance(value, (list, tuple, set)):
            left.extend((inner, at, depth + 1) for inner in value)
        elif isinstance(value, str):
            if len(value) > _MOST_CHARACTERS:
                raise _Refused(f"{at} is a text of {len(value)} characters")
            if "${" in value:  # OmegaConf would put something else in its place
                raise _Refused(f"{at} is {_show(value)}, which stands for the value of something else")
        elif value is not None and not isinstance(value, (bool, int, float, complex)):
            raise _Refused(f"{at} is a {type(value).__name__}, it must be a plain value")
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise _Refused(f"{at} is a whole number of {value.bit_length()} bits")


def _check_section(kind: str, section: Mapping[str, Any], as_text: bool) -> None:
    """as_text: files of older versions hold numbers as text, too, which fairseq reads as literals."""
    name = _name(kind, section)
    for option, declaration in _declared(kind, name):
        if option not in section or declaration.holds(section[option]):
            continue
        if not as_text or not declaration.holds(_read_literal(section[option])):
            raise _Refused(f"cfg.{kind}.{option} is {_show(section[option])}, it must be {declaration.text}")
    try:
        check_sizes(section)
    except ValueError as error:
        raise _Refused(f"of its {kind}'s options, {error}") from error


def _read_literal(value: Any) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value


def _name(kind: str, section: Mapping[str, Any]) -> str:
    """Returns the name of the task or model, which must be allowed."""
    names = [section[key] for key in ("_name", "arch") if section.get(key) and (kind == "model" or key == "_name")]
    if not names:
        raise _Refused(f"cfg.{kind} does not name its {kind} (no _name)")
    allowed = _allowed(kind)
    for name in names:
        if not isinstance(name, str) or name not in allowed:
            what = "task" if kind == "task" else "architecture"
            raise _Refused(
                f"its {what} is {_show(name)}, which is no {what} of text that is registered here"
                f"{near(str(name), allowed) or ';'} that of another plugin needs its --user-dir"
            )
    return str(names[0])


def _allowed(kind: str) -> Mapping[str, type]:
    from fairseq import models, tasks

    if kind == "task":
        registered = tasks.TASK_REGISTRY
        return {n: task for n, task in registered.items() if not _is_stock(task) or n in _STOCK_TASKS}
    families = (models.FairseqEncoderDecoderModel, models.FairseqMultiModel, models.FairseqLanguageModel)
    return {
        name: model
        for name, model in {**models.MODEL_REGISTRY, **models.ARCH_MODEL_REGISTRY}.items()
        if not _is_stock(model)
        or (issubclass(model, families) and not model.__module__.removeprefix("fairseq.models.").startswith(_NOT_TEXT))
    }


def _is_stock(registered: type) -> bool:
    return registered.__module__.partition(".")[0] == "fairseq"


@dataclasses.dataclass(frozen=True)
class _Declaration:
    """What an option may be.

    Attributes:
        holds: says whether a value is allowed.
        text: what a message says of it.
    """

    holds: Check
    text: str


def _declared(kind: str, name: str) -> Iterator[tuple[str, _Declaration]]:
    """Lists the options of a task or model: of its dataclass, or else of its command line."""
    from fairseq import models, tasks

    if kind == "task":
        registered, dataclass = tasks.TASK_REGISTRY[name], tasks.TASK_DATACLASS_REGISTRY.get(name)
    else:
        registered = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY[name]
        dataclass = models.MODEL_DATACLASS_REGISTRY.get(name)
    if dataclass is not None:
        for field in dataclasses.fields(dataclass):
            if not field.name.startswith("_"):
                yield field.name, _of_field(field)
        return
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    registered.add_args(parser)
    for action in parser._actions:
        yield action.dest, _of_action(action)


_OR_NONE = ", or None"


def _of_field(field: Any) -> _Declaration:
    """Of a dataclass's option; a default from another section (II) may be anything of the type, or nothing."""
    plain = _of_type(field.type)
    default = field.default
    open_default = default is None or (isinstance(default, str) and default.startswith("${"))
    if open_default:
        text = plain.text.removesuffix(_OR_NONE) + _OR_NONE
        return _Declaration(lambda value: value is None or plain.holds(value), text)
    return plain


def _of_type(kind: Any) -> _Declaration:
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    if typing.get_origin(kind) is typing.Union and inner:
        choices = [_of_type(one) for one in inner]
        text = " or ".join(choice.text for choice in choices)
        return _Declaration(lambda v: v is None or any(choice.holds(v) for choice in choices), text + _OR_NONE)
    if typing.get_origin(kind) is list and inner:
        item = _of_type(inner[0])
        return _Declaration(
            lambda value: isinstance(value, (list, tuple)) and all(map(item.holds, value)), f"a list, each {item.text}"
        )
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        names = [str(member.value) for member in kind]
        return _Declaration(lambda v: str(getattr(v, "value", v)) in names, f"one of {', '.join(names)}")
    return _PLAIN.get(kind, _ANYTHING)


def _of_action(action: argparse.Action) -> _Declaration:
    """Of an option of the command line; what has a parser of its own, or none, may be anything plain, and what is read
    as true or false, such as ``--left-pad-source``, is so once its task has read it."""
    if isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
        plain = _PLAIN[bool]
    elif action.nargs is not None:
        plain = _ANYTHING
    else:
        plain = _PLAIN.get(action.type, _ANYTHING)
    read = bool if action.default in ("True", "False") else ()
    return _Declaration(
        lambda value: value is None or value == action.default or isinstance(value, read) or plain.holds(value),
        plain.text,
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, (bool, int))


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not (isinstance(value, float) and math.isnan(value))


_ANYTHING = _Declaration(lambda value: True, "anything")
_PLAIN: dict[Any, _Declaration] = {
    bool: _Declaration(_is_whole, "true or false"),
    int: _Declaration(_is_whole, "a whole number"),
    float: _Declaration(_is_number, "a number"),
    str: _Declaration(lambda value: isinstance(value, str), "text"),
}


def _show(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # such as a whole number of thousands of digits
        shown = f"a {type(value).__name__}"
    shown = " ".join(shown.split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
