"""Activations whose gradient a kernel takes by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import Activation

RELU = (torch.relu, F.relu)


def activate(pre: Tensor, activation: Activation) -> Tensor:
    """Returns the hidden units before dropout; overwrites ``pre`` with what `activated` must be given later."""
    return pre.relu_() if activation in RELU else activation(pre)


def activated(kept: Tensor, activation: Activation, factor: Tensor | None) -> tuple[Tensor, Activation]:
    """Returns the hidden units again, and what takes their gradient back to before the activation.

    Args:
        kept: what `activate` left in its argument.
        activation: elementwise function.
        factor: what dropout multiplies the hidden units by; the gradient may be overwritten.
    """
    if activation in RELU:
        hidden = kept if factor is None else kept * factor

        def through(grad: Tensor) -> Tensor:
            grad = grad if factor is None else grad.mul_(factor)
            return torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=grad)

        return hidden, through
    with torch.enable_grad():
        pre = kept.detach().requires_grad_()
        active = activation(pre) if factor is None else activation(pre) * factor
    return active.detach(), lambda grad: torch.autograd.grad(active, pre, grad)[0]
