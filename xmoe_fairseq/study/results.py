"""The runs that are there, added up over seeds: what ``results.json`` says of each row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ..common.schema import build
from ..errors import UserError
from ..results.decoding import ModelSize
from ..results.folder import read_json
from .plan import StudyRow
from .runs import Run, Study

_SEED = re.compile(r"-(\d+)\.json")
# Two figures of one row: over the seeds.
Spread = dict[str, float | None]


@dataclass(frozen=True)
class SystemResult:
    """What is kept of a scored model.

    Attributes:
        averages: by set of directions, ``all``, ``en-xx`` and ``xx-en``, the scores by metric.
        directions: by direction, the scores by metric.
        signatures: sacreBLEU's, by metric.
        sentences: translated.
        words_per_second: source words by the time of the search; None if it was not measured.
        model: what it costs.
        stacks: by stack, experts and strata per token; empty for a dense model.
        bleu_draws: mean BLEU of the directions on each draw of sentences; the same draws for every system.
    """

    averages: Mapping[str, Mapping[str, float]]
    directions: Mapping[str, Mapping[str, float]]
    signatures: Mapping[str, str]
    sentences: int
    words_per_second: float | None
    model: ModelSize
    stacks: Mapping[str, Mapping[str, float]]
    bleu_draws: Sequence[float]


@dataclass(frozen=True)
class SweepResult:
    """The model at several thresholds on the development set: lists of one length, by rising threshold.

    Attributes:
        thresholds, bleu, moe_flops, experts: of each.
        at_most: FLOPs of a token in experts that the chosen one may take.
        threshold: the one that was chosen; None if all take more.
    """

    thresholds: Sequence[float]
    bleu: Sequence[float]
    moe_flops: Sequence[float]
    experts: Sequence[float]
    at_most: float
    threshold: float | None


@dataclass(frozen=True)
class RunResult:
    """What is kept of a run, in ``NAME-SEED.json``.

    Attributes:
        row, seed: which run.
        settings: see `Run.settings`.
        machine: that trained it.
        versions: of the packages used.
        seconds: spent in training steps.
        valid, train: courses by the name of the metric, and ``updates``.
        plateau: relative fall of the validation loss over the last fifth of the updates.
        trained: the model as it was trained.
        sweep: None if no threshold decides the experts.
        chosen: the model at the threshold that the sweep chose; None if there is none.
    """

    row: str
    seed: int
    settings: Mapping[str, Any]
    machine: str
    versions: Mapping[str, str]
    seconds: float
    valid: Mapping[str, Sequence[float]]
    train: Mapping[str, Sequence[float]]
    plateau: float
    trained: SystemResult
    sweep: SweepResult | None
    chosen: SystemResult | None


@dataclass(frozen=True)
class RowResults:
    """A row with the results of its seeds, in the order of the seeds; at least one."""

    row: StudyRow
    results: Sequence[RunResult]

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def spread(self, value: Callable[[RunResult], float | None]) -> Spread | None:
        """Returns mean and standard deviation of a figure over the seeds; None if the row has no such figure."""
        values = [value(result) for result in self.results]
        known = [one for one in values if one is not None]
        if len(known) < len(values):
            return None
        return {"mean": fmean(known), "sd": stdev(known) if len(known) > 1 else None}

    def score(self, metric: str, directions: str = "all") -> Spread | None:
        """Returns a metric, the mean of all directions, or of ``en-xx`` or ``xx-en``."""
        return self.spread(lambda result: result.trained.averages.get(directions, {}).get(metric))

    def cost(self, name: str) -> Spread | None:
        """Returns a figure of `ModelSize`."""
        return self.spread(lambda result: getattr(result.trained.model, name))

    def experts(self, stack: str) -> Spread | None:
        """Returns the experts per token that were measured in a stack; None without experts."""
        return self.spread(lambda result: result.trained.stacks.get(stack, {}).get("experts"))

    def strata(self, stack: str) -> Spread | None:
        """Returns the strata per token (requested capacity) in a stack; None without experts."""
        return self.spread(lambda result: result.trained.stacks.get(stack, {}).get("strata"))

    def as_json(self) -> dict[str, Any]:
        """Returns plain values; ``flops`` and ``moe_flops`` are of a token's forward pass."""
        return {
            "name": self.row.name,
            "why": self.row.why,
            "seeds": self.seeds,
            "bleu": self.score("bleu"),
            "bleu_en_xx": self.score("bleu", self.out_of),
            "bleu_xx_en": self.score("bleu", self.into),
            "chrf": self.score("chrf"),
            "chrf_en_xx": self.score("chrf", self.out_of),
            "chrf_xx_en": self.score("chrf", self.into),
            "valid_ppl": self.spread(lambda result: result.valid["ppl"][-1]),
            "parameters": self.results[0].trained.model.parameters,
            "active_parameters": self.cost("active_parameters"),
            "flops": self.cost("flops"),
            "moe_flops": self.cost("moe_flops"),
            "experts": {stack: self.experts(stack) for stack in ("encoder", "decoder")},
            "strata": {stack: self.strata(stack) for stack in ("encoder", "decoder")},
            "updates": self.results[0].settings["updates"],
            "plateau": self.spread(lambda result: result.plateau),
            "train_seconds": self.spread(lambda result: result.seconds),
        }

    @property
    def out_of(self) -> str:
        """The name of the directions out of English in the averages."""
        return self._named(lambda name: name.endswith("-xx"))

    @property
    def into(self) -> str:
        """The name of the directions into English in the averages."""
        return self._named(lambda name: name.startswith("xx-"))

    def _named(self, wanted: Callable[[str], bool]) -> str:
        return next((name for name in self.results[0].trained.averages if wanted(name)), "")


