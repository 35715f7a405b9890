"""`xmoe report` where it cannot write, of runs with odd names and files, and of text that is markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from xmoe_fairseq.checkpoints.summary import Summary
from xmoe_fairseq.commands import report as command
from xmoe_fairseq.common import outputs
from xmoe_fairseq.errors import UserError, printable
from xmoe_fairseq.evaluation.build_report import Model
from xmoe_fairseq.results.report import Sample, Token, TracedSample
from xmoe_fairseq.results.settings import Settings
from xmoe_fairseq.results.usage import LayerUsage

EVIL = "<img src=x onerror=alert(1)>`*|$ </script>"
ENDINGS = ("html", "md", "json", "png")


class FakeModel(Model):
    """A checkpoint that nobody reads, with markup in its options."""

    def settings(self) -> Settings:
        summary = Summary(EVIL, 500, 2, 1234567, 234567, {}, "float32", True, {EVIL: 9})
        return Settings(summary, {EVIL: {"_name": EVIL, EVIL: EVIL}})

    def usage(self) -> list[LayerUsage]:
        return [LayerUsage("encoder.1", 1000, 1550, 1500, 20, 700.0, (375,) * 4, (700, 100, 100, 100), 1250)]

    def trace(self, samples: Sequence[Sample]) -> list[TracedSample]:
        return [TracedSample(one, [Token(EVIL, (1,))], [Token(f"▁{EVIL}", (2,))]) for one in samples]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def make_run(run: Path) -> None:
    raw = run.parent / "data/raw"
    raw.mkdir(parents=True)
    for language in ("en", "ca"):
        (raw / f"test.en-ca.{language}").write_text(f"{language} {EVIL}\nline\x1b[2J two\n")
    (run / "generate/en-ca").mkdir(parents=True)
    text = f"D-0\t-0.5\t{EVIL}\nD-1\t-0.5\tline \x9b31m two\n"
    (run / "generate/en-ca/generate-test.txt").write_text(text)
    (run / "seconds.json").write_text('{"<b>|train`": 83}')
    (run / "train.log").write_text(f"epoch 001 | valid on '{EVIL}' subset | loss nan | ppl 4 | num_updates 7\n")
    (run / "checkpoint_best.pt").touch()


def report(run: Path, *more: str) -> None:
    command.main([str(run), "--data", str(run.parent / "data"), *more], FakeModel)


class Tags(HTMLParser):
    """The names and attributes of all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_text_of_files_is_no_markup(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run)
    page = (run / "report.html").read_text()
    tags = Tags(page)
    assert "img" not in tags.names and not [name for name in tags.attributes if name.startswith("on")]
    assert page.count("</script>") == 1 and "<img" not in page
    markdown = (run / "report.md").read_text()
    assert not re.search(r"(?<!\\)<", markdown) and r"\<b\>\|train\`" in markdown
    said = capsys.readouterr().out
    assert all(line == printable(line) for line in (*said.split("\n"), *markdown.split("\n")))


@pytest.mark.parametrize("name", ["a\n```\n# b", "<img src=x>", "a|b", "\x1b[2Jx", "`x`", "x\u202ey"])
def test_names_of_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / name)
    report(tmp_path / name)
    said = capsys.readouterr().out
    assert len(said.rstrip("\n").split("\n")) == 4 and all(line == printable(line) for line in said.split("\n"))
    lines = (tmp_path / name / "report.md").read_text().split("\n")
    fences = [line for line in lines if line.startswith("```")]
    assert fences[0].rstrip("bash").rstrip() == fences[-1] and len([one for one in fences if one == fences[-1]]) == 1
    outside = [*lines[: lines.index(fences[0])], *lines[lines.index(fences[-1]) :]]
    assert lines[0].startswith("# ") and sum(line.startswith("# ") for line in outside) == 1
    assert len(Tags((tmp_path / name / "report.html").read_text()).names & {"img", "script"}) == 1


def loop(place: Path) -> None:
    place.symlink_to(place.name)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("more", [[], ["--out", "OUT/page.html"]])
def test_a_folder_in_the_place_of_a_file(run: Path, ending: str, more: list[str]) -> None:
    more = [word.replace("OUT", str(run)) for word in more]
    report(run, "--quiet", *more)
    stem = "page" if more else "report"
    before = {end: (run / f"{stem}.{end}").read_bytes() for end in ENDINGS}
    (run / f"{stem}.{ending}").unlink()
    (run / f"{stem}.{ending}").mkdir()
    with pytest.raises(UserError, match=f"cannot write the file .*{stem}.{ending}: a folder has this name"):
        report(run, "--quiet", *more)
    left = {end: (run / f"{stem}.{end}").read_bytes() for end in ENDINGS if end != ending}
    assert left == {end: text for end, text in before.items() if end != ending}


def fails(number: int, text: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, text)

    return fail


def test_where_nothing_can_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(run, "--quiet")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", fails(30, "Read-only file system"))
    with pytest.raises(UserError, match=r"cannot write to --out .*run: Read-only file system; give another"):
        report(run, "--quiet")
    monkeypatch.undo()
    monkeypatch.setattr(command, "draw_report", fails(28, "No space left on device"))
    with pytest.raises(UserError, match=r"cannot write to .*run: No space left on device"):
        report(run, "--quiet")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
