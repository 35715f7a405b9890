"""Routers: hidden states to a plan. A new one is a subclass of `Router` and a line in `ROUTERS`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .routing import RoutingPlan, make_plan, rank


@dataclass(frozen=True)
class RouterOptions:
    """What a router may be told; each takes what concerns it.

    Attributes:
        threshold: probability mass, in [0, 1], that a token's experts must reach (threshold router).
        top_k: experts a token, at least 1 (top-k router).
        capacity_factor: in training, an expert takes at most this multiple of the mean load per expert
            if every token took one; 0 drops nothing. Evaluation never drops.
        min_capacity: tokens that an expert may always take, at least 0.
    """

    threshold: float = 0.9
    top_k: int = 2
    capacity_factor: float = 0.0
    min_capacity: int = 4


class Router(nn.Module):
    """A linear router: ``softmax(W x)``, computed in float32 whatever the model's precision.

    Args:
        dim: d.
        num_experts: E, at least 1.
        options: see `RouterOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"a router needs at least 1 expert, not {num_experts}")
        if options.capacity_factor < 0 or options.min_capacity < 0:
            raise ValueError(
                f"capacity_factor {options.capacity_factor} and min_capacity {options.min_capacity} must be at least 0"
            )
        self.options = options
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def choose(self, sorted_probs: Tensor) -> Tensor:
        """Says which ranks each token takes.

        Args:
            sorted_probs: (T, E) probabilities in descending order.

        Returns:
            (T, E) bool, by rank.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes x: (T, d); padding_mask: (T,) bool, true for padding."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return self.plan(F.linear(x.to(dtype), self.weight.to(dtype)), padding_mask)

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes by given logits: (T, E); padding_mask: (T,) bool, true for padding."""
        ranked = rank(logits)
        return make_plan(
            ranked,
            self.choose(ranked.sorted.detach()),
            padding_mask,
            capacity_factor=self.options.capacity_factor if self.training else 0.0,
            min_capacity=self.options.min_capacity,
        )

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, {self.options}"


class ThresholdRouter(Router):
    """A token takes its most probable experts until their mass reaches the threshold, at least one.

    Weights are the raw probabilities. Source: Yang et al. 2024 (XMoE), section 3.2.

    Raises:
        ValueError: the threshold is outside [0, 1].
    """

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        if not 0 <= options.threshold <= 1:
            raise ValueError(f"threshold {options.threshold} is outside [0, 1]")

    def choose(self, sorted_probs: Tensor) -> Tensor:
        if self.options.threshold == 1:  # rounding of the sum must not leave an expert out
            return torch.ones_like(sorted_probs, dtype=torch.bool)
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        chosen = mass_before < self.options.threshold
        chosen[:, 0] = True
        return chosen


class TopKRouter(Router):
    """A token takes its k most probable experts, weighted by their raw probabilities.

    Source: Fedus et al. 2022 (Switch, k = 1); Lepikhin et al. 2021 (GShard, k = 2).

    Raises:
        ValueError: k is below 1 or above the number of experts.
    """

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        if not 1 <= options.top_k <= num_experts:
            raise ValueError(f"top_k {options.top_k} is outside [1, {num_experts}], the number of experts")

    def choose(self, sorted_probs: Tensor) -> Tensor:
        ranks = torch.arange(sorted_probs.shape[-1], device=sorted_probs.device)
        return (ranks < self.options.top_k).expand(sorted_probs.shape)


ROUTERS: dict[str, type[Router]] = {"threshold": ThresholdRouter, "topk": TopKRouter}
