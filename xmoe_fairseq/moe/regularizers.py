"""Regularisers that the SMoE paper compares with: expert output masking and conditional MoE routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import Dropout
from .layer import flat
from .routing.plan import real_tokens
from .routing.statistics import RoutingStats, TokenRouting, add_up, merge


class ExpertOutputMasking(nn.Module):
    """In training zeroes the experts' output of random tokens; in evaluation scales all outputs to the same mean.

    Args:
        rate: share of tokens masked.

    Source: NLLB Team 2022 (EOM), section 6.2; Xu et al. 2023, baseline EOM.
    """

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor) -> Tensor:
        """y: (T, d)"""
        if not self.training:
            return y * (1 - self.rate)
        return y * (torch.rand(y.shape[0], 1, device=y.device) >= self.rate).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class ConditionalMoE(nn.Module):
    """A gate mixes a shared feed-forward network and the experts: ``(1 - g) FFN(x) + g MoE(x)`` (CMR).

    Args:
        moe: an MoE or stratified MoE layer.
        dim: d.
        hidden: hidden units of the shared network.
        activation: elementwise function.
        dropout: probability of zeroing a hidden unit in training.
        gate_dropout: probability that a token's gate is 0 in training.
        norm: applied to the input of the shared network and of the gate, where the experts normalise by themselves.

    Source: NLLB Team 2022 (CMR), section 6.2; Xu et al. 2023, baseline CMR.
    """

    def __init__(
        self,
        moe: nn.Module,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
        gate_dropout: float = 0.1,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.gate = nn.Linear(dim, 1)
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.gate_dropout = gate_dropout
        self.norm = norm or nn.Identity()

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Computes the mixture; the arguments are those of the experts' layer.

        Returns:
            (..., d), zero for padding, and the experts' plan with the sum of the gate in its statistics.
        """
        y, plan = self.moe(x, padding_mask, tokens)
        normed = self.norm(x)
        shared = self.fc2(self.dropout(self.activation(self.fc1(normed))))
        gate = self.gate(normed).float().sigmoid()
        if self.training:
            gate = gate * (torch.rand_like(gate) >= self.gate_dropout)
        keep = real_tokens(flat(padding_mask), gate.reshape(-1)).reshape(gate.shape)
        mixed = torch.lerp(shared, y.to(shared.dtype), gate.to(shared.dtype)) * keep
        return mixed, replace(plan, count=lambda: replace(plan.stats, gate=(gate * keep).sum()))


class StackedMoE(nn.Module):
    """MoE layers one after the other, without LayerNorm or residual between: the baseline "naive stacking".

    Source: Xu et al. 2023, section 4.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Runs the layers; the plan is the last one's, with the statistics and the routing of all."""
        plans = []
        for layer in self.layers:
            x, plan = layer(x, padding_mask, tokens)
            plans.append(plan)
        return x, replace(
            plan,
            count=lambda: _together([one.stats for one in plans]),
            trace=lambda: _token_by_token([one.token_routing for one in plans]),
        )


def _together(seen: list[RoutingStats]) -> RoutingStats:
    return merge(seen, torch.cat, seen[0].tokens)


def _token_by_token(seen: list[TokenRouting]) -> TokenRouting:
    return add_up(seen, torch.cat([one.taken for one in seen], dim=-1))
