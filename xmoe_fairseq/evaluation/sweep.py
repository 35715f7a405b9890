"""Quality against computation of one model at many thresholds."""

from __future__ import annotations

from decimal import Decimal

from ..errors import UserError
from ..results.scores import SystemScores
from ..results.sweep import Point

# Of one sweep; each is a translation of all test sets.
MOST_THRESHOLDS = 1000


def read_thresholds(text: str, what: str = "thresholds", low: float = 0, high: float = 1) -> list[float]:
    """Reads ``FIRST:LAST:STEP``, the last included, or thresholds between commas.

    Args:
        text: of the option.
        what: the values are called, as the option is.
        low, high: their range.

    Raises:
        UserError: the text is neither, there are more than `MOST_THRESHOLDS`, one is out of range, or two are the same
            in the six digits that name their folders.
    """
    shown = f"--{what} {text if len(text) <= 60 else f'{text[:60]}...'}"
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
    if not values or not all(low <= value <= high for value in values):
        raise UserError(f"{shown} is out of range: it must name {what} in [{low:g}, {high:g}], from low to high")
    if len(values) > MOST_THRESHOLDS:
        raise UserError(f"{shown} names more than {MOST_THRESHOLDS:,} {what}: take a larger step")
    if len({f"{value:g}" for value in values}) < len(values):
        raise UserError(f"{shown} names two {what} that are the same in six digits: take a larger step")
    return values


def make_point(threshold: float, scores: SystemScores) -> Point:
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
