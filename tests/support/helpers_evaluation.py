"""Data and models for translating while training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from helpers import TRAIN_ARGS
from helpers_prepare import arguments
from helpers_processes import environment

from xmoe_fairseq.data_prep import prepare

WORDS = "north south east west house river bridge school garden table window market".split()
SIZES = {"train": 150, "valid": 23, "test": 4}
TINY = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")


def write_spelled_data(folder: Path) -> Path:
    """Prepares text of which each English word is spelled backwards, with another ending in each language."""
    rng = random.Random(3)
    source = folder / "input"
    source.mkdir(parents=True)
    for language, end in (("xx", "o"), ("yy", "a")):
        for split, size in SIZES.items():
            lines = [[rng.choice(WORDS) for _ in range(rng.randint(1, 6))] for _ in range(size)]
            texts = {"en": lines, language: [[word[::-1] + end for word in line] for line in lines]}
            for side, text in texts.items():
                path = source / f"{split}.en-{language}.{side}"
                path.write_text("".join(" ".join(line) + "\n" for line in text))
    prepare.main(arguments(source, folder / "data", "--vocab-size", "300"))
    return folder / "data" / "bin"


def evaluate_together(rank: int, size: int, *args: Any) -> dict[str, Any]:
    """Is `evaluate` in one of several processes."""
    import os

    os.environ.update(environment(rank, size, 0))
    return evaluate(*args)


def evaluate(data: Path, *words: str, seconds: float = 1e9) -> dict[str, Any]:
    """Translates the development set with a model that was not trained, but says many things.

    Args:
        data: folder.
        words: of the command line.
        seconds: that the evaluation may take.

    Returns:
        The scores by subset, what was counted by direction and metric, the lines done, what a checkpoint keeps.
    """
    parser = options.get_training_parser()
    given = options.parse_args_and_arch(parser, [str(data), *TRAIN_ARGS, *TINY, "--eval-bleu", *words])
    result: dict[str, Any] = {}

    def main(cfg: Any) -> None:
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
        for subset in cfg.dataset.valid_subset.split(","):
            task.load_dataset(subset)
            trainer.get_valid_iterator(subset)
        with torch.no_grad():
            for parameter in trainer.get_model().parameters():
                parameter.mul_(3)
        evaluation = task.evaluation
        evaluation.clock.longest = seconds
        trainer.begin_valid_epoch(1)
        counts = {
            one.name: {name: sums.tolist() for name, sums in one.sums.items()}
            for one in evaluation._directions.values()
        }
        result.update(scores=evaluation.scores, counts=counts, lines=evaluation.lines, state=task.state_dict())

    distributed_utils.call_main(convert_namespace_to_omegaconf(given), main)
    return result
