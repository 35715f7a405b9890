"""One feed-forward network that all experts share, and an adapter of each (PESC)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dropout import Dropout
from ..kernels import StackedWeights
from ..options import option
from ..routing.assignments import Assignments
from .options import ExpertOptions
from .stacked import Experts


@dataclass(frozen=True)
class AdapterOptions(ExpertOptions):
    """Options of `AdapterExperts`.

    Attributes:
        adapter_dim: r, hidden units of an adapter.
        adapter_scale: s, a factor of all adapters' outputs.
        adapter_dropout: probability of zeroing a number of an adapter's input in training.
    """

    adapter_dim: int = option(64, "adapter experts: hidden units of an adapter", low=1)
    adapter_scale: float = option(1.0, "adapter experts: factor of the adapters' outputs", low=0, high=1000)
    adapter_dropout: float = option(0.1, "adapter experts: dropout of the adapters' input", low=0, high=1)


class SharedNetwork(nn.Module):
    """The feed-forward network ``W2 act(W1 x + b1) + b2``.

    Args:
        dim: d.
        hidden: H.
        activation: elementwise function.
        dropout: probability of zeroing a hidden unit in training.
    """

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor], dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = activation
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, d)"""
        return self.fc2(self.dropout(self.activation(self.fc1(x))))


class AdapterExperts(Experts):
    """E adapters on the output of one network: ``u + s sum_e w_e (U_e gelu(D_e u + a_e) + b_e)``, ``u = FFN(x)``.

    U and the biases are 0 at the start, so that the output is the network's, whatever the router does. The router sees
    x. With weights that add up to 1 this is PESC; tokens that no expert takes keep the network's output.

    The arguments are those of `StackedExperts`; ``hidden``, ``activation`` and ``dropout`` are the network's.

    Source: Wu et al. 2024 (PESC, arXiv 2401.02731), eq. 7 to 9; adapters without biases there.
    """

    Options = AdapterOptions
    paper = "PESC: Wu et al. 2024, arXiv 2401.02731"
    shares_network = True

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
        *args: Any,
        options: AdapterOptions | None = None,
        **kwargs: Any,
    ) -> None:
        options = options or AdapterOptions()
        super().__init__(num_experts, dim, options.adapter_dim, F.gelu, 0.0, *args, options=options, **kwargs)
        self.shared = SharedNetwork(dim, hidden, activation, dropout)
        self.input_dropout = Dropout(options.adapter_dropout)

    @classmethod
    def check_options(cls, options: AdapterOptions) -> None:
        if options.expert_sizes:
            raise ValueError(f"expert_sizes {options.expert_sizes} does not work with adapters: leave it out")

    @classmethod
    def label(cls, options: AdapterOptions) -> str:
        return "adapters"

    @classmethod
    def own_hidden(cls, hidden: int, options: AdapterOptions) -> int:
        return options.adapter_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("fc1_bias", "fc2_weight", "fc2_bias"):
            nn.init.zeros_(self.get_parameter(name))

    def forward(self, x: Tensor, assignments: Assignments, weights: StackedWeights | None = None) -> Tensor:
        shared = self.shared(x)
        adapted = super().forward(self.input_dropout(shared), assignments, weights)
        return shared + self.options.adapter_scale * adapted
