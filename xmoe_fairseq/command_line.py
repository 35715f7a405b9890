"""What is given to fairseq's commands, by words or by YAML: what is wrong with it is said in a line."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import os
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from .checkpoints import reading
from .errors import UserError

_CHOICE = re.compile(r"argument (?P<option>[^:]+): invalid choice: '?(?P<value>.*?)'? \(choose from (?P<choices>.*)\)")
_UNKNOWN = "unrecognized arguments: "
# Options of the stock multilingual task that tasks multilingual_* have not.
_FROM_DATA = ("--langs", "--lang-dict", "--source-dict", "--target-dict", "--fixed-dictionary")
# A message that lists more names is not read.
_FEW = 12
_SHOWN = 300


def checked(parse_args_and_arch: Any) -> Any:
    """Stock fairseq answers a misspelt architecture with the names of all, and reads ``--model-overrides`` after it
    has loaded the data; options that the checkpoint does not have change nothing."""

    @functools.wraps(parse_args_and_arch)
    def parse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parser.error = functools.partial(refuse, parser)  # type: ignore[method-assign]
        result = parse_args_and_arch(parser, *args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        overrides = {name: _dictionary(parsed, name) for name in ("model_overrides", "optimizer_overrides")}
        if overrides["model_overrides"] and getattr(parsed, "path", None):
            _check_overrides(parsed.path, overrides["model_overrides"])
        return result

    return parse


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Says what is wrong with a command line, with the name that was probably meant.

    Raises:
        UserError: always.
    """
    choice = _CHOICE.fullmatch(message)
    if choice:
        names = re.findall(r"[^\s,']+", choice["choices"])
        message = f"{choice['option']} {choice['value']} is unknown{_meant(choice['value'], names)}"
    elif message.startswith(_UNKNOWN):
        words = message.removeprefix(_UNKNOWN).split()
        unknown = [word.partition("=")[0] for word in words if word.startswith("-")] or words
        if unknown[0] in _FROM_DATA:
            message += ": tasks multilingual_* read languages and dictionary from the data folder, so leave it out"
        else:
            message += _meant(unknown[0], parser._option_string_actions)
    raise UserError(f"{message[:_SHOWN]}; see {os.path.basename(parser.prog)} --help")


def _meant(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.75)
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": choose from {', '.join(names)}" if len(names) <= _FEW else ""


def _dictionary(parsed: argparse.Namespace, name: str) -> dict[Any, Any]:
    text = getattr(parsed, name, None) or "{}"
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, dict):
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {text[:_SHOWN]!r} is no dictionary: write it as \"{{'moe_threshold': 0.5}}\"")
    return values


def _check_overrides(paths: str, overrides: dict[Any, Any]) -> None:
    from fairseq import utils

    from .checkpoints import options

    for path in utils.split_paths(paths):
        if os.path.isfile(path):  # what is missing is named where it is loaded
            state = reading.peek(path)
            options.check(state, path)
            options.check_overrides(state, overrides, path)


def checked_yaml(add_defaults: Any) -> Any:
    """Stock fairseq's and hydra's answers to a wrong name or value in YAML are tracebacks."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    @functools.wraps(add_defaults)
    def add(cfg: Any) -> None:
        if HydraConfig.initialized():
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra itself prints tracebacks, and guard.py sees none
        _check_names(cfg)
        try:
            add_defaults(cfg)
        except OmegaConfBaseException as error:
            raise UserError(_yaml_line(error)) from error

    return add


def _check_names(cfg: Any) -> None:
    from fairseq import models, tasks
    from fairseq.registry import REGISTRIES

    known = {
        "task": tasks.TASK_REGISTRY,
        "model": {**models.MODEL_REGISTRY, **models.ARCH_MODEL_REGISTRY},
        **{kind: registry["registry"] for kind, registry in REGISTRIES.items()},
    }
    for kind, names in known.items():
        section = cfg.get(kind)
        name = section if isinstance(section, str) else getattr(section, "_name", None)
        if isinstance(name, str) and name not in names:
            raise UserError(f"{kind}._name: {name} is unknown{_meant(name, names)}")


def _yaml_line(error: Any) -> str:
    """Says what is wrong with a value in YAML: the option, the value, and what it may be."""
    text = str(error).split("\n")[0]
    kind, name = getattr(error, "object_type", None), getattr(error, "key", None)
    option = getattr(error, "full_key", None) or name or "the configuration"
    known = getattr(kind, "__dataclass_fields__", {})
    hint = _meant(str(name), known) if name is not None and known and name not in known else ""
    return f"{option}: {text[:_SHOWN]}{hint}"
