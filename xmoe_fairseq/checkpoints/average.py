"""Means of the parameters of several checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import identity
from ..common.run_folder import checkpoint_folders
from ..errors import UserError
from . import reading, shards

# fairseq's names: at the end of an epoch, and after an update within one.
_EPOCH = re.compile(r"checkpoint(\d+)\.pt")
_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def newest(folder: str, count: int, within_epochs: bool) -> list[str]:
    """Lists the newest checkpoints of a folder by their names, as fairseq's own script for averages does.

    Args:
        folder: of a run, or its ``--save-dir``.
        count: how many.
        within_epochs: those of ``--save-interval-updates`` rather than those of the ends of epochs.

    Raises:
        UserError: there are not so many.
    """
    pattern = _UPDATE if within_epochs else _EPOCH
    named = {
        place: [match for path in place.glob("*.pt") if (match := pattern.fullmatch(path.name))]
        for place in checkpoint_folders(Path(folder))
    }
    place, matches = max(named.items(), key=lambda one: len(one[1]))
    if len(matches) < count:
        example = "checkpoint_EPOCH_UPDATES.pt" if within_epochs else "checkpointEPOCH.pt"
        raise UserError(f"{folder} has {len(matches)} checkpoints named like {example}: {count} were asked for")
    matches.sort(key=lambda match: int(match[1]), reverse=True)
    return [str(place / match[0]) for match in matches[:count]]


def average(paths: Sequence[str]) -> dict[str, Any]:
    """Averages the parameters of checkpoints of one architecture, of which it holds one at a time.

    The rest is the first one's, but for the optimizer's state, which belongs to none of the means.

    Raises:
        UserError: a checkpoint has other parameters than the first one, or was trained with another dictionary, or has
            parameters that are no numbers.
    """
    state = _read(paths[0])
    model: dict[str, Tensor] = state["model"]
    sums = _sums(model)
    for path in paths[1:]:
        other = _read(path)
        identity.check_same({paths[0]: state, path: other})
        _check_same(model, other["model"], paths[0], path)
        for name, total in sums.items():
            total += other["model"][name]
    means = {_bytes(model[name]): (total / len(paths)).to(model[name].dtype) for name, total in sums.items()}
    for name, tensor in model.items():
        model[name] = means.get(_bytes(tensor), tensor)
    state.pop("last_optimizer_state", None)
    return state


def _read(path: str) -> dict[str, Any]:
    """Reads a checkpoint that can be averaged."""
    state = reading.read(path)
    shards.join(state, path)
    for name, tensor in state["model"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{name} of {path} holds NaN or infinity, and so would every mean: leave {path} out")
    return state


def _sums(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Starts the sums, in 32 bits at least; tied parameters are counted once."""
    once = {_bytes(tensor): name for name, tensor in reversed(model.items()) if tensor.is_floating_point()}
    return {
        name: model[name].to(torch.promote_types(model[name].dtype, torch.float32), copy=True) for name in once.values()
    }


def _bytes(tensor: Tensor) -> tuple[int, torch.Size]:
    """What tied parameters have in common."""
    return tensor.data_ptr(), tensor.shape


def _check_same(first: dict[str, Tensor], other: dict[str, Tensor], first_path: str, path: str) -> None:
    for name in sorted(first.keys() ^ other.keys()):
        has, lacks = (first_path, path) if name in first else (path, first_path)
        raise UserError(f"{has} has a parameter {name}, which {lacks} lacks: average checkpoints of one architecture")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise UserError(
                f"{name} has the shape {tuple(tensor.shape)} in {first_path}, {tuple(other[name].shape)} in {path}: "
                "average checkpoints of one architecture"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor, other[name]):
            raise UserError(f"{name} holds whole numbers that differ in {first_path} and {path}: they have no mean")
