"""Everything that depends on a version: what is supported, and what stock fairseq needs to run on it.

Some things of stock fairseq do not work today; `install` mends them, for this process only:

* NumPy 2 lacks names that language models, ``--num-batch-buckets`` and masking without overlap use;
* torch >= 2.6 reads checkpoints with an allow-list of classes, and fairseq's hold an ``argparse.Namespace`` and values
  of NumPy;
* a checkpoint that cannot be read ends in a traceback;
* a file named ``dummy`` in the folder of checkpoints is removed;
* a further development set counts as forgotten although ``--valid-subset`` names it;
* a run that is killed while it writes a checkpoint, or whose disk is full, may leave none that is whole;
* a run that is resumed may differ from one that was not: it makes an update too many, samples other data, or starts
  from rounded parameters;
* options written as Python, also those in a checkpoint or YAML file, are run as code;
* a ``--best-checkpoint-metric`` that validation does not give ends the training at the first validation, fewer of the
  best checkpoints are kept than were asked for, and ``--patience`` counts anew in a run that goes on;
* most bad inputs end in a traceback;
* ``--bf16`` is taken for a TPU, so it needs torch_xla even on a GPU or CPU;
* up to 7 sentences of a test or development set are left out;
* a multilingual model cannot be used from Python, with constraints or beside a language model;
* ``--optimizer adam`` goes seven times over every parameter, and four more times to scale and clip gradients.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import shlex
import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from . import command_line
from .benchmarks import BY_TASK
from .checkpoints import numpy_values, reading, saving, shards
from .errors import UserError

logger = logging.getLogger(__name__)

FAIRSEQ_PACKAGE = "fairseq-fixed==0.12.3.1"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 6)
FAIRSEQ_VERSIONS = ("0.12.3",)

# The trainer that goes on from the checkpoint that is read, if one does.
_trainer: ContextVar[Any] = ContextVar("_trainer", default=None)
# Beside exp_avg and others in the optimizer's state.
MASTER = "fp32_param"
# Modules of fairseq that use names which `_OlderNumPy` has and NumPy 2 has not.
_OLDER_NUMPY = (
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
)


class _OlderNumPy(ModuleType):
    """NumPy with names that it had before version 2.4; ``numpy`` itself stays as it is for other programs."""

    int, float, compat = int, float, SimpleNamespace(long=int)

    @staticmethod
    def percentile(a: Any, q: Any, *, interpolation: str = "linear") -> Any:
        """What is now called with ``method``."""
        return np.percentile(a, q, method=interpolation)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def check_versions() -> None:
    """Refuses a Python, torch or fairseq that the plugin does not support.

    Raises:
        UserError: says what is installed and what to install.
    """
    if sys.version_info < MIN_PYTHON:
        raise UserError(f"Python {sys.version.split()[0]} is too old: use Python 3.11 or 3.12")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        raise UserError(f"torch {torch.__version__} is too old: pip install 'torch>=2.6'")
    try:
        version = importlib.import_module("fairseq").__version__
    except Exception as error:
        raise UserError(
            f"the installed fairseq does not import ({error}): pip uninstall fairseq; pip install {FAIRSEQ_PACKAGE}"
        ) from error
    if not version.startswith(FAIRSEQ_VERSIONS):
        raise UserError(f"fairseq {version} is not supported: pip uninstall fairseq; pip install {FAIRSEQ_PACKAGE}")


def install() -> None:
    """Mends what the module's description lists; calling it again changes nothing."""
    from fairseq import checkpoint_utils, hub_utils, options, utils
    from fairseq.data import FastaDataset, SampledMultiEpochDataset, data_utils
    from fairseq.data.iterators import EpochBatchIterator
    from fairseq.dataclass import initialize
    from fairseq.distributed import utils as distributed_utils
    from fairseq.file_io import PathManager
    from fairseq.models import BaseFairseqModel, distributed_fairseq_model
    from fairseq.nan_detector import NanDetector
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.adam import Adam
    from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
    from fairseq.tasks import FairseqTask
    from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
    from fairseq.trainer import Trainer
    from fairseq_cli import train

    from . import adam, generate, hub, interactive, literals, selection
    from .checkpoints import loading
    from .processes import batches, gradients, launch, state
    from .tasks import batching, decoding

    # A Namespace only holds values: restoring one calls nothing.
    torch.serialization.add_safe_globals([argparse.Namespace])
    numpy_values.allow()
    for module, name, wrapper in (
        (checkpoint_utils, "verify_checkpoint_directory", _leaves_files_alone),
        (checkpoint_utils, "load_checkpoint", _ends_when_trained),
        (checkpoint_utils, "load_checkpoint_to_cpu", _whole_checkpoints),
        (checkpoint_utils, "load_model_ensemble_and_task", loading.sound_models),
        (checkpoint_utils, "torch_persistent_save", _durable_saves),
        (PathManager, "copy", _durable_copies),
        (Trainer, "load_checkpoint", _newest_intact),
        (Trainer, "_prepare_sample", batches.mark_dummy),
        (Trainer, "_log_oom", batches.end_out_of_memory),
        (Trainer, "clip_grad_norm", gradients.norm_of_all),
        (Trainer, "state_dict", lambda stock: state.with_whole_experts(selection.noted(stock))),
        (Trainer, "save_checkpoint", state.no_parts),
        (FairseqOptimizer, "all_reduce_grads", gradients.average_experts),
        (EpochBatchIterator, "state_dict", state.position_of_all),
        (EpochBatchIterator, "load_state_dict", state.position_of_one),
        (checkpoint_utils, "save_checkpoint", lambda stock: state.whole_files(selection.keeps_as_many(stock))),
        (distributed_utils, "call_main", launch.one_job),
        (_FP16OptimizerMixin, "state_dict", _with_masters),
        (_FP16OptimizerMixin, "load_state_dict", _to_masters),
        (Adam, "step", adam.one_pass),
        (FairseqOptimizer, "multiply_grads", adam.scaled_later),
        (FairseqOptimizer, "clip_grad_norm", adam.clipped_later),
        (FairseqOptimizer, "zero_grad", adam.dropped_with_gradients),
        (SampledMultiEpochDataset, "_next_virtual_epoch", _same_sample_when_resumed),
        (options, "parse_args_and_arch", _bf16_is_not_tpu),
        (train, "add_defaults", command_line.checked_yaml),
        (train, "get_valid_stats", selection.with_bleu),
        (initialize, "add_defaults", command_line.checked_yaml),
        (BaseFairseqModel, "load_state_dict", loading.fitting),
        (Trainer, "train_step", _ends_at_nan),
        (NanDetector, "add_hooks", _looks_forward),
        (FastaDataset, "_build_index", _plain_names),
        (data_utils, "raise_if_valid_subsets_unintentionally_ignored", _further_sets_are_said),
        (options, "add_interactive_args", interactive.whole_lines),
        (options, "add_generation_args", generate.whole_files),
        (hub_utils, "from_pretrained", hub.found),
        (Trainer, "get_train_iterator", batching.training_batches),
        (FairseqTask, "get_batch_iterator", batching.every_sentence),
        (TranslationMultiSimpleEpochTask, "get_batch_iterator", batching.every_sentence),
        (TranslationMultiSimpleEpochTask, "build_dataset_for_inference", decoding.with_constraints),
        (TranslationMultiSimpleEpochTask, "build_generator", decoding.whole_generator),
        (TranslationMultiSimpleEpochTask, "inference_step", decoding.whole_inference_step),
        (utils, "load_align_dict", decoding.without_a_file),
        (utils, "replace_unk", decoding.by_pairs),
        (FairseqTask, "build_generator", decoding.mended_search),
    ):
        stock = getattr(module, name)
        if not stock.__globals__["__name__"].startswith(__package__):
            setattr(module, name, wrapper(stock))
    for name in _OLDER_NUMPY:
        importlib.import_module(name).np = _OlderNumPy("numpy")  # type: ignore[attr-defined]
    literals.install()
    distributed_fairseq_model.DistributedDataParallel = gradients.ExpertsApart
    hub_utils.GeneratorHubInterface = hub.Translator


