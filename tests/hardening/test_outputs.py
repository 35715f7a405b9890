"""Where xmoe writes: what cannot be written is said in one line, before the work where it can be known, and what was
there is not damaged."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_scoring import FakeTranslator, fake_translator, spoil, write_checkpoint, write_data

from xmoe_fairseq import cli
from xmoe_fairseq.common import outputs
from xmoe_fairseq.common.outputs import (
    check_replaced,
    check_writable,
    finish_replacing,
    replacing,
    replacing_all,
    replacing_set,
)
from xmoe_fairseq.errors import UserError

SCORE, SWEEP = ("score", "data", "--checkpoint", "c.pt"), ("sweep", "--data", "data", "--checkpoint", "c.pt")
COMMANDS = {"score": SCORE, "sweep": (*SWEEP, "--thresholds", "0.2,0.6")}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeTranslator]:
    write_data(tmp_path / "data")
    write_checkpoint(tmp_path / "c.pt")
    monkeypatch.chdir(tmp_path)
    return fake_translator(monkeypatch, spoil(3))


def content(folder: Path) -> dict[Path, bytes | str]:
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(*words: str | Path) -> str:
    with pytest.raises(UserError) as error:
        cli.main([*map(str, words), "--quiet"])
    assert str(error.value).isprintable()
    return error.value.message


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda out: out.write_text("mine"), "out is no folder; give another"),
    "loop": (lambda out: out.symlink_to("out"), "out is a symlink that leads nowhere; give another"),
    "nowhere": (lambda out: out.symlink_to("none"), "out is a symlink that leads nowhere; give another"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_no_folder_can_be_there(command: str, kind: str, fake: type[FakeTranslator], tmp_path: Path) -> None:
    make, message = BAD[kind]
    make(tmp_path / "out")
    before = content(tmp_path)
    for out in ("out", "out/deep/er"):
        assert message in refused(*COMMANDS[command], "--out", out)
    assert content(tmp_path) == before and fake.asked == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_place_is_named_before_the_work(
    command: str, fake: type[FakeTranslator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", read_only)
    before = sorted(tmp_path.rglob("*"))
    message = refused(*COMMANDS[command], "--out", tmp_path / "new/out")
    assert "new/out: Read-only file system; give another" in message
    assert sorted(tmp_path.rglob("*")) == before and fake.asked == []
    if Path("/proc/self").is_dir():
        monkeypatch.undo()
        with pytest.raises(UserError, match="cannot write to --out /proc/none/out: "):
            check_writable(Path("/proc/none/out"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("ending", ["md", "tsv", "json"])
def test_a_folder_in_the_place_of_a_file(
    command: str, ending: str, fake: type[FakeTranslator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{'scores' if command == 'score' else 'sweep'}.{ending}"
    out = tmp_path / "out"
    cli.main([*COMMANDS[command], "--out", "out", "--quiet"])
    (out / name).unlink()
    (out / name).mkdir()
    fake.asked.clear()
    before = content(tmp_path)
    message = refused(*COMMANDS[command], "--out", "out")
    assert f"cannot write the file out/{name}: a folder has this name, rename it" in message
    assert content(tmp_path) == before and fake.asked == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_what_is_finished(
    command: str, fake: type[FakeTranslator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables cannot be written; the translations are kept, and the next run goes on from them."""
    stock = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name in ("scores.tsv", "sweep.tsv"):
            no_space()
        return stock(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert "cannot write to out" in (said := refused(*COMMANDS[command], "--out", "out")) and "No space left" in said
    out = tmp_path / "out"
    assert not [
        path for path in out.rglob("*") if path.name.endswith((".tmp", ".new")) or path.name.startswith("sweep.")
    ]
    if command == "score":
        assert not list(out.glob("scores.*"))
    asked = len(fake.asked)
    monkeypatch.setattr(Path, "write_text", stock)
    cli.main([*COMMANDS[command], "--out", "out", "--quiet"])
    assert list(out.glob("s*.json")) and (command == "sweep" or len(fake.asked) == asked)


def test_a_disk_that_is_full_at_once(
    fake: type[FakeTranslator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert "No space left" in refused(*SCORE, "--out", "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in ("en-ca", "scores.json")]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    fake_translator(monkeypatch, spoil(3))
    cli.main([*SCORE, "--out", "out", "--quiet"])  # and it goes on
    assert (tmp_path / "out/scores.json").is_file()


def test_a_folder_that_is_a_symlink_to_itself_is_no_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for words in (("loop", "loop"), ("loop", "none"), (".", "loop")):
        assert "holds no scores.json" in refused("compare", *words)


def test_several_files_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text("old")

    def failing(fail: Callable[[], object]) -> Iterator[None]:
        with replacing_all(paths) as temporary:
            for new in temporary:
                new.write_text("new")
            yield
            fail()

    for _ in failing(lambda: None):
        pass
    assert [path.read_text() for path in paths] == ["new"] * 3
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        for _ in failing(no_space):
            pass
    with pytest.raises(RuntimeError):
        for _ in failing(lambda: (_ for _ in ()).throw(RuntimeError())):
            pass
    assert [path.read_text() for path in paths] == ["new"] * 3 and sorted(tmp_path.iterdir()) == paths
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="c: a folder has this name"), replacing_all(paths):
        raise AssertionError
    with pytest.raises(UserError, match=r"cannot write to .*none"), replacing(tmp_path / "none/x") as temporary:
        temporary.write_text("x")


def dies_at(moved: int, work: Callable[[], object]) -> None:
    """Does a piece of work in a process that is killed when so many files have been moved; -1: just before the first
    could be."""
    stock, left = os.replace, moved

    def replace(*args: Any) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        stock(*args)

    def run() -> None:
        os.replace = replace
        if moved < 0:
            Path.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def write_set(paths: list[Path], text: str) -> None:
    with replacing_all(paths) as temporary:
        for path in temporary:
            path.write_text(text)


@pytest.mark.parametrize("moved", [-1, 0, 1, 2])
def test_a_kill_between_two_files_leaves_no_mixed_set(moved: int, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.md", "a.json", "a.png")]
    write_set(paths, "old")
    dies_at(moved, lambda: write_set(paths, "new"))
    if moved < 0:
        assert [path.read_text() for path in paths] == ["old"] * 3
        check_replaced(paths[0], "xmoe score")
    else:
        assert sorted(path.read_text() for path in paths) == ["new"] * moved + ["old"] * (3 - moved)
        with pytest.raises(UserError, match=r"a.md and the files beside it are being replaced.*run xmoe score again"):
            check_replaced(paths[0], "xmoe score")
        finish_replacing(paths[1])
        assert [path.read_text() for path in paths] == ["new"] * 3
    write_set(paths, "newest")
    assert [path.read_text() for path in paths] == ["newest"] * 3 and sorted(tmp_path.iterdir()) == sorted(paths)


def test_what_a_killed_score_left_is_not_compared(fake: type[FakeTranslator], tmp_path: Path) -> None:
    cli.main([*SCORE, "--out", "out", "--quiet"])
    before = content(tmp_path / "out")
    dies_at(1, lambda: cli.main([*SCORE, "--out", "out", "--quiet", "--metrics", "bleu"]))
    assert "out/scores.json and the files beside it are being replaced" in refused("compare", "out", "out")
    cli.main([*SCORE, "--out", "out", "--quiet"])
    assert content(tmp_path / "out") == before


def test_figures_of_an_earlier_set_do_not_stay(tmp_path: Path) -> None:
    for name in ("layers.png", "mine.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "flops.png").mkdir()
    with replacing_set(tmp_path / "analysis.json", ["layers.png", "flops.png", "none.png"]) as new:
        (new / "analysis.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.json", "mine.png", "flops.png"}


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("."), lambda path: path.write_text("mine")])
def test_what_has_the_name_of_a_finished_set_is_left_alone(make: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("old")
    make(tmp_path / ".a.ready")
    with pytest.raises(UserError, match=r"\.a\.ready is no folder that this program left: remove it"):
        write_set([tmp_path / "a.md", tmp_path / "a.json"], "new")
    assert {path.name for path in tmp_path.iterdir()} == {".a.ready", "a.md"}


def test_what_cannot_be_cleaned_up_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="No space left"), replacing(tmp_path / "x"):
        no_space()


def test_too_few_tokens_are_said_before_a_folder_is_made(
    fake: type[FakeTranslator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(self: FakeTranslator, source: str, target: str) -> None:
        raise UserError("--max-tokens 3 is refused: a sentence has more tokens, give a larger one")

    monkeypatch.setattr(fake, "translate", few)
    before = sorted(tmp_path.rglob("*"))
    assert "--max-tokens 3 is refused" in refused(*SCORE, "--out", "out", "--max-tokens", "3")
    assert sorted(tmp_path.rglob("*")) == before
