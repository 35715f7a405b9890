"""What goes wrong between a checkpoint that was read and a model, said in a line."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError

logger = logging.getLogger(__name__)

_SHOWN = 300
_FILES = ("encoder_embed_path", "decoder_embed_path")


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
