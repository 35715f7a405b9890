"""Reading checkpoints by PyTorch's allow-list, and saying in a line what is wrong with a file."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

# What a file of a sharded checkpoint holds beside stock fairseq's entries; see shards.py.
SHARD_SET = "xmoe_shard_set"
SHARD = "xmoe_shard"
# What --restore-file is unless it is given.
LAST = "checkpoint_last.pt"


class DamagedCheckpoint(UserError):
    """A checkpoint is not whole; another one of the same folder may be."""


def check(path: str) -> None:
    """Reads a checkpoint once, without keeping it, only to name what is wrong with it.

    Raises:
        DamagedCheckpoint: the file is truncated or its contents differ from their checksums.
        UserError: it is no checkpoint, or would run code when read.
    """
    state = _read(path)
    if isinstance(state, dict) and SHARD in state:
        shard = state[SHARD]
        name = shard.get("name", "NAME.pt") if isinstance(shard, dict) else "NAME.pt"
        raise UserError(f"{path} holds some experts of a checkpoint only: give {name} beside it")
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is no fairseq checkpoint: it holds no 'model'. Check the file name")
    check_sums(path)


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


def read(path: str) -> dict[str, Any]:
    """Reads a checkpoint for `xmoe checkpoint`: tensors stay in the file until they are used.

    Raises:
        UserError: the file is missing, or `check` refuses it.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: check the name")
    check(path)
    state: dict[str, Any] = _read(path)
    return state


def read_shard(path: str) -> dict[str, Any] | None:
    """Reads a file of experts without checking its sums; gives nothing where it is another kind of file.

    Raises:
        DamagedCheckpoint: the file is truncated or damaged.
        UserError: it would run code when read.
    """
    state = _read(path)
    return state[SHARD] if isinstance(state, dict) and SHARD in state else None


def updates(state: dict[str, Any]) -> int:
    """Gives the number of updates that a checkpoint was trained for."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def others_by_updates(path: str) -> list[str]:
    """Lists the other readable checkpoints of a checkpoint's folder, the most trained first."""
    found = []
    for other in sorted(Path(path).parent.glob("checkpoint*.pt")):
        try:
            state = _read(str(other)) if other.name != os.path.basename(path) else None
        except UserError:
            continue
        if isinstance(state, dict) and "model" in state:
            found.append((updates(state), str(other)))
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"checkpoint {path} is refused, because reading it would load or run code outside the allow-list "
                f"({_cause(error)}); nothing was run. Use a file from a source you trust that holds "
                "only tensors and plain values"
            ) from error
        raise DamagedCheckpoint(_damaged(path, _cause(error))) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DamagedCheckpoint(_damaged(path, _cause(error))) from error


def _damaged(path: str, cause: str) -> str:
    size = os.path.getsize(path)
    return (
        f"checkpoint {path} ({size} bytes) is truncated or damaged ({cause}): use another one, "
        "such as checkpoint_last.pt or checkpoint_best.pt of the same folder"
    )


def _cause(error: Exception) -> str:
    """The part of torch's message that names the cause; the rest is advice to turn the check off."""
    paragraphs = [" ".join(part.split()) for part in str(error).split("\n\n") if part.strip()]
    causes = [part for part in paragraphs if not part.startswith(("Weights only load failed", "Check the doc"))]
    return (causes or paragraphs or [type(error).__name__])[0].split(". ")[0][:200].rstrip(".")
