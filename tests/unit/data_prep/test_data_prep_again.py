"""``data_prep/prepare.sh`` run again: after it finished, with other options, after an interruption, on a full disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers_prepare import arguments, assert_nothing_half_written, error_of, remove, rewrite, snapshot, write_input

from xmoe_fairseq.common import locks
from xmoe_fairseq.data_prep import prepare

ROOT = Path(__file__).parents[3]
PACKAGE = prepare.__package__


def test_finished_stages_are_skipped(prepared: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    prepare.main(arguments(source, prepared))
    assert capsys.readouterr().out.count("already finished, skipped") == 3
    assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}


def test_other_parameters_are_refused(prepared: Path, source: Path, tmp_path: Path) -> None:
    before = snapshot(prepared)
    edited = write_input(tmp_path / "edited", rewrite("test.de-en.de", b"x\n" * 5))
    other = write_input(tmp_path / "other", remove("*zu*"))
    for folder, more, part in (
        (source, ["--vocab-size", "331"], "vocab_size = 330, now it is 331"),
        (source, ["--seed", "2"], "seed = 1, now it is 2"),
        (edited, [], "sources test.de-en.de ="),
        (other, [], 'languages = ["de", "zu"], now it is ["de"]'),
    ):
        message = error_of(*arguments(folder, prepared, *more))
        assert part in message and "choose another --out, or delete" in message
    assert snapshot(prepared) == before


def test_options_that_did_not_exist_then_are_those_not_used(prepared: Path, source: Path, tmp_path: Path) -> None:
    out = shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    for path in out.glob("*/.stage.json"):
        record = json.loads(path.read_text())
        for key in ("source", "limits", "opus_corpora", "max_pieces"):
            record["parameters"].pop(key, None)
        path.write_text(json.dumps(record) + "\n")
    prepare.main(arguments(source, out))
    assert 'limits = null, now it is {"dedup": true}' in error_of(*arguments(source, out, "--dedup"))
    assert "max_pieces = null, now it is 9" in error_of(*arguments(source, out, "--max-pieces", "9"))


def test_foreign_and_damaged_folders_are_refused(prepared: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "bin").mkdir(parents=True)
    assert "bin was not made by this program" in error_of(*arguments(source, out))
    assert [path.name for path in out.iterdir()] == ["bin"]
    damaged = shutil.copytree(prepared, tmp_path / "damaged", symlinks=True)
    (damaged / "raw/train.en-de.de").write_text("edited\n")
    message = error_of(*arguments(source, damaged))
    assert "train.en-de.de is missing or was changed" in message and f"delete {damaged / 'raw'}" in message
    # The advice works.
    shutil.rmtree(damaged / "raw")
    prepare.main(arguments(source, damaged))
    assert snapshot(damaged) == snapshot(prepared)


def test_manifest_vanishes_with_what_it_describes(
    prepared: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    shutil.rmtree(out / "bin")
    monkeypatch.setattr(f"{PACKAGE}.binarize.write", interrupted)
    with pytest.raises(SystemExit, match="130"):
        prepare.main(arguments(source, out))
    assert_nothing_half_written(out)
    assert not (out / "MANIFEST.json").exists()


def test_edited_groups_are_kept(prepared: Path, source: Path, tmp_path: Path) -> None:
    out = shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    (out / "groups.tsv").write_text("de\thigh\t200\nzu\tlow\t200\n")
    prepare.main(arguments(source, out))
    assert "high" in (out / "groups.tsv").read_text()


@pytest.mark.parametrize("stage", ["raw_text.write", "learn_spm.write", "binarize.write"])
def test_resumes_after_an_interruption(
    prepared: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupted(*args: object) -> None:
        (Path(str(args[-1])) / "half").write_text("half")
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(f"{PACKAGE}.{stage}", interrupted)
        with pytest.raises(SystemExit, match="130"):
            prepare.main(arguments(source, out))
    assert_nothing_half_written(out)
    if stage == "binarize.write":
        assert "vocab_size = 330, now it is 400" in error_of(*arguments(source, out, "--vocab-size", "400"))
    prepare.main(arguments(source, out))
    assert snapshot(out) == snapshot(prepared)


def test_resumes_after_a_kill(prepared: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import os, sys; from xmoe_fairseq.data_prep import learn_spm, prepare\n"
        "def killed(*args):\n"
        "    (args[-1] / 'spm.model').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "learn_spm.write = killed\n"
        "prepare.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments(source, out)]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == -9
    assert {path.name for path in out.iterdir()} == {"raw", "spm.tmp", locks.LOCK}
    prepare.main(arguments(source, out))
    assert snapshot(out) == snapshot(prepared)


def test_unfinished_by_other_versions_is_refused(
    prepared: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out", symlinks=True)
    monkeypatch.setattr(f"{PACKAGE}.prepare.tool_versions", lambda: {"sentencepiece": "9"})
    prepare.main(arguments(source, out))
    (out / "MANIFEST.json").unlink()
    assert "tools sentencepiece = " in error_of(*arguments(source, out))


def test_two_runs_do_not_meet(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locks.held(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_held", {})  # as another process sees it
            line = error_of(*arguments(source, tmp_path))
        assert f"{tmp_path} is being written by process {os.getpid()} on " in line
    assert not list(tmp_path.iterdir())


def test_what_is_finished_is_ready_where_nothing_can_be_written(
    prepared: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(locks, "held", None)
    prepare.main(arguments(source, prepared))
    assert f"{prepared} is ready" in capsys.readouterr().out


# --- No room


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Makes every write beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("finished", "size"),
    [([], 1000), (["raw"], 4000), (["raw", "spm"], 3500), (["raw", "spm", "bin"], 500)],
)
def test_full_disk(prepared: Path, source: Path, tmp_path: Path, finished: list[str], size: int) -> None:
    out = tmp_path / "out"
    for stage in finished:
        shutil.copytree(prepared / stage, out / stage, symlinks=True)
    before = snapshot(out)
    with files_of_at_most(size):
        message = error_of(*arguments(source, out))
    assert "File too large" in message and "free some space and run the same command again" in message
    assert_nothing_half_written(out)
    assert snapshot(out).items() >= before.items()
    prepare.main(arguments(source, out))
    assert snapshot(out) == snapshot(prepared)


def test_out_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "File exists" in error_of(*arguments(source, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"
