"""Going on from a checkpoint as if training had not stopped."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.data import SampledMultiEpochDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from fairseq.trainer import Trainer

from ..checkpoints import loading, reading, saving, selection
from ..common import guard, locks
from ..criterions.routers import check_routers
from ..criterions.softmax import check_softmax
from ..distributed import checkpoint_experts, launch
from ..errors import UserError
from ..tasks.lengths import check_valid_sets
from .reading import current_trainer
from .registry import Group

logger = logging.getLogger(__name__)

GROUP = Group("Going on from a checkpoint")

# Beside exp_avg and others in the optimizer's state.
MASTER = "fp32_param"
# How stock says that an epoch is over before the place in it that a checkpoint names.
_FEWER = "dataloader mismatch"

_LOAD = "self filename reset_optimizer reset_lr_scheduler optimizer_overrides reset_meters"


@GROUP.patch(Trainer, "load_checkpoint", _LOAD)
def count_updates(
    stock: Any,
    trainer: Any,
    filename: str,
    reset_optimizer: bool = False,
    reset_lr_scheduler: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stock, if a file has no optimizer's state, makes all updates again, in the middle of the data."""
    extra_state = stock(trainer, filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)
    last = trainer._optim_history[-1] if extra_state and trainer._optim_history else {}
    updates = last.get("num_updates", 0)
    if reset_optimizer or trainer.get_num_updates() == updates:
        return extra_state
    logger.warning(
        f"{filename} holds no optimizer's state: training goes on after update {updates}, and the optimizer starts "
        "from zero; --reset-optimizer counts updates from 0"
    )
    if last.get("lr_scheduler_state") and not reset_lr_scheduler:
        trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
    trainer.set_num_updates(updates)
    return extra_state


