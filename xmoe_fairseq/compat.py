"""Everything that depends on a version: what is supported, and what stock fairseq needs to run on it.

Three things of stock fairseq do not work today; `install` mends them, for this process only:

* torch >= 2.6 reads checkpoints with an allow-list of classes, and fairseq's hold an ``argparse.Namespace``;
* a checkpoint that cannot be read ends in a traceback;
* ``--bf16`` is taken for a TPU, so it needs torch_xla even on a GPU or CPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import zipfile
from typing import Any

import torch

from .errors import UserError

FAIRSEQ_PACKAGE = "fairseq-fixed==0.12.3.1"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 6)
FAIRSEQ_VERSIONS = ("0.12.3",)


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
    from fairseq import checkpoint_utils, options

    # A Namespace only holds values: restoring one calls nothing.
    torch.serialization.add_safe_globals([argparse.Namespace])
    for module, name, wrapper in (
        (checkpoint_utils, "load_checkpoint_to_cpu", _readable_errors),
        (checkpoint_utils, "load_model_ensemble_and_task", _missing_files),
        (options, "parse_args_and_arch", _bf16_is_not_tpu),
    ):
        stock = getattr(module, name)
        if not hasattr(stock, "__wrapped__"):
            setattr(module, name, wrapper(stock))


def _readable_errors(load_checkpoint_to_cpu: Any) -> Any:
    @functools.wraps(load_checkpoint_to_cpu)
    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        _check_checkpoint_file(path)
        return load_checkpoint_to_cpu(path, *args, **kwargs)

    return load


def _missing_files(load_model_ensemble_and_task: Any) -> Any:
    signature = inspect.signature(load_model_ensemble_and_task)

    @functools.wraps(load_model_ensemble_and_task)
    def load(filenames: list[str], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(filenames, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["num_shards"] == 1 and not given.arguments["suffix"]:  # shards have other names
            for filename in filenames:
                _local_path(filename)
        return load_model_ensemble_and_task(filenames, *args, **kwargs)

    return load


def _local_path(path: str) -> str:
    """Finds a checkpoint on this machine.

    Raises:
        UserError: there is none.
    """
    from fairseq.file_io import PathManager

    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise UserError(f"there is no checkpoint {path}: check --path or --restore-file")
    return local


def _check_checkpoint_file(path: str) -> None:
    """Reads the file once without its tensors' data being copied, only to name what is wrong with it.

    Raises:
        UserError: the file is missing, truncated, no checkpoint, or would run code when read.
    """
    path = _local_path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"checkpoint {path} is refused, because reading it would load or run code outside the allow-list "
                f"({_cause(error)}); nothing was run. Use a file from a source you trust that holds "
                "only tensors and plain values"
            ) from error
        raise UserError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(_damaged(path, error)) from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is no fairseq checkpoint: it holds no 'model'. Check the file name")


def _damaged(path: str, error: Exception) -> str:
    size = os.path.getsize(path)
    return (
        f"checkpoint {path} ({size} bytes) is truncated or damaged ({_cause(error)}): use another one, "
        "such as checkpoint_last.pt or checkpoint_best.pt of the same folder"
    )


def _cause(error: Exception) -> str:
    """The part of torch's message that names the cause; the rest is advice to turn the check off."""
    paragraphs = [" ".join(part.split()) for part in str(error).split("\n\n") if part.strip()]
    causes = [part for part in paragraphs if not part.startswith(("Weights only load failed", "Check the doc"))]
    return (causes or paragraphs or [type(error).__name__])[0].split(". ")[0][:200].rstrip(".")


def _bf16_is_not_tpu(parse_args_and_arch: Any) -> Any:
    @functools.wraps(parse_args_and_arch)
    def parse(*args: Any, **kwargs: Any) -> Any:
        result = parse_args_and_arch(*args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        if importlib.util.find_spec("torch_xla") is None:
            parsed.tpu = False
        return result

    return parse
