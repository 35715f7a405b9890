"""Taking single files out of tar and zip archives without trusting what the archives say."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ..errors import UserError
from .io_utils import DISK_FULL

# The name of a member -> where to put it, or None for one that is not needed.
Choose = Callable[[str], Path | None]
CHUNK = 1 << 20


def extract(archive: Path, choose: Choose) -> set[Path]:
    """Writes the chosen members of an archive, only to the places that ``choose`` names, and returns these.

    Args:
        archive: a tar, compressed by gzip or not, or a zip.
        choose: decides by the name of a member, without a ``./`` before it.

    Raises:
        UserError: the archive is damaged or encrypted, a member's name leads out of the folder, or a chosen one is a
            link, there twice, or larger than the disk.
    """
    written: set[Path] = set()
    try:
        members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
        for name, size, stream in members(archive, choose):
            target = choose(name)
            assert target is not None  # only chosen members come
            if target in written:
                raise UserError(f"{archive} holds {name} twice: get the archive again, or another one")
            target.parent.mkdir(parents=True, exist_ok=True)
            if size > (free := shutil.disk_usage(target.parent).free):
                raise UserError(f"{archive}: {name} would take {size} bytes of {free} that are free: make room for it")
            with open(target, "wb") as file:
                shutil.copyfileobj(stream, file, CHUNK)
            written.add(target)
    # What is damaged, or made to do harm, lets these modules raise errors of many kinds, some of them of no documented
    # one; what went wrong with a file of ours has its name, or is of a full disk.
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename is not None):
            raise
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
        raise UserError(
            f"{archive} cannot be unpacked, it is damaged, encrypted or no archive ({reason}): delete it and get it "
            "again, or another one"
        ) from error
    return written


def extract_all(archive: Path, wanted: Mapping[str, Path], depth: int) -> None:
    """Extracts members known by the last ``depth`` parts of their names; several names may stand for one file.

    Raises:
        UserError: as `extract`, or a file is not in the archive.
    """
    written = extract(archive, lambda name: wanted.get("/".join(name.split("/")[-depth:])))
    for member, path in wanted.items():
        if path not in written:
            raise UserError(f"{archive} has no {member}: get it again, or another archive with --url or --archive")


def _tar_members(archive: Path, choose: Choose) -> Iterator[tuple[str, int, IO[bytes]]]:
    # tarfile's own reading of compressed streams neither notices a missing end nor compares checksums.
    with _unpacked(archive) as content:
        # As a stream: to go back in a compressed file means to read it again.
        with tarfile.open(fileobj=content, mode="r|") as tar:
            for member in tar:
                name = _checked(archive, member.name)
                if member.isdir() or choose(name) is None:
                    continue
                stream = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if stream is None:
                    raise UserError(f"{archive}: {name} is a link or device, not a plain file: get another archive")
                yield name, member.size, stream
        while content.read(CHUNK):
            pass


def _unpacked(archive: Path) -> IO[bytes]:
    with open(archive, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(archive, "rb")) if compressed else open(archive, "rb")


def _zip_members(archive: Path, choose: Choose) -> Iterator[tuple[str, int, IO[bytes]]]:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            name = _checked(archive, member.filename)
            if member.is_dir() or choose(name) is None:
                continue
            # The upper half holds the Unix mode; 0o12 in its first four bits is a symbolic link.
            if member.external_attr >> 28 == 0o12:
                raise UserError(f"{archive}: {name} is a link or device, not a plain file: get another archive")
            with packed.open(member) as stream:
                yield name, member.file_size, stream


def _checked(archive: Path, name: str) -> str:
    """Returns a member's name without ``./`` before it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{archive}: the name {name!r} leads out of the archive: do not use this archive")
    return str(path)
