"""JSON that xmoe's commands read: whatever is in it, a command takes it or refuses it in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_scoring import fake_translator, spoil, write_checkpoint, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe_fairseq import cli
from xmoe_fairseq.common.schema import json_text, parse_json, read_json
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.build_report import read_seconds

QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refused(call: Callable[[], object], message: str = "") -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert str(error.value).isprintable() and len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is no number"),
        ('{"a": [1, -Infinity]}', "-Infinity is no number"),
        ("1e999", "1e999 is no number"),
        ("9" * 5000, "a number has 5000 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "the name 'a' stands twice"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[" * 200 + "]" * 200, "it is nested too deeply"),
        ('{"a":' * 100_000, "it is nested too deeply"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        ("", "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ("\ufeff{}", "is not JSON"),
    ],
)
def test_json_is_read_as_its_standard_has_it(text: str, message: str, tmp_path: Path) -> None:
    refused(lambda: parse_json(text, "f.json", "restore it"), f"f.json .*{message}.*; restore it$")
    (tmp_path / "f.json").write_text(text, encoding="utf-8")
    refused(lambda: read_json(tmp_path / "f.json", "restore it"), message)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("pipe", "is no regular file; restore it"),
        ("folder", "is no regular file"),
        ("loop", "cannot read .*loop: Too many levels"),
        ("bytes", "is not UTF-8"),
        ("none", "cannot read .*none: No such file"),
    ):
        refused(lambda name=name: read_json(tmp_path / name, "restore it"), message)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
@QUICK
def test_what_is_written_is_read(values: Any) -> None:
    try:
        text = json_text(values, "f.json")
    except UserError as error:
        assert "NaN or infinite" in error.message
        return
    assert text.replace("\n", "").isprintable() or not json.dumps(values, ensure_ascii=False).isprintable()
    assert not any(mark in text for mark in "\x1b\x7f\x9b\u202e")
    try:
        assert parse_json(text, "f.json", "") == values
    except UserError as error:
        assert "digits" in error.message or "surrogates" in error.message


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data``, ``c.pt`` and two systems scored on it, ``a`` and ``b``."""
    folder = tmp_path_factory.mktemp("scored")
    write_data(folder / "data")
    write_checkpoint(folder / "c.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_translator(monkeypatch, spoil(3))
        for name in ("a", "b"):
            score(folder, "--out", folder / name)
    return folder


def score(folder: Path, *more: str | Path) -> None:
    cli.main(["score", str(folder / "data"), "--checkpoint", str(folder / "c.pt"), "--quiet", *map(str, more)])


def compare(folder: Path) -> None:
    cli.main(["compare", str(folder / "a"), str(folder / "b"), "--quiet", "--samples", "5"])


def change(file: Path, place: tuple[Any, ...], value: Any) -> None:
    """Puts a value at a place of a JSON file; an empty place is the whole."""
    if not place:
        file.write_text(json.dumps(value))
        return
    values = json.loads(file.read_text())
    inner = values
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("rows",), [], "has no directions"),
        (("rows", 0, "scores"), {"ter": 1.0}, "has other metrics of en-ca than|has the metrics|has other metrics"),
        (("tokenize",), "bogus", "has the tokenizer 'bogus'"),
        (("model", "parameters"), "many", "model.parameters is 'many', it must be a whole number"),
        (("model", "flops"), 10**400, "a number has 401 digits"),
        (("rows", 0, "source"), "../../x", "is no direction"),
        (("rows", 0, "target"), "en", "has no|No such file|twice"),
        (("rows", 1, "source"), "en\n", "is no direction"),
        (("averages",), [], "has no directions"),
        (("averages", 0, "scores"), {}, "other metrics of its means"),
        (("settings",), 5, "settings is 5"),
        (("rows", 0, "scores", "bleu"), float("nan"), "NaN is no number"),
        ((), [], "holds no JSON object"),
        ((), {}, "name is missing"),
    ],
)
def test_scores(scored: Path, tmp_path: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    folder = shutil.copytree(scored, tmp_path / "copy")
    for name in ("a", "b"):
        change(folder / name / "scores.json", place, value)
    refused(lambda: compare(folder), message)


@pytest.mark.parametrize(
    ("file", "place", "value", "message"),
    [
        ("a/en-ca/about.json", ("seconds",), "x", "seconds is 'x', it must be a number"),
        ("a/en-ca/about.json", ("usage", 0, "received"), "x", r"usage\[0\].received is 'x'"),
        ("a/en-ca/about.json", ("usage", 0, "tokens"), 0, "says of encoder.2 what no layer does"),
        ("a/en-ca/about.json", ("usage", 0, "expert_load"), [], "what no layer does"),
        ("a/settings.json", (), 5, "holds no JSON object; give another --out"),
        ("a/settings.json", ("beam",), [1], r"holds results of beam \[1\], now it is"),
        ("data/MANIFEST.json", (), {}, "benchmark is missing; restore the file, or prepare"),
        ("data/MANIFEST.json", ("benchmark",), ["local"], r"benchmark is \['local'\], it must be a string; restore"),
        ("data/MANIFEST.json", ("benchmark",), "no", "names the benchmark 'no': this version knows"),
    ],
)
def test_what_score_reads(
    scored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    place: tuple[Any, ...],
    value: Any,
    message: str,
) -> None:
    fake_translator(monkeypatch, spoil(3))
    folder = shutil.copytree(scored, tmp_path / "copy")
    change(folder / file, place, value)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused(lambda: score(folder, "--out", folder / "a"), message)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_manifest_costs_nothing_else(scored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored, tmp_path / "copy")
    (folder / "data/MANIFEST.json").write_text('{"benchmark": "lo')
    with pytest.raises(UserError, match=r"MANIFEST.json is not JSON .*; restore the file, or prepare") as error:
        score(folder, "--out", folder / "a")
    assert "remove" not in error.value.message


@pytest.mark.parametrize("name", ["scores.json", "en-ca/about.json", "settings.json"])
@given(data=st.data())
@QUICK
def test_mutants(scored: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    """One value of the file becomes another, or its text is cut off."""
    folder = shutil.copytree(scored, tmp_path_factory.mktemp("mutant") / "copy")
    file = folder / "b" / name
    values, place = json.loads(file.read_text()), []
    inner = values
    while isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
        place.append(data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner))))))
        inner = inner[place[-1]]
    change(file, tuple(place), data.draw(VALUES))
    if data.draw(st.booleans()):
        file.write_text(file.read_text()[: data.draw(st.integers(0, file.stat().st_size))])
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_translator(monkeypatch, spoil(3))
        for run in (lambda: compare(folder), lambda: score(folder, "--out", folder / "b")):
            try:
                run()
            except UserError as error:
                assert str(error).isprintable()


