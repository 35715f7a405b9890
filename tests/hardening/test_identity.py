"""A model is used with the data that it was trained on, which is known by its content."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_cli import generate
from helpers_identity import COMMANDS, PAIRS, generate_words, prepared, program
from helpers_training import MODEL, train

from xmoe_fairseq import cli
from xmoe_fairseq.common import identity
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.routing_usage import measure


@pytest.fixture(scope="module")
def data(small_data: Path) -> Path:
    return small_data


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pieces, other ones."""
    return prepared(tmp_path_factory.mktemp("two"), "ijklmnop")


@pytest.fixture(scope="module")
def checkpoint(small_model: Path) -> Path:
    return small_model


def changed(checkpoint: Path, path: Path, value: Any) -> Path:
    """The checkpoint with another entry; None for none, as older versions wrote it."""
    state = torch.load(checkpoint, weights_only=True)
    del state["task_state"][identity.KEY]
    if value is not None:
        state["task_state"][identity.KEY] = value
    torch.save(state, path)
    return path


def test_what_a_checkpoint_keeps(data: Path, other: Path, checkpoint: Path) -> None:
    kept = torch.load(checkpoint, weights_only=True)["task_state"][identity.KEY]
    assert kept == identity.of_folder(str(data / "bin")).as_plain()
    assert kept["folder"] == str(data / "bin") and kept["languages"] == ["en", *PAIRS]
    different = identity.of_folder(str(other / "bin")).as_plain()
    assert kept["dictionary"] != different["dictionary"] and kept["sentencepiece"] != different["sentencepiece"]


def test_counts_and_places_do_not_matter(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data / "bin", tmp_path / "copy")
    (copy / "dict.txt").write_text((data / "bin/dict.txt").read_text().replace(" 100\n", " 7\n"))
    one, two = (identity.of_folder(str(folder)).as_plain() for folder in (data / "bin", copy))
    assert one | {"folder": ""} == two | {"folder": ""}
    again = prepared(tmp_path / "again", "abcdefgh")  # the file of SentencePiece names the place
    assert identity.of_folder(str(again / "bin")).as_plain() | {"folder": ""} == one | {"folder": ""}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_data_is_refused(command: str, other: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was trained with the dictionary \w+ of .*, but .* has \w+: ") as error:
        COMMANDS[command](other, checkpoint, tmp_path / "out")
    assert str(checkpoint) in str(error.value) and str(other / "bin") in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model"])
def test_training_does_not_go_on_with_other_data(option: str, other: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = train(other / "bin", tmp_path, 4, *MODEL, option, str(checkpoint), check=False)
    last = run.said.strip().splitlines()[-1]
    assert run.process.exitcode == 1 and "Traceback" not in run.said
    assert f"{checkpoint} was trained with the dictionary" in last and str(other / "bin") in last
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_does_not_go_on_with_other_data(other: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path / "checkpoint_last.pt")
    run = train(other / "bin", tmp_path, 4, *MODEL, check=False)
    assert run.process.exitcode == 1 and "was trained with the dictionary" in run.said.strip().splitlines()[-1]


def test_other_languages_are_refused(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data / "bin", tmp_path / "bin")
    (copy / "langs.txt").write_text("en\nzu\nde\n")
    with pytest.raises(UserError, match=r"trained with the languages en,de,zu of .* has en,zu,de"):
        measure(checkpoint, copy)


def test_another_sentencepiece_model_is_refused(data: Path, other: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = other / "bin/spm.model"
    words = generate_words(data, checkpoint, "--sentencepiece-model", model)
    with pytest.raises(UserError, match=rf"--sentencepiece-model {model} \(\w+\) is of another preparation"):
        program(generate.cli_main, *words)
    copy = shutil.copytree(data / "bin", tmp_path / "bin")
    (copy / "spm.model").unlink()  # then the checkpoint knows
    with pytest.raises(UserError, match=rf"--sentencepiece-model {model} \(\w+\) is of another preparation"):
        program(generate.cli_main, copy, *words[1:])
    shutil.copy(model, copy)
    with pytest.raises(UserError, match=r"trained with the spm.model \w+ of"):
        measure(checkpoint, copy)


def test_a_checkpoint_of_before_is_taken_with_a_warning(
    data: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = changed(checkpoint, tmp_path / "old.pt", None)
    with caplog.at_level(logging.WARNING):
        measure(old, data / "bin")
    assert f"{old} does not say which dictionary it was trained with: {data / 'bin'} cannot be checked" in caplog.text


@pytest.mark.parametrize("value", [5, [], {}, {"folder": 1}, {"dictionary": []}])
def test_a_damaged_entry_is_one_line(value: Any, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    bad = changed(checkpoint, tmp_path / "bad.pt", value)
    with pytest.raises(UserError, match=rf"{identity.KEY} of checkpoint {bad} does not have the right form"):
        measure(bad, data / "bin")


def test_it_survives_what_is_done_to_files(data: Path, other: Path, checkpoint: Path, tmp_path: Path) -> None:
    kept = torch.load(checkpoint, weights_only=True)["task_state"]
    for words in (
        ["shard", str(checkpoint), "--shards", "2", "--out", "parts.pt"],
        ["consolidate", "parts.pt", "--out", "whole.pt"],
        ["average", "parts.pt", str(checkpoint), "--out", "mean.pt"],
    ):
        cli.main(["checkpoint", *(str(tmp_path / word) if word.endswith(".pt") else word for word in words)])
    for name in ("parts.pt", "whole.pt", "mean.pt"):
        assert torch.load(tmp_path / name, weights_only=True)["task_state"] == kept
    with pytest.raises(UserError, match="was trained with the dictionary"):
        measure(tmp_path / "parts.pt", other / "bin")
    resumed = train(data / "bin", tmp_path / "run", 3, *MODEL, "--restore-file", str(checkpoint))
    assert torch.load(resumed.save / "checkpoint_last.pt", weights_only=True)["task_state"] == kept


def test_models_of_two_dictionaries_have_no_mean(data: Path, other: Path, checkpoint: Path, tmp_path: Path) -> None:
    value = identity.of_folder(str(other / "bin")).as_plain()
    second = changed(checkpoint, tmp_path / "second.pt", value)
    with pytest.raises(UserError, match=r"was trained with the dictionary \w+ of .*, but \S+second.pt with"):
        cli.main(["checkpoint", "average", str(checkpoint), str(second), "--out", str(tmp_path / "mean.pt")])
    assert not (tmp_path / "mean.pt").exists()
