"""Training and validation: what is left out, and what ends without a word."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import Any

from fairseq.nan_detector import NanDetector
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from fairseq.trainer import Trainer
from fairseq_cli import train

from ..checkpoints import selection
from ..errors import UserError
from .registry import Group

GROUP = Group("Training and validation")

_trains: ContextVar[bool] = ContextVar("_trains", default=False)
_BATCHES = (
    "self dataset max_tokens max_sentences max_positions ignore_invalid_inputs required_batch_size_multiple seed "
    "num_shards shard_id num_workers epoch data_buffer_size disable_iterator_cache skip_remainder_batch "
    "grouped_shuffling update_epoch_batch_itr"
)


@GROUP.patch(Trainer, "train_step", "self samples raise_oom")
def train_step(stock: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock, if a loss is NaN, ends with a traceback that does not say of which update."""
    try:
        return stock(trainer, *args, **kwargs)
    except FloatingPointError as error:
        raise UserError(
            f"training diverged in update {trainer.get_num_updates() + 1} ({str(error).splitlines()[0]}): the loss "
            "is NaN or infinite. Try a smaller --lr, a --clip-norm such as 1.0, more --warmup-updates; the "
            f"checkpoints written before are as they were{_left(trainer)}"
        ) from error


def _left(trainer: Any) -> str:
    """Names the file that fairseq leaves if training diverges."""
    if not isinstance(trainer, Trainer):
        return ""
    path = os.path.join(trainer.cfg.checkpoint.save_dir, "crash.pt")
    return (
        f"; {path} has the state before this update: remove it when it is of no more use"
        if os.path.isfile(path)
        else ""
    )


@GROUP.patch(NanDetector, "add_hooks", "self module")
def add_hooks(stock: Any, detector: Any, module: Any) -> None:
    """Stock's search for what made a NaN fails in the backward pass of modules that give dictionaries, as its own
    encoders do, or plans, as ours do; where the first NaN was made, the forward pass says."""
    detector.backward = False
    stock(detector, module)


@GROUP.patch(train, "get_valid_stats", "cfg trainer stats tracking_best")
def get_valid_stats(stock: Any, cfg: Any, trainer: Any, stats: dict[str, Any], *args: Any) -> Any:
    """Stock `translation --eval-bleu` gives no BLEU if all translations are empty, as of a model that has hardly
    been trained, and ends if it is to choose by it."""
    if "bleu" in selection.translation_metrics(trainer.task):
        stats.setdefault("bleu", 0.0)
    return stock(cfg, trainer, stats, *args)


@GROUP.patch(
    Trainer,
    "get_train_iterator",
    "self epoch combine load_dataset data_selector shard_batch_itr disable_iterator_cache",
)
def get_train_iterator(stock: Any, *args: Any, **kwargs: Any) -> Any:
    """The patch of `get_batch_iterator` is told that the batches are trained on."""
    token = _trains.set(True)
    try:
        return stock(*args, **kwargs)
    finally:
        _trains.reset(token)


@GROUP.patch(FairseqTask, "get_batch_iterator", _BATCHES)
@GROUP.patch(TranslationMultiSimpleEpochTask, "get_batch_iterator", _BATCHES)
def get_batch_iterator(stock: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock leaves out the last batch if `--required-batch-size-multiple`, 8 by default, does not divide it: up to 7
    sentences would not be translated, or not be in a validation loss. In training that stays as it is."""
    if not _trains.get() and "required_batch_size_multiple" in kwargs:
        kwargs["required_batch_size_multiple"] = 1
    return stock(*args, **kwargs)
