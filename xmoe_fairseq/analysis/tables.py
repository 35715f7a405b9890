"""The numbers of the figures, from the sums of a pass: one table per file, which is what the figures draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.routing_counts import SUMS, Counts, LayerCounts
from ..models.routing_recorder import stack_of

# What is said of tokens on average, in any grouping.
MEANS = ("tokens", "experts", "passes", "top1_prob", "entropy")


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: of the file and of the figure.
        columns: their names.
        rows: one value a column; numbers, words, or nothing if there is no number.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def column(self, name: str) -> list[Any]:
        """One column's values."""
        return [row[self.columns.index(name)] for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """Each row by the columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def where(self, **values: Any) -> Table:
        """The rows with these values."""
        places = {self.columns.index(name): value for name, value in values.items()}
        return Table(self.name, self.columns, [row for row in self.rows if all(row[i] == v for i, v in places.items())])

    def as_tsv(self) -> str:
        """Returns lines with tabs between the values, six digits a number; a token's own tab or line end is spelt."""
        lines = ["\t".join(self.columns), *("\t".join(map(_cell, row)) for row in self.rows)]
        return "".join(f"{line}\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def measure(counts: Counts) -> str:
    """What a token's capacity is: ``passes`` (RC) if layers are stratified, ``experts`` elsewhere."""
    return "passes" if any(layer.place.strata for layer in counts.layers.values()) else "experts"


def means(sums: Tensor, layers: Sequence[LayerCounts]) -> tuple[Any, ...]:
    """Gives `MEANS`: tokens; experts and passes per token; first choice's probability and entropy (nats) per pass.

    Args:
        sums: (S,) added up over tokens and layers.
        layers: those that the sums are of; each token is counted once.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    if not total["tokens"]:
        return (0, None, None, None, None)
    return (
        round(total["tokens"] / len(layers)),
        total["experts"] / total["tokens"],
        total["passes"] / total["tokens"],
        total["top1_prob"] / total["passes"],
        total["entropy"] / total["passes"] if layers[0].has_entropy else None,
    )


def add(sums: Iterable[Tensor]) -> Tensor:
    """Adds up sums of the same shape."""
    return torch.stack(list(sums)).sum(0)


def by_layer(counts: Counts) -> Table:
    """Layers: means over all tokens, spread of the experts per token, and balance of the load.

    ``load_cv`` is the coefficient of variation of the experts' computations: 0 is perfect balance.
    """
    rows: list[tuple[Any, ...]] = []
    for layer in counts.layers.values():
        sums, load = layer.by_direction.sum(0), layer.load.sum(0)
        mean = means(sums, [layer])
        variance = float(sums[SUMS.index("experts_squared")] / sums[0]) - mean[1] ** 2
        load_cv = float(load.std(correction=0) / load.mean())
        place = layer.place
        rows.append((place.name, place.stack, *mean, math.sqrt(max(variance, 0.0)), place.experts, load_cv))
    return Table("layers", ("layer", "stack", *MEANS, "experts_sd", "of_experts", "load_cv"), rows)


def flops(counts: Counts) -> Table:
    """Layers: FLOPs for a token, routers and gates included, and the share saved of what it is compared with.

    Compared with all experts of the layer, and with the feed-forward network of a dense model; negative if the
    layer costs more.
    """
    rows: list[tuple[Any, ...]] = []
    for layer in counts.layers.values():
        place = layer.place
        experts = means(layer.by_direction.sum(0), [layer])[1]
        in_experts = place.expert_flops * experts
        if place.flops_by_expert is not None:
            load, tokens = layer.load.sum(0), layer.by_direction[:, SUMS.index("tokens")].sum()
            in_experts = float(load @ load.new_tensor(place.flops_by_expert) / tokens)
        taken = place.other_flops + in_experts
        everything = place.other_flops + place.expert_flops * place.experts
        saved = (1 - taken / everything, 1 - taken / place.dense_flops)
        rows.append((place.name, place.stack, experts, taken, everything, place.dense_flops, *saved))
    columns = ("flops", "flops_of_all_experts", "flops_dense", "saved_against_all", "saved_against_dense")
    return Table("flops", ("layer", "stack", "experts", *columns), rows)


def hidden_units(counts: Counts) -> Table:
    """Layers, dense ones too: hidden units that were computed, and the share of them above zero."""
    rows = [
        (name, stack_of(name), "experts" if units.experts else "dense", units.units, units.share)
        for name, units in counts.hidden.items()
    ]
    return Table("hidden_units", ("layer", "stack", "network", "units", "positive"), rows)


def by_direction(counts: Counts) -> Table:
    """Directions: means in each layer, and over all layers of a stack (layer ``all``)."""
    rows = []
    for number, (source, target) in enumerate(counts.directions):
        for stack, name, layers in _groups(counts):
            sums = add(layer.by_direction[number] for layer in layers)
            rows.append((f"{source}-{target}", source, target, stack, name, *means(sums, layers)))
    return Table("directions", ("direction", "source", "target", "stack", "layer", *MEANS), rows)


def by_language(counts: Counts) -> Table:
    """Languages: the same; a language is that of the text the stack reads: the source's or the target's."""
    rows = []
    for stack, name, layers in _groups(counts):
        for language, numbers in languages_of(counts, stack).items():
            sums = add(layer.by_direction[numbers].sum(0) for layer in layers)
            rows.append((language, stack, name, *means(sums, layers)))
    return Table("languages", ("language", "stack", "layer", *MEANS), rows)


def by_position(counts: Counts) -> Table:
    """Positions in the sentence, binned by powers of two: the same."""
    rows = []
    for stack, name, layers in _groups(counts):
        sums = add(layer.by_position for layer in layers)
        for place, one in enumerate(sums):
            if one[0]:
                rows.append((stack, name, 2**place, 2 ** (place + 1) - 1, *means(one, layers)))
    return Table("positions", ("stack", "layer", "first", "last", *MEANS), rows)


def _groups(counts: Counts) -> Iterator[tuple[str, str, list[LayerCounts]]]:
    for stack in counts.stacks:
        yield stack, "all", counts.stack(stack)
        for layer in counts.stack(stack):
            yield stack, layer.place.name, [layer]


def languages_of(counts: Counts, stack: str) -> dict[str, list[int]]:
    """The directions in which a stack reads each language, in the order of the directions."""
    found: dict[str, list[int]] = {}
    for number, (source, target) in enumerate(counts.directions):
        found.setdefault(source if stack == "encoder" else target, []).append(number)
    return found


def distribution(counts: Counts) -> Table:
    """How many tokens took each number of experts, or passed each number of strata, in each layer."""
    rows = []
    for layer in counts.layers.values():
        histogram = layer.passes if measure(counts) == "passes" else layer.experts
        total = float(histogram.sum())
        rows += [
            (layer.place.name, layer.place.stack, number, round(tokens), tokens / total)
            for number, tokens in enumerate(histogram.tolist())
            if number
        ]
    return Table("distribution", ("layer", "stack", measure(counts), "tokens", "share"), rows)


def together(counts: Counts) -> Table:
    """Pairs of experts: tokens that took both, and how often that is against chance (lift).

    Lift is P(both) / (P(one) P(other)): 1 if choices are independent.
    """
    rows = []
    for layer in counts.layers.values():
        tokens, both = float(layer.experts.sum()), layer.together.numpy()
        alone = both.diagonal()
        for one, other in zip(*np.triu_indices(len(both), k=1), strict=True):
            chance = alone[one] * alone[other] / tokens
            lift = float(both[one, other] / chance) if chance else None
            rows.append((layer.place.name, int(one), int(other), round(both[one, other]), lift))
    return Table("coselection", ("layer", "expert", "other", "tokens", "lift"), rows)


def expert_load(counts: Counts) -> Table:
    """How many tokens each expert computed, and its share of the layer's computations."""
    rows = []
    for layer in counts.layers.values():
        load = layer.load.sum(0).tolist()
        rows += [(layer.place.name, expert, round(one), one / sum(load)) for expert, one in enumerate(load)]
    return Table("expert_load", ("layer", "expert", "computations", "share"), rows)
