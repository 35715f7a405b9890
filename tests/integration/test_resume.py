"""Training that is killed, stopped, short of disk or given damaged files ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from helpers_training import MODEL, Run, assert_same, train

TINY = ("--share-all-embeddings", "--encoder-embed-dim", "32", "--dropout", "0.1")
# Saves within epochs of 13 updates and at their ends, and keeps few.
SAVES = ("--save-interval-updates", "4", "--keep-interval-updates", "2", "--keep-last-epochs", "1")


def kill_and_resume(data: Path, folder: Path, kills: int) -> int:
    """Kills training again and again, half the time within the writing of a checkpoint; gives how many files were
    left half-written."""
    rng = random.Random(kills)
    options = (*MODEL, *SAVES)
    start = time.time()
    whole = train(data, folder / "whole", 30, *options)
    seconds, killed, cut_short = time.time() - start, 0, 0
    size = (whole.save / "checkpoint_last.pt").stat().st_size
    for number in range(10 * kills):
        save = folder / f"killed{number}"
        for attempt in range(6):
            while_writing = (number + attempt) % 2 == 0
            # A run writes 10 files; a resumed one, fewer.
            dies_after = rng.randrange(8 * size) if while_writing and killed < kills else -1
            run = Run(data, save, *options, "--max-update", "30", dies_after=dies_after)
            if not while_writing and killed < kills:
                run.process.join(rng.uniform(0, seconds))
                run.process.kill()
            if run.wait() == 0:
                assert_same(run.parameters(), whole.parameters())
                break
            assert run.process.exitcode == -9, run.said[-3000:]
            killed += 1
            cut_short += len(list(save.glob("*.tmp")))
        if killed >= kills and run.process.exitcode == 0:
            assert not list(save.glob("*.tmp"))
            return cut_short
    raise AssertionError("the runs end before they are killed")


def test_killed_training_ends_with_the_same_parameters(toy_data: Path, tmp_path: Path) -> None:
    assert kill_and_resume(toy_data, tmp_path, 6) >= 2


@pytest.mark.slow
def test_training_killed_twenty_times_ends_with_the_same_parameters(toy_data: Path, tmp_path: Path) -> None:
    assert kill_and_resume(toy_data, tmp_path, 20) >= 6


NOISY = {
    "threshold, concatenated": (*("--arch", "xmoe_transformer_tiny", *TINY, "--sampling-method", "concat"),),
    "gshard samples, eom masks, stock order": (
        *("--arch", "moe_transformer_tiny", *TINY, "--moe-router", "gshard", "--moe-second-expert", "sampling"),
        *("--moe-regularizer", "eom", "--moe-eom-rate", "0.3", "--batch-pool-size", "0"),
    ),
    "strata, cmr gate dropout, two batches an update": (
        *("--arch", "smoe_transformer_tiny", *TINY, "--moe-regularizer", "cmr", "--moe-cmr-gate-dropout", "0.3"),
        *("--update-freq", "2", "--max-tokens", "250"),
    ),
    "virtual epochs, cosine": (
        *("--arch", "xmoe_transformer_tiny", *TINY, "--virtual-epoch-size", "250", "--activation-dropout", "0.2"),
        *("--sampling-temperature", "5", "--lr-scheduler", "cosine", "--lr-period-updates", "15"),
    ),
    "bf16": ("--arch", "xmoe_transformer_tiny", *TINY, "--bf16"),
}


@pytest.mark.parametrize("options", NOISY.values(), ids=NOISY)
def test_the_number_of_resumptions_changes_nothing(options: tuple[str, ...], toy_data: Path, tmp_path: Path) -> None:
    """Stops within epochs and, where epochs have 13 updates, at the end of one."""
    whole = train(toy_data, tmp_path / "whole", 30, *options)
    for updates in (5, 13, 21, 30):
        parts = train(toy_data, tmp_path / "parts", updates, *options)
    assert parts.said.count("Loaded checkpoint") == 3
    assert_same(parts.parameters(), whole.parameters())
