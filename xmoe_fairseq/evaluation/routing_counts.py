"""One pass over a text: what the MoE layers do with each token, and sums of it whose size the text does not change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.hidden_units import HiddenUnits, counting_hidden_units
from ..models.routing_recorder import INPUTS, per_token, stack_inputs, stack_of
from ..moe import Router, TokenRouting
from ..moe.flops import count_flops, expert_sites
from .direction_dataset import DirectionDataset, collect

# What is added up over tokens; entropy and top-1 probability over a token's passes too.
SUMS = ("tokens", "experts", "experts_squared", "passes", "top1_prob", "entropy")
# Positions and ranks are binned by powers of two: 1, 2-3, 4-7, ...
POSITION_BINS = 13


@dataclass(frozen=True)
class MoELayerSpec:
    """An MoE layer of a model: it replaces a feed-forward network.

    Attributes:
        name: such as ``encoder.2``.
        experts: how many it has, those of stacked layers together.
        most: experts that a token can take.
        routers: passes that a token can make: strata, or stacked layers.
        strata: whether the routers are strata, so that ``passes`` is the requested capacity (RC).
        chooses: whether tokens can take different numbers of experts.
        expert_flops: of one expert for one token, on average; a multiplication and an addition count as two.
        other_flops: of routers, gates and a shared network for one token.
        dense_flops: of the feed-forward network that a dense model has in this place.
        flops_by_expert: as ``expert_flops``, of each expert; None if all have one size.
    """

    name: str
    experts: int
    most: int
    routers: int
    strata: bool
    chooses: bool
    expert_flops: float
    other_flops: float
    dense_flops: float
    flops_by_expert: tuple[float, ...] | None = None

    @property
    def stack(self) -> str:
        """``encoder`` or ``decoder``."""
        return stack_of(self.name)


def places(model: Any) -> list[MoELayerSpec]:
    """Finds the MoE layers of a model, in the order in which they run; none in a stock one."""
    return [_place(module, model.cfg) for module in model.modules() if hasattr(module, "moe_name")]


def _place(layer: Any, cfg: Any) -> MoELayerSpec:
    sites = expert_sites(layer.moe)
    size = getattr(cfg, stack_of(layer.moe_name))
    costs = [cost for site in sites for cost in site.experts.flops()]
    return MoELayerSpec(
        name=layer.moe_name,
        experts=sum(site.num_experts for site in sites),
        most=sum(site.high for site in sites),
        routers=cfg.moe_heads * sum(isinstance(module, Router) for module in layer.moe.modules()),
        strata=bool(cfg.moe_strata),
        chooses=any(site.low < site.high for site in sites),
        expert_flops=sum(costs) / len(costs),
        other_flops=count_flops(layer.moe, {site.name: 0 for site in sites}, None, (), 0).layers,
        dense_flops=2 * 2 * size.embed_dim * size.ffn_embed_dim,
        flops_by_expert=None if all(site.experts.equal for site in sites) else tuple(costs),
    )


class LayerCounts:
    """What one MoE layer did over a text, as sums in float64: exact for counts below 2**53.

    Attributes:
        by_direction, by_position, by_type: (directions, S), (POSITION_BINS, S), (vocabulary, S): sums of `SUMS`.
        experts: (most + 1,) tokens that took so many experts.
        passes: (routers + 1,) tokens that were routed so often.
        load: (directions, E) computations of each expert.
        together: (E, E) tokens that took both experts; the diagonal has those that took one at all.
        has_entropy: whether the router chooses by probabilities.
    """

    def __init__(self, place: MoELayerSpec, directions: int, vocabulary: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.place = place
        self.by_direction = zeros(directions, len(SUMS))
        self.by_position = zeros(POSITION_BINS, len(SUMS))
        self.by_type = zeros(vocabulary, len(SUMS))
        self.experts = zeros(place.most + 1)
        self.passes = zeros(place.routers + 1)
        self.load = zeros(directions, place.experts)
        self.together = zeros(place.experts, place.experts)
        self.has_entropy = False

    @property
    def nbytes(self) -> int:
        """Memory of the sums, the same for any text."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def add(self, direction: int, types: Tensor, positions: Tensor, routing: TokenRouting) -> None:
        """Adds tokens of one direction.

        Args:
            direction: its number.
            types: (N,) ids, without padding.
            positions: (N,) places in their sentences, from 1.
            routing: what was done with them, (N, ...).
        """
        taken = routing.experts
        self.has_entropy = routing.entropy is not None
        entropy = routing.entropy if routing.entropy is not None else torch.zeros_like(routing.top1_prob)
        values = (torch.ones_like(taken), taken, taken**2, routing.passes, routing.top1_prob, entropy)
        columns = torch.stack([value.double() for value in values], dim=1)
        self.by_direction[direction] += columns.sum(0)
        self.by_position.index_add_(0, power_of_two(positions).clamp(max=POSITION_BINS - 1), columns)
        self.by_type.index_add_(0, types, columns)
        self.experts += taken.bincount(minlength=len(self.experts))
        self.passes += routing.passes.bincount(minlength=len(self.passes))
        self.load[direction] += routing.taken.sum(0)
        used = (routing.taken > 0).float()
        self.together += used.t() @ used


