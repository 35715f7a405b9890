"""What one MoE layer did in one forward pass, as sums that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RoutingStats:
    """Sums over the real (unpadded) tokens of one call of one MoE layer.

    All are tensors on the layer's device, so that collecting them never waits for it; ratios are
    taken where they are shown. Only the losses and CMR's gate carry gradients.

    Attributes:
        tokens: () real tokens routed.
        wanted: () (token, expert) pairs that the router chose.
        received: () pairs left after capacity; these are computed.
        first_dropped: () tokens whose first choice was dropped by capacity.
        top1_prob: () sum of the first choice's probability.
        expert_load: (E,) pairs computed by each expert.
        first_choices: (E,) tokens whose first choice the expert was, before capacity.
        passes: () how often a token was routed, added up: ``tokens``, or more in a stratified layer, where
            ``passes / tokens`` is the requested capacity (RC).
        balance_loss: () E * sum_e f_e P_e, the balance loss of this call.
        z_loss: () mean squared log-sum-exp of the router's logits.
        gate: () sum of CMR's gate over the real tokens, with its gradient; none without CMR.
        layer: which layer it was, e.g. ``encoder.1``; empty until a model names it.
    """

    tokens: Tensor
    wanted: Tensor
    received: Tensor
    first_dropped: Tensor
    top1_prob: Tensor
    expert_load: Tensor
    first_choices: Tensor
    passes: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    gate: Tensor | None = None
    layer: str = ""
