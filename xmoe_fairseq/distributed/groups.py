"""Which process holds which experts.

The N processes of a job are groups of P neighbours; the processes of a group share the experts of one replica of the
model, and the processes with the same place in their groups hold the same experts. A model's `parallel_groups` are
those that its experts were built for; several models in one process may have different ones.
"""

from __future__ import annotations

import os
from argparse import Namespace
from functools import cache
from typing import Any

import torch.distributed as dist

from ..errors import UserError
from ..models.config import fewest_experts
from ..moe import ExpertGroup


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


def parallel_groups(cfg: Namespace) -> ExpertGroup | None:
    """Finds the groups of a model with MoE layers; the first call for each P is collective.

    Args:
        cfg: the model's configuration, resolved and checked.

    Returns:
        The groups of this process; None if it holds all experts.

    Raises:
        UserError: the processes cannot be divided so; torch.distributed is not initialised in torchrun's processes; the
            model does not work in several processes.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
            raise UserError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, but each would train a model of its own: use "
                "fairseq-train, or the options of docs/parallel.md for fairseq-hydra-train"
            )
        return None
    if dropping := [stack for stack in ("encoder", "decoder") if getattr(cfg, f"{stack}_layerdrop")]:
        raise UserError(
            "LayerDrop does not work with MoE layers in several processes, for each would leave out others: give "
            + " ".join(f"--{stack}-layerdrop 0" for stack in dropping)
        )
    parallel = cfg.moe_expert_parallel
    check(parallel, processes)
    if parallel > (fewest := fewest_experts(cfg)):
        option = "--moe-num-experts" if fewest == cfg.moe_num_experts else "the fewest of --moe-layer-experts,"
        raise UserError(
            f"--moe-expert-parallel {parallel} is more than {option} {fewest}: each process must hold an expert"
        )
    return _made_once(parallel, dist.group.WORLD) if parallel > 1 else None


@cache
def _made_once(parallel: int, world: Any) -> ExpertGroup:
    """Models share groups, which torch.distributed sets up for as long as the job, ``world``, lasts."""
    return ExpertGroup.of(parallel)


def groups_of(model: Any) -> ExpertGroup | None:
    """Finds the groups of any model that is trained, also inside of DistributedDataParallel.

    Returns:
        The groups of this process; None if it holds all experts, or if the model has none.
    """
    while hasattr(model, "module"):
        model = model.module
    return getattr(model, "parallel_groups", None)
