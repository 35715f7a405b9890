"""Reading files of other people: what is no file would be waited for, or read, without an end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import UserError
from .outputs import replacing

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def check_regular(path: str | Path) -> None:
    """Makes sure that a path leads to a file.

    Raises:
        OSError: nothing is there, or something else, such as a named pipe.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')} and no file", str(path))


def is_there(path: str | Path) -> bool:
    """Returns whether a file that may be missing is there.

    Raises:
        OSError: something else has its name: a folder, a named pipe, a symlink that leads nowhere.
    """
    if not os.path.lexists(path):
        return False
    check_regular(path)
    return True


def read_file(path: str | Path) -> bytes:
    """Reads a whole file.

    Raises:
        OSError: as of `check_regular`, or it cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()


def read_lines(path: Path, what: str) -> list[str]:
    r"""Reads the lines of a UTF-8 file, which end at ``\n`` and nowhere else.

    ``str.splitlines`` and text mode would also break at U+2028, U+0085 or ``\r``, all of which occur in real text.

    Raises:
        UserError: the file is missing, unreadable or not UTF-8; ``what`` names it.
    """
    try:
        text = read_file(path).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8: {error}") from error
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def write_lines(path: Path, lines: list[str]) -> None:
    r"""Writes one line each, ended by ``\n``, and leaves either the whole file or what was there before."""
    with replacing(path) as temporary:
        temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())
