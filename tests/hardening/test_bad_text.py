"""``data_prep/prepare.sh`` with text and options that nobody can use: one line, nothing half-written, no waiting."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT
from helpers_commands import heed_interrupts
from helpers_prepare import (
    SIZES,
    Edit,
    arguments,
    assert_nothing_half_written,
    error_of,
    rewrite,
    snapshot,
    write_input,
)

from xmoe_fairseq.data_prep import io_utils, learn_spm, prepare
from xmoe_fairseq.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, as a user would give it."""
    return write_input(tmp_path_factory.mktemp("source") / "input")


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is prepared from it."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.main(arguments(source, out))
    return out


# --- Text


def both(name: str, content: Callable[[str], bytes]) -> Edit:
    """Replaces both sides of a pair."""
    return lambda folder: [(folder / f"{name}.{side}").write_bytes(content(side)) for side in ("en", "de")]


def instead(name: str, make: Callable[[Path], object]) -> Edit:
    """Puts something else in the place of a file."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def lines(end: bytes, count: int = SIZES["train"]) -> Callable[[str], bytes]:
    return lambda side: b"".join(f"{side} red green {i}".encode() + end for i in range(count))


HUGE = b"a" * (io_utils.LONGEST_LINE + 1)
TEXTS: dict[str, tuple[Edit, list[str]]] = {
    "lines end with CR": (both("train.de-en", lines(b"\r")), ["line 1", "199 carriage returns", "CR alone"]),
    "few lines end with CR": (both("valid.de-en", lines(b"\r", 3)), ["valid.de-en", "2 carriage returns"]),
    "some lines end with CR": (
        both("train.de-en", lambda side: lines(b"\n")(side) + lines(b"\r", 40)(side)),
        ["line 201", "carriage returns", "convert"],
    ),
    "UTF-16": (rewrite("valid.de-en.de", lines(b"\n")("de").decode().encode("utf-16-le")), ["NUL bytes", "UTF-16"]),
    "UTF-16 with its mark": (rewrite("valid.de-en.de", "gut\n".encode("utf-16")), ["valid.de-en.de, line 1"]),
    "not written to its end": (rewrite("valid.de-en.de", b"gut\n" + bytes(4096)), ["line 2", "4096 NUL bytes"]),
    "line without an end": (rewrite("valid.de-en.de", b"gut\n" + HUGE), ["valid.de-en.de, line 2", "more than"]),
    "line without an end, packed": (
        rewrite("valid.en-zu.zu.gz", gzip.compress(HUGE * 8)),
        ["valid.en-zu.zu.gz, line 1", "more than 1048576 bytes"],
    ),
    "named pipe": (instead("train.de-en.de", os.mkfifo), ["train.de-en.de is a named pipe"]),
    "named pipe, packed": (instead("train.en-zu.zu.gz", os.mkfifo), ["train.en-zu.zu.gz is a named pipe"]),
    "device": (instead("train.de-en.de", lambda path: path.symlink_to("/dev/zero")), ["train.de-en.de is a device"]),
    "folder": (instead("train.de-en.de", Path.mkdir), ["train.de-en.de is a folder"]),
    "link to itself": (
        instead("train.de-en.de", lambda path: path.symlink_to(path.name)),
        ["train.de-en.de", "symbolic links"],
    ),
    "link to nothing": (
        instead("train.de-en.de", lambda path: path.symlink_to("nothing")),
        ["train.de-en.de", "No such file"],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_none_is_named(case: str, tmp_path: Path) -> None:
    edit, parts = TEXTS[case]
    message = error_of(*arguments(write_input(tmp_path / "in", edit), tmp_path / "out"))
    assert all(part in message for part in parts), message
    assert_nothing_half_written(tmp_path / "out")


def test_line_ends_that_are_doubled_are_line_ends(tmp_path: Path) -> None:
    folder = write_input(tmp_path / "in", both("valid.de-en", lines(b"\r\r\n", 6)))
    prepare.main(arguments(folder, tmp_path / "out"))
    assert (tmp_path / "out/raw/valid.en-de.en").read_bytes() == lines(b"\n", 6)("en")


def test_what_is_kept_inside_lines_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_input(tmp_path / "in", both("valid.de-en", lambda side: b"a\rb\nc\0d\ne\nf\n"))
    prepare.main(arguments(folder, tmp_path / "out"))
    assert "kept as text, inside lines: 2 carriage returns, 2 NUL bytes" in capsys.readouterr().out


# --- Options


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--vocab-size", "99999999999999999999"], "--vocab-size 99999999999999999999: give at most 10000000"),
        (["--vocab-size", "2147483648"], "give at most 10000000"),
        (["--vocab-size", "-1"], "give at least 300"),
        (["--vocab-size", "9" * 5000], "invalid int value"),
        (["--seed", "9" * 40], "give at most"),
        (["--max-chars", "-1"], "give at least 1, or 0 for no limit"),
        (["--max-pieces", "9" * 30], "give at most"),
        (["--max-ratio", "nan"], "--max-ratio nan: give"),
        (["--max-ratio", "inf"], "--max-ratio inf: give at most"),
        (["--max-ratio", "0.5"], "give at least 1, or 0 for no limit"),
        (["--out", ""], "--out is empty"),
        (["--input", ""], "--input is empty"),
        (["--source", ""], "--source is empty"),
        (["--opus-corpora", ""], "--opus-corpora is empty"),
        (["--out", "gr\udcfcn"], r"--out gr\udcfcn: not UTF-8"),
    ],
)
def test_options_out_of_range(more: list[str], part: str, source: Path, tmp_path: Path) -> None:
    message = error_of(*arguments(source, tmp_path / "out", *more))
    assert part in message and len(message) < 700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", SIZES)
def test_more_lines_than_can_be_generated(split: str, tmp_path: Path) -> None:
    message = error_of("--benchmark", "demo4", "--out", str(tmp_path / "out"), f"--{split}", "999999999999")
    assert f"--{split} 999999999999: give at most 1000000" in message
    assert not list(tmp_path.iterdir())


def nllb(*more: str) -> str:
    return error_of("--benchmark", "m15", "--source", "drive", "--out", "never-made", *more)


@pytest.mark.parametrize(
    "url", ["example.org/m15.zip", "http://[::1", "http://", "https:///x", "gopher://a/b", "http://a:b/c", "http://a b"]
)
def test_addresses_that_are_none(url: str) -> None:
    assert f"--url {url}: no address" in nllb("--url", url)


@pytest.mark.parametrize("value", ["0", "g" * 64, "0" * 63, "drive=" + "0" * 65])
def test_checksums_that_are_none(value: str) -> None:
    assert "a checksum has 64 digits" in nllb("--sha256", value)


@pytest.mark.parametrize("option", ["url", "archive", "sha256"])
def test_replacements_that_are_empty(option: str) -> None:
    assert f"--{option} is empty" in nllb(f"--{option}", "")
    assert "nothing follows the equals sign" in nllb(f"--{option}", "drive=")


# --- A folder that was prepared before


@pytest.fixture
def out(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "out", symlinks=True))


def record(stage: str, change: Callable[[dict], object]) -> Edit:
    """Edits the record of a stage."""

    def edit(out: Path) -> None:
        path = out / stage / ".stage.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def text(name: str, content: str) -> Edit:
    return lambda out: (out / name).write_text(content)


RECORDS: dict[str, Edit] = {
    "no object": text("spm/.stage.json", "[]"),
    "empty object": text("spm/.stage.json", "{}"),
    "a number": text("bin/.stage.json", "1" * 5000),
    "deep": text("bin/.stage.json", "[" * 100_000),
    "cut off": text("raw/.stage.json", '{"parameters": {'),
    "not UTF-8": lambda out: (out / "raw/.stage.json").write_bytes(b'{"parameters": "\xff"}'),
    "without lines": record("raw", lambda content: content.pop("lines")),
    "without a pair's lines": record("raw", lambda content: content["lines"].pop("train.en-zu")),
    "lines that are no numbers": record("raw", lambda content: content["lines"].update({"train.en-zu": "many"})),
    "without files": record("bin", lambda content: content.update(files={})),
    "without one file": record("bin", lambda content: content["files"].pop("spm.model")),
    "a file of elsewhere": record("bin", lambda content: content["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
    "a file that is none": record("spm", lambda content: content["files"].update({"spm.model": 5})),
    "parameters that are none": record("spm", lambda content: content.update(parameters=None)),
    "another key": record("spm", lambda content: content.update(piece=1)),
}


@pytest.mark.parametrize("case", RECORDS)
def test_damaged_records_are_named(case: str, source: Path, out: Path) -> None:
    RECORDS[case](out)
    before = snapshot(out)
    message = error_of(*arguments(source, out))
    assert ".stage.json" in message and "delete" in message, message
    assert snapshot(out) == before


@pytest.mark.parametrize("content", ['{"benchmark": "loc', "", "[]", "{}", '{"benchmark": "m4"}', "\0" * 100])
def test_damaged_manifest_is_made_anew(
    content: str, prepared: Path, source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "MANIFEST.json").write_text(content)
    prepare.main(arguments(source, out))
    assert snapshot(out) == snapshot(prepared)
    assert "MANIFEST.json is damaged or was changed: rewritten" in capsys.readouterr().out


def test_manifest_that_is_no_file(source: Path, out: Path) -> None:
    (out / "MANIFEST.json").unlink()
    os.mkfifo(out / "MANIFEST.json")
    assert "MANIFEST.json is a named pipe" in error_of(*arguments(source, out))


def same_size(path: Path) -> None:
    content = path.read_bytes()
    first, rest = content.split(b"\n", 1)
    path.write_bytes(b"Z" * len(first) + b"\n" + rest)


@pytest.mark.parametrize(("stage", "name"), [("raw", "train.en-de.de"), ("raw", "test.en-zu.en"), ("spm", "dict.txt")])
@pytest.mark.parametrize("removed", [["spm", "bin"], ["bin"]])
def test_nothing_is_made_of_files_that_were_changed(
    stage: str, name: str, removed: list[str], source: Path, out: Path
) -> None:
    if stage in removed:
        stage, name = "raw", "valid.en-de.en"
    same_size(out / stage / name)
    for other in removed:
        shutil.rmtree(out / other)
    before = snapshot(out)
    message = error_of(*arguments(source, out))
    assert f"{name} is missing or was changed" in message and f"delete {out / stage}" in message
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["raw.tmp", "bin.tmp"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.parent), lambda path: path.write_text("mine")])
def test_temporary_name_that_is_taken(name: str, make: Callable[[Path], object], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out / name)
    assert f"{name} is no folder that this program left: remove it" in error_of(*arguments(source, out))
    assert os.path.lexists(out / name) and not (out / "MANIFEST.json").exists()


@pytest.mark.parametrize("stage", ["raw", "spm", "bin"])
def test_stage_that_is_a_link_to_nothing(stage: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / stage).symlink_to("nothing")
    assert f"{stage} was not made by this program" in error_of(*arguments(source, tmp_path / "out"))


# --- Interruptions


def test_interruption_while_a_vocabulary_is_learned() -> None:
    def interrupted() -> object:
        yield "one line"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_spm.train(interrupted(), 2, 300)


def test_text_without_pieces_is_one_line() -> None:
    with pytest.raises(UserError, match="SentencePiece cannot learn"):
        learn_spm.train(iter([""]), 1, 300)


def test_interruption_is_one_line(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "data_prep/prepare.sh"), "--benchmark", "demo4", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, preexec_fn=heed_interrupts, text=True, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/raw.tmp").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.rstrip().split("\n")[-1] == "xmoe_fairseq: interrupted: run the same command again to resume"
    assert not (tmp_path / "out").exists()
