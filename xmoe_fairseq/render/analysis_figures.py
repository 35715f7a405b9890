"""The figures of lines and dots, each drawn from the table of the same name and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter

from ..analysis.tables import Table
from .style import COLOURS, GREY, MARKS, PALE, WIDTH_INCHES, grid_rows, visible

# What capacity is called, by the column that holds it.
CAPACITY = {"experts": "experts per token", "passes": "strata per token (RC)"}
_ROWS = 48  # of languages, before another column begins
_ROW_INCHES = 0.155
_HALO = [withStroke(linewidth=2, foreground="white")]
_STEPS = [1, 2, 5, 10]  # between the ticks of an axis, times a power of ten


def directions(table: Table, value: str) -> Figure:
    """Capacity by direction: a row per direction, out of and into the common language apart.

    Args:
        table: of `tables.by_direction`; its rows of single layers are not drawn.
        value: the column of the capacity.
    """
    overall = table.where(layer="all")
    groups = _direction_groups(overall, value)
    columns = [(title, names[i : i + _ROWS]) for title, names in groups for i in range(0, len(names), _ROWS)]
    rows = max(len(names) for _, names in columns)
    figure = Figure(figsize=(max(WIDTH_INCHES, 1.9 * len(columns)), 1.3 + rows * _ROW_INCHES), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, squeeze=False)[0]
    for axes, (title, names) in zip(panels, columns, strict=True):
        grid_rows(axes, rows)
        axes.set_yticks(range(len(names)), [visible(label) for label, _ in names])
        axes.set_title(title)
        for stack in COLOURS:
            mean = overall.where(stack=stack).column(value)
            if not mean:
                continue
            of = dict(zip(overall.where(stack=stack).column("direction"), mean, strict=True))
            axes.axvline(float(np.mean(mean)), color=COLOURS[stack], linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
            axes.plot([of[name] for _, name in names], range(len(names)), MARKS[stack], color=COLOURS[stack],
                      markersize=4, label=stack, clip_on=False)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    figure.supxlabel(f"{CAPACITY[value]}; dashed: mean of the directions", fontsize=8)
    _legend(figure, overall)
    return figure


def _direction_groups(table: Table, value: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titles, each with labels and names of directions, those of most capacity first."""
    pairs = {row["direction"]: (row["source"], row["target"]) for row in table.records()}
    common = set.intersection(*(set(pair) for pair in pairs.values()))
    total = {name: sum(table.where(direction=name).column(value)) for name in pairs}
    if len(common) != 1 or len(pairs) == 1:
        return [("", [(" → ".join(pairs[name]), name) for name in sorted(pairs, key=lambda one: -total[one])])]
    (hub,) = common
    others = {name: source if target == hub else target for name, (source, target) in pairs.items()}
    rank = {other: sum(total[name] for name in pairs if others[name] == other) for other in others.values()}
    ordered = sorted(pairs, key=lambda name: (-rank[others[name]], others[name]))
    out = [(others[name], name) for name in ordered if pairs[name][0] == hub]
    into = [(others[name], name) for name in ordered if pairs[name][1] == hub]
    return [(title, names) for title, names in ((f"{hub} → …", out), (f"… → {hub}", into)) if names]


