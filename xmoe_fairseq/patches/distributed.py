"""Several processes as one job, in which not every process holds every expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import gradients, launch, stats_reduce
from ..errors import UserError
from .registry import Group

GROUP = Group("Several processes")


@GROUP.patch(distributed_utils, "call_main", "cfg main **kwargs")
def call_main(stock: Any, cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
    """Without GPUs, stock trains as many models as `torchrun` starts processes; now they are one job, with one GPU each
    where each sees one only."""
    launch.run(stock, cfg, main, **kwargs)


@GROUP.patch(FairseqOptimizer, "all_reduce_grads", "self module")
def all_reduce_grads(stock: Any, optimizer: Any, module: nn.Module) -> None:
    """The gradients of experts are averaged over the processes that hold them."""
    stock(optimizer, module)
    gradients.average_experts(module)


@GROUP.patch(Trainer, "clip_grad_norm", "self clip_norm")
def clip_grad_norm(stock: Any, trainer: Any, clip_norm: float) -> Tensor:
    """Every parameter is counted once in the norm of the gradient, which stock takes without the experts."""
    return gradients.clip(stock, trainer, clip_norm)


@GROUP.patch(Trainer, "_prepare_sample", "self sample is_dummy")
def _prepare_sample(stock: Any, trainer: Any, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
    """A dummy batch, of a process without data, contributes nothing to our criterion; stock, with `--update-freq`, also
    forgets the size and metrics of the other batches of the update."""
    prepared, dummy = stock(trainer, sample, is_dummy)
    if dummy and getattr(trainer.get_criterion(), "counts_dummy_batches", False):
        return {**prepared, stats_reduce.DUMMY_BATCH: True}, False
    return prepared, dummy


@GROUP.patch(Trainer, "_log_oom", "self exc")
def _log_oom(stock: Any, trainer: Any, exc: Exception) -> None:
    """A process that has no memory for its batch ends: stock leaves the batch out, and the others would wait for this
    process in the middle of theirs."""
    stock(trainer, exc)
    if trainer.data_parallel_world_size > 1:
        raise UserError(
            f"process {trainer.data_parallel_rank} is out of memory, and the others cannot go on without it: lower "
            "--max-tokens and raise --update-freq; training resumes from its last checkpoint"
        ) from exc


GROUP.replace(
    distributed_fairseq_model,
    "DistributedDataParallel",
    DistributedDataParallel,
    gradients.ExpertParallelDDP,
    "PyTorch's data parallelism averages experts that only this process holds, and fairseq gives it a GPU always.",
)
GROUP.replace(
    distributed_fairseq_model,
    "LegacyDistributedDataParallel",
    LegacyDistributedDataParallel,
    gradients.ExpertParallelLegacyDDP,
    "Stock adds up a buffer whose size is the number of parameters of a process, experts included, and fails where "
    "processes hold different numbers of experts.",
)
