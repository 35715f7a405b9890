"""Archives and downloads that are damaged or mean harm: refused in one line that names them, or read rightly."""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import tar_gz

from xmoe_fairseq.data_prep import download as module
from xmoe_fairseq.data_prep.archives import extract_all
from xmoe_fairseq.data_prep.download import download
from xmoe_fairseq.errors import UserError

TEXT = b"".join(b"a sentence of some words, number %d\n" % i for i in range(200))
MEMBERS = {"set/one.en": TEXT, "set/one.de": TEXT.upper()}


def packed_by(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> dict[str, bytes]:
    """Extracts both members."""
    path = folder / "archive"
    path.write_bytes(content)
    extract_all(path, {name: folder / "out" / Path(name).name for name in MEMBERS}, depth=2)
    return {f"set/{path.name}": path.read_bytes() for path in (folder / "out").iterdir()}


def refusal(content: bytes, folder: Path) -> str:
    """Gives the one line about an archive that must be refused."""
    with pytest.raises(UserError) as caught:
        unpack(content, folder)
    assert str(folder / "archive") in caught.value.message and len(caught.value.message) < 700
    return caught.value.message


def central(content: bytes, offset: int, value: int) -> bytes:
    """Changes a 16-bit field in the two heads of a zip's first member; the offset is that in the local one."""
    changed = bytearray(content)
    struct.pack_into("<H", changed, offset, value)
    struct.pack_into("<H", changed, content.index(b"PK\x01\x02") + offset + 2, value)
    return bytes(changed)


GOOD = {
    "stored": packed_by(zipfile.ZIP_STORED),
    "deflate": packed_by(zipfile.ZIP_DEFLATED),
    "bzip2": packed_by(zipfile.ZIP_BZIP2),
    "lzma": packed_by(zipfile.ZIP_LZMA),
    "tar.gz": tar_gz(MEMBERS),
}


def damaged(content: bytes) -> bytes:
    middle = len(content) // 4
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 30]) + content[middle + 30 :]


def tar_of(change: Callable[[tarfile.TarInfo], object]) -> bytes:
    """A tar whose second member is strange."""
    content = b"text\n".ljust(512, b"\0")
    packed = b""
    for name in MEMBERS:
        member = tarfile.TarInfo(name)
        member.size = 5
        if name == "set/one.de":
            change(member)
        packed += member.tobuf() + content
    return packed + bytes(1024)


def chained_heads() -> bytes:
    """A tar of 5,000 heads, each of which is about the next."""
    head = tarfile.TarInfo("x")
    head.type = tarfile.XHDTYPE
    return head.tobuf() * 5000


BAD = {
    **{f"damaged {kind}": damaged(content) for kind, content in GOOD.items()},
    "encrypted": central(GOOD["deflate"], 6, 1),
    "unknown method": central(GOOD["deflate"], 8, 77),
    "deflate64": central(GOOD["deflate"], 8, 9),
    "size of petabytes": tar_of(lambda member: setattr(member, "size", 10**15)),
    "zip of petabytes": GOOD["stored"].replace(
        struct.pack("<II", len(TEXT), len(TEXT)), struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    ),
    "heads about heads": chained_heads(),
    "a bomb without members": bz2.compress(bytes(10**6)),
    "xz": lzma.compress(TEXT),
    "sparse file": tar_of(lambda member: setattr(member, "type", tarfile.GNUTYPE_SPARSE)),
}


OFFSET = GOOD["deflate"].index(b"PK\x05\x06") + 16
BAD["a place before the start"] = GOOD["deflate"][: OFFSET + 3] + b"\x01" + GOOD["deflate"][OFFSET + 4 :]


@pytest.mark.parametrize("kind", BAD)
def test_bad_archives_are_named(kind: str, tmp_path: Path) -> None:
    refusal(BAD[kind], tmp_path)


def test_members_larger_than_the_disk_are_not_begun(tmp_path: Path) -> None:
    content = tar_of(lambda member: setattr(member, "size", 10**15))
    assert "one.de would take 1000000000000000 bytes of" in refusal(content, tmp_path)
    assert not (tmp_path / "out/one.de").exists()


@pytest.mark.parametrize("kind", GOOD)
def test_mutants_are_refused_or_read_rightly(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither format says anything wrong in silence: both keep checksums of what they hold."""
    good = GOOD[kind]
    folder = tmp_path_factory.mktemp("mutants")
    assert unpack(good, folder) == MEMBERS

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes=st.dictionaries(st.integers(0, len(good) - 1), st.integers(0, 255), max_size=3), cut=st.booleans())
    def check(changes: dict[int, int], cut: bool) -> None:
        mutant = bytearray(good)
        for position, byte in changes.items():
            mutant[position] = byte
        if cut and changes:
            del mutant[max(changes) :]
        for path in (folder / "out").iterdir():
            path.unlink()
        try:
            assert unpack(bytes(mutant), folder) == MEMBERS
        except UserError as error:
            assert str(folder / "archive") in error.message

    check()


# --- Downloads


@contextmanager
def answers(*lines: str, body: bytes = b"") -> Iterator[str]:
    """A server that gives everybody the same answer; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    head = "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(head + body)

    thread = Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/f"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


OK = "HTTP/1.0 200 OK"
ANSWERS = {
    "length of letters": ([OK, "Content-Length: abc"], "sent Content-Length 'abc', no number of bytes"),
    "negative length": ([OK, "Content-Length: -5"], "Content-Length '-5'"),
    "endless length": ([OK, "Content-Length: " + "9" * 5000], "Content-Length '99999"),
    "length in other digits": ([OK, "Content-Length: \xb2"], "no number of bytes"),
    "another scheme": (["HTTP/1.0 302 Found", "Location: file:///etc/passwd"], "file:///etc/passwd"),
    "FTP": (["HTTP/1.0 302 Found", "Location: ftp://127.0.0.1/f"], "sent on to ftp://127.0.0.1/f"),
    "data": (["HTTP/1.0 302 Found", "Location: data:text/plain,x"], "302"),
    "no address": (["HTTP/1.0 302 Found", "Location: http://[::1"], "Invalid IPv6"),
    "no port": (["HTTP/1.0 302 Found", "Location: http://127.0.0.1:b/f"], "port"),
    "in circles": (["HTTP/1.0 302 Found", "Location: /f"], "302"),
    "no HTTP": (["SSH-2.0-OpenSSH"], "5 times in a row"),
    "strange place": (
        ["HTTP/1.0 206 Partial", "Content-Range: bytes " + "9" * 5000 + "-/*"],
        "the server went on at byte -1",
    ),
    "broken chunks": (["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Connection: close"], "5 times in a row"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_strange_servers_are_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.0)
    lines, part = ANSWERS[kind]
    with answers(*lines, body=b"text") as url, pytest.raises(UserError) as caught:
        download(url, tmp_path / "f")
    assert part in caught.value.message and url in caught.value.message
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "url", ["http://[::1", "nothing", "http://a:b/c", "http://\u00fc" + "x" * 70 + "/", "http://a/\x01"]
)
def test_no_addresses_are_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--url"):
        download(url, tmp_path / "f")


def test_a_file_without_its_length_comes_whole(tmp_path: Path) -> None:
    with answers(OK, "Content-Type: text/plain", body=b"text") as url:
        assert download(url, tmp_path / "f")["sha256"] == hashlib.sha256(b"text").hexdigest()


@pytest.mark.parametrize("name", ["f", "f.part"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    module.Path.mkdir(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a folder, it must be a file"):
        download("http://127.0.0.1:1/f", tmp_path / "f")
