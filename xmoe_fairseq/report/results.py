"""What a report shows, as data: written to ``report.json`` and drawn on the page and in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .score import Score
from .usage import LayerUsage, computation_saved


@dataclass(frozen=True)
class Direction:
    """One translated test set: its figures, its files and its lines, all in the order of the test set."""

    source: str
    target: str
    score: Score
    reference_file: Path
    hypothesis_file: Path
    sources: Sequence[str]
    references: Sequence[str]
    hypotheses: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """One translated sentence; ``sentence`` counts from 0 in the test set of the direction."""

    source_language: str
    target_language: str
    sentence: int
    source: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Report:
    """Everything about one run that the page, the picture and the JSON file show.

    Attributes:
        name: the task, or the folder of the run.
        directions: at least one.
        layers: the MoE layers in the order of the model; empty for a dense model.
        seconds: wall-clock seconds by stage; empty where they were not recorded.
        versions: of Python and the packages used, by name.
    """

    name: str
    directions: Sequence[Direction]
    layers: Sequence[LayerUsage]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def mean_bleu(self) -> float:
        """BLEU averaged over the directions, each with the same weight."""
        return fmean(direction.score.bleu for direction in self.directions)

    @property
    def mean_chrf(self) -> float:
        """The same for chrF++."""
        return fmean(direction.score.chrf for direction in self.directions)

    @property
    def computation_saved(self) -> float | None:
        """Share of the computation of all MoE layers saved against using all experts; None for a dense model."""
        return computation_saved(self.layers) if self.layers else None

    def samples(self, count: int = 10) -> list[Sample]:
        """Picks sentences by position: in turn from every direction, and evenly over the length of the test sets.

        Moving on in the test set with every pick shows different sentences where all languages share one test set.
        Fewer than ``count`` come back where the test sets are too small to pick without repetition.
        """
        chosen: dict[tuple[int, int], Sample] = {}
        for pick in range(count):
            number = pick % len(self.directions)
            direction = self.directions[number]
            index = (2 * pick + 1) * len(direction.references) // (2 * count)
            chosen[number, index] = Sample(
                direction.source,
                direction.target,
                index,
                direction.sources[index],
                direction.references[index],
                direction.hypotheses[index],
            )
        return list(chosen.values())

    def as_json(self) -> dict[str, Any]:
        """Returns what ``report.json`` holds; ``moe_computation_saved`` is null for a dense model."""
        return {
            "name": self.name,
            "mean_bleu": self.mean_bleu,
            "mean_chrf": self.mean_chrf,
            "moe_computation_saved": self.computation_saved,
            "directions": [
                {"source": direction.source, "target": direction.target, **asdict(direction.score)}
                for direction in self.directions
            ],
            "layers": [
                {
                    **asdict(use),
                    "experts": use.experts,
                    "mean_experts": use.mean_experts,
                    "requested_capacity": use.requested_capacity,
                    "computation_saved": use.computation_saved,
                }
                for use in self.layers
            ],
            "samples": [asdict(sample) for sample in self.samples()],
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
        }
