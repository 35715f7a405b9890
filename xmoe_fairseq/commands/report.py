"""``xmoe report``: the pages, the picture and the data of one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.files import read_file
from ..common.outputs import check_no_folders, check_writable, finish_replacing, replacing_all
from ..common.run_folder import find_checkpoint
from ..common.schema import json_text
from ..errors import UserError, printable
from ..evaluation.build_report import Model, build_language_report, build_report
from ..evaluation.perplexity import is_language_model
from ..render.report_figure import draw_report
from ..render.report_html import render_html
from ..render.report_markdown import render_page
from ..results.report import Report

_EPILOG = """\
RUN/report.html is one page that needs no network; RUN/report.md, .json and .png hold the same in short. Read are
  RUN/generate/SRC-TGT/generate-test.txt, of scripts/translate.sh or fairseq-generate --results-path
  RUN/*.log and RUN/checkpoints/*.log, of fairseq-train --log-file, in any --log-format
  RUN/checkpoints/checkpoint_best.pt (or checkpoint_last.pt), RUN/seconds.json, DATA/raw and DATA/bin
What is missing but for the checkpoint is left out, and the page says so. Of a language model, the page has
the perplexity on the test set in the place of translations.

examples:
  xmoe report runs/demo4 --data data/demo4
  xmoe report runs/lm --data data/lm/bin
  xmoe report runs/local --data data/local --checkpoint runs/local/checkpoint_last.pt --log first.log second.log
"""


# By these names in its JSON file, an earlier report is known.
_OWN = {"name", "moe_computation_saved", "directions", "layers"}


def main(argv: Sequence[str], open_model: Callable[[Path, Path, int], Model] = Model) -> None:
    """One page on a run: training curves, scores, where the capacity goes, translations token by token.

    Args:
        argv: the words after ``xmoe report``.
        open_model: makes a model of its checkpoint, its data and the tokens in a batch.

    Raises:
        UserError: an argument or a file is missing or refused.
    """
    args = _parser().parse_args(argv)
    _check(args)
    with locks.held(_page(args), file=True), _silent() if args.quiet else contextlib.nullcontext():
        finish_replacing(_page(args))
        if not args.force:
            _check_own(_files(_page(args)))
        checkpoint = args.checkpoint or find_checkpoint(args.run)
        model = open_model(checkpoint, args.data, args.max_tokens)
        if is_language_model(checkpoint):
            if args.task is not None:
                raise UserError(f"--task names directions: {checkpoint} is a language model, leave it out")
            report = build_language_report(args.run, model, args.log)
        else:
            report = build_report(args.run, args.task, model, args.log)
        paths = write_report(report, _page(args))
    if args.json:
        print(json_text(report.as_json(), "--json", indent=2), end="")
    elif not args.quiet:
        print("\n".join(printable(str(path)) for path in paths))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe report",
        description="One page on a run: training curves, scores, where the capacity goes, translations token by token.",
        epilog=_EPILOG,
    )
    parser.add_argument("run", type=file_path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--data",
        type=file_path,
        required=True,
        help="folder made by data_prep/prepare.sh, or the text of a language model",
    )
    parser.add_argument("--checkpoint", type=file_path, metavar="F", help="default: the best of the run, or its last")
    parser.add_argument("--log", type=file_path, nargs="+", metavar="F", help="logs of the training (default: RUN's)")
    parser.add_argument("--task", help="multilingual_NAME: demand exactly its directions")
    parser.add_argument("--out", type=file_path, metavar="F.html", help="the page; the other files are put beside it")
    parser.add_argument(
        "--max-tokens", type=bounded(int, 1, 10**9), default=4096, help="tokens in a batch of the expert measurement"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are no earlier report")
    parser.add_argument("--json", action="store_true", help="print what report.json holds")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.run.is_dir():
        raise UserError(f"there is no folder {args.run}: give the folder of a run")
    if not args.data.is_dir():
        raise UserError(f"there is no data folder {args.data}: give the folder made by data_prep/prepare.sh")
    if args.out is not None and args.out.suffix != ".html":
        raise UserError(f"--out {args.out} must end in .html")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {args.out.parent} for --out {args.out}: make it first")
    page = _page(args)
    check_writable(page.absolute().parent)
    check_no_folders(_files(page))


def _page(args: argparse.Namespace) -> Path:
    page: Path = args.out or args.run / "report.html"
    return page


def _files(page: Path) -> list[Path]:
    return [page, *(page.with_suffix(f".{ending}") for ending in ("md", "json", "png"))]


def _check_own(files: Sequence[Path]) -> None:
    """Makes sure that files to be replaced are of an earlier report, whose JSON tells.

    Raises:
        UserError: one of them is not, such as a ``README.md`` beside ``--out README.html``.
    """
    there = [path for path in files if os.path.lexists(path)]
    try:
        known = json.loads(read_file(files[2])).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        known = set()
    if there and not known >= _OWN:
        raise UserError(
            f"{there[0]} is there already, and not of an earlier report: give another --out, or --force to replace "
            f"{', '.join(path.name for path in there)}"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Sends the progress shown on standard error nowhere, but for errors, which come after."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def write_report(report: Report, page: Path) -> list[Path]:
    """Writes the page and, beside it, the same as .md, .json and .png; none of them on an error.

    Returns:
        Their paths.
    """
    paths = _files(page)
    with replacing_all(paths) as (new_page, new_markdown, new_data, new_picture):
        draw_report(report, new_picture)
        new_page.write_text(render_html(report), encoding="utf-8")
        new_markdown.write_text(render_page(report, paths[-1].name), encoding="utf-8")
        new_data.write_text(json_text(report.as_json(), str(paths[2]), indent=2), encoding="utf-8")
    return paths
