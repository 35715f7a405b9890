"""Small data folders of as many pieces each, but other ones."""

from __future__ import annotations

import random
from pathlib import Path

import prepare

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
