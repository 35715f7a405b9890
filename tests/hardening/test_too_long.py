"""Sentences that are longer than the model's positions or than a batch; what fairseq-interactive reads."""

from __future__ import annotations

import io
import logging
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fairseq_cli import generate, interactive, validate
from helpers_training import MODEL, Run, train

from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.stock_commands.interactive import buffered_read

LINES = 8
LONG = 3  # the line of valid and test, counted from 0, that no model can read
WORDS = ("red", "green", "big", "dog", "cat", "house")


def write_text(folder: Path) -> Path:
    """Writes a small corpus with a long line on both sides in test and valid."""
    folder.mkdir()
    for split, count in (("train", 120), ("valid", LINES), ("test", LINES)):
        for side in ("en", "de"):
            draw = random.Random(f"{split}{side}")
            text = [" ".join(draw.choices(WORDS, k=4)) for _ in range(count)]
            if split != "train":
                text[LONG] = " ".join(draw.choices(WORDS, k=1100))
            (folder / f"{split}.en-de.{side}").write_text("".join(f"{line}\n" for line in text))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    text = str(write_text(folder / "text"))
    prepare.main(["--benchmark", "local", "--input", text, "--out", str(folder / "data"), "--vocab-size", "300"])
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(data / "bin", tmp_path_factory.mktemp("trained"), 2, *MODEL)


@pytest.fixture(scope="module")
def checkpoint(trained: Run) -> Path:
    return trained.save / "checkpoint_last.pt"


class Warned(logging.Handler):
    """Notes what the project and fairseq warn of; programs replace the root's handlers, and pytest's with them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


@pytest.fixture
def warned() -> Iterator[Warned]:
    handler = Warned()
    loggers = [logging.getLogger(name) for name in ("fairseq", "xmoe_fairseq")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


def said(capsys: pytest.CaptureFixture[str], main: Any, *words: str | Path) -> str:
    """Runs one of fairseq's programs in this process and returns what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, words)])
        main()
    return capsys.readouterr().out


def words(data: Path, checkpoint: Path, *more: str | Path) -> list[str | Path]:
    return [
        *(data / "bin", "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--cpu", "--num-workers", "0"),
        *("--source-lang", "en", "--target-lang", "de", "--path", checkpoint, "--beam", "2", "--max-len-b", "3"),
        *("--bpe", "sentencepiece_bytes", "--sentencepiece-model", data / "bin/spm.model", *more),
    ]


def translations(output: str) -> dict[int, str]:
    """Gives the text of each D- line by its number."""
    found = re.findall(r"^D-(\d+)\t[^\t]*\t(.*)$", output, re.MULTILINE)
    assert len({number for number, _ in found}) == len(found)
    return {int(number): text for number, text in found}


# --- Training and validation


def test_training_goes_on_without_lines_that_are_too_long(trained: Run) -> None:
    # Both directions of the pair have the line.
    assert "2 samples have invalid sizes and will be skipped, max_positions=(1024, 1024)" in trained.said
    assert (trained.save / "checkpoint_best.pt").exists()


def test_validation_measures_the_other_lines(
    data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], warned: Warned
) -> None:
    words = ("--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--cpu", "--num-workers", "0")
    for direction in ((), ("--source-lang", "en", "--target-lang", "de")):
        warned.text = ""
        program = (data / "bin", *words, "--path", checkpoint, "--max-tokens", "400", *direction)
        said(capsys, validate.cli_main, *program)
        assert f"{1 if direction else 2} samples have invalid sizes and will be skipped" in warned.text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--max-tokens", "5"], ["no line of train is left", "which is 5", " pieces"]),
        (["--max-tokens-valid", "5"], ["--max-tokens-valid) is 5, but line ", " of valid, ", "give at least"]),
        (["--max-tokens", "0"], ["is 0: give at least 1"]),
        (["--max-tokens", "-7"], ["is -7: give at least 1"]),
        (["--batch-size", "0"], ["--batch-size 0 is out of range: it must be at least 1"]),
        (["--required-batch-size-multiple", "0"], ["--required-batch-size-multiple 0 is out of range"]),
    ],
)
def test_batches_smaller_than_a_sentence_are_one_line(
    options: list[str], parts: list[str], data: Path, tmp_path: Path
) -> None:
    run = train(data / "bin", tmp_path / "run", 2, *MODEL, *options, check=False)
    assert run.process.exitcode == 1 and "Traceback" not in run.said
    message = run.said.rstrip().split("\n")[-1]
    assert message.startswith("xmoe_fairseq: error: ") and all(part in message for part in parts), message
    assert not list(run.save.glob("*.pt")) and "begin training epoch" not in run.said  # nothing was trained before


