"""Many small feed-forward networks with stacked weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels import Buffers, ExpertWeights, choose
from .pairs import Pairs


class Experts(nn.Module):
    """E feed-forward networks ``W2_e^T act(W1_e x + b1_e) + b2_e``, each drawn anew: no two start equal.

    Args:
        num_experts: E.
        dim: d.
        hidden: h, of one expert.
        activation: elementwise function.
        dropout: probability of zeroing a hidden unit in training.
        kernel: of `kernels.CHOICES`.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.memory = Buffers()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every weight and bias as ``nn.Linear`` does: uniform within 1 / sqrt(fan in)."""
        _, hidden, dim = self.fc1_weight.shape
        for parameter, fan_in in (
            (self.fc1_weight, dim),
            (self.fc1_bias, dim),
            (self.fc2_weight, hidden),
            (self.fc2_bias, hidden),
        ):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor, pairs: Pairs) -> Tensor:
        """Adds up each token's weighted experts.

        Args:
            x: (T, d).
            pairs: which token goes to which expert.

        Returns:
            (T, d), in the autocast precision where one is set.
        """
        weights: list[Tensor] = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not look into custom autograd functions.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, *weights = (tensor.to(dtype) for tensor in (x, *weights))
        dropout = self.dropout.p if self.training else 0.0
        kernel = choose(self.kernel, x, self.fc1_weight.shape[1])
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        stacked = ExpertWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias, self.memory)
        return kernel(x, pairs, stacked, self.activation, dropout)

    def extra_repr(self) -> str:
        experts, hidden, dim = self.fc1_weight.shape
        return f"experts={experts}, dim={dim}, hidden={hidden}"
