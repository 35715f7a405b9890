"""A file that may be missing: what has its name and is no file is never passed over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xmoe_fairseq.checkpoints import reading
from xmoe_fairseq.common.files import is_there
from xmoe_fairseq.common.run_folder import seek_checkpoint
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.build_report import read_seconds
from xmoe_fairseq.evaluation.direction_scorer import read_groups_of
from xmoe_fairseq.evaluation.test_sets import MADE, find_raw, read_made
from xmoe_fairseq.mt_benchmarks import BENCHMARKS

WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "Is a directory"),
    "a pipe": (os.mkfifo, "named pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "a loop": (lambda path: path.symlink_to(path), "symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to(path.with_name("nowhere")), "No such file"),
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "any": ("x", lambda folder: is_there(folder / "x")),
    "groups": ("groups.tsv", lambda folder: read_groups_of(folder, BENCHMARKS["local"])),
    "seconds": ("seconds.json", lambda folder: read_seconds(folder / "seconds.json")),
    "checkpoint": ("checkpoint_best.pt", seek_checkpoint),
    "how it was translated": (MADE, read_made),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_file_is_refused(wrong: str, reader: str, tmp_path: Path) -> None:
    make, message = WRONG[wrong]
    name, read = READERS[reader]
    make(tmp_path / name)
    with pytest.raises(OSError, match=message) as error:
        read(tmp_path)
    assert error.value.filename == str(tmp_path / name)


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoint_1_1.pt")
    with pytest.raises(UserError, match="cannot be read: it is a named pipe and no file"):
        reading.peek(str(tmp_path / "checkpoint_1_1.pt"))
    assert reading.others_by_updates(str(tmp_path / "checkpoint_last.pt")) == []


def test_missing_and_there(tmp_path: Path) -> None:
    assert not is_there(tmp_path / "x")
    assert read_groups_of(tmp_path, BENCHMARKS["local"]) == {}
    (tmp_path / "x").touch()
    assert is_there(tmp_path / "x")


def test_references_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/test.en-ca.en").touch()
    os.mkfifo(tmp_path / "raw/test.en-ca.ca")
    with pytest.raises(OSError, match="named pipe"):
        find_raw(tmp_path, "test", "en", "ca")
