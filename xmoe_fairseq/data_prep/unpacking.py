"""Text files of the user, plain or compressed, as streams of bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import UserError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# Python reads these but for the last, which it learns with 3.14: the program of that name does it.
ZSTD = ".zst"
SUFFIXES = (*_OPENERS, ZSTD)


class DamagedError(Exception):
    """A compressed file that cannot be unpacked to its end; says why."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; it is unpacked while it is read, as the end of its name says.

    Raises:
        DamagedError: while reading or at the end, it cannot be unpacked.
        UserError: what unpacks it is not installed.
    """
    if path.suffix == ZSTD:
        with _zstd(path) as stream:
            yield stream
        return
    try:
        with cast(BinaryIO, _OPENERS.get(path.suffix, open)(path, "rb")) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DamagedError(str(error)) from error  # as bz2 says it


@contextmanager
def _zstd(path: Path) -> Iterator[BinaryIO]:
    program = shutil.which("zstd")
    if program is None:
        raise UserError(
            f"{path} is read with the program zstd, which is not installed: install it, for instance with "
            "apt-get install zstd or conda install zstd, or unpack the file"
        )
    command = [program, "--decompress", "--stdout", "--quiet", "--", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield cast(BinaryIO, process.stdout)
        except BaseException:
            process.kill()
            raise
        said = process.stderr.read().decode(errors="replace")
    if process.returncode:
        raise DamagedError(" ".join(said.split()) or f"zstd ended with code {process.returncode}")
