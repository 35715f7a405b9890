"""The points of a sweep: quality and computation at each threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Point:
    """The model at one threshold.

    Attributes:
        threshold: of its routers, or what they have in its place; see `Sweep.dial`.
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
        points: by rising threshold, or by falling shift: the sparsest first.
        lose: BLEU that may be lost against the best threshold.
        device: that the search ran on.
        sentences, directions: that each point was measured on.
        signatures: sacreBLEU's, by metric, each one once.
        max_moe_flops: most FLOPs of a token in experts that the chosen threshold may take; None for any.
        zero_shot: directions that were translated too, but not trained, and are in no mean of scores.
        dial: ``threshold`` or ``shift``, what was swept.
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
    dial: str = "threshold"

    @property
    def sparsest(self) -> str:
        """Which value means the fewest experts: ``least`` or ``largest``."""
        return "least" if self.dial == "threshold" else "largest"

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
                f"no {self.dial} takes at most {self.max_moe_flops:g} FLOPs per token in experts, the least is "
                f"{least:g}: sweep {'lower' if self.dial == 'threshold' else 'higher'} {self.dial}s, or allow more"
            )
        return found

    def fronts(self) -> dict[str, list[float]]:
        """Returns the thresholds on the Pareto front of BLEU, by what is paid: FLOPs in experts, or time."""
        return {
            cost: [point.threshold for point in pareto(self.points, cost_of, lambda point: point.scores["bleu"])]
            for cost, cost_of in COSTS.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self) | {"chosen": self.chosen.threshold, "pareto": self.fronts()}


# What is paid for quality; less is better.
COSTS: dict[str, Callable[[Point], float]] = {
    "moe_flops": lambda point: point.moe_flops,
    "time": lambda point: -point.words_per_second,
}


def choose(points: Sequence[Point], lose: float, max_moe_flops: float | None = None) -> Point | None:
    """Chooses the least threshold that loses no more than ``lose`` BLEU against the best one that can be afforded.

    Args:
        points: the sparsest first.
        lose: BLEU that may be lost.
        max_moe_flops: most FLOPs of a token in experts; None affords all.

    Returns:
        The point, or None if none can be afforded.
    """
    affordable = [point for point in points if max_moe_flops is None or point.moe_flops <= max_moe_flops]
    best = max((point.scores["bleu"] for point in affordable), default=0.0)
    return next((point for point in affordable if point.scores["bleu"] >= best - lose), None)


def pareto(points: Sequence[Point], cost: Callable[[Point], float], quality: Callable[[Point], float]) -> list[Point]:
    """Returns the points that no other one beats: none is as good and cheaper, or better and as cheap; by rising
    cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (cost(point), -quality(point))):
        if not front or quality(point) > quality(front[-1]):
            front.append(point)
    return front
