"""Expert parallelism: processes that share the experts of a layer, and which of them holds which."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def block(experts: int, number: int, blocks: int) -> range:
    """Returns the experts of one block; if the blocks do not divide them, the first ones hold one more."""
    each, more = divmod(experts, blocks)
    start = number * each + min(number, more)
    return range(start, start + each + (number < more))


@dataclass(frozen=True)
class ExpertGroup:
    """The P processes over which the experts of every layer are split, as one of them sees it.

    Attributes:
        rank: of this process in the group.
        size: P.
        group: what torch.distributed made of them; None for all processes.
        host: a group of the same processes in which numbers of the host are agreed on without waiting for the device;
            None for ``group``.
        replicas: the processes that hold the same experts as this one, over which their gradients are averaged.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, size: int, timeout: timedelta | None = None) -> ExpertGroup:
        """Splits all processes into groups of ``size`` neighbours; every process must call it.

        Args:
            size: P.
            timeout: how long a call waits for the other processes before it fails; None for torch's default, minutes.

        Returns:
            The group of this process.

        Raises:
            ValueError: ``size`` does not divide the number of processes.
        """
        world, here = dist.get_world_size(), dist.get_rank()
        if size < 1 or world % size:
            raise ValueError(f"groups of {size} processes do not divide {world} processes: choose a divisor of {world}")
        ranks = list(range(here - here % size, here - here % size + size))
        group = dist.new_group(ranks, timeout, use_local_synchronization=True)
        host = None
        if dist.get_backend() != "gloo":
            host = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
        replicas = dist.new_group(list(range(here % size, world, size)), timeout, use_local_synchronization=True)
        return cls(here % size, size, group, host, replicas)

    def block(self, experts: int) -> range:
        """Returns the experts that this process holds, of E.

        Raises:
            ValueError: there are fewer experts than processes.
        """
        if experts < self.size:
            raise ValueError(
                f"{experts} experts cannot be split over {self.size} processes: each must hold at least one"
            )
        return block(experts, self.rank, self.size)

    def largest(self, *numbers: int) -> list[int]:
        """Returns the largest of each number over the processes."""
        host = self.host or self.group
        device = "cpu" if "gloo" in dist.get_backend(host) else "cuda"
        agreed = torch.tensor(numbers, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=host)
        return agreed.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGroup:
        return self  # a copy of a model works in the same processes
