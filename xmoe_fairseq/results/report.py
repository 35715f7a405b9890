"""What a report shows, as data: written to ``report.json`` and drawn on the page and in the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from ..metrics.corpus import CorpusScore, score
from .direction_sets import ZERO_SHOT
from .drawings import Drawing
from .perplexity import PerplexitySweep
from .scores import DirectionScore, SystemScores
from .settings import Settings
from .training_log import Training
from .usage import LayerUsage, computation_saved


@dataclass(frozen=True)
class ScoredSet:
    """One translated test set: its figures, its files and its lines, all in the order of the test set."""

    row: DirectionScore
    reference_file: Path
    hypothesis_file: Path
    sources: Sequence[str]
    references: Sequence[str]
    hypotheses: Sequence[str]

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def target(self) -> str:
        return self.row.target

    @property
    def name(self) -> str:
        """How it is shown."""
        return arrow(self.source, self.target) + f" ({ZERO_SHOT})" * self.row.zero_shot

    @cached_property
    def score(self) -> CorpusScore:
        """BLEU and chrF++, computed if ``xmoe score`` was asked for other metrics."""
        scores, signatures = self.row.scores, self.row.signatures
        if not {"bleu", "chrf"} <= scores.keys():
            return score(self.hypotheses, self.references, self.target)
        tokenizer = signatures["bleu"].partition("tok:")[2].partition("|")[0]
        figures = scores["bleu"], scores["chrf"], signatures["bleu"], signatures["chrf"]
        return CorpusScore(*figures, tokenizer, self.row.sentences)


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
class Token:
    """A piece as SentencePiece or fairseq writes it, and the experts that it took in each MoE layer of its stack."""

    piece: str
    experts: tuple[int, ...]


@dataclass(frozen=True)
class TracedSample:
    """A translated sentence with what the encoder's and the decoder's MoE layers did with the tokens they read."""

    sample: Sample
    encoder: Sequence[Token]
    decoder: Sequence[Token]


@dataclass(frozen=True)
class Report:
    """Everything about one run that the page, the picture and the JSON file show.

    Attributes:
        name: the task, or the folder of the run.
        scores: all that is known of the directions; None if nothing was translated.
        directions: empty if nothing was translated.
        layers: the MoE layers in the order of the model; empty for a dense model.
        drawings: of ``xmoe analyze`` and ``xmoe sweep``; empty if they were not run.
        traced: samples token by token; empty if nothing was translated and for a dense model.
        training: from the logs; None without a log.
        settings: of the checkpoint.
        seconds: wall-clock seconds by stage; empty if they were not recorded.
        versions: of Python and the packages used, by name.
        perplexity: of a language model on its test set, one point; None for a translation model.
    """

    name: str
    scores: SystemScores | None
    directions: Sequence[ScoredSet]
    layers: Sequence[LayerUsage]
    drawings: Sequence[Drawing]
    traced: Sequence[TracedSample]
    training: Training | None
    settings: Settings
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    perplexity: PerplexitySweep | None = None

    @property
    def mean_bleu(self) -> float | None:
        """BLEU averaged over the directions that were trained, or over all if none was, each with the same weight;
        None if nothing was translated."""
        return fmean(direction.score.bleu for direction in self._meant) if self.directions else None

    @property
    def mean_chrf(self) -> float | None:
        """The same for chrF++."""
        return fmean(direction.score.chrf for direction in self._meant) if self.directions else None

    @property
    def _meant(self) -> Sequence[ScoredSet]:
        return [direction for direction in self.directions if not direction.row.zero_shot] or self.directions

    @property
    def computation_saved(self) -> float | None:
        """Share of the computation of all MoE layers saved against using all experts; None for a dense model."""
        return computation_saved(self.layers) if self.layers else None

    def samples(self, count: int = 10) -> list[Sample]:
        """Picks sentences; see `pick_samples`."""
        return pick_samples(self.directions, count)

    def as_json(self) -> dict[str, Any]:
        """Returns what ``report.json`` holds; what is missing is null, or empty if it is a list."""
        return {
            "name": self.name,
            **self.settings.as_json(),
            "mean_bleu": self.mean_bleu,
            "mean_chrf": self.mean_chrf,
            "moe_computation_saved": self.computation_saved,
            "perplexity": self.perplexity and {**self.perplexity.settings, **self.perplexity.points[0].as_json()},
            "directions": [
                {
                    "source": direction.source,
                    "target": direction.target,
                    "zero_shot": direction.row.zero_shot,
                    **asdict(direction.score),
                }
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
            "training": self.training.as_json() if self.training else None,
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
        }


def pick_samples(directions: Sequence[ScoredSet], count: int) -> list[Sample]:
    """Picks sentences by position: in turn from every direction, and evenly over the length of the test sets.

    Moving on in the test set with every pick shows different sentences if all languages share one test set.
    Fewer than ``count`` come back if the test sets are too small to pick without repetition.
    """
    chosen: dict[tuple[int, int], Sample] = {}
    for pick in range(count if directions else 0):
        number = pick % len(directions)
        direction = directions[number]
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


def arrow(source: str, target: str) -> str:
    """Names a direction: ``en → ca``."""
    return f"{source} → {target}"


def duration(seconds: float) -> str:
    """Writes a time in the units that suit it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
