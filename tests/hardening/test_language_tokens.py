"""Language tokens of a checkpoint hold in every command; pieces are joined once; what fairseq-generate writes."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq_cli import generate, interactive, validate
from helpers_training import MODEL, train

from xmoe_fairseq.checkpoints.language_tokens import OPTIONS, warn_of_others
from xmoe_fairseq.errors import UserError

TRAINED = {
    "encoder_langtok": "src",
    "decoder_langtok": True,
    "lang_tok_style": "mbart",
    "lang_tok_replacing_bos_eos": True,
}
COMMON = ("--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--source-lang", "en", "--target-lang", "xx")


def write_checkpoint(path: Path, **task: Any) -> Path:
    """Writes as much of a checkpoint as says how it was trained."""
    state = {"model": {"w": torch.zeros(1)}, "cfg": {"task": {"_name": "multilingual_local", **task}, "model": {}}}
    torch.save(state, path)
    return path


def parsed(path: Path | str, *more: str) -> Any:
    return options.parse_args_and_arch(options.get_generation_parser(), ["data", *COMMON, "--path", str(path), *more])


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_model_was_trained_with_holds(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "one.pt", **{name: TRAINED[name]})
    assert getattr(parsed(path), name) == TRAINED[name]
    assert getattr(parsed(tmp_path / "none.pt"), name) != TRAINED[name]


def test_a_stock_task_that_has_some_of_the_options_takes_those(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "one.pt", **TRAINED)
    words = ["data", "--task", "multilingual_translation", "--lang-pairs", "en-xx", "--path", str(path)]
    found = options.parse_args_and_arch(options.get_generation_parser(), words)
    assert (found.encoder_langtok, found.decoder_langtok) == ("src", True)
    assert not hasattr(found, "lang_tok_style")


def test_what_is_given_holds_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path / "one.pt", **TRAINED)
    found = parsed(path, "--encoder-langtok", "tgt", "--lang-tok-style", "mbart")
    assert [getattr(found, name) for name in OPTIONS] == ["tgt", True, "mbart", True]
    assert [record.getMessage() for record in caplog.records] == [
        f"--encoder-langtok is tgt, but {path} was trained with src: it reads what it never saw"
    ]


def test_models_that_see_languages_differently_do_not_translate_together(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one.pt", encoder_langtok="src")
    other = write_checkpoint(tmp_path / "other.pt", encoder_langtok=None)
    assert parsed(f"{one}:{one}").encoder_langtok == "src"
    with pytest.raises(UserError, match=r"one.pt was trained with --encoder-langtok src, .*other.pt with none: models"):
        parsed(f"{one}:{other}")
    assert parsed(f"{one}:{other}", "--encoder-langtok", "tgt").encoder_langtok == "tgt"


def test_training_that_goes_on_with_other_tokens_says_so(caplog: pytest.LogCaptureFixture) -> None:
    state = {"cfg": {"task": {"_name": "multilingual_local", **TRAINED}, "model": {}}}
    warn_of_others(state, "last.pt", Namespace(**TRAINED))
    assert not caplog.records
    warn_of_others(state, "last.pt", Namespace(**TRAINED | {"encoder_langtok": None}))
    (record,) = caplog.records
    assert "last.pt was trained with --encoder-langtok src, training resumes with none" in record.getMessage()


@pytest.mark.parametrize("join", ["sentencepiece", "@@ ", "letter"])
@pytest.mark.parametrize("option", ["--post-process", "--remove-bpe"])
def test_pieces_are_not_joined_twice(option: str, join: str) -> None:
    with pytest.raises(UserError, match=f"{join.strip()} with --bpe sentencepiece_bytes joins the pieces twice"):
        parsed("none.pt", "--bpe", "sentencepiece_bytes", "--sentencepiece-model", "m", option, join)
    with pytest.raises(UserError, match="--bpe sentencepiece joins the pieces twice"):
        parsed("none.pt", "--bpe", "sentencepiece", "--sentencepiece-model", "m", option, "sentencepiece")
    assert parsed("none.pt", option, join).post_process == join  # without --bpe, fairseq alone joins them


# --- The commands themselves


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that sees the source's token in the encoder and the target's in the decoder."""
    seen = ("--encoder-langtok", "src", "--decoder-langtok")
    return train(toy_data, tmp_path_factory.mktemp("seen"), 3, *MODEL, *seen).save / "checkpoint_last.pt"


def said(capsys: pytest.CaptureFixture[str], main: Any, *words: str | Path) -> str:
    """Runs one of fairseq's programs in this process and returns what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, words)])
        main()
    return capsys.readouterr().out


SEEN = ("--encoder-langtok", "src", "--decoder-langtok")
SEARCH = ("--cpu", "--beam", "1", "--max-len-b", "4", "--num-workers", "0")


def hypotheses(output: str) -> list[str]:
    return sorted(re.findall(r"^[SHP]-.*$", output, re.MULTILINE))


def test_every_command_sees_languages_as_in_training(
    toy_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "typed").write_text("w1 w2 w3\n")
    for main, more in (
        (generate.cli_main, SEARCH),
        (interactive.cli_main, (*SEARCH, "--input", str(tmp_path / "typed"))),
    ):
        words = (toy_data, *COMMON, "--path", checkpoint, *more)
        found = hypotheses(said(capsys, main, *words))
        assert found and found == hypotheses(said(capsys, main, *words, *SEEN))
        # Where stock fairseq's default was taken, the source had another token.
        assert any(line.startswith("S-0\t__en__ ") for line in found)
    words = (toy_data, *COMMON, "--path", checkpoint, "--cpu", "--max-tokens", "300", "--num-workers", "0")
    losses = [
        re.findall(r"\| loss ([0-9.]+)", said(capsys, validate.cli_main, *words, "--log-format", "simple", *more))
        for more in ((), SEEN, ("--encoder-langtok", "tgt"))
    ]
    assert set(losses[0]) == set(losses[1]) != set(losses[2]) and losses[0]  # a handler may say it twice


def test_an_old_output_is_kept_until_there_is_a_new_one(
    toy_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results/generate-test.txt"
    output.parent.mkdir()
    output.write_text("old\n")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint.read_bytes()[:1000])
    words = (toy_data, *COMMON, *SEARCH, "--results-path", output.parent)
    for path in (damaged, tmp_path / "none.pt"):
        with pytest.raises(UserError):
            said(capsys, generate.cli_main, *words, "--path", path)
        assert output.read_text() == "old\n" and list(output.parent.iterdir()) == [output]
    said(capsys, generate.cli_main, *words, "--path", checkpoint)
    assert output.read_text().count("\nH-") == 20 and list(output.parent.iterdir()) == [output]


def test_a_results_path_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder/generate-test.txt").mkdir(parents=True)
    for name, message in (
        ("file", "file is no folder"),
        ("file/below", "file is no folder"),
        ("link", "link is a symlink that leads nowhere"),
        ("folder", "cannot write the file .*generate-test.txt: a folder has this name"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            parsed("none.pt", "--results-path", str(tmp_path / name))
        assert "\n" not in str(caught.value)
