"""The oracle: expert by expert in plain autograd, as one would write it first. Slow; every kernel must equal it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pairs import Pairs
from .contract import Activation, ExpertWeights


def loop(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Adds each expert's weighted output to the tokens that chose it; see `ExpertKernel`."""
    y = torch.zeros_like(x)
    start = 0
    for expert, size in enumerate(pairs.group_sizes.tolist()):
        token, share = (part[start : start + size] for part in (pairs.token, pairs.weight))
        start += size
        hidden = activation(F.linear(x[token], weights.fc1_weight[expert], weights.fc1_bias[expert]))
        out = F.linear(F.dropout(hidden, dropout), weights.fc2_weight[expert].t(), weights.fc2_bias[expert])
        y = y.index_add(0, token, out * share.to(out.dtype).unsqueeze(-1))
    return y
