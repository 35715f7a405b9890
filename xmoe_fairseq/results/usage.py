"""The use of experts by layer, as sums over a test set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LayerUsage:
    """What one MoE layer did over a whole test set; the fields are the sums of ``RoutingStats``."""

    layer: str
    tokens: int
    wanted: int
    received: int
    first_dropped: int
    top1_prob: float
    expert_load: tuple[int, ...]
    first_choices: tuple[int, ...]
    passes: int

    @property
    def requested_capacity(self) -> float:
        """Strata a token passes, on average: 1 in a layer that is not stratified (RC of Xu et al. 2023)."""
        return self.passes / self.tokens

    @property
    def experts(self) -> int:
        """Experts in the layer."""
        return len(self.expert_load)

    @property
    def mean_experts(self) -> float:
        """Experts computed for a token, on average."""
        return self.received / self.tokens

    @property
    def computation_saved(self) -> float:
        """Share of the layer's expert computation saved against giving every token to every expert."""
        return computation_saved([self])


SUMS = tuple(field.name for field in fields(LayerUsage) if field.name != "layer")


def computation_saved(layers: Iterable[LayerUsage]) -> float:
    """Returns 1 - received pairs / possible pairs over the layers, where a layer has tokens * experts pairs."""
    layers = list(layers)
    return 1 - sum(use.received for use in layers) / sum(use.tokens * use.experts for use in layers)


def add_up(usages: Iterable[Sequence[LayerUsage]]) -> list[LayerUsage]:
    """Adds up what one model did on several sets, layer by layer; empty for a dense model."""
    layers: dict[str, list[LayerUsage]] = {}
    for use in (use for usage in usages for use in usage):
        layers.setdefault(use.layer, []).append(use)
    return [_sum(parts) for parts in layers.values()]


def _sum(parts: Sequence[LayerUsage]) -> LayerUsage:
    sums: dict[str, Any] = {}
    for name in SUMS:
        values = [getattr(part, name) for part in parts]
        sums[name] = tuple(map(sum, zip(*values, strict=True))) if isinstance(values[0], tuple) else sum(values)
    return LayerUsage(layer=parts[0].layer, **sums)
