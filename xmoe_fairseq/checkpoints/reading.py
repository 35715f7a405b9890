"""Reading checkpoints by PyTorch's allow-list, and saying in a line what is wrong with a file."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import check_regular
from ..errors import UserError
from . import numpy_values

# What a file of a sharded checkpoint holds beside stock fairseq's entries; see shards.py.
SHARD_SET = "xmoe_shard_set"
SHARD = "xmoe_shard"
# What --restore-file is unless it is given.
LAST = "checkpoint_last.pt"
# How torch names a class or function that is not allowed.
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class DamagedCheckpoint(UserError):
    """A checkpoint is not whole; another one of the same folder may be."""


def check(path: str) -> dict[str, Any]:
    """Reads a checkpoint and names what is wrong with it.

    Returns:
        What the file holds; tensors stay in the file until they are used.

    Raises:
        DamagedCheckpoint: the file is truncated or its contents differ from their checksums.
        UserError: it is no checkpoint, or would run code when read.
    """
    state = peek(path)
    check_sums(path)
    return state


def peek(path: str) -> dict[str, Any]:
    """Does the same without comparing the contents with their checksums.

    Raises:
        DamagedCheckpoint: the file is truncated.
        UserError: it is no checkpoint, or would run code when read.
    """
    state = _read(path)
    if isinstance(state, dict) and SHARD in state:
        shard = state[SHARD]
        name = shard.get("name", "NAME.pt") if isinstance(shard, dict) else "NAME.pt"
        raise UserError(f"{path} holds some experts of a checkpoint only: give {name} beside it")
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is no fairseq checkpoint: it holds no 'model'. Check the file name")
    wrong = _wrong_form(state)
    if wrong:
        raise _not_whole(path, wrong)
    return state


def check_whole(state: dict[str, Any], path: str) -> None:
    """Refuses parameters alone, from which fairseq goes on in a traceback.

    Raises:
        UserError: names what is missing.
    """
    # fairseq of 2018 had other names.
    for name, instead in (
        ("optimizer_history", {"best_loss", "optimizer"}),
        ("extra_state", {"epoch", "batch_offset", "val_loss"}),
    ):
        if not state.get(name) and not (name not in state and instead <= state.keys()):
            raise _not_whole(path, f"it holds parameters without {name!r}, which says how far they were trained")


def _not_whole(path: str, wrong: str) -> UserError:
    return UserError(
        f"{path} is no whole fairseq checkpoint: {wrong}. Use a file that fairseq-train or xmoe checkpoint wrote"
    )


def _wrong_form(state: dict[str, Any]) -> str:
    """Returns what of a checkpoint's parts has not the type that it has in fairseq's; nothing if all have."""
    model = state["model"]
    if not isinstance(model, dict) or not model:
        return f"its 'model' is {_kind(model)}, it must be parameters by name"
    if wrong := _wrong_parameters(model):
        return wrong
    history = state.get("optimizer_history")
    if history is not None and not (isinstance(history, list) and all(isinstance(one, dict) for one in history)):
        return f"its 'optimizer_history' is {_kind(history)}, it must be a list of names with values"
    made = history[-1].get("num_updates", 0) if history else 0
    if not isinstance(made, int) or not 0 <= made < 2**63:
        return f"its number of updates is {_kind(made)}, it must be a whole number"
    extra = state.get("extra_state")
    if not isinstance(extra, (dict, type(None))):
        return f"its 'extra_state' is {_kind(extra)}, it must be names with values"
    place = (extra or {}).get("train_iterator")
    if not isinstance(place, (dict, type(None))):
        return f"its 'train_iterator' is {_kind(place)}, it must be names with values"
    for name in ("epoch", "iterations_in_epoch"):
        number = (place or {}).get(name, 1)
        if not isinstance(number, int) or not 0 <= number < 2**31:
            return f"the {name} of its 'train_iterator' is {_kind(number)}, it must be a whole number"
    return _wrong_optimizer(state.get("last_optimizer_state"))


def _wrong_optimizer(optimizer: Any) -> str:
    if optimizer is not None and not isinstance(optimizer, dict):
        return f"its 'last_optimizer_state' is {_kind(optimizer)}, it must be names with values"
    if optimizer and not isinstance(optimizer.get("state", {}), dict):
        return f"the state in its 'last_optimizer_state' is {_kind(optimizer['state'])}, it must be by parameter"
    return ""


def _kind(value: Any) -> str:
    """Describes a value of the wrong type in a few words."""
    if value is None:
        return "missing"
    if isinstance(value, (bool, int, float, str)):
        shown = str(value) if isinstance(value, (bool, float, str)) or abs(value) < 10**30 else "too large"
        return f"{type(value).__name__} {shown[:40]!r}" if isinstance(value, str) else f"{shown}"
    return "empty" if isinstance(value, (dict, list)) and not value else f"a {type(value).__name__}"


def check_sums(path: str) -> None:
    """Compares the contents with their checksums, which torch writes but does not look at when it reads.

    Raises:
        DamagedCheckpoint: names the first part that differs.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DamagedCheckpoint(_damaged(path, str(error))) from error
    if wrong is not None:
        raise DamagedCheckpoint(_damaged(path, f"the checksum of {wrong} is wrong"))


