"""fairseq's own commands with what they cannot use: the line names it, and the plugin is not blamed for it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from fairseq import models, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from helpers import ROOT, TRAIN_ARGS
from helpers_commands import run_warm
from helpers_training import OPTIONS
from test_command_lines import line_of

from xmoe_fairseq.common import guard
from xmoe_fairseq.distributed import launch
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.stock_commands.numbers import check_numbers


def test_a_translation_model_is_no_language_model(toy_run: Path, toy_data: Path) -> None:
    words = ("--user-dir", ROOT / "xmoe_fairseq", "--path", toy_run / "checkpoint_last.pt", "--cpu")
    line = line_of(run_warm("fairseq-eval-lm", toy_data, *words, check=False))
    assert "is a translation model, which the task language_modeling cannot use" in line and "fault" not in line


def test_a_language_model_does_not_translate() -> None:
    task = tasks.TASK_REGISTRY["translation"].__new__(tasks.TASK_REGISTRY["translation"])
    with pytest.raises(UserError, match="transformer_lm_gpt is a language model, which the task translation cannot"):
        models.build_model(argparse.Namespace(arch="transformer_lm_gpt"), task)


def preprocess(folder: Path, *words: str) -> Any:
    given = ("--user-dir", ROOT / "xmoe_fairseq", "-s", "aa", "-t", "bb", "--trainpref", folder / "train")
    return run_warm("fairseq-preprocess", *given, "--destdir", folder / "out", *words, check=False)


def test_files_of_preprocess(tmp_path: Path) -> None:
    for language in ("aa", "bb"):
        (tmp_path / f"train.{language}").write_bytes("é b\nc\n".encode())
    assert preprocess(tmp_path).returncode == 0
    assert (tmp_path / "out/train.aa-bb.aa.idx").is_file()
    assert "dict.aa.txt: File exists" in line_of(preprocess(tmp_path))
    (tmp_path / "train.bb").write_bytes(b"b\n\xff\xe9\n")
    assert "train.bb, line 2: not UTF-8 (0xff)" in line_of(preprocess(tmp_path, "--destdir", str(tmp_path / "two")))
    (tmp_path / "train.bb").unlink()
    os.mkfifo(tmp_path / "train.bb")
    assert "train.bb: it is a named pipe and no file" in line_of(
        preprocess(tmp_path, "--destdir", str(tmp_path / "two"))
    )
    assert not (tmp_path / "two").exists()


def test_who_is_to_blame_when_a_program_is_started_as_a_module() -> None:
    code = compile("def f():\n    assert 1 > 2\n", "score.py", "exec")
    spec = argparse.Namespace(name="fairseq_cli.score")
    program: dict[str, Any] = {"__name__": "__main__", "__spec__": spec}
    exec(code, program)
    with pytest.raises(UserError) as end, guard.one_line():
        program["f"]()
    assert "fairseq cannot continue (AssertionError" in end.value.message
    assert "in fairseq_cli.score" in end.value.message and "fault" not in end.value.message


def test_an_error_without_words_shows_the_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as end, guard.one_line():
        raise AssertionError
    assert "(AssertionError: raise AssertionError)" in end.value.message


@pytest.mark.parametrize("name", ["total_num_update", "save_interval", "batch_size", "tokens_per_sample", "workers"])
def test_numbers_that_must_be_positive(name: str) -> None:
    check_numbers({name: 1})
    with pytest.raises(
        UserError, match=rf"--{name.replace('_', '-')} 0 is out of range: it must be (in \[1, |at least 1)"
    ):
        check_numbers({name: 0})


@pytest.mark.parametrize("kind", ["a link to nowhere", "a named pipe"])
def test_a_last_checkpoint_that_is_no_file(kind: str, toy_data: Path, tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    last.symlink_to("nowhere") if kind == "a link to nowhere" else os.mkfifo(last)
    parser = options.get_training_parser()
    words = [str(toy_data), *TRAIN_ARGS, "--arch", "xmoe_transformer_tiny", "--save-dir", str(tmp_path)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
    with pytest.raises(UserError, match=r"checkpoint_last.pt, from which training would resume, is no file"):
        launch.check_files(cfg)


def test_a_log_that_nobody_reads(toy_data: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    words = (*TRAIN_ARGS, *OPTIONS, "--arch", "xmoe_transformer_tiny", "--save-dir", tmp_path / "run")
    line = line_of(run_warm("fairseq-train", toy_data, *words, "--log-file", tmp_path / "log", check=False))
    assert "--log-file" in line and "cannot be written: give a file in a folder that is there" in line
