"""Which directions a model has, in every command: trained ones, zero-shot ones, means over them, further sets."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from helpers_scoring import fake_translator, sentence, spoil, write_data
from helpers_translation import generated, write_output

from xmoe_fairseq import cli
from xmoe_fairseq.checkpoints.shards import fingerprint
from xmoe_fairseq.common.directions import Direction
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.model_directions import choose_directions, known_pairs
from xmoe_fairseq.evaluation.test_sets import MADE
from xmoe_fairseq.results.direction_sets import direction_sets, group_of


def write_model(path: Path, pairs: str | None, recorded: tuple[str, ...] = ()) -> Path:
    """Writes as much of a checkpoint as says which directions it was trained on."""
    state: dict[str, Any] = {"model": {"w": torch.zeros(1)}, "cfg": {"task": {"lang_pairs": pairs}, "model": {}}}
    state["task_state"] = {"xmoe_directions": list(recorded)} if recorded else {}
    torch.save(state, path)
    return path


def write_set(data: Path, subset: str, pair: str, *sides: str, lines: int = 12) -> None:
    for side in sides:
        text = "".join(f"{sentence(side, line)}\n" for line in range(lines))
        (data / f"raw/{subset}.{pair}.{side}").write_text(text)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """English and two others, with a test set between these, and one of French without references."""
    data = write_data(tmp_path / "data")
    (data / "bin/langs.txt").write_text("en\nca\nsw\n")
    write_set(data, "test", "ca-sw", "ca", "sw")
    write_set(data, "test1", "ca-en", "ca")
    write_set(data, "test2", "en-sw", "sw", "en", lines=5)
    return data


def names(*pairs: str) -> list[Direction]:
    return [Direction(*pair.split("-")) for pair in pairs]


@pytest.mark.parametrize(
    ("pairs", "recorded", "expected"),
    [
        (None, (), ["en-ca", "ca-en", "en-sw", "sw-en"]),
        ("en-sw,en-ca", (), ["en-ca", "en-sw"]),
        ("pairs.txt", ("sw-en", "en-ca"), ["en-ca", "sw-en"]),  # a file that is no more
        ("pairs.txt", (), ["en-ca", "ca-en", "en-sw", "sw-en"]),
        ("en-sw,sw-ca", (), ["en-sw", "sw-ca"]),  # one that the data has no training text of
        ("en-fr,fr-en,ca-en", (), ["ca-en"]),  # of a language that it does not know
    ],
)
def test_a_model_has_the_directions_that_it_was_trained_on(
    pairs: str | None, recorded: tuple[str, ...], expected: list[str], data: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model.pt", pairs, recorded)
    assert choose_directions(data, model, "test").pairs == expected
    named = choose_directions(data, model, "test", ["ca-sw", "en-ca", "sw-en"])
    assert named.pairs == ["ca-sw", "en-ca", "sw-en"] and named.untrained == set(named.pairs) - set(expected)


def test_a_set_has_the_directions_that_it_has_sources_of(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.pt", None)
    assert choose_directions(data, model, "test1").pairs == ["ca-en"]
    assert choose_directions(data, model, "test2").pairs == ["en-sw", "sw-en"]
    for subset, wanted, message in (
        ("test3", [], "data has no set 'test3': choose from test, test1, test2"),
        ("test", ["ca-fr"], "there is no direction 'ca-fr': choose from en-ca, ca-en, en-sw, sw-en"),
        ("test2", ["sw-ca"], "there is no direction 'sw-ca'"),
        ("test", ["ca-sw", "ca-sw"], "--pairs names ca-sw twice"),
    ):
        with pytest.raises(UserError, match=message):
            choose_directions(data, model, subset, wanted)


def test_codes_may_hold_hyphens(data: Path, tmp_path: Path) -> None:
    (data / "bin/langs.txt").write_text("pt-BR\nzh-Hans\nen\n")
    (data / "bin/lang_pairs.txt").write_text("pt-BR-zh-Hans\nen-pt-BR\n")
    write_set(data, "test", "pt-BR-zh-Hans", "pt-BR", "zh-Hans")
    write_set(data, "test", "en-pt-BR", "en", "pt-BR")
    assert [(pair.source, pair.target) for pair in known_pairs(data)] == [("pt-BR", "zh-Hans"), ("en", "pt-BR")]
    found = choose_directions(data, write_model(tmp_path / "model.pt", "en-pt-BR"), "test", ["zh-Hans-pt-BR"])
    assert (found.pairs[0].source, found.pairs[0].target, len(found.untrained)) == ("zh-Hans", "pt-BR", 1)


@pytest.mark.parametrize(
    ("pairs", "untrained", "expected"),
    [
        ("en-ca ca-en en-sw", "", {"all": 3, "en-xx": 2, "xx-en": 1}),
        ("en-ca ca-en", "", {"all": 2, "en-xx": 1, "xx-en": 1}),
        ("en-ca en-sw ca-sw", "ca-sw", {"all": 2, "en-xx": 2, "zero-shot": 1}),
        ("fr-de fr-es de-fr", "", {"all": 3, "fr-xx": 2, "xx-fr": 1}),
        ("eng_Latn-fra_Latn fra_Latn-eng_Latn", "", {"all": 2, "eng_Latn-xx": 1, "xx-eng_Latn": 1}),
        ("fr-de de-fr", "", {"all": 2}),  # both are out of and into each other
        ("fr-de de-es es-fr", "", {"all": 3}),
        ("en-fr fr-de de-en", "de-en", {"all": 2, "fr-xx": 1, "xx-fr": 1, "zero-shot": 1}),
        ("ca-sw", "ca-sw", {"zero-shot": 1}),
    ],
)
def test_means_are_over_trained_directions_out_of_and_into_what_they_share(
    pairs: str, untrained: str, expected: dict[str, int]
) -> None:
    sets = direction_sets(names(*pairs.split()), untrained.split(), "en")
    assert {name: len(members) for name, members in sets.items()} == expected
    assert next(iter(sets)) == next(iter(expected))


def test_the_group_of_a_direction_is_that_of_its_languages_beside_the_pivot() -> None:
    groups = {"ca": "high", "sw": "low", "id": "high"}
    for pair, pivot, group in (
        ("en-ca", "en", "high"),
        ("sw-ca", "ca", "low"),
        ("sw-ca", None, "low-high"),
        ("id-ca", None, "high"),
        ("en-fr", "en", "all"),
    ):
        assert group_of(names(pair)[0], groups, pivot) == group


def score(*words: str | Path) -> None:
    cli.main(["score", *map(str, words), "--quiet"])


def test_zero_shot_directions_are_marked_and_in_no_mean(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, spoil(3))
    model, out = write_model(tmp_path / "model.pt", "en-ca,en-sw"), tmp_path / "out"
    score(data, "--checkpoint", model, "--out", out, "--pairs", "en-ca,en-sw,sw-en,ca-sw", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [row["zero_shot"] for row in found["rows"]] == [False, False, True, True]
    bleu = [row["scores"]["bleu"] for row in found["rows"]]
    means = {one["name"]: (one["directions"], one["scores"]["bleu"]) for one in found["averages"]}
    assert means["all"] == means["en-xx"] == (2, pytest.approx(mean(bleu[:2])))
    assert means["zero-shot"] == (2, pytest.approx(mean(bleu[2:])))
    assert means["high"] == (1, pytest.approx(bleu[0])) and "high xx-en" not in means
    # Experts a token too, of tokens 100 and 120.
    assert found["model"]["experts_per_token"] == pytest.approx(2.5)
    header, *rows = [line.split("\t") for line in (out / "scores.tsv").read_text().splitlines()]
    assert [row[header.index("zero-shot")] for row in rows] == ["", "", "yes", "yes"]
    page = " ".join((out / "scores.md").read_text().split())
    assert "| zero-shot | 2 |" in page and page.count("| yes |") == 2
    cli.main(["compare", str(out), str(out), "--quiet", "--samples", "20"])
    compared = capsys.readouterr().out
    assert "sw-en (zero-shot)" in compared and "mean of zero-shot" in compared and "en-ca (zero-shot)" not in compared


def test_without_zero_shot_directions_tables_are_as_they_were(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_translator(monkeypatch, spoil(3))
    score(data, "--checkpoint", write_model(tmp_path / "model.pt", "en-ca,en-sw"), "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/scores.json").read_text())
    assert [row["target"] for row in found["rows"]] == ["ca", "sw"]
    for name in ("scores.tsv", "scores.md"):
        assert "zero-shot" not in (tmp_path / "out" / name).read_text()


def test_a_sweep_names_what_is_in_no_mean(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, spoil(3))
    model = write_model(tmp_path / "model.pt", "en-ca")
    words = ["sweep", "--checkpoint", str(model), "--data", str(data), "--thresholds", "0.5", "--quiet"]
    cli.main([*words, "--pairs", "en-ca,ca-sw", "--out", str(tmp_path / "sweep")])
    assert "Means of 1 directions, 12 sentences" in (said := capsys.readouterr().out)
    assert "In no mean of scores, since not trained: ca-sw." in said
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert (found["directions"], found["zero_shot"]) == (1, ["ca-sw"])
    cli.main([*words, "--subset", "test2", "--pairs", "en-sw", "--out", str(tmp_path / "other"), "--json"])
    found = json.loads(capsys.readouterr().out)  # all that was asked for is zero-shot
    assert (found["directions"], found["sentences"], found["zero_shot"]) == (1, 5, [])


def test_a_set_without_references_is_translated_and_not_scored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_translator(monkeypatch, spoil(3))
    model = write_model(tmp_path / "model.pt", None)
    with pytest.raises(UserError, match=r"test1 has no references of ca-en, only scripts/translate\.sh") as caught:
        score(data, "--checkpoint", model, "--subset", "test1", "--out", tmp_path / "out")
    assert "\n" not in str(caught.value) and not fake.asked and not (tmp_path / "out").exists()


# --- What translate.sh made


def write_translations(run: Path, data: Path, pair: str, checkpoint: Path | None, *options: str) -> Path:
    stem = next((data / "raw").glob(f"test.*.{pair.split('-')[1]}"))
    lines = stem.read_text().splitlines()
    folder = run / "generate" / pair
    write_output(folder, generated(["", *lines[1:]]))  # the first source was too long
    if checkpoint is not None:
        made = {"file": str(checkpoint), "checkpoint": fingerprint(str(checkpoint)), "options": list(options)}
        (folder / MADE).write_text(json.dumps(made))
    return folder


def test_a_run_is_scored_by_what_its_model_was_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    model = write_model(run / "checkpoint_best.pt", "en-ca,en-sw")
    for pair in ("en-ca", "ca-sw", "sw-en"):
        write_translations(run, data, pair, model)
    score(run, "--data", data, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {f"{row['source']}-{row['target']}": row["zero_shot"] for row in found["rows"]} == {
        "en-ca": False,
        "sw-en": True,
        "ca-sw": True,
    }
    assert [(row["too_long"], row["empty"]) for row in found["rows"]] == [(1, 1)] * 3
    assert {one["name"]: one["directions"] for one in found["averages"]} == {"all": 1, "en-xx": 1, "zero-shot": 2}
    assert "too long" in (run / "scores/scores.md").read_text()


def test_translations_of_two_systems_are_not_one_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    one, other = write_model(run / "one.pt", None), write_model(run / "other.pt", "en-ca")
    write_translations(run, data, "en-ca", one, "--beam", "4", "--max-tokens", "100")
    write_translations(run, data, "en-sw", one, "--beam", "4", "--cpu")
    write_translations(run, data, "ca-en", None)  # by hand
    score(run, "--data", data)
    write_translations(run, data, "sw-en", one, "--beam", "5")
    with pytest.raises(UserError, match=r"sw-en was translated with the options --beam 5, .*en-ca with the options"):
        score(run, "--data", data, "--out", tmp_path / "out")
    write_translations(run, data, "sw-en", other, "--beam", "4")
    with pytest.raises(UserError, match=r"sw-en was translated with another checkpoint \(.*other.pt\) than .*en-ca"):
        score(run, "--data", data, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="en-ca was translated with another checkpoint"):
        score(run, "--data", data, "--checkpoint", other, "--pairs", "en-ca", "--out", tmp_path / "out")
