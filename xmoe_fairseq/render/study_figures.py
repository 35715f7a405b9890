"""The pictures of a study: validation loss and experts by updates, and quality against FLOPs in experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..study.results import RowResults, RunResult, SystemResult
from .report_figure import STYLE

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 8.0, 4.5, 120
# Rows differ in colour and in dashes, as there are more rows than colours that everyone can tell apart.
_DASHES = ("-", "--", ":", "-.")
_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
_STACKS = {"encoder": "enc_experts", "decoder": "dec_experts"}


def draw_curves(rows: Sequence[RowResults]) -> Figure:
    """Draws the validation loss by updates: the mean of the seeds, with a band from the least to the greatest."""
    with style.context(["default", STYLE]):
        figure, axes = _figure()
        for number, row in enumerate(rows):
            _draw_course(axes, [result.valid for result in row.results], "loss", row.row.name, number)
        axes.set_xlabel("updates")
        axes.set_ylabel("validation loss")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_experts(rows: Sequence[RowResults]) -> Figure:
    """Draws the experts per token in training, by updates, of the rows in which their number changes."""
    moving = [row for row in rows if any(_moves(result) for result in row.results)]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained", dpi=DOTS_PER_INCH)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (stack, metric) in zip(panels, _STACKS.items(), strict=True):
            for number, row in enumerate(moving):
                courses = [result.train for result in row.results if metric in result.train]
                if courses:
                    _draw_course(axes, courses, metric, row.row.name, number)
            axes.set_title(stack)
            axes.set_xlabel("updates")
        panels[0].set_ylabel("experts per token")
        panels[0].set_ylim(bottom=0)
        if moving:
            panels[0].legend(frameon=False, fontsize=8)
    return figure


def draw_quality(rows: Sequence[RowResults]) -> Figure:
    """Draws BLEU against FLOPs in experts: a mark for each seed and row; if a threshold was chosen, a hollow mark
    for each seed at that threshold, joined with the trained one."""
    with style.context(["default", STYLE]):
        figure, axes = _figure()
        for number, row in enumerate(rows):
            colour = _COLOURS[number % len(_COLOURS)]
            marker = "osD^v"[number // len(_COLOURS) % 5]
            trained = [_point(result.trained) for result in row.results]
            axes.plot(*zip(*trained, strict=True), marker, color=colour, label=row.row.name)
            for result in row.results:
                if result.chosen is not None:
                    ends = [_point(result.trained), _point(result.chosen)]
                    axes.plot(*zip(*ends, strict=True), ":", color=colour, linewidth=0.8)
                    axes.plot(*ends[1], marker, color=colour, markerfacecolor="white")
        axes.set_xlabel("FLOPs per token in experts")
        axes.set_ylabel("BLEU, mean of the directions")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained", dpi=DOTS_PER_INCH)
    return figure, figure.add_subplot()


def _point(system: SystemResult) -> tuple[float, float]:
    return system.model.moe_flops, system.averages["all"]["bleu"]


def _moves(result: RunResult) -> bool:
    return any(len(set(result.train.get(metric, ()))) > 1 for metric in _STACKS.values())


def _draw_course(
    axes: Axes, courses: Sequence[Mapping[str, Sequence[float]]], metric: str, label: str, number: int
) -> None:
    """Draws the mean of one metric over seeds, and a band; the seeds' updates are the same, or else the first's."""
    updates = courses[0]["updates"]
    values = np.array([np.interp(updates, course["updates"], course[metric]) for course in courses])
    colour = _COLOURS[number % len(_COLOURS)]
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    axes.plot(updates, values.mean(axis=0), dashes, color=colour, label=label, linewidth=1.4)
    if len(values) > 1:
        axes.fill_between(updates, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
