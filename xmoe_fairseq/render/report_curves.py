"""Training curves as figures of a page: which there are, and where their lines, ticks and labels go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..results.training_log import Training, Values

# In SVG's units, pixels where the page is wide.
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
_MOST_POINTS = 160  # of a line; of more, neighbours are averaged
# What an axis has a place for beside zero; beyond, differences of values are infinite or zero.
_LEAST, _GREATEST = 1e-200, 1e200
_BOTH_STACKS = "enc_{}", "dec_{}"


@dataclass(frozen=True)
class Kind:
    """A figure that may be drawn.

    Attributes:
        title: what it shows.
        metrics: fairseq's names; those of the encoder first.
        log: whether its axis is logarithmic.
        validated: whether it is also shown for the validation subsets.
        varies: drawn only if its values are not all this one.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    validated: bool = False
    varies: float | None = None


def _both(metric: str) -> tuple[str, ...]:
    return tuple(pattern.format(metric) for pattern in _BOTH_STACKS)


KINDS = (
    Kind("Perplexity", ("ppl",), log=True, validated=True),
    Kind("Loss", ("loss",), validated=True),
    Kind("Experts a token", _both("experts")),
    Kind("Strata a token (requested capacity)", _both("rc"), varies=1),
    Kind("Balance loss", _both("balance_loss"), varies=0),
    Kind("Load: coefficient of variation", _both("load_cv")),
    Kind("Probability of the first choice", _both("top1_prob")),
    Kind("First choices dropped, share", _both("first_dropped"), varies=0),
    Kind("Router z-loss", _both("z_loss"), varies=0),
    Kind("Entropy of the routers, nats per token", _both("entropy_loss"), varies=0),
    Kind("Losses of single routers", _both("own_loss"), varies=0),
    Kind("Learning rate", ("lr",)),
    Kind("Gradient norm", ("gnorm",), log=True),
    Kind("Words a second", ("wps",)),
)


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and what it says."""

    place: float
    label: str

    @property
    def anchor(self) -> str:
        """How the label of a horizontal axis is placed, so that the picture does not cut it off."""
        return "end" if self.place > WIDTH - 2 * RIGHT else "middle"


@dataclass(frozen=True)
class Line:
    """One line: its label, its colour and dashes as a class of the page's style, its way, and its first and last
    values as (update, value)."""

    label: str
    style: str
    path: str
    first: tuple[int, float]
    last: tuple[int, float]
    lowest: tuple[int, float]

    @property
    def last_label(self) -> str:
        return number(self.last[1])


@dataclass(frozen=True)
class Figure:
    """One drawn figure; ``restarts`` are places on the horizontal axis."""

    title: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    restarts: Sequence[float]
    log: bool

    @property
    def description(self) -> str:
        """What the figure shows, for those who cannot see it."""
        lines = (
            f"{line.label}: {number(line.first[1])} after {line.first[0]:,} updates, "
            f"{number(line.last[1])} after {line.last[0]:,}"
            for line in self.lines
        )
        return f"{self.title} by update. " + ". ".join(lines)


def draw(training: Training) -> list[Figure]:
    """Draws a figure of each kind that the training logged."""
    return [figure for kind in KINDS if (figure := _figure(kind, training)) is not None]


def _figure(kind: Kind, training: Training) -> Figure | None:
    courses = [(label, style, points) for label, style, points in _courses(kind, training) if points]
    values = [value for *_, points in courses for value in points.values()]
    if not values or set(values) == {kind.varies}:
        return None
    across = _Axis(min(min(points) for *_, points in courses), training.updates, LEFT, WIDTH - RIGHT)
    up = _Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, kind.log)
    return Figure(
        title=kind.title,
        lines=[_line(label, style, points, across, up) for label, style, points in courses],
        x_ticks=across.ticks(4),
        y_ticks=up.ticks(4),
        restarts=[round(across.place(update), 1) for update in training.restarts if update >= across.low],
        log=up.log,
    )


def _courses(kind: Kind, training: Training) -> Iterator[tuple[str, str, dict[int, float]]]:
    """Yields the label, the style and the values by update of each line."""
    for number_, metric in enumerate(kind.metrics):
        label = "training" if len(kind.metrics) == 1 else ("encoder", "decoder")[number_]
        yield label, f"line{number_}", _select(training.train, metric, kind.log)
    if kind.validated:
        for number_, (name, points) in enumerate(training.valid.items(), start=1):
            yield name, f"line{number_ % 4} valid", _select(points, kind.metrics[0], kind.log)


def _select(points: Mapping[int, Values], metric: str, positive: bool) -> dict[int, float]:
    """Takes one metric, leaving out what no axis has a place for."""
    found = {update: values[metric] for update, values in points.items() if metric in values}
    return {
        update: value
        for update, value in found.items()
        if (value == 0 or _LEAST < abs(value) < _GREATEST) and (value > 0 or not positive)
    }


def _line(label: str, style: str, points: Mapping[int, float], across: _Axis, up: _Axis) -> Line:
    way = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in _thin(points))
    updates = list(points)
    lowest = min(points, key=lambda update: points[update])
    if len(updates) == 1:
        way += f" {way}"  # with round ends, a line from a point to itself is a dot
    return Line(label, style, f"M{way}", *((update, points[update]) for update in (updates[0], updates[-1], lowest)))


def _thin(points: Mapping[int, float]) -> Iterator[tuple[float, float]]:
    places = list(points.items())
    step = math.ceil(len(places) / _MOST_POINTS)
    for start in range(0, len(places), step):
        updates, values = zip(*places[start : start + step], strict=True)
        yield fmean(updates), fmean(values)


class _Axis:
    """Places values between two ends of the picture, which may be a bit beyond the least and the greatest value."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        # Within one order of magnitude, a linear axis has more ticks.
        self.log = log and high >= 10 * low
        if low == high:
            margin = abs(low) / 2 if low > 0 else max(abs(low) / 2, 1)
            low, high = low - margin, high + margin
        self.low, self.high, self.start, self.end = low, high, start, end

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[Tick]:
        values = _decades(self.low, self.high) if self.log else _steps(self.low, self.high, wanted)
        return [Tick(round(self.place(value), 1), number(value)) for value in values]


def _steps(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between two: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= wanted)
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two numbers; with 2 and 5 times each if they are few."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    dense = [power * factor for power in powers for factor in (1, 2, 5)]
    ticks = [value for value in dense if low <= value <= high]
    if len(ticks) <= 6:
        return ticks
    ticks = [value for value in powers if low <= value <= high]
    return ticks[:: math.ceil(len(ticks) / 6)]


def number(value: float) -> str:
    """Writes a number in few characters: ``12k``, ``0.034``, ``2e-05``."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
