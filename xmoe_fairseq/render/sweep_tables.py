"""A sweep as tables."""

from __future__ import annotations

import math

from ..metrics.corpus import METRICS
from ..results.sweep import Sweep
from .tables import NONE, code, markdown, number, percent, plain, short, tsv


def render_markdown(sweep: Sweep) -> str:
    """Writes the table and the choice."""
    chosen, front = sweep.chosen, sweep.fronts()["moe_flops"]
    affordable = [point for point in sweep.points if point.moe_flops <= (sweep.max_moe_flops or math.inf)]
    best = max(affordable, key=lambda point: point.scores["bleu"])
    limit = f" of at most {short(sweep.max_moe_flops)} MoE FLOPs per token" if sweep.max_moe_flops else ""
    header, rows = _table(sweep)
    for row, point in zip(rows, sweep.points, strict=True):
        row.append("yes" if point.threshold in front else NONE)
    return (
        "\n\n".join(
            (
                f"# {plain(sweep.name)} by {sweep.dial}",
                markdown([*header, "Pareto front"], rows),
                f"{sweep.dial.title()} **{chosen.threshold:g}** is the {sweep.sparsest} that loses no more than "
                f"{sweep.lose:g} BLEU against the best{limit} ({best.scores['bleu']:.2f} at {best.threshold:g}): "
                f"{chosen.scores['bleu']:.2f} BLEU "
                f"with {chosen.computation_saved:.0%} of the MoE computation saved.",
                f"Means of {sweep.directions} directions, {sweep.sentences:,} sentences; FLOPs per token with the "
                f"experts that tokens took, references as decoder inputs; source words/s on {plain(sweep.device)}."
                + _left_out(sweep),
                "\n".join(
                    f"- {METRICS[name]}: {', '.join(map(code, signatures))}"
                    for name, signatures in sweep.signatures.items()
                ),
            )
        )
        + "\n"
    )


def _left_out(sweep: Sweep) -> str:
    return f" In no mean of scores, since not trained: {', '.join(sweep.zero_shot)}." if sweep.zero_shot else ""


def render_tsv(sweep: Sweep) -> str:
    """Writes a line a threshold."""
    return tsv(*_table(sweep, exact=True))


def _table(sweep: Sweep, exact: bool = False) -> tuple[list[str], list[list[str]]]:
    metrics = list(sweep.points[0].scores)
    header = [sweep.dial, *(METRICS[name] for name in metrics), "experts per token", "MoE FLOPs saved"]
    header += ["MoE FLOPs per token", "FLOPs per token", "words/s"]
    rows = []
    for point in sweep.points:
        scores = [number(point.scores[name], 4 if exact else 2) for name in metrics]
        flops = [str(round(one)) if exact else short(one) for one in (point.moe_flops, point.flops)]
        experts = number(point.experts_per_token, 4 if exact else 2)
        saved = f"{point.computation_saved:.4f}" if exact else percent(point.computation_saved)
        rows.append([f"{point.threshold:g}", *scores, experts, saved, *flops, f"{point.words_per_second:.1f}"])
    return header, rows
