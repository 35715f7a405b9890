"""BLEU and chrF++ of one direction against the raw reference, with sacreBLEU's signatures.

.. code-block:: bash

    python -m xmoe_fairseq.evaluation.score --generate RUN/generate/en-ca --reference DATA/raw/test.en-ca.ca --target ca
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sacrebleu.metrics import BLEU

from ..common.command_line import CommandParser, file_path
from ..common.files import read_lines, write_lines
from ..common.schema import json_text
from ..errors import printable
from ..metrics.corpus import CorpusScore, score
from ..stock_commands.generate import GENERATE_FILE
from .generate_output import read_hypotheses


def score_output(output: Path, reference: Path, target: str, tokenizer: str | None = None) -> tuple[CorpusScore, Path]:
    """Scores one output of ``fairseq-generate`` and writes its hypotheses as plain text.

    Args:
        output: the output file, or the folder given as ``--results-path``.
        reference: the raw reference. The ``T-`` lines of the output are never used: they come from the binarised
            data, where an unknown piece is lost.
        target: the language translated into, which selects the tokenizer and names the file ``hyp.TARGET``.
        tokenizer: BLEU's tokenizer, whatever the language.

    Returns:
        The figures, and the file beside the output that gives the same ones to the ``sacrebleu`` program.

    Raises:
        UserError: a file is missing, or the output does not have one hypothesis for each line of the reference.
    """
    if output.is_dir():
        output = output / GENERATE_FILE
    references = read_lines(reference, "reference")
    hypotheses = read_hypotheses(output, len(references))
    figures = score(hypotheses, references, target, tokenizer)
    plain = output.with_name(f"hyp.{target}")
    write_lines(plain, hypotheses)
    return figures, plain


def sacrebleu_command(reference: Path, plain: Path, tokenizer: str) -> str:
    """Writes the command that gives the same figures without this project."""
    files = f"sacrebleu {shlex.quote(str(reference))} -i {shlex.quote(str(plain))}"
    return f"{files} -m bleu chrf --chrf-word-order 2 --tokenize {tokenizer}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one direction's figures with their signatures."""
    parser = CommandParser(prog="python -m xmoe_fairseq.evaluation.score", description=main.__doc__)
    parser.add_argument(
        "--generate", type=file_path, required=True, help="--results-path of fairseq-generate, or the file"
    )
    parser.add_argument("--reference", type=file_path, required=True, help="raw reference, one sentence a line")
    parser.add_argument("--target", required=True, help="language translated into; selects BLEU's tokenizer")
    parser.add_argument("--tokenize", choices=BLEU.TOKENIZERS, help="another tokenizer for BLEU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    figures, plain = score_output(args.generate, args.reference, args.target, args.tokenize)
    if args.json:
        print(json_text({**asdict(figures), "target": args.target, "hypotheses": str(plain)}, "--json", 2), end="")
        return
    print(f"BLEU   {figures.bleu:6.2f}  {figures.bleu_signature}")
    print(f"chrF++ {figures.chrf:6.2f}  {figures.chrf_signature}")
    print(f"{figures.sentences} sentences; the same figures from")
    print(printable(f"  {sacrebleu_command(args.reference, plain, figures.tokenizer)}"))


if __name__ == "__main__":
    main()
