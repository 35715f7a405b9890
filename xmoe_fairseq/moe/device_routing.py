"""Routing on a GPU in a few Triton programs, in place of some sixty launches; the plans are those of `make_plan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.tiled import installed
from .ranking import Limits, RankedProbs
from .routing import RoutingPlan, planned

# Probabilities that one program holds.
_HELD = 2048
_BLOCK = 4096


def routes_on_device(logits: Tensor) -> bool:
    """Says whether these logits can be routed here."""
    return logits.is_cuda and logits.dtype == torch.float32 and installed()


def plan_on_device(
    logits: Tensor,
    limits: Limits,
    padding_mask: Tensor | None = None,
    capacity: Tensor | None = None,
    normalize: bool = False,
    most: int | None = None,
    most_each: int | None = None,
) -> RoutingPlan:
    """Routes by logits (T, E) in float32; see `make_plan`.

    Args:
        logits: (T, E).
        limits: when a token takes no more.
        padding_mask: (T,) bool, true for padding.
        capacity: () the most tokens an expert takes; none drops nothing.
        normalize: divide a token's weights by their sum after dropping.
        most: a bound of the number of pairs; none reads their number back from the device.
        most_each: a bound of the pairs of one expert, if one is known.
    """
    from . import choices

    probs = torch.softmax(logits, dim=-1)
    (tokens, experts), held = probs.shape, probs.detach()
    span = 1 << max(experts - 1, 1).bit_length()
    rows = max(_HELD // span, 1)
    blocks = -(-tokens // rows)
    ranks = torch.empty_like(held, dtype=torch.int16)
    first, top = ranks.new_empty(tokens, dtype=torch.long), held.new_empty(tokens)
    counts = ranks.new_empty(experts, blocks, dtype=torch.int32)
    choices.take[(blocks,)](
        held, padding_mask, ranks, first, top, counts, tokens, experts, blocks,
        max(limits.mass or 0.0, torch.finfo(held.dtype).tiny), limits.number, padding_mask is not None, limits.mass is not None, span, rows,
    )  # fmt: skip
    kept = counts
    if capacity is not None:
        kept = torch.empty_like(counts)
        choices.limit[(experts,)](
            held, ranks, counts, kept, capacity, tokens, experts, blocks, rows, max(_BLOCK, rows), num_warps=8
        )
    ends = kept.view(-1).cumsum(0, dtype=torch.int32)
    if most is None:
        most = int(ends[-1]) if len(ends) else 0
    token, weight = _Pairs.apply(probs, ranks, ends.view(experts, blocks), most, rows, span, normalize)
    ranked = RankedProbs(logits, probs, top.unsqueeze(-1), first.unsqueeze(-1))
    return planned(token, weight, kept.sum(1), ranked, partial(torch.ge, ranks, 0), counts, padding_mask, most_each)


class _Pairs(torch.autograd.Function):
    """The pairs and their weights, from probabilities (T, E), ranks (T, E) and what `choices.pairs` needs."""

    @staticmethod
    def forward(
        ctx: Any, probs: Tensor, ranks: Tensor, ends: Tensor, most: int, rows: int, span: int, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        from . import choices

        token, weight = ranks.new_zeros(most, dtype=torch.long), probs.new_zeros(most)
        ctx.save_for_backward(probs, ranks, ends)
        ctx.rest = (*probs.shape, ends.shape[1], normalize, span, rows)
        choices.pairs[(ends.shape[1],)](probs, ranks, ends, token, weight, *ctx.rest)
        ctx.mark_non_differentiable(token)
        ctx.set_materialize_grads(False)
        return token, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from . import choices

        probs, ranks, ends = ctx.saved_tensors
        if grads[1] is None:
            return (None,) * 7
        grad = torch.empty_like(probs)
        choices.pairs_gradient[(ends.shape[1],)](probs, ranks, ends, grads[1].contiguous(), grad, *ctx.rest)
        return grad, *[None] * 6
