"""Parameters, and operations of a forward pass, of a model with experts: counted from its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from .experts.stacked import ExpertSet
from .layer import MoELayer
from .multihead import MultiHeadMoE
from .routing.base import Router
from .stratified import StratifiedMoE

# Experts per token on average: their number, if all experts are taken equally often or cost the same; else (E,), the
# mean by expert.
Taken = float | Sequence[float]


@dataclass(frozen=True)
class ExpertSite:
    """One set of experts in a model.

    Attributes:
        name: the module's path in the model.
        experts: the set.
        low, high: the fewest and the most experts that a token takes of it; equal where their number is fixed.
        heads: of the layer; each part of a token takes experts.
    """

    name: str
    experts: ExpertSet
    low: int
    high: int
    heads: int = 1

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def cheapest(self) -> Taken:
        """The fewest experts that a token takes, the smallest ones."""
        return self._first(self.low, self.experts.flops())

    @property
    def dearest(self) -> Taken:
        """The most experts that a token takes, the largest ones."""
        return self._first(self.high, [-cost for cost in self.experts.flops()])

    def _first(self, number: int, key: Sequence[int]) -> Taken:
        if self.experts.equal:
            return float(number)
        rounds, rest = divmod(number, self.num_experts)
        order = sorted(range(self.num_experts), key=key.__getitem__)
        return [float(rounds + (expert in order[:rest])) for expert in range(self.num_experts)]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, shared ones counted once.

    Attributes:
        total: of the model.
        expert: in experts, biases included.
        active: all outside of experts, and those of the experts that a token takes on average.
    """

    total: int
    expert: int
    active: int


@dataclass(frozen=True)
class Flops:
    """The terms of one token's forward pass, a multiplication and an addition counting as two.

    ``layers + experts + output + attention = 2 N + 2 n sum_a d_a``: Kaplan et al. 2020 (Scaling laws for neural
    language models), eq. 2.2, where N are the parameters in matrices that the token is multiplied with and a runs
    over the attention modules. Embeddings are looked up and cost nothing; biases, norms and softmax are left out.

    Attributes:
        layers: 2 x the matrices of attention, dense feed-forward networks, routers and gates.
        experts: 2 x the matrices of the experts that a token takes on average.
        output: 2 x the matrix onto the vocabulary.
        attention: scores over n positions and the sum that they weight, ``2 n d`` a module: half of the positions
            of a full product, as under a causal mask.
    """

    layers: float
    experts: float
    output: float
    attention: float

    @property
    def total(self) -> float:
        return self.layers + self.experts + self.output + self.attention


def expert_sites(model: nn.Module) -> list[ExpertSite]:
    """Finds every set of experts, in the order of the modules; a token takes the experts of all heads of a layer."""
    sites, heads = [], {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadMoE):
            heads[f"{name}.moe".lstrip(".")] = module.heads
        if isinstance(module, MoELayer):
            low, high = (heads.get(name, 1) * number for number in module.router.bounds())
        elif isinstance(module, StratifiedMoE):
            # The first stratum sees the last one's experts, so that a token may leave after it.
            ranges = [cast(Router, router).bounds() for router in module.routers]
            low, high = ranges[0][0], sum(most for _, most in ranges)
        else:
            continue
        sites.append(ExpertSite(name, module.experts, low, high, heads.get(name, 1)))
    return sites


def number_taken(taken: Taken) -> float:
    """Returns the number of experts per token."""
    return sum(taken) if isinstance(taken, Sequence) else taken


def cost_of(taken: Taken, costs: Sequence[float]) -> float:
    """Returns the cost per token, given that of each expert, (E,)."""
    if isinstance(taken, Sequence):
        return sum(number * cost for number, cost in zip(taken, costs, strict=True))
    return sum(costs) * taken / len(costs)


def count_parameters(model: nn.Module, taken: Mapping[str, Taken]) -> Parameters:
    """Counts parameters.

    Args:
        model: on any device, meta too.
        taken: by the name of each of `expert_sites`, the experts that a token takes on average. A token that passes
            more experts than there are uses some of them twice.
    """
    sites = expert_sites(model)
    total = sum(p.numel() for p in model.parameters())
    expert = sum(p.numel() for site in sites for p in site.experts.parameters())
    own = sum(sum(site.experts.own_parameters()) for site in sites)
    used = sum(cost_of(_once(taken[site.name], site.num_experts), site.experts.own_parameters()) for site in sites)
    return Parameters(total, expert, round(total - own + used))


def _once(taken: Taken, experts: int) -> Taken:
    return [min(number, 1.0) for number in taken] if isinstance(taken, Sequence) else min(taken, experts)


def count_flops(
    model: nn.Module,
    taken: Mapping[str, Taken],
    output: nn.Module | None,
    attention_dims: Iterable[int],
    context: float,
) -> Flops:
    """Counts the operations of a token that passes every layer once.

    Args:
        model: on any device, meta too.
        taken: by the name of each of `expert_sites`, the experts that a token takes on average.
        output: the module onto the vocabulary, where it is to be told apart.
        attention_dims: the width of the queries of each attention module.
        context: n, the positions that a token may attend to.
    """
    in_output = sum(p.numel() for p in _matrices(output)) if output is not None else 0
    in_experts = sum(cost_of(taken[site.name], site.experts.flops()) for site in expert_sites(model))
    elsewhere = sum(p.numel() for p in _matrices(model)) - in_output
    # Each sub-token of a multi-head layer passes its router.
    layers = (module for module in model.modules() if isinstance(module, MultiHeadMoE))
    elsewhere += sum((layer.heads - 1) * p.numel() for layer in layers for p in _matrices(layer.moe))
    return Flops(2 * elsewhere, in_experts, 2 * in_output, 2 * context * sum(attention_dims))


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields what a token is multiplied with outside of experts; a matrix shared by two modules comes twice."""
    for module in model.modules():
        if not isinstance(module, (nn.Embedding, ExpertSet)):
            yield from (p for p in module.parameters(recurse=False) if p.dim() >= 2)
