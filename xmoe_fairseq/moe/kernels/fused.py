"""Gather, both products, activation and sum of one expert after the other, in one autograd function.

Rows that an expert has just gathered or made are still in the cache when it needs them, and only the hidden
units are kept for the backward pass. The gradient of the pairs' weights needs no expert output:
``d y / d weight = <grad, W2 h + b2> = <W2^T grad, h> + <grad, b2>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..pairs import Pairs
from .contract import Activation, ExpertWeights


def fused(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs the experts that have tokens, one after the other; see `ExpertKernel`.

    Reads the group sizes back from the device once.
    """
    sizes = pairs.group_sizes.tolist()
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
    )


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, with its rows."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


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
    ) -> Tensor:
        y = torch.zeros_like(x)
        kept = []
        keep = any(ctx.needs_input_grad)
        for expert, rows in _groups(sizes):
            pre = torch.addmm(fc1_bias[expert], x.index_select(0, token[rows]), fc1_weight[expert].t())
            hidden = activation(pre)
            if mask is not None:
                hidden = hidden * mask[rows]
            out = torch.addmm(fc2_bias[expert], hidden, fc2_weight[expert].t())
            y.index_add_(0, token[rows], out.mul_(share[rows].to(out.dtype).unsqueeze(-1)))
            if keep:
                kept.append(pre)
        ctx.save_for_backward(x, share, fc1_weight, fc2_weight, fc2_bias, token, mask, *kept)
        ctx.sizes, ctx.activation = sizes, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, share, fc1_weight, fc2_weight, fc2_bias, token, mask, *kept = ctx.saved_tensors
        grad_x, grad_share = torch.zeros_like(x), torch.zeros_like(share)
        grad_fc1, grad_fc2 = torch.zeros_like(fc1_weight), torch.zeros_like(fc2_weight)
        grad_bias1, grad_bias2 = fc1_weight.new_zeros(fc1_weight.shape[:2]), torch.zeros_like(fc2_bias)
        for (expert, rows), pre in zip(_groups(ctx.sizes), kept, strict=True):
            with torch.enable_grad():
                pre = pre.detach().requires_grad_()
                hidden = ctx.activation(pre) if mask is None else ctx.activation(pre) * mask[rows]
            here = grad.index_select(0, token[rows])
            back = here @ fc2_weight[expert]
            grad_share[rows] = (back * hidden.detach()).sum(-1) + here @ fc2_bias[expert]
            weight = share[rows].to(here.dtype).unsqueeze(-1)
            here.mul_(weight)
            torch.mm(here.t(), hidden.detach(), out=grad_fc2[expert])
            torch.sum(here, dim=0, out=grad_bias2[expert])
            (grad_pre,) = torch.autograd.grad(hidden, pre, back.mul_(weight))
            torch.mm(grad_pre.t(), x.index_select(0, token[rows]), out=grad_fc1[expert])
            torch.sum(grad_pre, dim=0, out=grad_bias1[expert])
            grad_x.index_add_(0, token[rows], grad_pre @ fc1_weight[expert])
        return grad_x, grad_share, grad_fc1, grad_bias1, grad_fc2, grad_bias2, None, None, None, None
