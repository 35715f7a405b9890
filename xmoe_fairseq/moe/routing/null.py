"""AdaMoE: experts that compute nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import LinearRouter
from .options import RouterOptions, router_option
from .plan import RoutingPlan, entropy_sum, plan_of
from .statistics import RouterSums
from .topk import sort_rows


@dataclass(frozen=True)
class NullOptions(RouterOptions):
    """Options of `NullRouter`.

    Attributes:
        null_experts: m, experts that compute nothing; -1 for as many as the router has true ones.
    """

    null_experts: int = router_option(
        -1,
        "null router: choices beside the experts that compute nothing; -1 for as many as there are experts",
        low=-1,
        high=2**20,
    )


class NullRouter(LinearRouter):
    """A token takes the k most probable of E experts and m null experts, which compute nothing.

    So it takes 0 to k experts. Their weights are their probabilities divided by the sum over its true experts. The
    balance loss counts all choices, and those of the null experts evenly, so that it need not balance them.

    Source: Zeng et al. 2024 (AdaMoE), section 3.

    Raises:
        ValueError: k is below 1 or above the number of experts.
    """

    Options = NullOptions
    uses: ClassVar[tuple[str, ...]] = ("top_k", "shift")
    family = "AdaMoE"
    paper = "AdaMoE: Zeng et al. 2024, arXiv 2406.13233"
    dial = "shift"
    kept_whole: ClassVar[tuple[str, ...]] = ("null_weight",)
    options: NullOptions

    def __init__(self, dim: int, num_experts: int, options: NullOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.null_weight = nn.Parameter(torch.empty(self.nulls(options, num_experts), dim))
        nn.init.uniform_(self.null_weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    @staticmethod
    def nulls(options: NullOptions, num_experts: int) -> int:
        """Returns m."""
        return num_experts if options.null_experts < 0 else options.null_experts

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        assert isinstance(options, NullOptions)
        nulls = "as many" if options.null_experts < 0 else options.null_experts
        return f"top {options.top_k} with {nulls} null experts"

    @classmethod
    def after_pruning(cls, options: RouterOptions, num_experts: int) -> dict[str, int]:
        assert isinstance(options, NullOptions)
        return {"null_experts": cls.nulls(options, num_experts)}

    def bounds(self) -> tuple[int, int]:
        return max(0, self.options.top_k - len(self.null_weight)), self.options.top_k

    def logits(self, x: Tensor) -> Tensor:
        """Maps x: (T, d) to the scores of the experts and, behind them, of the null experts: (T, E + m)."""
        return self.product(x, torch.cat([self.weight, self.null_weight]))

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes by given logits: (T, E + m); padding_mask: (T,) bool, true for padding."""
        if self.options.shift:
            logits = torch.cat([logits[:, : self.num_experts] - self.options.shift, logits[:, self.num_experts :]], -1)
        probs = torch.softmax(logits, dim=-1)
        _, order = sort_rows(probs.detach(), self.options.top_k)
        taken = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, True)
        true, chosen = logits[:, : self.num_experts], taken[:, : self.num_experts]
        # Those of tokens without an expert are not looked at, but must be numbers.
        counted = chosen | ~chosen.any(-1, keepdim=True)
        return plan_of(
            chosen,
            torch.softmax(true.masked_fill(~counted, -torch.inf), dim=-1),
            true.detach().argmax(-1),
            padding_mask,
            partial(self._sums, logits, probs, taken),
            max_assignments=len(logits) * self.options.top_k if self.static(logits) else None,
            probs=probs,
        )

    def _sums(self, logits: Tensor, probs: Tensor, taken: Tensor, keep: Tensor) -> RouterSums:
        rows = keep.unsqueeze(-1)
        load = (taken & rows).sum(0).double()
        if len(load) > self.num_experts:
            load[self.num_experts :] = load[self.num_experts :].mean()
        entropies = entropy_sum(logits, probs, ~keep) if self.measures_entropy else probs.new_zeros(())
        return RouterSums(
            keep.sum(),
            load,
            probs.masked_fill(~rows, 0.0).sum(0),
            logits.logsumexp(-1).square().masked_fill(~keep, 0.0).sum(),
            entropies,
        )
