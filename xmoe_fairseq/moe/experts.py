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

    def forward(self, x: Tensor, pairs: Pairs, weights: ExpertWeights | None = None) -> Tensor:
        """Adds up each token's weighted experts.

        Args:
            x: (T, d).
            pairs: which token goes to which expert.
            weights: what `weights` gave, where the experts run several times in a forward pass.

        Returns:
            (T, d), in the autocast precision where one is set.
        """
        weights = weights or self.weights(x.device)
        x = x.to(weights.fc1_weight.dtype)
        dropout = self.dropout.p if self.training else 0.0
        return choose(self.kernel, x, self.fc1_weight.shape[1])(x, pairs, weights, self.activation, dropout)

    def weights(self, device: torch.device) -> ExpertWeights:
        """Prepares the parameters for one forward pass, in the autocast precision where one is set for the device."""
        parts: list[Tensor] = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(device.type):
            # Autocast does not look into custom autograd functions.
            parts = [part.to(torch.get_autocast_dtype(device.type)) for part in parts]
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parts
        return ExpertWeights.of(fc1_weight, fc1_bias, fc2_weight, fc2_bias, self.memory)

    def extra_repr(self) -> str:
        experts, hidden, dim = self.fc1_weight.shape
        return f"experts={experts}, dim={dim}, hidden={hidden}"
