"""The picture of a sweep: BLEU and chrF++ against FLOPs in experts and against speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..metrics.corpus import METRICS
from ..results.sweep import COSTS, Point, Sweep, pareto
from .report_figure import STYLE

WIDTH_INCHES, ROW_INCHES, DOTS_PER_INCH = 8.0, 2.9, 90

# Okabe and Ito's blue and vermilion, apart under every kind of colour blindness; the shapes differ too.
_POINT, _CHOSEN = "#0072B2", "#D55E00"
# Where labels go in turn, in points from their mark, so that those of neighbours stay apart.
_LABELS = (((4, -9), "left"), ((-4, 5), "right"), ((4, 5), "left"))
_X_AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "moe_flops": ("FLOPs per token in experts", lambda point: point.moe_flops),
    "time": ("source words per second", lambda point: point.words_per_second),
}


def draw_sweep(sweep: Sweep) -> Figure:
    """Draws a row of panels for each metric: left against FLOPs in experts, right against words/s.

    Every threshold is a labelled point, those on the Pareto front are filled and joined, the chosen one is a diamond.
    """
    metrics = list(sweep.points[0].scores)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * len(metrics)), layout="constrained")
        grid = figure.subplots(len(metrics), len(_X_AXES), squeeze=False, sharex="col", sharey="row")
        for row, metric in zip(grid, metrics, strict=True):
            row[0].set_ylabel(METRICS[metric])
            for axes, cost in zip(row, _X_AXES, strict=True):
                _draw_panel(axes, sweep, metric, cost)
        for axes, (name, _) in zip(grid[-1], _X_AXES.values(), strict=True):
            axes.set_xlabel(name)
            axes.xaxis.set_major_formatter(EngFormatter())
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def _draw_panel(axes: Axes, sweep: Sweep, metric: str, cost: str) -> None:
    x = _X_AXES[cost][1]

    def quality(point: Point) -> float:
        return point.scores[metric]

    front = pareto(sweep.points, COSTS[cost], quality)
    axes.plot(*_places(sweep.points, x, quality), "o", color=_POINT, markerfacecolor="white", label=sweep.dial)
    axes.plot(*_places(front, x, quality), "o-", color=_POINT, linewidth=1.2, label="Pareto front")
    axes.plot(
        *_places([sweep.chosen], x, quality),
        "D",
        color=_CHOSEN,
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=1.8,
        label=f"{sweep.sparsest} {sweep.dial} within {sweep.lose:g} BLEU of the best: {sweep.chosen.threshold:g}",
    )
    for number, point in enumerate(sweep.points):
        offset, side = _LABELS[number % len(_LABELS)]
        place = (x(point), quality(point))
        axes.annotate(f"{point.threshold:g}", place, offset, textcoords="offset points", fontsize=7, ha=side)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.margins(0.08, 0.12)


def _places(
    points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point], float]
) -> tuple[list[float], list[float]]:
    return [x(point) for point in points], [y(point) for point in points]


def save(figure: Figure, png: Path, svg: Path) -> None:
    """Writes a figure in both formats."""
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    with style.context({"svg.fonttype": "none", "svg.hashsalt": "xmoe"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
