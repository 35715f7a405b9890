"""What enters layers of a trained model while it reads text, references as decoder inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.direction_dataset import DirectionDataset, collect
from ..models.routing_recorder import INPUTS, run_forced, stack_of


def lines_of(texts: Sequence[DirectionDataset], tokens: int) -> int:
    """Returns how many lines of every direction together have so many tokens, on either side.

    Args:
        texts: one per direction.
        tokens: at least 1; the result is the length of the longest text if all lines have fewer.
    """
    datasets = [text.dataset for text in texts]
    found = {stack: 0 for stack in INPUTS}
    longest = max(map(len, datasets))
    for line in range(longest):
        sizes = [dataset.size(line) for dataset in datasets if line < len(dataset)]
        for stack, number in zip(found, map(sum, zip(*sizes, strict=True)), strict=True):
            found[stack] += int(number)
        if min(found.values()) >= tokens:
            return line + 1
    return longest


def layer_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    texts: Sequence[DirectionDataset],
    padding: int,
    tokens: int,
    progress: Any,
) -> dict[str, Tensor]:
    """Collects the inputs of modules in one pass.

    Args:
        model: in evaluation.
        modules: by the name of the layer that each belongs to, such as ``encoder.2``; each is called once per batch,
            with (length, batch, d).
        texts: one per direction.
        padding: the id of padding.
        tokens: the most rows.
        progress: of tqdm, counts sentences.

    Returns:
        By name (T, d) float16 without padding, in the order of the lines; of equal lines, in that of the directions.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    lines: dict[str, list[Tensor]] = {name: [] for name in modules}
    for batch in _watched(model, modules, texts, rows, progress):
        for name in modules:
            keep = batch["net_input"][INPUTS[stack_of(name)]].ne(padding).t()  # layers see (length, batch)
            rows[name][-1] = rows[name][-1].reshape(keep.numel(), -1)[keep.flatten().to(rows[name][-1].device)].cpu()
            lines[name].append(batch["id"].expand(keep.shape)[keep])
    return {name: _in_order(rows.pop(name), lines.pop(name))[:tokens] for name in modules}


def _watched(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    texts: Sequence[DirectionDataset],
    rows: dict[str, list[Tensor]],
    progress: Any,
) -> Iterator[dict[str, Any]]:
    """Yields batches; for each, the rows of each module have one tensor more, (length, batch, d) float16."""

    def take(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows[name].append(args[0].half())

    with ExitStack() as hooks:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(partial(take, name))
            hooks.callback(handle.remove)
        for _, batch, _ in collect(model, texts, run_forced, progress):
            yield batch


def _in_order(rows: list[Tensor], lines: list[Tensor]) -> Tensor:
    return torch.cat(rows)[torch.cat(lines).argsort(stable=True)]
