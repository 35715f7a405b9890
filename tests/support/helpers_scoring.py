"""Data folders and translators for the tests of scoring, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xmoe_fairseq.checkpoints.summary import Summary
from xmoe_fairseq.evaluation import score_job
from xmoe_fairseq.results.decoding import Decoding, ModelSize, Translated
from xmoe_fairseq.results.usage import LayerUsage

WORDS = "the a cat dog sees hears one two red green house tree and of in small big old new runs".split()
PAIRS = ("en-ca", "ca-en", "en-sw", "sw-en")


def sentence(language: str, number: int, words: int = 7) -> str:
    return " ".join(random.Random(f"{language}{number}").choices(WORDS, k=words))


def write_data(folder: Path, lines: int = 12, groups: str = "ca\thigh\t9\nsw\tlow\t1\n") -> Path:
    """Writes what scoring reads of a prepared folder."""
    (folder / "raw").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "MANIFEST.json").write_text(json.dumps({"benchmark": "local"}))
    (folder / "bin/lang_pairs.txt").write_text("".join(f"{pair}\n" for pair in PAIRS))
    (folder / "groups.tsv").write_text(groups)
    for language in ("ca", "sw"):
        for side in ("en", language):
            text = "".join(f"{sentence(side, line)}\n" for line in range(lines))
            (folder / f"raw/test.en-{language}.{side}").write_text(text)
    return folder


def write_checkpoint(path: Path, content: str = "one") -> Path:
    path.write_text(content)
    return path


Change = Callable[[str, int, str], str]


class FakeTranslator:
    """Changes references into translations; notes what it was asked for."""

    asked: list[str]
    change: Change
    made = 0

    def __init__(self, checkpoint: Path, data: Path, decoding: Decoding) -> None:
        type(self).made += 1
        self.data, self.decoding = data, decoding
        self.device = type("Device", (), {"type": "cpu"})()

    def at(self, threshold: float | None, shift: float | None = None) -> FakeTranslator:
        self.decoding = replace(self.decoding, moe_threshold=threshold, moe_shift=shift)
        return self

    def translate(self, source: str, target: str) -> Translated:
        pair = f"{source}-{target}"
        type(self).asked.append(pair)
        name = f"*.{target}" if target != "en" else f"en-{source}.en"
        stem = next((self.data / "raw").glob(f"{self.decoding.subset}.{name}"))
        lines = stem.read_text().split("\n")[:-1][: self.decoding.lines or None]
        hypotheses = [type(self).change(pair, number, line) for number, line in enumerate(lines)]
        return Translated(hypotheses, 2.0, 0, self.usage(source, target))

    def usage(self, source: str, target: str) -> list[LayerUsage]:
        tokens = 100 + 10 * (*PAIRS, f"{source}-{target}").index(f"{source}-{target}")
        received = round(tokens * (1 + 3 * (self.decoding.moe_threshold or 0.5)))
        return [LayerUsage("encoder.2", tokens, received, received, 0, 50.0, (received,) + (0,) * 3, (0,) * 4, tokens)]

    def size(self, usage: Sequence[LayerUsage]) -> ModelSize:
        (use,) = usage
        mean = use.received / use.tokens
        return ModelSize(1000, 600, 100 + 10 * mean, 10 * mean, mean, use.computation_saved)


def fake_translator(monkeypatch: pytest.MonkeyPatch, change: Change) -> type[FakeTranslator]:
    """Puts a translator without a model in the place of the real one."""
    fake: Any = type("Fake", (FakeTranslator,), {"asked": [], "change": staticmethod(change)})
    monkeypatch.setattr(score_job, "Translator", fake)
    summary = Summary("xmoe_transformer", 7, 1, 1000, 500, {}, "float32", False, {})
    monkeypatch.setattr(score_job, "summarize", lambda path: summary)
    return fake


def spoil(every: int, other: str = "wrong") -> Change:
    """Replaces the second word of every n-th translation."""

    def change(pair: str, number: int, line: str) -> str:
        words = line.split()
        if (number + len(pair)) % every == 0:
            words[1] = other
        return " ".join(words)

    return change
