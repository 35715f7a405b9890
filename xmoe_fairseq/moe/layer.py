"""The mixture-of-experts layer: router, dispatch, experts, combine."""

from __future__ import annotations

from torch import Tensor, nn

from .dispatch import combine, dispatch
from .experts import Experts
from .routers import Router
from .routing import RoutingPlan


class MoELayer(nn.Module):
    """Replaces a feed-forward network; its work is proportional to the chosen (token, expert) pairs.

    In evaluation nothing is dropped and no noise is added, so a token's output depends on that token alone.

    Args:
        router: decides which experts a token takes.
        experts: computes them.
    """

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, RoutingPlan]:
        """Computes ``y = sum over chosen e of p_e FFN_e(x)`` for every token.

        Args:
            x: (..., d).
            padding_mask: (...) bool, true for padding; such rows are not routed and come out as zeros.

        Returns:
            y: (..., d), and the plan over the flattened rows.
        """
        flat = x.reshape(-1, x.shape[-1])
        plan = self.router(flat, None if padding_mask is None else padding_mask.reshape(-1))
        rows = self.experts(dispatch(flat, plan), plan.group_sizes)
        return combine(rows, plan).reshape(x.shape), plan
