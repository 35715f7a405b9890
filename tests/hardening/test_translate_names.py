"""``scripts/translate.sh``: names of directions and of folders, and whose translations are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xmoe_fairseq.checkpoints.shards import fingerprint
from xmoe_fairseq.commands import translate
from xmoe_fairseq.common import locks
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.test_sets import MADE, check_made

BAD_NAMES = [
    "../../victim-x",
    "en-../../victim",
    "/etc-x",
    "en",
    "",
    "-",
    "en-",
    "-ca",
    "en-ca-x",
    "en ca",
    ".-.",
    "en-ca\t",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder, a run with a checkpoint, and what must stay as it is."""
    (tmp_path / "data/bin").mkdir(parents=True)
    (tmp_path / "data/MANIFEST.json").write_text(json.dumps({"benchmark": "demo4"}))
    (tmp_path / "data/bin/lang_pairs.txt").write_text("en-ca\nca-en\n")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/generate").mkdir()
    torch.save({"model": {}}, tmp_path / "run/checkpoints/checkpoint_best.pt")
    (tmp_path / "victim-x.part").mkdir()
    (tmp_path / "victim-x.part/file").touch()
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands for fairseq-generate."""
    commands: list[list[str]] = []

    def run(words: list[str], lock: int) -> int:
        commands.append(words)
        results = Path(words[words.index("--results-path") + 1])
        (results / "generate-test.txt").write_text("D-0\t0\ta\n")
        return 0

    monkeypatch.setattr(translate, "_run", run)
    return commands


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(folder: Path, message: str, *words: str) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=message) as error:
        translate.main([str(folder / "data"), str(folder / "run"), *words])
    assert "\n" not in str(error.value) and files(folder) == before


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_line_that_is_no_direction_is_refused(name: str, folder: Path, started: list[Any]) -> None:
    (folder / "data/bin/lang_pairs.txt").write_text(f"en-ca\n{name}\n")
    refused(folder, r"lang_pairs.txt holds .*, which is no direction SRC-TGT")
    refused(folder, r"lang_pairs.txt holds .*, which is no direction SRC-TGT", "en-ca")
    assert not started


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_word_that_is_no_direction_is_refused(name: str, folder: Path, started: list[Any]) -> None:
    refused(folder, "there is no direction", name)
    assert not started


@pytest.mark.parametrize(
    "text", ['{"benchmark": "de', "", "[]", "5", "{}", '{"benchmark": 5}', '{"benchmark": "none"}']
)
def test_a_damaged_manifest_is_one_line(text: str, folder: Path, started: list[Any]) -> None:
    (folder / "data/MANIFEST.json").write_text(text)
    refused(folder, "MANIFEST.json")
    assert not started


def test_a_colon_is_refused_with_the_reason(folder: Path, started: list[Any]) -> None:
    (folder / "run").rename(folder / "10:30")
    with pytest.raises(UserError, match=r"10:30/checkpoints/checkpoint_best.pt has a ':', where fairseq takes it for"):
        translate.main([str(folder / "data"), str(folder / "10:30")])
    assert not started


def test_finished_directions_are_of_one_checkpoint(folder: Path, started: list[Any], capsys: Any) -> None:
    (folder / "run/generate/en-ca.part").mkdir()  # of a killed run
    (folder / "run/generate/en-ca.part/old").touch()
    translate.main([str(folder / "data"), str(folder / "run"), "en-ca", "--", "--max-len-b", "5"])
    assert files(folder / "run/generate") == {"en-ca", "en-ca/generate-test.txt", f"en-ca/{MADE}"}
    assert started[0][-2:] == ["--max-len-b", "5"]
    translate.main([str(folder / "data"), str(folder / "run"), "--", "--max-tokens=9", "--max-len-b", "5", "--cpu"])
    assert "en-ca: translated before" in capsys.readouterr().out and len(started) == 2
    refused(folder, "en-ca was translated with the options --max-len-b 5, now there are no options of translating")
    refused(folder, "now there are the options --max-len-b 5 --beam 1", "--", "--max-len-b", "5", "--beam", "1")
    checkpoint = folder / "run/checkpoints/checkpoint_best.pt"
    made = json.loads((folder / "run/generate/en-ca" / MADE).read_text())
    assert made == {
        "file": str(checkpoint),
        "checkpoint": fingerprint(str(checkpoint)),
        "options": ["--max-len-b", "5"],
    }
    torch.save({"model": {"more": torch.zeros(2)}}, checkpoint)
    refused(folder, "en-ca was translated with another checkpoint")
    (folder / "run/generate/en-ca" / MADE).unlink()  # of before
    check_made(folder / "run/generate/en-ca", checkpoint)
    translate.main([str(folder / "data"), str(folder / "run"), "--overwrite", "--", "--beam", "1"])
    assert len(started) == 4 and files(folder / "run/generate") == {
        f"{pair}{name}" for pair in ("en-ca", "ca-en") for name in ("", "/generate-test.txt", f"/{MADE}")
    }


def test_a_folder_without_translations_is_none_that_is_finished(folder: Path, started: list[Any]) -> None:
    (folder / "run/generate/en-ca").mkdir()
    refused(folder, "run/generate/en-ca is there, but holds no translations: remove it, or give --overwrite")
    assert not started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--subset"], "--subset needs a value, such as test1"),
        (["--subset", "../test"], "--subset '../test' is refused: give test, valid, or a numbered one"),
        (["--", "--gen-subset", "test1"], "--gen-subset after the -- is refused: give --subset before the --"),
        (["--", "--results-path=here"], "--results-path after the -- is refused"),
    ],
)
def test_words_that_are_refused(words: list[str], message: str, folder: Path, started: list[Any]) -> None:
    refused(folder, message, *words)
    assert not started


def test_another_set_has_a_folder_of_its_own(folder: Path, started: list[list[str]]) -> None:
    with pytest.raises(UserError, match="holds no translations"):  # the stand-in writes those of test
        translate.main([str(folder / "data"), str(folder / "run"), "en-ca", "--subset", "test1"])
        translate.main([str(folder / "data"), str(folder / "run"), "en-ca", "--subset", "test1"])
    assert (folder / "run/generate-test1/en-ca" / MADE).is_file() and not (folder / "run/generate/en-ca").exists()
    assert started[0][started[0].index("--gen-subset") + 1] == "test1"


@pytest.mark.parametrize("place", ["checkpoints/checkpoint_last.pt", "checkpoint_best.pt", "checkpoint_last.pt"])
def test_checkpoints_are_found_where_the_readme_and_the_scripts_put_them(
    place: str, folder: Path, started: list[list[str]]
) -> None:
    (folder / "run/checkpoints/checkpoint_best.pt").rename(folder / "run" / place)
    translate.main([str(folder / "data"), str(folder / "run"), "en-ca"])
    assert started[0][started[0].index("--path") + 1] == str(folder / "run" / place)


def test_two_do_not_translate_into_one_folder(folder: Path, started: list[Any], monkeypatch: Any) -> None:
    with locks.held(folder / "run/generate"):
        monkeypatch.setattr(locks, "_held", {})  # as another process sees it
        refused(folder, "run/generate is being written by process")
        monkeypatch.undo()
    assert not started
