"""Which process holds which experts.

The N processes of a job are groups of P neighbours; the processes of a group share the experts of one replica of the
model, and the processes with the same place in their groups hold the same experts.
"""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import dataclass

import torch.distributed as dist

from ..config import placed
from ..errors import UserError
from ..moe.parallel import ExpertGroup


@dataclass(frozen=True)
class Layout:
    """A process's place among all.

    Attributes:
        experts: the processes that share the experts of one replica.
        replicas: the processes that hold the same experts as this one.
    """

    experts: ExpertGroup
    replicas: dist.ProcessGroup


_layouts: dict[int, Layout] = {}
_current: Layout | None = None


def check(expert_parallel: int, processes: int) -> None:
    """Refuses groups of processes that do not fit.

    Raises:
        UserError: the processes cannot be divided into groups of so many.
    """
    if expert_parallel > 1 and processes == 1:
        raise UserError(
            f"--moe-expert-parallel {expert_parallel} needs {expert_parallel} processes or a multiple, and there is "
            "one: start fairseq-train with torchrun --nproc_per_node (docs/parallel.md), or leave the option out"
        )
    if expert_parallel < 1 or processes % expert_parallel:
        divisors = ", ".join(str(number) for number in range(1, processes + 1) if processes % number == 0)
        raise UserError(
            f"--moe-expert-parallel {expert_parallel} does not divide the {processes} processes: give one of {divisors}"
        )


def set_up(cfg: Namespace) -> None:
    """Divides the processes for the model that is built next; all of them must call it.

    Args:
        cfg: its configuration, resolved and checked.

    Raises:
        UserError: the processes cannot be divided so; they are no job; the model does not work in several processes.
    """
    global _current
    _current = None
    if not placed(cfg):
        return
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
            raise UserError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, but each would train a model of its own: use "
                "fairseq-train, or the options of docs/parallel.md for fairseq-hydra-train"
            )
        return
    if cfg.encoder_layerdrop or cfg.decoder_layerdrop:
        raise UserError("LayerDrop does not work with MoE layers in several processes: each would leave out others")
    parallel = cfg.moe_expert_parallel
    check(parallel, processes)
    if parallel > cfg.moe_num_experts:
        raise UserError(
            f"--moe-expert-parallel {parallel} is more than --moe-num-experts {cfg.moe_num_experts}: each process must "
            "hold an expert"
        )
    if parallel > 1:
        if parallel not in _layouts:
            _layouts[parallel] = _divide(parallel, processes)
        _current = _layouts[parallel]


def current() -> Layout | None:
    """Gives the layout of the model that was built last; none where each process holds all experts."""
    return _current


def _divide(expert_parallel: int, processes: int) -> Layout:
    experts = ExpertGroup.of(expert_parallel)
    replicas = list(range(experts.rank, processes, expert_parallel))
    return Layout(experts, dist.new_group(replicas, use_local_synchronization=True))
