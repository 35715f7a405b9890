"""How many experts a trained model computes for a token, measured by teacher forcing on a test set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError
from ..models.routing_recorder import per_layer
from ..moe.routing.statistics import RoutingStats
from ..results.usage import SUMS, LayerUsage
from .direction_dataset import DirectionDataset, collect, read, total_sentences
from .trained_model import TrainedModel


def measure(
    checkpoint: Path, data: Path, max_tokens: int = 4096, pairs: Sequence[str] = (), like: nn.Module | None = None
) -> list[LayerUsage]:
    """Runs a model over its binarised test set, and adds up what its routers do.

    Args:
        checkpoint: as written by ``fairseq-train``.
        data: the folder made by ``xmoe prepare``, or its ``bin``.
        max_tokens: the most tokens in a batch.
        pairs: the directions; none for all that the task of the checkpoint has.
        like: a model that must have as many parameters.

    Raises:
        UserError: the checkpoint, the folder or its test set is missing, no sentence of a direction is usable, or the
            checkpoint is of another model.
    """
    trained = TrainedModel.load(checkpoint, data, pairs)
    if like is not None and (found := _size(trained.model)) != (wanted := _size(like)):
        raise UserError(
            f"{checkpoint} has {found:,} parameters, and --arch with its options and --vocab has {wanted:,}: "
            "give those that it was trained with"
        )
    texts = read(trained.task, trained.model, "test", 0, max_tokens)
    with tqdm(total=total_sentences(texts), desc="expert usage", unit="sentence") as progress:
        return usage_of(trained.model, texts, progress)


def _size(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def usage_of(model: Any, texts: Sequence[DirectionDataset], progress: Any = None) -> list[LayerUsage]:
    """Adds up what the routers of a model do with texts, references as decoder inputs; empty for a dense model."""
    if not any(hasattr(module, "moe_name") for module in model.modules()):
        return []
    return add_up(stats for _, _, layers in collect(model, texts, per_layer, progress) for stats in layers)


def add_up(layers: Iterable[RoutingStats]) -> list[LayerUsage]:
    """Adds up what MoE layers did in many forward passes, by the layer's name.

    The sums are float64 on the CPU: exact for counts below 2**53, where float32 stops counting at 2**24.

    Args:
        layers: what one layer did in one pass, each.

    Returns:
        The layers in the order in which they first occur.

    Raises:
        ValueError: a layer has no name, so that its sums would mix with another's, or routed no token.
    """
    totals: dict[str, dict[str, Tensor]] = {}
    for stats in layers:
        if not stats.layer:
            raise ValueError("RoutingStats without the name of its layer")
        new = {name: getattr(stats, name).detach().to("cpu", torch.float64) for name in SUMS}
        old = totals.get(stats.layer)
        totals[stats.layer] = new if old is None else {name: old[name] + new[name] for name in SUMS}
    return [_layer_usage(layer, total) for layer, total in totals.items()]


def _layer_usage(layer: str, total: Mapping[str, Tensor]) -> LayerUsage:
    if total["tokens"] == 0:
        raise ValueError(f"MoE layer {layer!r} routed no token")

    def number(name: str) -> Any:
        values = total[name].tolist()
        if name == "top1_prob":
            return values
        return tuple(map(round, values)) if isinstance(values, list) else round(values)

    return LayerUsage(layer=layer, **{name: number(name) for name in SUMS})