# --- Translation


def test_every_line_of_a_test_set_has_a_translation(
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    warned: Warned,
) -> None:
    said(capsys, generate.cli_main, *words(data, checkpoint, "--results-path", tmp_path / "out"))
    found = translations((tmp_path / "out/generate-test.txt").read_text())
    assert sorted(found) == list(range(LINES)) and found[LONG] == ""
    assert all(found[number] for number in found.keys() - {LONG})
    assert f"1 sentences are too long, the first, line {LONG + 1} of test, en-de, has" in warned.text
    # The others are as they are where stock fairseq leaves that one out.
    stock = said(capsys, generate.cli_main, *words(data, checkpoint, "--skip-invalid-size-inputs-valid-test"))
    assert translations(stock) == {number: text for number, text in found.items() if number != LONG}


@pytest.mark.parametrize("more", [["--nbest", "2"], ["--print-alignment", "hard"], ["--max-tokens", "40"]])
def test_what_is_printed_of_a_line_that_is_too_long(
    more: list[str], data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = said(capsys, generate.cli_main, *words(data, checkpoint, *more))
    assert re.findall(rf"^D-{LONG}\t.*", output, re.MULTILINE) == [f"D-{LONG}\t-inf\t"]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--max-tokens", "3"], " of test, en-de, has "),
        (["--max-tokens", "0"], "is 0: give at least 1"),
        (["--constraints"], "--constraints: the text has none"),
    ],
)
def test_translation_of_nothing_is_one_line(
    more: list[str], part: str, data: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        said(capsys, generate.cli_main, *words(data, checkpoint, *more))
    assert part in caught.value.message


# --- fairseq-interactive

# A byte order mark, a carriage return inside, no UTF-8, a line that is too long, a blank one, no end.
TYPED = b"\xef\xbb\xbfred dog\nbig\rcat\ngr\xfcn house\n" + b"cat " * 50_000 + b"\n\nred\xe2\x80\xa8cat\nlast"


@pytest.mark.parametrize("more", [[], ["--buffer-size", "3", "--max-tokens", "30"]])
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_as_many_translations_as_lines(
    source: str,
    more: list[str],
    data: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    warned: Warned,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "typed").write_bytes(TYPED)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TYPED), encoding="utf-8", errors="surrogateescape"))
    given = ["--input", tmp_path / "typed"] if source == "file" else []
    output = said(capsys, interactive.cli_main, *words(data, checkpoint, *given, *more))
    found = translations(output)
    assert sorted(found) == list(range(7)) and found[3] == ""
    first = re.search(r"^S-0\t(.*)$", output, re.MULTILINE)
    assert first and "<0xEF>" not in first[1]
    assert "line 3 of the input is not UTF-8" in warned.text
    assert "1 sentences are too long, the first, a line of the input has" in warned.text


def test_lines_come_in_groups(tmp_path: Path) -> None:
    (tmp_path / "typed").write_bytes(b"a \n\xffb\n" + b"x" * (3 << 20) + b"\nc\r\nd")
    groups = list(buffered_read(str(tmp_path / "typed"), 2))
    assert [[line[:2] for line in group] for group in groups] == [["a", "\ufffdb"], ["xx", "c"], ["d"]]


@pytest.mark.parametrize("path", ["", "nothing", "."])
def test_input_that_cannot_be_read_is_one_line(path: str) -> None:
    with pytest.raises(UserError, match=r"--input .* cannot be read: "):
        list(buffered_read(path, 1))
