"""The picture of what the benchmarks measured."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import figure
import pytest
from rows import Row, finish, output_file

ROWS = [
    Row("forward, T 4096", 1.1, 1.0, 1.2, "<= 1.15"),
    Row("decoding, T 1", 1.9, 1.8, 2.0, "<= 1.3"),
    Row("split ratio 2", 1.2, 1.1, 1.3),
    Row("one-hot einsum, its time over ours", 6.1, 5.5, 6.2, ">= 4"),
]


def test_each_row_is_a_dot_at_its_ratio_in_the_colour_of_its_goal() -> None:
    times, speeds = figure.draw(ROWS).axes
    drawn = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])): (line.get_marker(), line.get_color())
        for axes in (times, speeds)
        for line in axes.lines
        if line.get_marker() in ("o", "D")
    }
    assert drawn == {
        (1.1, 0.0): ("o", figure.COLOURS["yes"]),
        (1.9, 1.0): ("D", figure.COLOURS["no"]),
        (1.2, 2.0): ("o", figure.COLOURS[""]),
        (6.1, 0.0): ("o", figure.COLOURS["yes"]),
    }
    assert [label.get_text() for label in times.get_yticklabels()] == [row.case for row in ROWS[:3]]


def test_the_command_writes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = tmp_path / "rows.json", tmp_path / "out.png"
    rows.write_text(json.dumps([asdict(row) for row in ROWS]))
    monkeypatch.setattr(sys, "argv", ["figure.py", str(rows), "--out", str(out)])
    figure.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "rows.json"]


def test_a_missing_folder_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="there is no folder"):
        output_file(str(tmp_path / "none" / "out.png"))
    assert output_file(str(tmp_path / "out.png")) == tmp_path / "out.png"


@pytest.mark.parametrize("content", ["", "[]", "[1]", '[{"case": "a"}]'])
def test_another_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(SystemExit, match=r"rows.json is not what a benchmark writes"):
        figure.read(tmp_path / "rows.json")


def test_small_sizes_have_no_goals(capsys: pytest.CaptureFixture[str]) -> None:
    for quick, shown in ((True, "|  |  |"), (False, "| <= 1.1 | yes |")):
        finish([Row("layer", 1.0, 0.9, 1.1, "<= 1.1")], argparse.Namespace(quick=quick, device="cpu", json=None))
        assert shown in capsys.readouterr().out
