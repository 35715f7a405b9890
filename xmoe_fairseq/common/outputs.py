"""Writing results whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its name if, and only if, the block succeeds.

    Raises:
        UserError: a folder has the name of the file, or the file cannot be written.
    """
    check_no_folders([path])
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path.parent):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # what could not be written need not be there
                temporary.unlink(missing_ok=True)


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Does the same for several files of one folder: all of them are replaced, or none.

    Raises:
        UserError: as of `replacing_set`.
    """
    check_no_folders(paths)
    with replacing_set(paths[0]) as folder:
        yield [folder / path.name for path in paths]


@contextmanager
def replacing_set(member: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yields an empty folder whose files take their places beside ``member`` if the block succeeds: all, or none.

    When they are whole, the folder gets another name. What is killed after that is finished by the next that writes
    the set, and refused by those who read it.

    Args:
        member: one of the files; its name without the ending names the set.
        stale: names of files that earlier sets may have had, to be removed if this one does not have them.

    Raises:
        UserError: a folder has the name of a file, or a file cannot be written.
    """
    parent, new, ready = member.parent, *_places(member)
    finish_replacing(member)
    with writing(parent):
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed
        try:
            new.mkdir()
            yield new
            names = os.listdir(new)
            check_no_folders(parent / name for name in names)
            new.rename(ready)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        for path in (parent / name for name in set(stale).difference(names)):
            if path.is_file() or path.is_symlink():
                path.unlink()
    finish_replacing(member)


def finish_replacing(member: Path) -> None:
    """Moves what `replacing_set` left when it was killed.

    Raises:
        UserError: something cannot be moved, or has the name of what it left.
    """
    _, ready = _places(member)
    if not os.path.lexists(ready):
        return
    if ready.is_symlink() or not ready.is_dir():
        raise UserError(f"{ready} is no folder that this program left: remove it")
    with writing(member.parent):
        for name in sorted(os.listdir(ready)):
            os.replace(ready / name, member.with_name(name))
        ready.rmdir()


def check_replaced(member: Path, command: str) -> None:
    """Makes sure that the files of a set are of one time.

    Args:
        member: one of them.
        command: that writes them.

    Raises:
        UserError: they are being replaced, or were when their program was killed.
    """
    if os.path.lexists(_places(member)[1]):
        raise UserError(
            f"{member} and the files beside it are being replaced, or were when their program was killed: run "
            f"{command} again"
        )


def _places(member: Path) -> tuple[Path, Path]:
    """Returns the folders of a set while it is made and when it is whole."""
    return member.with_name(f".{member.stem}.new"), member.with_name(f".{member.stem}.ready")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one line what the operating system refuses while files of a folder are written.

    Raises:
        UserError: of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror or error}") from error


def check_no_folders(paths: Iterable[Path]) -> None:
    """Finds out whether files can take these names.

    Raises:
        UserError: a folder has one of them.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"cannot write the file {path}: a folder has this name, rename it")


def check_writable(folder: Path, option: str = "--out") -> None:
    """Finds out whether files can be written to a folder, which may not be there yet, and leaves nothing behind.

    Args:
        folder: that work of minutes will be written to.
        option: that named it.

    Raises:
        UserError: it is a file, a symlink that leads nowhere, or in a place where nothing can be written.
    """
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        what = "no folder" if there.exists() else "a symlink that leads nowhere"
        raise UserError(f"cannot write to {option} {folder}: {there} is {what}; give another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {option} {folder}: {error.strerror}; give another") from error
