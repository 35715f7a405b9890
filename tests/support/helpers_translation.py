"""Made-up outputs of fairseq-generate, and what the sacrebleu program says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def generated(hypotheses: list[str], order: list[int] | None = None, sources: list[str] | None = None) -> str:
    """What fairseq-generate writes, in the order of its batches; without sources if none are given."""
    lines = ["2026-01-01 00:00:00 | INFO | fairseq_cli.generate | loading model(s)"]
    for index in order or reversed(range(len(hypotheses))):
        text = hypotheses[index]
        lines += [f"S-{index}\t__xx__ {sources[index]}"] if sources else []
        lines += [f"T-{index}\t<unk> target", f"H-{index}\t-0.53\t▁pieces {index}"]
        lines += [f"D-{index}\t{-0.53 if text else '-inf'}\t{text}", f"P-{index}\t-0.5 -0.6"]
    return "\n".join([*lines, "Generate test with beam=5: BLEU4 = 12.34, 50/20/9/4 (BP=1.000)", ""])


def write_output(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "generate-test.txt"
    path.write_bytes(text.encode())
    return path


def sacrebleu_program(reference: Path, plain: Path, tokenizer: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(plain), "-m", "bleu", "chrf"]
    command += ["--chrf-word-order", "2", "--tokenize", tokenizer, "--width", "12", "--format", "json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
