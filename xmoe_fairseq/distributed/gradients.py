"""Gradients of experts that not every process holds: averaged over those that do, and counted once in the norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import LegacyDistributedDataParallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..moe import ExpertGroup
from .groups import groups_of


def is_expert(parameter: Tensor) -> bool:
    """Returns whether other processes hold other values of a parameter."""
    return hasattr(parameter, "expert")


class ExpertParallelDDP(DistributedDataParallel):
    """PyTorch's data parallelism, which leaves experts of this process alone, and which also works without a GPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **options: Any) -> None:
        experts = [name for name, parameter in module.named_parameters() if is_expert(parameter)]
        self._set_params_and_buffers_to_ignore_for_model(module, experts)
        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        super().__init__(module, device_ids, output_device, **options)


class ExpertParallelLegacyDDP(LegacyDistributedDataParallel):
    """fairseq's data parallelism, also for processes with different numbers of experts.

    Stock sends a buffer of as many numbers as the model has parameters, which must be equally many in all processes.
    """

    def __init__(self, module: nn.Module, process_group: Any, buffer_size: int = 2**28) -> None:
        shared = sum(one.numel() for one in module.parameters() if not is_expert(one))
        super().__init__(module, process_group, min(buffer_size, shared))


def average_experts(module: nn.Module) -> None:
    """Averages the gradients of experts over the processes that hold them.

    An expert's gradient has the losses of all processes of its group in it, and fairseq expects of every gradient the
    sum over all processes divided by their number.
    """
    for parameter in module.parameters():
        groups = getattr(parameter, "expert", None)
        if isinstance(groups, ExpertGroup) and parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(dist.get_world_size())
            dist.all_reduce(parameter.grad, group=groups.replicas)


def clip(stock: Any, trainer: Any, clip_norm: float) -> Tensor:
    """Clips the gradient by its norm, in which every parameter is counted once.

    Args:
        stock: fairseq's ``Trainer.clip_grad_norm``, which takes the norm without the experts.
        trainer: fairseq's.
        clip_norm: the largest norm; 0 for none.

    Returns:
        The norm before: ().
    """
    groups = groups_of(trainer.get_model())
    if groups is None:
        norm: Tensor = stock(trainer, clip_norm)
        return norm

    def with_experts(shared: Tensor) -> Tensor:
        squares = _squares(filter(is_expert, trainer.optimizer.params))
        dist.all_reduce(squares, group=groups.group)
        return (shared.double().square() + squares.to(shared.device)).sqrt().to(shared.dtype)

    norm = trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=with_experts)
    return norm


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Takes the norm of all gradients together: ().

    A product of a vector with itself is twice as fast as torch's norm on a CPU, and adds up in parts: of the 8 million
    numbers of 64 experts the norm in one sum is off by 2e-4.
    """
    flat = [part for gradient in gradients for part in gradient.detach().reshape(-1).split(_LONGEST)]
    return torch.stack([torch.dot(part, part) for part in flat]).sum().sqrt()


# A product of vectors on a GPU counts in 32 bits.
_LONGEST = 1 << 30


def _squares(parameters: Iterable[Tensor]) -> Tensor:
    """Adds up the squares of gradients: ()."""
    return norm_of([parameter.grad.float() for parameter in parameters if parameter.grad is not None]).double().square()
