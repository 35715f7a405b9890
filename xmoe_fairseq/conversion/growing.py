"""The experts that a dense feed-forward network becomes: copies of it, or slices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The stacked tensors of experts by name, each as the parts of the experts in their order.
Parts = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Network:
    """The feed-forward network ``W2 act(W1 x + b1) + b2``.

    Attributes:
        fc1_weight: (H, d).
        fc1_bias: (H,).
        fc2_weight: (d, H).
        fc2_bias: (d,).
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def louder(self, factor: float) -> Network:
        """Returns the network whose output is so many times as large, computed in float32 at least."""
        if factor == 1:
            return self
        return Network(self.fc1_weight, self.fc1_bias, *(factor * precise(one) for one in self._second))

    @property
    def _second(self) -> tuple[Tensor, Tensor]:
        return self.fc2_weight, self.fc2_bias


def precise(tensor: Tensor) -> Tensor:
    """Converts numbers to float32 if they are less precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def copies(network: Network, experts: int) -> Parts:
    """Makes every expert the network; the parts of a tensor share their memory.

    Args:
        network: H hidden units.
        experts: E.
    """
    return {
        "fc1_weight": [network.fc1_weight] * experts,
        "fc1_bias": [network.fc1_bias] * experts,
        "fc2_weight": [network.fc2_weight.t()] * experts,
        "fc2_bias": [network.fc2_bias] * experts,
    }


def slices(network: Network, experts: int, groups: int, relu: bool) -> Parts:
    """Makes expert ``n G + g`` slice g of copy n; the parts of the copies share their memory.

    Experts of one slice, chosen with weights that add up to 1/G, give the slice's share in the network's output; so
    the slices are G times as loud. With ReLU, which is homogeneous, both matrices are scaled by sqrt(G).

    Args:
        network: H hidden units.
        experts: E = G N.
        groups: G, a divisor of H and of E.
        relu: whether the activation is ReLU.

    Source: He et al. 2024 (arXiv 2410.07524), virtual groups and weight scaling.
    """
    first, second = (math.sqrt(groups),) * 2 if relu else (1.0, float(groups))
    hidden = len(network.fc1_bias) // groups
    parts = {
        "fc1_weight": list((first * precise(network.fc1_weight)).split(hidden)),
        "fc1_bias": list((first * precise(network.fc1_bias)).split(hidden)),
        "fc2_weight": list((second * precise(network.fc2_weight)).t().split(hidden)),
        "fc2_bias": [network.fc2_bias] * groups,
    }
    return {name: tensors * (experts // groups) for name, tensors in parts.items()}


def keeps_precision(groups: int, relu: bool) -> bool:
    """Whether scaled slices are exact in the network's own precision: factors that are powers of two."""
    factor = math.sqrt(groups) if relu else float(groups)
    return factor.is_integer() and int(factor).bit_count() == 1


def router_rows(rows: Tensor, groups: int) -> Tensor:
    """Gives all slices of a copy its row: (N, d) becomes (G N, d)."""
    return rows.repeat_interleave(groups, dim=0)
