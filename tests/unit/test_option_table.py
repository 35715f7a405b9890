"""docs/stock_options.md: the options are those of fairseq's parsers, and what it says of them is seen again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from option_table import left_out, page, parsers, plan, values
from option_table.scene import OURS, STOCK
from option_table.tries import Outcome

PAGE = (ROOT / "docs/stock_options.md").read_text()
ROWS = plan.rows(parsers.all_options())
_CELLS = re.compile(r"(?<!\\)\|")


def rows_of_the_page() -> list[tuple[str, str, str, str, str]]:
    """Command, group, option, value and state of each row."""
    found = []
    command = group = ""
    for line in PAGE.splitlines():
        if line.startswith("### "):
            command, _, group = line.removeprefix("### ").partition(": ")
        elif line.startswith("| `--"):
            option, value, state, _ = [cell.strip().replace("\\|", "|") for cell in _CELLS.split(line)[1:-1]]
            found.append((command, group, option.strip("`"), value, state))
    return found


def test_the_page_lists_the_options_of_the_parsers_with_their_values() -> None:
    planned = []
    for row in ROWS:
        needs = f" (with `{row.base}`)" if row.base else ""
        value = f"`{row.value}`{needs}" if row.value else needs
        planned.append((*row.option[:3], value.strip()))
    assert [row[:4] for row in rows_of_the_page()] == planned


def test_no_option_is_a_fault() -> None:
    faults = [row for row in rows_of_the_page() if row[4] in (page.FAILS, page.DIFFERS, page.UNKNOWN)]
    assert faults == []


def test_what_is_not_tried_has_a_reason_that_names_options() -> None:
    names = [f"{row.option.command} {row.option.group} {row.option.name}" for row in ROWS]
    for pattern in left_out.NOT_TRIED:
        assert any(re.search(pattern, name) for name in names), pattern
    known = {word for row in ROWS for word in (row.option.name, row.option.group)}
    for key in (*values.VALUES, *values.NEEDS):
        assert key in known or key.rpartition(" ")[2] in known, key


OPTION = parsers.Option("fairseq-train", "common", "--seed", (), True, 1)
ROW = plan.Row(OPTION, "7", "", "--seed 7", None)
SAME, OTHER = Outcome(0, "done", "a"), Outcome(0, "done", "b")
LINE = Outcome(1, "xmoe_fairseq: error: --seed 7 is out of range", "c")
TRACEBACK = Outcome(1, "KeyError: 'seed'", "d")
GUARDED = Outcome(1, "xmoe_fairseq: error: fairseq cannot continue (KeyError: 'seed'): check", "e")


@pytest.mark.parametrize(
    ("ours", "stock", "state"),
    [
        (OTHER, OTHER, page.WORKS),
        (SAME, SAME, page.WORKS),
        (SAME, OTHER, page.DIFFERS),
        (OTHER, SAME, page.DIFFERS),
        (OTHER, TRACEBACK, page.WORKS),
        (LINE, OTHER, page.REFUSED),
        (GUARDED, OTHER, page.FAILS),
        (GUARDED, TRACEBACK, page.LIKEWISE),
        (TRACEBACK, OTHER, page.FAILS),
    ],
)
def test_states(ours: Outcome, stock: Outcome, state: str) -> None:
    known = {
        side: {"fairseq-train": SAME, "fairseq-train --seed 7": one} for side, one in ((OURS, ours), (STOCK, stock))
    }
    assert page.state_of(ROW, known).name == state


@pytest.mark.slow
def test_a_sample_is_tried_again(tmp_path: Path) -> None:
    """One option each of a kind: works, changes nothing, is refused."""
    pattern = (
        r"fairseq-train (optimization --clip-norm|checkpoint --reset-meters|EMA configuration --ema-fp32)|score .*order"
    )
    words = [sys.executable, ROOT / "scripts/stock_options.py", "--work", tmp_path, "--only", pattern]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600).stdout
    again = [line.split(" | ") for line in said.splitlines() if line.startswith("fairseq-")]
    expected = {(row[0], row[2]): row[4] for row in rows_of_the_page()}
    assert len(again) == 4
    states = {(command, name): state for command, name, _, state, *_ in again}
    assert states.items() <= expected.items()
