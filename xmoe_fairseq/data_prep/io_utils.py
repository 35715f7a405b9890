"""Reading and writing files so that nothing half-written ever looks finished."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UserError
from .unpacking import DamagedError, opened

SPLITS = ("train", "valid", "test")
TEMPORARY = ".tmp"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Bytes of a line: a longer one is no sentence, and one without an end would take all memory.
LONGEST_LINE = 1 << 20
# Bytes that stand in text now and then, and what it means if a line holds many or a file as many as lines.
MOST_STRAY = 10
STRAY = {
    b"\r": "carriage returns inside, as where lines end with CR alone: convert line ends to LF (tr '\\r' '\\n')",
    b"\0": "NUL bytes, as in UTF-16 or a file that was not written to its end: convert it to UTF-8 or get it again",
}


class Column(NamedTuple):
    """One side of a table of two columns, with a tab between them."""

    path: Path
    number: int


# A text of the user: a file of its own, or a column of a table.
Side = Path | Column


def pair_name(split: str, one: str, other: str) -> str:
    """Names the files of one split and pair without the language that follows: ``train.en-ca``."""
    return f"{split}.{one}-{other}"


def check_file(path: Path) -> None:
    """Refuses what would be waited for, or read, without an end.

    Raises:
        UserError: there is something else than a file, such as a folder, a named pipe or a device.
        OSError: nothing is there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}, it must be a file")


def short_lines(stream: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    """Yields the lines of a file with their line feeds.

    Raises:
        UserError: a line has no end within a megabyte.
    """
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: more than {LONGEST_LINE} bytes: it is no sentence, remove it")
        yield line


class SourceText:
    """The lines of one text of the user, plain or compressed, read as often as it is iterated over.

    Lines end at a line feed and nowhere else: U+2028, U+0085 and a carriage return inside a line are text.
    A byte order mark at the start of the file is left out.

    Attributes:
        lines: lines read so far.
        crlf_lines: how many of them ended in a carriage return, which is taken off.
        stray: how many carriage returns, and NUL bytes, stood inside lines.

    Raises:
        UserError: while reading, if there is no file, its text is not UTF-8, a line is too long or of a table and
            not of two columns, lines end with carriage returns alone, or the compressed file is damaged.
    """

    def __init__(self, side: Side) -> None:
        self.path = side.path if isinstance(side, Column) else side
        self.column = side.number if isinstance(side, Column) else None
        self.lines = 0
        self.crlf_lines = 0
        self.stray: Counter[bytes] = Counter()

    def __iter__(self) -> Iterator[str]:
        self.lines = self.crlf_lines = 0
        self.stray.clear()
        check_file(self.path)
        try:
            with opened(self.path) as stream:
                for line in short_lines(stream, self.path):
                    yield self._text(line.removesuffix(b"\n"))
        except DamagedError as error:
            raise UserError(f"{self.path}: damaged after line {self.lines} ({error}): get the file again") from error
        for byte, meaning in STRAY.items():
            if self.stray[byte] >= max(self.lines, 1):
                raise UserError(f"{self.path}: {self.lines} lines with {self.stray[byte]} {meaning}")

    def _text(self, line: bytes) -> str:
        self.lines += 1
        if line.endswith(b"\r"):
            self.crlf_lines += 1
            line = line.rstrip(b"\r")
        if self.column is not None:
            columns = line.split(b"\t")
            if len(columns) != 2:
                raise UserError(
                    f"{self.path}, line {self.lines}: {len(columns)} columns: give two, with a tab between them"
                )
            line = columns[self.column]
        for byte, meaning in STRAY.items():
            if count := line.count(byte):
                self.stray[byte] += count
                if count > MOST_STRAY:
                    raise UserError(f"{self.path}, line {self.lines}: {count} {meaning}")
        try:
            # A mark at the very start says "this is UTF-8" and is no text.
            return line.decode("utf-8-sig" if self.lines == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}, line {self.lines}: not UTF-8 ({error.reason} 0x{error.object[error.start]:02x}, "
                f"byte {error.start + 1} of the line): convert the file to UTF-8 or remove the line"
            ) from error


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file that this program wrote, without their line ends."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.removesuffix("\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file under a temporary name, then gives it its own."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_pairs(prefix: Path, sides: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    """Writes aligned lines to ``PREFIX.SIDE`` of the one or two sides, and returns how many rows there were."""
    count = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(f"{prefix}.{side}", "w", encoding="utf-8", newline="\n")) for side in sides]
        for row in rows:
            for file, line in zip(files, row, strict=True):
                file.write(f"{line}\n")
            count += 1
    return count


def fingerprint(path: Path) -> dict[str, int | str]:
    """Returns a file's size and sha256; refuses what is no file, as `check_file`."""
    check_file(path)
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes ``folder`` when the block ends well and vanishes when it does not.

    What a killed run left under the temporary name is removed first.

    Raises:
        UserError: something else than a folder has the temporary name.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    if os.path.lexists(temporary):
        if temporary.is_symlink() or not temporary.is_dir():
            raise UserError(f"{temporary} is no folder that this program left: remove it")
        shutil.rmtree(temporary)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
