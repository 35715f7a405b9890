"""Downloads that break off, archives that are damaged or mean harm."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from published import Site, serve, tar_gz, zipped

from xmoe_fairseq.data_prep import download as module
from xmoe_fairseq.data_prep.archives import extract, extract_all
from xmoe_fairseq.data_prep.download import NotThereError, download
from xmoe_fairseq.errors import UserError

CONTENT = bytes(range(256)) * 1200
SHA256 = hashlib.sha256(CONTENT).hexdigest()
KNOWN = {"bytes": len(CONTENT), "sha256": SHA256}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.0)


def refused(*parts: str) -> pytest.RaisesExc[UserError]:
    def one_line(error: UserError) -> bool:
        message = str(error)
        assert "\n" not in message
        assert all(part in message for part in parts), message
        return True

    return pytest.RaisesExc(UserError, check=one_line)


def test_file_comes_with_size_and_checksum(tmp_path: Path) -> None:
    with serve(Site({"/f": CONTENT})) as site:
        path = tmp_path / "deep" / "f"
        assert download(f"{site.url}/f", path, len(CONTENT), SHA256) == KNOWN
        assert path.read_bytes() == CONTENT
        assert [p.name for p in path.parent.iterdir()] == ["f"]
        assert download(f"{site.url}/f", path) == KNOWN  # there already
        assert len(site.asked) == 1


@pytest.mark.parametrize("cut", [100_000, 150_001])
def test_goes_on_where_it_was_broken_off(cut: int, tmp_path: Path) -> None:
    with serve(Site({"/f": CONTENT}, cut=cut)) as site:
        assert download(f"{site.url}/f", tmp_path / "f", None, SHA256) == KNOWN
        starts = range(0, len(CONTENT), cut)
        assert site.asked == [("/f", f"bytes={start}-" if start else None) for start in starts]


def test_another_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    with serve(Site({"/f": CONTENT})) as site:
        download(f"{site.url}/f", tmp_path / "f")
        assert site.asked == [("/f", "bytes=1000-")]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_server_that_cannot_go_on_begins_again(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"?" * 1000)
    with serve(Site({"/f": CONTENT}, ranges=False)) as site:
        assert download(f"{site.url}/f", tmp_path / "f") == KNOWN


def test_whole_file_under_its_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    with serve(Site({"/f": CONTENT})) as site:
        assert download(f"{site.url}/f", tmp_path / "f") == KNOWN


def test_longer_rest_of_another_file_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    with serve(Site({"/f": CONTENT})) as site:
        assert download(f"{site.url}/f", tmp_path / "f") == KNOWN


def test_busy_server_is_asked_again(tmp_path: Path) -> None:
    with serve(Site({"/f": CONTENT}, busy=3)) as site:
        assert download(f"{site.url}/f", tmp_path / "f") == KNOWN
        assert len(site.asked) == 4


def test_gives_up_and_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    with serve(Site({"/f": CONTENT}, cut=0)) as site:
        with refused(f"{site.url}/f", "broke off after 1000 of", "5 times in a row", "--url", "--archive"):
            download(f"{site.url}/f", tmp_path / "f")
        url = site.url
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("f.part", 1000)]
    with refused("Connection refused", "5 times"):
        download(f"{url}/f", tmp_path / "f")


def test_missing_file_is_not_asked_for_twice(tmp_path: Path) -> None:
    with serve(Site({})) as site:
        with pytest.raises(NotThereError, match=r"/f: the server answered 404 Not Found: .*--url.*--archive"):
            download(f"{site.url}/f", tmp_path / "f")
        assert len(site.asked) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "sha256", "part"),
    [(None, "0" * 64, f"has sha256 {SHA256} instead of 0000"), (5, None, f"has {len(CONTENT)} bytes instead of 5")],
)
def test_wrong_file_is_refused_and_not_kept(size: int | None, sha256: str | None, part: str, tmp_path: Path) -> None:
    with serve(Site({"/f": CONTENT})) as site, refused(part, str(tmp_path / "f "), "--archive"):
        download(f"{site.url}/f", tmp_path / "f", size, sha256)
    assert not list(tmp_path.iterdir())
    (tmp_path / "f").write_bytes(CONTENT)  # the user's file stays
    with refused(part):
        download("http://127.0.0.1:1/f", tmp_path / "f", size, sha256)
    assert (tmp_path / "f").exists()


def test_page_instead_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Site({}, page=True)) as site:
        with refused("a web page came instead of a file", "--url"):
            download(f"{site.url}/f", tmp_path / "f")
        monkeypatch.setattr("socket.create_connection", _to(site, module.urllib.request.http.client.socket))
        with refused("Google Drive", "browser", "--archive FILE"):
            download("http://drive.google.com/uc?id=1", tmp_path / "f")
    assert not list(tmp_path.iterdir())


def _to(site: Site, socket: object) -> Callable[..., object]:
    """Connects to the site whatever the address."""
    original = socket.create_connection  # type: ignore[attr-defined]
    port = int(site.url.rsplit(":", 1)[1])
    return lambda address, *args, **kwargs: original(("127.0.0.1", port), *args, **kwargs)


def test_full_disk_is_no_reason_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_continue", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        download("http://127.0.0.1:1/f", tmp_path / "f")


# --- Archives

MEMBERS = {"./a/one.txt": b"1\n" * 5000, "a/two.txt": b"2\n", "b/three.txt": b"3\n"}


@pytest.mark.parametrize("pack", [tar_gz, zipped])
def test_only_wanted_members_are_written(pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pack(MEMBERS))
    wanted = {"a/one.txt": tmp_path / "out/1", "b/three.txt": tmp_path / "out/3"}
    extract_all(tmp_path / "x", wanted, depth=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"1": b"1\n" * 5000, "3": b"3\n"}
    with refused("x has no a/four.txt", "--archive"):
        extract_all(tmp_path / "x", {"a/four.txt": tmp_path / "4"}, depth=2)


@pytest.mark.parametrize("pack", [tar_gz, zipped])
@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\evil"])
def test_member_that_leads_out_is_refused(name: str, pack: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(pack({name: b"evil"}))
    with refused("leads out of the archive", "do not use"):
        extract(tmp_path / "x", lambda name: tmp_path / "out" / "evil")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def linked_tar(kind: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("a/link")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    return packed.getvalue()


def linked_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        member = zipfile.ZipInfo("a/link")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    return packed.getvalue()


@pytest.mark.parametrize(
    "content",
    [linked_tar(tarfile.SYMTYPE), linked_tar(tarfile.LNKTYPE), linked_tar(tarfile.FIFOTYPE), linked_zip()],
    ids=["symbolic link", "hard link", "pipe", "zip"],
)
def test_link_is_not_followed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert extract(tmp_path / "x", lambda name: None) == set()
    with refused("a/link is a link or device"):
        extract(tmp_path / "x", lambda name: tmp_path / "out" / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def changed(content: bytes) -> bytes:
    return content[:60] + bytes(byte ^ 0xFF for byte in content[60:90]) + content[90:]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(tar_gz(MEMBERS)[:100], id="short tar"),
        pytest.param(tar_gz(MEMBERS)[:-30], id="almost whole tar"),
        pytest.param(changed(tar_gz(MEMBERS)), id="changed tar"),
        pytest.param(zipped(MEMBERS)[:-30], id="short zip"),
        pytest.param(changed(zipped(MEMBERS)), id="changed zip"),
        pytest.param(b"not an archive\n" * 100, id="text"),
        pytest.param(b"", id="empty"),
    ],
)
def test_damaged_archive_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with refused(f"{tmp_path / 'x'} ", "get it again"):
        extract_all(tmp_path / "x", {Path(name).name: tmp_path / "out" / Path(name).name for name in MEMBERS}, depth=1)


def test_member_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(tar_gz({"a/t": b"1", "b/t": b"2"}))
    with refused("holds b/t twice"):
        extract(tmp_path / "x", lambda name: tmp_path / "out")
