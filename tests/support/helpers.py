"""Toy data and fairseq objects for the tests."""

from __future__ import annotations

import copy
import random
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fairseq import options, tasks
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from hydra._internal.config_repository import ConfigRepository
from omegaconf import OmegaConf

import xmoe_fairseq  # noqa: F401  (registers the plugin)

# For every command line hydra copies all registered configurations, which takes half of the time, and changes none.
ConfigRepository.__deepcopy__ = lambda repository, _: copy.copy(repository)
ROOT = Path(__file__).resolve().parents[2]
TRAIN_ARGS = (
    *("--task", "multilingual_local", "--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1"),
    *("--optimizer", "adam", "--lr", "0.002", "--max-tokens", "500", "--num-workers", "0", "--cpu"),
)
# Kernels that the installed torch and Triton are too old for. Triton is not imported: a variable that it reads then
# may not be set yet.
_NEEDS = {
    "grouped_mm": hasattr(torch.nn.functional, "grouped_mm"),
    "triton": tuple(map(int, version("triton").split(".")[:2])) >= (3, 4),
}
MISSING_KERNELS = {name for name, there in _NEEDS.items() if not there}
NEEDS_TRITON = pytest.mark.skipif("triton" in MISSING_KERNELS, reason="an older Triton")
TINY_ARGS = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")


class Built(NamedTuple):
    cfg: Any
    task: Any
    model: Any
    criterion: Any


def build(data: Path, *args: str) -> Built:
    """Builds task, model and criterion as `fairseq-train` would from the command line."""
    cfg = copy.deepcopy(_configuration(str(data), *TRAIN_ARGS, *(args or TINY_ARGS)))
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return Built(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


@cache
def _configuration(*words: str) -> Any:
    """Reads a command line of training."""
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), list(words)))


def save_checkpoint(built: Built, path: Path) -> Path:
    """Writes a model as a checkpoint that the commands read, of one update."""
    cfg = OmegaConf.to_container(OmegaConf.create(built.cfg), resolve=True, enum_to_str=True)
    history = [{"num_updates": 1, "lr_scheduler_state": {}}]
    state = {"cfg": cfg, "args": None, "model": built.model.state_dict(), "optimizer_history": history}
    torch.save(state | {"extra_state": {"train_iterator": {"epoch": 1}}}, path)
    return path


def batches(task: Any, split: str = "valid", max_tokens: int = 200) -> list[dict[str, Any]]:
    """Loads a split in small batches, some with padding."""
    task.load_dataset(split)
    iterator = task.get_batch_iterator(task.dataset(split), max_tokens=max_tokens, max_positions=task.max_positions())
    return list(iterator.next_epoch_itr(shuffle=False))


def write_toy_data(
    folder: Path, languages: tuple[str, ...], lines: int = 200, symbols: int = 40, english_code: str = "en"
) -> Path:
    """Writes a binarised data folder: each language has the English symbols in reverse, shifted by its number."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    (folder / "langs.txt").write_text("".join(f"{lang}\n" for lang in (english_code, *languages)))
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(symbols)))
    for split, count in (("train", lines), ("valid", 20), ("test", 20)):
        for number, language in enumerate(languages):
            english = [[rng.randrange(symbols) for _ in range(rng.randint(2, 9))] for _ in range(count)]
            foreign = [[(word + number + 1) % symbols for word in reversed(line)] for line in english]
            for lang, text in ((english_code, english), (language, foreign)):
                prefix = str(folder / f"{split}.{english_code}-{language}.{lang}")
                builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
                for line in text:
                    builder.add_item(torch.tensor([word + 4 for word in line] + [2]))
                builder.finalize(f"{prefix}.idx")
    return folder
