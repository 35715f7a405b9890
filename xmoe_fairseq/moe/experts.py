"""Many small feed-forward networks with stacked weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import Dropout
from .exchange import Exchange
from .kernels import RELU, Buffers, ExpertWeights, choose
from .pairs import Pairs
from .parallel import ExpertGroup


class Experts(nn.Module):
    """E feed-forward networks ``W2_e^T act(W1_e x + b1_e) + b2_e``, each drawn anew: no two start equal.

    In a group of processes each holds a block of them, and the outputs of all reach every process's tokens. A backward
    pass gives an expert the sum of the gradients of all processes' losses.

    Args:
        num_experts: E.
        dim: d.
        hidden: h, of one expert.
        activation: elementwise function.
        dropout: probability of zeroing a hidden unit in training.
        kernel: of `kernels.CHOICES`.
        group: the processes that share the experts; none: this one holds all.
        exchange: of `exchange.CHOICES`.

    Raises:
        ValueError: there are fewer experts than processes.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
        kernel: str = "auto",
        group: ExpertGroup | None = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.num_experts = num_experts
        self.group = group
        self.exchange = exchange
        self.block = group.block(num_experts) if group else range(num_experts)
        held = len(self.block)
        self.fc1_weight = nn.Parameter(torch.empty(held, hidden, dim))
        self.fc1_bias = nn.Parameter(torch.empty(held, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(held, hidden, dim))
        self.fc2_bias = nn.Parameter(torch.empty(held, dim))
        self.memory = Buffers()
        self.reset_parameters()
        self._mark()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every weight and bias as ``nn.Linear`` does: uniform within 1 / sqrt(fan in).

        Draws the experts of other processes, too, so that an expert's values do not depend on who holds it.
        """
        _, hidden, dim = self.fc1_weight.shape
        for parameter, fan_in in (
            (self.fc1_weight, dim),
            (self.fc1_bias, dim),
            (self.fc2_weight, hidden),
            (self.fc2_bias, hidden),
        ):
            elsewhere = torch.empty_like(parameter[0])
            for expert in range(self.num_experts):
                values = parameter[expert - self.block.start] if expert in self.block else elsewhere
                nn.init.uniform_(values, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _mark(self) -> None:
        """Tells data parallelism which parameters other processes hold other values of.

        fairseq looks for the attribute ``expert`` and leaves such a parameter out where it averages gradients.
        """
        if self.group:
            for parameter in self.parameters(recurse=False):
                parameter.expert = self.group  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # a copy of a parameter loses its attributes

    def forward(self, x: Tensor, pairs: Pairs, weights: ExpertWeights | None = None) -> Tensor:
        """Adds up each token's weighted experts.

        Args:
            x: (T, d).
            pairs: which token goes to which expert, of all.
            weights: what `weights` gave, where the experts run several times in a forward pass.

        Returns:
            (T, d), in the autocast precision where one is set.
        """
        weights = weights or self.weights(x.device)
        x = x.to(weights.fc1_weight.dtype)
        if self.group is None or self.group.size == 1:
            return self._compute(x, pairs, weights)
        exchange = Exchange(self.group, pairs, len(x), self.exchange)
        return exchange.bring_back(self._compute(*exchange.send(x), weights))

    def _compute(self, x: Tensor, pairs: Pairs, weights: ExpertWeights) -> Tensor:
        """Runs the experts held here."""
        dropout = self.dropout.rate
        plain = self.activation in RELU and not dropout
        kernel = choose(self.kernel, x, pairs, self.fc1_weight.shape[1], plain)
        return kernel(x, pairs, weights, self.activation, dropout)

    def weights(self, device: torch.device) -> ExpertWeights:
        """Prepares the parameters for one forward pass, in the autocast precision where one is set for the device."""
        parts: list[Tensor] = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(device.type):
            # Autocast does not look into custom autograd functions.
            parts = [part.to(torch.get_autocast_dtype(device.type)) for part in parts]
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parts
        return ExpertWeights.of(fc1_weight, fc1_bias, fc2_weight, fc2_bias, self.memory)

    def extra_repr(self) -> str:
        held, hidden, dim = self.fc1_weight.shape
        experts = str(self.num_experts) if held == self.num_experts else f"{held} of {self.num_experts}"
        return f"experts={experts}, dim={dim}, hidden={hidden}"
