"""Starting several processes as one job, on GPUs and without, and refusing what cannot work before it starts."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed
from fairseq.file_io import PathManager
from omegaconf import open_dict
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from ..checkpoints.reading import LAST
from ..common import guard, locks
from ..errors import UserError
from . import groups

# What torchrun, and nothing else, sets in each of its processes.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Those that leave experts of other processes alone; two have an older name, too.
_BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d")


def run(call_main: Callable[..., Any], cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
    """Runs a command of fairseq in all processes of its job.

    Args:
        call_main: fairseq's, which starts processes or joins those that are there.
        cfg: the command's configuration.
        main: the command.
        kwargs: for the command.

    Raises:
        UserError: the options do not go together, or another process has ended.
    """
    with guard.told_to_torchrun():
        _run(call_main, cfg, main, **kwargs)


def _run(call_main: Callable[..., Any], cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
    options = cfg.distributed_training
    if cfg.common_eval.path is not None:  # a trained model: one process is enough
        call_main(cfg, main, **kwargs)
        return
    on_gpu = torch.cuda.is_available() and not cfg.common.cpu
    with open_dict(cfg):
        if options.distributed_init_method is None and all(name in os.environ for name in _TORCHRUN):
            _join_torchrun(options, on_gpu)
        if options.distributed_world_size > 1 and not on_gpu and not cfg.common.tpu:
            _without_gpu(options)
    check(cfg, on_gpu)
    check_files(cfg)
    try:
        call_main(cfg, main, **kwargs)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"process {options.distributed_rank} cannot reach the others any more ({str(error).splitlines()[0]}): "
            "the log of one that ended says why; start again, and training resumes from its last checkpoint"
        ) from error
    finally:
        locks.release_all()


def _join_torchrun(options: Any, on_gpu: bool) -> None:
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpus = torch.cuda.device_count() if on_gpu else 0
    # With --gpus-per-task and the like, a process sees its own GPU only.
    if on_gpu and gpus > 1 and local >= gpus:
        raise UserError(
            f"process {rank} is the {local + 1}th of its machine, which has {gpus} GPUs: start torchrun with "
            f"--nproc_per_node {gpus}, or train with --cpu"
        )
    options.distributed_world_size, options.distributed_rank = size, rank
    options.device_id = local % gpus if on_gpu else 0
    options.distributed_no_spawn = True
    if size > 1:
        options.distributed_init_method = "torchrun://"


def _meet(url: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Lets the processes of torchrun find each other.

    Its store outlives a restart, after which torch's own ``env://`` may find the addresses of processes that died.
    """
    store, rank, size = next(rendezvous("env://", **options))
    yield dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, size


register_rendezvous_handler("torchrun", _meet)


def _without_gpu(options: Any) -> None:
    """Uses gloo, and the processes that are there: fairseq starts others on GPUs only, and SLURM's use them."""
    size = options.distributed_world_size
    if options.distributed_init_method is None and not distributed._infer_slurm_init(options, None):
        raise UserError(
            f"--distributed-world-size {size} starts no processes without GPUs: start them with "
            f"torchrun --nproc_per_node {size} $(which fairseq-train) ..., or give --distributed-world-size 1"
        )
    options.device_id = 0
    options.distributed_backend = "gloo"
    options.distributed_no_spawn = True


