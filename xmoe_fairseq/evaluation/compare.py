"""Differences between scored systems, with sacreBLEU's paired bootstrap (Koehn 2004)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import _compute_p_value, estimate_ci
from tqdm import tqdm

from ..common.directions import Direction
from ..errors import UserError
from ..metrics.corpus import METRICS, build_metric
from ..metrics.sentences import corpus_score, draw_scores, read_seed, sentence_statistics
from ..results.direction_sets import direction_sets
from ..results.folder import read_scores, read_texts
from ..results.scores import SystemScores


@dataclass(frozen=True)
class Result:
    """One system's score on one set of sentences.

    Attributes:
        score: of the metric.
        interval: half of the width of its 95% confidence interval.
        difference: from the first system; None for that itself.
        p: share of the draws in which a difference as large as this one came by chance; 1 for equal systems.
    """

    score: float
    interval: float
    difference: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class MetricComparison:
    """The systems by one metric, each list in their order.

    Attributes:
        directions: by direction.
        means: by set of directions, ``all``, ``en-xx`` and ``xx-en``, the most important first: the mean of the
            directions' scores. Those that a system was not trained on (``zero-shot``) are a set of their own.
        all_sentences: as one text.
        win_ratio: by set of directions, the share of them in which the system is better than the first one.
    """

    directions: Mapping[str, Sequence[Result]]
    means: Mapping[str, Sequence[Result]]
    all_sentences: Sequence[Result]
    win_ratio: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class System:
    """One folder of results, and the directions that are compared."""

    name: str
    scores: SystemScores
    folder: Path
    pairs: Sequence[Direction]

    def texts(self, pair: Direction) -> tuple[list[str], list[str], list[str]]:
        """Reads sources, references and translations of a direction, which together may not fit into memory."""
        return read_texts(self.folder, pair)


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown.

    Attributes:
        systems: the first is what the others are compared with.
        metrics: by name.
        samples: draws of the bootstrap.
    """

    systems: Sequence[System]
    metrics: Mapping[str, MetricComparison]
    samples: int

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "systems": [_costs(system) for system in self.systems],
            "samples": self.samples,
            "zero_shot": untrained(self.systems),
            "signatures": {row.name: row.signatures for row in self.systems[0].scores.rows},
            "metrics": {name: asdict(one) for name, one in self.metrics.items()},
        }


def _costs(system: System) -> dict[str, Any]:
    scores = system.scores
    size = asdict(scores.model) if scores.model is not None else None
    costs = {"words_per_second": scores.words_per_second, "device": scores.device}
    return {"name": system.name, "settings": scores.settings, "model": size} | costs


