"""The options that a checkpoint keeps of its model, and a changed model's."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from ..errors import UserError
from ..models.config import MoETransformerConfig, check, resolve


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


def configuration(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole configuration of a checkpoint, whose old files have options side by side."""
    if state.get("args") is None:
        return dict(state["cfg"])
    cfg = OmegaConf.to_container(convert_namespace_to_omegaconf(state["args"]), resolve=True, enum_to_str=True)
    assert isinstance(cfg, dict)
    return {str(name): value for name, value in cfg.items()}
