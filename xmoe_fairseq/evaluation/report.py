"""Scores every direction of a run, measures its use of experts, and writes a page, a picture and a JSON file.

.. code-block:: bash

    python -m xmoe_fairseq.evaluation.report --run RUN --data DATA --task multilingual_demo4

reads ``RUN/generate/SRC-TGT/generate-test.txt``, ``RUN/checkpoints/checkpoint_best.pt``, ``RUN/seconds.json`` (where
there), ``DATA/raw`` and ``DATA/bin``, and writes ``RUN/report.{md,json,png}`` and ``RUN/generate/SRC-TGT/hyp.TGT``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .. import benchmarks
from ..errors import UserError
from .outputs import find_raw, read_lines, replacing
from .page import render_page
from .plot import draw_report
from .results import Direction, Report
from .score import score_output
from .usage import LayerUsage, measure
from .versions import read_versions

TASK_PREFIX = "multilingual_"

Measure = Callable[[Path, Path], list[LayerUsage]]


def find_directions(run: Path, task: str | None) -> list[str]:
    """Lists the directions that were decoded, ``SRC-TGT``, each a folder of ``RUN/generate``.

    Args:
        run: the folder of the run.
        task: ``multilingual_NAME``; where the benchmark NAME fixes its languages, the folders must be its directions,
            no fewer and no more, and come in its order.

    Raises:
        UserError: nothing was decoded, the task is unknown, or the folders are not those of the task.
    """
    generate = run / "generate"
    found = sorted(path.name for path in generate.iterdir() if path.is_dir()) if generate.is_dir() else []
    if not found:
        raise UserError(f"no folder {generate}/SRC-TGT: run fairseq-generate with --results-path first")
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
    source_file, reference_file = find_raw(data, "test", source, target)
    figures, hypothesis_file = score_output(run / "generate" / name, reference_file, target)
    references = read_lines(reference_file, "reference")
    sources = read_lines(source_file, "raw source")
    if len(sources) != len(references):
        raise UserError(f"{source_file} has {len(sources)} lines but {reference_file} has {len(references)}")
    hypotheses = read_lines(hypothesis_file, "hypotheses")
    return Direction(source, target, figures, reference_file, hypothesis_file, sources, references, hypotheses)


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


def build_report(run: Path, data: Path, task: str | None, checkpoint: Path, measure_usage: Measure = measure) -> Report:
    """Gathers everything for the report of a run.

    Scoring comes first, since it finds what is missing in seconds.

    Args:
        run: the folder of the run.
        data: the folder of the data, with ``raw`` and ``bin``.
        task: as for ``find_directions``; also the title of the page, the folder's name if None.
        checkpoint: the model whose use of experts is measured.
        measure_usage: called with the checkpoint and the folder of binarised data.

    Raises:
        UserError: an input is missing or unusable.
    """
    seconds = read_seconds(run / "seconds.json")
    names = find_directions(run, task)
    directions = [score_direction(run, data, name) for name in tqdm(names, desc="score", unit="direction")]
    layers = measure_usage(checkpoint, data / "bin")
    return Report(task or run.resolve().name, directions, layers, seconds, read_versions())


def write_report(report: Report, run: Path) -> list[Path]:
    """Writes ``report.md``, ``report.json`` and ``report.png``, none of them on an error, and returns their paths."""
    page, data, picture = (run / f"report.{ending}" for ending in ("md", "json", "png"))
    with replacing(page) as new_page, replacing(data) as new_data, replacing(picture) as new_picture:
        draw_report(report, new_picture)
        new_page.write_text(render_page(report, picture.name), encoding="utf-8")
        new_data.write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [page, data, picture]


def main(argv: Sequence[str] | None = None, measure_usage: Measure | None = None) -> None:
    """Writes report.md, report.json and report.png of a trained and decoded run."""
    parser = argparse.ArgumentParser(prog="python -m xmoe_fairseq.evaluation.report", description=main.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with generate/SRC-TGT and checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder with raw and bin, from data_prep/prepare.sh")
    parser.add_argument("--task", help="multilingual_NAME: demand exactly its directions")
    parser.add_argument("--checkpoint", type=Path, help="default: RUN/checkpoints/checkpoint_best.pt")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens in a batch of the expert measurement")
    args = parser.parse_args(argv)

    # Importing fairseq leaves the root logger at the level of debugging.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    checkpoint = args.checkpoint or args.run / "checkpoints" / "checkpoint_best.pt"
    measure_usage = measure_usage or partial(measure, max_tokens=args.max_tokens)
    report = build_report(args.run, args.data, args.task, checkpoint, measure_usage)
    for path in write_report(report, args.run):
        print(path)


if __name__ == "__main__":
    main()
