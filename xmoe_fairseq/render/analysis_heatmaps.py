"""The figures of experts by language, of languages by languages, and of experts by experts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from ..analysis.languages import LanguageLoad
from ..analysis.tables import Table
from .style import DIVERGING, GREY, PALE, SEQUENTIAL, WIDTH_INCHES, visible

_LEGIBLE_CELLS = 12  # up to so many languages, cells have their numbers


def experts_by_language(load: LanguageLoad) -> Figure:
    """Which experts each language uses: languages that share experts are neighbours.

    A cell is 1, and white, if the language gives the expert an equal share of the layer's computations.
    """
    rows, columns = load.load.shape
    inches = _row_inches(rows)
    figure = Figure(figsize=(WIDTH_INCHES, 1.3 + rows * inches), layout="constrained")
    tree, axes = figure.subplots(1, 2, width_ratios=[1, 7])
    _draw_tree(tree, load)
    shades = _around_one(load.load)
    axes.imshow(_logs(load.load), cmap=shades.cmap, norm=shades.norm, aspect="auto", interpolation="nearest")
    _label_rows(axes, load, inches)
    layers = [layer for layer, _ in load.experts]
    starts = [layers.index(layer) for layer in dict.fromkeys(layers)]
    for start, end in zip(starts, [*starts[1:], columns], strict=True):
        axes.annotate(layers[start], ((start + end - 1) / 2, 1), (0, 3), axes.get_xaxis_transform(), "offset points",
                      ha="center", va="bottom")  # fmt: skip
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1)
    few = columns <= 40
    axes.set_xticks(range(columns) if few else [], [str(number) for _, number in load.experts] if few else [])
    axes.set_xlabel(f"experts of each layer of the {load.stack}, those of the same languages together")
    bar = figure.colorbar(shades, ax=axes, label="load, in equal shares", pad=0.01, fraction=0.04, aspect=30,
                          extend="both")  # fmt: skip
    _write_powers(bar)
    return figure


def language_similarity(load: LanguageLoad) -> Figure:
    """How much of their experts' computations each two languages have in common, ordered as in the other figure."""
    rows = len(load.languages)
    inches = _row_inches(rows)
    side = rows * inches
    figure = Figure(figsize=(max(side + 2.4, 4.0), max(side, 1.6) + 1.0), layout="constrained")
    tree, axes = figure.subplots(1, 2, width_ratios=[1, 6])
    _draw_tree(tree, load)
    apart = np.where(np.eye(rows, dtype=bool), np.nan, load.similarity)  # a language with itself has no colour
    axes.set_facecolor(PALE)
    image = axes.imshow(apart, cmap=SEQUENTIAL, aspect="auto", interpolation="nearest")
    _label_rows(axes, load, inches)
    axes.set_xticks(range(rows), [visible(name) for name in load.languages], rotation=90, fontsize=_font(inches))
    if rows <= _LEGIBLE_CELLS:
        for i, j in zip(*np.nonzero(~np.isnan(apart)), strict=True):
            axes.text(j, i, f"{apart[i, j]:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if image.norm(apart[i, j]) < 0.5 else "black")  # fmt: skip
    figure.suptitle(f"{load.stack}: computations in common", fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=30)
    return figure


def _around_one(values: np.ndarray) -> ScalarMappable:
    """Shades of ratios, by their log2: white for 1; from 1/2 to 2, so that noise looks weak, up to 1/8 to 8."""
    logs = np.abs(np.log2(values[values > 0]))
    bound = float(np.clip(np.quantile(logs, 0.99), 1, 3)) if logs.size else 1.0
    return ScalarMappable(Normalize(-bound, bound), DIVERGING)


def _logs(ratios: np.ndarray) -> np.ndarray:
    """The log2 of ratios, 0 having the colour of the smallest."""
    return np.log2(np.maximum(ratios, 1e-9))


def _write_powers(bar: Any) -> None:
    """Writes ratios beside a bar of their log2."""
    last = math.floor(bar.vmax)
    ticks = range(-last, last + 1)
    bar.set_ticks(list(ticks), labels=[f"{2**tick}" if tick >= 0 else f"1/{2**-tick}" for tick in ticks])


def _row_inches(rows: int) -> float:
    return max(0.105, min(0.3, 5.0 / rows))


def _font(inches: float) -> float:
    return min(8.0, 72 * inches * 0.86)


def _label_rows(axes: Axes, load: LanguageLoad, inches: float) -> None:
    axes.set_yticks(range(len(load.languages)), [visible(name) for name in load.languages], fontsize=_font(inches))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_tree(axes: Axes, load: LanguageLoad) -> None:
    """Draws the clustering; rows of the heat map are 0, 1, ..., leaves of SciPy's tree 5, 15, ..."""
    axes.axis("off")
    if load.links is None:
        return
    drawn = dendrogram(load.links, no_plot=True)
    for height, place in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        axes.plot(height, (np.array(place) - 5) / 10, color=GREY, linewidth=0.7)
    axes.set_ylim(len(load.languages) - 0.5, -0.5)
    axes.set_xlim((max(map(max, drawn["dcoord"])) or 1) * 1.03, 0)


def coselection(table: Table) -> Figure:
    """Which experts are taken together: lift, 1 and white if choices are independent.

    Args:
        table: of `tables.together`.
    """
    names = list(dict.fromkeys(table.column("layer")))
    across = min(len(names), 3)
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 2.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    lifts = [_lift(table.where(layer=name)) for name in names]
    shades = _around_one(np.concatenate([lift.flatten() for lift in lifts]))
    for axes, name, lift in zip(panels, names, lifts, strict=False):
        axes.set_facecolor(PALE)
        axes.imshow(_logs(lift), cmap=shades.cmap, norm=shades.norm, interpolation="nearest")
        axes.set_title(name)
        axes.tick_params(length=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in panels[len(names) :]:
        axes.axis("off")
    _write_powers(figure.colorbar(shades, ax=panels, label="taken together (lift)", shrink=0.8, extend="both"))
    return figure


def _lift(table: Table) -> np.ndarray:
    """(E, E); not a number on the diagonal and if an expert was never taken."""
    size = max(table.column("other"), default=0) + 1
    lift = np.full((size, size), np.nan)
    for row in table.records():
        if row["lift"] is not None:
            lift[row["expert"], row["other"]] = lift[row["other"], row["expert"]] = row["lift"]
    return lift
