"""Dense checkpoints of fairseq's transformer, stock or of this package, and the MoE checkpoints made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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

    def network(self, layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns a layer's feed-forward network: ``W1`` (H, d), ``b1`` (H,), ``W2`` (d, H) and ``b2`` (d,).

        Raises:
            UserError: a parameter is missing, has another shape or type, or holds NaN or infinity.
        """
        prefix = self.networks[layer]
        hidden, dim = self.hidden(layer), self.model[f"{prefix}fc1.weight"].shape[-1]
        shapes = {"fc1.weight": (hidden, dim), "fc1.bias": (hidden,), "fc2.weight": (dim, hidden), "fc2.bias": (dim,)}
        found = []
        for name, shape in shapes.items():
            tensor = self.model.get(f"{prefix}{name}")
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                what = f"is {tensor.dtype} {tuple(tensor.shape)}" if tensor is not None else "is missing"
                raise UserError(f"{self.path}: {prefix}{name} {what}, it must be {shape} fractions: get the file again")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.path}: {prefix}{name} holds NaN or infinity: use an earlier checkpoint")
            found.append(tensor)
        fc1, bias1, fc2, bias2 = found
        return fc1, bias1, fc2, bias2

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
        numbers = sorted(int(one.partition(".")[2]) for one in networks if one.startswith(stack))
        asked = found.get(f"{stack}_layers") or found.get("encoder_layers", len(numbers))
        if asked != len(numbers) or numbers != list(range(1, len(numbers) + 1)):
            listed = ", ".join(map(str, numbers[:20]))
            raise UserError(
                f"{path} has parameters of the {stack}'s layers {listed}, its options ask for {asked} layers: get the "
                "file again"
            )
        if f"{stack}.embed_tokens.weight" not in state["model"]:
            raise UserError(f"{path} lacks {stack}.embed_tokens.weight: get the file again")
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
