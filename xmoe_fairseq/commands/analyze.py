"""``xmoe analyze``."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from ..analysis.tokens import text_tokens
from ..common import locks
from ..common.command_line import CommandParser, bounded, file_path
from ..common.outputs import check_writable
from ..common.schema import json_text
from ..errors import UserError, printable
from ..evaluation.direction_dataset import origin, total_sentences
from ..evaluation.routing_counts import Counts, count, places
from ..models.routing_recorder import stack_inputs
from ..render.analysis_folder import Analysis, analysis, write
from .text_options import add_text_options, load_model, read_text

_EPILOG = """\
A token's capacity is the number of experts that it takes or, in stratified layers, of strata that it passes (RC). The
model reads the references (teacher forcing); memory does not grow with the text.

written to --out, each figure as .png and .svg beside the .tsv of its numbers:
  directions, layers, distribution, positions   capacity by direction, layer, token and place in the sentence
  frequency, extremes                           capacity by frequency rank; the tokens that take most and least
  flops                                         computation of each layer, and what is saved
  experts_by_language_*, language_similarity_*  which languages share experts
  coselection                                   which experts are taken together
  languages.tsv, tokens.tsv, expert_load.tsv    by language, every token, every expert
  hidden_units.tsv                              hidden units above zero, in experts and in dense layers
  analysis.json                                 all but the longest tables

examples:
  xmoe analyze --checkpoint runs/demo4/checkpoints/checkpoint_best.pt --data data/demo4 --out runs/demo4/analysis
  xmoe analyze --checkpoint model.pt --data data/local --pairs en-de,de-en --subset valid --lines 500 --out de
"""
# The picture of more is higher than matplotlib draws.
MOST_TOKENS = 1000


def main(argv: Sequence[str]) -> None:
    """Where the capacity goes: experts per token by language, layer, token and position.

    Args:
        argv: the words after ``xmoe analyze``.

    Raises:
        UserError: an argument or a file is refused, or the model has no experts.
    """
    args = _parser().parse_args(argv)
    check_writable(args.out)
    with locks.held(args.out):
        _analyze(args)


def _analyze(args: argparse.Namespace) -> None:
    # Importing fairseq leaves the root logger at the level of debugging.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")  # fairseq's, not the user's
    start = time.monotonic()
    trained, chosen = load_model(args)
    model, task = trained.model, trained.task
    if not places(model):
        raise UserError(f"the model of {args.checkpoint} is dense: there are no experts to analyse")
    texts = read_text(trained, args)
    with tqdm(total=total_sentences(texts), desc="analyse", unit="sentence", disable=args.quiet) as progress:
        counts = count(model, texts, task.source_dictionary.pad(), progress)
    counts.untrained = chosen.untrained if chosen else ()
    found = analysis(counts, _words(model, counts), args.min_count, args.tokens)
    about = {
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
        "split": args.subset,
        "seconds": round(time.monotonic() - start, 1),
        "of": origin(args.checkpoint, args.data, args.subset),
    }
    paths = write(found, args.out, about)
    if args.json:
        print(json_text({**about, **found.as_json()}, "--json"), end="")
    elif not args.quiet:
        print("\n".join([*_lines(found), printable(f"{len(paths)} files in {args.out}")]))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="xmoe analyze",
        description="Collects what each MoE layer does with each token of real text, and draws it.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--checkpoint", type=file_path, required=True, metavar="FILE", help="of any architecture with experts"
    )
    parser.add_argument(
        "--data", type=file_path, required=True, metavar="DATA", help="folder made by data_prep/prepare.sh, or its bin/"
    )
    parser.add_argument("--out", type=file_path, required=True, metavar="DIR", help="folder for figures and tables")
    add_text_options(parser, "test", 4096, aliases={"--subset": "--split", "--lines": "--max-sentences"})
    parser.add_argument(
        "--min-count",
        type=bounded(int, 1, 10**9),
        default=10,
        metavar="N",
        help="occurrences that a token needs to be compared (default: 10)",
    )
    parser.add_argument(
        "--tokens",
        type=bounded(int, 1, MOST_TOKENS),
        default=20,
        metavar="N",
        help="tokens shown that take most, and least (default: 20)",
    )
    parser.add_argument("--json", action="store_true", help="print what analysis.json holds")
    parser.add_argument("--quiet", action="store_true", help="show no progress and print nothing but --json")
    return parser


def _words(model: Any, counts: Counts) -> dict[str, Sequence[str | None]]:
    languages = {language for pair in counts.directions for language in pair}
    return {stack: text_tokens(getattr(model, stack).dictionary, languages) for stack in stack_inputs(model)}


def _lines(found: Analysis) -> list[str]:
    """Says the most important in a few lines."""
    lines = []
    for stack, row in found.summary().items():
        passes = f", {row['passes']:.2f} strata (RC)" if found.capacity == "passes" else ""
        lines.append(
            f"{stack}: {row['experts']:.2f} experts per token{passes}; {row['saved_against_all']:.0%} of all experts' "
            f"FLOPs saved, {1 - row['saved_against_dense']:.2f} times a dense network's ({row['tokens']:,} tokens)"
            + ("" if row["positive_hidden"] is None else f"; {row['positive_hidden']:.0%} of hidden units positive")
        )
    return [*lines, *found.notes]
