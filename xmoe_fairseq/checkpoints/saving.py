"""Files that are whole or not there, whenever the program is killed and however full the disk is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import torch

from ..errors import UserError

Writer = Callable[[IO[bytes]], Any]

TEMPORARY = ".tmp"
_COPY_BYTES = 1 << 24
# The files that training writes; with the ending, those that it has not finished.
_CHECKPOINT = re.compile(r"checkpoint.*\.pt(\.tmp)?")
# A disk shared with others may have room again a moment later.
_TRIES, _PAUSE = 3, 2.5


def write(writers: Mapping[str, Writer]) -> None:
    """Writes files under temporary names beside them, and then gives all of them their names, in the order given.

    Args:
        writers: by path, what writes the file's bytes.

    Raises:
        UserError: a file cannot be written, as on a full disk; none is left behind, and the previous ones are whole.
    """
    temporary = {path: path + TEMPORARY for path in writers}
    refuse_folders(writers)
    try:
        for path, writer in writers.items():
            _write_one(path, temporary[path], writer)
        for path in writers:
            os.replace(temporary[path], path)
            _sync_folder(os.path.dirname(path) or ".")
    finally:
        for name in temporary.values():
            with contextlib.suppress(OSError):  # nothing was written where nothing can be removed
                os.unlink(name)


def refuse_folders(paths: Iterable[str]) -> None:
    """Refuses folders in the places of files, before work is done for the files.

    Raises:
        UserError: names the first one.
    """
    for path in paths:
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, and a file of this name is to be written: move it, or choose another")


def check_out(out: str, force: bool = False) -> None:
    """Makes sure that a checkpoint can be written as ``--out`` says, before work is done for it.

    Raises:
        UserError: the name does not end in .pt, its folder is missing, or a file is there and is not to be replaced.
    """
    if not out.endswith(".pt"):
        raise UserError(f"--out {out} must end in .pt")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise UserError(f"there is no folder {os.path.dirname(out)} for --out {out}: make it first")
    check_free(out, force)


def check_free(path: str, force: bool = False) -> None:
    """Refuses a file that is there and is not to be replaced, and a folder in its place.

    Raises:
        UserError: names it.
    """
    refuse_folders([path])
    if not force and os.path.lexists(path):
        raise UserError(f"{path} is there already: give another --out, or --force to replace it")


def check_folder(folder: str) -> None:
    """Makes sure that training can write its checkpoints; changes no file of the folder.

    Raises:
        UserError: says why not.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"--save-dir {folder} cannot be written to ({error.strerror}): give a folder where you may write"
        ) from error
    refuse_folders(os.path.join(folder, name) for name in names if _CHECKPOINT.fullmatch(name))


def _write_one(path: str, temporary: str, writer: Writer) -> None:
    try:
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())  # a machine that fails after the rename must find the bytes too
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise UserError(_not_written(path, temporary, cause)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Finds the error of the operating system behind torch's, which says only where it met it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _not_written(path: str, temporary: str, cause: OSError) -> str:
    folder = os.path.dirname(path) or "."
    written = os.path.getsize(temporary) if os.path.exists(temporary) else 0
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
    before = f"; the previous {path} ({os.path.getsize(path)} bytes) is whole" if os.path.isfile(path) else ""
    return (
        f"{path} could not be written: {cause.strerror} after {written} bytes, "
        f"{free} bytes are free in {folder}{before}. "
        "Make room or give another folder, and start the same command again; training resumes from its last checkpoint"
    )


def _sync_folder(folder: str) -> None:
    """Makes a rename last; only POSIX systems open folders."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save(state: Any, path: str) -> None:
    """Writes a checkpoint as ``torch.save`` does.

    Raises:
        UserError: it could not be written, several times.
    """
    for remaining in reversed(range(_TRIES)):
        try:
            return write({path: lambda file: torch.save(state, file)})
        except UserError:
            if not remaining:
                raise
            time.sleep(_PAUSE)


def copy(source: str, target: str) -> None:
    """Copies a file; whoever opens the target finds the old or the new one.

    Raises:
        UserError: the target cannot be written.
    """
    with open(source, "rb") as file:
        write({target: lambda out: shutil.copyfileobj(file, out, _COPY_BYTES)})


def remove_leftovers(folder: str) -> list[str]:
    """Removes what a killed training left half-written in its folder, and names it."""
    if not os.path.isdir(folder):
        return []
    found = [name for name in sorted(os.listdir(folder)) if _CHECKPOINT.fullmatch(name) and name.endswith(TEMPORARY)]
    for name in found:
        os.remove(os.path.join(folder, name))
    return found
