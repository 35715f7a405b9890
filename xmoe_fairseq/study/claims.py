"""Claims as differences in mean BLEU, with a bootstrap over seeds and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .plan import Claim
from .results import RowResults, SystemResult

# Of the seeds' draws, so that the page is the same every time it is written.
_SEED = 12345
_LOW, _HIGH = 2.5, 97.5
SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "undecided"


@dataclass(frozen=True)
class Tested:
    """What the runs say of a claim.

    Attributes:
        claim: the sentence, with what it compares.
        seeds: of the system and of the baseline.
        difference: mean BLEU of the system minus the baseline's, over seeds and directions.
        low, high: its 95% confidence interval.
        p: probability of a difference from the claim's margin as large as this one, if there were none.
        moe_flops: of a token, the system's by the baseline's; None if the baseline has no experts.
        verdict: ``seen`` if the whole interval is above minus the margin, ``not seen`` if it is below,
            ``undecided`` otherwise, and wherever either side has one seed only.
    """

    claim: Claim
    seeds: tuple[int, int]
    difference: float
    low: float
    high: float
    p: float
    moe_flops: float | None
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """Returns plain values; ``claim`` is the sentence, the rest of the claim beside it."""
        return {**asdict(self.claim), **asdict(self), "claim": self.claim.claim}


def test_claims(claims: Sequence[Claim], rows: Sequence[RowResults]) -> list[Tested]:
    """Tests the claims of which both sides were run, with all seeds of each."""
    by_name = {row.row.name: row for row in rows}
    tested = []
    for claim in claims:
        if claim.system in by_name and claim.baseline in by_name:
            found = [
                result.chosen if claim.at == "chosen" else result.trained for result in by_name[claim.system].results
            ]
            system = [one for one in found if one is not None]
            baseline = [result.trained for result in by_name[claim.baseline].results]
            if len(system) == len(
                found
            ):  # else a seed has no threshold within the budget, and others would be favoured
                tested.append(_test(claim, system, baseline))
    return tested


# pytest would take it for a test.
test_claims.__test__ = False  # type: ignore[attr-defined]


def _test(claim: Claim, system: Sequence[SystemResult], baseline: Sequence[SystemResult]) -> Tested:
    difference = _mean_bleu(system) - _mean_bleu(baseline)
    rng = np.random.default_rng(_SEED)
    draws = resample(_draws(system), rng) - resample(_draws(baseline), rng)
    # Sentence draws are centred a bit off the score itself, as corpus BLEU is not linear.
    draws += difference - draws.mean()
    low, high = np.percentile(draws, (_LOW, _HIGH))
    lost = difference + claim.margin
    p = float((np.sum(np.abs(draws - difference) >= abs(lost)) + 1) / (len(draws) + 1))
    verdict = UNDECIDED
    if len(system) > 1 and len(baseline) > 1:
        verdict = SEEN if low > -claim.margin else NOT_SEEN if high < -claim.margin else UNDECIDED
    flops = [float(np.mean([result.model.moe_flops for result in side])) for side in (system, baseline)]
    return Tested(
        claim=claim,
        seeds=(len(system), len(baseline)),
        difference=difference,
        low=float(low),
        high=float(high),
        p=p,
        moe_flops=flops[0] / flops[1] if flops[1] else None,
        verdict=verdict,
    )


def _mean_bleu(results: Sequence[SystemResult]) -> float:
    return float(np.mean([result.averages["all"]["bleu"] for result in results]))


def _draws(results: Sequence[SystemResult]) -> np.ndarray:
    return np.array([result.bleu_draws for result in results])


def resample(draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws seeds in each draw of sentences: the mean of as many seeds as there are, drawn with replacement.

    Drawing n of n values spreads by a factor of sqrt((n - 1) / n) too little, much for two or three seeds; the
    deviation from the mean is multiplied by its inverse. One seed says nothing of the spread of seeds.

    Args:
        draws: (seeds, samples) scores of each seed's system on each draw of sentences.
        rng: draws the seeds.

    Returns:
        (samples,).
    """
    seeds, samples = draws.shape
    mean = draws.mean(axis=0)
    if seeds == 1:
        return mean
    drawn = rng.integers(seeds, size=(seeds, samples))
    deviation = np.take_along_axis(draws, drawn, axis=0).mean(axis=0) - mean
    return mean + deviation * np.sqrt(seeds / (seeds - 1))
