"""Small archives in the layout of the published ones, and a server on this machine that hands them out."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Site:
    """What the server has and how badly it behaves.

    Attributes:
        files: content by path.
        ranges: whether it can begin in the middle of a file.
        cut: bytes after which each answer breaks off, if any.
        busy: answers of 503 before it works.
        page: answer everything with a web page.
        asked: path and Range of every request.
    """

    files: Mapping[str, bytes]
    ranges: bool = True
    cut: int | None = None
    busy: int = 0
    page: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serves a site on a free port of this machine for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.asked.append((self.path, asked))
            if site.busy:
                site.busy -= 1
                return self.send_error(503)
            if site.page:
                return self.answer(200, b"<html>quota</html>", [("Content-Type", "text/html; charset=utf-8")])
            content = site.files.get(self.path)
            if content is None:
                return self.send_error(404)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and site.ranges else 0
            if start and start >= len(content):
                return self.answer(416, b"", [("Content-Range", f"bytes */{len(content)}")])
            position = [("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")] if start else []
            self.answer(206 if start else 200, content[start:], [("Content-Type", "application/gzip"), *position])

        def answer(self, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if site.cut is None else body[: site.cut])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tar_gz(members: Mapping[str, bytes]) -> bytes:
    """Packs files as ``tar czf`` does."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    """Packs files as ``zip`` does."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def text(language: str, what: str, lines: int) -> bytes:
    """Writes some lines of letters, each with its number; the same for the same arguments."""
    rng = random.Random(f"{language} {what}")
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 6))) for _ in range(12)]
    return "".join(f"{language} {' '.join(rng.choices(words, k=4))} {what}{i}\n" for i in range(lines)).encode()


def opus100(languages: Sequence[str], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The members of the archive of these pairs, among them what nobody needs."""
    members = {"opus-100-corpus/v1.0/zero-shot/ar-de/opus.ar-de-test.ar": b"x\n", "opus-100-corpus/v1.0/README": b"x\n"}
    for language in languages:
        pair = "-".join(sorted(("en", language)))
        for split, lines in sizes.items():
            for side in ("en", language):
                name = f"opus-100-corpus/v1.0/supervised/{pair}/opus.{pair}-{split}.{side}"
                members[name] = text(side, f"{pair}-{split}", lines)
    return members


def flores200(codes: Sequence[str], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The members of FLORES-200 for these codes and a further one."""
    members = {"./flores200_dataset/README": b"x\n"}
    for split, lines in sizes.items():
        for code in (*codes, "ace_Arab"):
            members[f"./flores200_dataset/{split}/{code}.{split}"] = text(code, split, lines)
    return members


def mined(lines: int, first: str, second: str) -> bytes:
    """A table of mined text, nine columns without a head."""
    sides = (text(code, "mined", lines).decode().split("\n") for code in (first, second))
    rows = [
        "\t".join((one, other, "1.1", "1", "1", "cc", "url", "cc", "url")) for one, other in zip(*sides, strict=True)
    ]
    return gzip.compress("".join(f"{row}\n" for row in rows[:-1]).encode())
