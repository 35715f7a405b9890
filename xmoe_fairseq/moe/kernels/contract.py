"""What every kernel computes, from what, and how it says which experts it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing.assignments import Assignments
from .buffer_pool import Buffers
from .weight_gradients import WeightGradients, collect

Activation = Callable[[Tensor], Tensor]
# What one expert computes: (R, d) to (R, d), by its own tensors, an activation and the probability of dropout.
Network = Callable[[Tensor, Mapping[str, Tensor], Activation, float], Tensor]


def feed_forward(x: Tensor, tensors: Mapping[str, Tensor], activation: Activation, dropout: float) -> Tensor:
    """Computes ``W2^T act(W1 x + b1) + b2`` for x: (R, d)."""
    hidden = activation(F.linear(x, tensors["fc1_weight"], tensors["fc1_bias"]))
    return F.linear(F.dropout(hidden, dropout), tensors["fc2_weight"].t(), tensors["fc2_bias"])


def aligned(x: Tensor, hidden: int) -> bool:
    """Returns whether rows of x: (T, d) and of h hidden units are multiples of 16 bytes in half precision."""
    return x.shape[-1] % 8 == 0 and hidden % 8 == 0


# Of the tensors of feed-forward networks, in the order in which kernels take them.
NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


class StackedWeights:
    """The stacked parameters of E networks of one kind.

    Args:
        network: what each expert computes.
        tensors: by name, (E, ...), all of one dtype.
    """

    def __init__(self, network: Network, tensors: Mapping[str, Tensor]) -> None:
        self.network = network
        self.tensors = tensors
        self.dtype = next(iter(tensors.values())).dtype

    def shared(self) -> StackedWeights:
        """Returns the weights for several uses in one forward pass; without it they are for one."""
        return self

    def of_each(self) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors of each expert by name."""
        for parts in zip(*(tensor.unbind() for tensor in self.tensors.values()), strict=True):
            yield dict(zip(self.tensors, parts, strict=True))


class ExpertWeights(StackedWeights):
    """The stacked parameters of E feed-forward networks, by the names that most kernels use.

    Attributes:
        fc1_weight: (E, h, d).
        fc1_bias: (E, h).
        fc2_weight: (E, h, d), so that a hidden unit is a row of both matrices.
        fc2_bias: (E, d).
        gradients: where a kernel's backward pass may add the weights' gradients, before it returns
            `WeightGradients.returned`.
    """

    def __init__(
        self,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        gradients: WeightGradients,
    ) -> None:
        tensors = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
        super().__init__(feed_forward, tensors)
        self.fc1_weight = fc1_weight
        self.fc1_bias = fc1_bias
        self.fc2_weight = fc2_weight
        self.fc2_bias = fc2_bias
        self.gradients = gradients

    @classmethod
    def of(
        cls, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, buffers: Buffers
    ) -> ExpertWeights:
        """Prepares parameters for one forward pass."""
        return cls(fc1_weight, fc1_bias, fc2_weight, fc2_bias, WeightGradients(buffers))

    def shared(self) -> ExpertWeights:
        if not torch.is_grad_enabled():
            return self
        gradients = WeightGradients(self.gradients.buffers, collected=True)
        return ExpertWeights(**collect(gradients, **self.tensors), gradients=gradients)


class ExpertKernel(Protocol):
    """``y[t] = sum over the assignments (t, e) of weight * network_e(x[t])``, see `feed_forward` for the usual network.

    A token's outputs are added in the order of the experts, whatever else is in the batch; a token without
    an assignment gets zeros. Its gradients are those of `reference`.
    """

    def __call__(
        self, x: Tensor, assignments: Assignments, weights: Any, activation: Activation, dropout: float = 0.0
    ) -> Tensor:
        """Computes y: (T, d).

        Args:
            x: (T, d), of the weights' dtype.
            assignments: which token goes where.
            weights: `StackedWeights` of all experts, of a network that the kernel computes.
            activation: elementwise function.
            dropout: probability of zeroing a hidden unit; 0 outside of training, unless dropout is kept.
        """


# Whether a kernel is the one to take for x: (T, d), its assignments, h hidden units, and ReLU without dropout or not.
Suits = Callable[[Tensor, Assignments, int, bool], bool]


@dataclass(frozen=True)
class Kernel:
    """A way to compute experts, and what it says of itself.

    Attributes:
        compute: the computation.
        networks: the networks that it computes; None for all.
        suits: whether `choose` takes it for a call, unless a kernel before it does.
    """

    compute: ExpertKernel
    networks: tuple[Network, ...] | None
    suits: Suits

    def __call__(
        self, x: Tensor, assignments: Assignments, weights: Any, activation: Activation, dropout: float = 0.0
    ) -> Tensor:
        """Computes y: (T, d); see `ExpertKernel`."""
        return self.compute(x, assignments, weights, activation, dropout)

    def computes(self, network: Network) -> bool:
        """Returns whether it computes experts of a network."""
        return self.networks is None or network in self.networks


def kernel(*networks: Network, suits: Suits) -> Callable[[ExpertKernel], Kernel]:
    """Declares a kernel.

    Args:
        networks: the networks that it computes; all if none is named.
        suits: see `Kernel`.
    """
    return lambda compute: Kernel(compute, networks or None, suits)
