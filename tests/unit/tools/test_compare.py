"""``xmoe compare``: sacreBLEU's own test called directly, naive means and win ratios, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from helpers_scoring import PAIRS, fake_translator, spoil, write_checkpoint, write_data
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError

LINES = 20
SYSTEMS = {"first": spoil(3), "second": spoil(2), "third": spoil(5, "small")}


def score(data: Path, out: Path, *more: str) -> Path:
    cli.main(["score", str(data), "--checkpoint", str(data.parent / "c.pt"), "--out", str(out), "--quiet", *more])
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three systems scored on the same data."""
    folder = tmp_path_factory.mktemp("systems")
    data = write_data(folder / "data", lines=LINES)
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, change in SYSTEMS.items():
            write_checkpoint(folder / "c.pt", name)
            fake_translator(monkeypatch, change)
            found.append(score(data, folder / name))
    return found


def compare(folders: list[Path], *more: str) -> None:
    cli.main(["compare", *map(str, folders), "--quiet", *more])


def as_json(folders: list[Path], capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    compare(folders, "--json", *more)
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def texts(folders: list[Path], pairs: tuple[str, ...]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """References and named systems of directions, one after the other."""

    def lines(folder: Path, kind: str) -> list[str]:
        files = (folder / pair / f"{kind}.{pair.split('-')[1]}" for pair in pairs)
        return [line for file in files for line in file.read_text().split("\n")[:-1]]

    return lines(folders[0], "ref"), [(folder.name, lines(folder, "hyp")) for folder in folders]


def test_bootstrap_is_sacrebleus(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(folders, capsys, "--samples", "100")
    for pairs in (*((pair,) for pair in PAIRS), PAIRS):
        references, systems = texts(folders, pairs)
        test = PairedTest(systems, {"BLEU": BLEU(), "chrF2++": CHRF(word_order=2)}, [references], "bs", 100)
        _, results = test()
        for metric, name in (("bleu", "BLEU"), ("chrf", "chrF2++")):
            comparison = found["metrics"][metric]
            mine = comparison["all_sentences"] if len(pairs) > 1 else comparison["directions"][pairs[0]]
            for one, theirs in zip(mine, results[name], strict=True):
                assert one["score"] == pytest.approx(theirs.score)
                assert one["interval"] == pytest.approx(theirs.ci)
                assert one["p"] == (None if theirs.p_value is None else pytest.approx(theirs.p_value))
            assert mine[1]["difference"] == pytest.approx(results[name][1].score - results[name][0].score)


def test_means_and_win_ratios_are_those_of_naive_ways(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    samples = 40
    found = as_json(folders, capsys, "--samples", str(samples))
    comparison = found["metrics"]["bleu"]
    members = {"all": PAIRS, "en-xx": ("en-ca", "en-sw"), "xx-en": ("ca-en", "sw-en")}
    assert comparison["means"].keys() == comparison["win_ratio"].keys() == members.keys()
    draws = np.random.default_rng(12345).choice(LINES, size=(samples, LINES))
    bleu = BLEU()
    for name, pairs in members.items():
        drawn = np.zeros((3, samples))
        scores = np.zeros((3, len(pairs)))
        for number, pair in enumerate(pairs):
            references, systems = texts(folders, (pair,))
            for system, (_, lines) in enumerate(systems):
                scores[system, number] = bleu.corpus_score(lines, [references]).score
                for draw, chosen in enumerate(draws):
                    sample = bleu.corpus_score([lines[i] for i in chosen], [[references[i] for i in chosen]])
                    drawn[system, draw] += sample.score / len(pairs)
        for system in (1, 2):
            apart = abs(drawn[system] - drawn[0])
            difference = scores[system].mean() - scores[0].mean()
            p = (sum(apart - apart.mean() > abs(difference)) + 1) / (samples + 1)
            result = comparison["means"][name][system]
            assert result["difference"] == pytest.approx(difference) and result["p"] == pytest.approx(p)
            wins = sum(scores[system, i] > scores[0, i] for i in range(len(pairs))) / len(pairs)
            assert comparison["win_ratio"][name][system] == wins
        assert comparison["win_ratio"][name][0] == 0


def test_what_is_shown_is_what_was_found(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(folders, capsys, "--samples", "100")
    compare(folders, "--samples", "100")
    page = capsys.readouterr().out
    compare(folders, "--samples", "100", "--latex")
    latex = capsys.readouterr().out
    second = found["metrics"]["bleu"]["directions"]["en-sw"][1]
    cells = [f"{second[key]:{form}}" for key, form in (("score", ".2f"), ("difference", "+.2f"), ("p", ".3f"))]
    for text, separator, start in ((page, "|", "| en-sw "), (latex, "&", " en-sw ")):
        line = next(line for line in text.split("\n") if line.startswith(start))
        shown = [cell.strip(" \\") for cell in line.strip("|").split(separator)]
        assert shown[2:5] == cells
    assert r"$\Delta$" in latex and latex.count(r"\begin{tabular}") == 3 == latex.count(r"\toprule")
    assert not any(character in latex.split("% Δ")[0].replace("% BLEU", "") for character in "Δ±–")
    costs = [cell.strip() for cell in page.split("\n")[4].strip("|").split("|")][:6]
    assert costs == ["first", "1.00K", "600", "125", "2.50", "70"]


def test_equal_systems_differ_by_chance_only(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json([folders[0], folders[0]], capsys, "--samples", "50")
    for one in found["metrics"].values():
        for results in (*one["directions"].values(), *one["means"].values(), one["all_sentences"]):
            assert results[1]["difference"] == 0 and results[1]["p"] == 1
        assert one["win_ratio"]["all"] == [0, 0]
    assert found["systems"][0]["name"] == str(folders[0])  # both folders have the same last name


def test_what_cannot_be_compared_is_named(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, first = write_data(tmp_path / "data", lines=LINES), folders[0]
    fake_translator(monkeypatch, spoil(3))
    write_checkpoint(tmp_path / "c.pt")

    def refused(other: Path, message: str, *more: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            compare([first, other], *more)
        assert "\n" not in str(error.value)

    refused(score(data, tmp_path / "few", "--lines", "9"), "first and few cannot .* test sets of en-ca differ")
    refused(score(data, tmp_path / "one", "--pairs", "en-ca"), "only one of them has ca-en, en-sw, sw-en; name")
    refused(tmp_path / "one", "one has no scores of ca-en", "--pairs", "ca-en")
    refused(score(data, tmp_path / "chrf", "--metrics", "chrf"), "scored by bleu,chrf and by chrf; score both")
    char = score(data, tmp_path / "char", "--tokenize", "char")
    refused(char, r"BLEU of en-ca was computed as nrefs:1\|case:mixed\|eff:no\|tok:13a.* and as .*tok:char")
    refused(data, "holds no scores.json: make it with xmoe score")
    compare([first, tmp_path / "one"], "--pairs", "en-ca", "--samples", "5")
    (char / "scores.json").write_text('{"name": 1}')
    refused(char, "settings is missing; it is not as this version writes it")
    with pytest.raises(UserError, match="give two folders or more"):
        compare([first])
    with pytest.raises(UserError, match="--samples: 0 is out of range"):
        compare(folders, "--samples", "0")


def test_another_sacrebleu_is_named(folders: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    for folder in folders:
        text = (folder / "scores.json").read_text()
        (folder / "scores.json").write_text(text.replace(f"version:{sacrebleu.__version__}", "version:1.0.0"))
    with pytest.raises(UserError, match=r"was computed as .*version:1.0.0, this sacreBLEU gives .*: run xmoe score"):
        compare(folders)
