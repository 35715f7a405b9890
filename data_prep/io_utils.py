"""Reading and writing files so that nothing half-written ever looks finished."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from xmoe_fairseq.errors import UserError

SPLITS = ("train", "valid", "test")
TEMPORARY = ".tmp"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def pair_name(split: str, english: str, language: str) -> str:
    """Names the files of one split and pair, English first, without the language that follows: ``train.en-ca``."""
    return f"{split}.{english}-{language}"


def is_gzip(path: Path) -> bool:
    """Tells from its name whether a file is compressed."""
    return path.suffix == ".gz"


class SourceText:
    """The lines of one text file of the user, plain or gzip, read as often as it is iterated over.

    Lines end at a line feed and nowhere else: U+2028, U+0085 and a carriage return inside a line are text.
    A byte order mark at the start of the file is left out.

    Attributes:
        lines: lines read so far.
        crlf_lines: how many of them ended in a carriage return, which is taken off.

    Raises:
        UserError: while reading, where the text is not UTF-8 or the compressed file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.crlf_lines = 0

    def __iter__(self) -> Iterator[str]:
        self.lines = self.crlf_lines = 0
        try:
            with self._open() as stream:
                for line in stream:
                    yield self._text(line.removesuffix(b"\n"))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: damaged after line {self.lines} ({error}): get the file again") from error

    def _open(self) -> gzip.GzipFile | BufferedReader:
        return gzip.open(self.path, "rb") if is_gzip(self.path) else open(self.path, "rb")

    def _text(self, line: bytes) -> str:
        self.lines += 1
        if line.endswith(b"\r"):
            self.crlf_lines += 1
            line = line[:-1]
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


def write_pairs(prefix: Path, sides: Sequence[str], pairs: Iterable[tuple[str, str]]) -> int:
    """Writes aligned lines to ``PREFIX.SIDE`` of both sides, English first, and returns how many there were."""
    count = 0
    with (
        open(f"{prefix}.{sides[0]}", "w", encoding="utf-8", newline="\n") as english,
        open(f"{prefix}.{sides[1]}", "w", encoding="utf-8", newline="\n") as foreign,
    ):
        for english_line, foreign_line in pairs:
            english.write(f"{english_line}\n")
            foreign.write(f"{foreign_line}\n")
            count += 1
    return count


def fingerprint(path: Path) -> dict[str, int | str]:
    """Gives a file's size and sha256."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty temporary folder that becomes ``folder`` when the block ends well and vanishes when it does not.

    What a killed run left under the temporary name is removed first.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder for the length of the block; leaves no file behind.

    Raises:
        UserError: where another run is at work there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another run is preparing {folder}: wait for it, or choose another --out") from error
    finally:
        os.close(descriptor)
