"""Reading checkpoints without running what is in them, and saying in one line what is wrong with one."""

from __future__ import annotations

import inspect
import os
import re
from contextvars import ContextVar
from typing import Any

import torch
from fairseq import checkpoint_utils, hub_utils, models
from fairseq.models import BaseFairseqModel
from omegaconf.errors import OmegaConfBaseException

from .. import hub
from ..checkpoints import language_tokens, loading, moving_averages, options, reading, shards
from ..common import identity
from ..common.literals import NotLiteral
from ..distributed.checkpoint_experts import keep_local_experts
from ..errors import UserError
from . import language_models
from .registry import Group

GROUP = Group("Reading checkpoints")

# The trainer that goes on from the checkpoint that is read, if one does.
current_trainer: ContextVar[Any] = ContextVar("current_trainer", default=None)
_SHOWN = 300
# How torch says which parameters do not fit.
_MISSING = re.compile(r'Missing key\(s\) in state_dict: "([^"]*)"')
_UNEXPECTED = re.compile(r'Unexpected key\(s\) in state_dict: "([^"]*)"')
_SHAPES = re.compile(r"size mismatch for (\S+): copying a param with shape (.*?) from .*model is (.*?)\.?$", re.M)
_FORMS = ((_MISSING, "{} is missing"), (_UNEXPECTED, "{} is one too many"), (_SHAPES, "{} has the shape {}, not {}"))


@GROUP.patch(checkpoint_utils, "load_checkpoint_to_cpu", "path arg_overrides load_on_all_ranks")
def load_checkpoint_to_cpu(stock: Any, path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> Any:
    """A checkpoint is checked before anything of it is used: what it holds, that it is whole, its options; shard sets
    are joined, and each process keeps its own experts. Overrides reach options that an older checkpoint lacks."""
    local = reading.local_path(path)
    found = reading.check(local)
    reading.check_whole(found, path)
    options.check(found, path)
    overrides = dict(arg_overrides or {})
    averages = overrides.pop(options.AVERAGES, False)
    state = stock(path, overrides, load_on_all_ranks)
    options.override_missing(state.get("cfg"), overrides)
    shards.join(state, local)
    if averages:
        moving_averages.put_in_place(state, path)
    loading.forget_files(state, arg_overrides)
    identity.checkpoint_read.set(local)
    state["last_optimizer_state"] = state.get("last_optimizer_state") or None
    if not isinstance(state.get("task_state"), dict):  # fairseq's older versions wrote none
        state["task_state"] = {}
    trainer = current_trainer.get()
    task: Any = getattr(trainer, "task", None)
    if hasattr(task, "identity"):  # for translation, fairseq does the same
        task.load_state_dict(state["task_state"])
        language_tokens.warn_of_others(found, local, task.args)
    elif language_models.has_text(task):
        task.load_state_dict(state["task_state"])
    if trainer is not None:
        keep_local_experts(state, trainer.get_model())
        if trainer.cfg.ema.store_ema:
            moving_averages.begin(state, path)
    return state


@GROUP.patch(
    checkpoint_utils, "load_model_ensemble_and_task", "filenames arg_overrides task strict suffix num_shards state"
)
def load_model_ensemble_and_task(stock: Any, filenames: list[str], *args: Any, **kwargs: Any) -> Any:
    """A checkpoint that does not say what it is of, and parameters that are NaN or infinite, are refused."""
    given = inspect.signature(stock).bind(filenames, *args, **kwargs)
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
        models, cfg, task = stock(filenames, *args, **kwargs)
    except NotLiteral as error:
        raise UserError(f"checkpoint {joined} is refused: among its options, {error.message}") from error
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0][:_SHOWN]
        raise UserError(
            f"checkpoint {joined} is refused: {getattr(error, 'full_key', None) or 'its options'}: {reason}"
        ) from error
    for filename, model in zip(filenames, models, strict=True):
        loading.check_finite(model, filename)
    return models, cfg, task


@GROUP.patch(BaseFairseqModel, "load_state_dict", "self state_dict strict model_cfg args")
def load_state_dict(stock: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """torch lists all parameters that do not fit, a line each; the first one is named. Whole numbers in the place of
    real ones are refused."""
    given = inspect.signature(stock).bind(model, *args, **kwargs).arguments["state_dict"]
    loading.check_types(model, given)
    try:
        return stock(model, *args, **kwargs)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the checkpoint's parameters are not those of this model: {_misfit(error)}; give the --arch and the "
            "options that the checkpoint was trained with"
        ) from error


@GROUP.patch(models, "build_model", "cfg task from_checkpoint")
def build_model(stock: Any, cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
    """A task of language models cannot use a translation model, nor the other way round: stock fails at an attribute or
    an argument that the model does not have."""
    loading.check_kind(cfg, task)
    return stock(cfg, task, from_checkpoint)


@GROUP.patch(hub_utils, "from_pretrained", "model_name_or_path checkpoint_file data_name_or_path archive_map **kwargs")
def from_pretrained(
    stock: Any,
    model_name_or_path: Any,
    checkpoint_file: str = "model.pt",
    data_name_or_path: Any = ".",
    archive_map: Any = None,
    **kwargs: Any,
) -> Any:
    """Stock takes a folder that is missing for one to download, unpacks and removes what is no folder, ignores an
    option that nothing has, and does not see the SentencePiece model of the data."""
    folder, data = os.fspath(model_name_or_path), os.fspath(data_name_or_path)
    if not os.path.isdir(folder) and (folder in (archive_map or {}) or "://" in folder):
        return stock(folder, checkpoint_file, data, archive_map=archive_map, **kwargs)
    data, kwargs = hub.found(folder, checkpoint_file, data, kwargs)
    return stock(os.path.abspath(folder), checkpoint_file, data, **kwargs)


GROUP.replace(
    hub_utils,
    "GeneratorHubInterface",
    hub.Translator.__base__,
    hub.Translator,
    "Stock's interface in Python cannot be told a direction, so a multilingual model cannot be used.",
)


def _misfit(error: Exception) -> str:
    text = str(error)
    for pattern, form in _FORMS:
        found = pattern.search(text)
        if found:
            return form.format(*found.groups())
    return " ".join(text.split())[:200] or type(error).__name__