@pytest.mark.parametrize(
    "text",
    ['{"train": NaN}', '{"train": 1e999}', '{"train": ' + "9" * 5000 + "}", '{"train": -1}', '{"train": true}', "5"],
)
def test_seconds(text: str, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(text)
    refused(lambda: read_seconds(tmp_path / "seconds.json"), "it must map each stage to its seconds")
    (tmp_path / "seconds.json").write_text('{"train": 80, "data": 3.1}')
    assert read_seconds(tmp_path / "seconds.json") == {"train": 80.0, "data": 3.1}


@pytest.mark.parametrize("line", ["abc", "../../victim-x", "en-", "en-ca\tx", "-", "en-ca-x", ""])
def test_directions_are_names_of_folders(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_translator(monkeypatch, spoil(3))
    data = write_data(tmp_path / "data")
    write_checkpoint(tmp_path / "c.pt")
    with (data / "bin/lang_pairs.txt").open("a") as file:
        file.write(f"{line}\n")
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--pairs", "en-ca"], ["--pairs", line]):
        refused(lambda more=more: score(tmp_path, "--out", tmp_path / "out", *more), "is no direction SRC-TGT")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_test_set_is_named(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_translator(monkeypatch, spoil(3))
    folder = shutil.copytree(scored, tmp_path / "copy")
    for side in ("en", "ca"):
        (folder / f"data/raw/test.en-ca.{side}").write_text("")
    refused(lambda: score(folder, "--out", folder / "new"), "test.en-ca.ca has no line")
    for name in ("a", "b"):
        for file in ("src.en", "ref.ca", "hyp.ca"):
            (folder / name / "en-ca" / file).write_text("")
    refused(lambda: compare(folder), "en-ca has no sentence")