def local_path(path: str) -> str:
    """Finds a checkpoint on this machine.

    Raises:
        UserError: there is none.
    """
    from fairseq.file_io import PathManager

    local: str = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise UserError(f"there is no checkpoint {path}: check --path or --restore-file")
    return local


def read(path: str) -> dict[str, Any]:
    """Reads a checkpoint for `xmoe checkpoint`: tensors stay in the file until they are used.

    Raises:
        UserError: the file is missing, or `check` refuses it.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: check the name")
    return check(path)


def read_parameters(path: str) -> dict[str, Tensor]:
    """Reads a file of parameters alone, as other toolkits write them.

    Raises:
        DamagedCheckpoint: the file is truncated or damaged.
        UserError: it is missing, holds something else, or would run code when read.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}: check the name")
    state = _read(path)
    if not isinstance(state, dict) or (wrong := _wrong_parameters(state)):
        raise UserError(f"{path} holds no parameters by name{': ' + wrong if isinstance(state, dict) else ''}")
    check_sums(path)
    return state


def _wrong_parameters(model: dict[Any, Any]) -> str:
    for name, tensor in model.items():
        if not isinstance(name, str):
            return f"the name of a parameter is {_kind(name)}, it must be text"
        if not isinstance(tensor, torch.Tensor):
            return f"its parameter {name[:60]!r} is {_kind(tensor)}, it must be a tensor"
    return ""


def read_shard(path: str) -> dict[str, Any] | None:
    """Reads a file of experts without checking its sums; gives nothing if it is another kind of file.

    Raises:
        DamagedCheckpoint: the file is truncated or damaged.
        UserError: it would run code when read.
    """
    state = _read(path)
    return state[SHARD] if isinstance(state, dict) and SHARD in state else None


def updates(state: dict[str, Any]) -> int:
    """Returns the number of updates that a checkpoint was trained for."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def others_by_updates(path: str) -> list[str]:
    """Lists the other readable checkpoints of a checkpoint's folder, the most trained first."""
    found = []
    for other in sorted(Path(path).parent.glob("checkpoint*.pt")):
        try:
            if other.name != os.path.basename(path):
                found.append((updates(peek(str(other))), str(other)))
        except UserError:
            continue
    return [name for _, name in sorted(found, reverse=True)]


def _read(path: str) -> Any:
    state = _load(path)
    for tensor in _tensors(state):
        real = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not real or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"checkpoint {path} is refused: it holds a tensor of the shape {tuple(tensor.shape)} but not its "
                "numbers. Use another file"
            )
    return state


def _tensors(state: Any) -> Iterator[Tensor]:
    """Finds all tensors of a state, whose lists may hold themselves."""
    seen: set[int] = set()
    left = [state]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


def _load(path: str) -> Any:
    try:
        check_regular(path)
    except OSError as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("GLOBAL", "unrecognized function", "allowlisted", numpy_values.REFUSED)):
            raise UserError(
                f"checkpoint {path} is refused, because reading it would load or run code outside the allow-list "
                f"({_cause(error)}); nothing was run. Use a file from a source you trust that holds "
                "only tensors and plain values"
            ) from error
        raise DamagedCheckpoint(_damaged(path, _cause(error))) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise DamagedCheckpoint(_damaged(path, _cause(error))) from error


def _damaged(path: str, cause: str) -> str:
    size = os.path.getsize(path)
    return (
        f"checkpoint {path} ({size} bytes) is truncated or damaged ({cause}): use another one, "
        "such as checkpoint_last.pt or checkpoint_best.pt of the same folder"
    )


def _cause(error: Exception) -> str:
    """The part of torch's message that names the cause; the rest is advice to turn the check off."""
    named = _GLOBAL.search(str(error))
    if named:
        return f"it asks for {named[1][:100]}"
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # torch 2.6 writes it behind its advice
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    causes = [part for part in paragraphs if not part.startswith(("Weights only load failed", "Check the doc"))]
    return (causes or paragraphs or [type(error).__name__])[0].split(". ")[0][:200].rstrip(".")
