"""What ``xmoe score`` and ``xmoe sweep`` do with a language model: its perplexity is measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import locks
from ..common.outputs import check_no_folders, check_writable, replacing_all
from ..common.run_folder import default_out
from ..common.schema import json_text
from ..errors import UserError, printable
from ..evaluation.direction_dataset import origin
from ..evaluation.perplexity import PerplexityJob
from ..render.perplexity_tables import draw, render_markdown, render_tsv
from ..render.sweep_figure import save
from ..results.perplexity import PerplexitySweep
from ..tasks.contrast import OPTIONS

SAMPLE_BREAK_MODES = ("none", "complete", "complete_doc", "eos")
# Options of translating, by their defaults.
_TRANSLATING: dict[str, Any] = {
    **{"pairs": [], "lines": None, "beam": None, "lenpen": None, "max_len_b": None},
    **{"metrics": ["bleu", "chrf"], "tokenize": None, "lose": 0.5, "max_moe_flops": None},
    **dict.fromkeys(OPTIONS),
}


def add_cutting_options(parser: argparse.ArgumentParser) -> None:
    """Adds how the text of a language model is cut."""
    group = parser.add_argument_group("of a language model", "whose perplexity is measured, per token and per word")
    group.add_argument("--sample-break-mode", choices=SAMPLE_BREAK_MODES, help="how text is cut (default: as trained)")
    group.add_argument("--tokens-per-sample", type=int, metavar="N", help="tokens of a sample (default: as trained)")


def check_no_cutting_options(args: argparse.Namespace) -> None:
    """Refuses the options of `add_cutting_options` for a translation model.

    Raises:
        UserError: names the option.
    """
    for name in ("sample_break_mode", "tokens_per_sample"):
        if getattr(args, name) is not None:
            raise UserError(f"{_flag(name)} is for language models: {args.checkpoint} is none, leave it out")


def measure_perplexity(
    args: argparse.Namespace, data: Path, kind: str, values: Sequence[float | None], dial: str = "threshold"
) -> None:
    """Measures a language model, and writes and prints what was found.

    Args:
        args: of ``xmoe score`` or ``xmoe sweep``.
        data: folder of the text.
        kind: ``scores`` or ``sweep``, the stem of the files.
        values: of the routers' ``dial``; None is that of the training.
        dial: ``threshold`` or ``shift``.

    Raises:
        UserError: an argument is one of translating, or a file is refused.
    """
    for name, default in _TRANSLATING.items():
        if getattr(args, name, default) != default:
            raise UserError(f"{_flag(name)} is for translating: the perplexity of a language model is measured")
    if args.tokens_per_sample is not None and args.tokens_per_sample < 1:
        raise UserError(f"--tokens-per-sample {args.tokens_per_sample} is out of range: it must be at least 1")
    out = args.out or default_out(args.checkpoint, kind)
    check_writable(out)
    files = [out / f"{kind}.{ending}" for ending in ("md", "tsv", "png", "svg", "json")]
    check_no_folders(files)
    cutting = {name: getattr(args, name) for name in ("sample_break_mode", "tokens_per_sample")}
    with locks.held(out):
        subset = args.subset or "test"
        given = {name: value for name, value in cutting.items() if value is not None}
        job = PerplexityJob(args.checkpoint, data, subset, given, args.max_tokens or 4096, bool(args.fp16))
        points = [job.run(value, dial, args.quiet) for value in values]
        of = origin(args.checkpoint, data, subset)
        settings = {"file": str(args.checkpoint), "checkpoint": of["checkpoint"], "subset": subset}
        found = PerplexitySweep(args.checkpoint.stem, settings | job.settings, points, dial, of)
        with replacing_all(files) as (page, table, png, svg, plain):
            page.write_text(render_markdown(found), encoding="utf-8")
            table.write_text(render_tsv(found), encoding="utf-8")
            save(draw(found), png, svg)
            plain.write_text(json_text(found.as_json(), str(files[-1])), encoding="utf-8")
    if args.json:
        print(json_text(found.as_json(), "--json"), end="")
    else:
        print(render_markdown(found))
        print(printable(f"written: {out}"))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