def layers(table: Table, value: str) -> Figure:
    """Capacity by layer: the mean of the directions, and a thin line per direction.

    Args:
        table: of `tables.by_direction`.
        value: the column of the capacity.
    """
    figure, panels = _by_stack(table)
    for axes, stack in panels:
        here = table.where(stack=stack)
        names = [name for name in dict.fromkeys(here.column("layer")) if name != "all"]
        places = [int(name.rpartition(".")[2]) for name in names]
        values = np.array([here.where(layer=name).column(value) for name in names])  # (layers, directions)
        tokens = np.array([here.where(layer=name).column("tokens") for name in names])
        faint = max(0.1, min(0.6, 12 / values.shape[1]))
        for one in values.T:
            axes.plot(places, one, color=GREY, linewidth=0.6, alpha=faint, marker="_", markersize=7, gid="direction")
        mean = ((values * tokens).sum(1) / tokens.sum(1)).tolist()
        axes.plot(places, mean, color=COLOURS[stack], marker=MARKS[stack], linewidth=1.8, markersize=6, gid="mean")
        for place, one in zip(places, mean, strict=True):
            axes.annotate(f"{one:.2f}", (place, one), (8, 0), textcoords="offset points", va="center", zorder=5,
                          path_effects=_HALO)  # fmt: skip
        axes.set_xticks(places)
        axes.margins(x=0.25 if len(places) > 1 else 0.5)
        axes.set_xlabel("layer")
        axes.grid(axis="y", color=PALE, linewidth=0.5)
    panels[0][0].set_ylabel(CAPACITY[value])
    handles = [
        Line2D([], [], color="black", marker="s", markersize=4, linewidth=1.8, label="mean of all tokens"),
        Line2D([], [], color=GREY, linewidth=0.8, label="one direction"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def distribution(table: Table) -> Figure:
    """How capacity is distributed in each layer: bars as wide as the share of tokens, and the mean.

    Args:
        table: of `tables.distribution`.
    """
    value = table.columns[2]
    figure, panels = _by_stack(table)
    most = max(number for number, share in zip(table.column(value), table.column("share"), strict=True) if share)
    for axes, stack in panels:
        here = table.where(stack=stack)
        names = list(dict.fromkeys(here.column("layer")))
        for place, name in enumerate(names):
            one = here.where(layer=name)
            numbers, shares = np.array(one.column(value)), np.array(one.column("share"))
            widths = 0.84 * shares / shares.max()
            axes.barh(numbers, widths, left=place - widths / 2, height=0.86, color=COLOURS[stack], alpha=0.55,
                      label=name)  # fmt: skip
            mean = float((numbers * shares).sum())
            axes.plot([place], [mean], "o", color="white", markeredgecolor="black", markersize=5, gid="mean")
            axes.annotate(f"{mean:.2f}", (place, mean), (6, 0), textcoords="offset points", va="center",
                          path_effects=_HALO)  # fmt: skip
        axes.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(0.4, most + 0.6)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
    panels[0][0].set_ylabel(CAPACITY[value])
    handles = [
        Patch(color=GREY, label="share of tokens (width)"),
        Line2D([], [], marker="o", color="white", markeredgecolor="black", markersize=5, linestyle="", label="mean"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def flops(table: Table) -> Figure:
    """FLOPs of each MoE layer for a token, beside those of all its experts and of a dense network in its place.

    Args:
        table: of `tables.by_layer`.
    """
    rows = table.records()
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    grid_rows(axes, len(rows))
    axes.set_yticks(range(len(rows)), [row["layer"] for row in rows])
    everything = [row["flops_of_all_experts"] / row["flops_dense"] for row in rows]
    taken = [row["flops"] / row["flops_dense"] for row in rows]
    axes.hlines(range(len(rows)), taken, everything, color=GREY, linewidth=1.2)
    axes.plot(everything, range(len(rows)), "o", color="white", markeredgecolor=GREY, markersize=6,
              label="all experts", clip_on=False)  # fmt: skip
    for stack in dict.fromkeys(row["stack"] for row in rows):
        places = [place for place, row in enumerate(rows) if row["stack"] == stack]
        axes.plot([taken[place] for place in places], places, MARKS[stack], color=COLOURS[stack], markersize=6,
                  label=f"taken, {stack}", clip_on=False)  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.9, linestyle=(0, (4, 3)), label="dense network")
    axes.set_xscale("log", base=2)
    low, high = math.log2(min(*taken, 1)), math.log2(max(*everything, 1))
    axes.set_xlim(2 ** (low - 0.3), 2 ** (high + 0.3))
    axes.set_xticks(ticks := [2.0**power for power in range(math.floor(low), math.ceil(high) + 1)])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(2 ** (low - 0.3), 2 ** (high + 0.3))
    axes.set_xlabel("FLOPs per token, in multiples of a dense feed-forward network")
    for offset, head, column in ((70, "saved against\nall experts", "saved_against_all"),
                                 (132, "saved against\ndense", "saved_against_dense")):  # fmt: skip
        place = axes.get_yaxis_transform()
        axes.annotate(head, (1, 1), (offset, 3), "axes fraction", "offset points", ha="right", va="bottom")
        for number, row in enumerate(rows):
            axes.annotate(_percent(row[column]), (1, number), (offset, 0), place, "offset points", ha="right",
                          va="center")  # fmt: skip
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _plain(number: float, _: float) -> str:
    return f"{number:,g}" if number < 1e5 else f"{number / 1000:,g}k"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%".replace("-", "−")


def frequency(ranks: Table, extreme: Table, value: str) -> Figure:
    """Capacity by frequency rank, and the ranks of the tokens of highest and of lowest capacity.

    Args:
        ranks: of `tokens.by_rank`.
        extreme: of `tokens.ranks_of_extremes`.
        value: the column of the capacity.
    """
    stacks = list(dict.fromkeys(ranks.column("stack")))
    figure = Figure(figsize=(WIDTH_INCHES if len(stacks) > 1 else 4.2, 3.6), layout="constrained")
    panels = figure.subplots(2, len(stacks), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1])
    for (upper, lower), stack in zip(panels.T, stacks, strict=True):
        here = ranks.where(stack=stack)
        middle = [math.sqrt(a * b) for a, b in zip(here.column("first"), here.column("last"), strict=True)]
        upper.fill_between(
            middle, here.column("q25"), here.column("q75"), color=COLOURS[stack], alpha=0.18, linewidth=0
        )
        upper.plot(middle, here.column(value), color=COLOURS[stack], marker=MARKS[stack], markersize=4, gid="mean")
        upper.set_xscale("log")
        upper.xaxis.set_major_formatter(_plain)
        upper.set_title(stack)
        upper.grid(color=PALE, linewidth=0.5)
        boxes = extreme.where(stack=stack).records()
        for place, box in enumerate(boxes):
            lower.plot([box["q05"], box["q95"]], [place] * 2, color=GREY, linewidth=1, zorder=1)
            lower.barh(place, box["q75"] - box["q25"], left=box["q25"], height=0.5, color=COLOURS[stack],
                       alpha=0.9 if box["capacity"] == "high" else 0.35)  # fmt: skip
            lower.plot([box["q50"]] * 2, [place - 0.25, place + 0.25], color="black", linewidth=1.4, gid="median")
        lower.set_yticks(range(len(boxes)), [f"{box['capacity']} ({box['types']} types)" for box in boxes])
        lower.set_ylim(len(boxes) - 0.4, -0.6)
        lower.set_xlabel("frequency rank of the token (1: most frequent)")
        lower.tick_params(axis="y", length=0)
    panels[0][0].set_ylabel(f"{CAPACITY[value]}\n(band: half of the types)")
    return figure


def positions(table: Table, value: str) -> Figure:
    """Capacity by the token's place in the sentence, a line per layer.

    Args:
        table: of `tables.by_position`.
        value: the column of the capacity.
    """
    figure, panels = _by_stack(table)
    for axes, stack in panels:
        names = [name for name in dict.fromkeys(table.where(stack=stack).column("layer")) if name != "all"]
        for number, name in enumerate(names):
            one = table.where(stack=stack, layer=name)
            shade = 1 - 0.65 * (len(names) - 1 - number) / max(len(names) - 1, 1)
            axes.plot(one.column("first"), one.column(value), color=COLOURS[stack], alpha=shade, linewidth=1.4,
                      marker=MARKS[stack], markersize=3.5, label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_plain)
        axes.set_xlabel("position in the sentence, from")
        axes.grid(color=PALE, linewidth=0.5)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel(CAPACITY[value])
    return figure


def extremes(table: Table, value: str) -> Figure:
    """The tokens that take most and least, with how often each occurs.

    Args:
        table: of `tokens.extremes`.
        value: the column of the capacity.
    """
    stacks = list(dict.fromkeys(table.column("stack")))
    parts = {stack: [table.where(stack=stack, end=end).records() for end in ("most", "least")] for stack in stacks}
    rows = max(sum(map(len, ends)) for ends in parts.values()) + 1
    width = WIDTH_INCHES if len(stacks) > 1 else 3.8
    figure = Figure(figsize=(width, 0.9 + 0.16 * rows), layout="constrained")
    panels = figure.subplots(1, len(stacks), sharex=True, squeeze=False)[0]
    for axes, stack in zip(panels, stacks, strict=True):
        most, least = parts[stack]
        records = [*most, None, *least]  # a gap between the ends
        grid_rows(axes, len(records))
        places = [place for place, row in enumerate(records) if row]
        shown: list[Any] = [row for row in records if row]
        values = [row[value] for row in shown]
        axes.hlines(places, min(table.column(value)), values, color=COLOURS[stack], linewidth=0.8, alpha=0.6)
        axes.plot(values, places, MARKS[stack], color=COLOURS[stack], markersize=4, clip_on=False)
        axes.set_yticks(places, [visible(row["token"]) for row in shown])
        for place, row in zip(places, shown, strict=True):
            axes.annotate(f"{row['tokens']:,}", (1, place), (30, 0), axes.get_yaxis_transform(), "offset points",
                          ha="right", va="center", color=GREY, fontsize=7)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.set_title(stack)
        axes.set_xlabel(CAPACITY[value])
    figure.legend(handles=[Line2D([], [], linestyle="", label="right: occurrences")], loc="outside upper right",
                  fontsize=7, labelcolor=GREY)  # fmt: skip
    return figure


def _by_stack(table: Table) -> tuple[Figure, Sequence[tuple[Axes, str]]]:
    """A panel for each stack, side by side on the same scale."""
    stacks = list(dict.fromkeys(table.column("stack")))
    figure = Figure(figsize=(WIDTH_INCHES if len(stacks) > 1 else 4.2, 2.8), layout="constrained")
    panels = figure.subplots(1, len(stacks), sharey=True, squeeze=False)[0]
    for axes, stack in zip(panels, stacks, strict=True):
        axes.set_title(stack)
    return figure, list(zip(panels, stacks, strict=True))


def _legend(figure: Figure, table: Table) -> None:
    handles = [
        Line2D([], [], color=COLOURS[stack], marker=MARKS[stack], linestyle="", markersize=5, label=stack)
        for stack in dict.fromkeys(table.column("stack"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
