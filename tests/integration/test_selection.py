"""Which checkpoint is the best: metrics that are refused, how many are kept, when training stops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from helpers_processes import Job
from helpers_training import MODEL, train

from xmoe_fairseq.checkpoints import selection


def error_of(said: str) -> str:
    (line,) = [line for line in said.split("\n") if line.startswith("xmoe_fairseq: error: ")]
    return line


def test_a_metric_that_validation_lacks_is_refused_before_the_first_update(toy_data: Path, tmp_path: Path) -> None:
    options = ("--best-checkpoint-metric", "blue", "--log-interval", "1", "--log-format", "simple")
    run = train(toy_data, tmp_path, 2, *MODEL, *options, check=False)
    line = error_of(run.said)
    assert run.process.exitcode == 1 and "--best-checkpoint-metric blue is not given" in line
    assert all(name in line for name in ("loss", "nll_loss", "ppl", "enc_experts", "bleu comes with --eval-bleu"))
    assert "train_inner" not in run.said and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("metric", ["nll_loss", "ppl", "dec_experts", "num_updates"])
def test_what_validation_gives_works(metric: str, toy_data: Path, tmp_path: Path) -> None:
    run = train(toy_data, tmp_path, 2, *MODEL, "--best-checkpoint-metric", metric, "--no-epoch-checkpoints")
    assert f"best_{metric}" in run.said or (tmp_path / "checkpoint_best.pt").is_file()


class FakeTrainer:
    """What `save_checkpoint` asks of a trainer."""

    data_parallel_rank = 0
    should_save_checkpoint_on_current_rank = True
    checkpoint_suffix = ""
    task = None

    def __init__(self) -> None:
        self.updates = 0

    def consolidate_optimizer(self) -> None:
        pass

    def get_model(self) -> None:
        pass

    def get_num_updates(self) -> int:
        return self.updates

    def save_checkpoint(self, path: str, extra_state: dict[str, Any]) -> str:
        Path(path).write_text(f"{extra_state['val_loss']}")
        return path


@pytest.fixture
def no_best() -> Iterator[None]:
    yield
    vars(checkpoint_utils.save_checkpoint).pop("best", None)


RISING, FALLING = (3.0, 3.5, 4.25, 5.125, 6.0, 7.0, 8.0), (8.0, 7.0, 6.0, 5.125, 4.25, 3.5, 3.0)
MIXED = (5.0, 7.0, 3.0, 9.0, 4.0, 8.0, 2.0)


@pytest.mark.parametrize("values", [RISING, FALLING, MIXED], ids=["rising", "falling", "mixed"])
@pytest.mark.parametrize("largest", [False, True], ids=["least", "largest"])
@pytest.mark.parametrize("keep", [1, 3, 5, 9])
def test_as_many_of_the_best_are_kept_as_were_asked_for(
    values: tuple[float, ...], largest: bool, keep: int, no_best: None, tmp_path: Path
) -> None:
    trainer: Any = FakeTrainer()
    cfg = CheckpointConfig(
        save_dir=str(tmp_path),
        keep_best_checkpoints=keep,
        best_checkpoint_metric="x_loss",
        maximize_best_checkpoint_metric=largest,
    )
    epochs = SimpleNamespace(epoch=1, end_of_epoch=lambda: False, state_dict=dict)
    for number, value in enumerate(values, start=1):
        trainer.updates = number
        checkpoint_utils.save_checkpoint(cfg, trainer, epochs, np.float64(value))
        kept = sorted(float(path.read_text()) for path in tmp_path.glob("checkpoint.best_x_loss_*.pt"))
        assert kept == sorted(sorted(values[:number], reverse=largest)[:keep])
    assert float((tmp_path / "checkpoint_best.pt").read_text()) == (max(values) if largest else min(values))


def test_checkpoints_are_kept_by_updates_and_epochs_beside_the_best(toy_data: Path, tmp_path: Path) -> None:
    options = ("--save-interval-updates", "2", "--keep-interval-updates", "2", "--keep-last-epochs", "1")
    train(toy_data, tmp_path, 30, *MODEL, *options, "--keep-best-checkpoints", "3", "--lr", "0.5")
    names = {path.name for path in tmp_path.glob("*.pt")}
    best = {name for name in names if name.startswith("checkpoint.best_loss_")}
    assert len(best) == 3 and {"checkpoint_best.pt", "checkpoint_last.pt"} <= names
    assert len([name for name in names if re.fullmatch(r"checkpoint_\d+_\d+\.pt", name)]) <= 2
    assert len([name for name in names if re.fullmatch(r"checkpoint\d+\.pt", name)]) == 1


# A rate that makes every validation worse than the first one.
WORSE = ("--lr", "5", "--validate-interval-updates", "2", "--save-interval-updates", "2", "--no-epoch-checkpoints")


def test_patience_ends_all_processes_and_is_not_forgotten(toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, *WORSE, "--patience", "2")
    job = Job(2, toy_data, tmp_path / "two", *options, "--max-update", "40")
    assert job.wait() == [0, 0]
    said = [run.said for run in job.runs]
    assert "early stop since valid performance hasn't improved for last 2 runs" in said[0]
    state = torch.load(tmp_path / "two/checkpoint_last.pt", weights_only=True)
    assert 4 <= state["optimizer_history"][-1]["num_updates"] < 40
    assert state["extra_state"]["xmoe_selection"]["runs"] == 2
    first = train(toy_data, tmp_path / "run", 4, *options)
    assert "early stop" not in first.said
    again = train(toy_data, tmp_path / "run", 40, *options)
    assert "early stop" in again.said
    assert (
        torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=True)["optimizer_history"][-1]["num_updates"] == 6
    )


def test_bleu_of_empty_translations_is_0() -> None:
    from fairseq_cli.train import get_valid_stats

    trainer = SimpleNamespace(task=SimpleNamespace(cfg=SimpleNamespace(eval_bleu=True)), get_num_updates=lambda: 3)
    cfg: Any = SimpleNamespace(checkpoint=SimpleNamespace(best_checkpoint_metric="bleu"))
    assert get_valid_stats(cfg, trainer, {"loss": 1.0}, False) == {"loss": 1.0, "bleu": 0.0, "num_updates": 3}
    assert get_valid_stats(cfg, trainer, {"bleu": 2.0}, False)["bleu"] == 2.0
    trainer.task.cfg.eval_bleu = False
    assert "bleu" not in get_valid_stats(cfg, trainer, {"loss": 1.0}, False)


def test_values_of_another_metric_are_not_compared(no_best: None) -> None:
    checkpoint_utils.save_checkpoint.best = 3.0
    cfg = CheckpointConfig(best_checkpoint_metric="bleu")
    selection.restore(cfg, {"xmoe_selection": {"metric": "loss", "best": 3.0, "runs": 1}})
    assert not hasattr(checkpoint_utils.save_checkpoint, "best")
