"""``xmoe sweep`` without a model: the Pareto front and the choice by naive ways, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from helpers_scoring import PAIRS, fake_translator, spoil, write_checkpoint, write_data
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.sweep import read_thresholds
from xmoe_fairseq.render.sweep_figure import draw_sweep
from xmoe_fairseq.results.sweep import COSTS, Point, Sweep, pareto


def point(threshold: float, bleu: float, flops: float, words: float, chrf: float = 50.0) -> Point:
    return Point(threshold, {"bleu": bleu, "chrf": chrf}, 1.0, 0.5, flops, 2 * flops, words)


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9).map(
    lambda rows: [point(number / 10, *map(float, row)) for number, row in enumerate(rows)]
)


@given(POINTS)
def test_no_point_of_the_front_is_beaten_and_every_other_is(points: list[Point]) -> None:
    for cost in COSTS.values():
        found = pareto(points, cost, lambda p: p.scores["bleu"])

        def beats(one: Point, other: Point, cost: Any = cost) -> bool:
            at_least = one.scores["bleu"] >= other.scores["bleu"] and cost(one) <= cost(other)
            return at_least and (one.scores["bleu"] > other.scores["bleu"] or cost(one) < cost(other))

        unbeaten = [one for one in points if not any(beats(other, one) for other in points)]
        # Of equal points one is enough.
        places = {(cost(one), one.scores["bleu"]) for one in unbeaten}
        assert {(cost(one), one.scores["bleu"]) for one in found} == places and len(found) == len(places)
        assert [cost(one) for one in found] == sorted(cost(one) for one in found)


@given(POINTS, st.integers(0, 3))
def test_the_least_threshold_within_reach_is_chosen(points: list[Point], lose: int) -> None:
    sweep = Sweep("x", points, float(lose), "CPU", 1, 1, {})
    best = max(one.scores["bleu"] for one in points)
    good = [one.threshold for one in points if best - one.scores["bleu"] <= lose]
    assert sweep.chosen.threshold == min(good)


def test_thresholds() -> None:
    assert read_thresholds("0.1:1.0:0.1") == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert read_thresholds("0:0.5:0.2") == [0, 0.2, 0.4]
    assert read_thresholds("0.9,0.3,0.30") == [0.3, 0.9] and read_thresholds("1") == [1]
    for text in ("a", "0:1", "", "0:1:0.1:2", "0:1:nan"):
        with pytest.raises(UserError, match="is not FIRST:LAST:STEP"):
            read_thresholds(text)
    for text in ("nan", "0:1:0", "0.5:0.1:0.1", "0.5,2", "0:inf:1"):
        with pytest.raises(UserError, match="is out of range"):
            read_thresholds(text)


def test_what_is_drawn_is_what_was_measured() -> None:
    points = [point(0.1, 10, 1e5, 900, 40), point(0.5, 30, 3e5, 700, 45), point(0.7, 29, 4e5, 750, 60),
              point(1.0, 30.2, 8e5, 300, 61)]  # fmt: skip
    figure = draw_sweep(Sweep("x", points, 0.5, "CPU", 1, 1, {}))
    costs = (lambda p: p.moe_flops, lambda p: p.words_per_second)
    fronts = [[0.1, 0.5, 1.0], [1.0, 0.5, 0.7, 0.1], [0.1, 0.5, 0.7, 1.0], [1.0, 0.7, 0.1]]
    # Against words/s more is better, so that 0.7 beats nothing in BLEU only where 0.5 is slower.
    fronts[1] = [0.1, 0.7, 0.5, 1.0]
    fronts[3] = [0.1, 0.7, 1.0]
    assert len(figure.axes) == 4
    for number, axes in enumerate(figure.axes):
        metric, x = ("bleu", "chrf")[number // 2], costs[number % 2]
        every, front, chosen = (list(zip(*line.get_data(), strict=True)) for line in axes.lines)
        assert every == [(x(p), p.scores[metric]) for p in points]
        by_threshold = {p.threshold: (x(p), p.scores[metric]) for p in points}
        assert front == [by_threshold[threshold] for threshold in fronts[number]]
        assert chosen == [by_threshold[0.5]]
        assert {note.get_text(): note.xy for note in axes.texts} == {f"{t:g}": xy for t, xy in by_threshold.items()}


def test_sweep_measures_each_threshold_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint, out = write_data(tmp_path / "data"), write_checkpoint(tmp_path / "c.pt"), tmp_path / "out"
    fake = fake_translator(monkeypatch, spoil(3))
    words = ["sweep", "--data", str(data), "--checkpoint", str(checkpoint), "--out", str(out), "--quiet"]
    cli.main([*words, "--thresholds", "0.2:0.6:0.4"])
    assert fake.asked == [*PAIRS, *PAIRS]
    capsys.readouterr()
    cli.main([*words, "--thresholds", "0.2:1:0.4", "--json"])
    assert fake.asked == [*PAIRS, *PAIRS, *PAIRS]
    assert fake.made == 2  # one model for all thresholds of a sweep
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "sweep.json").read_text())
    assert [one["threshold"] for one in found["points"]] == [0.2, 0.6, 1.0]
    for one in found["points"]:
        scores = json.loads((out / f"threshold-{one['threshold']:g}/scores.json").read_text())
        assert scores["settings"]["moe_threshold"] == one["threshold"]
        for metric in ("bleu", "chrf"):
            assert one["scores"][metric] == pytest.approx(mean(row["scores"][metric] for row in scores["rows"]))
        tokens = [100, 110, 120, 130]
        experts = sum(round(t * (1 + 3 * one["threshold"])) for t in tokens) / sum(tokens)
        assert one["experts_per_token"] == pytest.approx(experts)
        assert one["computation_saved"] == pytest.approx(1 - experts / 4)
        assert one["moe_flops"] == pytest.approx(10 * experts)
        assert one["words_per_second"] == pytest.approx(sum(row["source_words"] for row in scores["rows"]) / 8)
    # The same translations everywhere: the cheapest is the front and the choice.
    assert found["chosen"] == 0.2 and found["pareto"]["moe_flops"] == [0.2]
    table = [line.split("\t") for line in (out / "sweep.tsv").read_text().split("\n")[:-1]]
    assert table[0][0] == "threshold" and [row[0] for row in table[1:]] == ["0.2", "0.6", "1"]
    assert "Threshold **0.2** is the least" in (out / "sweep.md").read_text()
    assert imread(out / "sweep.png").shape[1] == 720 and "</svg>" in (out / "sweep.svg").read_text()
    cli.main(["compare", str(out / "threshold-0.2"), str(out / "threshold-1"), "--samples", "10", "--quiet"])
    assert "threshold-0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "2"], "--thresholds 2 is out of range"),
        (["--thresholds", "0.5", "--lose", "-1"], "--lose: -1 is out of range"),
        (["--thresholds", "0.5", "--pairs", "en-xx"], "no direction 'en-xx'"),
        (["--thresholds", "0.5", "--moe-threshold", "1"], "unrecognized arguments: --moe-threshold"),
        ([], "one of the arguments --thresholds --shifts is required"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(more: list[str], message: str, tmp_path: Path) -> None:
    data, checkpoint = write_data(tmp_path / "data"), write_checkpoint(tmp_path / "c.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        cli.main(["sweep", "--data", str(data), "--checkpoint", str(checkpoint), *more, "--quiet"])
    assert sorted(tmp_path.rglob("*")) == before


def test_shifts_are_swept_from_the_sparsest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint, out = write_data(tmp_path / "data"), write_checkpoint(tmp_path / "c.pt"), tmp_path / "out"
    fake_translator(monkeypatch, spoil(3))
    words = ["sweep", "--data", str(data), "--checkpoint", str(checkpoint), "--out", str(out), "--quiet"]
    cli.main([*words, "--shifts=-0.5:1:0.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["dial"] == "shift" and [one["threshold"] for one in found["points"]] == [1.0, 0.5, 0.0, -0.5]
    settings = json.loads((out / "shift--0.5/scores.json").read_text())["settings"]
    assert settings["moe_shift"] == -0.5 and settings["moe_threshold"] is None
    page = (out / "sweep.md").read_text()
    assert page.startswith("# c by shift") and "is the largest that loses no more than" in page
    with pytest.raises(UserError, match="--shifts 2000 is out of range: it must name shifts in"):
        cli.main([*words, "--shifts", "2000"])
