"""Tokens to the rows that experts multiply, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import RoutingPlan


def dispatch(x: Tensor, plan: RoutingPlan) -> Tensor:
    """Copies each chosen token's row once for every expert it takes, grouped by expert.

    Args:
        x: (T, d).

    Returns:
        (R, d).
    """
    return x.index_select(0, plan.token)


def combine(rows: Tensor, plan: RoutingPlan) -> Tensor:
    """Adds the experts' weighted outputs for each token; tokens without an expert get zeros.

    A token's outputs are added in the order of the experts, whatever else is in the batch.

    Args:
        rows: (R, d), grouped by expert as `dispatch` made them.

    Returns:
        (T, d).
    """
    weighted = rows * plan.weight.to(rows.dtype).unsqueeze(-1)
    return torch.zeros(plan.num_tokens, rows.shape[-1], dtype=rows.dtype, device=rows.device).index_add(
        0, plan.token, weighted
    )