def read_systems(folders: Sequence[Path], pairs: Sequence[str] = ()) -> list[System]:
    """Reads folders of results, and makes sure that they can be compared.

    Args:
        folders: as ``xmoe score`` wrote them, at least two.
        pairs: the directions to compare; all if none is named.

    Raises:
        UserError: a folder holds no scores, or scores of other directions, test sets, metrics or signatures.
    """
    names = [Path(os.path.realpath(folder)).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    systems = []
    for name, folder in zip(names, folders, strict=True):
        scores = read_scores(folder)
        there = {str(row.name): row.name for row in scores.rows}
        wanted = pairs or list(there)
        missing = set(wanted) - there.keys()
        if missing:
            raise UserError(f"{folder} has no scores of {', '.join(sorted(missing))}: it has other directions")
        systems.append(System(name, scores, folder, [there[pair] for pair in dict.fromkeys(wanted)]))
    for system in systems[1:]:
        _check_comparable(systems[0], system)
    return systems


def _check_comparable(one: System, other: System) -> None:
    what = f"{one.name} and {other.name} cannot be compared: "
    if set(one.pairs) != set(other.pairs):
        differ = ", ".join(sorted(set(one.pairs) ^ set(other.pairs)))
        raise UserError(f"{what}only one of them has {differ}; name the common directions with --pairs")
    if set(one.scores.metrics) != set(other.scores.metrics):
        metrics = [",".join(system.scores.metrics) for system in (one, other)]
        raise UserError(f"{what}they were scored by {metrics[0]} and by {metrics[1]}; score both by the same --metrics")
    rows = {system.name: {row.name: row for row in system.scores.rows} for system in (one, other)}
    for pair in one.pairs:
        if one.texts(pair)[:2] != other.texts(pair)[:2]:
            raise UserError(
                f"{what}their test sets of {pair} differ; score both on the same data, --subset and --lines"
            )
        mine, others = (rows[system.name][pair].signatures for system in (one, other))
        for metric in mine:
            if mine[metric] != others[metric]:
                raise UserError(
                    f"{what}{METRICS[metric]} of {pair} was computed as {mine[metric]} and as {others[metric]}; score "
                    "both with the same --tokenize and the same sacreBLEU"
                )


def compare(systems: Sequence[System], samples: int, bar: tqdm) -> Comparison:
    """Compares the first system with each of the others.

    Args:
        systems: as `read_systems` gives them.
        samples: draws of the bootstrap; their seed is sacreBLEU's own, SACREBLEU_SEED.
        bar: a progress bar, advanced by one for each direction and metric.

    Raises:
        UserError: a metric cannot be had, or the installed sacreBLEU is another one than scored.
    """
    seed = read_seed()
    metrics = {name: _compare(systems, name, samples, seed, bar) for name in systems[0].scores.metrics}
    return Comparison(systems, metrics, samples)


def _compare(systems: Sequence[System], name: str, samples: int, seed: int, bar: tqdm) -> MetricComparison:
    signatures = {row.name: row.signatures[name] for row in systems[0].scores.rows}
    tokenizer = systems[0].scores.tokenize
    directions: dict[str, list[Result]] = {}
    scores, draws, statistics = {}, {}, []
    for pair in systems[0].pairs:
        metric = build_metric(name, pair.target, tokenizer)
        stats = [sentence_statistics(metric, *system.texts(pair)[1:]) for system in systems]
        if str(metric.get_signature()) != signatures[pair]:
            raise UserError(
                f"{METRICS[name]} of {pair} was computed as {signatures[pair]}, this sacreBLEU gives "
                f"{metric.get_signature()}: run xmoe score again, for all systems"
            )
        scores[pair] = np.array([corpus_score(metric, [one]) for one in stats])
        draws[pair] = draw_scores(metric, stats, samples, seed)
        directions[pair] = _results(scores[pair], draws[pair])
        statistics.append(stats)
        bar.set_description(f"{METRICS[name]} {pair}")
        bar.update()
    sets = direction_sets(list(scores), untrained(systems), systems[0].scores.english)
    means = {
        # Sentence i is drawn in every direction at once: they are often translations of each other.
        group: _results(np.mean([scores[p] for p in pairs], axis=0), np.mean([draws[p] for p in pairs], axis=0))
        for group, pairs in sets.items()
    }
    wins = {group: np.mean([scores[p] > scores[p][0] for p in pairs], axis=0).tolist() for group, pairs in sets.items()}
    return MetricComparison(directions, means, _all_sentences(metric, statistics, samples, seed), wins)


def untrained(systems: Sequence[System]) -> list[Direction]:
    """Returns the directions that are compared though one of the systems was not trained on them."""
    found = {row.name for system in systems for row in system.scores.rows if row.zero_shot}
    return [pair for pair in systems[0].pairs if pair in found]


def mean_of_draws(
    texts: Mapping[Direction, tuple[Sequence[str], Sequence[str]]], name: str, samples: int
) -> np.ndarray:
    """Draws sets of sentences and scores one system on each: (samples,) means over the directions.

    Sentence i is drawn in every direction at once, and every system gets the same draws.

    Args:
        texts: by direction, references and translations.
        name: of the metric.
        samples: draws.
    """
    draws, seed = [], read_seed()
    for pair, (references, hypotheses) in texts.items():
        metric = build_metric(name, pair.target)
        draws.append(draw_scores(metric, [sentence_statistics(metric, references, hypotheses)], samples, seed)[0])
    return np.mean(draws, axis=0)


def _results(scores: np.ndarray, draws: np.ndarray) -> list[Result]:
    """Tests each system against the first, as sacreBLEU's PairedTest does.

    Args:
        scores: (systems,).
        draws: (systems, samples).
    """
    results = [Result(float(scores[0]), float(estimate_ci(draws[0])[1]))]
    for score, drawn in zip(scores[1:], draws[1:], strict=True):
        difference = float(score - scores[0])
        apart = np.abs(drawn - draws[0])
        # Of equal systems sacreBLEU would say 1 / (samples + 1): no draw has *more* than no difference.
        p = _compute_p_value(apart - apart.mean(), abs(difference)) if apart.any() or difference else 1.0
        results.append(Result(float(score), float(estimate_ci(drawn)[1]), difference, float(p)))
    return results


def _all_sentences(metric: Metric, statistics: Sequence[Sequence[np.ndarray]], samples: int, seed: int) -> list[Result]:
    """Tests the systems on all sentences as one text.

    Args:
        metric: turns sums of statistics into a score; which tokenizer gave them does not matter here.
        statistics: by direction and system.
        samples: draws.
        seed: of the draws.
    """
    systems = list(zip(*statistics, strict=True))
    scores = np.array([corpus_score(metric, parts) for parts in systems])
    whole = [np.concatenate(parts, dtype=np.float32, casting="same_kind") for parts in systems]
    return _results(scores, draw_scores(metric, whole, samples, seed))
