"""Dense checkpoints of fairseq's transformer, stock or of this package, and the MoE checkpoints made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq import models
from fairseq.models.transformer import TransformerModel, TransformerModelBase
from torch import Tensor

from ..checkpoints import options, reading
from ..errors import UserError
from ..models.model import MoETransformerModel
from .model_options import changed_options, configuration, flat

# A matrix of a feed-forward network: its stack, and its number from 0.
_FFN = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.fc1\.weight")
# What training keeps beside the parameters and is about them alone: moving averages, and how good they were.
_OF_PARAMETERS = ("ema", "ema_fp32_params", "metrics", "val_loss", "best")


@dataclass(frozen=True)
class Dense:
    """A dense checkpoint.

    Attributes:
        path: of the file.
        state: what it holds.
        options: of its model, flat, by the names of this package's options.
        networks: by layer, such as ``encoder.1``, the prefix of the feed-forward network's parameters.
    """

    path: str
    state: Mapping[str, Any]
    options: Mapping[str, Any]
    networks: Mapping[str, str]

    @property
    def model(self) -> Mapping[str, Tensor]:
        """The parameters by name."""
        parameters: Mapping[str, Tensor] = self.state["model"]
        return parameters

    def hidden(self, layer: str) -> int:
        """Returns the hidden units of a layer's feed-forward network."""
        return len(self.model[f"{self.networks[layer]}fc1.weight"])


def read_dense(path: str) -> Dense:
    """Reads a dense transformer; tensors stay in the file until they are used.

    Raises:
        UserError: the file is missing or refused, or holds another model.
    """
    state = reading.read(path)
    options.check(state, path)
    options.check_complete(state, path)
    if reading.SHARD_SET in state or any(".moe." in name for name in state["model"]):
        raise UserError(f"{path} has experts already: give a dense checkpoint")
    found = flat(options.sections(state)["model"])
    name = found.get("_name") or found.get("arch")
    kind = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    networks = {
        f"{match[1]}.{int(match[2]) + 1}": name.removesuffix("fc1.weight")
        for name in state["model"]
        if (match := _FFN.fullmatch(name))
    }
    ours = isinstance(kind, type) and issubclass(kind, MoETransformerModel)
    if not (ours or kind in (TransformerModel, TransformerModelBase)) or not networks:
        raise UserError(f"{path} is a model {name}: only dense models of fairseq's transformer can get experts")
    for stack in ("encoder", "decoder"):
        if found.get(f"{stack}_layers_to_keep"):
            raise UserError(f"{path} was made with --{stack}-layers-to-keep: give the checkpoint with all its layers")
    return Dense(path, state, found, networks)


def with_experts(dense: Dense, changes: Mapping[str, Any], model: Mapping[str, Tensor]) -> dict[str, Any]:
    """Makes the state of an MoE checkpoint, without the optimizer's state and what else was of the dense parameters.

    Args:
        dense: that it is made of.
        changes: options of ``xmoe_transformer`` that differ from the dense model's.
        model: the parameters.

    Raises:
        UserError: an option is out of range or contradicts another.
    """
    cfg = {**configuration(dense.state), "model": changed_options(dense.options, changes, "xmoe_transformer")}
    extra = {k: value for k, value in (dense.state.get("extra_state") or {}).items() if k not in _OF_PARAMETERS}
    state = {**dense.state, "args": None, "cfg": cfg, "model": dict(model), "extra_state": extra}
    state.pop("last_optimizer_state", None)
    return state
