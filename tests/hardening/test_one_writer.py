"""What a program writes, no second one writes at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers_training import MODEL, train

from xmoe_fairseq import cli
from xmoe_fairseq.common import locks
from xmoe_fairseq.errors import UserError

FORK = multiprocessing.get_context("fork")


def _hold(folder: Path, ready: Any) -> None:
    locks.hold(folder)
    ready.set()
    signal.pause()


def holder(folder: Path) -> Any:
    """Starts a process that holds a folder."""
    ready = FORK.Event()
    process = FORK.Process(target=_hold, args=(folder, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def test_the_second_is_refused_and_a_killed_one_is_succeeded(tmp_path: Path) -> None:
    first = holder(tmp_path)
    with (
        pytest.raises(UserError, match=rf"{tmp_path} is being written by process {first.pid} on \S+ since \d") as error,
        locks.held(tmp_path),
    ):
        raise AssertionError
    assert "\n" not in str(error.value)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (tmp_path / locks.LOCK).exists()
    with locks.held(tmp_path):
        assert json.loads((tmp_path / locks.LOCK).read_text())["pid"] == os.getpid()
        with locks.held(tmp_path):
            pass  # the same process
        assert (tmp_path / locks.LOCK).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "note", [b"", b"{", b"5", b"[1]", b'{"pid": 1}', b'{"pid": {}, "host": 1, "since": 2, "command": []}']
)
def test_a_note_of_any_form_is_one_line(note: bytes, tmp_path: Path) -> None:
    first = holder(tmp_path)
    (tmp_path / locks.LOCK).write_bytes(note)
    with pytest.raises(UserError, match=f"{tmp_path} is being written by") as error, locks.held(tmp_path):
        raise AssertionError
    assert "\n" not in str(error.value)
    first.kill()


def test_a_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    with locks.held(tmp_path):
        child = FORK.Process(target=signal.pause, daemon=True)
        child.start()
    with locks.held(tmp_path):
        child.kill()


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locks.held(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locks.held(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]


def _count(folder: Path, rounds: int) -> None:
    while rounds:
        try:
            with locks.held(folder):
                value = int((folder / "count").read_text())
                (folder / "count").write_text(str(value + 1))
                rounds -= 1
        except UserError:
            continue


def test_many_never_meet(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    counters = [FORK.Process(target=_count, args=(tmp_path, 40), daemon=True) for _ in range(4)]
    for counter in counters:
        counter.start()
    for counter in counters:
        counter.join(60)
    assert (tmp_path / "count").read_text() == "160"


@pytest.mark.parametrize("place", ["file", "file/below", "loop", "/proc/nowhere"])
def test_what_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"cannot be written to \(.*\): choose another"), locks.held(tmp_path / place):
        raise AssertionError
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


# --- Training


def test_two_trainings_do_not_share_a_folder(toy_data: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    save.mkdir()
    (save / "dummy").write_text("the user's")
    first = holder(save)
    run = train(toy_data, save, 2, *MODEL, "--save-interval-updates", "1", check=False)
    last = run.said.strip().splitlines()[-1]
    assert run.process.exitcode == 1 and "Traceback" not in run.said
    assert re.search(rf"error: {save} is being written by process {first.pid} ", last)
    train(toy_data, save, 2, *MODEL, "--no-save")
    assert {path.name for path in save.iterdir()} == {"dummy", locks.LOCK, "log"}
    first.kill()
    first.join()
    train(toy_data, save, 2, *MODEL, "--no-epoch-checkpoints")
    assert {path.name for path in save.iterdir()} == {"dummy", "log", "checkpoint_last.pt", "checkpoint_best.pt"}
    assert (save / "dummy").read_text() == "the user's"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--restore-file", "SAVE/checkpint_best.pt"],
            r"no checkpoint \S+/checkpint_best.pt, which --restore-file names",
        ),
        (["--restore-file", "checkpont_5.pt"], r"did you mean \S+/checkpoint_5.pt\?"),
        (
            ["--finetune-from-model", "none.pt"],
            "no checkpoint none.pt, which --finetune-from-model names: check the name",
        ),
        (
            ["--finetune-from-model", "SAVE/checkpoint_5.pt", "--restore-file", "SAVE/checkpoint_5.pt"],
            "give one of them",
        ),
        (["--save-dir", "SAVE/checkpoint_5.pt"], r"--save-dir \S+ cannot be written to \(File exists\)"),
        (["--save-dir", "/proc/nowhere"], r"--save-dir /proc/nowhere cannot be written to"),
        (["--save-dir", "FOLDER"], r"checkpoint_last.pt is a folder"),
        (["--log-file", "none/train.log"], "--log-file none/train.log cannot be written"),
        (["--moe-expert-parallel", "2"], "--moe-expert-parallel 2 needs 2 processes or a multiple, and there is one"),
    ],
)
def test_what_cannot_end_well_does_not_start(options: list[str], message: str, toy_data: Path, tmp_path: Path) -> None:
    save, folder = tmp_path / "save", tmp_path / "folder"
    save.mkdir()
    (save / "checkpoint_5.pt").write_bytes(b"the user's")
    (folder / "checkpoint_last.pt").mkdir(parents=True)
    words = [word.replace("SAVE", str(save)).replace("FOLDER", str(folder)) for word in options]
    run = train(toy_data, save, 2, *MODEL, *words, check=False)
    assert run.process.exitcode == 1 and "Traceback" not in run.said
    assert re.search(message, run.said.strip().splitlines()[-1])
    assert {path.name for path in save.iterdir()} == {"checkpoint_5.pt", "log"}
    assert (save / "checkpoint_5.pt").read_bytes() == b"the user's"


# --- Commands


def test_two_commands_do_not_write_one_checkpoint(tmp_path: Path) -> None:
    with locks.held(tmp_path / "out.pt", file=True) as mine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "_held", {})  # as another process sees it
        with pytest.raises(UserError, match=r"out.pt is being written by process"):
            cli.main(["checkpoint", "average", "a.pt", "--out", str(tmp_path / "out.pt")])
        assert os.fstat(mine)
    assert not list(tmp_path.iterdir())
