"""``xmoe score``: the test sets of a data folder, translated with a checkpoint and scored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from sacrebleu.metrics import BLEU
from tqdm import tqdm

from ..common import locks
from ..common.command_line import CommandParser, bounded, comma_list, file_path
from ..common.files import is_there
from ..common.outputs import check_writable
from ..common.run_folder import default_out, generated_folder, scores_folder, seek_checkpoint
from ..common.schema import json_text
from ..errors import UserError, printable
from ..evaluation.direction_scorer import read_benchmark
from ..evaluation.model_directions import subset_name
from ..evaluation.perplexity import is_language_model
from ..evaluation.score_job import ScoreJob
from ..metrics.corpus import METRICS
from ..render.score_tables import PAGES, render_markdown
from ..results.decoding import Decoding
from ..tasks.contrast import OPTIONS, ContrastConfig, check_contrast, contrast_settings
from .language_models import add_cutting_options, check_no_cutting_options, measure_perplexity
from .text_options import add_text_options

_EPILOG = """\
DATA is a folder made by data_prep/prepare.sh: its test sets are translated with --checkpoint. RUN is the folder of a
run, whose RUN/generate/SRC-TGT hold what fairseq-generate wrote: that is scored against --data, and --checkpoint, if
given, only tells what the model costs.

Written to --out, and to standard output: scores.json, scores.md, scores.tsv; and for each direction a folder with
the translations (hyp.TGT), references and sources as plain text. Run again, finished directions are skipped. BLEU's
tokenizer follows the language (13a, but zh, ja-mecab, ko-mecab or char if words are not spaced); spbleu is BLEU on
the pieces of flores200.

Of a language model the perplexity is measured, per token and per word, on a folder of fairseq-preprocess --only-source.

examples:
  xmoe score data/demo4 --checkpoint runs/demo4/checkpoints/checkpoint_last.pt
  xmoe score data/lm/bin --checkpoint runs/lm/checkpoint_best.pt
  xmoe score data/demo4 --checkpoint runs/demo4/checkpoints/checkpoint_last.pt --pairs en-ca,ca-en --metrics bleu
  xmoe score runs/demo4 --data data/demo4 --json
