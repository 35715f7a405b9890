"""For decoding: with so few rows per expert, reading its weights is the work, and what is called around it counts.

So there are as few calls as can be, and products are not cut: an expert's whole matrix is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing.assignments import Assignments
from .activation import activate
from .contract import Activation, ExpertWeights, feed_forward, kernel
from .per_expert import per_expert

# Up to so many rows per expert on average this is faster than `per_expert`; measured with 64 experts of two sizes, with
# AVX2 and AVX-512.
DECODE_ROWS = 12


def _scattered(x: Tensor, assignments: Assignments, hidden: int, plain: bool) -> bool:
    return len(assignments.token) <= DECODE_ROWS * len(assignments.group_sizes) and not torch.is_grad_enabled()


@kernel(feed_forward, suits=_scattered)
def decode(
    x: Tensor, assignments: Assignments, weights: ExpertWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """Runs the experts that have tokens; see `ExpertKernel`. If gradients are recorded, this is `per_expert`."""
    if torch.is_grad_enabled():
        return per_expert(x, assignments, weights, activation, dropout)
    sizes = assignments.group_sizes.tolist()
    active = [expert for expert, size in enumerate(sizes) if size]
    counts = [sizes[expert] for expert in active]
    used = sum(counts)
    token, gate_weight = assignments.token[:used], assignments.weight[:used]
    expert = torch.repeat_interleave(assignments.group_sizes, output_size=used)
    inputs = x.index_select(0, token)
    # Products are added to biases that are there: `addmm` would copy them expert by expert.
    hidden = weights.fc1_bias.index_select(0, expert)
    _add_products(hidden, inputs, weights.fc1_weight.mT, active, counts)
    hidden = activate(hidden, activation)
    if dropout:
        hidden = F.dropout(hidden, dropout)
    outputs = weights.fc2_bias.index_select(0, expert)
    _add_products(outputs, hidden, weights.fc2_weight, active, counts)
    outputs.mul_(gate_weight.to(x.dtype).unsqueeze(-1))
    return torch.zeros_like(x).index_add_(0, token, outputs)


def _add_products(sums: Tensor, rows: Tensor, matrices: Tensor, active: list[int], counts: list[int]) -> None:
    """Adds to (R, m) rows (R, n) times matrices (E, n, m) of the active experts, which have so many rows each."""
    for expert, part, total in zip(active, rows.split_with_sizes(counts), sums.split_with_sizes(counts), strict=True):
        total.addmm_(part, matrices[expert])
