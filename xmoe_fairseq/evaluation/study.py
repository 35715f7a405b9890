"""One table from the reports of several models on the same data.

.. code-block:: bash

    python -m xmoe_fairseq.evaluation.study --study runs/study dense gshard xmoe
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import schema
from ..arguments import CommandParser, file_path
from ..benchmarks import BENCHMARKS
from ..errors import UserError
from .outputs import replacing
from .tables import plain

ENGLISH = {benchmark.english for benchmark in BENCHMARKS.values()}


@dataclass(frozen=True)
class Row:
    """What the table says of one model.

    Attributes:
        name: of the model, its folder's.
        parameters: of the model, embeddings counted once.
        out_of_english: mean BLEU of the directions from English.
        into_english: mean BLEU of the directions to English.
        bleu: mean BLEU of all directions.
        chrf: mean chrF++ of all directions.
        experts: experts computed for a token in an MoE layer, on average; 0 for a dense model.
    """

    name: str
    parameters: int
    out_of_english: float
    into_english: float
    bleu: float
    chrf: float
    experts: float


@dataclass(frozen=True)
class _Direction:
    """What is taken of a direction of ``report.json``."""

    OTHERS: ClassVar[bool] = True

    source: str
    target: str
    bleu: float
    chrf: float


@dataclass(frozen=True)
class _Layer:
    """What is taken of an MoE layer of ``report.json``."""

    OTHERS: ClassVar[bool] = True

    tokens: int
    received: int


@dataclass(frozen=True)
class _Report:
    """What is taken of ``report.json``."""

    OTHERS: ClassVar[bool] = True

    directions: Sequence[_Direction]
    layers: Sequence[_Layer]


def read_row(study: Path, name: str) -> Row:
    """Reads one model's report and checkpoint.

    Raises:
        UserError: the report or the checkpoint is missing or unreadable.
    """
    path = study / name / "report.json"
    if not path.exists():
        raise UserError(f"no report {path}: run xmoe report for it first")
    advice = "run xmoe report again"
    report = schema.build(_Report, schema.read_json(path, advice), str(path), advice)
    directions, layers = report.directions, report.layers
    ways = [{row.source in ENGLISH for row in directions}, {row.target in ENGLISH for row in directions}]
    if not all(True in way for way in ways):
        raise UserError(f"{path} lacks directions out of or into English: translate both, and {advice}")
    tokens = sum(layer.tokens for layer in layers)
    return Row(
        name=name,
        parameters=count_parameters(study / name / "checkpoints" / "checkpoint_last.pt"),
        out_of_english=_mean(row.bleu for row in directions if row.source in ENGLISH),
        into_english=_mean(row.bleu for row in directions if row.target in ENGLISH),
        bleu=_mean(row.bleu for row in directions),
        chrf=_mean(row.chrf for row in directions),
        experts=sum(layer.received for layer in layers) / tokens if tokens else 0.0,
    )


def count_parameters(checkpoint: Path) -> int:
    """Counts the parameters of a checkpoint, those that share memory once.

    Raises:
        UserError: there is no such file.
    """
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint {checkpoint}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["model"]
    sizes = {tensor.data_ptr(): tensor.numel() for name, tensor in state.items() if not name.endswith("version")}
    return sum(sizes.values())


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def render(rows: Sequence[Row]) -> str:
    """Writes the table in Markdown."""
    head = "| model | parameters | BLEU en → xx | BLEU xx → en | BLEU | chrF++ | experts a token |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {plain(row.name)} | {row.parameters / 1e6:.2f}M | {row.out_of_english:.2f} | {row.into_english:.2f} "
            f"| {row.bleu:.2f} | {row.chrf:.2f} | {f'{row.experts:.2f}' if row.experts else 'dense'} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes results.md of a study."""
    parser = CommandParser(prog="python -m xmoe_fairseq.evaluation.study", description=main.__doc__)
    parser.add_argument("--study", type=file_path, required=True, help="folder with one folder a model")
    parser.add_argument("models", nargs="+", help="the models' folders, in the order of the table")
    args = parser.parse_args(argv)
    table = render([read_row(args.study, name) for name in args.models])
    with replacing(args.study / "results.md") as path:
        path.write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