@GROUP.patch(Trainer, "load_checkpoint", _LOAD)
def name_other_options(stock: Any, trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
    """Stock ends in one of many tracebacks when training resumes with other options than the file's, and takes
    parameters that are NaN or infinite."""
    try:
        extra_state = stock(trainer, filename, *args, **kwargs)
    except Exception as error:
        other_cause = isinstance(error, (OSError, dist.DistError)) or "gloo" in str(error)
        if other_cause or guard.is_no_memory(error):
            raise
        cause = error if error.__context__ is None else error.__context__
        reason = " ".join(str(cause).split())[:300]
        reason = f"{type(cause).__name__}: {reason}" if isinstance(cause, KeyError) else reason or type(cause).__name__
        raise UserError(
            f"training cannot resume from {filename} with these options ({reason}): give the --arch, --optimizer, "
            "--lr-scheduler, --criterion and precision that it was trained with, or --reset-optimizer to keep the "
            "parameters only"
        ) from error
    if extra_state is not None:  # there is such a file
        loading.check_finite(trainer.get_model(), filename)
    return extra_state


@GROUP.patch(Trainer, "load_checkpoint", _LOAD)
def load_newest_intact(stock: Any, trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
    """If `checkpoint_last.pt` is damaged, training resumes from the intact file of the folder with the most updates; a
    file that the command names is never replaced by another one."""
    token = current_trainer.set(trainer)
    # Each process reads the file: what fairseq sends from one to the others, torch refuses to unpickle.
    trainer.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = trainer.data_parallel_world_size > 1
    try:
        return stock(trainer, filename, *args, **kwargs)
    except reading.DamagedCheckpoint as error:
        options = trainer.cfg.checkpoint
        if filename != os.path.join(options.save_dir, options.restore_file) or options.restore_file != reading.LAST:
            raise
        for other in reading.others_by_updates(filename):
            try:
                reading.check(other)
            except reading.DamagedCheckpoint as also:
                logger.warning(also.message)
                continue
            logger.warning(f"{error.message}; going on from {other}, the most trained intact one of the folder")
            return stock(trainer, other, *args, **kwargs)
        raise
    finally:
        current_trainer.reset(token)


@GROUP.patch(checkpoint_utils, "load_checkpoint", "cfg trainer **passthrough_args")
def load_checkpoint(stock: Any, cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock, started again after its last update, makes one update more before it looks. A second training in the same
    `--save-dir` is refused."""
    if not isinstance(trainer, Trainer):  # of another program, with options of its own
        return stock(cfg, trainer, *args, **kwargs)
    check_softmax(trainer.cfg, trainer.get_model())
    check_routers(trainer.cfg, trainer.get_model())
    launch.check(trainer.cfg, trainer.cuda)
    launch.check_files(trainer.cfg)
    if trainer.data_parallel_rank == 0 and not cfg.no_save:
        locks.hold(cfg.save_dir)
        for name in saving.remove_leftovers(cfg.save_dir):
            logger.info(f"removed {name}, which an earlier run had not finished writing")
    loaded = stock(cfg, trainer, *args, **kwargs)
    checkpoint_experts.agree(trainer)
    updates, most = trainer.get_num_updates(), trainer.cfg.optimization.max_update
    if most and updates >= most:
        logger.info(f"nothing is left to train: the checkpoint has {updates} updates, --max-update is {most}")
        raise SystemExit(0)
    check_valid_sets(trainer)
    selection.restore(cfg, loaded[0])
    selection.check_metric(trainer)
    return loaded


@GROUP.patch(SampledMultiEpochDataset, "_next_virtual_epoch", "self epoch")
def _next_virtual_epoch(stock: Any, dataset: Any, epoch: int) -> None:
    """With `--virtual-epoch-size`, stock draws a sample in the first epoch of each pass over the data, and another one
    when it goes on within a pass."""
    first = epoch - (epoch - 1) % dataset.num_virtual_epochs
    if dataset._random_global_indices is None and first != epoch:
        stock(dataset, first)
    stock(dataset, epoch)


@GROUP.patch(EpochBatchIterator, "state_dict", "self")
def position_of_all(stock: Any, iterator: Any) -> dict[str, Any]:
    """A checkpoint notes how many batches of the epoch all processes have had."""
    saved: dict[str, Any] = stock(iterator)
    return {**saved, "batches_in_epoch": saved["iterations_in_epoch"] * iterator.num_shards}


@GROUP.patch(EpochBatchIterator, "load_state_dict", "self state_dict")
def restore_epoch_position(stock: Any, iterator: Any, state_dict: dict[str, Any]) -> None:
    """Training resumes at the same place of the epoch with any number of processes; if the batches cannot be divided
    evenly, the last few are repeated. If the epoch has fewer batches now, stock asks for a report."""
    if "batches_in_epoch" in state_dict:  # files of stock fairseq do not have it
        state_dict = {**state_dict, "iterations_in_epoch": state_dict["batches_in_epoch"] // iterator.num_shards}
    try:
        stock(iterator, state_dict)
    except RuntimeError as error:
        if _FEWER not in str(error):
            raise
        made, epoch = state_dict["iterations_in_epoch"], state_dict["epoch"]
        raise UserError(
            f"training cannot resume after batch {made} of epoch {epoch}, which has fewer batches now: give the "
            "--max-tokens, --batch-size and data as before, or --reset-dataloader, which starts the data again"
        ) from error


@GROUP.patch(_FP16OptimizerMixin, "state_dict", "self")
def save_masters(stock: Any, optimizer: Any) -> dict[str, Any]:
    """With `--fp16` and `--bf16`, stock saves the parameters rounded to 16 bits only; those in 32 bits, which are what
    is trained, are added to the optimizer's state."""
    whole: dict[str, Any] = stock(optimizer)
    for number, parameter in enumerate(_masters(optimizer)):
        whole["state"][number] = {**whole["state"].get(number, {}), MASTER: parameter.data}
    return whole


@GROUP.patch(_FP16OptimizerMixin, "load_state_dict", "self state_dict optimizer_overrides")
def load_masters(stock: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
    """The parameters in 32 bits are read as they were saved."""
    stock(optimizer, *args, **kwargs)
    for parameter in _masters(optimizer):
        saved = optimizer.optimizer.state[parameter].pop(MASTER, None)
        if saved is not None:  # files of stock fairseq have none
            parameter.data.copy_(saved)


def _masters(optimizer: Any) -> list[torch.Tensor]:
    """Lists the parameters in 32 bits, by their numbers in the optimizer's state."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
