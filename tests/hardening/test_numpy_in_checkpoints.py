"""Numbers of NumPy in checkpoints are read and go on; nothing else of NumPy is, and none of it runs."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.logging import metrics
from helpers_training import train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._weights_only_unpickler import load

from xmoe_fairseq import cli
from xmoe_fairseq.checkpoints import numpy_values, reading
from xmoe_fairseq.errors import UserError

KINDS = ("?", "i1", "u1", "<i2", ">i2", "u4", "<i8", ">i8", "e", "f4", "<f8", ">f8", "c8", "c16")


def read_again(value: Any, folder: Path) -> Any:
    path = folder / "values.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "value": value}, path)
    return reading.check(str(path))["value"]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_arrays_are_read(kind: str, tmp_path: Path) -> None:
    number = np.array(1.5).astype(kind)[()]
    read = read_again({"number": number, "again": [number]}, tmp_path)
    assert read == {"number": number, "again": [number]} and not isinstance(read["number"], np.generic)
    for shape in ((), (0,), (5,), (2, 3), (2, 0, 3)):
        for order in "CF":
            array = np.asarray(np.arange(np.prod(shape)).reshape(shape), kind, order)
            read = read_again(array, tmp_path)
            assert isinstance(read, np.ndarray) and read.shape == shape
            assert read.dtype == array.dtype.newbyteorder("=")  # NumPy itself turns the bytes round
            np.testing.assert_array_equal(read, array)
            assert type(read_again(read, tmp_path)) is type(read)
            assert type(pickle.loads(pickle.dumps(read))) is np.ndarray


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_the_names_of_both_versions_of_numpy_are_known(module: str) -> None:
    here = pickle.dumps({"a": np.float32(2), "b": np.arange(3), "model": {}}, protocol=2)
    (written,) = {name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray") if b"c" + name in here}
    state = load(io.BytesIO(here.replace(written, module.encode())))
    assert state["a"] == 2 and state["b"].tolist() == [0, 1, 2]


class Evil:
    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


RECONSTRUCT = np.arange(2).__reduce__()[0]
SCALAR = np.float64(1).__reduce__()[0]
OBJECT_WITHOUT_FLAGS = Evil(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
NUMBERS = Evil(np.dtype, "f8", False, True, state=(3, "<", None, None, None, -1, -1, 63))
REFUSED: dict[str, tuple[Any, str]] = {
    "pointers as bytes": (
        Evil(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), OBJECT_WITHOUT_FLAGS, False, b"A" * 8)),
        "not numbers",
    ),
    "a scalar that is a pointer": (Evil(SCALAR, OBJECT_WITHOUT_FLAGS, b"A" * 8), "not numbers"),
    "objects": (np.array([{}, []], dtype=object), "not numbers"),
    "text": (np.array(["a"]), "not numbers"),
    "records": (np.zeros(1, dtype=[("a", "f8")]), "not numbers"),
    "dates": (np.datetime64("2020-01-01"), "not numbers"),
    "too few bytes": (Evil(SCALAR, NUMBERS, b"A"), "do not fit"),
    "too large a shape": (
        Evil(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (10**12,), NUMBERS, False, b"A" * 8)),
        "do not fit",
    ),
    "a subclass": (np.rec.array([1.0]), "numpy.rec"),
    "memory for nothing": (Evil(np.ndarray, (10**15,)), ""),
    "no dtype": (Evil(SCALAR, "f8", b"A" * 8), "without a type"),
    "a function of numpy": (Evil(np.zeros, 3), "numpy.zeros"),
    "a function of Python": (Evil(print, "ran"), "print"),
}


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_other_values_are_refused_and_named(value: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_again(value, tmp_path)
    assert "\n" not in str(error.value)


@given(st.lists(st.integers(0, 255), max_size=3), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_changed_bytes_are_numbers_or_an_error(bytes_: list[int], place: int) -> None:
    content = pickle.dumps({"a": np.float32(2), "b": np.arange(3)}, protocol=2)
    content = content[:place] + bytes(bytes_) + content[place + len(bytes_) :]
    try:
        state = load(io.BytesIO(content))
    except Exception:  # the reader names it as damaged
        return
    values = state.values() if isinstance(state, dict) else ()
    assert not any(isinstance(value, np.ndarray) and value.dtype.hasobject for value in values)


def test_scalars_become_plain_numbers_and_the_rest_is_shared() -> None:
    big, array = {"w": torch.zeros(2)}, np.arange(3)
    state = {"model": big, "best": np.float64(2.5), "extra": [1, (np.int64(3), "x")], "array": array}
    plain = numpy_values.plain_numbers(state)
    assert plain == {"model": big, "best": 2.5, "extra": [1, (3, "x")], "array": array}
    assert type(plain["best"]) is float and type(plain["extra"][1][0]) is int
    assert plain["model"] is big and plain["array"] is array
    assert type(state["best"]) is np.float64
    same = {"model": big, "best": 1.0}
    assert numpy_values.plain_numbers(same) is same


def test_meters_of_arrays_are_read_by_any_program_and_go_on(tmp_path: Path) -> None:
    """As BLEU's counts of stock ``translation --eval-bleu``."""

    def count(values: list[int]) -> None:
        metrics.log_scalar("_counts", np.array(values))
        metrics.log_derived("counted", lambda meters: int(sum(meters["_counts"].sum)))

    metrics.reset()
    try:
        with metrics.aggregate("train", new_root=True):
            count([1, 2, 3])
        path = tmp_path / "meters.pt"
        kept = {"train_iterator": {"epoch": 1}, "metrics": metrics.state_dict()}
        checkpoint_utils.torch_persistent_save({"model": {"w": torch.zeros(1)}, "extra_state": kept}, str(path))
        read_by_torch(path)
        metrics.reset()
        metrics.load_state_dict(reading.check(str(path))["extra_state"]["metrics"])
        with metrics.aggregate("train") as held:
            count([10, 20, 30])
            assert held["_counts"].sum.tolist() == [11, 22, 33] and held.get_smoothed_values()["counted"] == 66
    finally:
        metrics.reset()


def read_by_torch(path: Path) -> None:
    """Reads a file in a program that knows nothing of fairseq or this plugin."""
    program = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    read = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr[-1000:]


def test_files_of_training_are_read_by_any_program(toy_data: Path, tmp_path: Path) -> None:
    train(toy_data, tmp_path, 2)
    cli.main(["checkpoint", "average", str(tmp_path / "checkpoint_last.pt"), "--out", str(tmp_path / "mean.pt")])
    for name in ("checkpoint_last.pt", "mean.pt"):
        read_by_torch(tmp_path / name)
