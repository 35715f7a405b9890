"""Several processes that train together, without a GPU, and the same in one process to compare with."""

from __future__ import annotations

import os
import random
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from helpers import ROOT, TRAIN_ARGS
from helpers_training import CONTEXT

from xmoe_fairseq.processes import state

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


def together(size: int, folder: Path, work: Callable[..., Any], *args: Any, seconds: float = 100) -> list[Any]:
    """Calls a function in several processes and gives what each returned."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = [
        CONTEXT.Process(target=_call, args=(environment(rank, size, port), folder / f"{rank}.pt", work, args))
        for rank in range(size)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
    hung = [process for process in running if process.exitcode is None]
    for process in hung:
        process.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size) if not hung]
    errors = [result for result in results if isinstance(result, str)]
    assert not hung and not errors, errors or f"{len(hung)} of {size} processes hang"
    return results


def _call(values: dict[str, str], path: Path, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ.update(values)
    try:
        result = work(*args)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(result, path)


def uneven_plan(size: int, updates: int, update_freq: int = 1, sentences: int = 80) -> Plan:
    """Gives processes batches of very different sizes, and some none."""
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


def learn(data: Path, plan: Plan, words: Sequence[str], mine: bool) -> dict[str, Any]:
    """Trains on given sentences.

    Args:
        data: folder.
        plan: of all processes.
        words: of the command line.
        mine: take this process's sentences; else those of all, batch by batch.

    Returns:
        The logged values of each update, and the whole state at the end, in the first process.
    """
    parser = options.get_training_parser()
    given = options.parse_args_and_arch(parser, [str(data), *TRAIN_ARGS, "--dropout", "0", *words])
    result: dict[str, Any] = {}

    def main(cfg: Any) -> None:
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
        task.load_dataset("valid")
        dataset = task.dataset("valid")
        rank = trainer.data_parallel_rank

        def collate(sentences: Sequence[int]) -> Any:
            return dataset.collater([dataset[number] for number in sentences]) if sentences else {}

        trainer.reset_dummy_batch(collate([0, 1]))
        logs = []
        metrics.reset()
        for update in plan:
            chosen = [batch[rank] if mine else [one for part in batch for one in part] for batch in update]
            with metrics.aggregate(new_root=True) as shown:
                trainer.train_step([collate(sentences) for sentences in chosen])
            logs.append({name: float(value) for name, value in shown.get_smoothed_values().items()})
        trainer.consolidate_optimizer()
        with state.whole_experts(trainer):
            result.update(logs=logs, state=trainer.state_dict() if rank == 0 else None)

    distributed_utils.call_main(convert_namespace_to_omegaconf(given), main)
    return result


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    """Compares parameters."""
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
