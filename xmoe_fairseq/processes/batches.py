"""Batches of several processes, counted as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.distributed import utils as distributed

from ..errors import UserError
from ..moe.statistics import RoutingStats, pack, unpack

# In a batch that stands in for one that a process lacks, because the batches could not be dealt out evenly.
DUMMY = "stands_in"


def of_all_processes(
    records: Sequence[RoutingStats], sample_size: int, counts: bool
) -> tuple[Sequence[RoutingStats], Any]:
    """Adds up what the routers of all processes did, by one collective call for all layers.

    Args:
        records: of this process; as many, of the same layers, in each.
        sample_size: of this process.
        counts: whether this process is counted.

    Returns:
        The sums over all processes, with the gradients of this one's part, and the sum of the sample sizes.
    """
    if not records or distributed.get_data_parallel_world_size() == 1:
        return records, sample_size
    own = pack(records)
    own = torch.cat([own, own.new_tensor([sample_size])]) * counts
    everyone = distributed.all_reduce(own.detach().clone(), group=distributed.get_data_parallel_group())
    sums = own + (everyone - own.detach())
    return unpack(sums[:-1], records), sums[-1].float()


def mark_dummy(prepare_sample: Any) -> Any:
    """Leaves it to our criterion to count a batch that stands in as nothing.

    Stock fairseq, with ``--update-freq``, also forgets the size and metrics of its other batches in the update.
    """

    @functools.wraps(prepare_sample)
    def prepare(trainer: Any, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        prepared, dummy = prepare_sample(trainer, sample, is_dummy)
        if dummy and getattr(trainer.get_criterion(), "knows_dummies", False):
            return {**prepared, DUMMY: True}, False
        return prepared, dummy

    return prepare


def end_out_of_memory(log_oom: Any) -> Any:
    """Ends a process that has no memory for its batch.

    Stock fairseq leaves the batch out, and the others would wait for this process in the middle of theirs.
    """

    @functools.wraps(log_oom)
    def end(trainer: Any, error: Exception) -> None:
        log_oom(trainer, error)
        if trainer.data_parallel_world_size > 1:
            raise UserError(
                f"process {trainer.data_parallel_rank} is out of memory, and the others cannot go on without it: lower "
                "--max-tokens and raise --update-freq; training goes on from its last checkpoint"
            ) from error

    return end
