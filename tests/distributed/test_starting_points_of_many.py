"""Processes that share experts start from what one process starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_processes import close, train_together
from helpers_training import MODEL, Run, train

QUIET = ("--disable-validation", "--no-epoch-checkpoints")
OPTIONS = (*MODEL, *QUIET, "--dropout", "0")
PARALLEL = ("--ddp-backend", "legacy_ddp", "--moe-expert-parallel", "2")
AVERAGES = ("--store-ema", "--ema-fp32", "--ema-decay")
# A rate at which parameters of 32 bits stay where they are.
STILL = ("--lr", "1e-12", "--lr-scheduler", "fixed", "--warmup-updates", "0")


@pytest.fixture(scope="module")
def base(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(toy_data, tmp_path_factory.mktemp("base"), 3, *OPTIONS, *AVERAGES, "0.5")


def test_fine_tuning_and_averages_of_a_seed(base: Run, toy_data: Path, tmp_path: Path) -> None:
    file = str(base.save / "checkpoint_last.pt")
    starts = ("--finetune-from-model", file, *AVERAGES, "1", "--ema-seed-model", file)
    run = train_together(2, toy_data, tmp_path, 1, *OPTIONS, *PARALLEL, *STILL, *starts)
    saved, kept = (torch.load(one.save / "checkpoint_last.pt", weights_only=True) for one in (run, base))
    close(saved["model"], kept["model"])
    close(saved["extra_state"]["ema"], kept["extra_state"]["ema_fp32_params"])
    assert {moments["step"] for moments in saved["last_optimizer_state"]["state"].values()} == {1}


def test_a_run_goes_on_with_another_optimizer_and_new_averages(base: Run, toy_data: Path, tmp_path: Path) -> None:
    state = torch.load(base.save / "checkpoint_last.pt", weights_only=True)
    for name in ("ema", "ema_fp32_params"):
        del state["extra_state"][name]
    torch.save(state, tmp_path / "plain.pt")
    starts = ("--restore-file", str(tmp_path / "plain.pt"), *AVERAGES, "1")
    starts += ("--optimizer-overrides", "{'weight_decay': 0.5}")
    run = train_together(2, toy_data, tmp_path / "run", 4, *OPTIONS, *PARALLEL, *STILL, *starts)
    saved = torch.load(run.save / "checkpoint_last.pt", weights_only=True)
    close(saved["extra_state"]["ema"], state["model"])
    assert "they begin with its parameters" in run.said
    assert [group["weight_decay"] for group in saved["last_optimizer_state"]["param_groups"]] == [0.5]
    assert {moments["step"] for moments in saved["last_optimizer_state"]["state"].values()} == {4}


def test_half_precision_that_saves_memory(toy_data: Path, tmp_path: Path) -> None:
    """Two processes train as one; without the balance loss a batch is worth as much in one as in another."""
    options = (*OPTIONS, "--fp16", "--memory-efficient-fp16", "--adam-eps", "1e-3", "--moe-loss-coeff", "0")
    one = train(toy_data, tmp_path / "one", 3, *options, "--update-freq", "2")
    two = train_together(2, toy_data, tmp_path / "two", 3, *options, *PARALLEL)
    for name, value in two.parameters().items():
        torch.testing.assert_close(value, one.parameters()[name], rtol=0, atol=4e-3)
    again = train_together(2, toy_data, tmp_path / "two", 4, *options, *PARALLEL)
    assert "(epoch 1 @ 3 updates)" in again.said
