"""A product of bf16 matrices whose result is float32, on tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def has_fp32_product(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `fp32_linear` is made for these, and this torch (since 2.8) has what it needs."""
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and "dtype" in torch.ops.aten.mm.overloads()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies bf16 matrices (n, k) and (k, m) into float32: (n, m)."""
    return torch.mm(a, b, out_dtype=torch.float32)


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes ``x W^T`` as exactly as in float32: products of bf16 numbers are exact, and are added up in float32.

    Args:
        x: (T, d) bf16, on a GPU.
        weight: (E, d) bf16.

    Returns:
        (T, E) float32.
    """
    y: Tensor = _FP32Linear.apply(x, weight)
    return y


class _FP32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        halves = torch.empty(len(grad), 2, grad.shape[1], dtype=x.dtype, device=x.device)
        torch.sub(grad, halves[:, 0].copy_(grad), out=halves[:, 1])
        halves = halves.flatten(1)
        grad_x = torch.mm(halves, torch.cat([weight, weight])) if ctx.needs_input_grad[0] else None
        return grad_x, weight_gradient(halves, x, weight)


def weight_gradient(halves: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Computes that of `fp32_linear`: (E, d).

    Args:
        halves: (T, 2 E) bf16, two parts of the output's gradient: two bf16 numbers hold 16 bits of a float32.
        x: (T, d).
        weight: (E, d).
    """
    high, low = product(halves.t(), x).view(2, *weight.shape)
    return torch.add(high, low, out=torch.empty_like(weight))
