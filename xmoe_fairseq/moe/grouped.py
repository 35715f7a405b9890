"""One linear map an expert, applied to rows grouped by expert: only the rows there are are multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _slices(group_sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, with its rows."""
    start = 0
    for expert, size in enumerate(group_sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


class _GroupedLinear(torch.autograd.Function):
    """Writes each expert's product into its slice of one output; autograd over slices of a stacked
    weight would instead write a full-size gradient for every expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group_sizes: Sequence[int]) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in _slices(group_sizes):
            torch.addmm(bias[expert], x[rows], weight[expert].t(), out=out[rows])
        ctx.save_for_backward(x, weight)
        ctx.group_sizes = group_sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = weight.new_zeros(weight.shape[:2]) if needs_bias else None
        for expert, rows in _slices(ctx.group_sizes):
            if grad_x is not None:
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert])
            if grad_bias is not None:
                torch.sum(grad[rows], dim=0, out=grad_bias[expert])
        return grad_x, grad_weight, grad_bias, None


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """Applies ``weight[e] x + bias[e]`` to the rows of group e.

    Args:
        x: (R, in), rows grouped by expert.
        weight: (E, out, in).
        bias: (E, out).
        group_sizes: E numbers that add up to R.

    Returns:
        (R, out).

    Raises:
        ValueError: the group sizes do not cover the rows.
    """
    if sum(group_sizes) != x.shape[0] or len(group_sizes) != weight.shape[0]:
        raise ValueError(
            f"{len(group_sizes)} groups of {sum(group_sizes)} rows do not fit "
            f"{weight.shape[0]} experts and {x.shape[0]} rows"
        )
    return _GroupedLinear.apply(x, weight, bias, group_sizes)
