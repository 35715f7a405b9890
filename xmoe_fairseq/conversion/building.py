"""Makes a checkpoint of fairseq from the tensors of another code."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints.reading import SHARD, SHARD_SET
from ..checkpoints.shards import Shard, ShardSet
from ..common import identity
from ..errors import UserError
from ..moe.expert_parallel.group import block
from . import names
from .source import Parameters, Source

# How NLLB places the tokens of languages: the source's before the source, the target's before the translation.
_TASK = ("--task", "multilingual_local", "--encoder-langtok", "src", "--decoder-langtok")
_TRAINING = ("--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1", "--optimizer", "adam")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its parameters.

    Attributes:
        state: what the file holds beside the parameters.
        shapes: of the model's tensors by name, in the order of the file.
    """

    state: dict[str, Any]
    shapes: Mapping[str, torch.Size]


def build(source: Source, data: Path, final: Path) -> Checkpoint:
    """Builds configuration and task as ``fairseq-train`` would, and the model without its bytes.

    Args:
        source: the model.
        data: folder with the dictionary and the languages.
        final: where the folder will be.

    Raises:
        UserError: the options are refused.
    """
    words = [str(data), *_TASK, *_TRAINING, *source.words]
    with quietly():
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        task = tasks.setup_task(cfg.task)
        with torch.device("meta"):
            model = task.build_model(cfg.model)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    plain["task"]["data"] = os.path.abspath(final)
    known = dataclasses.replace(task.identity, folder=os.path.abspath(final))
    state = {
        "args": None,
        "cfg": plain,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0},
        ],
        "task_state": {identity.KEY: known.as_plain()},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
        "last_optimizer_state": None,
    }
    return Checkpoint(state, {name: tensor.shape for name, tensor in model.state_dict().items()})


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leaves out what fairseq and hydra report of a configuration."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def check(checkpoint: Checkpoint, parameters: Parameters) -> None:
    """Compares the tensors of a source with those of the model, before anything is written.

    Raises:
        UserError: one is missing, is too many, or has another shape.
    """
    found = {name: tensor.shape for name, tensor in parameters.plain.items()}
    found |= {name: torch.Size((len(parts), *parts[0].shape)) for name, parts in parameters.experts.items()}
    needed = {_stored(name): shape for name, shape in checkpoint.shapes.items() if not names.is_computed(name)}
    if lacking := [name for name in needed if name not in found]:
        raise UserError(f"the model lacks {lacking[0]}, which its configuration asks for: get all files of it again")
    if more := [name for name in found if name not in needed]:
        raise UserError(
            f"the model has {more[0]}, which its configuration has no place for: it computes something else"
        )
    for name, shape in needed.items():
        if found[name] != shape:
            raise UserError(
                f"{name} has the shape {tuple(found[name])}, its configuration says {tuple(shape)}: get the files again"
            )


def _stored(name: str) -> str:
    return names.EMBEDDINGS if name in names.TIED else name


class Writer:
    """Writes a checkpoint's files one after the other; each is built when it is written, and then forgotten.

    Args:
        checkpoint: without parameters, as checked.
        parameters: of the source.
        dtype: of the file; None for the source's own.
    """

    def __init__(self, checkpoint: Checkpoint, parameters: Parameters, dtype: torch.dtype | None) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self.dtype = dtype

    @property
    def size(self) -> int:
        """Bytes of all parameters in the file's precision."""
        return sum(
            one.numel() * (self.dtype or one.dtype).itemsize
            for one in (*self.parameters.plain.values(), *self.parameters.parts())
        )

    def whole(self, file: IO[bytes]) -> None:
        """Writes a checkpoint in one file."""
        experts = {name: self._rows(name, range(len(parts))) for name, parts in self.parameters.experts.items()}
        torch.save(self._state(experts), file)

    def shard(self, file: IO[bytes], number: int, shards: int, name: str, source: str) -> None:
        """Writes a block of experts; see `checkpoints.shards`."""
        rows = [self._rows(one, block(len(self.parameters.experts[one]), number, shards)) for one in self._stacked]
        torch.save({SHARD: vars(Shard(name, source, number, shards, rows))}, file)

    def rest(self, file: IO[bytes], shards: int, source: str) -> None:
        """Writes the checkpoint without its experts."""
        fewest = min(map(len, self.parameters.experts.values()))
        places = [["model", name] for name in self._stacked]
        state = self._state({name: self._rows(name, range(0)) for name in self._stacked})
        torch.save({**state, SHARD_SET: vars(ShardSet(source, shards, fewest, places))}, file)

    @property
    def _stacked(self) -> list[str]:
        return [name for name in self.checkpoint.shapes if name in self.parameters.experts]

    def _state(self, experts: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**self.checkpoint.state, "model": dict(self._model(experts))}

    def _model(self, experts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        plain = {name: self._cast(tensor) for name, tensor in self.parameters.plain.items()}
        for name, shape in self.checkpoint.shapes.items():
            if name in experts:
                yield name, experts[name]
            elif names.is_computed(name):
                yield name, torch.full(shape, 3.0 if name.endswith("version") else 1.0)
            else:
                yield name, plain[_stored(name)]

    def _rows(self, name: str, held: range) -> Tensor:
        parts = self.parameters.experts[name]
        rows = torch.empty((len(held), *parts[0].shape), dtype=self.dtype or parts[0].dtype)
        for row, number in enumerate(held):
            rows[row] = parts[number]
        self.parameters.forget()
        return rows

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype else tensor


def check_dtypes(parameters: Parameters) -> None:
    """Refuses tensors that are no fractions, as of a quantised model.

    Raises:
        UserError: names the type.
    """
    for tensor in (*parameters.plain.values(), *parameters.parts()):
        if not tensor.is_floating_point():
            raise UserError(f"a parameter has the type {tensor.dtype}: quantised models are not read, get the original")
