"""A checkpoint in several files: ``NAME.pt`` without experts, and ``NAME.experts-k-of-K.pt`` with a block of them each.

Every tensor of experts is stacked ``(E, ...)``: in the model, in its moving average, and in the optimizer's state.
`split` leaves the empty slice ``(0, ...)`` in its place, so that the order of all entries is kept, and lists
where the places are; each shard holds its rows of all of them in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.schema import build
from ..errors import UserError
from ..moe.expert_parallel.group import block
from ..moe.experts.kinds import EXPERTS
from .reading import SHARD, SHARD_SET, DamagedCheckpoint, check_sums, read_shard
from .saving import Writer

Place = list[Any]  # keys from the state down to a tensor
Concatenate = Callable[[list[Tensor]], Tensor]

_AGAIN = "shard the whole checkpoint again"
# The path of a set of experts, the number of a size if there are several (`SizedExperts`), and the parameter.
_EXPERTS = re.compile(r"((?:.*\.)?experts)\.(?:parts\.\d+\.)?(\w+)")


@dataclass(frozen=True)
class ShardSet:
    """What ``NAME.pt`` says of its shards.

    Attributes:
        source: the `fingerprint` of the checkpoint that they were made of.
        shards: their number.
        experts: of the layer that has fewest.
        places: of the tensors that they hold, in their order.
    """

    source: str
    shards: int
    experts: int
    places: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Shard:
    """A file of experts.

    Attributes:
        name: ``NAME.pt``, which it belongs to.
        source, shards: as of `ShardSet`.
        number: of this one, from 0.
        tensors: its rows of each.
    """

    name: str
    source: str
    number: int
    shards: int
    tensors: Sequence[Any]


def is_expert(name: str) -> bool:
    """Returns whether a parameter is stacked by experts, of any kind."""
    match = _EXPERTS.fullmatch(name)
    return match is not None and any(match[2] in kind.names_of_tensors() for kind in EXPERTS.values())


def set_of(name: str) -> str:
    """Names the set of experts that a parameter of experts belongs to."""
    match = _EXPERTS.fullmatch(name)
    return match[1] if match else ""


def shard_path(path: str, number: int, shards: int) -> str:
    """Names the file of one block of experts, beside ``NAME.pt``."""
    return f"{path.removesuffix('.pt')}.experts-{number}-of-{shards}.pt"


def fingerprint(path: str) -> str:
    """Returns what tells one checkpoint from any other; a file that has not changed is read once in a process."""
    now = os.stat(path)
    return _fingerprint(path, now.st_ino, now.st_size, now.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _fingerprint(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expert_places(state: dict[str, Any]) -> list[Place]:
    """Lists where a whole checkpoint holds tensors of experts."""
    places: list[Place] = [["model", name] for name in state["model"] if is_expert(name)]
    for average in ("ema", "ema_fp32_params"):
        held = (state.get("extra_state") or {}).get(average, ())
        places += [["extra_state", average, name] for name in held if is_expert(name)]
    experts = {name: len(state["model"][name]) for name in state["model"] if is_expert(name)}
    moments = (state.get("last_optimizer_state") or {}).get("state", {})
    for number, name in optimizer_names(state).items():
        for key, value in moments.get(number, {}).items():
            if name in experts and isinstance(value, Tensor) and value.dim() and len(value) == experts[name]:
                places.append(["last_optimizer_state", "state", number, key])
    return places


def optimizer_names(state: dict[str, Any]) -> dict[int, str]:
    """Finds the parameter of each number in the optimizer's state; none if it is one flat vector.

    torch numbers the parameters in the order of the model's, where buffers and the second names of tied
    parameters stand between them: those are recognised by their shapes.
    """
    optimizer = state.get("last_optimizer_state") or {}
    numbers = [number for group in optimizer.get("param_groups", ()) for number in group["params"]]
    shapes = {number: _moment_shape(optimizer["state"].get(number, {})) for number in numbers}
    seen: set[int] = set()
    parameters = iter(
        (name, tensor.shape)
        for name, tensor in state["model"].items()
        if not (tensor.data_ptr() in seen or seen.add(tensor.data_ptr()))  # type: ignore[func-returns-value]
    )
    names = {}
    for number in numbers:
        name = next((name for name, shape in parameters if shapes[number] in (None, shape)), None)
        if name is None:
            return {}
        names[number] = name
    return names


def _moment_shape(moments: dict[str, Any]) -> torch.Size | None:
    """The shape of a parameter, known from the optimizer's averages of its gradients."""
    return next((value.shape for value in moments.values() if isinstance(value, Tensor) and value.dim()), None)


def split(state: dict[str, Any], shards: int, name: str, source: str) -> Iterator[dict[str, Any]]:
    """Takes the experts out of a checkpoint, block by block; at the end the state is that of ``NAME.pt``.

    Args:
        state: a whole checkpoint, which is changed.
        shards: K; if it does not divide the experts, the first blocks have one more.
        name: ``NAME.pt``.
        source: the checkpoint's `fingerprint`.

    Yields:
        The states of the shards' files.

    Raises:
        UserError: the checkpoint has fewer experts than shards, or none.
    """
    places = expert_places(state)
    tensors = [holder(state, place)[place[-1]] for place in places]
    fewest = check_number(state, shards)
    for number in range(shards):
        blocks = [_own_rows(tensor, block(len(tensor), number, shards)) for tensor in tensors]
        yield {SHARD: vars(Shard(name, source, number, shards, blocks))}
    for place, tensor in zip(places, tensors, strict=True):
        holder(state, place)[place[-1]] = tensor[:0].clone()
    state[SHARD_SET] = vars(ShardSet(source, shards, fewest, places))


