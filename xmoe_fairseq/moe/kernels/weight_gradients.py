"""One gradient of the stacked weights, however often they are used in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .buffer_pool import Buffers


class StackedGradient:
    """The gradient of one stacked weight, each expert's part of which is written when it first has rows.

    Args:
        total: (E, ...).
        written: of each expert, whether its part was written; changed by every addition.
    """

    def __init__(self, total: Tensor, written: bytearray) -> None:
        self._parts = total.unbind()
        self._written = written

    def add_product(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Adds a product to one expert's part, which is (n, m).

        Args:
            expert: its number.
            left: (n, R).
            right: (R, m).
        """
        if self._written[expert]:
            self._parts[expert].addmm_(left, right)
        else:
            torch.mm(left, right, out=self._parts[expert])
            self._written[expert] = True

    def add_sum(self, expert: int, rows: Tensor) -> None:
        """Adds the sum over R of rows, (R, n), to one expert's part, which is (n,)."""
        if self._written[expert]:
            self._parts[expert].add_(rows.sum(0))
        else:
            torch.sum(rows, dim=0, out=self._parts[expert])
            self._written[expert] = True

    def fill(self) -> None:
        """Writes zeros where nothing was added."""
        for expert, part in enumerate(self._parts):
            if not self._written[expert]:
                part.zero_()
                self._written[expert] = True


class WeightGradients:
    """Sums up the gradients of E experts' weights.

    Strata use the same stacked weights several times. Autograd would add as many gradients of the size of
    all experts, of which each is nearly empty.

    Args:
        buffers: memory for the large ones.
        collected: whether `collect` gives the sums to autograd; else the one use of the weights returns them.
    """

    def __init__(self, buffers: Buffers, collected: bool = False) -> None:
        self.buffers, self.collected = buffers, collected
        self._sums: dict[str, tuple[Tensor, bytearray]] = {}

    def of(self, name: str, like: Tensor) -> StackedGradient:
        """Returns the sum of a name, of the shape of ``like``: the weight, (E, ...), or a view of it."""
        total, written = self._sum(name, like)
        return StackedGradient(total.view(like.shape), written)

    def whole(self, name: str, like: Tensor) -> tuple[Tensor, bool]:
        """Returns the memory of a sum, every expert of which is then written, and whether to add to what is there."""
        begun = name in self._sums
        if begun:
            self.of(name, like).fill()
        total, written = self._sum(name, like)
        written[:] = b"\1" * len(written)
        return total.view(like.shape), begun

    def take(self, name: str, like: Tensor, brought: Tensor | None) -> Tensor:
        """Returns the sum, zero for experts that had no rows, plus what autograd brings, and forgets it."""
        if name not in self._sums and brought is not None:
            return brought
        if not all(self._sum(name, like)[1]):
            self.of(name, like).fill()
        total = self._sums.pop(name)[0].view(like.shape)
        return total if brought is None else total.add_(brought)

    def returned(self, weights: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Returns what the backward pass of a use of the weights, by name, returns as their gradients."""
        return tuple(None if self.collected else self.take(name, like, None) for name, like in weights.items())

    def _sum(self, name: str, like: Tensor) -> tuple[Tensor, bytearray]:
        if name not in self._sums:
            self._sums[name] = self.buffers.empty(name, tuple(like.shape), like), bytearray(len(like))
        return self._sums[name]


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
    """Returns the weights under their names; what kernels add to ``gradients`` for a name becomes its gradient."""
    return dict(zip(weights, _Collect.apply(gradients, tuple(weights), *weights.values()), strict=True))
