"""Moving averages of the parameters (``--store-ema``)."""

from __future__ import annotations

from argparse import Namespace
from contextvars import ContextVar
from typing import Any

from fairseq import checkpoint_utils
from fairseq.models.ema.ema import EMA

from ..checkpoints import moving_averages, reading, shards
from ..distributed.checkpoint_experts import keep_local_experts
from .registry import Group

GROUP = Group("Moving averages")

# The model whose averages begin.
_model: ContextVar[Any] = ContextVar("_model", default=None)


@GROUP.patch(EMA, "__init__", "self model config device skip_keys")
def begin(stock: Any, ema: EMA, model: Any, *args: Any, **kwargs: Any) -> None:
    """The patch of `load_ema_from_checkpoint` is told which experts the model holds."""
    token = _model.set(model)
    try:
        stock(ema, model, *args, **kwargs)
    finally:
        _model.reset(token)


@GROUP.patch(checkpoint_utils, "load_ema_from_checkpoint", "fpath")
def load_ema_from_checkpoint(stock: Any, fpath: str) -> dict[str, Any]:
    """The file of `--ema-seed-model` is read as any checkpoint: checked, joined from shards, and in each process the
    experts that it holds. Stock ends in a traceback if it has no averages."""
    local = reading.local_path(fpath)
    state = reading.check(local)
    shards.join(state, local)
    moving_averages.put_in_place(state, fpath, "--ema-seed-model")
    keep_local_experts(state, _model.get())
    return state


@GROUP.patch(EMA, "restore", "self state_dict build_fp32_params")
def restore(stock: Any, ema: EMA, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Stock restores averages in each update without the buffers that say the model's version, takes it for one of
    2018, and drops the norm after the last layer (`--encoder-normalize-before`)."""
    versions = {name: value for name, value in ema.model.state_dict().items() if moving_averages.is_version(name)}
    stock(ema, {**state_dict, **versions}, *args, **kwargs)


@GROUP.patch(EMA, "_step_internal", "self new_model updates")
def average_each_once(stock: Any, ema: EMA, new_model: Any, *args: Any, **kwargs: Any) -> None:
    """Stock averages a tensor in each update once for each of its names, of which tied embeddings have three."""
    values = new_model.state_dict()
    first: dict[Any, str] = {}
    names = {name: first.setdefault((value.data_ptr(), value.shape), name) for name, value in values.items()}
    apart = {name: values[name] for name, known in names.items() if name == known}
    stock(ema, Namespace(state_dict=lambda: apart), *args, **kwargs)
    for name, known in names.items():
        if name in ema.fp32_params:
            ema.fp32_params[name] = ema.fp32_params[known]
