"""Draws the ratios that the benchmarks wrote with ``--json`` as one picture.

python benchmarks/figure.py layer.json training.json decoding.json --out docs/performance.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rows import Row, output_file

from xmoe_fairseq.common.outputs import replacing
from xmoe_fairseq.render.style import DOTS_PER_INCH, GREY, drawing, grid_rows

# Panels by the sign of the goals; rows without a goal are times.
TITLES = {
    "<=": "Time or memory over the bound's: further left is better",
    ">=": "Speed over a peer's or the dense model's: further right is better",
}
COLOURS = {"yes": "#0072B2", "no": "#D55E00", "": GREY}
MARKS = {"yes": "o", "no": "D", "": "o"}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100)


def read(path: Path) -> list[Row]:
    """Reads the rows of a file.

    Raises:
        SystemExit: it is none that a benchmark wrote, or has no row.
    """
    try:
        rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is not what a benchmark writes with --json: {error}") from error
    if not rows:
        raise SystemExit(f"{path} is not what a benchmark writes with --json: it has no row")
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Draws a dot for each ratio, a line from quartile to quartile, and a bar where its goal is."""
    groups = {sign: [row for row in rows if (row.goal or "<=").startswith(sign)] for sign in TITLES}
    groups = {sign: members for sign, members in groups.items() if members}
    heights = [len(members) + 1 for members in groups.values()]
    figure = Figure(figsize=(10, 0.6 * len(groups) + 0.2 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (sign, members) in zip(panels, groups.items(), strict=True):
        axes.set_title(TITLES[sign], loc="left")
        _panel(axes, members)
    figure.supxlabel("line: between the quartiles; |: goal; orange diamond: goal missed; grey: no goal", fontsize=8)
    return figure


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_xscale("log")
    grid_rows(axes, len(rows))
    axes.axvline(1, color=GREY, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(rows)), [row.case for row in rows])
    for place, row in enumerate(rows):
        colour = COLOURS[row.met]
        axes.plot((row.low, row.high), (place, place), color=colour, linewidth=2)
        axes.plot(row.ratio, place, MARKS[row.met], color=colour, markersize=5)
        if row.goal:
            axes.plot(float(row.goal.split()[1]), place, "|", color="black", markersize=10, markeredgewidth=1.4)
        axes.annotate(f"{row.ratio:.2f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", color=colour)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def main() -> None:
    """Reads, draws and writes."""
    parser = argparse.ArgumentParser(description="one picture of what benchmarks wrote with --json")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by a benchmark")
    parser.add_argument("--out", type=output_file, required=True, help="picture to write, a PNG")
    args = parser.parse_args()
    rows = [row for path in args.files for row in read(path)]
    with drawing(row.case for row in rows), replacing(args.out) as temporary:
        draw(rows).savefig(temporary, format="png", dpi=DOTS_PER_INCH)


if __name__ == "__main__":
    main()
