"""Training that goes on from files without the optimizer's state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import TRAIN_ARGS
from helpers_commands import run_warm
from helpers_training import MODEL, Run, assert_same, train

from xmoe_fairseq.cli import main

LOGGED = ("--log-format", "simple", "--log-interval", "1", "--disable-validation")


def rates(run: Run) -> dict[int, float]:
    """The learning rates of the updates that were made."""
    found = re.findall(r"train_inner \|.*?lr=([\d.e-]+),.*", run.said)
    updates = re.findall(r"train_inner \|.*?num_updates=(\d+),", run.said)
    return dict(zip(map(int, updates), map(float, found), strict=True))


@pytest.fixture(scope="module")
def whole(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    return train(toy_data, folder, 9, *MODEL, *LOGGED, "--save-interval-updates", "3")


def files(run: Run, folder: Path) -> dict[str, Path]:
    """Files without the optimizer's state after 6 updates, as they come to be."""
    last = run.save / "checkpoint_1_6.pt"
    state = torch.load(last, weights_only=True)
    del state["last_optimizer_state"]
    torch.save(state, folder / "stripped.pt")
    torch.save({**state, "last_optimizer_state": {}}, folder / "emptied.pt")
    main(["checkpoint", "average", str(last), str(run.save / "checkpoint_1_3.pt"), "--out", str(folder / "mean.pt")])
    main(["checkpoint", "shard", str(folder / "stripped.pt"), "--shards", "2", "--out", str(folder / "parts.pt")])
    return {name: folder / f"{name}.pt" for name in ("emptied", "mean", "parts")}


def test_the_updates_of_the_file_are_gone_on_from(whole: Run, toy_data: Path, tmp_path: Path) -> None:
    expected = {update: rate for update, rate in rates(whole).items() if update > 6}
    assert len(set(expected.values())) == 3
    ended = {}
    for name, path in files(whole, tmp_path).items():
        run = train(toy_data, tmp_path / name, 9, *MODEL, *LOGGED, "--restore-file", str(path))
        assert rates(run) == expected, name
        (warning,) = [line for line in run.said.split("\n") if "holds no optimizer's state" in line]
        assert "WARNING" in warning and path.name in warning and "after update 6" in warning
        ended[name] = run.parameters()
    assert_same(ended["emptied"], ended["parts"])


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["32 bits", "16 bits"])
def test_a_run_without_it_is_resumed_and_ends(precision: tuple[str, ...], toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, *LOGGED, *precision, "--no-save-optimizer-state")
    first = train(toy_data, tmp_path, 6, *options)
    before = first.parameters()
    again = train(toy_data, tmp_path, 6, *options)
    assert "nothing is left to train: the checkpoint has 6 updates" in again.said
    assert_same(again.parameters(), before)
    more = train(toy_data, tmp_path, 7, *options)
    assert list(rates(more)) == [*range(1, 8)]
    # One update of this rate moves no parameter further; from other parameters it would not end near them.
    moved = max((value.float() - before[name].float()).abs().max() for name, value in more.parameters().items())
    assert 0 < moved < 0.02


def test_reset_optimizer_counts_from_0(whole: Run, toy_data: Path, tmp_path: Path) -> None:
    path = str(whole.save / "checkpoint_1_6.pt")
    run = train(toy_data, tmp_path, 2, *MODEL, *LOGGED, "--restore-file", path, "--reset-optimizer")
    assert list(rates(run)) == [1, 2] and "holds no optimizer's state" not in run.said


def test_an_epoch_of_fewer_batches_begins_anew(whole: Run, toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, *LOGGED, "--restore-file", str(whole.save / "checkpoint_last.pt"), "--max-tokens", "2000")
    refused = train(toy_data, tmp_path, 11, *options, check=False)
    assert refused.wait() == 1
    line = refused.said.strip().split("\n")[-1]
    assert "cannot resume after batch 9 of epoch 1, which has fewer batches now" in line
    assert "--reset-dataloader" in line
    anew = train(toy_data, tmp_path, 11, *options, "--reset-dataloader")
    assert list(rates(anew)) == [10, 11]


@pytest.mark.parametrize(
    "option", ["--restore-file", "--finetune-from-model", "--continue-once", "--encoder-embed-path"]
)
def test_a_file_to_start_from_that_is_missing_is_named(option: str, toy_data: Path, tmp_path: Path) -> None:
    missing, save = tmp_path / "no_such_file.pt", tmp_path / "run"
    words = (toy_data, *TRAIN_ARGS, *MODEL, "--user-dir", "xmoe_fairseq", "--save-dir", save, "--max-update", "2")
    result = run_warm("fairseq-train", *words, option, missing, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr + result.stdout
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("xmoe_fairseq: error: ") and str(missing) in line
    assert not list(save.glob("*.pt"))