"""
# The options of translating, by their names in `Decoding`.
_TRANSLATING = ("beam", "lenpen", "max_len_b", "max_tokens", "moe_threshold", "moe_shift", "fp16", "lines", "subset")


def main(argv: Sequence[str]) -> None:
    """Translates the test sets with a checkpoint and scores them.

    Args:
        argv: the words after ``xmoe score``.

    Raises:
        UserError: an argument or a file is refused.
    """
    args = _parser().parse_args(argv)
    if args.checkpoint is not None and is_language_model(args.checkpoint):
        if args.data is not None:
            raise UserError("--data goes with a run: give the folder of a language model's text as DATA")
        if args.moe_threshold is not None and args.moe_shift is not None:
            raise UserError("--moe-threshold and --moe-shift: a router has one of them, leave the other out")
        dial = "threshold" if args.moe_shift is None else "shift"
        measure_perplexity(args, args.folder, "scores", [getattr(args, f"moe_{dial}")], dial)
        return
    check_no_cutting_options(args)
    job, out = _job(args)
    out = args.out or out
    check_writable(out)
    with locks.held(out), tqdm(total=len(job.pairs), unit="direction", disable=args.quiet) as bar:
        scores = job.run(out, bar, PAGES)
    if args.json:
        print(json_text(scores.as_json(), "--json"), end="")
    else:
        print(render_markdown(scores))
        print(printable(f"written: {out}"))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe score",
        usage="xmoe score DATA --checkpoint FILE [options]\n       xmoe score RUN --data DATA [options]",
        description="Translates the test sets with a checkpoint and scores them with sacreBLEU.",
        epilog=_EPILOG,
    )
    parser.add_argument("folder", type=file_path, metavar="DATA|RUN", help="what to translate, or a translated run")
    parser.add_argument("--checkpoint", type=file_path, metavar="FILE", help="the model")
    parser.add_argument("--data", type=file_path, metavar="DATA", help="with RUN: the data that was translated")
    parser.add_argument(
        "--out",
        type=file_path,
        metavar="DIR",
        help="results (default: CHECKPOINT-scores beside the checkpoint, RUN/scores)",
    )
    parser.add_argument(
        "--metrics", type=comma_list, default=["bleu", "chrf"], metavar="NAMES", help="of bleu,chrf,spbleu (bleu,chrf)"
    )
    parser.add_argument("--tokenize", choices=BLEU.TOKENIZERS, metavar="NAME", help="BLEU's, for every language")
    add_translating_options(parser)
    parser.add_argument(
        "--moe-threshold",
        type=bounded(float, 0, 1),
        metavar="P",
        help="another threshold than the model was trained with",
    )
    add_cutting_options(parser)
    gen_parser_from_dataclass(parser, ContrastConfig(), delete_default=True)
    parser.add_argument(
        "--moe-shift",
        type=bounded(float, -1000, 1000),
        metavar="X",
        help="another --moe-shift than the model was trained with",
    )
    add_output_options(parser)
    return parser


def add_translating_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is translated, and how; an option that is not given is None."""
    add_text_options(parser, Decoding.subset, Decoding.max_tokens, subset_name, keep_unset=True)
    for option, kind, meaning in (
        ("--beam", bounded(int, 1, 1000), "hypotheses in the search (default: the benchmark's)"),
        ("--lenpen", bounded(float, -10, 10), "length penalty (default: the benchmark's)"),
        ("--max-len-b", bounded(int, 1, 10**6), "most pieces of a translation (default: 200)"),
    ):
        parser.add_argument(option, type=kind, metavar="N" if kind is not float else "X", help=meaning)
    parser.add_argument("--fp16", action="store_const", const=True, help="half precision, for GPUs")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands of evaluation have."""
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress and no hints")


def _job(args: argparse.Namespace) -> tuple[ScoreJob, Path]:
    """Returns the job and where its results go unless told otherwise."""
    unknown = [name for name in args.metrics if name not in METRICS]
    if unknown or not args.metrics:
        raise UserError(f"--metrics {','.join(args.metrics)} is refused: choose from {','.join(METRICS)}")
    common: dict[str, Any] = {"pairs": args.pairs, "metrics": args.metrics, "tokenizer": args.tokenize}
    if is_there(args.folder / "MANIFEST.json"):
        if args.checkpoint is None or args.data is not None:
            raise UserError(
                f"{args.folder} is a data folder: give --checkpoint FILE to translate it with, and no --data"
            )
        job = ScoreJob(args.folder, args.checkpoint, decoding_options(args, args.folder), **common)
        return job, default_out(args.checkpoint, "scores")
    subset = args.subset or Decoding.subset
    generated = generated_folder(args.folder, subset)
    if not generated.is_dir():
        raise UserError(
            f"{args.folder} is neither a data folder (it has no MANIFEST.json) nor a run that was translated (it has "
            f"no folder {generated.name}): give DATA with --checkpoint, or translate first"
        )
    if args.data is None:
        raise UserError(f"{args.folder} is a run: give --data, the folder whose test sets it translated")
    given = [name for name in (*_TRANSLATING, *OPTIONS) if name != "subset" and getattr(args, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} goes with a data folder: {args.folder} was translated before")
    trained_by = args.checkpoint or seek_checkpoint(args.folder)
    decoding = Decoding(subset=subset)
    job = ScoreJob(args.data, args.checkpoint, decoding, generated=generated, trained_by=trained_by, **common)
    return job, scores_folder(args.folder, subset)


def decoding_options(args: argparse.Namespace, data: Path) -> Decoding:
    """Gathers how to translate; beam and length penalty are the benchmark's unless they are given.

    Raises:
        UserError: the folder was not made by data_prep/prepare.sh.
    """
    benchmark = read_benchmark(data)
    options: dict[str, Any] = {name: getattr(args, name, None) for name in _TRANSLATING}
    given = {name: value for name, value in options.items() if value is not None}
    given["contrast"] = _contrast({name: getattr(args, name, None) for name in OPTIONS})
    return Decoding(**({"beam": benchmark.beam, "lenpen": benchmark.lenpen} | given))


def _contrast(options: dict[str, Any]) -> dict[str, Any] | None:
    """Checks and completes the options of decoding by contrast; None if it is not wanted.

    Raises:
        UserError: one is out of range, or given without ``--contrast-beta``.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given and "contrast_beta" not in given:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} has no effect without --contrast-beta: give it, too")
    settings = contrast_settings(given)
    check_contrast(argparse.Namespace(**settings))
    return settings if settings["contrast_beta"] else None
