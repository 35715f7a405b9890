"""Auxiliary losses of a router, from sums over its tokens: sums can be added up over processes, the losses cannot."""

from __future__ import annotations

from torch import Tensor


def balance_loss(probs: Tensor, first_choices: Tensor, tokens: Tensor) -> Tensor:
    """Penalises routers that send most tokens to few experts: ``E * sum_e f_e P_e``.

    It is 1 under perfect balance and E when every token takes one expert with certainty.

    Args:
        probs: (E,) sums of the tokens' router probabilities.
        first_choices: (E,) tokens whose first choice each expert is, before capacity.
        tokens: () number of real tokens; 0 gives a loss of 0.

    Source: Yang et al. 2024 (XMoE), section 3; the form of Fedus et al. 2022 (Switch), eq. 4.
    """
    count = tokens.clamp(min=1)
    gate_weight = first_choices.to(probs.dtype) / count
    return len(probs) * (gate_weight * (probs / count)).sum()


def z_loss(squares: Tensor, tokens: Tensor) -> Tensor:
    """Penalises large router logits: the mean over real tokens of ``logsumexp(logits) ** 2``.

    Args:
        squares: () sum of ``logsumexp(logits) ** 2`` over the real tokens.
        tokens: () their number; 0 gives a loss of 0.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.
    """
    return squares / tokens.clamp(min=1)


def entropy_loss(entropies: Tensor, tokens: Tensor) -> Tensor:
    """Penalises undecided routers: the mean over real tokens of ``-sum_e p_e log p_e``, in nats.

    It is 0 when every token takes one expert with certainty and log E when all experts are equally probable.

    Args:
        entropies: () sum of the entropies of the real tokens' router probabilities.
        tokens: () their number; 0 gives a loss of 0.

    Source: Huang et al. 2024, "Harder Tasks Need More Experts", ACL 2024 (arXiv 2403.07652).
    """
    return entropies / tokens.clamp(min=1)
