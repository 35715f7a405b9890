"""For decoding: so few rows an expert that a call costs as much as its product, so calls are few.

Only the two products are made expert by expert; everything else is done once, over all rows.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..pairs import Pairs
from .contract import Activation, ExpertWeights
from .fused import fused, pieces_of


def few(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs the experts that have tokens; see `ExpertKernel`. Where gradients are recorded, this is `fused`."""
    if torch.is_grad_enabled():
        return fused(x, pairs, weights, activation, dropout)
    sizes = pairs.group_sizes.tolist()
    active = [(e, end - size, size) for e, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)) if size]
    used = sum(sizes)
    token, share = pairs.token[:used], pairs.weight[:used]
    experts, width, dim = weights.fc1_weight.shape
    pieces = pieces_of(x, width)
    cut = (experts, pieces, width // pieces, dim)
    fc1, fc2 = weights.fc1_weight.view(cut).mT, weights.fc2_weight.view(cut)
    bias1 = weights.fc1_bias.view(experts, pieces, 1, width // pieces)
    # Each expert's rows hold its pieces one after the other: (pieces, rows, ...).
    inputs, hidden, partial = x.index_select(0, token), x.new_empty(used, width), x.new_empty(used * pieces, dim)
    for e, start, size in active:
        rows = inputs.narrow(0, start, size).expand(pieces, size, dim)
        out = hidden.narrow(0, start, size).view(pieces, size, width // pieces)
        torch.baddbmm(bias1[e], rows, fc1[e], out=out)
    hidden = torch.nn.functional.dropout(activation(hidden), dropout)
    for e, start, size in active:
        out = partial.narrow(0, start * pieces, size * pieces).view(pieces, size, dim)
        torch.bmm(hidden.narrow(0, start, size).view(pieces, size, width // pieces), fc2[e], out=out)
    expert = torch.repeat_interleave(pairs.group_sizes, output_size=used)
    summed = partial.index_select(0, _places(expert, pairs.group_sizes, pieces)).view(pieces, used, dim).sum(0)
    summed.add_(weights.fc2_bias.index_select(0, expert)).mul_(share.to(x.dtype).unsqueeze(-1))
    return torch.zeros_like(x).index_add_(0, token, summed)


def _places(expert: Tensor, group_sizes: Tensor, pieces: int) -> Tensor:
    """Says where the pieces of each row lie: (pieces * R,), all first pieces first."""
    size = group_sizes.index_select(0, expert)
    start = (group_sizes.cumsum(0) - group_sizes).index_select(0, expert)
    first = start * (pieces - 1) + torch.arange(len(expert), device=expert.device)
    return (first + size * torch.arange(pieces, device=expert.device).unsqueeze(-1)).reshape(-1)
