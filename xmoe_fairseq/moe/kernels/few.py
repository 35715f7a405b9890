"""For decoding: with so few rows an expert, reading its weights is the work, and what is called around it counts.

So there are as few calls as can be, and products are not cut: an expert's whole matrix is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pairs import Pairs
from .activation import activate
from .contract import Activation, ExpertWeights
from .fused import fused


def few(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs the experts that have tokens; see `ExpertKernel`. Where gradients are recorded, this is `fused`."""
    if torch.is_grad_enabled():
        return fused(x, pairs, weights, activation, dropout)
    sizes = pairs.group_sizes.tolist()
    active = [expert for expert, size in enumerate(sizes) if size]
    counts = [sizes[expert] for expert in active]
    used = sum(counts)
    token, share = pairs.token[:used], pairs.weight[:used]
    inputs = x.index_select(0, token)
    hidden, outputs = x.new_empty(used, weights.fc1_bias.shape[1]), torch.empty_like(inputs)
    made = hidden.split_with_sizes(counts)
    for expert, rows, out in zip(active, inputs.split_with_sizes(counts), made, strict=True):
        torch.addmm(weights.fc1_bias[expert], rows, weights.fc1_weight[expert].t(), out=out)
    hidden = activate(hidden, activation)
    if dropout:
        hidden = F.dropout(hidden, dropout)
    made = outputs.split_with_sizes(counts)
    for expert, rows, out in zip(active, hidden.split_with_sizes(counts), made, strict=True):
        torch.addmm(weights.fc2_bias[expert], rows, weights.fc2_weight[expert], out=out)
    outputs.mul_(share.to(x.dtype).unsqueeze(-1))
    return torch.zeros_like(x).index_add_(0, token, outputs)
