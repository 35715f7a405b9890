"""Gathers what a report shows: scores, the use of experts, the logs, the settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .. import mt_benchmarks
from ..common import schema
from ..common.directions import Direction
from ..common.files import is_there, write_lines
from ..common.run_folder import default_out
from ..errors import UserError
from ..results.decoding import Translated
from ..results.drawings import Drawing, read_drawings
from ..results.folder import read_scores, read_texts
from ..results.perplexity import PerplexitySweep
from ..results.report import Report, Sample, ScoredSet, TracedSample, pick_samples
from ..results.scores import SystemScores, average
from ..results.settings import Settings, read_settings
from ..results.training_log import find_logs, read_training
from ..results.usage import LayerUsage
from ..results.versions import read_versions
from ..stock_commands.generate import GENERATE_FILE
from .consistency import belongs, check_scored, choose_scores
from .direction_scorer import DirectionScorer, read_benchmark
from .generate_output import count_too_long
from .model_directions import choose_directions, known_direction, known_pairs, trained_pairs
from .perplexity import PerplexityJob
from .routing_usage import measure
from .test_sets import check_made_alike, find_raw, read_generated
from .token_trace import trace

TASK_PREFIX = "multilingual_"

# Sentences shown token by token: as many of each direction, so that a page of many directions stays small.
_MOST_TRACED, _MOST_OF_ONE_DIRECTION = 400, 4


@dataclass(frozen=True)
class Model:
    """A checkpoint with its data, folder of data_prep/prepare.sh, and the tokens in a batch of its test set."""

    checkpoint: Path
    data: Path
    max_tokens: int = 4096

    def settings(self) -> Settings:
        """Reads what it was trained with."""
        return read_settings(self.checkpoint)

    def trained(self, translated: Sequence[Direction]) -> list[Direction]:
        """Returns the directions that it was trained on, among them those of ``translated`` if it does not say."""
        named = is_there(self.data / "bin" / "lang_pairs.txt")
        return trained_pairs(self.checkpoint, self.data, known_pairs(self.data) if named else translated)

    def usage(self) -> list[LayerUsage]:
        """Measures the use of experts on the test sets of the directions that it was trained on."""
        pairs = choose_directions(self.data, self.checkpoint, "test").pairs
        return measure(self.checkpoint, self.data / "bin", self.max_tokens, pairs)

    def trace(self, samples: Sequence[Sample]) -> list[TracedSample]:
        """Counts the experts of each token of translated sentences."""
        return trace(self.checkpoint, self.data, samples)


def find_directions(run: Path, task: str | None, data: Path) -> list[Direction]:
    """Lists the directions that were decoded, ``SRC-TGT``, each a folder of ``RUN/generate``.

    Args:
        run: the folder of the run; nothing was decoded if it has no such folders.
        data: folder whose languages they are of.
        task: ``multilingual_NAME``; if the benchmark NAME fixes its languages, the folders must be its directions,
            no fewer and no more, and come in its order.

    Raises:
        UserError: the task is unknown, or the folders are not those of the task.
    """
    generate = run / "generate"
    found = sorted(path.name for path in generate.iterdir() if path.is_dir()) if generate.is_dir() else []
    found = [name for name in found if not name.endswith((".part", ".old"))]  # of translate.sh at work, or killed
    pairs = {name: known_direction(name, data) for name in found}
    if wrong := [name for name, pair in pairs.items() if pair is None]:
        raise UserError(f"{generate}/{wrong[0]} is not named SRC-TGT")
    expected = _directions_of(task) if task else []
    if not expected:
        return [pair for pair in pairs.values() if pair is not None]
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise UserError(f"{generate} lacks {', '.join(missing)} of {task}: decode them, or leave --task out")
    if extra:
        raise UserError(f"{generate} has {', '.join(extra)}, not a direction of {task}: leave --task out")
    return [pair for name in expected if (pair := pairs[name]) is not None]


def _directions_of(task: str) -> list[str]:
    """The directions of a task; empty if its data folder decides."""
    tasks = {f"{TASK_PREFIX}{name}": benchmark for name, benchmark in mt_benchmarks.BENCHMARKS.items()}
    if task not in tasks:
        raise UserError(f"unknown --task {task!r}: choose from {', '.join(tasks)}")
    return list(mt_benchmarks.directions(tasks[task].languages, tasks[task].english))


def find_scores(run: Path, checkpoint: Path) -> Path | None:
    """Finds the folder where ``xmoe score`` keeps a run's results on the test set unless told otherwise."""
    return choose_scores((run / "scores", default_out(checkpoint, "scores")), checkpoint)


def read_scored(folder: Path, data: Path) -> tuple[SystemScores, list[ScoredSet]]:
    """Reads what ``xmoe score`` found and kept.

    Raises:
        UserError: a file is missing or damaged, or of another test set than that of the data.
    """
    scores = read_scores(folder)
    directions = []
    for row in scores.rows:
        texts = read_texts(folder, row.name)
        files = (folder / row.name / f"ref.{row.target}", folder / row.name / f"hyp.{row.target}")
        directions.append(ScoredSet(row, *files, *texts))
    check_scored(folder, directions, data)
    return scores, directions


