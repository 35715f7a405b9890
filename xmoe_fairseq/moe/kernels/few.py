"""For decoding: so few rows an expert that a call costs as much as its product, so calls are few.

Only the two products are made expert by expert; everything else is done once, over all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs
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
    for e, rows, made in zip(active, inputs.split(counts), hidden.split(counts), strict=True):
        torch.addmm(weights.fc1_bias[e], rows, weights.fc1_weight[e].t(), out=made)
    hidden = torch.nn.functional.dropout(activation(hidden), dropout)
    for e, rows, made in zip(active, hidden.split(counts), outputs.split(counts), strict=True):
        torch.mm(rows, weights.fc2_weight[e], out=made)
    expert = torch.repeat_interleave(pairs.group_sizes, output_size=used)
    outputs.add_(weights.fc2_bias.index_select(0, expert)).mul_(share.to(x.dtype).unsqueeze(-1))
    return torch.zeros_like(x).index_add_(0, token, outputs)
