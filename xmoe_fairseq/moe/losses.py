"""Auxiliary losses of a router."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(probs: Tensor, first_choices: Tensor, real: Tensor) -> Tensor:
    """Penalises routers that send most tokens to few experts: ``E * sum_e f_e P_e``.

    It is 1 under perfect balance and E when every token takes one expert with certainty.

    Args:
        probs: (T, E) router probabilities; zero rows for padding.
        first_choices: (E,) real tokens whose first choice each expert is, before capacity.
        real: () number of real tokens; 0 gives a loss of 0.

    Source: Yang et al. 2024 (XMoE), section 3; the form of Fedus et al. 2022 (Switch), eq. 4.
    """
    count = real.clamp(min=1)
    share = first_choices.to(probs.dtype) / count
    mean_prob = probs.sum(0) / count
    return probs.shape[-1] * (share * mean_prob).sum()


def z_loss(logits: Tensor, keep: Tensor, real: Tensor) -> Tensor:
    """Penalises large router logits: the mean over real tokens of ``logsumexp(logits) ** 2``.

    Args:
        logits: (T, E).
        keep: (T,) bool, false for padding.
        real: () number of real tokens; 0 gives a loss of 0.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.
    """
    squared = torch.logsumexp(logits, dim=-1).square().masked_fill(~keep, 0.0)
    return squared.sum() / real.clamp(min=1)
