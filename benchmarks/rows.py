"""What the benchmarks share: rows of ratios, the table, the JSON file, timing side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from xmoe_fairseq.common.outputs import replacing


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    Attributes:
        case: what was measured against what.
        ratio: the median.
        low: the lower quartile of the rounds.
        high: the upper quartile.
        goal: what the ratio should be, such as ``<= 1.15``; empty if there is none.
    """

    case: str
    ratio: float
    low: float
    high: float
    goal: str = ""

    @property
    def met(self) -> str:
        """Returns whether the ratio reaches the goal."""
        if not self.goal:
            return ""
        sign, value = self.goal.split()
        return "yes" if (self.ratio <= float(value) if sign == "<=" else self.ratio >= float(value)) else "no"


def parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=output_file, metavar="FILE", help="write the rows to this file, too")
    made.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    return made


def output_file(name: str) -> Path:
    """Reads the name of a file to write; that its folder is missing should be said before minutes are spent."""
    path = Path(name)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} for {path.name}: make it first")
    return path


def finish(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Prints the rows as a Markdown table and writes them to ``--json``; goals are those of the full sizes."""
    rows = write(rows, args)
    print(f"\n{machine(args.device)}\n\n| case | ratio | quartiles | goal | met |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.case} | {row.ratio:.2f} | {row.low:.2f}-{row.high:.2f} | {row.goal} | {row.met} |")


def write(rows: Sequence[Row], args: argparse.Namespace) -> Sequence[Row]:
    """Writes what there is so far to ``--json``, and gives the rows as they are shown."""
    if args.quick:
        rows = [replace(row, goal="") for row in rows]
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def machine(device: str) -> str:
    """Says on what the figures were measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}"


def seconds(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Times the runs one after the other, round by round, so that what disturbs the machine disturbs all of them.

    On a GPU a round is ten calls, which the host starts without waiting, as in training.
    """
    calls = 10 if device == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = _now(device)
            for _ in range(calls):
                run()
            if number:  # the first round warms up
                times[name].append((_now(device) - start) / calls)
    return times


def ratio(case: str, over: Sequence[float], under: Sequence[float], goal: str = "") -> Row:
    """Divides the times of two runs, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(case, middle, low, high, goal)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
