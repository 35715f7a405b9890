"""The report as one HTML page that holds all it needs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..evaluation.score import sacrebleu_command
from ..metrics.corpus import METRICS
from ..results.report import Report, Sample, Token, duration
from ..results.usage import LayerUsage
from ..subword import FAIRSEQ_SYMBOL, META_SPACE
from . import perplexity_tables, report_curves
from .score_tables import averages, directions

_SPECIAL = re.compile(rf"{FAIRSEQ_SYMBOL.pattern}|<unk>|<0x[0-9A-F]{{2}}>")


@dataclass(frozen=True)
class Choice:
    """What tokens can be shaded by: one layer, or the mean over a stack's layers; and the least and greatest value."""

    label: str
    low: float
    high: float


@dataclass(frozen=True)
class Shade:
    """A token as it is shown.

    Attributes:
        text: of the piece, without its space; a piece that is a space alone keeps it.
        space: whether a space comes before it.
        special: whether it is no text but one of fairseq's symbols, or a byte.
        experts: in each layer of the stack.
        share: of the way from the least to the greatest mean over the layers, 0 to 1.
    """

    text: str
    space: bool
    special: bool
    experts: Sequence[int]
    share: float


@dataclass(frozen=True)
class ShownSample:
    """A sample with its tokens; they are empty for a dense model, and if the sentence is too long."""

    sample: Sample
    encoder: Sequence[Shade]
    decoder: Sequence[Shade]


def render_html(report: Report) -> str:
    """Renders the page. All text that comes from files is escaped by jinja2."""
    environment = Environment(
        loader=PackageLoader("xmoe_fairseq.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": report_curves.number}
    return environment.get_template("page.html").render(_context(report)) + "\n"


def _context(report: Report) -> dict[str, Any]:
    first = report.directions[0] if report.directions else None
    choices = {stack: _choices(report, stack) for stack in ("encoder", "decoder")}
    return {
        "report": report,
        "summary": report.settings.summary,
        "figures": report_curves.draw(report.training) if report.training else [],
        "chart": report_curves,
        "averages": averages(report.scores) if report.scores else None,
        "directions": directions(report.scores) if report.scores else None,
        "perplexity": perplexity_tables.table(report.perplexity) if report.perplexity else None,
        "how_measured": perplexity_tables.how_measured(report.perplexity) if report.perplexity else None,
        "metrics": METRICS,
        "command": sacrebleu_command(first.reference_file, first.hypothesis_file, first.score.tokenizer)
        if first
        else None,
        "layers": [(use, _bars(use)) for use in report.layers],
        "stratified": any(use.passes != use.tokens for use in report.layers),
        "dropped": any(use.first_dropped for use in report.layers),
        "choices": choices,
        "samples": _by_direction(_shown(report, choices)),
    }


def _bars(use: LayerUsage) -> list[float]:
    """Each expert's share of the busiest one's load."""
    return [load / (max(use.expert_load) or 1) for load in use.expert_load]


def _tokens(report: Report, stack: str) -> Iterator[Token]:
    return (token for traced in report.traced for token in getattr(traced, stack))


def _choices(report: Report, stack: str) -> list[Choice]:
    """Lists what a stack's tokens can be shaded by, the mean first; empty if it has no MoE layers."""
    names = [use.layer for use in report.layers if use.layer.startswith(stack)]
    counts = [token.experts for token in _tokens(report, stack)]
    if not names or not counts:
        return []
    columns = {f"mean of the {stack}'s layers": [fmean(experts) for experts in counts]}
    columns |= {name: [experts[number] for experts in counts] for number, name in enumerate(names)}
    if len(names) == 1:
        columns = {names[0]: columns[names[0]]}
    return [Choice(label, min(values), max(values)) for label, values in columns.items()]


def _shown(report: Report, choices: dict[str, list[Choice]]) -> Iterable[ShownSample]:
    """Returns the samples that were traced; those without their tokens if none was."""
    if not report.traced:
        return [ShownSample(sample, [], []) for sample in report.samples()]
    return [
        ShownSample(
            traced.sample,
            *([_shade(token, choices[stack]) for token in getattr(traced, stack)] for stack in ("encoder", "decoder")),
        )
        for traced in report.traced
    ]


def _shade(token: Token, choices: Sequence[Choice]) -> Shade:
    space = token.piece.startswith(META_SPACE) and token.piece != META_SPACE
    share = 0.0
    if choices and choices[0].high > choices[0].low:
        share = (fmean(token.experts) - choices[0].low) / (choices[0].high - choices[0].low)
    return Shade(
        text=token.piece.replace(META_SPACE, " ").strip() or " ",
        space=space,
        special=_SPECIAL.fullmatch(token.piece) is not None,
        experts=token.experts,
        share=share,
    )


def _by_direction(samples: Iterable[ShownSample]) -> dict[tuple[str, str], list[ShownSample]]:
    groups: dict[tuple[str, str], list[ShownSample]] = defaultdict(list)
    for shown in samples:
        groups[shown.sample.source_language, shown.sample.target_language].append(shown)
    return dict(groups)
