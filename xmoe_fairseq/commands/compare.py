"""``xmoe compare``: differences between systems that ``xmoe score`` scored."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ..common.command_line import CommandParser, bounded, comma_list, file_path
from ..common.schema import json_text
from ..errors import UserError
from ..evaluation.compare import compare, read_systems
from ..render.compare_tables import RENDERERS

_EPILOG = """\
The folders are those that xmoe score wrote, of the same directions, test sets, metrics and tokenizers. Differences
are from the first one, with sacreBLEU's paired bootstrap for each direction, for the mean of the directions, and for
all sentences as one text. SACREBLEU_SEED sets another seed.

examples:
  xmoe compare scores/smoe scores/xmoe
  xmoe compare scores/dense scores/smoe scores/xmoe --latex > table.tex
  xmoe compare scores/smoe scores/xmoe --pairs en-de,de-en --json
"""


def main(argv: Sequence[str]) -> None:
    """Compares scored systems, with paired bootstrap.

    Args:
        argv: the words after ``xmoe compare``.

    Raises:
        UserError: a folder is refused, or cannot be compared with the first.
    """
    args = _parser().parse_args(argv)
    if len(args.folders) < 2:
        raise UserError("one system has nothing to be compared with: give two folders or more")
    systems = read_systems(args.folders, args.pairs)
    steps = len(systems[0].pairs) * len(systems[0].scores.metrics)
    with tqdm(total=steps, disable=args.quiet) as bar:
        comparison = compare(systems, args.samples, bar)
    if args.json:
        print(json_text(comparison.as_json(), "--json"), end="")
    else:
        print(RENDERERS["latex" if args.latex else "markdown"](comparison), end="")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe compare",
        usage="xmoe compare A B [C ...] [options]",
        description="Compares scored systems: quality with paired bootstrap, and what it costs.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "folders", type=file_path, nargs="+", metavar="A B", help="folders of results; A is the baseline"
    )
    parser.add_argument("--pairs", type=comma_list, default=[], metavar="SRC-TGT,...", help="directions (default: all)")
    parser.add_argument(
        "--samples",
        type=bounded(int, 1, 100_000),
        default=1000,
        metavar="N",
        help="draws of the bootstrap (default: 1000)",
    )
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    style.add_argument("--latex", action="store_true", help="print LaTeX tables for the package booktabs")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser
