"""``xmoe study`` without training: the plan, the results added up, the claims by naive ways, the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from helpers import ROOT
from helpers_study import ROWS, make_study, write_result
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.image import imread

from xmoe_fairseq import cli
from xmoe_fairseq.commands.study import write_page
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.study.claims import NOT_SEEN, SEEN, UNDECIDED, resample, test_claims
from xmoe_fairseq.study.jobs import run_all
from xmoe_fairseq.study.measure import plateau, train_seconds
from xmoe_fairseq.study.plan import read_plan
from xmoe_fairseq.study.results import read_results
from xmoe_fairseq.study.runs import Run, runs_of


def test_the_projects_own_plan() -> None:
    plan = read_plan(ROOT / "configs/study/rows.yaml")
    main = {row.name for row in plan.rows if row.main}
    assert main == {"dense", "gshard", "smoe-2-2-2-2", "xmoe", "topk-small"}
    words = plan.train_words(plan.row("xmoe"), 70, "--fp16")
    assert words[words.index("--total-num-update") + 1] == "70" and words[-1] == "--fp16"
    assert words.index("--moe-num-experts") > words.index("--max-tokens")
    assert words[words.index("--adam-betas") + 1] == "(0.9, 0.98)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("why: the baseline", "wy: the baseline"), "'rows[0].wy' is unknown"),
        ((", why: the baseline", ""), "rows[0].why is missing"),
        (("main: true}", "main: 1}"), "rows[0].main is 1, it must be true or false"),
        (("name: base,", "name: a/b,"), "the row's name 'a/b' is refused"),
        (("name: other,", "name: base,"), "two rows of the same name"),
        (("system: other, baseline: base}", "system: othr, baseline: base}"), "no row 'othr': did you mean other?"),
        (("at: chosen", "at: best"), "claims[1].at is 'best', it must be one of trained, chosen"),
        (("than: base", "than: b"), "no row 'b'"),
        (("--moe-num-experts 16", "--x 'a"), "cannot be read"),
        (("rows:", "lines:"), "'lines' is unknown"),
        (("train: --crit", "train: [--crit"), "is not YAML"),
        (("train: --crit", "train: " + "[" * 50_000), "is not YAML"),
        (
            ("- {name: base, arch: moe_transformer_tiny, why: the baseline, main: true}", "- base"),
            "rows[0] is 'base', it must be an object of names and values",
        ),
    ],
)
def test_a_plan_that_is_refused_says_why(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "rows.yaml"
    assert change[0] in ROWS
    file.write_text(ROWS.replace(*change, 1))
    with pytest.raises(UserError, match=re.escape(message)):
        read_plan(file)
    with pytest.raises(UserError, match="cannot read"):
        read_plan(tmp_path / "none.yaml")


def test_the_first_seed_of_the_main_rows_comes_first(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    names = [run.name for run in runs_of(study, (), (1, 2))]
    assert names == ["base-1", "other-1", "base-2", "other-2", "last-1", "last-2"]
    assert [run.name for run in runs_of(study, ("last",), (3,))] == ["last-3"]


def test_runs_of_other_settings_are_never_mixed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run = Run(study, study.plan.rows[0], 1)
    assert not run.finished()
    write_result(run, 20, 100)
    assert run.finished()
    changed = make_study(tmp_path, updates=11)
    with pytest.raises(UserError, match=r'other settings \(train \["10"\], now \["11"\]\)'):
        Run(changed, study.plan.rows[0], 1).finished()
    other = dataclasses.replace(study)
    (tmp_path / "data/raw/test.en-ca.ca").write_text("dos\n")
    with pytest.raises(UserError, match=r"other settings \(data "):
        Run(other, study.plan.rows[0], 1).finished()


def test_a_training_never_goes_on_with_other_options(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run = Program(study, study.plan.rows[0], 1)
    run.folder.mkdir(parents=True)
    run.start()
    run.check_started()
    Program(make_study(tmp_path, beam=7), study.plan.rows[0], 1).check_started()  # the search comes after it
    changed = Program(make_study(tmp_path, more="--lr 9"), study.plan.rows[0], 1)
    with pytest.raises(UserError, match=r'base-1 was made with other settings \(train \[\], now \["--lr", "9"\]\)'):
        run_all([changed], 1, lambda _: None)
    assert not changed.result.exists() and not (run.folder / "train.out").exists()


def test_rows_are_added_up_over_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    base, other, last = study.plan.rows
    for seed, bleu in ((1, 20.0), (2, 22.0), (10, 27.0)):
        write_result(Run(study, base, seed), bleu, 400.0)
    write_result(Run(study, last, 1), 15.0, 0.0)
    (study.results / "base-old.json").write_text("{}")
    rows = read_results(study)
    assert [(row.row.name, row.seeds) for row in rows] == [("base", [1, 2, 10]), ("last", [1])]
    found = rows[0].as_json()
    assert found["bleu"] == {"mean": fmean((20, 22, 27)), "sd": stdev((20, 22, 27))}
    assert found["bleu_en_xx"]["mean"] == 22 and found["bleu_xx_en"]["mean"] == 24
    assert found["moe_flops"] == {"mean": 400, "sd": 0} and found["valid_ppl"]["mean"] == 8
    assert found["experts"]["encoder"]["mean"] == 2.5 and found["updates"] == 10
    dense = rows[1].as_json()
    assert dense["bleu"] == {"mean": 15, "sd": None} and dense["experts"] == {"encoder": None, "decoder": None}
    Run(study, other, 1).result.write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_results(study)
    Run(study, other, 1).result.write_text(json.dumps({"settings": Run(study, other, 1).settings}))
    with pytest.raises(UserError, match="row is missing; delete it to measure the run again"):
        read_results(study)


def test_plateau_is_the_fall_over_the_last_fifth() -> None:
    points = {update: {"loss": loss} for update, loss in ((20, 8.0), (40, 6.0), (60, 5.0), (80, 4.0), (100, 3.9))}
    assert plateau(points) == pytest.approx(0.1 / 4)


def test_seconds_are_those_of_all_lines() -> None:
    assert train_seconds({10: {"train_wall": 20.0}, 20: {"train_wall": 25.0}}) == 45


@given(st.integers(2, 4).flatmap(lambda n: arrays(np.float64, (n, 40), elements=st.floats(0, 50))))
def test_resampled_seeds_keep_the_mean_and_spread_as_the_mean_of_seeds_does(draws: np.ndarray) -> None:
    seeds = len(draws)
    same = np.repeat(draws.mean(axis=1, keepdims=True), 20_000, axis=1)  # sentences play no part
    found = resample(same, np.random.default_rng(1))
    expected = same[:, 0].std(ddof=1) / np.sqrt(seeds)  # the standard error of a mean
    assert found.mean() == pytest.approx(same[:, 0].mean(), abs=0.05 * expected + 1e-9)
    assert found.std() == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_one_seed_is_drawn_as_it_is() -> None:
    draws = np.arange(5.0)[None]
    assert (resample(draws, np.random.default_rng(1)) == draws[0]).all()


def naive_interval(system: list[list[float]], baseline: list[list[float]]) -> tuple[float, float]:
    """Loops over the draws of sentences, and over all choices of seeds in each."""
    differences = []
    for draw in range(len(system[0])):
        sides = []
        for side in (system, baseline):
            values = [seed[draw] for seed in side]
            mean, scale = fmean(values), (len(values) / (len(values) - 1)) ** 0.5
            sides.append([mean + scale * (fmean(c) - mean) for c in itertools.product(values, repeat=len(values))])
        differences += [one - other for one in sides[0] for other in sides[1]]
    return float(np.percentile(differences, 2.5)), float(np.percentile(differences, 97.5))


def test_claims_by_a_naive_bootstrap(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    base, other, _ = study.plan.rows
    for seed in (1, 2):
        write_result(Run(study, base, seed), 20.0 + seed, 400.0)
        write_result(Run(study, other, seed), 25.0 + 0.5 * seed, 800.0, chosen=18.0 + seed)
    rows = read_results(study)
    better, kept = test_claims(study.plan.claims, rows)
    draws = [[list(result.trained.bleu_draws) for result in row.results] for row in (rows[1], rows[0])]
    low, high = naive_interval(*draws)
    centre = np.mean(draws[0]) - np.mean(draws[1])
    assert better.difference == pytest.approx(25.75 - 21.5)
    assert better.low - better.difference == pytest.approx(low - centre, abs=0.3)
    assert better.high - better.difference == pytest.approx(high - centre, abs=0.3)
    write_result(Run(study, other, 3), 26.0, 800.0)  # a seed without a threshold within the budget
    assert [one.claim.at for one in test_claims(study.plan.claims, read_results(study))] == ["trained"]
    assert better.verdict == SEEN and better.moe_flops == 2 and better.p < 0.05 and better.seeds == (2, 2)
    assert kept.difference == pytest.approx(-2) and kept.verdict == SEEN and kept.moe_flops == 0.5


def test_verdicts(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    base, other, _ = study.plan.rows
    assert test_claims(study.plan.claims, []) == []
    for bleu, spread, verdict in ((21.0, 0.1, SEEN), (19.0, 0.1, NOT_SEEN), (20.2, 3.0, UNDECIDED)):
        for seed in (1, 2):
            write_result(Run(study, base, seed), 20.0, 400.0, spread=spread)
            write_result(Run(study, other, seed), bleu, 800.0, spread=spread)
        (tested,) = test_claims(study.plan.claims, read_results(study))  # without a chosen threshold, one claim
        assert tested.verdict == verdict
    Run(study, other, 2).result.unlink()
    write_result(Run(study, other, 1), 30.0, 800.0)
    (tested,) = test_claims(study.plan.claims, read_results(study))
    assert tested.verdict == UNDECIDED and tested.seeds == (1, 2)


def test_equal_systems_differ_by_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for row in study.plan.rows[:2]:
        for seed in (1, 2):
            write_result(Run(study, row, seed), 20.0, 400.0)
    (tested,) = test_claims(study.plan.claims, read_results(study))
    assert tested.difference == 0 and tested.p == 1 and tested.low < 0 < tested.high


def test_the_page_the_tables_and_the_pictures(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    base, other, last = study.plan.rows
    for seed, bleu in ((1, 20.0), (2, 22.0)):
        write_result(Run(study, base, seed), bleu, 400.0)
        write_result(Run(study, other, seed), bleu + 4, 800.0, chosen=bleu)
    write_result(Run(study, last, 1), 15.0, 0.0)
    (study.results / "speed.json").write_text(json.dumps({"ratios": {"base": {"training": 0.9, "decoding": 0.8}}}))
    write_page(study)
    page = (study.results / "results.md").read_text()
    assert re.search(r"\| base +\| +2 \| 21\.00 ± 1\.41 \|", page)
    assert re.search(r"\| last +\| +1 \| +15\.00 \|", page)
    assert "other is better (nobody) " in page and "**seen**" in page and "2.00 of the baseline's" in page
    assert re.search(r"\| base .*0\.90 .*0\.80 \|", page) and "tok:13a" in page and "- **last**: no experts" in page
    found = json.loads((study.results / "results.json").read_text())
    assert found.keys() == {"rows", "claims"} and found["rows"][0]["speed"] == {"training": 0.9, "decoding": 0.8}
    assert found["claims"][0].keys() >= {"claim", "difference", "low", "high", "p", "verdict"}
    lines = (study.results / "results.tsv").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("base\t2\t10\t2000000\t21\t1.41421\t")
    for name in ("curves", "experts", "quality"):
        assert imread(study.results / f"{name}.png").std() > 0.01
        assert (study.results / f"{name}.svg").read_text().startswith("<?xml")
    before = {path.name: path.read_bytes() for path in study.results.iterdir()}
    write_page(study)
    assert before == {path.name: path.read_bytes() for path in study.results.iterdir()}


class Program(Run):
    """A run that is a small program."""

    code = ""

    def steps(self) -> list[tuple[str, list[str]]]:
        write = f"import pathlib; pathlib.Path({str(self.folder)!r}, 'first').touch(); {self.code}"
        done = f"import json; json.dump({{'settings': {self.settings!r}}}, open({str(self.result)!r}, 'w'))"
        return [("train", [sys.executable, "-c", write]), ("measure", [sys.executable, "-c", done])]


class Failing(Program):
    code = "raise SystemExit('it is broken')"


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path)
    study.results.mkdir()
    base, other, last = study.plan.rows
    runs = [Program(study, base, 1), Failing(study, other, 1), Program(study, last, 1)]
    ended: list[str] = []
    failures = run_all(runs, 2, lambda run: ended.append(run.name))
    assert sorted(ended) == ["base-1", "last-1"] and len(failures) == 1
    assert "other-1: train ended with code 1: it is broken" in failures[0]
    said = capfd.readouterr().err
    assert said.splitlines()[0].startswith("0 of 3 runs done · base-1 train 0% · other-1 train 0% · 1 waiting")
    assert "error: other-1" in said
    assert run_all(runs[:1], 1, lambda run: ended.append("again")) == [] and "again" not in ended


def test_a_folder_in_which_a_program_still_works_is_waited_for(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    study.results.mkdir()
    run = Program(study, study.plan.rows[0], 1)
    started = run.folder / "started"
    hold = f"import pathlib, time\nfrom xmoe_fairseq.common import locks\nwith locks.held({str(run.folder)!r}):\n"
    hold += f" pathlib.Path({str(started)!r}).touch(); time.sleep(1.5)"
    begin = time.monotonic()
    orphan = subprocess.Popen([sys.executable, "-c", hold])
    while not started.exists():
        assert orphan.poll() is None
        time.sleep(0.01)
    assert run_all([run], 1, lambda _: None) == []
    assert time.monotonic() - begin > 1.5 and orphan.wait() == 0 and run.finished()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", "1,1"), "--seeds 1,1 is refused"),
        (("--seeds", "a"), "--seeds a is refused"),
        (("--seeds", "1,4294967296"), "--seeds 1,4294967296 is refused"),
        (("--updates", "9" * 20), "is out of range: it must be in [1, 1000000000]"),
        (("--jobs", "0"), "--jobs 0 is out of range"),
        (("--updates", "0"), "--updates 0 is out of range"),
        (("--models", "bose"), "no row 'bose': did you mean base?"),
        (("--rows", "none.yaml"), "cannot read the study's rows none.yaml"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, words: tuple[str, str], message: str) -> None:
    study = make_study(tmp_path)
    own = ("--data", str(study.data), "--out", str(study.out), "--rows", str(study.rows), "--updates", "5")
    with pytest.raises(UserError, match=re.escape(message)):
        cli.main(["study", *own, *words])
    assert not study.out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a folder, and parts if not all: bash benchmarks/gpu.sh OUT [tests study layer programs peers]"),
        (("out", "nothing"), "there is no part nothing: choose of tests study"),
        (("out", "--device", "tpu"), "--device tpu is unknown: choose cuda or cpu"),
        (("out", "study", "--device", "cpu"), "these parts failed"),
    ],
)
def test_the_script_for_gpus_refuses_in_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    script = [
        "bash",
        str(ROOT / "benchmarks/gpu.sh"),
        *(str(tmp_path / word) if word == "out" else word for word in words),
    ]
    done = subprocess.run(script, env={**os.environ, "DATA": "nowhere"}, capture_output=True, text=True, check=False)
    assert done.returncode and done.stderr.count("\n") == 1 and message in done.stderr
    if "study" in words:
        assert "there is no prepared text in nowhere: make it with data_prep/prepare.sh, or set DATA" in done.stdout
        assert done.stdout.startswith("GPU: none")
        assert json.loads((tmp_path / "out" / "parts.jsonl").read_text())["code"] == 1


def test_the_tables_of_the_documentation_are_the_studys() -> None:
    written = (ROOT / "docs/results/results.md").read_text()
    tables = [
        block
        for block in (ROOT / "docs/results.md").read_text().split("\n\n")
        if "| model " in block or "| claim " in block
    ]
    assert len(tables) == 3 and all(table in written for table in tables)


def test_the_projects_results_are_of_its_plan() -> None:
    """A changed row or shared option makes its results those of another study: they are trained again, or removed."""
    plan = read_plan(ROOT / "configs/study/rows.yaml")
    found = [path for path in (ROOT / "docs/results").glob("*-[0-9]*.json")]
    assert len(found) >= 5
    for path in found:
        kept = json.loads(path.read_text())
        assert kept["settings"]["train"] == plan.train_words(plan.row(kept["row"]), kept["settings"]["updates"])
