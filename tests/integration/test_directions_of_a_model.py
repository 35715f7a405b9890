"""A model of some directions without English: every command translates, scores and marks them alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers_training import MODEL, train

from xmoe_fairseq import cli
from xmoe_fairseq.commands import translate
from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.errors import UserError

WORDS = "north south east west house river bridge school garden table window market".split()
LINES = 6
SEARCH = ("--beam", "1", "--max-len-b", "4")
TRAINED = ["fr-de", "de-fr", "fr-pt-BR"]


def write(folder: Path, split: str, pair: tuple[str, str], sides: tuple[str, ...], lines: int) -> None:
    draw = random.Random(f"{split}{pair}")
    text = [[draw.choice(WORDS) for _ in range(draw.randint(2, 5))] for _ in range(lines)]
    for side in sides:
        spelt = {"fr": "", "de": "o", "pt-BR": "a"}[side]
        lines_of = "".join(" ".join(word + spelt for word in line) + "\n" for line in text)
        (folder / f"{split}.{'-'.join(pair)}.{side}").write_text(lines_of)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a run of three of its four directions; de and pt-BR are between zero-shot ones."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "text").mkdir()
    for split, lines in (("train", 80), ("valid", LINES), ("test", LINES)):
        for pair in (("fr", "de"), ("fr", "pt-BR")):
            write(folder / "text", split, pair, pair, lines)
    write(folder / "text", "test", ("de", "pt-BR"), ("de", "pt-BR"), LINES)
    write(folder / "text", "test1", ("fr", "de"), ("de",), LINES)
    text = str(folder / "text")
    prepare.main(["--benchmark", "local", "--input", text, "--out", str(folder / "data"), "--vocab-size", "320"])
    train(folder / "data/bin", folder / "run", 3, *MODEL, "--lang-pairs", ",".join(TRAINED), "--no-epoch-checkpoints")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    cli.main([*map(str, words), "--json", "--quiet"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_directions_that_were_not_trained_are_scored_by_name_and_marked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("score", trained / "data", "--checkpoint", trained / "run/checkpoint_last.pt", *SEARCH)
    found = run(capsys, *words, "--out", tmp_path / "default")
    assert [f"{row['source']}-{row['target']}" for row in found["rows"]] == TRAINED
    assert [one["name"] for one in found["averages"]] == ["all", "fr-xx", "xx-fr"]
    found = run(capsys, *words, "--out", tmp_path / "named", "--pairs", "fr-de,pt-BR-fr,pt-BR-de")
    marked = {f"{row['source']}-{row['target']}": row["zero_shot"] for row in found["rows"]}
    assert marked == {"fr-de": False, "pt-BR-fr": True, "pt-BR-de": True}
    assert {one["name"]: one["directions"] for one in found["averages"]} == {"all": 1, "zero-shot": 2}
    with pytest.raises(UserError, match="test1 has no references of de-fr"):
        run(capsys, *words, "--out", tmp_path / "none", "--subset", "test1")


def test_analyses_and_reports_are_of_the_trained_directions_and_mark_others(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = trained / "run", trained / "data"
    words = ("analyze", "--checkpoint", folder / "checkpoint_last.pt", "--data", data, "--min-count", "3")
    found = run(capsys, *words, "--out", tmp_path / "named", "--pairs", "fr-de,de-pt-BR")
    assert (list(found["sentences"]), found["zero_shot"]) == (["fr-de", "de-pt-BR"], ["de-pt-BR"])
    assert any("zero-shot" in note and "de-pt-BR" in note for note in found["notes"])
    with pytest.raises(
        UserError, match=r"--max-tokens is 4, but line \d+ of test, fr-de, has \d+ pieces: give at least"
    ):
        run(capsys, *words, "--out", tmp_path / "short", "--max-tokens", "4")

    translate.main([str(data), str(folder), "fr-de", "de-pt-BR", "--", "--cpu", *SEARCH])
    found = run(capsys, "report", folder, "--data", data)
    marked = {f"{one['source']}-{one['target']}": one["zero_shot"] for one in found["directions"]}
    assert marked == {"de-pt-BR": True, "fr-de": False}
    assert found["mean_bleu"] == next(one["bleu"] for one in found["directions"] if one["target"] == "de")
    assert "(zero-shot)" in (folder / "report.md").read_text() and "zero-shot" in (folder / "report.html").read_text()
    with pytest.raises(UserError, match=r"is 4, but line \d+ of test, "):
        run(capsys, "report", folder, "--data", data, "--max-tokens", "4")


def test_a_set_without_references_is_translated(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, data = trained / "run", trained / "data"
    translate.main([str(data), str(folder), "--subset", "test1", "--", "--cpu", *SEARCH])
    output = (folder / "generate-test1/de-fr/generate-test1.txt").read_text()
    assert output.count("\nD-") == LINES and "\nT-" not in output
    assert [path.name for path in (folder / "generate-test1").iterdir()] == ["de-fr"]
    with pytest.raises(UserError, match="test1 has no references of de-fr"):
        cli.main(["score", str(folder), "--data", str(data), "--subset", "test1", "--quiet"])
