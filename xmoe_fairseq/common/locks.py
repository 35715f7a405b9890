"""One writer: what a program writes is held by it until it ends.

The lock is the operating system's, on a small file, so it ends with the process however that ends; what a killed one
leaves is taken over. The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..errors import UserError

logger = logging.getLogger(__name__)

# In a folder that is held; a file NAME is held by .NAME.lock beside it.
LOCK = ".xmoe.lock"
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Characters of a holder's command that are noted, and bytes of a note that are read.
_SHOWN, _READ = 100, 4096

_held: dict[str, int] = {}


class Held(UserError):
    """Another program holds what is asked for."""


@dataclass(frozen=True)
class _Holder:
    """Who holds a lock, for the message to whoever comes second."""

    pid: int
    host: str
    since: str
    command: str


@contextlib.contextmanager
def held(path: str | Path, file: bool = False) -> Iterator[int]:
    """Keeps other programs from writing a folder, or a file, for the length of the block.

    A folder that is missing is made, and removed again if the block leaves nothing in it. In a process that holds
    the path already, this does nothing more.

    Args:
        path: of the folder, or of the file.
        file: whether it is a file, in a folder that is there.

    Yields:
        The lock's descriptor: a program that inherits it holds the lock as well.

    Raises:
        Held: another program holds it.
        UserError: the folder cannot be written to.
    """
    path = Path(path)
    name = _lock_of(path.with_name(f".{path.name}.lock") if file else path / LOCK)
    if name in _held:
        yield _held[name]
        return
    made = [] if file else _make(path)
    try:
        _held[name] = _acquire(name, path)
        try:
            yield _held[name]
        finally:
            _release(name)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def hold(folder: str | Path) -> None:
    """Holds a folder that is there until `release_all`, or the end of the process.

    Raises:
        Held: another program holds it.
        UserError: the folder cannot be written to.
    """
    name = _lock_of(Path(folder) / LOCK)
    if name not in _held:
        _held[name] = _acquire(name, Path(folder))


def release_all() -> None:
    """Gives back all that the process holds."""
    for name in list(_held):
        _release(name)


def _lock_of(path: Path) -> str:
    """Names a lock by its one name; the lock itself is never a link, which could lead to any file."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _make(folder: Path) -> list[Path]:
    """Makes a folder and gives those that were missing, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise _not_writable(folder, error) from error
    return missing


def _acquire(name: str, path: Path) -> int:
    while True:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if os.path.islink(name):
                raise UserError(f"{name} is a symlink, which this program never makes: remove it") from error
            raise _not_writable(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_note(descriptor)
            os.close(descriptor)
            raise Held(f"{path} is being written by {holder}: wait for it to end, or choose another") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _not_writable(path, error) from error
            logger.warning(f"{path} is on a file system without locks: start no second program that writes there")
        if _is_current(name, descriptor):
            if not _is_note(descriptor):
                os.close(descriptor)
                raise UserError(f"{name} is not a lock of this program, which writes one of this name: move it")
            _write_note(descriptor)
            return descriptor
        os.close(descriptor)  # the previous holder removed the file between the two calls


def _release(name: str) -> None:
    descriptor = _held.pop(name)
    with contextlib.suppress(OSError):
        if _is_current(name, descriptor):
            os.unlink(name)
    os.close(descriptor)


def _forget() -> None:
    """Leaves the locks to the parent: a worker that outlives a killed training would keep the next one out."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _is_current(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(name), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_note(descriptor: int) -> None:
    command, since = shlex.join(sys.argv), datetime.now().astimezone().isoformat(" ", "seconds")
    shown = command if len(command) <= _SHOWN else f"{command[:_SHOWN]}..."
    holder = _Holder(os.getpid(), socket.gethostname(), since, shown)
    with contextlib.suppress(OSError):  # on a full disk the lock holds without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)


def _read_note(descriptor: int) -> str:
    try:
        holder = _Holder(**json.loads(os.pread(descriptor, _READ, 0)))
        return f"process {holder.pid} on {holder.host} since {holder.since} ({holder.command})"
    except (OSError, ValueError, TypeError):  # it is writing the note just now
        return "another program"


def _is_note(descriptor: int) -> bool:
    """Says whether a file is what a program left here, also one that was killed: it is emptied and removed."""
    found = os.pread(descriptor, _READ, 0).strip(b"\0")
    try:
        return not found or isinstance(json.loads(found), dict)
    except (ValueError, RecursionError):
        return False


def _not_writable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path} cannot be written to ({reason}): choose another")
