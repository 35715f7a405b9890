"""Gather, both products, activation and sum of one expert after the other, in one autograd function.

Rows that an expert has just gathered or made are still in the cache when it needs them, and only the hidden
units are kept for the backward pass. The gradient of the pairs' weights needs no expert output:
``d y / d weight = <grad, W2 h + b2> = <W2^T grad, h> + <grad, b2>``.

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
from .memory import Buffers


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
        weights.buffers or Buffers(),
    )


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, with its rows."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


def _pieces(x: Tensor, hidden: int) -> int:
    """Says into how many pieces the hidden units are cut."""
    # Two a thread: a thread that is held up then delays the others less.
    pieces = 2 * torch.get_num_threads() if x.device.type == "cpu" else 1
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
        buffers: Buffers,
    ) -> Tensor:
        experts, width, dim = fc1_weight.shape
        pieces = _pieces(x, width)
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2, bias1 = fc1_weight.view(cut), fc2_weight.view(cut), fc1_bias.view(experts, pieces, 1, -1)
        keep = any(ctx.needs_input_grad)
        kept = buffers.empty("hidden", (len(token), width), x) if keep else None
        y = torch.zeros_like(x)
        for expert, rows in _groups(sizes):
            size = rows.stop - rows.start
            here = token[rows]
            shape = (pieces, size, width // pieces)
            pre = x.new_empty(shape) if kept is None else kept[rows].view(shape)
            torch.bmm(x.index_select(0, here).expand(pieces, size, dim), fc1[expert].mT, out=pre)
            pre += bias1[expert]
            hidden = activate(pre, activation)
            if mask is not None:
                hidden = hidden * mask[rows].view(shape)
            out = torch.bmm(hidden, fc2[expert])
            out[0] += fc2_bias[expert]
            out *= share[rows].to(out.dtype).unsqueeze(-1)
            for piece in out:
                y.index_add_(0, here, piece)
        ctx.save_for_backward(x, share, fc1_weight, fc2_weight, fc2_bias, token, mask, kept)
        ctx.sizes, ctx.activation, ctx.buffers, ctx.pieces = sizes, activation, buffers, pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, share, fc1_weight, fc2_weight, fc2_bias, token, mask, kept = ctx.saved_tensors
        experts, width, dim = fc1_weight.shape
        pieces, (needs_x, needs_share) = ctx.pieces, ctx.needs_input_grad[:2]
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut), fc2_weight.view(cut)
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_share = torch.zeros_like(share) if needs_share else None
        grad_fc1 = ctx.buffers.empty("fc1", cut, fc1_weight)
        grad_fc2 = ctx.buffers.empty("fc2", cut, fc2_weight)
        grad_bias1 = fc1_weight.new_zeros(experts, pieces, width // pieces)
        grad_bias2 = torch.zeros_like(fc2_bias)
        for expert in _without_rows(ctx.sizes):
            grad_fc1[expert].zero_()
            grad_fc2[expert].zero_()
        for expert, rows in _groups(ctx.sizes):
            size, here = rows.stop - rows.start, token[rows]
            shape = (pieces, size, width // pieces)
            factor = None if mask is None else mask[rows].view(shape)
            hidden, through = activated(kept[rows].view(shape), ctx.activation, factor)
            outer = grad.index_select(0, here)
            inner = torch.bmm(outer.expand(pieces, size, dim), fc2[expert].mT)
            if grad_share is not None:
                products = torch.linalg.vecdot(inner, hidden).sum(0) + outer @ fc2_bias[expert]
                grad_share[rows] = products.to(share.dtype)
            weight = share[rows].to(outer.dtype).unsqueeze(-1)
            outer *= weight
            torch.bmm(hidden.mT, outer.expand(pieces, size, dim), out=grad_fc2[expert])
            torch.sum(outer, dim=0, out=grad_bias2[expert])
            inner = through(inner.mul_(weight))
            torch.bmm(inner.mT, x.index_select(0, here).expand(pieces, size, dim), out=grad_fc1[expert])
            torch.sum(inner, dim=1, out=grad_bias1[expert])
            if grad_x is not None:
                for piece in torch.bmm(inner, fc1[expert]):
                    grad_x.index_add_(0, here, piece)
        weights = (
            grad_fc1.view_as(fc1_weight),
            grad_bias1.view(experts, width),
            grad_fc2.view_as(fc2_weight),
            grad_bias2,
        )
        return grad_x, grad_share, *weights, None, None, None, None, None


def _without_rows(sizes: Sequence[int]) -> Iterator[int]:
    return (expert for expert, size in enumerate(sizes) if not size)
