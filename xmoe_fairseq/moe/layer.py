"""The mixture-of-experts layer: a router and the experts it chooses from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .experts.stacked import ExpertSet
from .routing.base import Router
from .routing.plan import RoutingPlan, real_tokens


class MoELayer(nn.Module):
    """Replaces a feed-forward network; its work is proportional to the chosen (token, expert) assignments.

    The way of T rows, and the file of each step:

    1. scores ``W x`` in float32, (T, E): `LinearRouter.logits` in ``routing/base.py``;
    2. choice: experts in the order of their probabilities, up to the router's `Selection`: ``routing/topk.py``;
    3. plan: R assignments sorted by expert, without those above a capacity: ``routing/plan.py``. On a GPU steps 2 and 3
       are Triton programs with the same plans: ``routing/triton_routing.py``;
    4. with expert parallelism, rows travel to the ranks that hold their experts: ``expert_parallel/all_to_all.py``;
    5. outputs: a kernel computes ``p_r FFN_e(x_t)`` of every assignment and adds them up by token: ``kernels/``, where
       ``reference.py`` defines the result, and a CPU takes ``per_expert.py`` and a GPU ``triton_mm.py``;
    6. the regularizer.

    In evaluation nothing is dropped and no noise is added, so a token's output depends on that token alone.

    Args:
        router: decides which experts a token takes.
        experts: computes them.
        regularizer: applied to the layer's output, such as `ExpertOutputMasking`.
    """

    def __init__(self, router: Router, experts: ExpertSet, regularizer: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        if not experts.equal:
            router.learn_costs(experts.flops())
        self.regularizer = regularizer or nn.Identity()

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """Computes ``y = sum over chosen e of p_e FFN_e(x)`` for every token.

        Args:
            x: (..., d).
            padding_mask: (...) bool, true for padding; such rows are not routed and come out as zeros.
            tokens: (...) int64 ids of the tokens; only the hash router needs them.

        Returns:
            y: (..., d), and the plan over the flattened rows.
        """
        rows = x.reshape(-1, x.shape[-1])
        plan = self.router(rows, flat(padding_mask), flat(tokens))
        if plan.rows is not None:
            rows = plan.rows
        y = self.regularizer(self.experts(rows, plan)).reshape(x.shape)
        if self.experts.shares_network and padding_mask is not None:
            y = y.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return y, _with_hidden_units(plan, self.experts)


def _with_hidden_units(plan: RoutingPlan, experts: ExpertSet) -> RoutingPlan:
    """Adds to a plan's statistics the hidden units that were computed, if the experts are of different sizes."""
    if experts.equal:
        return plan
    return replace(plan, count=lambda: replace(plan.stats, hidden=experts.hidden_units(plan.group_sizes)))


class SharedBias(nn.Module):
    """Adds a vector to the output of an MoE layer, once per token, whichever experts the token takes.

    Args:
        moe: the layer.
        dim: d.
    """

    def __init__(self, moe: nn.Module, dim: int) -> None:
        super().__init__()
        self.moe = moe
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """Computes the layer; arguments and results are those of `MoELayer`."""
        y, plan = self.moe(x, padding_mask, tokens)
        if padding_mask is None:
            return y + self.bias.to(y.dtype), plan
        keep = real_tokens(flat(padding_mask), y).view(*y.shape[:-1], 1)
        return y + self.bias.to(y.dtype) * keep, plan


def flat(values: Tensor | None) -> Tensor | None:
    """Makes one dimension of (...), if there are values."""
    return None if values is None else values.reshape(-1)
