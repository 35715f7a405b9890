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


def check_kind(cfg: Any, task: Any) -> None:
    """Refuses a translation model for a task of language models, as that of fairseq-eval-lm is, and vice versa.

    Args:
        cfg: options of the model.
        task: that is to build it.

    Raises:
        UserError: the model is of the other kind.
    """
    from fairseq import models, tasks
    from fairseq.tasks.language_modeling import LanguageModelingTask
    from fairseq.tasks.multilingual_language_modeling import MultilingualLanguageModelingTask
    from fairseq.tasks.translation import TranslationTask
    from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    model = models.ARCH_MODEL_REGISTRY.get(name) or models.MODEL_REGISTRY.get(name)
    names = [kind for kind, registered in tasks.TASK_REGISTRY.items() if registered is type(task)]
    for of_tasks, other, what in (
        ((LanguageModelingTask, MultilingualLanguageModelingTask), models.FairseqEncoderDecoderModel, "translation"),
        ((TranslationTask, TranslationMultiSimpleEpochTask), models.FairseqLanguageModel, "language"),
    ):
        if model is not None and isinstance(task, of_tasks) and issubclass(model, other):
            raise UserError(
                f"{name} is a {what} model, which the task {' or '.join(names)} cannot use: give another model, "
                "another --task, or the command for it (fairseq-eval-lm is for language models, fairseq-validate and "
                "fairseq-generate for translation)"
            )


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


def check_types(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuses numbers that are not real: torch would round or cut them to those of the model, and say nothing.

    Raises:
        UserError: names the first parameter whose numbers are of another kind.
    """
    own = model.state_dict()
    for name in own.keys() & state.keys():
        given = state[name]
        if isinstance(given, torch.Tensor) and own[name].is_floating_point() and not given.is_floating_point():
            raise UserError(
                f"the checkpoint's {name} holds {str(given.dtype).removeprefix('torch.')}, it must hold floating-point "
                "numbers: use a file that fairseq-train wrote"
            )


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
