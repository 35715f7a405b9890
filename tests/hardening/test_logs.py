"""Logs of training: time grows with their length and no faster, whatever they hold; every figure has a place."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq.common.schema import json_text
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.render.report_curves import draw
from xmoe_fairseq.results.training_log import INNER, Training, find_logs, read_training

GOOD = "epoch 001:  5 / 99 loss=2.5, ppl=4, num_updates=5\n"
SECONDS = 8  # a quadratic pattern takes minutes


def read(path: Path, text: str) -> Training | None:
    path.write_text(text)
    return read_training([path])


# Lines of a length, each near to what a pattern takes.
LONG: dict[str, Callable[[int], str]] = {
    "bar": lambda size: "epoch 001: [" + ", a=1" * (size // 5),
    "bar closed": lambda size: "epoch 001: [" + ", a=1" * (size // 5) + " ]",
    "bars": lambda size: "epoch 001: " + "[, a=1" * (size // 6) + "]",
    "brackets": lambda size: "epoch 001: " + "[" * size,
    "closing": lambda size: "epoch 001: [" + "], a=" * (size // 5),
    "equals": lambda size: "epoch 001:  5 / 99 " + "=" * size + " x",
    "pairs": lambda size: "epoch 001:  5 / 99 " + "a=b, " * (size // 5),
    "spaces": lambda size: "epoch 001:" + " " * size + "x",
    "digits": lambda size: "epoch " + "1" * size,
    "summary": lambda size: "epoch 001 | " + "a b | " * (size // 6),
    "subset": lambda size: "epoch 001 | valid on '" + "a" * size,
    "subsets": lambda size: "epoch 001 | " + "valid on 'a' subset | " * (size // 22),
    "dates": lambda size: "2024-01-01 00:00:00 | INFO | " * (size // 29),
    "date": lambda size: "2024-01-01 00:00:00 | " + "A" * size,
    "json": lambda size: '{"epoch": ' + "[" * size,
    "json number": lambda size: '{"epoch": ' + "1" * size + "}",
    "json names": lambda size: '{"epoch": 1' + ', "a_num_updates": 1' * (size // 20) + "}",
    "returns": lambda size: "\r" * (size // 4),
}


@pytest.mark.parametrize("kind", LONG)
def test_no_pattern_is_quadratic_in_the_length_of_a_line(kind: str, tmp_path: Path) -> None:
    start = time.process_time()
    found = read(tmp_path / "log", f"{LONG[kind](2_000_000)}\n{GOOD}")
    assert found is not None and found.train[5]["loss"] == 2.5
    assert time.process_time() - start < SECONDS


def line(update: int) -> str:
    return f"epoch 001:  5 / 99 loss=2, num_updates={update}\n"


START = "{'_name': None, 'common': {}}\n"
MANY: dict[str, Callable[[int], str]] = {
    "starts": lambda count: "".join(f"{START}{line(update)}" for update in range(count)),
    "back by one": lambda count: "".join(map(line, range(count))) + (line(count - 2) + line(count - 1)) * count,
    "back to the start": lambda count: "".join(map(line, range(count))) * 3,
    "subsets": lambda count: "".join(
        f"epoch 001 | valid on 's{one}' subset | loss 1 | num_updates {one}\n" for one in range(count // 10)
    ),
}


@pytest.mark.parametrize("kind", MANY)
def test_no_course_is_quadratic_in_the_number_of_lines(kind: str, tmp_path: Path) -> None:
    start = time.process_time()
    found = read(tmp_path / "log", MANY[kind](40_000))
    assert found is not None and found.updates in (39_999, 3999)
    assert time.process_time() - start < SECONDS


def test_memory_of_a_long_log(tmp_path: Path) -> None:
    """100 MB take 340 MiB; here are 5 MB."""
    names = [f"{stack}_figure_{number}" for stack in ("enc", "dec") for number in range(15)]
    figures = ", ".join(f"{name}=0.1234" for name in names)
    with (tmp_path / "log").open("w") as file:
        file.writelines(f"epoch 001:  5 / 99 {figures}, num_updates={update}\n" for update in range(8000))
    size = (tmp_path / "log").stat().st_size
    tracemalloc.start()
    found = read_training([tmp_path / "log"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and len(found.train) == 8000 and size > 4e6
    assert peak < 5 * size


NUMBERS = st.one_of(
    st.floats(),
    st.sampled_from(
        [1e308, -1e308, 5e-324, -5e-324, 0.0, -0.0, 1e-310, 1.0, math.nextafter(1.0, 2), math.inf, math.nan]
    ),
)


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_course_is_drawn(values: list[float], validated: bool) -> None:
    names = ("loss", "ppl", "lr", "gnorm", "enc_z_loss", "wps")
    points = {number * 2**50 + 3: dict.fromkeys(names, value) for number, value in enumerate(values)}
    training = Training({INNER: points} | ({"valid": points} if validated else {}), [3])
    for figure in draw(training):
        drawn = " ".join(one.path for one in figure.lines) + figure.description
        assert "nan" not in drawn and "inf" not in drawn
        assert all(math.isfinite(tick.place) for tick in (*figure.x_ticks, *figure.y_ticks))
    json_text(training.as_json(), "report.json")


@pytest.mark.parametrize("update", ["nan", "inf", "-5", "1e300", "9" * 400, "x", ""])
def test_numbers_of_updates(update: str, tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(f"epoch 001:  5 / 99 loss=2, num_updates={update}\n")
    assert find_logs(tmp_path) == []
    with pytest.raises(UserError, match="holds no figures of fairseq-train"):
        read_training([tmp_path / "train.log"])
