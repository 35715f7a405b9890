"""The scores of a system as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..metrics.corpus import METRICS
from ..results.direction_sets import ZERO_SHOT
from ..results.scores import DirectionScore, SystemScores
from .tables import NONE, code, markdown, number, percent, plain, short, tsv


def render_markdown(scores: SystemScores) -> str:
    """Writes averages, directions, what the model costs, and the signatures."""
    blocks = [
        f"# {plain(scores.name)}",
        markdown(*averages(scores)),
        markdown(*directions(scores)),
        "Signatures of sacreBLEU:",
        "\n".join(_signatures(scores)),
        *_model(scores),
    ]
    return "\n\n".join(blocks) + "\n"


def render_tsv(scores: SystemScores) -> str:
    """Writes a line per direction."""
    return tsv(*directions(scores, digits=4, short_names=False))


# What `xmoe score` writes beside ``scores.json``, by the name of the file.
PAGES: Mapping[str, Callable[[SystemScores], str]] = {"scores.md": render_markdown, "scores.tsv": render_tsv}


def averages(scores: SystemScores) -> tuple[list[str], list[list[str]]]:
    """Lays out the means over sets of directions: the names of the columns, and the cells."""
    header = ["mean of", "directions", *(METRICS[name] for name in scores.metrics), "length ratio"]
    rows = [
        [one.name, str(one.directions), *_values(one.scores), number(one.length_ratio, 3)] for one in scores.averages
    ]
    return header, rows


def _values(scores: Mapping[str, float]) -> list[str]:
    return [number(value, 2) for value in scores.values()]


def directions(scores: SystemScores, digits: int = 2, short_names: bool = True) -> tuple[list[str], list[list[str]]]:
    """Lays out the directions; columns that nothing is known of are left out."""
    columns: list[tuple[str, Callable[[DirectionScore], str]]] = [
        ("direction", lambda row: row.name),
        ("group", lambda row: row.group),
        (ZERO_SHOT, lambda row: "yes" if row.zero_shot else NONE),
        ("sentences", lambda row: str(row.sentences)),
        *((METRICS[name], lambda row, name=name: number(row.scores[name], digits)) for name in scores.metrics),
        ("length ratio", lambda row: number(row.length_ratio, digits + 1)),
        ("empty", lambda row: str(row.empty)),
        ("copies", lambda row: str(row.copies)),
    ]
    if any(row.too_long for row in scores.rows):
        columns.append(("too long", lambda row: NONE if row.too_long is None else str(row.too_long)))
    if scores.detector is not None:
        columns.append(("wrong language", lambda row: percent(row.wrong_language)))
        columns.append(("(references)", lambda row: percent(row.wrong_references)))
    if any(row.seconds for row in scores.rows):
        columns.append(("words/s", lambda row: number(row.source_words / row.seconds if row.seconds else None, 0)))
    if any(row.experts_per_token for row in scores.rows):
        columns.append(("experts per token", lambda row: number(row.experts_per_token, digits)))
    if not any(row.zero_shot for row in scores.rows):
        del columns[2]
    if short_names and len({row.group for row in scores.rows}) == 1:
        del columns[1]
    header = [name for name, _ in columns]
    return header, [[write(row) for _, write in columns] for row in scores.rows]


def _signatures(scores: SystemScores) -> list[str]:
    return [
        f"- {METRICS[name]}{f' ({joined})' if (joined := ', '.join(pairs)) else ''}: {code(signature)}"
        for name, pairs, signature in scores.signatures()
    ]


def _model(scores: SystemScores) -> list[str]:
    facts = []
    if scores.model is not None:
        size = scores.model
        facts.append(f"{short(size.parameters)} parameters, {short(size.active_parameters)} of them active for a token")
        facts.append(f"{short(size.flops)} FLOPs per token, {short(size.moe_flops)} of them in experts")
        if size.computation_saved is not None:
            facts.append(
                f"{size.experts_per_token:.2f} experts per token in an MoE layer, {size.computation_saved:.0%} of the "
                "MoE computation saved (measured with the references as decoder inputs)"
            )
    if scores.words_per_second is not None:
        facts.append(f"{scores.words_per_second:,.0f} source words/s ({plain(str(scores.device))})")
    return [f"{'; '.join(facts)}."] if facts else []
