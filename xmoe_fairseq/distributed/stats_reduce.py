"""Batches of several processes, counted as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.distributed import utils as distributed

from ..moe.routing.statistics import RoutingStats, pack, unpack

# In a batch that stands in for one that a process lacks, because the batches could not be dealt out evenly.
DUMMY_BATCH = "stands_in"


def all_reduce_stats(
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
