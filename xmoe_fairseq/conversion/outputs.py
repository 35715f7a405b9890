"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from ..checkpoints.saving import Writer
from ..errors import UserError

# What a record is called in messages.
RECORD = "the record"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_free(out: Path) -> None:
    """Refuses a folder that is there, or has no place.

    Raises:
        UserError: names it.
    """
    if os.path.lexists(out):
        raise UserError(f"--out {out} is there already: give another folder")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for --out {out}: make it first")


@contextlib.contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[Writer], Writer]]:
    """Shows how many bytes are written; yields what is to wrap every writer.

    Args:
        total: bytes that all writers write, roughly.
        quiet: shows nothing.
    """
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="write", disable=quiet) as bar:
        yield lambda write: lambda file: write(CallbackIOWrapper(bar.update, file, "write"))


def record_path(out: str, command: str) -> str:
    """Names the record beside a checkpoint that a command writes."""
    return f"{out.removesuffix('.pt')}.{command}.json"


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder that gets its name when the block ends, and is removed if the block fails.

    The caller holds the lock of ``out``, so a hidden folder that is there was left by a program that was killed.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    made = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        yield made
        os.rename(made, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; make room or give another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
