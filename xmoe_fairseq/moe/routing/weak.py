"""Routers made weaker, for decoding by self-contrast: other experts than those chosen, with the same sum of weights."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .base import LinearRouter, Router
from .plan import RoutingPlan, plan_of
from .routers import GShardRouter, SwitchRouter, ThresholdRouter, TopKRouter
from .topk import Selection, choose, sort_rows

_RULE = re.compile(r"rank-([1-9]\d{0,7})|(rest)|threshold-(0|1|[01]\.\d{1,9})")
# The rule of each router, unless another is named: a single expert, the best where experts are many and small.
DEFAULTS: dict[type[Router], str] = {
    ThresholdRouter: "threshold-0",
    TopKRouter: "rank-2",
    GShardRouter: "rank-2",
    SwitchRouter: "rank-2",
}


class WeakRule(NamedTuple):
    """The rule that replaces a router's choice by a weaker one.

    Attributes:
        rank: only the expert of this rank, from 1; 0 for another rule.
        mass: the most probable experts up to this probability mass; None for another rule. If neither is given, it is
            all experts that the router leaves.
    """

    rank: int = 0
    mass: float | None = None

    @classmethod
    def read(cls, text: str) -> WeakRule:
        """Reads ``rank-K``, ``rest`` or ``threshold-T``.

        Raises:
            ValueError: the text is none of them.
        """
        match = _RULE.fullmatch(text)
        if match is None or float(match[3] or 0) > 1:
            raise ValueError(
                f"the weak routing {text[:40]!r} is unknown: give rank-K with K from 1, rest, or threshold-T with T "
                "from 0 to 1"
            )
        return cls(int(match[1] or 0), None if match[3] is None else float(match[3]))

    def choose(self, logits: Tensor, strong: Tensor) -> Tensor:
        """Chooses experts.

        Args:
            logits: (T, E).
            strong: (T, E) bool, the router's choice.

        Returns:
            (T, E) bool, at least one expert per token.
        """
        if self.mass is not None:
            # Rounding of the sum must not leave an expert out.
            ranked, taken = choose(logits, Selection(logits.shape[1], None if self.mass == 1 else self.mass))
            return torch.zeros_like(strong).scatter(1, ranked.order, taken)
        _, order = sort_rows(logits.softmax(-1), logits.shape[1])
        if self.rank:
            return torch.zeros_like(strong).scatter(1, order[:, self.rank - 1 : self.rank], True)
        last = torch.zeros_like(strong).scatter(1, order[:, -1:], True)
        return torch.where(strong.all(-1, keepdim=True), last, ~strong)


class WeakRouter(Router):
    """The experts of a `WeakRule`, whose weights are proportional to their probabilities and add up to the router's.

    Only for evaluation. Source: Shi et al. 2024 (SCMoE, arXiv 2405.14507), section 3, where the weights of both
    routings add up to 1.

    Args:
        router: the strong one, of a kind in `DEFAULTS`; its parameters are shared.
        rule: what is taken instead.

    Raises:
        ValueError: the router's kind is refused, or it has fewer experts than the rule's rank.
    """

    def __init__(self, router: Router, rule: WeakRule) -> None:
        if type(router) not in DEFAULTS or not isinstance(router, LinearRouter):
            raise ValueError(
                f"a {type(router).__name__} has no weak routing: its experts have no ranks that a weaker choice could "
                "follow"
            )
        if rule.rank > router.num_experts:
            raise ValueError(f"the weak routing rank-{rule.rank} is beyond a router's {router.num_experts} experts")
        super().__init__(0, router.num_experts, router.options)
        self.router = router
        self.rule = rule

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        assert isinstance(self.router, LinearRouter)
        logits = self.router.logits(x)
        return self.plan(logits, self.router.plan(logits, padding_mask), padding_mask)

    def plan(self, logits: Tensor, strong: RoutingPlan, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Weakens a plan.

        Args:
            logits: (T, E).
            strong: the router's plan.
            padding_mask: (T,) bool, true for padding.
        """
        mass = logits.new_zeros(len(logits)).index_add(0, strong.token, strong.weight.to(logits.dtype))
        chosen = self.rule.choose(logits, strong.token_routing.taken.bool())
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1) * mass.unsqueeze(-1)
        return plan_of(chosen, weights, strong.first, padding_mask)

    def static(self, like: Tensor) -> bool:
        return False
