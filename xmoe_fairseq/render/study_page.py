"""A study's page and table: every row with its spread over the seeds, every claim with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..study.claims import Tested
from ..study.results import RowResults, Spread
from .tables import NONE, Marked, markdown, number, short, tsv


@dataclass(frozen=True)
class StudyResults:
    """Everything that is written.

    Attributes:
        rows: those of which at least one seed is finished.
        claims: those of which both sides are.
        speed: by row, training and decoding speed as a ratio to the dense row, as ``benchmarks/study_speed.py`` wrote
            it; empty if it was not measured.
    """

    rows: Sequence[RowResults]
    claims: Sequence[Tested]
    speed: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Returns plain values: ``rows`` and ``claims``."""
        rows = [row.as_json() | {"speed": self.speed.get(row.row.name)} for row in self.rows]
        return {"rows": rows, "claims": [claim.as_json() for claim in self.claims]}


def render_markdown(results: StudyResults) -> str:
    """Writes the page."""
    first = results.rows[0].results[0]
    settings, trained = first.settings, first.trained
    machines = sorted({one.machine for row in results.rows for one in row.results})
    parts = [
        "# Results of the study",
        "Written by `scripts/study.sh`. Mean ± standard deviation over the seeds; one seed has none.",
        "## Quality",
        markdown(*_quality(results)),
        f"BLEU and chrF++ are means over the directions ({trained.sentences:,} test sentences in all, beam "
        f"{settings['beam']}); perplexity is that of the development set after {settings['updates']:,} updates. "
        "*Plateau* is the relative fall of the validation loss over the last fifth of the updates.",
        "\n".join(f"- `{signature}`" for signature in trained.signatures.values()),
        "## Cost",
        markdown(*_cost(results)),
        "FLOPs of a token's forward pass as `xmoe info` counts them, with the experts that tokens took on the test "
        "set. *Strata* are those that a token passes. Speed is a ratio to the dense row, measured by turns.",
        "## Claims",
        _claims(results.claims) if results.claims else "No claim has both of its sides yet.",
        "![Validation loss by updates](curves.png)",
        "![BLEU against FLOPs in experts](quality.png)",
        "![Experts per token by updates](experts.png)",
        "## Rows",
        "\n".join(f"- **{row.row.name}**: {row.row.why}" for row in results.rows),
        f"Machine{'s' * (len(machines) > 1)}: {', '.join(machines)}. Training took "
        f"{sum(one.seconds for row in results.rows for one in row.results) / 3600:.1f} hours in all.",
    ]
    return "\n\n".join(parts) + "\n"


def render_tsv(results: StudyResults) -> str:
    """Writes a line for each row, with means and standard deviations in columns of their own."""
    names = ("bleu", "bleu_en_xx", "bleu_xx_en", "chrf", "valid_ppl", "plateau", "flops", "moe_flops")
    header = ["name", "seeds", "updates", "parameters"]
    header += [f"{name}_{kind}" for name in names for kind in ("mean", "sd")]
    lines = []
    for row in results.rows:
        values = row.as_json()
        line = [row.row.name, str(len(row.seeds)), str(values["updates"]), str(values["parameters"])]
        for name in names:
            spread = values[name] or {"mean": None, "sd": None}
            line += [NONE if spread[kind] is None else f"{spread[kind]:.6g}" for kind in ("mean", "sd")]
        lines.append(line)
    return tsv(header, lines)


def _quality(results: StudyResults) -> tuple[list[str], list[list[str]]]:
    header = ["model", "seeds", "BLEU", "en → xx", "xx → en", "chrF++", "en → xx", "xx → en", "perplexity", "plateau"]
    lines = []
    for row in results.rows:
        scores = [
            _shown(row.score(metric, directions))
            for metric in ("bleu", "chrf")
            for directions in ("all", row.out_of, row.into)
        ]
        perplexity = row.spread(lambda result: result.valid["ppl"][-1])
        plateau = row.spread(lambda result: result.plateau)
        fall = NONE if plateau is None else f"{plateau['mean']:.1%}"
        lines.append([row.row.name, str(len(row.seeds)), *scores, _shown(perplexity), fall])
    return header, lines


def _cost(results: StudyResults) -> tuple[list[str], list[list[str]]]:
    header = ["model", "parameters", "active", "FLOPs", "MoE FLOPs", "experts, encoder", "decoder"]
    header += ["strata, encoder", "decoder", "training speed", "decoding speed"]
    lines = []
    for row in results.rows:
        costs = [_large(row.cost(name)) for name in ("active_parameters", "flops", "moe_flops")]
        experts = [_shown(row.experts(stack)) for stack in ("encoder", "decoder")]
        # Outside of stratified layers every token passes one.
        passed = [row.strata(stack) for stack in ("encoder", "decoder")]
        strata = [_shown(one if one is not None and one["mean"] != 1 else None) for one in passed]
        speed = results.speed.get(row.row.name, {})
        parameters = short(row.results[0].trained.model.parameters)
        lines.append(
            [row.row.name, parameters, *costs, *experts, *strata]
            + [number(speed.get(program), 2) for program in ("training", "decoding")]
        )
    return header, lines


def _claims(claims: Sequence[Tested]) -> str:
    header = ["claim", "difference in BLEU", "95% interval", "p", "MoE FLOPs", "seeds", "verdict"]
    lines = [
        [
            f"{one.claim.claim} ({one.claim.source})",
            f"{one.difference:+.2f}",
            f"{one.low:+.2f} to {one.high:+.2f}",
            f"{one.p:.3f}",
            NONE if one.moe_flops is None else f"{one.moe_flops:.2f} of the baseline's",
            f"{one.seeds[0]} and {one.seeds[1]}",
            Marked(f"**{one.verdict}**"),
        ]
        for one in claims
    ]
    return "\n\n".join(
        (
            markdown(header, lines),
            "The interval is a bootstrap over seeds and sentences. *Seen*: all of it is above 0, or above minus the "
            "margin of BLEU that the claim allows to lose; *not seen*: all of it is below; *undecided*: neither, or a "
            "side has one seed only, which says nothing of the spread over seeds.",
        )
    )


def _shown(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return NONE
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd}"


def _large(spread: Spread | None) -> str:
    return NONE if spread is None or not spread["mean"] else short(spread["mean"])
