"""What every kernel computes, and from what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..pairs import Pairs
from .gradients import WeightGradients, collect
from .memory import Buffers

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertWeights:
    """The stacked parameters of E feed-forward networks.

    Attributes:
        fc1_weight: (E, h, d).
        fc1_bias: (E, h).
        fc2_weight: (E, h, d), so that a hidden unit is a row of both matrices.
        fc2_bias: (E, d).
        gradients: where a kernel's backward pass may add the weights' gradients, instead of returning them.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    gradients: WeightGradients

    @classmethod
    def of(
        cls, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, buffers: Buffers
    ) -> ExpertWeights:
        """Prepares parameters for one forward pass, in which they may be used several times."""
        gradients = WeightGradients(buffers)
        if not torch.is_grad_enabled():
            return cls(fc1_weight, fc1_bias, fc2_weight, fc2_bias, gradients)
        parts = collect(gradients, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
        return cls(**parts, gradients=gradients)


class ExpertKernel(Protocol):
    """``y[t] = sum over the pairs (t, e) of weight * (W2_e^T act(W1_e x[t] + b1_e) + b2_e)``.

    A token's outputs are added in the order of the experts, whatever else is in the batch; a token without
    a pair gets zeros. Its gradients are those of `loop`.
    """

    def __call__(
        self, x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0
    ) -> Tensor:
        """Computes y: (T, d).

        Args:
            x: (T, d), of the weights' dtype.
            pairs: which token goes where.
            weights: of all experts.
            activation: elementwise function.
            dropout: probability of zeroing a hidden unit; 0 outside of training, unless dropout is kept.
        """
