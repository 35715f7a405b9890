"""What is scored, and what a page shows, is of one test set, one checkpoint and one data folder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_identity import prepared, write_text
from helpers_training import MODEL, train
from helpers_translation import generated, write_output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xmoe_fairseq import cli
from xmoe_fairseq.common.directions import Direction
from xmoe_fairseq.common.files import read_lines, write_lines
from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.consistency import belongs
from xmoe_fairseq.evaluation.direction_dataset import origin
from xmoe_fairseq.evaluation.test_sets import check_binarised, texts_checksum


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("one"), "abcdefgh")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose test sets were translated, scored, analysed and swept."""
    folder = tmp_path_factory.mktemp("run")
    train(data / "bin", folder, 2, *MODEL)
    checkpoint = str(folder / "checkpoint_last.pt")
    (folder / "checkpoint_best.pt").unlink()
    score(data, checkpoint, "--out", folder / "scores")
    picture = "<svg xmlns='http://www.w3.org/2000/svg'/>"
    for name in ("analysis", "sweep"):
        (folder / name).mkdir()
        (folder / name / ("flops.svg" if name == "analysis" else "sweep.svg")).write_text(picture)
    (folder / "analysis/analysis.json").write_text(json.dumps({"of": origin(Path(checkpoint), data, "test")}))
    shutil.copytree(folder / "scores", folder / "sweep/threshold-0.5")
    return folder


