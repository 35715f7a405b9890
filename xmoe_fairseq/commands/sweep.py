"""``xmoe sweep``: quality against computation of one trained model at many thresholds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.outputs import check_no_folders, check_writable, replacing_all
from ..common.run_folder import default_out
from ..common.schema import json_text
from ..errors import printable
from ..evaluation.decode import Translator
from ..evaluation.perplexity import is_language_model
from ..evaluation.score_job import ScoreJob
from ..evaluation.sweep import make_point, read_thresholds
from ..metrics.corpus import METRICS
from ..render.score_tables import PAGES
from ..render.sweep_figure import draw_sweep, save
from ..render.sweep_tables import render_markdown, render_tsv
from ..results.decoding import Decoding
from ..results.direction_sets import ZERO_SHOT
from ..results.scores import SystemScores
from ..results.sweep import Sweep
from .language_models import add_cutting_options, check_no_cutting_options, measure_perplexity
from .score import add_output_options, add_translating_options, decoding_options

_EPILOG = """\
Nothing is trained: the routers get another threshold, or --moe-shift. Written to --out: sweep.json, sweep.tsv,
sweep.md, the picture sweep.png and sweep.svg, and for each value a folder as xmoe score writes it, which xmoe compare
reads. Run again, finished values and directions are skipped. To choose a value honestly, sweep --subset valid.
Of a language model the perplexity is measured.

examples:
  xmoe sweep --checkpoint runs/demo4/checkpoints/checkpoint_last.pt --data data/demo4 --thresholds 0.1:1.0:0.1
  xmoe sweep --checkpoint runs/demo4/checkpoints/checkpoint_last.pt --data data/demo4 --thresholds 0.3,0.6,0.9 \\
      --pairs en-ca,ca-en --subset valid --lines 100 --lose 1
"""
_METRICS = ("bleu", "chrf")


def main(argv: Sequence[str]) -> None:
    """Measures quality against computation of one model at many thresholds.

    Args:
        argv: the words after ``xmoe sweep``.

    Raises:
        UserError: an argument or a file is refused, or the model has no threshold router.
    """
    args = _parser().parse_args(argv)
    dial, values = _values(args)
    if is_language_model(args.checkpoint):
        measure_perplexity(args, args.data, "sweep", values, dial)
        return
    check_no_cutting_options(args)
    decoding = decoding_options(args, args.data)
    jobs = {
        value: ScoreJob(
            args.data,
            args.checkpoint,
            _at(decoding, dial, value),
            pairs=args.pairs,
            metrics=_METRICS,
        )
        for value in values
    }
    out = args.out or default_out(args.checkpoint, "sweep")
    check_writable(out)
    check_no_folders(_files(out))
    with locks.held(out):
        found = _score(jobs, out, dial, args.quiet)
        sweep = dataclasses.replace(_sweep(args.checkpoint.stem, found, args.lose, args.max_moe_flops), dial=dial)
        _write(sweep, out)
    if args.json:
        print(json_text(sweep.as_json(), "--json"), end="")
    else:
        print(render_markdown(sweep))
        print(printable(f"written: {out}"))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe sweep",
        usage="xmoe sweep --checkpoint FILE --data DATA --thresholds FIRST:LAST:STEP [options]\n"
        "       xmoe sweep --checkpoint FILE --data DATA --shifts FIRST:LAST:STEP [options]",
        description="Measures BLEU, chrF++, FLOPs and speed of one trained model at many thresholds, or shifts.",
        epilog=_EPILOG,
    )
    parser.add_argument("--checkpoint", type=file_path, required=True, metavar="FILE", help="with threshold routers")
    parser.add_argument("--data", type=file_path, required=True, metavar="DATA", help="made by data_prep/prepare.sh")
    swept = parser.add_mutually_exclusive_group(required=True)
    swept.add_argument("--thresholds", metavar="LIST", help="FIRST:LAST:STEP, the last included, or 0.3,0.5,0.9")
    swept.add_argument(
        "--shifts",
        metavar="LIST",
        help="of --moe-shift, for topany, relu, null and expert_threshold: --shifts=-1:1:0.5",
    )
    parser.add_argument(
        "--lose",
        type=bounded(float, 0, 100),
        default=0.5,
        metavar="X",
        help="BLEU that may be lost (default: 0.5)",
    )
    parser.add_argument(
        "--max-moe-flops",
        type=bounded(float, 1, 1e30),
        metavar="X",
        help="FLOPs of a token in experts that the choice may take",
    )
    parser.add_argument(
        "--out", type=file_path, metavar="DIR", help="results (default: CHECKPOINT-sweep beside the checkpoint)"
    )
    add_translating_options(parser)
    add_cutting_options(parser)
    add_output_options(parser)
    return parser


def _values(args: argparse.Namespace) -> tuple[str, list[float]]:
    """Returns what is swept and its values, the sparsest first."""
    if args.shifts is None:
        return "threshold", read_thresholds(args.thresholds)
    return "shift", read_thresholds(args.shifts, "shifts", -1000, 1000)[::-1]


def _at(decoding: Decoding, dial: str, value: float) -> Decoding:
    changed: dict[str, Any] = {f"moe_{dial}": value}
    return dataclasses.replace(decoding, **changed)


def _score(jobs: dict[float, ScoreJob], out: Path, dial: str, quiet: bool) -> dict[float, SystemScores]:
    """Runs the jobs one after the other with one model, under one progress bar."""
    found: dict[float, SystemScores] = {}
    translator: Translator | None = None
    with tqdm(total=sum(len(job.pairs) for job in jobs.values()), unit="direction", disable=quiet) as bar:
        for threshold in list(jobs):
            bar.set_postfix({dial: f"{threshold:g}"})
            job = jobs.pop(threshold)
            job.take(translator)
            found[threshold] = job.run(out / f"{dial}-{threshold:g}", bar, PAGES)
            translator = job.translator
    return found


def _sweep(name: str, found: dict[float, SystemScores], lose: float, max_moe_flops: float | None) -> Sweep:
    first = next(iter(found.values()))
    meant = [row for row in first.rows if row.zero_shot == (first.averages[0].name == ZERO_SHOT)]
    signatures = {
        metric: sorted({row.signatures[metric] for row in first.rows}) for metric in METRICS if metric in _METRICS
    }
    return Sweep(
        name=name,
        points=[make_point(threshold, scores) for threshold, scores in found.items()],
        lose=lose,
        device=first.device or "",
        sentences=sum(row.sentences for row in meant),
        directions=len(meant),
        signatures=signatures,
        max_moe_flops=max_moe_flops,
        zero_shot=[row.name for row in first.rows if row not in meant],
    )


def _files(out: Path) -> list[Path]:
    return [out / f"sweep.{ending}" for ending in ("md", "tsv", "png", "svg", "json")]


def _write(sweep: Sweep, out: Path) -> None:
    """Writes all files, or none."""
    files = _files(out)
    with replacing_all(files) as (page, table, png, svg, data):
        page.write_text(render_markdown(sweep), encoding="utf-8")
        table.write_text(render_tsv(sweep), encoding="utf-8")
        save(draw_sweep(sweep), png, svg)
        data.write_text(json_text(sweep.as_json(), str(files[-1])), encoding="utf-8")