def score_generated(
    run: Path, data: Path, names: Sequence[Direction], untrained: Collection[str]
) -> tuple[SystemScores, list[ScoredSet]]:
    """Scores what ``fairseq-generate`` wrote, and puts the translations beside it as plain text.

    Args:
        run: the folder of the run.
        data: folder made by data_prep/prepare.sh.
        names: the directions.
        untrained: those of them that the model was not trained on.

    Raises:
        UserError: a file is missing, incomplete or of another length.
    """
    benchmark = read_benchmark(data) if is_there(data / "MANIFEST.json") else None
    scorer = DirectionScorer(data, benchmark, names, untrained)
    directions = [
        _score_generated(run / "generate" / name, name, scorer) for name in tqdm(names, desc="score", unit="direction")
    ]
    rows = [direction.row for direction in directions]
    scores = SystemScores(
        name=run.resolve().name,
        settings={},
        english=scorer.english,
        tokenize=None,
        rows=rows,
        averages=average(rows, scorer.english),
        model=None,
        words_per_second=None,
        device=None,
        detector=None,
        versions=read_versions(),
    )
    return scores, directions


def _score_generated(generated: Path, pair: Direction, scorer: DirectionScorer) -> ScoredSet:
    sources, references = scorer.texts(pair)
    output = generated / GENERATE_FILE
    hypotheses = read_generated(output, scorer.data, sources)
    plain = generated / f"hyp.{pair.target}"
    write_lines(plain, hypotheses)
    row = scorer.score(pair, sources, references, Translated(hypotheses, None, count_too_long(output), []), None)
    reference_file = find_raw(scorer.data, scorer.subset, pair.source, pair.target)[1]
    return ScoredSet(row, reference_file, plain, sources, references, hypotheses)


@dataclass(frozen=True)
class Seconds:
    """What ``seconds.json`` holds: seconds by stage."""

    stages: Mapping[str, float]


def read_seconds(path: Path) -> Mapping[str, float]:
    """Reads the seconds of every stage, ``{"data": 3.1, "train": 80.2}``; none if the file is absent.

    Raises:
        UserError: the file is not a flat JSON object of numbers from 0.
    """
    if not is_there(path):
        return {}
    advice = "it must map each stage to its seconds, as in {'train': 80.2}, or be removed"
    seconds = schema.build(Seconds, {"stages": schema.read_json(path, advice)}, str(path), advice).stages
    negative = [stage for stage, value in seconds.items() if value < 0]
    if negative:
        raise UserError(f"{path} says that {negative[0][:60]!r} took {seconds[negative[0]]:g} seconds; {advice}")
    return seconds


def build_report(run: Path, task: str | None, model: Model, logs: Sequence[Path] | None = None) -> Report:
    """Gathers everything for the report of a run.

    Scoring comes first, since it finds what is missing in seconds.

    Args:
        run: the folder of the run.
        task: as for ``find_directions``; also the title of the page, the folder's name if None.
        model: whose use of experts is measured, and on which data.
        logs: of the training; None to take those of the run.

    Raises:
        UserError: an input is missing or unusable.
    """
    seconds = read_seconds(run / "seconds.json")
    training = read_training(find_logs(run) if logs is None else logs)
    settings = model.settings()
    scores, directions = _scored(run, task, model)
    layers = model.usage()
    of_each = max(1, min(_MOST_OF_ONE_DIRECTION, _MOST_TRACED // max(len(directions), 1)))
    traced = model.trace(pick_samples(directions, of_each * len(directions)))
    return Report(
        name=task or run.resolve().name,
        scores=scores,
        directions=directions,
        layers=layers,
        drawings=_drawings(run, model) if layers else [],
        traced=traced,
        training=training,
        settings=settings,
        seconds=seconds,
        versions=read_versions(),
    )


def build_language_report(run: Path, model: Model, logs: Sequence[Path] | None = None) -> Report:
    """Gathers everything for the report of a language model: its perplexity in the place of translations.

    Args:
        run: the folder of the run.
        model: whose perplexity and use of experts are measured on the test set.
        logs: as for `build_report`.

    Raises:
        UserError: an input is missing or unusable.
    """
    seconds = read_seconds(run / "seconds.json")
    training = read_training(find_logs(run) if logs is None else logs)
    settings = model.settings()
    job = PerplexityJob(model.checkpoint, model.data, "test", {}, model.max_tokens)
    points = [job.run()]
    return Report(
        name=run.resolve().name,
        scores=None,
        directions=[],
        layers=job.usage,
        drawings=_drawings(run, model) if job.usage else [],
        traced=[],
        training=training,
        settings=settings,
        seconds=seconds,
        versions=read_versions(),
        perplexity=PerplexitySweep(model.checkpoint.stem, {"subset": "test", **job.settings}, points),
    )


def _drawings(run: Path, model: Model) -> list[Drawing]:
    """Reads the figures of a run that are of this model and its data."""
    folders = (run / "analysis", run / "sweep", default_out(model.checkpoint, "sweep"))
    shown = [folder for folder in folders if belongs(folder, model.checkpoint, model.data)]
    return [one for folder in shown for one in read_drawings(folder)]


def _scored(run: Path, task: str | None, model: Model) -> tuple[SystemScores | None, list[ScoredSet]]:
    """Returns what ``xmoe score`` found, or else the scores of what ``fairseq-generate`` wrote, or else nothing."""
    folder = find_scores(run, model.checkpoint)
    if folder is not None:
        return read_scored(folder, model.data)
    names = find_directions(run, task, model.data)
    check_made_alike([run / "generate" / name for name in names], model.checkpoint)
    untrained = set(names) - set(model.trained(names))
    return score_generated(run, model.data, names, untrained) if names else (None, [])