@pytest.fixture
def changed(data: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be changed."""
    return Path(shutil.copytree(data, tmp_path / "changed", symlinks=True))


def score(data: Path, checkpoint: str | Path, *more: str | Path) -> None:
    words = ["score", str(data), "--checkpoint", str(checkpoint), "--beam", "1", "--max-len-b", "3", "--quiet"]
    cli.main([*words, *map(str, more)])


def report(run: Path, data: Path, *more: str) -> dict[str, Any]:
    cli.main(["report", str(run), "--data", str(data), "--quiet", *more])
    values: dict[str, Any] = json.loads((run / "report.json").read_text())
    return values


def reverse(folder: Path, *names: str) -> None:
    for name in names:
        write_lines(folder / name, read_lines(folder / name, "text")[::-1])


# --- xmoe score


def test_what_was_not_changed_is_scored(data: Path, run: Path) -> None:
    kept = json.loads((run / "scores/scores.json").read_text())["settings"]["test_set"]
    pairs = [line.split("-") for line in read_lines(data / "bin/lang_pairs.txt", "pairs")]
    stems = {pair: "-".join(["en", *(side for side in pair if side != "en")]) for pair in map(tuple, pairs)}
    texts = {
        "-".join(pair): [read_lines(data / f"raw/test.{stem}.{side}", "text") for side in pair]
        for pair, stem in stems.items()
    }
    assert kept == texts_checksum((pair, *sides) for pair, sides in texts.items())


@pytest.mark.parametrize("more", [(), ("--lines", "3")])
def test_a_reversed_test_set_is_refused(more: tuple[str, ...], changed: Path, run: Path, tmp_path: Path) -> None:
    reverse(changed / "raw", "test.en-de.en", "test.en-de.de")
    with pytest.raises(UserError, match=r"raw/test.en-de.en, line 1 is '.*', but \S+bin/test.en-de.en has '") as error:
        score(changed, run / "checkpoint_last.pt", "--out", tmp_path / "out", *more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_lines_that_are_missing_or_too_many_are_refused(changed: Path, run: Path, tmp_path: Path) -> None:
    lines = {side: read_lines(changed / f"raw/test.en-de.{side}", "text") for side in ("en", "de")}
    for edited in (
        {side: text[:-1] for side, text in lines.items()},
        {s: [*text, "more"] for s, text in lines.items()},
    ):
        for side, text in edited.items():
            write_lines(changed / f"raw/test.en-de.{side}", text)
        with pytest.raises(UserError, match=r"test.en-de.en has \d+ lines, \S+ has 10: prepare the data again"):
            score(changed, run / "checkpoint_last.pt", "--out", tmp_path / "out")


def test_binary_text_of_other_data_is_refused(changed: Path, run: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", "abcd")
    for side in ("de", "en"):
        for ending in ("bin", "idx"):
            shutil.copy(other / f"bin/test.en-de.{side}.{ending}", changed / "bin")
    with pytest.raises(UserError, match=r"raw/test.en-de.en, line 1 is"):
        score(changed, run / "checkpoint_last.pt", "--out", tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["swap", "drop", "double", "letter", "space", "mark", "other"]))
def test_every_changed_line_is_found(seed: int, kind: str, data: Path) -> None:
    raw = data / "raw/test.en-de.de"
    lines = read_lines(raw, "text")
    check_binarised(data, "test", Direction("en", "de"), {raw: lines})
    draw = random.Random(seed)
    one, other = draw.sample(range(len(lines)), 2)
    made = list(lines)
    if kind == "swap":
        made[one], made[other] = made[other], made[one]
    elif kind in ("drop", "double"):
        made[one : one + 1] = [] if kind == "drop" else [made[one]] * 2
    else:
        place = draw.randrange(len(made[one]))
        new = {"letter": "z", "space": " ", "mark": "\u2581", "other": "\u00e9"}[kind]
        made[one] = f"{made[one][:place]}{new}{made[one][place:]}"
    if made != lines:
        with pytest.raises(UserError, match=r"test.en-de.de"):
            check_binarised(data, "test", Direction("en", "de"), {raw: made})


def test_any_text_is_found_again(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", "abcdefgh")
    odd = [
        "\u2581 \u2581\u2581",
        " two  spaces ",
        "\u2028\u00a0\u3000",
        "\U0001f600 e\u0301 \u00e9",
        "<0xE2> <unk> </s>",
        "",
        "\u200b",
        "\t",
    ]
    for side in ("en", "de"):
        path = text / f"test.en-de.{side}"
        path.write_text("".join(f"{line}\n" for line in [f"{side}{line}{side}" for line in odd]))
    out = tmp_path / "out"
    prepare.main(["--benchmark", "local", "--input", str(text), "--out", str(out), "--vocab-size", "310"])
    for side in ("en", "de"):
        raw = out / f"raw/test.en-de.{side}"
        check_binarised(out, "test", Direction("en", "de"), {raw: read_lines(raw, "text")})


def test_translations_of_another_test_set_are_refused(data: Path, changed: Path, tmp_path: Path) -> None:
    sources = read_lines(data / "raw/test.en-de.en", "text")
    write_output(tmp_path / "run/generate/en-de", generated(["a"] * len(sources), sources=sources))
    words = ["score", str(tmp_path / "run"), "--quiet", "--data"]
    cli.main([*words, str(data)])
    shutil.rmtree(tmp_path / "run/scores")
    for split in ("raw", "text"):  # the same text is translated, but another one is scored
        write_output(tmp_path / "run/generate/en-de", generated(["a"] * len(sources), sources=sources[::-1]))
        with pytest.raises(UserError, match=r"translates '.*' as sentence \d+, but \S+raw has '.*': it is of another"):
            cli.main([*words, str(data)])
        assert split and not list((tmp_path / "run").glob("scores/*/hyp.*"))


# --- xmoe report


def test_what_belongs_together_is_shown(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(report(run, data)["directions"]) == 4
    assert "figures" not in capsys.readouterr().err
    assert (run / "report.html").read_text().count("data:image/svg") == 2


def test_scores_of_another_test_set_are_refused(changed: Path, run: Path) -> None:
    before = (run / "report.json").read_bytes() if (run / "report.json").exists() else b""
    reverse(changed / "raw", "test.en-zu.en", "test.en-zu.zu")
    with pytest.raises(UserError, match=r"scores/en-zu is of another test set than \S+/raw: give the data"):
        report(run, changed)
    assert before == ((run / "report.json").read_bytes() if before else b"")


def test_scores_and_figures_of_another_checkpoint(
    data: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    train(data / "bin", copy, 3, *MODEL)  # goes on
    for name in ("analysis", "sweep"):
        assert not belongs(copy / name, copy / "checkpoint_last.pt", data)
        assert f"the figures of {copy / name} are left out: they are of another checkpoint" in caplog.text
    last = ("--checkpoint", str(copy / "checkpoint_last.pt"))
    with pytest.raises(
        UserError, match=r"has the scores of another checkpoint \(\S+checkpoint_last.pt, or what it was"
    ):
        report(copy, data, *last)


def test_figures_of_another_text_are_left_out(changed: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for side in ("de", "en"):
        for ending in ("bin", "idx"):
            shutil.copy(changed / f"bin/valid.en-de.{side}.{ending}", changed / f"bin/test.en-de.{side}.{ending}")
        shutil.copy(changed / f"raw/valid.en-de.{side}", changed / f"raw/test.en-de.{side}")
    for name, what in (("analysis", "text"), ("sweep", "test set")):
        assert not belongs(run / name, run / "checkpoint_last.pt", changed)
        assert f"{run / name} are left out: they are of another {what}" in caplog.text


@pytest.mark.parametrize("about", ["{}", "[]", '{"of": 5}', '{"checkpoint": "x"}'])
def test_figures_of_before_are_shown_with_a_warning(
    about: str, data: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "analysis.json").write_text(about)
    assert belongs(tmp_path, run / "checkpoint_last.pt", data)
    assert f"the figures of {tmp_path} do not say what they are of" in caplog.text
    (tmp_path / "analysis.json").unlink()
    assert belongs(tmp_path, run / "checkpoint_last.pt", data)


def test_a_report_replaces_only_a_report(data: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    page = ("--out", str(tmp_path / "README.html"))
    with pytest.raises(UserError, match=r"README.md is there already, and not of an earlier report: .*--force"):
        cli.main(["report", str(run), "--data", str(data), *page])
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    cli.main(["report", str(run), "--data", str(data), *page, "--quiet", "--force"])
    cli.main(["report", str(run), "--data", str(data), *page, "--quiet"])
    assert {path.name for path in tmp_path.iterdir()} == {f"README.{end}" for end in ("html", "md", "json", "png")}
