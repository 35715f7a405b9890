"""What a command cannot do without is named before anything is read, in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fairseq import options
from fairseq.registry import REGISTRIES
from helpers import TRAIN_ARGS
from helpers_commands import run_warm
from helpers_training import OPTIONS

from xmoe_fairseq.common import guard
from xmoe_fairseq.errors import UserError

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
}
TRAINED = "data --task translation --path x.pt"
NEEDED = {
    "fairseq-train": ("data --arch transformer --optimizer adam", ("data", "--arch", "--optimizer")),
    "fairseq-generate": (TRAINED, ("data", "--path")),
    "fairseq-interactive": (TRAINED, ("data", "--path")),
    "fairseq-validate": (TRAINED, ("data", "--path", "--task")),
    "fairseq-eval-lm": ("data --path x.pt", ("data", "--path")),
}
PARTS = {
    "--bpe sentencepiece": ("fairseq-generate", "--sentencepiece-model"),
    "--bpe sentencepiece_bytes": ("fairseq-interactive", "--sentencepiece-model"),
    "--bpe subword_nmt": ("fairseq-generate", "--bpe-codes"),
    "--lr-scheduler polynomial_decay": ("fairseq-train", "--total-num-update"),
    "--lr-scheduler triangular": ("fairseq-train", "--max-lr.*"),
}


def parse(command: str, words: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parses the words as the command does, which takes them from the program."""
    monkeypatch.setattr(sys, "argv", [f"/bin/{command}", *words.split()])
    return options.parse_args_and_arch(PARSERS[command]())


def without(words: str, option: str) -> str:
    name, *rest = words.split() if option == "data" else words.partition(option)[::2]
    return " ".join(rest) if option == "data" else f"{name} {' '.join(rest[0].split()[1:])}"


@pytest.mark.parametrize("command", NEEDED)
def test_options_of_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, needed = NEEDED[command]
    assert parse(command, words, monkeypatch)
    for option in needed:
        with pytest.raises(UserError, match=f"the following arguments are required: {option}") as end:
            parse(command, without(words, option), monkeypatch)
        assert end.value.message.endswith(f"see {command} --help")


@pytest.mark.parametrize("words", PARTS)
def test_options_of_parts(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, option = PARTS[words]
    with pytest.raises(UserError, match=f"{option}:? (it )?is missing"):
        parse(command, f"{NEEDED[command][0]} {words}", monkeypatch)


def test_who_parses_a_list_of_words_may_leave_options_out() -> None:
    assert options.parse_args_and_arch(options.get_generation_parser(), ["data"]).path is None


@pytest.mark.parametrize("kind", ["lr_scheduler", "optimizer"])
def test_no_default_of_stock_fairseq_is_refused(kind: str) -> None:
    given = {"triangular": ["--max-lr", "1"], "polynomial_decay": ["--total-num-update", "9"]}
    for name in REGISTRIES[kind]["registry"]:
        words = ["data", f"--{kind.replace('_', '-')}", name, *given.get(name, [])]
        options.parse_args_and_arch(options.get_training_parser(), [*words, "--arch", "transformer"])


def test_the_words_of_fairseq_about_an_option_are_enough() -> None:
    program: dict[str, Any] = {"__name__": "fairseq_cli.validate"}
    exec("def check():\n    assert 1 > 2, 'Must specify batch size either with --max-tokens or --batch-size'", program)
    with pytest.raises(UserError) as end, guard.one_line():
        program["check"]()
    assert end.value.message == "Must specify batch size either with --max-tokens or --batch-size"


def to_nobody() -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


def to_full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize(("before", "code", "said"), [
    (to_full, 1, "xmoe_fairseq: error: standard output cannot be written: No space left on device\n"),
    (to_nobody, guard.BROKEN_PIPE, ""),
])  # fmt: skip
def test_training_whose_log_cannot_be_written(
    before: Callable[[], None], code: int, said: str, toy_data: Path, tmp_path: Path
) -> None:
    words = (*TRAIN_ARGS, *OPTIONS, "--arch", "xmoe_transformer_tiny", "--save-dir", tmp_path, "--max-update", "1")
    result = run_warm("fairseq-train", toy_data, *words, check=False, before=before)
    assert result.returncode == code and result.stderr.endswith(said), result.stderr[-2000:]
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("*.pt"))
