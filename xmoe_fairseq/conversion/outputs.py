"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

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


def record_path(out: str, command: str) -> str:
    """Names the record beside a checkpoint that a command writes."""
    return f"{out.removesuffix('.pt')}.{command}.json"


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder that gets its name when the block ends, and is removed if the block fails.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield made
        made.chmod(0o777 & ~_umask())
        os.rename(made, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; make room or give another folder") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before
