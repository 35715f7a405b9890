"""Gather, both products, activation and sum of one expert after the other, in one autograd function.

Rows that an expert has just gathered or made are still in the cache when it needs them, and only the hidden
units are kept for the backward pass. The gradient of the pairs' weights needs no expert output:
``d y / d weight = <grad, W2 h + b2> = <W2^T grad, h> + <grad, b2>``.

The weights' gradients do not go through autograd but into `WeightGradients`, which a call of
`ExpertWeights.of` returns to it.

An expert has too few rows for a product that is cut among threads by rows. So its hidden units are cut: each
piece is one product of a batch, whose products run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..pairs import Pairs
from .activation import activate, activated
from .contract import Activation, ExpertWeights
from .gradients import WeightGradients


def fused(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs the experts that have tokens, one after the other; see `ExpertKernel`.

    Reads the group sizes back from the device once.

    Raises:
        ValueError: the group sizes do not fit the pairs or the experts.
    """
    sizes = pairs.group_sizes.tolist()
    if sum(sizes) > len(pairs.token) or len(sizes) != len(weights.fc1_weight):
        raise ValueError(
            f"{len(sizes)} groups of {sum(sizes)} rows do not fit "
            f"{len(weights.fc1_weight)} experts and {len(pairs.token)} pairs"
        )
    mask = None
    if dropout:
        mask = F.dropout(x.new_ones(sum(sizes), weights.fc1_weight.shape[1]), dropout)
    return _Fused.apply(
        x,
        pairs.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        pairs.token,
        mask,
        sizes,
        activation,
        weights.gradients,
    )


def _groups(sizes: Sequence[int], *stacked: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yields each expert that has rows, with its rows of every argument."""
    # Unused rows, beyond the last group, belong to none.
    split = [(None,) * len(sizes) if rows is None else rows[: sum(sizes)].split(sizes) for rows in stacked]
    for expert, size in enumerate(sizes):
        if size:
            yield expert, size, *(rows[expert] for rows in split)


def _pieces(x: Tensor, hidden: int) -> int:
    """Says into how many pieces the hidden units are cut."""
    pieces = torch.get_num_threads() if x.device.type == "cpu" else 1
    return pieces if hidden % pieces == 0 else 1


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        token: Tensor,
        mask: Tensor | None,
        sizes: Sequence[int],
        activation: Activation,
        gradients: WeightGradients,
    ) -> Tensor:
        experts, width, dim = fc1_weight.shape
        pieces = _pieces(x, width)
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut).mT.unbind(), fc2_weight.view(cut).unbind()
        bias1 = fc1_bias.view(experts, pieces, 1, width // pieces).unbind()
        keep = any(ctx.needs_input_grad)
        kept = gradients.buffers.empty("hidden", (len(token), width), x) if keep else None
        factors = share.to(x.dtype).unsqueeze(-1)
        y = torch.zeros_like(x)
        for expert, size, here, factor, kept_rows, mask_rows in _groups(sizes, token, factors, kept, mask):
            shape = (pieces, size, width // pieces)
            pre = x.new_empty(shape) if kept_rows is None else kept_rows.view(shape)
            torch.baddbmm(bias1[expert], x.index_select(0, here).expand(pieces, size, dim), fc1[expert], out=pre)
            hidden = activate(pre, activation)
            if mask_rows is not None:
                hidden = hidden * mask_rows.view(shape)
            out = torch.bmm(hidden, fc2[expert]).sum(0)
            y.index_add_(0, here, out.add_(fc2_bias[expert]).mul_(factor))
        ctx.save_for_backward(x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept)
        ctx.sizes, ctx.activation, ctx.gradients, ctx.pieces = sizes, activation, gradients, pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept = ctx.saved_tensors
        experts, width, dim = fc1_weight.shape
        pieces, (needs_x, needs_share) = ctx.pieces, ctx.needs_input_grad[:2]
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut).unbind(), fc2_weight.view(cut).mT.unbind()
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_share = torch.zeros_like(share)
        factors = share.to(x.dtype).unsqueeze(-1)
        parts = (token, factors, kept, mask, grad_share)
        for expert, size, here, factor, kept_rows, mask_rows, grad_factor in _groups(ctx.sizes, *parts):
            shape = (pieces, size, width // pieces)
            dropped = None if mask_rows is None else mask_rows.view(shape)
            hidden, through = activated(kept_rows.view(shape), ctx.activation, dropped)
            outer = grad.index_select(0, here)
            inner = torch.bmm(outer.expand(pieces, size, dim), fc2[expert])
            if needs_share:
                grad_factor.copy_(torch.linalg.vecdot(inner, hidden).sum(0).add_(outer @ fc2_bias[expert]))
            outer *= factor
            wide = outer.expand(pieces, size, dim)
            ctx.gradients.add_product("fc2_weight", fc2_weight, expert, hidden.mT, wide)
            ctx.gradients.add_sum("fc2_bias", fc2_bias, expert, outer)
            inner = through(inner.mul_(factor))
            rows = x.index_select(0, here).expand(pieces, size, dim)
            ctx.gradients.add_product("fc1_weight", fc1_weight, expert, inner.mT, rows)
            ctx.gradients.add_sum("fc1_bias", fc1_bias, expert, inner)
            if grad_x is not None:
                grad_x.index_add_(0, here, torch.bmm(inner, fc1[expert]).sum(0))
        return grad_x, grad_share if needs_share else None, *[None] * 9
