"""What is given to fairseq's commands: checked before it is used, and never run."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fairseq import options
from fairseq.data import FastaDataset, data_utils
from fairseq.dataclass import initialize
from fairseq_cli import train
from hydra.core.hydra_config import HydraConfig
from omegaconf.errors import OmegaConfBaseException

from ..common import guard
from ..common.literals import literal
from ..errors import UserError
from ..imports import around, found_by_others
from ..mt_benchmarks import BY_TASK
from ..stock_commands import arguments, required
from .registry import ABSENT, Group, Replacement

logger = logging.getLogger(__name__)

GROUP = Group("Options")

_PACKAGES = ("fairseq", "fairseq_cli")


@GROUP.patch(options, "parse_args_and_arch", "parser input_args parse_known suppress_defaults modify_parser")
def parse_args_and_arch(stock: Any, parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Stock fails without a word if an option is missing, answers a misspelt architecture with the names of all,
    reads `--model-overrides` after it has loaded the data, ignores options that the checkpoint does not have, and takes
    `--bf16` for a TPU, so that it needs torch_xla even on a GPU or CPU."""
    parser.error = functools.partial(arguments.refuse, parser)
    parser.print_help = functools.partial(arguments.print_help, parser)
    if input_args is None and guard.is_command():
        required.require(parser)
    with guard.told_to_torchrun():
        result = stock(parser, input_args, *args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        arguments.check(parser, parsed, input_args, bool(kwargs.get("suppress_defaults")))
    if importlib.util.find_spec("torch_xla") is None:
        parsed.tpu = False
    return result


@GROUP.patch(initialize, "add_defaults", "cfg")
@GROUP.patch(train, "add_defaults", "cfg")
def add_defaults(stock: Any, cfg: Any) -> None:
    """Stock's and hydra's answers to a wrong name or value in YAML are tracebacks."""
    if HydraConfig.initialized():
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else hydra itself prints tracebacks, and guard.py sees none
    with guard.told_to_torchrun():
        arguments.check_yaml(cfg)
        try:
            stock(cfg)
        except OmegaConfBaseException as error:
            raise UserError(arguments.yaml_line(error)) from error


@GROUP.patch(FastaDataset, "_build_index", "self path")
def _build_index(stock: Any, dataset: Any, path: str) -> Any:
    """Stock puts the name of a FASTA file into a command of the shell."""
    if shlex.quote(path) != path:
        raise UserError(f"{path!r} is refused: the name of a FASTA file may have letters, digits and ./_-=@ only")
    return stock(dataset, path)


@GROUP.patch(data_utils, "raise_if_valid_subsets_unintentionally_ignored", "train_cfg")
def raise_if_valid_subsets_unintentionally_ignored(stock: Any, train_cfg: Any) -> None:
    """Stock takes a further development set for forgotten although `--valid-subset` names it; in our tasks, a set that
    is not read is no error."""
    if getattr(train_cfg.task, "_name", None) not in BY_TASK:
        stock(train_cfg)
        return
    dataset = train_cfg.dataset
    named = {name.partition("@")[0] for name in dataset.valid_subset.split(",")}
    there = {name.partition(".")[0] for name in data_utils._find_extra_valid_paths(train_cfg.task.data)}
    known = dataset.ignore_unused_valid_subsets or dataset.combine_valid_subsets
    if (others := sorted(there - named)) and not known and not dataset.disable_validation:
        every = ",".join((dataset.valid_subset, *others))
        logger.warning(f"the data also has {', '.join(others)}: --valid-subset {every} reads all of them")


def _modules() -> list[ModuleType]:
    """Lists fairseq's modules that are imported."""
    return [module for name, module in sorted(sys.modules.items()) if module and name.partition(".")[0] in _PACKAGES]


class _Literals(MetaPathFinder):
    """Puts `literal` into modules of fairseq before they run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Finds modules of fairseq; for the parameters, see any finder."""
        if name.partition(".")[0] not in _PACKAGES:
            return None
        return around(found_by_others(self, name, path, target), before=lambda module: setattr(module, "eval", literal))


class _Eval(Replacement):
    """``eval`` in the modules that are imported, and in those to come."""

    def apply(self) -> None:
        """Replaces it."""
        super().apply()
        if not any(isinstance(finder, _Literals) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Literals())


GROUP.changes.append(
    _Eval(
        "every module of fairseq",
        _modules,
        "eval",
        ABSENT,
        literal,
        "Options written as Python, also those in a checkpoint or YAML file, are run as code; now they are read as "
        "literals.",
    )
)
