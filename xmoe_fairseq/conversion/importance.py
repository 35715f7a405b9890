"""How much a text needs each expert of a model, and which experts stay when some are taken out.

Source: Koishekenov et al. 2023 (arXiv 2212.09811) for importance and both ways of selecting; Lasby et al. 2025 (REAP,
arXiv 2510.13999) for ``reap``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evaluation.direction_dataset import DirectionDataset, collect
from ..models.routing_recorder import run_forced
from ..moe import ExpertSet, MoELayer, RoutingPlan, StackedExperts, StratifiedMoE

METHODS = ("importance", "activity", "mass", "reap", "unused", "random", "merge")


class Tally:
    """What one router did with the tokens of one direction, as sums in float64.

    Attributes:
        tokens: number of tokens that entered the layer.
        first: (E,) tokens whose first choice the expert was.
        top1_prob: (E,) their probabilities of it.
        weight: (E,) gate weights of the expert.
        load: (E,) tokens that took it.
        norm: (E,) gate weights times the norms of the expert's output; 0 if norms are not measured.
    """

    def __init__(self, experts: int) -> None:
        zeros = partial(torch.zeros, experts, dtype=torch.float64)
        self.tokens = 0
        self.first, self.top1_prob, self.weight, self.load, self.norm = (zeros() for _ in range(5))

    def add(self, plan: RoutingPlan, tokens: int, norms: Tensor | None = None) -> None:
        """Adds the tokens of one plan.

        Args:
            plan: of the router.
            tokens: that entered the layer, without padding.
            norms: (R,) of the experts' outputs for the plan's assignments, without gate weights.
        """
        load = plan.group_sizes.cpu()
        expert = torch.repeat_interleave(torch.arange(len(load)), load)
        weight = plan.weight[: len(expert)].cpu().double()
        self.tokens += tokens
        self.first += plan.stats.first_choices.cpu().double()
        self.top1_prob.index_add_(0, plan.first.cpu(), plan.token_routing.top1_prob.cpu().double())
        self.weight.index_add_(0, expert, weight)
        self.load += load.double()
        if norms is not None:
            self.norm.index_add_(0, expert, weight * norms[: len(expert)].cpu().double())


@dataclass(frozen=True)
class Statistics:
    """What one router did, on average over directions; each counts the same, however much text it has.

    Attributes:
        activity: (E,) share of tokens whose first choice the expert is.
        confidence: (E,) mean probability of the expert where it is the first choice; 0 if it never is.
        mass: (E,) mean over tokens of the expert's gate weight, 0 if it is not taken.
        reap: (E,) mean over the tokens that take the expert of gate weight times norm of its output.
        load: (E,) tokens that took the expert, added up over directions.
    """

    activity: Tensor
    confidence: Tensor
    mass: Tensor
    reap: Tensor
    load: Tensor

    @classmethod
    def over(cls, tallies: Sequence[Tally]) -> Statistics:
        """Averages directions."""

        def mean(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts)).mean(0)

        return cls(
            activity=mean([one.first / max(one.tokens, 1) for one in tallies]),
            confidence=mean([one.top1_prob / one.first.clamp(min=1) for one in tallies]),
            mass=mean([one.weight / max(one.tokens, 1) for one in tallies]),
            reap=mean([one.norm / one.load.clamp(min=1) for one in tallies]),
            load=torch.stack([one.load for one in tallies]).sum(0),
        )

    @property
    def importance(self) -> Tensor:
        """(E,) activity times exp(confidence): averages are taken before they are multiplied."""
        return importance(self.activity, self.confidence)

    def as_json(self) -> dict[str, list[float]]:
        """Returns plain values."""
        return {name: values.tolist() for name, values in (*vars(self).items(), ("importance", self.importance))}


def importance(activity: Tensor, confidence: Tensor) -> Tensor:
    """Returns ``activity * exp(confidence)``, of any shape."""
    return activity * confidence.exp()


# By direction, site and router.
Tallies = list[dict[str, list[Tally]]]


def measure(
    model: Any, sites: Sequence[str], texts: Sequence[DirectionDataset], norms: bool = False, progress: Any = None
) -> Tallies:
    """Reads texts once, references as decoder inputs, and adds up what the routers do.

    Args:
        model: in evaluation.
        sites: paths of the MoE layers in the model, `flops.ExpertSite.name`.
        texts: one per direction.
        norms: whether to compute the norm of every expert's output.
        progress: of tqdm, counts sentences.

    Returns:
        By direction and site one `Tally` for each router: one in a layer, one per stratum.

    Raises:
        UserError: ``norms`` is asked of strata.
    """
    modules = {name: model.get_submodule(name) for name in sites}
    if norms and any(isinstance(module, StratifiedMoE) for module in modules.values()):
        raise UserError("--method reap does not work with strata, whose inputs are made inside: use importance")
    tallies: Tallies = [{name: _tallies(module) for name, module in modules.items()} for _ in texts]
    seen: dict[str, tuple[Tensor, Any]] = {}

    def watch(name: str, module: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, Any]) -> None:
        seen[name] = given[0].reshape(-1, given[0].shape[-1]), found[1]

    handles = [module.register_forward_hook(partial(watch, name)) for name, module in modules.items()]
    try:
        for direction, _, _ in collect(model, texts, run_forced, progress):
            for name, (x, plan) in seen.items():
                plans = plan.plans if isinstance(modules[name], StratifiedMoE) else [plan]
                found = output_norms(modules[name].experts, x, plan) if norms else None
                for tally, own in zip(tallies[direction][name], plans, strict=True):
                    tally.add(own, int(plans[0].stats.tokens), found)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return tallies


def _tallies(module: nn.Module) -> list[Tally]:
    if isinstance(module, StratifiedMoE):
        return [Tally(sum(module.sizes[number:])) for number in range(len(module.sizes))]
    assert isinstance(module, MoELayer)
    return [Tally(module.experts.num_experts)]


@torch.inference_mode()
def output_norms(experts: ExpertSet, x: Tensor, plan: RoutingPlan) -> Tensor:
    """Computes the norms of what experts put out for the tokens that take them, without gate weights.

    Args:
        experts: of one size.
        x: (T, d).
        plan: of their router.

    Returns:
        (R,).
    """
    assert isinstance(experts, StackedExperts)
    weights = experts.weights(x.device)
    rows = plan.token[: int(plan.group_sizes.sum())].split(plan.group_sizes.tolist())
    norms = [
        weights.network(x[token].to(weights.dtype), own, experts.activation, 0.0).float().norm(dim=-1)
        for token, own in zip(rows, weights.of_each(), strict=True)
    ]
    return torch.cat(norms)


def scores(method: str, routers: Sequence[Statistics]) -> Tensor:
    """Scores the experts of a layer for keeping: (E,); in strata, the routers that see an expert are added up.

    Args:
        method: of `METHODS`, one that keeps the experts with the highest scores.
        routers: one, or one per stratum over the experts of that stratum and all later ones.
    """
    wanted = "importance" if method == "merge" else method
    total = torch.zeros_like(getattr(routers[0], wanted))
    for router in routers:
        own = getattr(router, wanted)
        total[len(total) - len(own) :] += own
    return total


@dataclass(frozen=True)
class Budget:
    """How many experts are kept.

    Attributes:
        keep: share of all experts, in (0, 1].
        ratio: experts of an encoder layer for one of a decoder layer.
        least: experts that each layer keeps at the least.
    """

    keep: float
    ratio: int = 1
    least: int = 1

    def total(self, experts: Sequence[int]) -> int:
        """Returns the number for all layers; experts: of each."""
        return round(self.keep * sum(experts))

    def numbers(self, layers: Mapping[str, int]) -> dict[str, int]:
        """Returns the number for each layer, given its experts; names begin with ``encoder`` or ``decoder``."""
        if self.keep == 1:
            return dict(layers)
        encoders = sum(name.startswith("encoder") for name in layers)
        decoders, total = len(layers) - encoders, self.total(list(layers.values()))
        of_decoder = max(total // (self.ratio * encoders + decoders), self.least)
        of_encoder = (total - of_decoder * decoders) // max(encoders, 1)
        return {
            name: min(max(of_encoder if name.startswith("encoder") else of_decoder, self.least), experts)
            for name, experts in layers.items()
        }


def highest(values: Tensor, number: int) -> list[int]:
    """Returns the ids of the experts with the highest scores, of equal ones the first, in ascending order."""
    return sorted(values.argsort(descending=True, stable=True)[:number].tolist())


def select_global(values: Mapping[str, Tensor], budget: Budget) -> dict[str, list[int]]:
    """Selects experts of all layers together: in each layer the best until their share of its scores is reached.

    An expert's key is the share of the layer's better experts, and -1 for the first ``least``; the smallest keys stay.

    Args:
        values: (E,) scores by layer.
        budget: of all layers.
    """
    keys, places = [], []
    for name, scored in values.items():
        order = scored.argsort(descending=True, stable=True)
        shares = scored[order].double() / scored.double().sum().clamp(min=torch.finfo(torch.float64).tiny)
        before = shares.cumsum(0) - shares
        before[: budget.least] = -1
        keys.append(before)
        places += [(name, expert) for expert in order.tolist()]
    found: dict[str, list[int]] = {name: [] for name in values}
    for place in torch.cat(keys).argsort(stable=True)[: budget.total([len(one) for one in values.values()])].tolist():
        name, expert = places[place]
        found[name].append(expert)
    return {name: sorted(kept) for name, kept in found.items()}


def select_strata(values: Tensor, sizes: Sequence[int], number: int) -> list[int]:
    """Selects experts of a layer so that each stratum keeps its share, at least one.

    Args:
        values: (E,) scores.
        sizes: of the strata.
        number: of experts that are kept, at least one per stratum.
    """
    kept, start = [], 0
    for size, own in zip(sizes, stratum_numbers(sizes, number), strict=True):
        kept += [start + expert for expert in highest(values[start : start + size], own)]
        start += size
    return kept


def stratum_numbers(sizes: Sequence[int], number: int) -> list[int]:
    """Divides a number of experts among strata in proportion to their sizes, by largest remainders, at least one."""
    shares = [number * size / sum(sizes) for size in sizes]
    counts = [max(int(share), 1) for share in shares]
    while sum(counts) != number:
        step = 1 if sum(counts) < number else -1
        able = [place for place, count in enumerate(counts) if count > 1 or step == 1]
        place = max(able, key=lambda one: step * (shares[one] - counts[one]))
        counts[place] += step
    return counts
