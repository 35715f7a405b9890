"""Gathers what a report shows: scores, the use of experts, the logs, the settings."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from .. import benchmarks
from ..errors import UserError
from ..evaluation.outputs import read_lines
from ..evaluation.score import score_output
from ..evaluation.usage import LayerUsage, measure
from .logs import find_logs, read_training
from .results import Direction, Report, Sample, TracedSample, pick_samples
from .settings import Settings, read_settings
from .traces import trace

TASK_PREFIX = "multilingual_"
PACKAGES = ("fairseq", "torch", "sacrebleu", "sentencepiece", "xmoe_fairseq")

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

    def usage(self) -> list[LayerUsage]:
        """Measures the use of experts on the whole test set."""
        return measure(self.checkpoint, self.data / "bin", self.max_tokens)

    def trace(self, samples: Sequence[Sample]) -> list[TracedSample]:
        """Counts the experts of each token of translated sentences."""
        return trace(self.checkpoint, self.data, samples)


def find_checkpoint(run: Path) -> Path:
    """Finds a run's best checkpoint, or its last one where none was the best.

    Raises:
        UserError: there is neither.
    """
    names = [folder / f"checkpoint_{kind}.pt" for kind in ("best", "last") for folder in (run / "checkpoints", run)]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise UserError(f"no checkpoint {names[0]}: train first, or give --checkpoint")
    return found


def find_directions(run: Path, task: str | None) -> list[str]:
    """Lists the directions that were decoded, ``SRC-TGT``, each a folder of ``RUN/generate``.

    Args:
        run: the folder of the run; nothing was decoded where it has no such folders.
        task: ``multilingual_NAME``; where the benchmark NAME fixes its languages, the folders must be its directions,
            no fewer and no more, and come in its order.

    Raises:
        UserError: the task is unknown, or the folders are not those of the task.
    """
    generate = run / "generate"
    found = sorted(path.name for path in generate.iterdir() if path.is_dir()) if generate.is_dir() else []
    wrong = [name for name in found if not all(name.partition("-")[::2])]
    if wrong:
        raise UserError(f"{generate}/{wrong[0]} is not named SRC-TGT")
    expected = _directions_of(task) if task else []
    if not expected:
        return found
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise UserError(f"{generate} lacks {', '.join(missing)} of {task}: decode them, or leave --task out")
    if extra:
        raise UserError(f"{generate} has {', '.join(extra)}, not a direction of {task}: leave --task out")
    return expected


def _directions_of(task: str) -> list[str]:
    """The directions of a task; empty where its data folder decides."""
    tasks = {f"{TASK_PREFIX}{name}": benchmark for name, benchmark in benchmarks.BENCHMARKS.items()}
    if task not in tasks:
        raise UserError(f"unknown --task {task!r}: choose from {', '.join(tasks)}")
    return benchmarks.directions(tasks[task].languages, tasks[task].english)


def score_direction(run: Path, data: Path, name: str) -> Direction:
    """Scores one direction against its raw reference and reads the lines that samples are taken from.

    Raises:
        UserError: a file is missing, incomplete or of another length.
    """
    source, _, target = name.partition("-")
    pair = _raw_pair(data / "raw", source, target)
    source_file, reference_file = pair.with_name(f"{pair.name}.{source}"), pair.with_name(f"{pair.name}.{target}")
    figures, hypothesis_file = score_output(run / "generate" / name, reference_file, target)
    references = read_lines(reference_file, "reference")
    sources = read_lines(source_file, "raw source")
    if len(sources) != len(references):
        raise UserError(f"{source_file} has {len(sources)} lines but {reference_file} has {len(references)}")
    hypotheses = read_lines(hypothesis_file, "hypotheses")
    return Direction(source, target, figures, reference_file, hypothesis_file, sources, references, hypotheses)


def _raw_pair(raw: Path, source: str, target: str) -> Path:
    """The stem ``test.en-xx`` of a pair, which is stored once and serves both of its directions."""
    stems = [raw / f"test.{source}-{target}", raw / f"test.{target}-{source}"]
    for stem in stems:
        if stem.with_name(f"{stem.name}.{target}").is_file():
            return stem
    tried = " or ".join(f"{stem}.{target}" for stem in stems)
    raise UserError(f"no raw reference {tried}: --data takes the folder made by data_prep/prepare.sh")


def read_seconds(path: Path) -> dict[str, float]:
    """Reads the seconds of every stage, ``{"data": 3.1, "train": 80.2}``; none where the file is absent.

    Raises:
        UserError: the file is not a flat JSON object of numbers.
    """
    if not path.exists():
        return {}
    try:
        seconds = json.loads("\n".join(read_lines(path, "seconds by stage")))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(seconds, dict) or not all(type(value) in (int, float) for value in seconds.values()):
        raise UserError(f"{path} must map each stage to its seconds, as in {{'train': 80.2}}")
    return {stage: float(value) for stage, value in seconds.items()}


def read_versions() -> dict[str, str]:
    """Names the versions of Python and of the installed distributions behind ``PACKAGES``."""
    installed = metadata.packages_distributions()
    names = sorted({name for package in PACKAGES for name in installed.get(package, ())})
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


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
    names = find_directions(run, task)
    directions = [score_direction(run, model.data, name) for name in tqdm(names, desc="score", unit="direction")]
    layers = model.usage()
    of_each = max(1, min(_MOST_OF_ONE_DIRECTION, _MOST_TRACED // max(len(directions), 1)))
    traced = model.trace(pick_samples(directions, of_each * len(directions)))
    name = task or run.resolve().name
    return Report(name, directions, layers, traced, training, settings, seconds, read_versions())
