"""Routers: hidden states to a plan. A new one is a subclass of `Router` and a line in ``kinds.ROUTERS``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .base import LinearRouter, ProbabilityRouter, Router
from .options import RouterOptions
from .plan import RoutingPlan, assign, real_tokens
from .topk import RankedProbs, Selection


class ThresholdRouter(ProbabilityRouter):
    """A token takes its most probable experts until their mass reaches the threshold, at least one.

    Weights are the raw probabilities, or normalized. Sources: Yang et al. 2024 (XMoE), section 3.2; Huang et al. 2024
    (top-p, with the entropy loss).

    Raises:
        ValueError: the threshold is outside [0, 1].
    """

    family = "XMoE"
    paper = "XMoE: Yang et al. 2024, arXiv 2403.18926; top-p: Huang et al. 2024, arXiv 2403.07652"
    dial = "threshold"
    uses: ClassVar[tuple[str, ...]] = ("threshold", "weights", "balance", *ProbabilityRouter.uses)

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        if not 0 <= options.threshold <= 1:
            raise ValueError(f"threshold {options.threshold} is outside [0, 1]")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"threshold {options.threshold:g}"

    def bounds(self) -> tuple[int, int]:
        threshold = self.options.threshold
        return (self.num_experts if threshold == 1 else 1), (1 if threshold == 0 else self.num_experts)

    def selection(self) -> Selection:
        threshold = self.options.threshold
        # Rounding of the sum must not leave an expert out.
        return Selection(self.num_experts, None if threshold == 1 else threshold)


class TopKRouter(ProbabilityRouter):
    """A token takes its k most probable experts, weighted by their probabilities.

    Source: Fedus et al. 2022 (Switch, k = 1); Lepikhin et al. 2021 (GShard, k = 2).

    Raises:
        ValueError: k is below 1 or above the number of experts.
    """

    paper = "top-k: Shazeer et al. 2017, arXiv 1701.06538"
    uses: ClassVar[tuple[str, ...]] = ("top_k", "weights", "balance", *ProbabilityRouter.uses)

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        if "weights" in cls.uses and options.weights == "normalized" and options.top_k == 1 < num_experts:
            raise ValueError(
                "weights normalized does not work with top_k 1: the weight would always be 1, and the router would get "
                "no gradient by it; use weights raw or a larger top_k"
            )

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"top {options.top_k}"

    def bounds(self) -> tuple[int, int]:
        return self.options.top_k, self.options.top_k

    def selection(self) -> Selection:
        return Selection(self.options.top_k)

    def max_assignments(self, tokens: int) -> int | None:
        by_capacity = super().max_assignments(tokens)
        wanted = tokens * self.options.top_k
        return wanted if by_capacity is None else min(wanted, by_capacity)


class GShardRouter(TopKRouter):
    """A token takes its two most probable experts; their weights are divided by their sum after dropping.

    An expert takes at most ``capacity_factor * ceil(real tokens / E)`` tokens in training. Source: Lepikhin et
    al. 2021 (GShard), and Xu et al. 2023 (SMoE), which uses it in every stratum. With k = 1 it is `SwitchRouter`.
    """

    paper = "GShard: Lepikhin et al. 2021, arXiv 2006.16668"
    uses: ClassVar[tuple[str, ...]] = ("second_expert", *ProbabilityRouter.uses)
    normalize = True

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        # A last stratum may have one expert only.
        super().__init__(dim, num_experts, replace(options, top_k=min(2, num_experts)))

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        if options.second_expert not in ("gate", "sampling"):
            raise ValueError(f"second_expert {options.second_expert!r} is unknown: choose gate or sampling")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "top 2 (GShard)"

    @property
    def by_limits(self) -> bool:
        draws = self.training and self.options.second_expert == "sampling" and self.options.top_k > 1
        return not draws

    def choose(self, logits: Tensor) -> tuple[RankedProbs, Tensor]:
        ranked, chosen = super().choose(logits)
        if self.by_limits:
            return ranked, chosen
        order = torch.cat([ranked.order[:, :1], _draw_second(ranked)], dim=-1)
        return RankedProbs(logits, ranked.probs, ranked.probs.detach().gather(1, order), order), chosen

    def capacity(self, real: Tensor) -> Tensor:
        mean = (real.double() / self.num_experts).ceil()
        return (mean * self.options.capacity_factor).ceil().clamp(min=self.options.min_capacity)


def _draw_second(ranked: RankedProbs) -> Tensor:
    """Draws one of the experts that are not a token's first choice, by probability: (T, 1) int64."""
    mass = ranked.probs.detach().scatter(1, ranked.order[:, :1], 0.0).cumsum(dim=-1)
    total = mass[:, -1:].contiguous()
    # Below the total even where the product is rounded up to it; the first choice adds no mass, so it is never met.
    drawn = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    second = torch.searchsorted(mass, drawn, right=True)
    # Where all the mass is the first choice's, there is nothing to draw by.
    return torch.where(total > 0, second, ranked.order[:, 1:2])


class SwitchRouter(GShardRouter):
    """A token takes its most probable expert, weighted by the raw probability. Source: Fedus et al. 2022 (Switch)."""

    paper = "Switch: Fedus et al. 2022, arXiv 2101.03961"
    uses: ClassVar[tuple[str, ...]] = ProbabilityRouter.uses
    normalize = False

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.options = replace(self.options, top_k=1)

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "top 1 (Switch)"


class HashRouter(Router):
    """The token's id alone decides its expert, with weight 1; nothing is learnt, dropped or balanced.

    Source: Roller et al. 2021 (Hash Layers), with a fixed random table.
    """

    paper = "Hash Layers: Roller et al. 2021, arXiv 2106.04426"

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "hash router"

    def bounds(self) -> tuple[int, int]:
        return 1, 1

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("the hash router goes by token ids: give tokens")
        # Knuth's multiplicative hash, of 32 bits: neighbouring ids get unrelated experts.
        expert = ((tokens * 2654435761) % 2**32) * self.num_experts // 2**32
        weight = x.new_ones(x.shape[0], dtype=torch.float32)
        return assign(expert, weight, self.num_experts, padding_mask, len(x) if self.static(x) else None)


class BalancedRouter(LinearRouter):
    """In training every expert gets equally many tokens, by the assignment of the highest total score.

    A token's weight is the sigmoid of its logit. In evaluation a token takes its best expert, whatever the others
    take. There is no balance loss. Source: Lewis et al. 2021 (BASE layers); the assignment is SciPy's, on the CPU.
    """

    paper = "BASE: Lewis et al. 2021, arXiv 2103.16716"

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "balanced router"

    def bounds(self) -> tuple[int, int]:
        return 1, 1

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        num_experts = logits.shape[1]
        expert = logits.argmax(-1)
        if self.training:
            keep = real_tokens(padding_mask, logits)
            expert = expert.masked_scatter(keep, balanced_assignment(logits.detach()[keep]))
        weight = logits.gather(1, expert.unsqueeze(-1)).squeeze(-1).sigmoid()
        return assign(expert, weight, num_experts, padding_mask, len(weight) if self.static(weight) else None)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Assigns each row an expert, none more than ceil(T / E), so that the sum of scores is the highest possible.

    Args:
        scores: (T, E).

    Returns:
        (T,) int64.
    """
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    # Every expert stands as often as it has places.
    table = scores.double().cpu().repeat_interleave(places, dim=1).numpy()
    _, column = linear_sum_assignment(table, maximize=True)
    return torch.from_numpy(column).to(scores.device) // max(places, 1)
