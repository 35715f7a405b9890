"""What the figures of `xmoe analyze` draw, against loops over the tokens."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from helpers_analysis import Case, close
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xmoe_fairseq.analysis import tables
from xmoe_fairseq.evaluation.routing_counts import Counts, LayerCounts, MoELayerSpec
from xmoe_fairseq.models.routing_recorder import INPUTS
from xmoe_fairseq.moe import TokenRouting
from xmoe_fairseq.render import analysis_figures, analysis_folder, analysis_heatmaps, style
from xmoe_fairseq.render.analysis_folder import Analysis, analysis


@pytest.fixture(scope="module")
def threshold(toy_data: Path) -> Case:
    return Case(toy_data, "threshold")


def lines(figure: Figure, gid: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_directions_are_drawn(threshold: Case) -> None:
    figure = analysis_figures.directions(threshold.found.tables["directions"], "experts")
    for title, names in (("en → …", "en-{}"), ("… → en", "{}-en")):
        axes = panel(figure, title)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert sorted(labels) == ["xx", "yy"]
        for marker, stack in (("o", "encoder"), ("D", "decoder")):
            (line,) = [one for one in axes.lines if one.get_marker() == marker]
            expected = [fmean(r["experts"] for r in threshold.where(direction=names.format(label), stack=stack))
                        for label in labels]  # fmt: skip
            assert list(line.get_xdata()) == close(expected)


def test_layers_are_drawn(threshold: Case) -> None:
    figure = analysis_figures.layers(threshold.found.tables["directions"], "experts")
    for line, stack in zip(lines(figure, "mean"), INPUTS, strict=True):
        assert list(line.get_xdata()) == [2]
        assert list(line.get_ydata()) == close([fmean(r["experts"] for r in threshold.where(stack=stack))])
    assert len(lines(figure, "direction")) == 8


def test_distribution_is_drawn(threshold: Case) -> None:
    figure = analysis_figures.distribution(threshold.found.tables["distribution"])
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        taken = Counter(r["experts"] for r in threshold.where(stack=stack))
        most = max(taken.values())
        for bar in axes.patches:
            number = round(bar.get_y() + bar.get_height() / 2)
            assert bar.get_width() == pytest.approx(0.84 * taken[number] / most)
            assert bar.get_x() == pytest.approx(-bar.get_width() / 2)
    means = [line.get_ydata()[0] for line in lines(figure, "mean")]
    assert means == close([fmean(r["experts"] for r in threshold.where(stack=stack)) for stack in INPUTS])


def test_positions_frequency_and_extremes_are_drawn(threshold: Case) -> None:
    made = threshold.found.tables
    figure = analysis_figures.positions(made["positions"], "experts")
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        (line,) = axes.lines
        rows = made["positions"].where(layer=f"{stack}.2")
        assert (list(line.get_xdata()), list(line.get_ydata())) == (rows.column("first"), rows.column("experts"))
    figure = analysis_figures.frequency(made["frequency"], made["frequency_extremes"], "experts")
    for line, stack in zip(lines(figure, "mean"), INPUTS, strict=True):
        assert list(line.get_ydata()) == made["frequency"].where(stack=stack).column("experts")
    medians = sorted(line.get_xdata()[0] for line in lines(figure, "median"))
    assert medians == sorted(made["frequency_extremes"].column("q50"))
    figure = analysis_figures.extremes(made["extremes"], "experts")
    for axes, stack in zip(figure.axes, INPUTS, strict=True):
        rows = made["extremes"].where(stack=stack)
        (line,) = axes.lines
        assert list(line.get_xdata()) == rows.column("experts")
        assert [label.get_text() for label in axes.get_yticklabels()] == rows.column("token")
        assert [text.get_text() for text in axes.texts] == [str(count) for count in rows.column("tokens")]


def test_flops_are_drawn(threshold: Case) -> None:
    rows = threshold.found.tables["flops"].records()
    (axes,) = analysis_figures.flops(threshold.found.tables["flops"]).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert drawn["dense network"] == [1, 1]
    assert drawn["all experts"] == close([row["flops_of_all_experts"] / row["flops_dense"] for row in rows])
    for row in rows:
        assert drawn[f"taken, {row['stack']}"] == close([row["flops"] / row["flops_dense"]])
    texts = [text.get_text() for text in axes.texts]
    assert {f"{100 * row['saved_against_all']:.0f}%" for row in rows} <= set(texts)


def test_heat_maps_are_drawn(threshold: Case) -> None:
    load = threshold.found.loads[0]
    figure = analysis_heatmaps.experts_by_language(load)
    image = figure.axes[1].images[0]  # the bar of colours comes after it
    assert np.exp2(np.asarray(image.get_array())) == pytest.approx(load.load, abs=1e-6)
    assert [label.get_text() for label in image.axes.get_yticklabels()] == load.languages
    figure = analysis_heatmaps.language_similarity(load)
    image = figure.axes[1].images[0]
    apart = ~np.eye(3, dtype=bool)
    assert np.asarray(image.get_array())[apart] == pytest.approx(load.similarity[apart])
    assert [label.get_text() for label in image.axes.get_xticklabels()] == load.languages
    figure = analysis_heatmaps.coselection(threshold.found.tables["coselection"])
    for axes in figure.axes[:2]:
        drawn = np.exp2(np.asarray(axes.images[0].get_array()))
        for row in threshold.found.tables["coselection"].where(layer=axes.get_title()).records():
            lift = float("nan") if row["lift"] is None else row["lift"]
            assert drawn[row["expert"], row["other"]] == pytest.approx(lift, abs=1e-6, nan_ok=True)


def many_languages(count: int = 94) -> Analysis:
    """An analysis of random numbers: all languages of a large benchmark, three layers per stack."""
    rng = np.random.default_rng(0)
    names = [f"l{number:02d}" for number in range(count)]
    directions = [pair for name in names for pair in (("en", name), (name, "en"))]
    layers = {}
    for name in [f"{stack}.{number}" for stack in INPUTS for number in (2, 4, 6)]:
        layer = LayerCounts(MoELayerSpec(name, 16, 16, 1, False, True, 100.0, 10.0, 200.0), len(directions), 50)
        for direction in range(len(directions)):
            taken = torch.from_numpy((rng.random((20, 16)) < rng.random(16) * 0.4).astype(np.int64))
            taken[:, 0] = 1
            ones = torch.ones(20)
            types = torch.from_numpy(rng.integers(4, 50, 20))
            layer.add(direction, types, torch.arange(1, 21), TokenRouting(taken, ones.long(), ones * 0.5, ones))
        layers[name] = layer
    words = [None] * 4 + [f"▁word{number}" for number in range(46)]
    return analysis(Counts(directions, [1] * len(directions), layers), {s: words for s in INPUTS}, 5, 20)


def overlaps(labels: list[Any], renderer: Any, horizontal: bool = False) -> int:
    """Counts neighbours whose texts touch."""
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
    ends = sorted((box.x0, box.x1) if horizontal else (box.y0, box.y1) for box in boxes)
    # Letters need less than their box: ascenders and descenders of neighbours may share a tenth of it.
    return sum(high - next_low > 0.15 * (high - low) for (low, high), (next_low, _) in pairwise(ends))


def test_94_languages_are_legible() -> None:
    found = many_languages()
    with style.drawing():
        for name, figure in analysis_folder.draw(found):
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw(renderer)
            for axes in figure.axes:
                assert not overlaps(axes.get_yticklabels(), renderer), name
                assert not overlaps(axes.get_xticklabels(), renderer, horizontal=True), name
            if name == "directions":
                shown = [t.get_text() for axes in figure.axes for t in axes.get_yticklabels() if t.get_text()]
                assert len(shown) == 188
            if name == "experts_by_language_encoder":
                assert len(figure.axes[1].get_yticklabels()) == 95
            width, height = figure.get_size_inches()
            assert width <= 14 and height <= 14, name


def test_no_character_becomes_a_box() -> None:
    private = "\U000f1234"
    assert style.legible(f"a▁é{private}\t$x$") == "a▁éU+F1234U+0009$x$"
    assert style.visible("\u0301") == "◌\u0301"
    assert style.fonts_for("abc") == ["DejaVu Sans"]
    rows = [("most", "encoder", word, 1, 9, 2.0, 1.0, 0.5, 0.1) for word in ("$a_b$", f"x{private}", "▁że")]
    columns = ("end", "stack", "token", "rank", "tokens", "experts", "passes", "top1_prob", "entropy")
    table = tables.Table("extremes", columns, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        with style.drawing(row[2] for row in rows):
            figure = analysis_figures.extremes(table, "experts")
            figure.draw_without_rendering()
            figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$a_b$", "xU+F1234", "▁że"]


def test_tsv_keeps_every_row_on_a_line() -> None:
    table = tables.Table("t", ("token", "n", "x"), [("a\tb\nc\\", 3, None), ("d", 4, 0.123456789)])
    assert table.as_tsv() == "token\tn\tx\na\\tb\\nc\\\\\t3\t\nd\t4\t0.123457\n"
