"""One gradient of the stacked weights, however often they are used in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .memory import Buffers


class WeightGradients:
    """Sums up the gradients of E experts' weights, each written only where its expert had rows.

    Strata use the same stacked weights several times. Autograd would add as many gradients of the size of
    all experts, of which each is nearly empty.

    Args:
        buffers: memory for the large ones.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self._sums: dict[str, Tensor] = {}
        self._written: dict[str, set[int]] = {}  # the experts of each

    def add_product(self, name: str, like: Tensor, expert: int, left: Tensor, right: Tensor) -> None:
        """Adds a product of batches to one expert's gradient.

        Args:
            name: of the weight.
            like: the weight, (E, h, d).
            expert: its number.
            left: (pieces, h / pieces, R).
            right: (pieces, R, d).
        """
        out = self._sum(name, like)[expert].view(left.shape[0], left.shape[1], right.shape[2])
        if self._first(name, expert):
            torch.bmm(left, right, out=out)
        else:
            out.baddbmm_(left, right)

    def add_sum(self, name: str, like: Tensor, expert: int, rows: Tensor) -> None:
        """Adds the sum over R of rows, (R, n) or (pieces, R, n), to one expert's bias: (E, ...)."""
        out = self._sum(name, like)[expert].view(rows.shape[:-2] + rows.shape[-1:])
        if self._first(name, expert):
            torch.sum(rows, dim=-2, out=out)
        else:
            out += rows.sum(-2)

    def whole(self, name: str, like: Tensor) -> tuple[Tensor, bool]:
        """Gives the memory of a sum, every expert of which is then written, and whether to add to what is there."""
        begun = name in self._sums
        total = self._sum(name, like)
        if begun:
            self._fill(name)
        self._written[name] = set(range(len(total)))
        return total, begun

    def take(self, name: str, like: Tensor, brought: Tensor | None) -> Tensor:
        """Gives the sum, zero for experts that had no rows, plus what autograd brings, and forgets it."""
        if name not in self._sums and brought is not None:
            return brought
        total = self._sum(name, like)
        self._fill(name)
        del self._sums[name], self._written[name]
        return total if brought is None else total.add_(brought)

    def _fill(self, name: str) -> None:
        """Writes zeros where no expert has written."""
        total = self._sums[name]
        for expert in set(range(len(total))) - self._written[name]:
            total[expert].zero_()

    def _sum(self, name: str, like: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name] = self.buffers.empty(name, tuple(like.shape), like)
            self._written[name] = set()
        return self._sums[name]

    def _first(self, name: str, expert: int) -> bool:
        first = expert not in self._written[name]
        self._written[name].add(expert)
        return first


class _Collect(torch.autograd.Function):
    """Hands weights on; in the backward pass, gives the sum that the uses of them left, plus what autograd brings."""

    @staticmethod
    def forward(ctx: Any, gradients: WeightGradients, names: Sequence[str], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients, ctx.names = gradients, names
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *brought: Tensor | None) -> tuple[Tensor | None, ...]:
        named = zip(ctx.names, ctx.saved_tensors, brought, strict=True)
        return None, None, *(ctx.gradients.take(*one) for one in named)


def collect(gradients: WeightGradients, **weights: Tensor) -> dict[str, Tensor]:
    """Gives the weights under their names; what kernels add to ``gradients`` for a name becomes its gradient."""
    return dict(zip(weights, _Collect.apply(gradients, tuple(weights), *weights.values()), strict=True))
