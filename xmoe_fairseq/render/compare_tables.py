"""A comparison as tables in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import printable
from ..evaluation.compare import Comparison, MetricComparison, Result, untrained
from ..metrics.corpus import METRICS
from ..results.direction_sets import ZERO_SHOT
from .tables import NONE, code, latex, markdown, number, plain, short

Table = tuple[list[str], list[list[str]]]


def render_markdown(comparison: Comparison) -> str:
    """Writes a table of the systems, and one a metric with all directions."""
    blocks = ["# Comparison", markdown(*summary_table(comparison))]
    for name, one in comparison.metrics.items():
        blocks += [f"## {METRICS[name]}", markdown(*metric_table(comparison, one)), *_signature(comparison, name)]
    return "\n\n".join([*blocks, *notes(comparison, plain)]) + "\n"


def render_latex(comparison: Comparison) -> str:
    """Writes the same tables for the package booktabs, the notes as comments."""
    blocks = [latex(*summary_table(comparison))]
    for name, one in comparison.metrics.items():
        blocks += [f"% {METRICS[name]}", latex(*metric_table(comparison, one))]
        blocks += [f"% {line}" for line in _signature(comparison, name)]
    return "\n".join([*blocks, *(f"% {note}" for note in notes(comparison, printable))]) + "\n"


def summary_table(comparison: Comparison) -> Table:
    """Lays out what each system costs and its means over all directions."""
    header = ["system", "parameters", "active", "FLOPs per token", "experts per token", "words/s"]
    for name in comparison.metrics:
        header += [METRICS[name], "±", "Δ", "p", "wins"]
    rows = []
    for index, system in enumerate(comparison.systems):
        size = system.scores.model
        row = [
            system.name,
            short(size.parameters if size else None),
            short(size.active_parameters if size else None),
            short(size.flops if size else None),
            number(size.experts_per_token if size and size.experts_per_token else None, 2),
            number(system.scores.words_per_second, 0),
        ]
        for one in comparison.metrics.values():
            overall = next(iter(one.means))
            result = one.means[overall][index]
            row += [number(result.score, 2), number(result.interval, 2), *_difference(result)]
            row.append(f"{one.win_ratio[overall][index]:.0%}" if index else NONE)
        rows.append(row)
    return header, rows


def metric_table(comparison: Comparison, one: MetricComparison) -> Table:
    """Lays out the directions, then their means, and all sentences as one text."""
    names = [system.name for system in comparison.systems]
    header = ["direction", names[0], *(cell for name in names[1:] for cell in (name, "Δ", "p"))]
    marks: dict[str, str] = {pair: f" ({ZERO_SHOT})" for pair in untrained(comparison.systems)}
    rows = [[f"{pair}{marks.get(pair, '')}", *_cells(results)] for pair, results in one.directions.items()]
    rows += [[f"mean of {group}", *_cells(results)] for group, results in one.means.items()]
    rows.append(["all sentences as one", *_cells(one.all_sentences)])
    for group, ratios in one.win_ratio.items():
        rows.append(
            [f"wins of {group}", NONE, *(cell for ratio in ratios[1:] for cell in (f"{ratio:.0%}", NONE, NONE))]
        )
    return header, rows


def notes(comparison: Comparison, write: Callable[[str], str]) -> list[str]:
    """Returns how to read the tables, and what is not comparable in them.

    Args:
        comparison: of the systems.
        write: escapes a name.
    """
    first = write(comparison.systems[0].name)
    lines = [
        f"Δ: from {first}; p: sacreBLEU's paired bootstrap, {comparison.samples:,} draws; ±: 95% interval of the mean; "
        f"wins: share of the directions better than {first}; words/s: source words."
    ]
    devices = dict.fromkeys(str(system.scores.device) for system in comparison.systems)
    if len(devices) > 1:
        lines.append(f"The words/s were measured on several devices ({write(', '.join(devices))}): not comparable.")
    return lines


def _cells(results: Sequence[Result]) -> list[str]:
    cells = [number(results[0].score, 2)]
    for result in results[1:]:
        cells += [number(result.score, 2), *_difference(result)]
    return cells


def _difference(result: Result) -> list[str]:
    if result.difference is None or result.p is None:
        return [NONE, NONE]
    return [f"{result.difference:+.2f}", f"{result.p:.3f}"]


def _signature(comparison: Comparison, name: str) -> list[str]:
    found = {row.signatures[name] for row in comparison.systems[0].scores.rows}
    return [f"Signature: {' and '.join(map(code, sorted(found)))}"]


RENDERERS: dict[str, Callable[[Comparison], str]] = {"markdown": render_markdown, "latex": render_latex}
