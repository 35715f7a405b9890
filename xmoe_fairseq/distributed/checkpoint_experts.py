"""Checkpoints of several processes: one file, as one process writes it, in which every other number of processes finds
its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed
from torch import Tensor

from ..checkpoints import shards
from ..errors import UserError
from ..moe.expert_parallel.group import ExpertGroup
from .groups import groups_of


@contextmanager
def whole_experts(trainer: Any) -> Iterator[None]:
    """For a while, the first process's ``state_dict`` has all experts; all processes must enter."""
    groups = groups_of(trainer.get_model())
    trainer.whole_experts = []
    if groups is not None and dist.get_rank() < groups.size:  # the first replica
        trainer.consolidate_optimizer()
        trainer.whole_experts = gather(trainer.state_dict(), groups)
    try:
        yield
    finally:
        del trainer.whole_experts


def gather(state: dict[str, Any], group: ExpertGroup) -> list[tuple[shards.Place, Tensor]]:
    """Sends the experts of a group to its first process, tensor by tensor.

    Args:
        state: of a checkpoint, with the experts that this process holds.
        group: all of its processes must call this.

    Returns:
        In the first process all experts, each tensor with its place in the state; elsewhere nothing.
    """
    places = []
    for place in shards.expert_places(state):
        own = shards.holder(state, place)[place[-1]].detach()
        sizes = torch.tensor([0] * group.rank + [len(own)] + [0] * (group.size - group.rank - 1), device=own.device)
        dist.all_reduce(sizes, group=group.group)
        if group.rank > 0:
            dist.send(own.contiguous(), 0, group=group.group)
            continue
        parts = [own.cpu()]
        for rank, size in enumerate(sizes.tolist()[1:], start=1):
            part = own.new_empty((size, *own.shape[1:]))
            dist.recv(part, rank, group=group.group)
            parts.append(part.cpu())
        places.append((place, torch.cat(parts)))
    return places


def with_whole_experts(saved: dict[str, Any], trainer: Any) -> dict[str, Any]:
    """Puts the gathered experts into what is saved, which names no layout of processes."""
    for place, tensor in getattr(trainer, "whole_experts", ()):
        saved = _replaced(saved, place, tensor)
    if "moe_expert_parallel" in (saved["cfg"]["model"] or ()):
        saved = _replaced(saved, ["cfg", "model", "moe_expert_parallel"], 1)
    return saved


def _replaced(state: Mapping[Any, Any], place: shards.Place, value: Any) -> dict[Any, Any]:
    """Copies the dictionaries on the way to a place, some of which training goes on with."""
    key, *rest = place
    return {**state, key: _replaced(state[key], rest, value) if rest else value}


def holds_parts(trainer: Any) -> bool:
    """Returns whether what the trainer would save now has some of the experts only."""
    return groups_of(trainer.get_model()) is not None and not hasattr(trainer, "whole_experts")


def keep_local_experts(state: dict[str, Any], model: Any) -> None:
    """Leaves the experts that a model holds in this process in a whole checkpoint, which is changed."""
    groups = groups_of(model)
    if groups is None:
        return
    for place in shards.expert_places(state):
        holder = shards.holder(state, place)
        rows = groups.block(len(holder[place[-1]]))
        holder[place[-1]] = holder[place[-1]][rows.start : rows.stop].clone()


def agree(trainer: Any) -> None:
    """Makes sure that all processes start from the same checkpoint.

    Raises:
        UserError: they do not.
    """
    if trainer.data_parallel_world_size == 1:
        return
    updates = trainer.get_num_updates()
    ends = torch.tensor([updates, -updates], device=trainer.device)
    distributed.all_reduce(ends, op="max", group=trainer.data_parallel_process_group)
    most, least = ends[0].item(), -ends[1].item()
    if most != least:
        raise UserError(
            f"process {trainer.data_parallel_rank} found a checkpoint of {updates} updates, others {least} to {most}: "
            "--save-dir must be the same folder on all machines"
        )
