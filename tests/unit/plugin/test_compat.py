"""Versions, and reading checkpoints without running what is in them."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, options
from helpers import ROOT

from xmoe_fairseq import patches
from xmoe_fairseq.errors import UserError

STATE = {
    "args": None,
    "cfg": {"model": argparse.Namespace(arch="transformer")},
    "model": {"weight": torch.zeros(2000)},
    "optimizer_history": [{"optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 1}],
    "extra_state": {"train_iterator": {"epoch": 1}},
}


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_namespace_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "a.pt"))
    assert state["cfg"].model.arch == "transformer"


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({**STATE, "bad": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"evil\.pt is refused, because .* (posix|nt)\.mkdir.* nothing was run"
    ) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(error.value)
    assert not marker.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert marker.exists()  # the file was indeed armed


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt"))
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 4000, -500, -1])
def test_a_truncated_checkpoint_is_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"short\.pt \(\d+ bytes\) is truncated or damaged") as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="is no fairseq checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "list.pt"))


def test_installing_twice_wraps_once() -> None:
    before = checkpoint_utils.load_checkpoint_to_cpu, options.parse_args_and_arch
    patches.install()
    assert (checkpoint_utils.load_checkpoint_to_cpu, options.parse_args_and_arch) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("import fairseq; fairseq.__version__ = '0.12.2'", "fairseq 0.12.2 is not supported: .*fairseq-fixed"),
        ("import torch; torch.__version__ = '2.5.1+cu121'", r"torch 2.5.1\+cu121 is too old"),
        ("import sys; sys.version_info = (3, 10, 1)", "is too old: use Python 3.11 or 3.12"),
        (
            "import sys, types; sys.modules['fairseq'] = types.ModuleType('fairseq');"
            "sys.modules['fairseq'].__spec__ = sys.__spec__",
            "the installed fairseq does not import .*fairseq-fixed",
        ),
    ],
)
def test_an_unsupported_version_is_refused_in_one_line(change: str, message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"{change}; import xmoe_fairseq.plugin"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("xmoe_fairseq: error: ")
    assert __import__("re").search(message, last)
    assert "Traceback" not in result.stderr
