"""Plans and results of studies that are damaged or do not belong together."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from helpers_study import ROWS, make_study, write_result

from xmoe_fairseq import cli
from xmoe_fairseq.commands.study import write_page
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.study.plan import read_plan
from xmoe_fairseq.study.results import read_results
from xmoe_fairseq.study.runs import Run

# A list that repeats a list that repeats a list: a few lines of YAML, more than any memory when it is written out.
REPEATED = "&a [x, x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
PLANS = {
    "digits": (("margin: 5", f"margin: {'9' * 5000}"), "is not YAML"),
    "a date that is none": (("why: few", "why: 2026-99-99"), "is not YAML"),
    "no rows": ((ROWS[ROWS.index("rows:") : ROWS.index("claims:")], "rows: []\n"), "has no rows"),
    "thresholds": (('"0.1,0.5"', '"0.1,x"'), "--thresholds 0.1,x is not FIRST:LAST:STEP"),
    "too many thresholds": (('"0.1,0.5"', '"0:1:1e-9"'), "names more than"),
    "lines": (("lines: 2", "lines: 0"), "sweep.lines is 0"),
    "repetitions": (("why: few", f"why: [{REPEATED}]"), "rows[1].why is"),
}


@pytest.mark.parametrize(("change", "message"), PLANS.values(), ids=PLANS)
def test_plans(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in ROWS
    (tmp_path / "rows.yaml").write_text(ROWS.replace(*change, 1))
    with pytest.raises(UserError) as error:
        read_plan(tmp_path / "rows.yaml")
    assert message in error.value.message and len(error.value.message) < 10_000


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = path_and_value

    def change(result: Any) -> None:
        for name in path:
            result = result[name]
        result[last] = value

    return change


RESULTS = {
    "no settings": (put("settings", None), "does not say with which settings"),
    "another row": (put("row", "other"), "is the result of 'other' with seed 1"),
    "another seed": (put("seed", 2), "is the result of 'base' with seed 2"),
    "fewer draws": (put("trained", "bleu_draws", [1.0]), "draws"),
    "no draws": (put("trained", "bleu_draws", []), "has 0 draws"),
    "lists of a sweep": (
        put(
            "sweep",
            {
                "thresholds": [0.1, 0.5],
                "bleu": [1.0],
                "moe_flops": [1.0],
                "experts": [1.0],
                "at_most": 1.0,
                "threshold": None,
            },
        ),
        "lists of different lengths",
    ),
}


@pytest.mark.parametrize(("change", "message"), RESULTS.values(), ids=RESULTS)
def test_results(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    runs = [Run(study, row, 1) for row in study.plan.rows[:2]]
    for run in runs:
        write_result(run, 20, 100)
    result = json.loads(runs[0].result.read_text())
    change(result)
    runs[0].result.write_text(json.dumps(result))
    with pytest.raises(UserError, match=message) as error:
        read_results(study)
    assert "base-1.json" in error.value.message or "other-1.json" in error.value.message


@pytest.mark.parametrize("text", ["{}", '{"ratios": 5}', '{"ratios": {"base": 5}}', '{"ratios": {"base": {"x": "y"}}}'])
def test_speed(text: str, tmp_path: Path) -> None:
    study = make_study(tmp_path)
    write_result(Run(study, study.plan.rows[0], 1), 20, 100)
    (study.results / "speed.json").write_text(text)
    with pytest.raises(UserError, match=r"speed\.json .*measure the speed again"):
        write_page(study)
    assert not (study.results / "results.md").exists()


def test_words_without_an_end(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    own = ("--data", study.data, "--out", study.out, "--rows", study.rows, "--updates", 5, "--train", "'x")
    with pytest.raises(UserError, match=r"--train: the options .* cannot be read: No closing quotation"):
        cli.main(["study", *map(str, own)])


def test_a_log_with_too_many_digits(tmp_path: Path) -> None:
    run = Run(study := make_study(tmp_path), study.plan.rows[0], 1)
    run.folder.mkdir(parents=True)
    run.log.write_text(f"num_updates={'9' * 5000} num_updates: 5\n")
    assert run.progress() == 0.5


SCRIPTS = {
    "letters": ({"UPDATES": "abc"}, "UPDATES is 'abc': give a whole number from 1 on"),
    "nothing to do": ({"UPDATES": "0"}, "UPDATES is '0'"),
    "an index that runs a program": ({"UPDATES": "x[$(touch RAN)]"}, "give a whole number"),
}


@pytest.mark.parametrize(("environment", "message"), SCRIPTS.values(), ids=SCRIPTS)
def test_numbers_of_scripts(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    text = (ROOT / "scripts/env.sh").read_text()
    function = text[text.index("whole() {") : text.index("# same_settings")]
    result = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{function}\nwhole UPDATES 1"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
