"""Quality against computation of one model at many thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from ..errors import UserError
from ..render.tables import NONE, code, markdown, number, percent, plain, short, tsv
from ..results.scores import Scores
from .score import METRICS


@dataclass(frozen=True)
class Point:
    """The model at one threshold.

    Attributes:
        threshold: of its routers.
        scores: by metric, the mean of the directions.
        experts_per_token: in an MoE layer, measured.
        computation_saved: share of the pairs of a token and an expert that are not computed.
        moe_flops, flops: of a token's forward pass, in experts and in all, with the experts measured.
        words_per_second: source words by the time of the search.
    """

    threshold: float
    scores: Mapping[str, float]
    experts_per_token: float
    computation_saved: float
    moe_flops: float
    flops: float
    words_per_second: float


@dataclass(frozen=True)
class Sweep:
    """Everything that is written.

    Attributes:
        name: of the checkpoint.
        points: by rising threshold.
        lose: BLEU that may be lost against the best threshold.
        device: that the search ran on.
        sentences, directions: that each point was measured on.
        signatures: sacreBLEU's, by metric, each one once.
        max_moe_flops: most FLOPs of a token in experts that the chosen threshold may take; None for any.
        zero_shot: directions that were translated too, but not trained, and are in no mean of scores.
    """

    name: str
    points: Sequence[Point]
    lose: float
    device: str
    sentences: int
    directions: int
    signatures: Mapping[str, Sequence[str]]
    max_moe_flops: float | None = None
    zero_shot: Sequence[str] = ()

    @property
    def chosen(self) -> Point:
        """The point with the least threshold that loses no more than ``lose`` BLEU against the best.

        Raises:
            UserError: every threshold takes more than ``max_moe_flops``.
        """
        found = choose(self.points, self.lose, self.max_moe_flops)
        if found is None:
            least = min(point.moe_flops for point in self.points)
            raise UserError(
                f"no threshold takes at most {self.max_moe_flops:g} FLOPs per token in experts, the least is "
                f"{least:g}: sweep lower thresholds, or allow more"
            )
        return found

    def fronts(self) -> dict[str, list[float]]:
        """Gives the thresholds on the Pareto front of BLEU, by what is paid: FLOPs in experts, or time."""
        return {
            cost: [point.threshold for point in pareto(self.points, cost_of, lambda point: point.scores["bleu"])]
            for cost, cost_of in COSTS.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Gives plain values."""
        return asdict(self) | {"chosen": self.chosen.threshold, "pareto": self.fronts()}


# What is paid for quality; less is better.
COSTS: dict[str, Callable[[Point], float]] = {
    "moe_flops": lambda point: point.moe_flops,
    "time": lambda point: -point.words_per_second,
}


def choose(points: Sequence[Point], lose: float, max_moe_flops: float | None = None) -> Point | None:
    """Chooses the least threshold that loses no more than ``lose`` BLEU against the best one that can be afforded.

    Args:
        points: by rising threshold.
        lose: BLEU that may be lost.
        max_moe_flops: most FLOPs of a token in experts; None affords all.

    Returns:
        The point, or None where none can be afforded.
    """
    affordable = [point for point in points if max_moe_flops is None or point.moe_flops <= max_moe_flops]
    best = max((point.scores["bleu"] for point in affordable), default=0.0)
    return next((point for point in affordable if point.scores["bleu"] >= best - lose), None)


