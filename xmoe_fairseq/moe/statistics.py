"""What one MoE layer did in one forward pass: as sums that stay on the device, and token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class TokenRouting:
    """What one call of one MoE layer did with each token; padding has zeros everywhere.

    Summed over the tokens, ``taken``, ``passes`` and ``top1_prob`` are `RoutingStats`' ``expert_load``, ``passes``
    and ``top1_prob``. A model gives (batch, length, ...) instead of (T, ...).

    Attributes:
        taken: (T, E) int64, how often each expert was computed for the token: more than once only where several
            strata choose it. Stacked layers have their experts one after the other.
        passes: (T,) int64, how often the token was routed: its requested capacity (RC) in a stratified layer.
        top1_prob: (T,) probability of the first choice, added up over the passes.
        entropy: (T,) entropy of the router's probabilities in nats, added up over the passes; none for routers that
            do not choose by probability (hash, balanced).
    """

    taken: Tensor
    passes: Tensor
    top1_prob: Tensor
    entropy: Tensor | None

    @property
    def experts(self) -> Tensor:
        """(T,) int64, experts computed for each token."""
        return self.taken.sum(-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenRouting:
        """Changes every tensor."""
        entropy = None if self.entropy is None else change(self.entropy)
        return TokenRouting(change(self.taken), change(self.passes), change(self.top1_prob), entropy)


def add_up(parts: Sequence[TokenRouting], taken: Tensor) -> TokenRouting:
    """Adds up what several routers did with the same tokens, but for ``taken``, which is given."""
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TokenRouting(
        taken=taken,
        passes=torch.stack([part.passes for part in parts]).sum(0),
        top1_prob=torch.stack([part.top1_prob for part in parts]).sum(0),
        entropy=torch.stack(entropies).sum(0) if entropies else None,
    )


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of distributions (..., E), an impossible choice counting 0: (...)."""
    return torch.special.entr(probs).sum(-1)
