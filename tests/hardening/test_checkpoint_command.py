"""``xmoe checkpoint`` with files and places that it cannot use."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe_fairseq.checkpoints import reading, saving, shards
from xmoe_fairseq.cli import main
from xmoe_fairseq.errors import UserError

EXPERTS = 4
WEIGHT = "encoder.layers.1.moe.experts.fc1_weight"


def made_up(path: Path, value: float = 1.0, **more: Any) -> Path:
    model = {WEIGHT: torch.full((EXPERTS, 2, 3), value), "a": torch.full((2,), value), **more}
    torch.save({"model": model, "extra_state": {}, "last_optimizer_state": None, "optimizer_history": []}, path)
    return path


def run(*words: str | Path) -> None:
    main(["checkpoint", *map(str, words)])


def refused(folder: Path, message: str, *words: str | Path) -> None:
    """Runs a command that must end in one line and change nothing."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message) as error:
        run(*words)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    run("shard", made_up(tmp_path / "whole.pt"), "--shards", "2", "--out", tmp_path / "parts.pt")
    return tmp_path / "parts.pt"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_that_are_none_have_no_mean(value: float, place: int, tmp_path: Path) -> None:
    files = [made_up(tmp_path / "good.pt"), made_up(tmp_path / "other.pt")]
    files.insert(place, made_up(tmp_path / "bad.pt", b=torch.tensor([1.0, value])))
    refused(tmp_path, r"bad.pt.* holds NaN or infinity", "average", *files, "--out", tmp_path / "out.pt")


@pytest.mark.parametrize("strides", [(0,), (1,)])
def test_a_tensor_without_its_numbers_is_refused(strides: tuple[int, ...], tmp_path: Path) -> None:
    few = torch.zeros(10)
    huge = few[:1].expand(10**13) if strides == (0,) else few[:6].as_strided((5, 5), (1, 1))
    bad = made_up(tmp_path / "bad.pt", b=huge)
    for words in (["average", bad], ["shard", bad, "--shards", "2"]):
        refused(tmp_path, r"bad.pt is refused: it holds a tensor of the shape", *words, "--out", tmp_path / "out.pt")
    refused(tmp_path, r"bad.pt is refused: it holds a tensor of the shape", "info", bad)


@pytest.mark.parametrize("number", ["0", "-1", "5", "300000000", "9" * 30])
def test_more_shards_than_experts_are_refused_at_once(number: str, tmp_path: Path) -> None:
    whole = made_up(tmp_path / "whole.pt")
    refused(tmp_path, f"--shards {number}", "shard", whole, "--shards", number, "--out", tmp_path / "parts.pt")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    whole = made_up(tmp_path / "whole.pt")
    (tmp_path / "out.pt").mkdir()
    (tmp_path / "parts.experts-1-of-2.pt").mkdir()
    for words in (
        ["average", whole, "--out", tmp_path / "out.pt"],
        ["shard", whole, "--shards", "2", "--out", tmp_path / "parts.pt"],
    ):
        refused(tmp_path, "is a folder, and a file of this name is to be written", *words, "--force")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_the_system_refuses_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made_up(tmp_path / "whole.pt")

    def no_open(path: str, mode: str) -> Any:
        raise OSError(code, os.strerror(code), path)

    unlink = os.unlink

    def no_unlink(path: str) -> None:
        if path.endswith(saving.TEMPORARY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        unlink(path)

    monkeypatch.setattr(saving, "open", no_open, raising=False)
    monkeypatch.setattr(saving.os, "unlink", no_unlink)
    refused(
        tmp_path, rf"out.pt could not be written: {os.strerror(code)}", "average", whole, "--out", tmp_path / "out.pt"
    )


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["source", "shards", "experts", "places", None])
PROFILE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROFILE
@given(field=FIELDS, value=PLAIN)
def test_a_damaged_set_is_one_line(field: str | None, value: Any, sharded: Path) -> None:
    state = torch.load(sharded, weights_only=True)
    damaged(sharded, state, reading.SHARD_SET, field, value)


@PROFILE
@given(field=st.sampled_from(["name", "source", "number", "shards", "tensors", None]), value=PLAIN)
def test_a_damaged_shard_is_one_line(field: str | None, value: Any, sharded: Path) -> None:
    path = Path(shards.shard_path(str(sharded), 1, 2))
    state = torch.load(path, weights_only=True)
    if field != "name":  # that is for people
        damaged(path, state, reading.SHARD, field, value)


def damaged(path: Path, state: dict[str, Any], key: str, field: str | None, value: Any) -> None:
    """Puts a value into a file of a set for a while: what is not what it was is refused."""
    good, content = dict(state[key]), path.read_bytes()
    bad = value if field is None else {**good, field: value}
    file = io.BytesIO()
    torch.save({**state, key: bad}, file)
    path.write_bytes(file.getvalue())
    folder = path.parent
    try:
        # The number of experts is only told.
        if field != "experts" or type(value) is not int:
            refused(folder, ".", "consolidate", folder / "parts.pt", "--out", folder / "joined.pt")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "place", [["model"], ["model", "none"], ["none", "a"], [], [["model"], "a"], ["model", "a", 0], ["model", "a"], 5]
)
def test_a_place_that_is_not_there_is_named(place: Any, sharded: Path) -> None:
    state = torch.load(sharded, weights_only=True)
    state[reading.SHARD_SET]["places"][0] = place
    torch.save(state, sharded)
    refused(sharded.parent, "parts.pt", "consolidate", sharded, "--out", sharded.parent / "joined.pt")
    refused(sharded.parent, "parts.pt", "info", sharded)


@pytest.mark.parametrize(
    "tensors", [[], [1], ["x"], [torch.zeros(())], [torch.zeros(2, 9, 9)], [torch.zeros(2, 2, 3).half()]]
)
def test_a_shard_of_other_tensors_is_named(tensors: list[Any], sharded: Path) -> None:
    path = shards.shard_path(str(sharded), 1, 2)
    state = torch.load(path, weights_only=True)
    state[reading.SHARD]["tensors"] = tensors
    torch.save(state, path)
    refused(sharded.parent, "parts", "consolidate", sharded, "--out", sharded.parent / "joined.pt")
