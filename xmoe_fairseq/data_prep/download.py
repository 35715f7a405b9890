"""Downloading a file so that an interruption costs nothing and a wrong file is never taken for the right one."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .io_utils import DISK_FULL, check_file, fingerprint

# Failures in a row without a new byte before it gives up, and the seconds to wait after the first of them.
ATTEMPTS = 5
WAIT = 1.0
TIMEOUT = 60
CHUNK = 1 << 20
PART = ".part"
# What a server may say of bytes.
NUMBER = "[0-9]{1,18}"
ADVICE = "give another address with --url, or a file that you have with --archive"
# The server may be well again after these.
PASSING = {408, 425, 429, 500, 502, 503, 504}


class NotThereError(UserError):
    """The server has no such file."""


class _BrokenOffError(OSError):
    """The server closed the connection before the end of the file."""


class _OnTheWeb(urllib.request.HTTPRedirectHandler):
    """Goes where a server sends on to, but not to addresses of other kinds, such as FTP."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Returns the next request."""
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, f"{msg}: sent on to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> dict[str, Any]:
    """Brings a file to ``path``, which exists only when it is complete.

    What an interrupted download left in ``path.part`` is continued if the server can, else begun again.

    Args:
        url: of the file.
        path: where to put it; one that is there already is only checked.
        size: its bytes, if known.
        sha256: its checksum, if known.

    Returns:
        Size and sha256.

    Raises:
        UserError: the file cannot be had, or is not the one expected.
    """
    if path.exists():
        return check(path, size, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    if part.exists():
        check_file(part)
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part, path.name)
            break
        except urllib.error.HTTPError as error:
            if error.code not in PASSING:
                kind = NotThereError if error.code in (404, 410) else UserError
                raise kind(f"{url}: the server answered {error.code} {error.reason}: {ADVICE}") from error
            reason: object = error
        except http.client.InvalidURL as error:
            raise UserError(f"{url}: {error}: {ADVICE}") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename is not None):
                raise  # of the disk, not of the network
            reason = getattr(error, "reason", error)
        except ValueError as error:  # of the address, or of one that the server sends on to
            raise UserError(f"{url}: {error}: {ADVICE}") from error
        failures = 1 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise UserError(
                f"{url}: {reason}, {failures} times in a row: run the same command again to resume, or {ADVICE}"
            )
        time.sleep(WAIT * 2 ** (failures - 1))
    try:
        known = check(part, size, sha256)
    except UserError:
        # To go on from a wrong file would give it again.
        part.unlink()
        raise
    part.replace(path)
    return known


def check(path: Path, size: int | None, sha256: str | None) -> dict[str, Any]:
    """Returns size and sha256 of a file.

    Raises:
        UserError: they are not those expected.
    """
    name = path.with_name(path.name.removesuffix(PART))
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{name} has {path.stat().st_size} bytes instead of {size}: {ADVICE}")
    known = fingerprint(path)
    if sha256 is not None and known["sha256"] != sha256:
        raise UserError(f"{name} has sha256 {known['sha256']} instead of {sha256}: {ADVICE}")
    return known


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(url: str, part: Path, name: str) -> None:
    """Reads what is missing of a file to its end.

    Raises:
        OSError: the connection broke off; what came is kept.
    """
    there = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "xmoe_fairseq"})
    if there:
        request.add_header("Range", f"bytes={there}-")
    try:
        response = urllib.request.build_opener(_OnTheWeb).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not there:
            raise
        # Nothing lies beyond what is there: it is the whole file, or of another one.
        if error.headers.get("Content-Range") == f"bytes */{there}":
            return
        part.unlink()
        raise _BrokenOffError("what was there did not belong to this file") from error
    with response:
        _refuse_page(url, response.headers.get_content_type())
        start = _start(response)
        if start not in (0, there):
            raise _BrokenOffError(f"the server went on at byte {start}, not {there}")
        length = response.headers.get("Content-Length")
        if length and not re.fullmatch(NUMBER, length):
            raise UserError(f"{url}: the server sent Content-Length {length[:40]!r}, no number of bytes: {ADVICE}")
        total = start + int(length) if length else None
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None) as progress,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and _size(part) != total:
        raise _BrokenOffError(f"the connection broke off after {_size(part)} of {total} bytes")


def _start(response: http.client.HTTPResponse) -> int:
    """Returns the position in the file of the first byte that the server sends."""
    if response.status != 206:
        return 0
    found = re.match(rf"bytes ({NUMBER})-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _refuse_page(url: str, content_type: str) -> None:
    if content_type != "text/html":
        return
    if (urllib.parse.urlsplit(url).hostname or "").endswith("google.com"):
        raise UserError(
            f"{url}: Google Drive sent a page instead of the file, as it does where many people fetch it: open this "
            "address in a browser, save the file and pass it with --archive FILE"
        )
    raise UserError(f"{url}: a web page came instead of a file: {ADVICE}")
