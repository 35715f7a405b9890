"""Several processes that train together, without a GPU, and the same in one process to compare with."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fairseq_cli.train
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from helpers import TRAIN_ARGS
from helpers_training import Run

from xmoe_fairseq.distributed import checkpoint_experts

# Sentences of each process, by number; of each batch of an update; of each update.
Plan = list[list[list[list[int]]]]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


class Job:
    """A training in several processes, started as torchrun does.

    Args:
        size: processes.
        dies_after: as in `Run`, for the first process.
    """

    def __init__(self, size: int, data: Path, save: Path, *options: str, dies_after: int = -1) -> None:
        port = free_port()
        self.runs = [
            Run(
                *(data, save, *options),
                dies_after=dies_after if rank == 0 else -1,
                environment=environment(rank, size, port),
            )
            for rank in range(size)
        ]

    def wait(self) -> list[int]:
        """Returns the exit codes."""
        return [run.wait() for run in self.runs]


def train_together(size: int, data: Path, save: Path, updates: int, *options: str) -> Run:
    """Trains to the end; gives the first process."""
    job = Job(size, data, save, *options, "--max-update", str(updates))
    codes = job.wait()
    assert not any(codes), job.runs[codes.index(max(codes, key=abs))].said[-3000:]
    return job.runs[0]


def uneven_plan(size: int, updates: int, update_freq: int = 1, sentences: int = 80) -> Plan:
    """Returns batches of very different sizes for the processes, and none for some."""
    rng = random.Random(7)
    plan: Plan = []
    for update in range(updates):
        batches = [[_draw(rng, sentences, rng.choice((1, 3, 9))) for _ in range(size)] for _ in range(update_freq)]
        if update % 3 == 1:
            batches[-1][update % size] = []  # the last batch of an epoch that cannot be dealt out evenly
        plan.append(batches)
    return plan


def _draw(rng: random.Random, sentences: int, count: int) -> list[int]:
    return [rng.randrange(sentences) for _ in range(count)]


def learn_together(rank: int, size: int, *args: Any) -> dict[str, Any]:
    """Is `learn` in one of several processes."""
    os.environ.update(environment(rank, size, 0))
    return learn(*args, mine=True)


def learn(data: Path, plan: Plan, words: Sequence[str], mine: bool = False) -> dict[str, Any]:
    """Trains on given sentences.

    Args:
        data: folder.
        plan: of all processes.
        words: of the command line.
        mine: take this process's sentences; else those of all, batch by batch.

    Returns:
        The logged values of each update, and in the first process all parameters at the end, and their moving averages
        where there are any.
    """
    result: dict[str, Any] = {}

    def main(cfg: Any) -> None:
        learner = Learner(cfg)
        logs = []
        for update in plan:
            batches = [batch[learner.rank] if mine else [one for part in batch for one in part] for batch in update]
            logs.append(learner.update(batches))
        saved = learner.saved()
        result.update(logs=logs, model=None)
        if learner.rank == 0:
            result.update(model=saved["model"], average=saved["extra_state"].get("ema"))

    distributed_utils.call_main(configuration(data, *words), main)
    return result


def fairseq_train(rank: int, size: int, data: Path, save: Path, *words: str) -> None:
    """Is ``fairseq-train`` in one of several processes."""
    os.environ.update(environment(rank, size, 0))
    distributed_utils.call_main(configuration(data, "--save-dir", str(save), *words), fairseq_cli.train.main)


def configuration(data: Path, *words: str) -> Any:
    """Reads a command line of training."""
    parser = options.get_training_parser()
    given = options.parse_args_and_arch(parser, [str(data), *TRAIN_ARGS, "--dropout", "0", *words])
    return convert_namespace_to_omegaconf(given)


class Learner:
    """A model of which each update is given its sentences.

    Args:
        cfg: of the training; its job is started.
    """

    def __init__(self, cfg: Any) -> None:
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        self.trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
        task.load_dataset("valid")
        self.dataset = task.dataset("valid")
        self.rank = self.trainer.data_parallel_rank
        self.trainer.reset_dummy_batch(self.collate([0, 1]))
        metrics.reset()

    def collate(self, sentences: Sequence[int]) -> Any:
        return self.dataset.collater([self.dataset[number] for number in sentences]) if sentences else {}

    def update(self, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        """Makes an update and returns the values it logs."""
        with metrics.aggregate(new_root=True) as shown:
            self.trainer.train_step([self.collate(sentences) for sentences in batches])
        return {name: float(value) for name, value in shown.get_smoothed_values().items()}

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, with all experts in the first process."""
        self.trainer.consolidate_optimizer()
        with checkpoint_experts.whole_experts(self.trainer):
            saved: dict[str, Any] = self.trainer.state_dict()
        return saved


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    """Compares parameters."""
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
