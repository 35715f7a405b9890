"""What is given to fairseq's commands, by words or by YAML: what is wrong with it is said in a line."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoints import reading
from ..common.directions import read_file
from ..errors import UserError
from ..mt_benchmarks import BY_TASK
from .numbers import check_numbers
from .required import MISSING, check_given

_CHOICE = re.compile(r"argument (?P<option>[^:]+): invalid choice: '?(?P<value>.*?)'? \(choose from (?P<choices>.*)\)")
# Values of --post-process that leave no space between pieces.
_JOINS = ("sentencepiece", "wordpiece", "letter", "_EOW")
_UNKNOWN = "unrecognized arguments: "
# Options of the stock multilingual task that tasks multilingual_* have not.
_FROM_DATA = ("--langs", "--lang-dict", "--source-dict", "--target-dict", "--fixed-dictionary")
# A message that lists more names is not read.
_FEW = 12
_SHOWN = 300


def check(
    parser: argparse.ArgumentParser, parsed: argparse.Namespace, words: Sequence[str] | None, partial: bool
) -> None:
    """Checks what fairseq has parsed, and reads the files that options may name.

    Args:
        parser: fairseq's.
        parsed: what it gave, changed in place.
        words: the command line; None for the process's own.
        partial: whether options that are not given are left out of what is parsed.

    Raises:
        UserError: an option is out of range, names what the checkpoint does not have, or does not go with another.
    """
    check_given(parser, parsed)
    check_numbers(vars(parsed))
    _read_files(parsed, getattr(parsed, "task", None))
    _check_pieces(parsed)
    _check_results_path(parsed)
    overrides = {name: _dictionary(parsed, name) for name in ("model_overrides", "optimizer_overrides")}
    if overrides["model_overrides"] and getattr(parsed, "path", None):
        _check_overrides(parsed.path, overrides["model_overrides"])
    if not partial:
        from ..checkpoints import language_tokens  # needs fairseq, whose version is checked before

        language_tokens.adopt(parser, parsed, words)


def _read_files(options: Any, task: Any) -> None:
    """Reads the files that DATA and ``--lang-pairs`` may name, as stock fairseq does: a checkpoint keeps what they
    hold. The stock tasks read them themselves."""
    if task not in BY_TASK:
        return
    for name in ("data", "lang_pairs"):
        value = getattr(options, name, None)
        if isinstance(value, str):
            setattr(options, name, read_file(value))


def _check_pieces(parsed: argparse.Namespace) -> None:
    """Refuses to join pieces twice: fairseq joins them, and ``--bpe`` would take the words for pieces."""
    bpe, join = getattr(parsed, "bpe", None), getattr(parsed, "post_process", None)
    joined = bpe == "sentencepiece_bytes" and join not in (None, "none")
    if joined or (bpe == "sentencepiece" and join in _JOINS):
        raise UserError(
            f"--post-process (or --remove-bpe) {str(join).strip()} with --bpe {bpe} joins the pieces twice, and spaces "
            "are lost: leave it out, the D- lines are plain text without it"
        )


def _check_results_path(parsed: argparse.Namespace) -> None:
    folder = getattr(parsed, "results_path", None)
    subset = getattr(parsed, "gen_subset", None)  # fairseq-validate writes nothing there
    if folder and subset:
        from ..common.outputs import check_no_folders, check_writable
        from .generate import generate_file

        check_writable(Path(folder), "--results-path")
        check_no_folders([Path(folder) / generate_file(subset)])


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Returns what is wrong with a command line, with the name that was probably meant.

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
    message = message.replace("invalid <lambda> value", "not of the right form")
    message = re.sub(rf"invalid \w+ value: '{re.escape(MISSING)}'", "it is missing", message)
    raise UserError(f"{message[:_SHOWN]}; see {os.path.basename(parser.prog)} --help")


def print_help(parser: argparse.ArgumentParser, file: Any = None) -> None:
    """Prints a parser's help; argparse itself is silent if nothing can be written.

    Raises:
        OSError: it cannot be written.
    """
    print(parser.format_help(), end="", file=file)


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

    from ..checkpoints import options

    for path in utils.split_paths(paths):
        if os.path.isfile(path):  # what is missing is named where it is loaded
            state = reading.peek(path)
            options.check(state, path)
            options.check_overrides(state, overrides, path)


def check_yaml(cfg: Any) -> None:
    """Checks the names and numbers of a configuration, and reads the files that options may name.

    Raises:
        UserError: a name is unknown, or a number out of range.
    """
    _check_names(cfg)
    _read_files(cfg.get("task"), getattr(cfg.get("task"), "_name", None))


def _check_names(cfg: Any) -> None:
    from fairseq import models, tasks
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.registry import REGISTRIES

    # What is added with a plus, hydra does not look at. The last name is the one that fairseq adds; a --user-dir may
    # register further kinds of parts.
    sections = FairseqConfig.__dataclass_fields__
    _check_known("", cfg, {*sections, *REGISTRIES, "job_logging_cfg"})
    for kind, section in sections.items():
        if isinstance(cfg.get(kind), Mapping):
            check_numbers({str(name): value for name, value in cfg[kind].items()})
        if dataclasses.is_dataclass(section.type):
            _check_known(f"{kind}.", cfg.get(kind), section.type.__dataclass_fields__)
    known = {
        "task": tasks.TASK_REGISTRY,
        "model": {**models.MODEL_REGISTRY, **models.ARCH_MODEL_REGISTRY},
        **{kind: registry["registry"] for kind, registry in REGISTRIES.items()},
    }
    for kind, names in known.items():
        section = cfg.get(kind)
        name = section.get("_name") if isinstance(section, Mapping) else getattr(section, "_name", section)
        if section is not None and str(name) not in names:
            raise UserError(f"{kind}._name: {name} is unknown{_meant(str(name), names)}")


def _check_known(place: str, values: Any, known: Collection[str]) -> None:
    for name in values if isinstance(values, Mapping) else ():
        if name not in known:
            raise UserError(f"{place}{name} is unknown{_meant(str(name), known)}")


def recipe_ending(error: BaseException, recipe: Path) -> UserError | None:
    """Returns what ends ``fairseq-hydra-train`` if hydra refuses a recipe, before fairseq imports the plugin.

    Args:
        error: what hydra, or fairseq, raised.
        recipe: the file, for errors that do not name it.

    Returns:
        None for errors that have nothing to do with the recipe.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        return UserError(yaml_line(cause))
    if isinstance(error, HydraException):
        return UserError(_short(error))
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of fairseq, which imports the plugin
        return UserError(f"common.user_dir: there is no folder {error}; give its whole path")
    if isinstance(error, YAMLError | ValueError | RecursionError) or (isinstance(error, OSError) and not error.errno):
        return UserError(f"{recipe} is not YAML of options: {_short(error)}")
    return None


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def yaml_line(error: Any) -> str:
    """Returns what is wrong with a name or a value in YAML: the option, the value, and what it may be."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    text = str(error).split("\n")[0]
    name = getattr(error, "key", None)
    option = str(getattr(error, "full_key", None) or name or "the configuration")
    if not isinstance(error, ConfigAttributeError | ConfigKeyError) or name is None:
        return f"{option}: {text[:_SHOWN]}"
    known = _known_options(option.partition(".")[0], error)
    if name in known:
        return f"{option} is not in the file: write it with a plus, +{option}=..."
    return f"{option} is unknown{_meant(str(name), known)}"


def _known_options(section: str, error: Any) -> set[str]:
    """Lists the options that what is named in a section of YAML may have, whichever of its kind it is."""
    from fairseq import models, tasks
    from fairseq.registry import REGISTRIES

    registries = {
        "task": tasks.TASK_DATACLASS_REGISTRY,
        "model": models.MODEL_DATACLASS_REGISTRY,
        **{kind: registry["dataclass_registry"] for kind, registry in REGISTRIES.items()},
    }
    kinds = registries.get(section, {}).values() if error.object_type in (None, dict) else [error.object_type]
    return {name for kind in kinds for name in getattr(kind, "__dataclass_fields__", ())}
