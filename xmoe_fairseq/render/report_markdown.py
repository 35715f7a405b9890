"""The report as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..evaluation.score import sacrebleu_command
from ..metrics.corpus import METRICS
from ..results.report import Report, Sample, arrow, duration
from .perplexity_tables import how_measured, table
from .tables import block, code, markdown, plain


def render_page(report: Report, picture: str) -> str:
    """Renders the page, which shows ``picture`` by its path relative to the page."""
    drawn = "expert usage" if report.perplexity else "BLEU and expert usage"
    sections = [
        [f"# {plain(report.name)}", _summary(report), f"![{drawn}]({picture})"],
        _translation(report),
        _perplexity(report),
        _experts(report),
        _samples(report.samples()),
        _run(report),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def _summary(report: Report) -> str:
    text = _quality(report)
    if report.computation_saved is None:
        return f"{text} The model is dense: it has no MoE layers."
    return (
        f"{text} **{report.computation_saved:.0%} of the MoE computation saved** against giving every token to"
        " every expert."
    )


def _quality(report: Report) -> str:
    if report.perplexity:
        point = report.perplexity.points[0]
        return (
            f"**Perplexity {point.perplexity:.2f}** per token, {point.word_perplexity:.2f} per word, on"
            f" {point.tokens:,} test tokens."
        )
    if not report.directions:
        return "Nothing was translated."
    sentences = sum(direction.score.sentences for direction in report.directions)
    return (
        f"**{report.mean_bleu:.1f} BLEU** and **{report.mean_chrf:.1f} chrF++** on average over"
        f" {len(report.directions)} directions, {sentences:,} test sentences."
    )


def _perplexity(report: Report) -> list[str]:
    if report.perplexity is None:
        return []
    return ["## Perplexity", markdown(*table(report.perplexity)), plain(how_measured(report.perplexity))]


def _translation(report: Report) -> list[str]:
    if not report.directions:
        return []
    rows = [
        (plain(direction.name), f"{direction.score.sentences:,}",
         f"{direction.score.bleu:.1f}", f"{direction.score.chrf:.1f}")
        for direction in report.directions
    ]  # fmt: skip
    rows.append(("**mean**", "", f"**{report.mean_bleu:.1f}**", f"**{report.mean_chrf:.1f}**"))
    first = report.directions[0]
    command = sacrebleu_command(first.reference_file, first.hypothesis_file, first.score.tokenizer)
    return [
        "## Translation",
        _table(("direction", "sentences", "BLEU", "chrF++"), rows),
        "sacreBLEU, detokenised hypotheses against the raw references. Signatures:",
        "\n".join(_signatures(report)),
        "The first row again, from the command line:",
        block(command, "bash"),
    ]


def _signatures(report: Report) -> list[str]:
    """One line for each signature, with its directions if there are several of one metric."""
    lines = []
    for metric, names, signature in report.scores.signatures() if report.scores else []:
        where = f" ({plain(', '.join(names))})" if names else ""
        lines.append(f"- {METRICS[metric]}{where}: {code(signature)}")
    return lines


def _experts(report: Report) -> list[str]:
    if not report.layers:
        return ["## Experts", "No MoE layers: every token passes through the same feed-forward networks."]
    rows = [
        (f"`{use.layer}`", str(use.experts), f"{use.mean_experts:.2f}", f"{use.requested_capacity:.2f}",
         f"{use.computation_saved:.1%}", f"{use.first_dropped / use.passes:.1%}",
         f"{max(use.first_choices) / use.passes:.1%}")
        for use in report.layers
    ]  # fmt: skip
    rows.append(("**all**", "", "", "", f"**{report.computation_saved:.1%}**", "", ""))
    header = (
        *("layer", "experts", "experts per token", "strata per token (RC)"),
        *("computation saved", "first choice dropped", "busiest expert"),
    )
    inputs = "" if report.perplexity else " with the references as decoder inputs"
    return [
        "## Experts",
        f"Measured on the test set{inputs}. *Busiest expert* is the largest share of"
        " tokens that have one expert as their first choice. *RC* is the requested capacity, 1 without strata.",
        _table(header, rows),
    ]


def _samples(samples: Sequence[Sample]) -> list[str]:
    blocks = ["## Samples"] if samples else []
    for sample in samples:
        header = (_arrow(sample.source_language, sample.target_language), f"sentence {sample.sentence}")
        rows = (
            ("source", _text(sample.source)),
            ("reference", _text(sample.reference)),
            ("translation", _text(sample.hypothesis)),
        )
        blocks.append(_table(header, rows, right=False))
    return blocks


def _run(report: Report) -> list[str]:
    blocks = ["## Run"]
    if report.seconds:
        rows = [(plain(stage), duration(seconds)) for stage, seconds in report.seconds.items()]
        blocks.append(_table(("stage", "wall-clock time"), rows))
    blocks.append(", ".join(f"{plain(name)} {plain(version)}" for name, version in report.versions.items()))
    return blocks


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> str:
    """Sets a table whose first column is aligned left, and the others right unless told otherwise."""
    rule = ["---"] + ["---:" if right else "---"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _arrow(source: str, target: str) -> str:
    return plain(arrow(source, target))


def _text(sentence: str) -> str:
    """One line of a data file; what Markdown takes for a line break becomes a space."""
    return plain(" ".join(sentence.split())) or "*(empty)*"
