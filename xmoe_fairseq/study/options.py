"""Options that name a study, for the commands that train and measure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .plan import read_plan, split
from .runs import Study


def check_range(option: str, value: int, most: int) -> None:
    """Refuses a number of what there must be some of, but not any number.

    Raises:
        UserError: it is less than 1, or more than ``most``.
    """
    if not 1 <= value <= most:
        shown = str(value) if abs(value) < 10**30 else "with so many digits"
        raise UserError(f"{option} {shown} is out of range: it must be in [1, {most}]")


def read_seeds(words: Sequence[str]) -> list[int]:
    try:
        seeds = [int(word) for word in words]
    except ValueError as error:
        raise UserError(f"--seeds {','.join(words)} is refused: give whole numbers, such as 1,2,3") from error
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0 or max(seeds) >= 2**32:  # NumPy takes no others
        raise UserError(f"--seeds {','.join(words)[:100]} is refused: give each once, in [0, 2^32), such as 1,2,3")
    return seeds


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all runs of a study have in common."""
    parser.add_argument("--data", type=Path, required=True, metavar="DATA", help="folder made by data_prep/prepare.sh")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs: a folder for each row and seed")
    parser.add_argument("--results", type=Path, metavar="DIR", help="small results, tables, pictures (default: --out)")
    parser.add_argument(
        "--rows", type=Path, default=Path("configs/study/rows.yaml"), metavar="FILE", help="rows and claims"
    )
    parser.add_argument("--updates", type=int, required=True, metavar="N", help="training steps of a run")
    parser.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses in the search (default: 4)")
    parser.add_argument("--train", default="", metavar="WORDS", help="more words of fairseq-train, for all runs")


def read_study(args: argparse.Namespace) -> Study:
    """Gathers what all runs have in common.

    Raises:
        UserError: a number is out of range, or the rows are refused.
    """
    for name, most in (("updates", 10**9), ("beam", 1000)):
        check_range(f"--{name}", getattr(args, name), most)
    split(args.train, "--train")
    return Study(
        rows=args.rows,
        plan=read_plan(args.rows),
        data=args.data,
        out=args.out,
        results=args.results or args.out,
        updates=args.updates,
        beam=args.beam,
        more=args.train,
    )
