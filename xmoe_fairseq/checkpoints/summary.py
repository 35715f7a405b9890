"""What a checkpoint holds, for ``xmoe checkpoint info``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from . import reading, shards


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
        arch: as given to ``--arch``.
        updates: it was trained for.
        epoch: in which training resumes.
        parameters: each tied one once, experts included.
        expert_parameters: those of experts.
        experts: in each MoE layer.
        dtype: of the parameters.
        optimizer: whether its state is there, so that training can resume as if it had not stopped.
        files: sizes in bytes by path; more than one if the experts are in shards.
    """

    arch: str
    updates: int
    epoch: int
    parameters: int
    expert_parameters: int
    experts: dict[str, int]
    dtype: str
    optimizer: bool
    files: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**asdict(self), "shards": len(self.files) - 1, "bytes": sum(self.files.values())}

    def lines(self) -> Iterator[str]:
        """Describes the checkpoint to a person."""
        yield f"architecture  {self.arch}"
        yield f"updates       {self.updates:,}, epoch {self.epoch}"
        yield f"parameters    {self.parameters:,} ({self.dtype})"
        yield f"  experts     {self.expert_parameters:,}"
        yield f"  shared      {self.parameters - self.expert_parameters:,}"
        for layer, number in self.experts.items():
            yield f"  {layer}: {number} experts"
        yield f"optimizer     {'its state is there' if self.optimizer else 'no state'}"
        yield f"shards        {len(self.files) - 1 or 'none, one file'}"
        for path, size in self.files.items():
            yield f"  {path}: {size:,} bytes"


def summarize(path: str) -> Summary:
    """Reads a checkpoint, whole or in shards.

    Raises:
        UserError: the file is missing or refused, or a shard is.
    """
    state = reading.read(path)
    number = shards.shard_set(state, path).shards if reading.SHARD_SET in state else 0
    shards.join(state, path, _unread)
    tensors = {(tensor.data_ptr(), tensor.shape): (name, tensor) for name, tensor in state["model"].items()}
    parameters = dict(tensors.values())
    experts = {name: tensor for name, tensor in parameters.items() if shards.is_expert(name)}
    files = [path, *(shards.shard_path(path, one, number) for one in range(number))]
    return Summary(
        arch=_arch(state),
        updates=reading.updates(state),
        epoch=int(((state.get("extra_state") or {}).get("train_iterator") or {}).get("epoch", 1)),
        parameters=_count(parameters),
        expert_parameters=_count(experts),
        experts=_numbers(experts),
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parameters.values()})),
        optimizer=bool(state.get("last_optimizer_state")),
        files={name: os.path.getsize(name) for name in files},
    )


def _unread(blocks: list[Tensor]) -> Tensor:
    """Stands for joined experts, of which only the shape matters."""
    return blocks[0].new_empty((sum(map(len, blocks)), *blocks[0].shape[1:]))


def _numbers(experts: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts the experts of each set, those of all sizes together."""
    stacks = {name.rpartition(".")[0]: (shards.set_of(name), len(tensor)) for name, tensor in experts.items()}
    numbers: dict[str, int] = {}
    for name, number in stacks.values():
        numbers[name] = numbers.get(name, 0) + number
    return numbers


def _count(parameters: Mapping[str, Tensor]) -> int:
    # fairseq's encoders and decoders write a version number beside the parameters.
    return sum(tensor.numel() for name, tensor in parameters.items() if not name.endswith(".version"))


def _arch(state: dict[str, Any]) -> str:
    """Finds the architecture in what fairseq saved of the options, whether from the command line or from YAML."""
    cfg = state.get("cfg")
    options = state.get("args") or (cfg.get("model") if isinstance(cfg, dict) else None)
    values = options if isinstance(options, dict) else getattr(options, "__dict__", {})
    return str(values.get("arch") or values.get("_name") or "unknown")