def _whole_checkpoints(load_checkpoint_to_cpu: Any) -> Any:
    @functools.wraps(load_checkpoint_to_cpu)
    def load(path: str, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> Any:
        from . import identity
        from .checkpoints import language_tokens, loading, options
        from .processes.state import own_experts

        local = reading.local_path(path)
        found = reading.check(local)
        reading.check_whole(found, path)
        options.check(found, path)
        overrides = dict(arg_overrides or {})
        averages = overrides.pop(options.AVERAGES, False)
        state = load_checkpoint_to_cpu(path, overrides, load_on_all_ranks)
        shards.join(state, local)
        if averages:
            loading.with_averages(state, path)
        loading.forget_files(state, arg_overrides)
        identity.checkpoint_read.set(local)
        state["last_optimizer_state"] = state.get("last_optimizer_state") or None
        if not isinstance(state.get("task_state"), dict):  # fairseq's older versions wrote none
            state["task_state"] = {}
        trainer = _trainer.get()
        task: Any = getattr(trainer, "task", None)
        if hasattr(task, "identity"):  # for translation, fairseq does the same
            task.load_state_dict(state["task_state"])
            language_tokens.warn_of_others(found, local, task.args)
        if trainer is not None:
            own_experts(state, trainer.get_model())
        return state

    return load


def _newest_intact(load_checkpoint: Any) -> Any:
    """Goes on from the most trained intact file where ``checkpoint_last.pt`` is damaged; a file that was named is not
    replaced by another one."""
    from .checkpoints import loading

    load_checkpoint = loading.resumable(loading.counting(load_checkpoint))

    @functools.wraps(load_checkpoint)
    def load(trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        token = _trainer.set(trainer)
        # Each process reads the file: what fairseq sends from one to the others, torch refuses to unpickle.
        trainer.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = trainer.data_parallel_world_size > 1
        try:
            return load_checkpoint(trainer, filename, *args, **kwargs)
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
                return load_checkpoint(trainer, other, *args, **kwargs)
            raise
        finally:
            _trainer.reset(token)

    return load


def _ends_when_trained(load_checkpoint: Any) -> Any:
    """Stock fairseq, started again after its last update, would make one update more before it looks."""

    from . import locks, selection
    from .criterions.softmax import check_softmax
    from .processes import launch, state
    from .tasks.lengths import check_valid_sets

    @functools.wraps(load_checkpoint)
    def load(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        check_softmax(trainer.cfg)
        launch.check(trainer.cfg, trainer.cuda)
        launch.check_files(trainer.cfg)
        if trainer.data_parallel_rank == 0 and not cfg.no_save:
            locks.hold(cfg.save_dir)
            for name in saving.remove_leftovers(cfg.save_dir):
                logger.info(f"removed {name}, which an earlier run had not finished writing")
        loaded = load_checkpoint(cfg, trainer, *args, **kwargs)
        state.agree(trainer)
        updates, most = trainer.get_num_updates(), trainer.cfg.optimization.max_update
        if most and updates >= most:
            logger.info(f"nothing is left to train: the checkpoint has {updates} updates, --max-update is {most}")
            raise SystemExit(0)
        check_valid_sets(trainer)
        selection.restore(cfg, loaded[0])
        selection.check_metric(trainer)
        return loaded

    return load


def _leaves_files_alone(verify_checkpoint_directory: Any) -> Any:
    """Stock fairseq tries ``--save-dir`` by writing and removing ``dummy``, which may be a file of the user."""

    @functools.wraps(verify_checkpoint_directory)
    def verify(save_dir: str) -> None:
        saving.check_folder(save_dir)

    return verify


def _durable_saves(torch_persistent_save: Any) -> Any:
    """Stock fairseq renames a file that may not be on the disk yet, and tries again within the same file."""
    from fairseq.file_io import PathManager

    @functools.wraps(torch_persistent_save)
    def save(obj: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            torch_persistent_save(obj, filename, async_write)
        else:
            saving.save(numpy_values.plain_numbers(obj), filename)

    return save


def _durable_copies(copy: Any) -> Any:
    """Stock fairseq makes ``checkpoint_last.pt`` by copying over the old one, which is lost if that is cut short."""
    from fairseq.file_io import PathManager

    @functools.wraps(copy)
    def durable(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not (PathManager.supports_rename(src_path) and PathManager.supports_rename(dst_path)):
            return copy(src_path, dst_path, overwrite)
        saving.copy(src_path, dst_path)
        return dst_path

    return durable


def _same_sample_when_resumed(next_virtual_epoch: Any) -> Any:
    """With ``--virtual-epoch-size``, stock fairseq draws a sample in the first epoch of each pass over the data; when
    resumed within a pass, it would draw another one."""

    @functools.wraps(next_virtual_epoch)
    def advance(dataset: Any, epoch: int) -> None:
        first = epoch - (epoch - 1) % dataset.num_virtual_epochs
        if dataset._random_global_indices is None and first != epoch:
            next_virtual_epoch(dataset, first)
        next_virtual_epoch(dataset, epoch)

    return advance


def _with_masters(state_dict: Any) -> Any:
    """With ``--fp16`` and ``--bf16``, stock fairseq saves the parameters rounded to 16 bits only; this adds those in
    32 bits, which are what is trained, to the optimizer's state of each."""

    @functools.wraps(state_dict)
    def state(optimizer: Any) -> dict[str, Any]:
        whole: dict[str, Any] = state_dict(optimizer)
        for number, parameter in enumerate(_masters(optimizer)):
            whole["state"][number] = {**whole["state"].get(number, {}), MASTER: parameter.data}
        return whole

    return state


def _to_masters(load_state_dict: Any) -> Any:
    @functools.wraps(load_state_dict)
    def load(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        load_state_dict(optimizer, *args, **kwargs)
        for parameter in _masters(optimizer):
            saved = optimizer.optimizer.state[parameter].pop(MASTER, None)
            if saved is not None:  # files of stock fairseq have none
                parameter.data.copy_(saved)

    return load


def _masters(optimizer: Any) -> list[torch.Tensor]:
    """Lists the parameters in 32 bits, by their numbers in the optimizer's state."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]


def _ends_at_nan(train_step: Any) -> Any:
    """Stock fairseq, where a loss is NaN, ends with a traceback that does not say of which update."""

    @functools.wraps(train_step)
    def step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train_step(trainer, *args, **kwargs)
        except FloatingPointError as error:
            raise UserError(
                f"training diverged in update {trainer.get_num_updates() + 1} ({str(error).splitlines()[0]}): the loss "
                "is NaN or infinite. Try a smaller --lr, a --clip-norm such as 1.0, more --warmup-updates; the "
                "checkpoints written before are as they were"
            ) from error

    return step


def _looks_forward(add_hooks: Any) -> Any:
    """Stock fairseq's search for what made a NaN fails in the backward pass of modules that give dictionaries, as its
    own encoders do, or plans, as ours do; where the first NaN was made, the forward pass says."""

    @functools.wraps(add_hooks)
    def add(detector: Any, module: Any) -> None:
        detector.backward = False
        add_hooks(detector, module)

    return add


def _plain_names(build_index: Any) -> Any:
    """Stock fairseq puts the name of a FASTA file into a command of the shell."""

    @functools.wraps(build_index)
    def build(dataset: Any, path: str) -> Any:
        if shlex.quote(path) != path:
            raise UserError(f"{path!r} is refused: the name of a FASTA file may have letters, digits and ./_-=@ only")
        return build_index(dataset, path)

    return build


def _bf16_is_not_tpu(parse_args_and_arch: Any) -> Any:
    parse_args_and_arch = command_line.checked(parse_args_and_arch)

    @functools.wraps(parse_args_and_arch)
    def parse(*args: Any, **kwargs: Any) -> Any:
        result = parse_args_and_arch(*args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        if importlib.util.find_spec("torch_xla") is None:
            parsed.tpu = False
        return result

    return parse


def _further_sets_are_said(raise_if_ignored: Any) -> Any:
    """Stock compares names of files with names of sets; in our tasks a set that is not read is no error."""
    from fairseq.data import data_utils

    @functools.wraps(raise_if_ignored)
    def check(cfg: Any) -> None:
        if getattr(cfg.task, "_name", None) not in BY_TASK:
            raise_if_ignored(cfg)
            return
        named = {name.partition("@")[0] for name in cfg.dataset.valid_subset.split(",")}
        there = {name.partition(".")[0] for name in data_utils._find_extra_valid_paths(cfg.task.data)}
        known = cfg.dataset.ignore_unused_valid_subsets or cfg.dataset.combine_valid_subsets
        if (others := sorted(there - named)) and not known and not cfg.dataset.disable_validation:
            every = ",".join((cfg.dataset.valid_subset, *others))
            logger.warning(f"the data also has {', '.join(others)}: --valid-subset {every} reads all of them")

    return check
