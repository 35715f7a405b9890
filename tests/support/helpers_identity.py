"""Small data folders of as many pieces each, but other ones; every command that reads a checkpoint with its data."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from fairseq_cli import generate, interactive, validate
from helpers import ROOT

from xmoe_fairseq import cli
from xmoe_fairseq.data_prep import prepare

PAIRS = ("de", "zu")


def write_text(folder: Path, letters: str) -> Path:
    """Writes a small corpus of made-up words in some letters."""
    folder.mkdir(parents=True)
    for language in PAIRS:
        for split, lines in (("train", 120), ("valid", 6), ("test", 10)):
            for side in ("en", language):
                draw = random.Random(f"{language}{split}{side}")
                text = [" ".join("".join(draw.choices(letters, k=3)) for _ in range(5)) for _ in range(lines)]
                (folder / f"{split}.en-{language}.{side}").write_text("".join(f"{line}\n" for line in text))
    return folder


def prepared(folder: Path, letters: str) -> Path:
    """Prepares a small corpus in some letters."""
    text = write_text(folder / "text", letters)
    prepare.main(["--benchmark", "local", "--input", str(text), "--out", str(folder / "data"), "--vocab-size", "310"])
    return folder / "data"


def program(main: Any, *words: str | Path) -> None:
    """Runs one of fairseq's programs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, words)])
        main()


def generate_words(data: Path, checkpoint: Path, *more: str | Path) -> list[str | Path]:
    model = ("--bpe", "sentencepiece_bytes", "--sentencepiece-model", data / "bin/spm.model")
    task = (
        data / "bin",
        "--user-dir",
        ROOT / "xmoe_fairseq",
        "--task",
        "multilingual_local",
        "--cpu",
        "--num-workers",
        "0",
    )
    return [
        *task,
        "--source-lang",
        "en",
        "--target-lang",
        "de",
        "--path",
        checkpoint,
        "--max-len-b",
        "3",
        *model,
        *more,
    ]


# Each with the folder of the data, the checkpoint, and the folder to write.
COMMANDS: dict[str, Any] = {
    "generate": lambda data, model, out: program(generate.cli_main, *generate_words(data, model)),
    "interactive": lambda data, model, out: program(interactive.cli_main, *generate_words(data, model)),
    "validate": lambda data, model, out: program(
        validate.cli_main, *generate_words(data, model)[:8], "--path", model, "--max-tokens", "400"
    ),
    "score": lambda data, model, out: cli.main(
        ["score", str(data), "--checkpoint", str(model), "--out", str(out), "--quiet"]
    ),
    "sweep": lambda data, model, out: cli.main(
        ["sweep", "--data", str(data), "--checkpoint", str(model), "--out", str(out), "--thresholds", "0.5", "--quiet"]
    ),
    "analyze": lambda data, model, out: cli.main(
        ["analyze", "--data", str(data), "--checkpoint", str(model), "--out", str(out), "--quiet"]
    ),
    "report": lambda data, model, out: cli.main(
        ["report", str(out.parent), "--data", str(data), "--checkpoint", str(model), "--quiet"]
    ),
    "info": lambda data, model, out: cli.main(
        [
            "info",
            "--arch",
            "xmoe_transformer_tiny",
            "--vocab",
            "310",
            "--checkpoint",
            str(model),
            "--data",
            str(data / "bin"),
        ]
    ),
}