def check(cfg: Any, on_gpu: bool) -> None:
    """Refuses back ends and options that do not work with the number of processes.

    Raises:
        UserError: names the option and what to give instead.
    """
    options = cfg.distributed_training
    size, backend = options.distributed_world_size, str(options.ddp_backend)
    experts = int(getattr(cfg.model, "moe_expert_parallel", 1) or 1)
    if backend == "fully_sharded":
        # Its layers need all processes in each step of a search, and searches have different numbers of steps.
        if hasattr(cfg.task, "eval_bleu_lines") and cfg.task.eval_bleu:
            raise UserError("--eval-bleu does not work with --ddp-backend fully_sharded: use legacy_ddp")
        _check_fully_sharded(on_gpu)
    if experts == 1:
        return
    groups.check(experts, size)
    flat = cfg.common.fp16 and not (cfg.common.fp16_no_flatten_grads or cfg.common.memory_efficient_fp16)
    for name, given, instead in (
        (f"--ddp-backend {backend}", backend not in _BACKENDS, "use legacy_ddp or pytorch_ddp"),
        ("--fp16 with flat gradients", flat, "add --fp16-no-flatten-grads"),
        # Its scaler leaves out an update in the processes that see an infinite gradient only.
        ("--amp", cfg.common.amp, "use --bf16, or --fp16 --fp16-no-flatten-grads"),
        ("--zero-sharding os", str(options.zero_sharding) == "os", "leave it out"),
        ("--use-bmuf", cfg.optimization.use_bmuf, "leave it out"),
    ):
        if given:
            raise UserError(
                f"{name} does not work with --moe-expert-parallel {experts}, because processes hold different experts: "
                + instead
            )


def check_files(cfg: Any) -> None:
    """Refuses to train without a file that was named: it would train from nothing, or end after minutes.

    Raises:
        UserError: names the option and the file.
    """
    options, log = cfg.checkpoint, cfg.common.log_file
    last = os.path.join(options.save_dir, LAST)
    exists = os.path.isfile(last) or os.path.isdir(last)  # a folder is refused below, in its own words
    if options.restore_file == LAST and os.path.lexists(last) and not exists:
        raise UserError(
            f"{last}, from which training would resume, is no file, or a symlink to none: bring it back, or remove it "
            "to start again"
        )
    for option in ("finetune_from_model", "continue_once", "restore_file"):
        path = getattr(options, option, None)
        # A resumed run does not need what it started from, and may start without its own last checkpoint.
        if path not in (None, LAST) and not (option != "restore_file" and PathManager.exists(last)):
            _check_there(f"--{option.replace('_', '-')}", path, options.save_dir)
    if cfg.ema.store_ema and cfg.ema.ema_seed_model is not None:
        _check_there("--ema-seed-model", cfg.ema.ema_seed_model, options.save_dir)
    if options.finetune_from_model is not None and options.restore_file != LAST:
        raise UserError(
            f"--finetune-from-model {options.finetune_from_model} and --restore-file {options.restore_file} are two "
            "files to start from: give one of them"
        )
    if log is not None and (os.path.isdir(log) or not os.path.isdir(os.path.dirname(log) or ".") or _is_unread(log)):
        raise UserError(f"--log-file {log} cannot be written: give a file in a folder that is there")


def _is_unread(path: str) -> bool:
    """Returns whether a path is a named pipe that nobody reads: who opens it waits without an end."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _check_there(option: str, path: str, save_dir: str) -> None:
    if PathManager.isfile(path) or re.match(r"\w+://", path):
        return
    folders = (os.path.dirname(path), save_dir)
    places = {name: os.path.join(folder, name) for folder in folders for name in _names(folder)}
    others = {name: place for name, place in places.items() if os.path.isfile(place)}
    near = difflib.get_close_matches(os.path.basename(path), others, n=1)
    advice = f"did you mean {others[near[0]]}?" if near else "check the name"
    raise UserError(f"there is no checkpoint {path}, which {option} names: {advice}")


def _names(folder: str) -> list[str]:
    return os.listdir(folder or ".") if os.path.isdir(folder or ".") else []


def _check_fully_sharded(on_gpu: bool) -> None:
    if importlib.util.find_spec("fairscale") is None:
        raise UserError("--ddp-backend fully_sharded needs fairscale: pip install fairscale==0.4.13, or use legacy_ddp")
    if not on_gpu:
        raise UserError("--ddp-backend fully_sharded needs GPUs: fairscale has no code for CPUs; use legacy_ddp")