def power_of_two(numbers: Tensor) -> Tensor:
    """Bins whole numbers from 1 by powers of two: 1 -> 0, 2 and 3 -> 1, 4 to 7 -> 2, ..."""
    return torch.frexp(numbers.double()).exponent.long() - 1


@dataclass
class Counts:
    """What all MoE layers did over a text.

    Attributes:
        directions: source and target of each.
        sentences: read in each direction.
        layers: in the order in which they run.
        untrained: directions that the model was not trained on.
        hidden: hidden units by layer, those of dense layers too.
    """

    directions: Sequence[tuple[str, str]]
    sentences: list[int]
    layers: dict[str, LayerCounts]
    untrained: Collection[str] = ()
    hidden: Mapping[str, HiddenUnits] = field(default_factory=dict)

    def stack(self, name: str) -> list[LayerCounts]:
        """The layers of ``encoder`` or ``decoder``."""
        return [counts for counts in self.layers.values() if counts.place.stack == name]

    @property
    def stacks(self) -> list[str]:
        """The stacks that have MoE layers."""
        return [name for name in INPUTS if self.stack(name)]


def count(model: Any, texts: Sequence[DirectionDataset], padding: int, progress: Any = None) -> Counts:
    """Reads texts once, the references as decoder inputs, and adds up what every MoE layer does with every token.

    Memory does not grow with the text: each layer has one `LayerCounts`, and one batch is held at a time.

    Args:
        model: as `per_token` takes it.
        texts: one per direction.
        padding: the id of padding.
        progress: of tqdm, counts sentences.
    """
    vocabulary = {name: len(getattr(model, name).dictionary) for name in stack_inputs(model)}
    layers = {place.name: LayerCounts(place, len(texts), vocabulary[place.stack]) for place in places(model)}
    inputs = stack_inputs(model)
    counts = Counts([(text.source, text.target) for text in texts], [0] * len(texts), layers)
    with counting_hidden_units(model) as counts.hidden:
        for direction, batch, seen in collect(model, texts, per_token, progress):
            _add(counts, direction, batch["net_input"], seen, inputs, padding)
            counts.sentences[direction] += len(batch["id"])
    return counts


def _add(
    counts: Counts,
    direction: int,
    net_input: Mapping[str, Any],
    seen: Mapping[str, TokenRouting],
    inputs: Mapping[str, str],
    padding: int,
) -> None:
    real = {stack: net_input[name] != padding for stack, name in inputs.items()}
    for layer, routing in seen.items():
        stack = stack_of(layer)
        keep = real[stack]
        types = net_input[inputs[stack]][keep]
        positions = keep.cumsum(1)[keep]  # sources are padded on the left
        counts.layers[layer].add(direction, types, positions, routing.map(lambda values, keep=keep: values[keep]))
