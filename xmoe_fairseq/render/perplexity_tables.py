"""The perplexity of a language model as tables and as a picture."""

from __future__ import annotations

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..results.perplexity import Perplexity, PerplexitySweep
from .report_figure import STYLE
from .tables import NONE, markdown, number, percent, plain, short, tsv

_HEADER = (
    *("perplexity", "per word", "bits per token", "experts per token", "MoE FLOPs saved"),
    *("MoE FLOPs per token", "FLOPs per token", "tokens/s"),
)
_POINT = "#0072B2"


def render_markdown(found: PerplexitySweep) -> str:
    """Writes the table, and how it was measured."""
    front = found.front()
    header, rows = table(found)
    if len(rows) > 1:
        header.append("Pareto front")
        for row, point in zip(rows, found.points, strict=True):
            row.append("yes" if point.threshold in front else NONE)
    note = f"{plain(how_measured(found))} {found.points[0].size.parameters:,} parameters."
    return f"# {plain(found.name)}: perplexity\n\n{markdown(header, rows)}\n\n{note}\n"


def how_measured(found: PerplexitySweep) -> str:
    """Says in a sentence what was read, and how it was cut."""
    first, settings = found.points[0], found.settings
    return (
        f"Subset {settings['subset']}, {first.tokens:,} tokens and {first.words:,} words, ends of sentences "
        f"included; samples of at most {settings['tokens_per_sample']:,} tokens, cut by --sample-break-mode "
        f"{settings['sample_break_mode']}."
    )


def render_tsv(found: PerplexitySweep) -> str:
    """Writes a line per threshold."""
    return tsv(*table(found, exact=True))


def table(found: PerplexitySweep, exact: bool = False) -> tuple[list[str], list[list[str]]]:
    """Returns the header and a row per threshold, in plain cells."""
    return [found.dial, *_HEADER], [_row(point, exact) for point in found.points]


def _row(point: Perplexity, exact: bool) -> list[str]:
    size, digits = point.size, 6 if exact else 2
    flops = [str(round(one)) if exact else short(one) for one in (size.moe_flops, size.flops)]
    return [
        NONE if point.threshold is None else f"{point.threshold:g}",
        *(number(value, digits) for value in (point.perplexity, point.word_perplexity)),
        number(point.loss, 6 if exact else 4),
        number(size.experts_per_token, digits),
        percent(size.computation_saved),
        *flops,
        f"{point.tokens_per_second:.1f}",
    ]


def draw(found: PerplexitySweep) -> Figure:
    """Draws perplexity against the FLOPs of a token; each threshold is a labelled point."""
    points = sorted(found.points, key=lambda point: point.size.flops)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(4.5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([one.size.flops for one in points], [one.perplexity for one in points], "o-", color=_POINT)
        for one in points:
            if one.threshold is not None:
                place = (one.size.flops, one.perplexity)
                axes.annotate(f"{one.threshold:g}", place, (4, 5), textcoords="offset points", fontsize=7)
        axes.set_xlabel("FLOPs per token")
        axes.set_ylabel("perplexity per token")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.margins(0.1, 0.15)
    return figure
