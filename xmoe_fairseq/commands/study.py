"""``xmoe study``: trains the rows of a study with several seeds, measures them, tests the claims, writes the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..common import locks
from ..common.command_line import CommandParser, comma_list
from ..common.files import is_there
from ..common.outputs import replacing_set
from ..common.schema import build
from ..errors import UserError
from ..render.study_figures import draw_curves, draw_experts, draw_quality
from ..render.study_page import StudyResults, render_markdown, render_tsv
from ..render.sweep_figure import save
from ..results.folder import read_json, write_json
from ..study.claims import test_claims
from ..study.jobs import run_all
from ..study.options import add_study_options, check_range, read_seeds, read_study
from ..study.results import RowResults, read_results
from ..study.runs import Study, runs_of

# What benchmarks/study_speed.py writes into the folder of results.
SPEED = "speed.json"

_EPILOG = """\
Written to --results: NAME-SEED.json for each run as it ends, then results.md, results.json, results.tsv and the
pictures curves and quality (PNG and SVG) of all runs that are there. A run whose file is there is done. Killed at any
moment, the same command resumes.

example:
  xmoe study --data runs/study/data --out runs/study --seeds 1,2,3 --jobs 2 --updates 12000
"""


def main(argv: Sequence[str]) -> None:
    """Trains the rows of a study with several seeds, measures and compares them.

    Args:
        argv: the words after ``xmoe study``.

    Raises:
        UserError: an argument or a file is refused, or a run failed.
    """
    args = _parser().parse_args(argv)
    check_range("--jobs", args.jobs, 1000)
    study = read_study(args)
    runs = runs_of(study, args.models, read_seeds(args.seeds))
    _ = study.data_checksum, _read(study)  # what cannot be read is said before anything is trained
    with locks.held(study.results):
        failures = run_all(runs, args.jobs, lambda _: write_page(study))
        write_page(study)
    if failures:
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, the others are done: {failures[0]}")
    print(f"written: {study.results / 'results.md'}")


def write_page(study: Study) -> None:
    """Writes the page, the tables and the pictures of all results that are in the folder, whichever were asked for.

    Raises:
        UserError: a result is damaged, or of other settings.
    """
    rows, speed = _read(study)
    if not rows:
        return
    results = StudyResults(rows=rows, claims=test_claims(study.plan.claims, rows), speed=speed)
    figures = {"curves": draw_curves, "experts": draw_experts, "quality": draw_quality}
    with replacing_set(study.results / "results.json") as new:
        (new / "results.md").write_text(render_markdown(results), encoding="utf-8")
        (new / "results.tsv").write_text(render_tsv(results), encoding="utf-8")
        for name, draw in figures.items():
            save(draw(rows), new / f"{name}.png", new / f"{name}.svg")
        write_json(new / "results.json", results.as_json())


def _read(study: Study) -> tuple[list[RowResults], Mapping[str, Mapping[str, float]]]:
    speed = study.results / SPEED
    return read_results(study), _read_speed(speed) if is_there(speed) else {}


@dataclass(frozen=True)
class _Speed:
    """What ``speed.json`` holds that is shown: training time of a row's update relative to that of another."""

    OTHERS: ClassVar[bool] = True
    ratios: Mapping[str, Mapping[str, float]]


def _read_speed(path: Path) -> Mapping[str, Mapping[str, float]]:
    advice = "measure the speed again with benchmarks/study_speed.py, or delete it"
    return build(_Speed, read_json(path, advice), str(path), advice).ratios


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe study",
        usage="xmoe study --data DATA --out DIR [options]",
        description="Trains models side by side with several seeds, scores them, and tests claims about them.",
        epilog=_EPILOG,
    )
    add_study_options(parser)
    parser.add_argument("--models", type=comma_list, default=[], metavar="NAMES", help="rows (default: all)")
    parser.add_argument("--seeds", type=comma_list, default=["1"], metavar="LIST", help="such as 1,2,3 (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    return parser
