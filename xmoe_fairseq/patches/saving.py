"""Writing checkpoints so that a run that is killed leaves whole ones, with all experts, of any number of processes."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from ..checkpoints import numpy_values, saving, selection
from ..distributed import checkpoint_experts
from .registry import Group

logger = logging.getLogger(__name__)

GROUP = Group("Writing checkpoints")


@GROUP.patch(checkpoint_utils, "verify_checkpoint_directory", "save_dir")
def verify_checkpoint_directory(stock: Any, save_dir: str) -> None:
    """Stock tries `--save-dir` by writing and removing `dummy`, which may be a file of the user."""
    saving.check_folder(save_dir)


@GROUP.patch(checkpoint_utils, "torch_persistent_save", "obj filename async_write")
def torch_persistent_save(stock: Any, obj: Any, filename: str, async_write: bool = False) -> None:
    """Stock renames a file that may not be on the disk yet, and tries again within the same file."""
    if async_write or not PathManager.supports_rename(filename):
        stock(obj, filename, async_write)
    else:
        saving.save(numpy_values.plain_checkpoint(obj), filename)


@GROUP.patch(PathManager, "copy", "src_path dst_path overwrite")
def copy(stock: Any, src_path: str, dst_path: str, overwrite: bool = False) -> Any:
    """Stock makes `checkpoint_last.pt` by copying over the old one, which is lost if that is cut short."""
    if not (PathManager.supports_rename(src_path) and PathManager.supports_rename(dst_path)):
        return stock(src_path, dst_path, overwrite)
    saving.copy(src_path, dst_path)
    return dst_path


@GROUP.patch(checkpoint_utils, "save_checkpoint", "cfg trainer epoch_itr val_loss")
def keep_as_many(stock: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock saves one of `--keep-best-checkpoints` only if it is no worse than the worst that is kept, also if fewer
    than that are kept: of losses that rise it keeps one."""
    listed = checkpoint_utils.checkpoint_paths

    def with_worst(path: str, pattern: str = r"checkpoint(\d+)\.pt", keep_match: bool = False) -> Any:
        found = listed(path, pattern, keep_match)
        if not pattern.startswith(r"checkpoint\.best_") or len(found) >= cfg.keep_best_checkpoints:
            return found
        # The place of a file that is not there yet, worse than all: fairseq reads the value from the name.
        worst = -math.inf if cfg.maximize_best_checkpoint_metric else math.inf
        place = os.path.join(path, f"checkpoint.best_{cfg.best_checkpoint_metric}_{worst}.pt")
        return [*found, place] if worst < 0 else [place, *found]

    checkpoint_utils.checkpoint_paths = with_worst
    try:
        return stock(cfg, *args, **kwargs)
    finally:
        checkpoint_utils.checkpoint_paths = listed


@GROUP.patch(checkpoint_utils, "save_checkpoint", "cfg trainer epoch_itr val_loss")
def save_checkpoint(stock: Any, cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """The experts of all processes are brought together in the first one, which writes the files."""
    if cfg.no_save:
        return stock(cfg, trainer, *args, **kwargs)
    with checkpoint_experts.whole_experts(trainer):
        return stock(cfg, trainer, *args, **kwargs)


@GROUP.patch(Trainer, "state_dict", "self")
def state_dict(stock: Any, trainer: Any) -> dict[str, Any]:
    """A checkpoint has the experts of all processes, and keeps by which metric the best one is chosen and what
    `--patience` has counted."""
    saved: dict[str, Any] = stock(trainer)
    selection.note(saved, trainer)
    return checkpoint_experts.with_whole_experts(saved, trainer)


@GROUP.patch(Trainer, "save_checkpoint", "self filename extra_state")
def save_trainer(stock: Any, trainer: Any, filename: str, extra_state: dict[str, Any]) -> Any:
    """No `crash.pt` is written if one process has an error and holds some of the experts only."""
    if checkpoint_experts.holds_parts(trainer):
        logger.error(f"{filename} is not written: this process holds some of the experts only")
        return None
    return stock(trainer, filename, extra_state)
