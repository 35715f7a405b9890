"""The picture of a report: quality by direction, and experts by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from ..results.report import Report

WIDTH_INCHES = 10.0
DOTS_PER_INCH = 160
_ROW_INCHES, _FRAME_INCHES, _FEWEST_ROWS = 0.3, 1.2, 6
_BAR = 0.62  # of a row

# Okabe and Ito's palette, whose colours stay apart under every kind of colour blindness.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#DDDDDD"

# DejaVu comes with matplotlib and covers what is drawn: language codes, layer names and numbers, never sentences.
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a name may hold dollar signs
}


def draw_report(report: Report, path: Path) -> None:
    """Draws the report as a PNG, 1600 pixels wide, as high as its directions and layers need.

    The left half shows BLEU and chrF++, the right half experts per token; what there is nothing to show of is left out.
    """
    rows = max(len(report.directions), len(report.layers), _FEWEST_ROWS)
    with style.context(["default", STYLE]):
        # Without pyplot there is no display to look for: matplotlib draws a PNG with Agg.
        figure = Figure(figsize=(WIDTH_INCHES, rows * _ROW_INCHES + _FRAME_INCHES), layout="constrained")
        drawn = [
            draw for draw, shown in ((_draw_directions, report.directions), (_draw_layers, report.layers)) if shown
        ]
        if not drawn:
            figure.suptitle("No translations, no MoE layers")
        for half, draw in zip(
            figure.subfigures(1, len(drawn) or 1, wspace=0.06, squeeze=False)[0], drawn, strict=False
        ):
            draw(half, rows, report)
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def _draw_directions(half: SubFigure, rows: int, report: Report) -> None:
    bleu = [direction.score.bleu for direction in report.directions]
    chrf = [direction.score.chrf for direction in report.directions]
    names = [direction.name for direction in report.directions]
    axes = _panel(half, rows, f"{report.mean_bleu:.1f} BLEU on average", names)
    places = range(len(names))
    bars = axes.barh(places, bleu, height=_BAR, color=_BLUE)
    marks = axes.scatter(chrf, places, marker="D", s=34, color=_ORANGE, edgecolor="black", linewidth=0.6, zorder=3,
                         clip_on=False)  # fmt: skip
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=_GREY, linewidth=0.6)
    _add_legend(axes, [bars, marks], ["BLEU", "chrF++"])
    _write_column(axes, 40, "BLEU", [f"{value:.1f}" for value in bleu])
    _write_column(axes, 88, "chrF++", [f"{value:.1f}" for value in chrf])


def _draw_layers(half: SubFigure, rows: int, report: Report) -> None:
    experts = [use.experts for use in report.layers]
    means = [use.mean_experts for use in report.layers]
    names = [use.layer for use in report.layers]
    axes = _panel(half, rows, f"{report.computation_saved:.0%} of the MoE computation saved", names)
    places = range(len(names))
    all_bars = axes.barh(places, experts, height=_BAR, color=_GREY)
    mean_bars = axes.barh(places, means, height=_BAR, color=_GREEN)
    axes.set_xlim(0, max(experts))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _add_legend(axes, [mean_bars, all_bars], ["experts per token", "all experts"])
    _write_column(axes, 66, "experts", [f"{mean:.2f} / {total}" for mean, total in zip(means, experts, strict=True)])
    _write_column(axes, 106, "saved", [f"{use.computation_saved:.0%}" for use in report.layers])


def _panel(half: SubFigure, rows: int, title: str, names: Sequence[str]) -> Axes:
    """Places titled axes with named rows at the top of a half; few names get rows of twice the height."""
    half.suptitle(title, x=0.01, ha="left")
    used = min(2 * len(names), rows)
    heights = [used, rows - used] if used < rows else [rows]
    axes = half.add_subplot(half.add_gridspec(len(heights), 1, height_ratios=heights)[0])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    return axes


def _add_legend(axes: Axes, handles: Sequence[Artist | BarContainer], labels: Sequence[str]) -> None:
    """Writes the legend above the axes, where no bar or mark can reach it."""
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderpad=0,
                borderaxespad=0.4, columnspacing=1.2, handletextpad=0.5, handlelength=1.0)  # fmt: skip


def _write_column(axes: Axes, offset: float, header: str, values: Sequence[str]) -> None:
    """Writes numbers right of the axes, ending ``offset`` points from them, where no bar or mark can reach them."""
    place = axes.get_yaxis_transform()
    for row, value in enumerate(values):
        axes.annotate(value, (1, row), (offset, 0), place, "offset points", ha="right", va="center")
    axes.annotate(header, (1, 1), (offset, 4), "axes fraction", "offset points", ha="right", va="bottom")
