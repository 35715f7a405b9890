"""Training that is killed, stopped, short of disk or given damaged files ends as if nothing had happened."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import pytest
import torch
from helpers_commands import run_warm
from helpers_training import MODEL, Run, assert_same, flipped_bit, train

from xmoe_fairseq.cli import main

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
            attempted = Run(data, save, *options, "--max-update", "30", dies_after=dies_after)
            if not while_writing and killed < kills:
                attempted.process.join(rng.uniform(0, seconds))
                attempted.process.kill()
            if attempted.wait() == 0:
                assert_same(attempted.parameters(), whole.parameters())
                break
            assert attempted.process.exitcode == -9, attempted.said[-3000:]
            killed += 1
            cut_short += len(list(save.glob("*.tmp")))
        if killed >= kills and attempted.process.exitcode == 0:
            assert not list(save.glob("*.tmp"))
            return cut_short
    raise AssertionError("the runs end before they are killed")


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


STATE = {
    "topany": ("--moe-any-adapt", "2", "--moe-any-experts", "1"),
    "relu": ("--moe-relu-start", "0.01"),
}


@pytest.mark.parametrize("kind", STATE)
def test_the_state_of_routers_moves_once_per_update_and_resumes(kind: str, toy_data: Path, tmp_path: Path) -> None:
    options = ("--arch", "moe_transformer_tiny", *TINY, "--moe-router", kind, *STATE[kind], "--update-freq", "2")
    whole = train(toy_data, tmp_path / "whole", 6, *options)
    for updates in (3, 6):
        parts = train(toy_data, tmp_path / "parts", updates, *options)
    assert parts.said.count("Loaded checkpoint") == 1
    assert_same(parts.parameters(), whole.parameters())
    state = {name.rpartition(".")[2]: value for name, value in whole.parameters().items() if ".router." in name}
    # The last update was made after the state had moved for the one before.
    assert state["update"] == 5 and state["weight"].dtype == torch.float32
    if kind == "relu":
        ratio = math.log(state["coefficient"] / 0.01, 1.2)
        assert ratio == pytest.approx(round(ratio)) and round(ratio) % 2 == 1


def test_a_trained_run_stays_as_it_is(toy_data: Path, tmp_path: Path) -> None:
    trained = train(toy_data, tmp_path, 3)
    before = trained.parameters()
    again = train(toy_data, tmp_path, 3)
    assert "nothing is left to train: the checkpoint has 3 updates, --max-update is 3" in again.said
    assert_same(again.parameters(), before)


def test_the_newest_intact_checkpoint_replaces_a_damaged_last_one(toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, "--save-interval-updates", "3")
    whole = train(toy_data, tmp_path / "whole", 12, *options)
    damaged = train(toy_data, tmp_path / "run", 10, *options)
    newest, last = (damaged.save / name for name in ("checkpoint_1_9.pt", "checkpoint_last.pt"))
    (damaged.save / "checkpoint_best.pt").write_bytes(b"nothing")
    last.write_bytes(last.read_bytes()[:-1000])
    with flipped_bit(newest, newest.stat().st_size // 2):
        resumed = train(toy_data, tmp_path / "run", 12, *options)
    warnings = [
        line for line in resumed.said.split("\n") if "WARNING" in line and "xmoe_fairseq.patches.resuming" in line
    ]
    assert len(warnings) == 2
    assert "checkpoint_1_9.pt" in warnings[0] and "checksum" in warnings[0]
    assert "checkpoint_last.pt" in warnings[1] and warnings[1].endswith("the most trained intact one of the folder")
    assert "checkpoint_1_6.pt (epoch 1 @ 6 updates)" in resumed.said
    assert_same(resumed.parameters(), whole.parameters())


def test_a_damaged_file_that_was_named_is_an_error(toy_data: Path, tmp_path: Path) -> None:
    train(toy_data, tmp_path, 4, *MODEL, "--save-interval-updates", "2")
    (tmp_path / "mine.pt").write_bytes((tmp_path / "checkpoint_last.pt").read_bytes()[:-1000])
    failed = train(toy_data, tmp_path, 6, *MODEL, "--restore-file", str(tmp_path / "mine.pt"), check=False)
    assert failed.wait() == 1
    assert "mine.pt" in failed.said.strip().split("\n")[-1] and "truncated or damaged" in failed.said


def test_a_full_disk_ends_training_and_loses_no_checkpoint(toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, "--save-interval-updates", "3")
    whole = train(toy_data, tmp_path / "whole", 9, *options)
    size = (whole.save / "checkpoint_last.pt").stat().st_size
    # Room for update 3, in three files (of its epoch, best, last), and for a part of the next one.
    full = train(toy_data, tmp_path / "full", 9, *options, room=3 * size + size // 2, check=False)
    assert full.wait() == 1
    error = full.said.strip().split("\n")[-1]
    assert (
        error.startswith("xmoe_fairseq: error: ") and "checkpoint_1_6.pt could not be written: No space left" in error
    )
    assert {path.name for path in full.save.glob("*pt*")} == {
        f"checkpoint_{name}.pt" for name in ("1_3", "best", "last")
    }
    resumed = train(toy_data, tmp_path / "full", 9, *options)
    assert "checkpoint_last.pt (epoch 1 @ 3 updates)" in resumed.said
    assert_same(resumed.parameters(), whole.parameters())


def test_training_goes_on_and_starts_from_shards(toy_data: Path, tmp_path: Path) -> None:
    whole = train(toy_data, tmp_path / "whole", 8)
    half = train(toy_data, tmp_path / "half", 4)
    parts = tmp_path / "parts.pt"
    main(["checkpoint", "shard", str(half.save / "checkpoint_last.pt"), "--shards", "3", "--out", str(parts)])
    resumed = train(toy_data, tmp_path / "resumed", 8, *MODEL, "--restore-file", str(parts))
    assert_same(resumed.parameters(), whole.parameters())
    tuned = [
        train(toy_data, tmp_path / name, 2, *MODEL, "--finetune-from-model", str(path)).parameters()
        for name, path in (("one", half.save / "checkpoint_last.pt"), ("many", parts))
    ]
    assert_same(*tuned)


def test_translation_from_shards(toy_data: Path, tmp_path: Path) -> None:
    trained = train(toy_data, tmp_path, 8)
    parts = tmp_path / "parts.pt"
    main(["checkpoint", "shard", str(trained.save / "checkpoint_last.pt"), "--shards", "2", "--out", str(parts)])
    options = (
        "--user-dir",
        "xmoe_fairseq",
        "--task",
        "multilingual_local",
        "--source-lang",
        "en",
        "--target-lang",
        "xx",
    )
    outputs = [
        run_warm("fairseq-generate", toy_data, *options, "--cpu", "--max-len-b", "9", "--path", path, check=False)
        for path in (trained.save / "checkpoint_last.pt", parts)
    ]
    hypotheses = [[line for line in one.stdout.split("\n") if line.startswith("H-")] for one in outputs]
    assert len(hypotheses[0]) == 20 and hypotheses[0] == hypotheses[1]
    (tmp_path / "parts.experts-1-of-2.pt").unlink()
    failed = run_warm("fairseq-generate", toy_data, *options, "--cpu", "--path", parts, check=False)
    assert failed.returncode == 1
    assert "parts.experts-1-of-2.pt is missing" in failed.stderr.strip().split("\n")[-1]