def writers(state: dict[str, Any], out: str, shards: int, source: str) -> dict[str, Writer]:
    """Returns what writes the files of a set of shards, in their order, for `saving.write`.

    Args:
        state: a whole checkpoint, which is changed.
        out: the path of ``NAME.pt``.
        shards, source: as of `split`.

    Raises:
        UserError: the checkpoint has fewer experts than shards, or none.
    """
    check_number(state, shards)
    parts = split(state, shards, os.path.basename(out), source)

    def one(file: Any) -> None:
        torch.save(next(parts), file)

    def rest(file: Any) -> None:
        for _ in parts:  # takes the experts out
            pass
        torch.save(state, file)

    # NAME.pt, which comes last, is the state that the shards were taken from.
    return {shard_path(out, number, shards): one for number in range(shards)} | {out: rest}


def check_number(state: dict[str, Any], shards: int) -> int:
    """Returns the experts of the layer that has fewest.

    Raises:
        UserError: they are fewer than the shards, or there are none.
    """
    sets = {name: len(tensor) for name, tensor in state["model"].items() if is_expert(name)}
    fewest = min(sets.values(), default=0)
    if not 1 <= shards <= fewest:
        of_size = " of one size" if any(".parts." in name for name, number in sets.items() if number == fewest) else ""
        raise UserError(
            f"--shards {shards} is out of range: the checkpoint has {fewest} experts{of_size}, one a shard at most"
        )
    return fewest


def _own_rows(tensor: Tensor, held: range) -> Tensor:
    """Takes rows as a tensor of their own bytes: torch would save the whole of what a slice is cut from, and a
    copy would need memory."""
    rows = tensor.contiguous()[held.start : held.stop]
    first, size = rows.storage_offset() * rows.element_size(), rows.numel() * rows.element_size()
    storage = rows.untyped_storage()[first : first + size]
    return torch.empty(0, dtype=rows.dtype).set_(storage, 0, rows.shape, rows.stride())


def join(state: dict[str, Any], path: str, concatenate: Concatenate = torch.cat) -> None:
    """Puts the experts of all shards into the state of ``NAME.pt``; does nothing to a whole checkpoint.

    Args:
        state: is changed.
        path: of ``NAME.pt``, beside which the shards are.
        concatenate: the blocks of one tensor.

    Raises:
        DamagedCheckpoint: a shard is missing, damaged, or of another checkpoint.
    """
    if SHARD_SET not in state:
        return
    wanted = shard_set(state, path)
    del state[SHARD_SET]
    _check_places(state, wanted.places, path)
    shards = [_read_one(path, number, wanted) for number in range(wanted.shards)]
    for index, place in enumerate(wanted.places):
        blocks = [shard.tensors[index] for shard in shards]
        kept = holder(state, place)
        if len({(block.dtype, block.shape[1:]) for block in (kept[place[-1]], *blocks)}) > 1 or not blocks[0].dim():
            raise DamagedCheckpoint(f"the shards of {path} hold other experts each of {place[-1]}: {_AGAIN}")
        kept[place[-1]] = concatenate(blocks)


def shard_set(state: dict[str, Any], path: str) -> ShardSet:
    """Returns what ``NAME.pt`` says of its shards.

    Raises:
        DamagedCheckpoint: it is damaged.
    """
    try:
        return build(ShardSet, state[SHARD_SET], f"{SHARD_SET} of {path}", _AGAIN)
    except UserError as error:
        raise DamagedCheckpoint(error.message) from error


def _check_places(state: dict[str, Any], places: Sequence[Sequence[Any]], path: str) -> None:
    """Refuses places, other than those that `split` left empty, each once."""
    for number, place in enumerate(places):
        try:
            inner = holder(state, place)
            empty = (
                isinstance(inner, dict) and isinstance(inner[place[-1]], Tensor) and inner[place[-1]].shape[:1] == (0,)
            )
        except (LookupError, TypeError):
            empty = False
        if not empty or place in places[:number]:
            raise DamagedCheckpoint(f"{SHARD_SET} of {path} names {place!s:.80}, where no experts were: {_AGAIN}")


def _read_one(path: str, number: int, wanted: ShardSet) -> Shard:
    file = shard_path(path, number, wanted.shards)
    if not os.path.isfile(file):
        raise DamagedCheckpoint(f"{file} is missing: {path} needs all of its {wanted.shards} shards beside it")
    values = read_shard(file)
    shard = build(Shard, values, f"{SHARD} of {file}", _AGAIN) if values is not None else None
    if shard is None or (shard.source, shard.number, shard.shards) != (wanted.source, number, wanted.shards):
        raise DamagedCheckpoint(
            f"{file} is not shard {number} of {path}, but of another checkpoint: shard that one again, or copy its "
            "files together"
        )
    if len(shard.tensors) != len(wanted.places) or not all(isinstance(one, Tensor) for one in shard.tensors):
        raise DamagedCheckpoint(f"{file} does not hold the {len(wanted.places)} tensors that {path} expects: {_AGAIN}")
    check_sums(file)
    return shard


def holder(state: dict[str, Any], place: Sequence[Any]) -> dict[Any, Any]:
    """Returns the dictionary that holds what is in a place."""
    for key in place[:-1]:
        state = state[key]
    return state
