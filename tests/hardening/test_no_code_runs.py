"""Every command that reads a checkpoint refuses one that would run code, or that it cannot use, in one line."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_identity import COMMANDS

from xmoe_fairseq.errors import UserError

State = dict[str, Any]
RUNS = "[__import__('os').mkdir('RAN'), None][1]"


def _task(state: State) -> None:
    state["cfg"]["task"]["langtoks"] = RUNS


def _model(state: State) -> None:
    state["cfg"]["model"].update(_name="fconv", arch="fconv", encoder_layers=RUNS)


def _dictionary(state: State) -> None:
    state["cfg"]["task"]["sampling_weights"] = RUNS


def _program(state: State) -> None:
    state["cfg"]["task"].update(_name="audio_pretraining", post_save_script="mkdir RAN")


def _user_dir(state: State) -> None:
    Path("evil").mkdir()
    Path("evil/__init__.py").write_text("import os; os.mkdir('RAN')")
    state["cfg"]["common"]["user_dir"] = str(Path("evil").absolute())
    state["cfg"]["task"]["_name"] = "evil"


BAD: dict[str, tuple[Callable[[State], None], str]] = {
    "the task": (_task, "is not a literal"),
    "another model": (_model, "is not a literal"),
    "a dictionary": (_dictionary, "is not a literal"),
    "a program": (_program, "its task is 'audio_pretraining'"),
    "a user dir": (_user_dir, "its task is 'evil'"),
}
# These take the task from the command line, and not from the file.
OWN_TASK, OF_TASK = ("generate", "interactive"), ("the task", "a dictionary")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_a_checkpoint_runs_nothing(
    command: str, kind: str, small_data: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = BAD[kind]
    state = torch.load(small_model, weights_only=True)
    change(state)
    torch.save(state, "bad.pt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    unused = command in OWN_TASK and kind in OF_TASK
    with nullcontext() if unused else pytest.raises(UserError, match=message) as error:
        COMMANDS[command](small_data, tmp_path / "bad.pt", tmp_path / "out")
    assert error is None or ("bad.pt is refused" in error.value.message and "\n" not in str(error.value))
    shutil.rmtree("evil", ignore_errors=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]
