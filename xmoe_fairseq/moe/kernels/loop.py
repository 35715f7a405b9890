"""The reference: expert by expert in plain autograd, as one would write it first. Every kernel must equal it.

It is also what computes experts that no other kernel knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs
from .contract import Activation, StackedWeights, kernel


@kernel(suits=lambda *_: True)
def loop(x: Tensor, pairs: Pairs, weights: StackedWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Adds each expert's weighted output to the tokens that chose it; see `ExpertKernel`."""
    sizes = pairs.group_sizes.tolist()
    token, share = pairs.token[: sum(sizes)], pairs.weight[: sum(sizes)]
    inputs = x.index_select(0, token).split(sizes)
    outputs = torch.cat(
        [
            weights.network(rows, tensors, activation, dropout)
            for rows, tensors in zip(inputs, weights.of_each(), strict=True)
        ]
    )
    return torch.zeros_like(x).index_add(0, token, outputs * share.to(outputs.dtype).unsqueeze(-1))
