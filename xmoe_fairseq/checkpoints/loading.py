"""What goes wrong between a checkpoint that was read and a model, said in a line."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from .. import guard
from ..errors import UserError
from ..literals import NotLiteral
from . import options, reading

logger = logging.getLogger(__name__)

_SHOWN = 300
_FILES = ("encoder_embed_path", "decoder_embed_path")
# How torch says which parameters do not fit.
_MISSING = re.compile(r'Missing key\(s\) in state_dict: "([^"]*)"')
_UNEXPECTED = re.compile(r'Unexpected key\(s\) in state_dict: "([^"]*)"')
_SHAPES = re.compile(r"size mismatch for (\S+): copying a param with shape (.*?) from .*model is (.*?)\.?$", re.M)
_FORMS = ((_MISSING, "{} is missing"), (_UNEXPECTED, "{} is one too many"), (_SHAPES, "{} has the shape {}, not {}"))


def sound_models(load_model_ensemble_and_task: Any) -> Any:
    """Refuses a checkpoint that does not say what it is of, and parameters that are no numbers."""
    signature = inspect.signature(load_model_ensemble_and_task)

    @functools.wraps(load_model_ensemble_and_task)
    def load(filenames: list[str], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(filenames, *args, **kwargs)
        given.apply_defaults()
        joined = os.pathsep.join(filenames)
        if len(filenames) > 1 and os.path.isfile(joined):
            raise UserError(
                f"the path of {joined} has a {os.pathsep!r}, where fairseq takes it for several checkpoints: give the "
                "folder or the file another name"
            )
        whole = given.arguments["num_shards"] == 1 and not given.arguments["suffix"]  # shards have other names
        for filename in filenames if whole else ():
            path = reading.local_path(filename)
            state = reading.peek(path)
            reading.check_whole(state, path)
            options.check(state, path)
            options.check_complete(state, path)
        try:
            models, cfg, task = load_model_ensemble_and_task(filenames, *args, **kwargs)
        except NotLiteral as error:
            raise UserError(f"checkpoint {joined} is refused: among its options, {error.message}") from error
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0][:_SHOWN]
            raise UserError(
                f"checkpoint {joined} is refused: {getattr(error, 'full_key', None) or 'its options'}: {reason}"
            ) from error
        for filename, model in zip(filenames, models, strict=True):
            check_finite(model, filename)
        return models, cfg, task

    return load


def forget_files(state: dict[str, Any], overrides: Mapping[str, Any] | None) -> None:
    """Takes files of pretrained embeddings out of the saved options: the parameters hold what was read from them, and
    a file does not say what is opened on this machine.

    Args:
        state: that fairseq read; changed in place.
        overrides: what the user gives instead of the saved options.
    """
    cfg, args = state.get("cfg"), state.get("args")
    saved: Any = args if args is not None else cfg.get("model") if cfg is not None else None
    saved = vars(saved) if isinstance(saved, Namespace) else saved
    for name in _FILES:
        if saved is not None and saved.get(name) and name not in (overrides or {}):
            saved[name] = None


def check_finite(model: nn.Module, path: str) -> None:
    """Refuses a model that would compute NaN from everything.

    Raises:
        UserError: names the first parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"checkpoint {path} is of no use: its parameter {name} holds NaN or infinity; its training diverged "
                "before it was written, so use an earlier checkpoint"
            )


def fitting(load_state_dict: Any) -> Any:
    """torch lists all parameters that do not fit, a line each; this names the first one."""

    @functools.wraps(load_state_dict)
    def load(model: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_state_dict(model, *args, **kwargs)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"the checkpoint's parameters are not those of this model: {_misfit(error)}; give the --arch and the "
                "options that the checkpoint was trained with"
            ) from error

    return load


def with_averages(state: dict[str, Any], path: str) -> None:
    """Puts the moving averages of the parameters, which ``--store-ema`` keeps, in the place of the parameters.

    Args:
        state: of a checkpoint; is changed.
        path: of the file, for messages.

    Raises:
        UserError: the checkpoint has none.
    """
    kept = state.get("extra_state") or {}
    averages = kept.get("ema_fp32_params") or kept.get("ema")  # the first are more precise, where there are any
    if not averages:
        raise UserError(
            f"{options.AVERAGES}: checkpoint {path} holds no moving averages of its parameters: give one of a training "
            "with --store-ema, or leave the option out"
        )
    state["model"] = {**state["model"], **averages}


def resumable(load_checkpoint: Any) -> Any:
    """Stock fairseq ends in one of many tracebacks where training goes on with other options than the file's."""

    @functools.wraps(load_checkpoint)
    def load(trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load_checkpoint(trainer, filename, *args, **kwargs)
        except Exception as error:
            other_cause = isinstance(error, (OSError, dist.DistError)) or "gloo" in str(error)
            if other_cause or guard.is_no_memory(error):
                raise
            cause = error if error.__context__ is None else error.__context__
            reason = " ".join(str(cause).split())[:300] or type(cause).__name__
            raise UserError(
                f"training cannot go on from {filename} with these options ({reason}): give the --arch, --optimizer, "
                "--criterion and precision that it was trained with, or --reset-optimizer to keep the parameters only"
            ) from error

    return load


def counting(load_checkpoint: Any) -> Any:
    """Stock fairseq, where a file has no optimizer's state, makes all updates again, in the middle of the data."""

    @functools.wraps(load_checkpoint)
    def load(
        trainer: Any,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        *args: Any,
        **kw: Any,
    ) -> Any:
        extra_state = load_checkpoint(trainer, filename, reset_optimizer, reset_lr_scheduler, *args, **kw)
        last = trainer._optim_history[-1] if extra_state and trainer._optim_history else {}
        updates = last.get("num_updates", 0)
        if reset_optimizer or trainer.get_num_updates() == updates:
            return extra_state
        logger.warning(
            f"{filename} holds no optimizer's state: training goes on after update {updates}, and the optimizer starts "
            "anew; --reset-optimizer counts updates from 0"
        )
        if last.get("lr_scheduler_state") and not reset_lr_scheduler:
            trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
        trainer.set_num_updates(updates)
        return extra_state

    return load


def _misfit(error: Exception) -> str:
    text = str(error)
    for pattern, form in _FORMS:
        found = pattern.search(text)
        if found:
            return form.format(*found.groups())
    return " ".join(text.split())[:200] or type(error).__name__
