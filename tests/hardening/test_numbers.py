"""Numbers on the command lines of xmoe: a number beyond sensible ends is refused, at once and in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers_scoring import fake_translator, spoil, write_checkpoint, write_data

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.sweep import MOST_THRESHOLDS, read_thresholds

COUNTS = ("0", "-1", "1.5", "nan", "1e3", "", "10**3", "9" * 30, "9" * 5000)
REALS = ("nan", "inf", "-inf", "1e400", "-1e300", "x", "", "0x10", "9" * 5000)
SCORE = ["score", "DATA", "--checkpoint", "c.pt"]
SWEEP = ["sweep", "--data", "DATA", "--checkpoint", "c.pt", "--thresholds", "0.5"]
ANALYZE = ["analyze", "--data", "DATA", "--checkpoint", "c.pt", "--out", "out"]
OPTIONS = [
    *((SCORE, name, COUNTS) for name in ("--beam", "--max-len-b", "--max-tokens", "--lines")),
    *((SCORE, name, REALS) for name in ("--lenpen", "--moe-threshold")),
    *((SWEEP, name, REALS) for name in ("--lose", "--max-moe-flops", "--lenpen")),
    (["compare", "a", "b"], "--samples", COUNTS),
    *((ANALYZE, name, COUNTS) for name in ("--max-tokens", "--min-count", "--tokens")),
    (ANALYZE, "--max-sentences", COUNTS[1:]),
    (["report", "DATA", "--data", "DATA"], "--max-tokens", COUNTS),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_translator(monkeypatch, spoil(3))
    write_data(tmp_path / "DATA")
    write_checkpoint(tmp_path / "c.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "option", "values"), OPTIONS, ids=[f"{words[0]} {name}" for words, name, _ in OPTIONS]
)
def test_options(words: list[str], option: str, values: tuple[str, ...], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    for value in values:
        with pytest.raises(UserError, match=rf"argument (\S+/)?{option}: .* (in \[|is out of range)") as error:
            cli.main([*words, f"{option}={value}", "--quiet"])
        assert str(error.value).isprintable() and len(str(error.value)) < 250
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1:1e-9", "0:1:1e-9 names more than 1,000 thresholds"),
        ("0:1:0.00001", "more than 1,000"),
        ("0:1:1e-999999", "more than 1,000"),
        ("0:1e999999:1", "is out of range"),
        ("0:1:1e-999999999", "is not FIRST:LAST:STEP|more than"),
        ("0:1:-0.1", "out of range"),
        ("0.1," * 10**5 + "2", "out of range"),
        (",".join(f"{one / 2000}" for one in range(1500)), "more than 1,000"),
        ("0.12345671,0.12345672", "two thresholds that are the same in six digits"),
        ("0:1e-7:1e-9", "is|two|more"),
        ("nan,0.5", "out of range"),
        ("9" * 10**5, "out of range"),
    ],
)
def test_thresholds_are_counted_before_they_are_listed(text: str, message: str) -> None:
    start = time.process_time()
    if text == "0:1e-7:1e-9":  # 101 thresholds whose six digits differ
        assert len(read_thresholds(text)) == 101
        return
    with pytest.raises(UserError, match=message) as error:
        read_thresholds(text)
    assert len(str(error.value)) < 250 and time.process_time() - start < 1


def test_as_many_thresholds_as_make_sense() -> None:
    assert len(read_thresholds("0.001:1:0.001")) == MOST_THRESHOLDS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "", "--checkpoint", "c.pt"], "argument DATA.RUN: the name is empty"),
        ([*SCORE, "--out", ""], "argument --out: the name is empty: was a variable not set"),
        ([*SCORE, "--out", " "], "argument --out: the name is empty"),
        ([*SCORE, "--out", "\udcff"], r"argument --out: the name '\\udcff' is not UTF-8"),
        ([*ANALYZE[:-2], "--out", ""], "argument --out: the name is empty"),
        (["report", "", "--data", "DATA"], "argument RUN: the name is empty"),
        (["compare", "a", ""], "argument A B: the name is empty"),
        (["sweep", *SWEEP[3:], "--data", ""], "argument --data: the name is empty"),
        (["sweep", "--data", "DATA", "--checkpoint", ".", "--thresholds", "0.5"], "there is no checkpoint ."),
    ],
)
def test_names_of_files(words: list[str], message: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        cli.main([*words, "--quiet"])
    assert str(error.value).isprintable() and sorted(folder.rglob("*")) == before
