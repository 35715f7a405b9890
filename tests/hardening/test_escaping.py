"""Nothing that a name or a file holds is markup in what xmoe writes, or a command to the terminal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers_scoring import fake_translator, spoil, write_checkpoint, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe_fairseq import cli
from xmoe_fairseq.errors import UserError, printable
from xmoe_fairseq.render.tables import Marked, block, code, latex, markdown, plain, tsv

EVIL = [
    "new\nline",
    "re\rturn",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "`code` and ```",
    "\n```\n",
    "[link](http://x)",
    "**bold** _it_ ~~no~~",
    "$\\input{x}$ & % # \\",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\u202eright to left\u2066",
    "\u2028line",
    "&lt;b&gt;",
]
TEXT = st.text(
    alphabet=st.one_of(st.sampled_from("`*_<>|&$\\\n\r\t\x1b\x9b\u202e[]#~a b"), st.characters()), max_size=20
)


def columns(line: str) -> int:
    """Cells of a line of a table in Markdown: bars that no backslash takes away."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1


@given(st.lists(TEXT, min_size=3, max_size=3), st.lists(TEXT, min_size=3, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_tables_keep_their_form(first: list[str], second: list[str]) -> None:
    page = markdown(["a", "b", "c"], [first, second])
    lines = page.split("\n")
    assert len(lines) == 4 and page.replace("\n", "") == printable(page.replace("\n", ""))
    assert {columns(line) for line in lines} == {3}
    assert not re.search(r"(?<!\\)(?:\\\\)*[<>`*\[\]&$]", page)
    set_ = latex(["a", "b", "c"], [first, second])
    rows = [line for line in set_.split("\n") if line.endswith(r"\\")]
    assert len(rows) == 3 and len(set_.split("\n")) == 8
    assert all(len(re.findall(r"(?<!\\)&", row)) == 2 for row in rows)
    table = tsv(["a", "b", "c"], [first, second]).split("\n")
    assert len(table) == 4 and {line.count("\t") for line in table[:3]} == {2}


@given(TEXT)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_code_is_closed_by_its_own_marks_only(text: str) -> None:
    marked = code(text)
    marks = re.match("`+", marked)
    assert marks and marked.endswith(marks[0]) and "\n" not in marked
    assert marks[0] not in marked[len(marks[0]) : -len(marks[0])] or not text
    fenced = block(text, "bash")
    fence = re.match("`+", fenced)
    assert fence and len(fence[0]) >= 3
    assert not any(line.strip().startswith(fence[0]) for line in re.split("[\n\r]", fenced)[1:-1])


def test_what_is_no_markup_stays() -> None:
    for text in (
        "en-ca",
        "threshold-0.2",
        "moe_transformer_m15_4_12",
        "92.8",
        "±",
        "→",
        "13a",
        "日本語",
        "(references)",
    ):
        assert plain(text) == text
    assert markdown(["x", "y"], [[Marked("**a**"), "**a**"]]).endswith(r"| **a** | \*\*a\*\* |")
    assert code("nrefs:1|tok:13a") == "`nrefs:1|tok:13a`" and block("a b", "bash") == "```bash\na b\n```"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    write_data(folder / "data")
    write_checkpoint(folder / "c.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_translator(monkeypatch, spoil(3))
        cli.main(
            ["score", str(folder / "data"), "--checkpoint", str(folder / "c.pt"), "--out", str(folder / "a"), "--quiet"]
        )
    return folder


def safe(text: str) -> None:
    """Every line is one that a terminal shows as it is."""
    assert all(line == printable(line) for line in text.split("\n"))


@pytest.mark.parametrize("evil", EVIL)
def test_names_and_files_in_a_comparison(
    evil: str, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = evil.replace("/", ":")
    for system in ("plain", name):
        folder = Path(shutil.copytree(scored / "a", tmp_path / system))
        values = json.loads((folder / "scores.json").read_text())
        values |= {"device": f"{system} {evil}"}
        values["settings"]["arch"] = evil
        (folder / "scores.json").write_text(json.dumps(values))
    folders = [str(tmp_path / name), str(tmp_path / "plain")]
    usual = ["compare", *folders[::-1], "--samples", "5", "--quiet"]
    cli.main(usual)
    page = capsys.readouterr().out
    safe(page)
    shapes = [columns(line) for line in page.split("\n") if line.startswith("|")]
    assert shapes[:4] == [16] * 4 and set(shapes[4:]) == {5}
    assert "<img" not in page.replace(r"\<img", "") and "```" not in page
    cli.main([*usual, "--latex"])
    set_ = capsys.readouterr().out
    safe(set_)
    assert set_.count(r"\begin{tabular}") == 3
    assert all(line.startswith(("%", "\\", " ")) or not line for line in set_.split("\n"))
    cli.main([*usual, "--json"])
    said = capsys.readouterr().out
    safe(said)
    assert json.loads(said)["systems"][1]["name"] == name


@pytest.mark.parametrize("evil", EVIL)
def test_names_in_scores_and_messages(
    evil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_translator(monkeypatch, spoil(3))
    data = write_data(tmp_path / "data", groups=f"ca\t{evil.split()[0]}\t9\nsw\tlow\t1\n")
    out = tmp_path / evil.replace("/", ":")
    words = ["score", str(data), "--checkpoint", str(write_checkpoint(tmp_path / "c.pt")), "--out", str(out)]
    cli.main(words)
    safe(capsys.readouterr().out)
    page = (out / "scores.md").read_text()
    safe(page)
    assert page.startswith("# ") and len({columns(line) for line in page.split("\n") if line.startswith("|")}) == 2
    assert {line.count("\t") for line in (out / "scores.tsv").read_text().split("\n") if line} == {
        (out / "scores.tsv").read_text().split("\n")[0].count("\t")
    }
    with pytest.raises(UserError) as error:
        cli.main([*words, "--beam", "2"])
    assert str(error.value) == printable(str(error.value))
    with pytest.raises(UserError) as error:
        cli.main([*words, "--pairs", evil])
    assert str(error.value) == printable(str(error.value))