def read_results(study: Study) -> list[RowResults]:
    """Reads the results that are in the study's folder, in the order of the plan's rows, each by its seeds.

    Rows without a result are left out, and so are results of rows that the plan does not have.

    Raises:
        UserError: a file is damaged, or of other settings.
    """
    rows = []
    for row in study.plan.rows:
        named = (_SEED.fullmatch(path.name.removeprefix(row.name)) for path in study.results.glob(f"{row.name}-*.json"))
        runs = [Run(study, row, seed) for seed in sorted(int(match[1]) for match in named if match)]
        results = [_read(run) for run in runs if run.finished()]
        if results:
            rows.append(RowResults(row, results))
    _check_draws(study, rows)
    return rows


def _check_draws(study: Study, rows: Sequence[RowResults]) -> None:
    """Claims compare the systems draw by draw."""
    systems = [
        (f"{row.row.name}-{result.seed}.json", len(system.bleu_draws))
        for row in rows
        for result in row.results
        for system in (result.trained, result.chosen)
        if system is not None
    ]
    for name, draws in systems:
        if not draws or draws != systems[0][1]:
            raise UserError(
                f"{study.results / name} has {draws} draws, {systems[0][0]} has {systems[0][1]}, all need as many: "
                "delete it to measure the run again"
            )


def _read(run: Run) -> RunResult:
    path, advice = run.result, "delete it to measure the run again"
    result = build(RunResult, read_json(path, advice), str(path), advice)
    if (result.row, result.seed) != (run.row.name, run.seed):
        raise UserError(f"{path} is the result of {result.row!r} with seed {result.seed}: {advice}")
    if not result.valid.get("updates") or not {"loss", "ppl"} <= result.valid.keys():
        raise UserError(f"{path} has no course of the validation loss: {advice}")
    if any(len(set(map(len, course.values()))) > 1 for course in (result.valid, result.train)):
        raise UserError(f"{path} has courses of different lengths: {advice}")
    swept = result.sweep
    if swept and len({len(one) for one in (swept.thresholds, swept.bleu, swept.moe_flops, swept.experts)}) > 1:
        raise UserError(f"{path} has a sweep with lists of different lengths: {advice}")
    return result
