"""A checkpoint does not depend on the processes that wrote it, and they may be killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from helpers_processes import Job, close, train_together
from helpers_training import MODEL, assert_same, train

# Without the balance loss, a batch is worth as much in one process as in another. An epoch has 13 of them: the last
# update of four is not full.
ADAM = (
    "--adam-eps",
    "1e-3",
    "--dropout",
    "0",
    "--moe-loss-coeff",
    "0",
    "--store-ema",
    "--ema-fp32",
    "--ema-decay",
    "0.5",
)
SPLIT = ("--ddp-backend", "legacy_ddp", "--moe-expert-parallel")
# Updates at which training stops, processes, those that share experts.
STAGES = ((2, 4, 2), (5, 2, 2), (7, 1, 1), (8, 4, 4))
NOISY = (*MODEL, *SPLIT, "2", "--moe-regularizer", "eom", "--activation-dropout", "0.1", "--update-freq", "2")


def test_training_goes_on_with_other_numbers_of_processes(toy_data: Path, tmp_path: Path) -> None:
    whole = train(toy_data, tmp_path / "whole", 8, *MODEL, "--update-freq", "4", *ADAM)
    for updates, size, parallel in STAGES:
        options = (*MODEL, "--update-freq", str(4 // size), *ADAM, *SPLIT, str(parallel))
        part = train_together(size, toy_data, tmp_path / "parts", updates, *options)
    assert part.said.count("Loaded checkpoint") == 3
    close(part.parameters(), whole.parameters())
    states = [torch.load(run.save / "checkpoint_last.pt", weights_only=True) for run in (part, whole)]
    assert [state["cfg"]["model"]["moe_expert_parallel"] for state in states] == [1, 1]
    assert list(states[0]) == list(states[1]) and list(states[0]["model"]) == list(states[1]["model"])
    for average in ("ema", "ema_fp32_params"):
        close(*(state["extra_state"][average] for state in states))
    moments = [state["last_optimizer_state"]["state"] for state in states]
    assert list(moments[0]) == list(moments[1])
    for number, values in moments[0].items():
        for name, value in values.items():
            torch.testing.assert_close(value, moments[1][number][name], rtol=1e-3, atol=1e-5)


def test_resumed_processes_end_bit_for_bit_the_same(toy_data: Path, tmp_path: Path) -> None:
    whole = train_together(2, toy_data, tmp_path / "whole", 9, *NOISY, "--bf16")
    for updates in (2, 4, 9):  # an epoch has 4 updates
        parts = train_together(2, toy_data, tmp_path / "parts", updates, *NOISY, "--bf16")
    assert_same(parts.parameters(), whole.parameters())


def test_processes_killed_while_saving_end_bit_for_bit_the_same(toy_data: Path, tmp_path: Path) -> None:
    options = (*NOISY, "--save-interval-updates", "2", "--keep-interval-updates", "1", "--max-update", "9")
    whole = train_together(2, toy_data, tmp_path / "whole", 9, *options)
    size = (whole.save / "checkpoint_last.pt").stat().st_size
    rng = random.Random(1)
    for _ in range(2):
        job = Job(2, toy_data, tmp_path / "killed", *options, dies_after=rng.randrange(size, 5 * size))
        if job.runs[0].wait() == 0:
            break
        killed = time.time()
        assert job.runs[0].process.exitcode == -9
        assert job.runs[1].wait() == 1 and time.time() - killed < 60
        last = job.runs[1].said.strip().split("\n")[-1]
        assert last.startswith("xmoe_fairseq: error: process 1 cannot reach the others any more")
    ended = train_together(2, toy_data, tmp_path / "killed", 9, *options)
    assert_same(ended.parameters(), whole.parameters())
