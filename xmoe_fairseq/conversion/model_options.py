"""The options that a checkpoint keeps of its model, and a changed model's."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..errors import UserError
from ..models.architectures import Symbols
from ..models.config import MoETransformerConfig, resolve
from ..models.config_checks import check
from ..models.model import MoETransformerModel
from .names import is_computed


def flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """Spells nested options as flat ones: ``encoder.embed_dim`` is ``encoder_embed_dim``."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping):
            found |= {f"{name}_{inner}": one for inner, one in value.items() if inner != "_name"}
        else:
            found[name] = value
    return found


def changed_options(options: Mapping[str, Any], changes: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """Returns all options of a model of this package.

    Args:
        options: flat, of the model that it is made of; those that it lacks get their defaults.
        changes: options that differ.
        arch: a name of the architecture.

    Raises:
        UserError: an option is out of range or contradicts another.
    """
    known = {field.name: field.default for field in dataclasses.fields(MoETransformerConfig)}
    section = {name: {**options, **changes}.get(name, default) for name, default in known.items()}
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in section.items()}
    try:
        check(resolve(plain))
    except ValueError as error:
        raise UserError(str(error)) from error
    return {**plain, "_name": arch}


def build_on_meta(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MoETransformerModel:
    """Builds the model of `changed_options` without memory for its parameters.

    Args:
        options: of the model.
        tensors: with the embeddings of both stacks, whose rows are the vocabularies.
    """
    rows = [len(tensors[f"{stack}.embed_tokens.weight"]) for stack in ("encoder", "decoder")]
    task = SimpleNamespace(source_dictionary=Symbols(rows[0]), target_dictionary=Symbols(rows[1]))
    with torch.device("meta"):
        return MoETransformerModel.build_model(options, task)


def check_parameters(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Compares the parameters of a checkpoint with those that its options ask for.

    Raises:
        UserError: one is missing, is too many, or has another shape or type.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not is_computed(name)}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            what = f"is {tensor.dtype} {tuple(tensor.shape)}" if tensor is not None else "is missing"
            raise UserError(f"{path}: {name} {what}, its options ask for {tuple(shape)} fractions: get the file again")
    if more := [name for name in tensors if name not in shapes and not is_computed(name)]:
        raise UserError(f"{path} has {more[0]}, which the model of its options has no place for: get the file again")


def configuration(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole configuration of a checkpoint, whose old files have options side by side."""
    if state.get("args") is None:
        return dict(state["cfg"])
    cfg = OmegaConf.to_container(convert_namespace_to_omegaconf(state["args"]), resolve=True, enum_to_str=True)
    assert isinstance(cfg, dict)
    return {str(name): value for name, value in cfg.items()}