def pareto(points: Sequence[Point], cost: Callable[[Point], float], quality: Callable[[Point], float]) -> list[Point]:
    """Gives the points that no other one beats: none is as good and cheaper, or better and as cheap; by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), -quality(point))):
        if not front or quality(point) > quality(front[-1]):
            front.append(point)
    return front


# Of one sweep; each is a translation of all test sets.
MOST_THRESHOLDS = 1000


def read_thresholds(text: str) -> list[float]:
    """Reads ``FIRST:LAST:STEP``, the last included, or thresholds between commas.

    Raises:
        UserError: the text is neither, there are more than `MOST_THRESHOLDS`, one is outside [0, 1], or two are the
            same in the six digits that name their folders.
    """
    shown = f"--thresholds {text if len(text) <= 60 else f'{text[:60]}...'}"
    try:
        if ":" in text:
            first, last, step = map(Decimal, text.split(":"))
            # Decimals, so that ten steps of 0.1 are 1; counted before a list is made.
            steps = (last - first) / step if step > 0 else Decimal(-1)
            count = int(min(steps, Decimal(MOST_THRESHOLDS))) + 1 if steps >= 0 else 0
            values = [float(first + number * step) for number in range(count)]
        else:
            values = sorted({float(word) for word in text.split(",")})
    except (ArithmeticError, ValueError) as error:
        raise UserError(f"{shown} is not FIRST:LAST:STEP, such as 0.1:1.0:0.1, or 0.3,0.5,0.9") from error
    if not values or not all(0 <= value <= 1 for value in values):
        raise UserError(f"{shown} is out of range: it must name thresholds in [0, 1], from low to high")
    if len(values) > MOST_THRESHOLDS:
        raise UserError(f"{shown} names more than {MOST_THRESHOLDS:,} thresholds: take a larger step")
    if len({f"{value:g}" for value in values}) < len(values):
        raise UserError(f"{shown} names two thresholds that are the same in six digits: take a larger step")
    return values


def make_point(threshold: float, scores: Scores) -> Point:
    """Takes from a system's scores what is swept."""
    size = scores.model
    assert size is not None and size.computation_saved is not None and scores.words_per_second is not None
    return Point(
        threshold=threshold,
        scores=scores.averages[0].scores,
        experts_per_token=size.experts_per_token,
        computation_saved=size.computation_saved,
        moe_flops=size.moe_flops,
        flops=size.flops,
        words_per_second=scores.words_per_second,
    )


def render_markdown(sweep: Sweep) -> str:
    """Writes the table and the choice."""
    chosen, front = sweep.chosen, sweep.fronts()["moe_flops"]
    affordable = [point for point in sweep.points if point.moe_flops <= (sweep.max_moe_flops or math.inf)]
    best = max(affordable, key=lambda point: point.scores["bleu"])
    limit = f" of at most {short(sweep.max_moe_flops)} MoE FLOPs a token" if sweep.max_moe_flops else ""
    header, rows = _table(sweep)
    for row, point in zip(rows, sweep.points, strict=True):
        row.append("yes" if point.threshold in front else NONE)
    return (
        "\n\n".join(
            (
                f"# {plain(sweep.name)} by threshold",
                markdown([*header, "Pareto front"], rows),
                f"Threshold **{chosen.threshold:g}** is the least that loses no more than {sweep.lose:g} BLEU against "
                f"the best{limit} ({best.scores['bleu']:.2f} at {best.threshold:g}): {chosen.scores['bleu']:.2f} BLEU "
                f"with {chosen.computation_saved:.0%} of the MoE computation saved.",
                f"Means of {sweep.directions} directions, {sweep.sentences:,} sentences; FLOPs a token with the "
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
    header = ["threshold", *(METRICS[name] for name in metrics), "experts a token", "MoE FLOPs saved"]
    header += ["MoE FLOPs a token", "FLOPs a token", "words/s"]
    rows = []
    for point in sweep.points:
        scores = [number(point.scores[name], 4 if exact else 2) for name in metrics]
        flops = [str(round(one)) if exact else short(one) for one in (point.moe_flops, point.flops)]
        experts = number(point.experts_per_token, 4 if exact else 2)
        saved = f"{point.computation_saved:.4f}" if exact else percent(point.computation_saved)
        rows.append([f"{point.threshold:g}", *scores, experts, saved, *flops, f"{point.words_per_second:.1f}"])
    return header, rows
