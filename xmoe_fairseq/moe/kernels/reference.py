"""The reference: expert by expert in plain autograd, as one would write it first. Every kernel must equal it.

It is also what computes experts that no other kernel knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..routing.assignments import Assignments
from .contract import Activation, StackedWeights, kernel


@kernel(suits=lambda *_: True)
def reference(
    x: Tensor, assignments: Assignments, weights: StackedWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """Adds each expert's weighted output to the tokens that chose it; see `ExpertKernel`."""
    sizes = assignments.group_sizes.tolist()
    token, gate_weight = assignments.token[: sum(sizes)], assignments.weight[: sum(sizes)]
    inputs = x.index_select(0, token).split(sizes)
    outputs = torch.cat(
        [
            weights.network(rows, tensors, activation, dropout)
            for rows, tensors in zip(inputs, weights.of_each(), strict=True)
        ]
    )
    return torch.zeros_like(x).index_add(0, token, outputs * gate_weight.to(outputs.dtype).unsqueeze(-1))
