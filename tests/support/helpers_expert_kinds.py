"""Kinds of experts, and layers of them, beside loops over the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers_routing import sharpen
from helpers_toy_expert import MaxoutExperts, MaxoutOptions
from torch import Tensor

from xmoe_fairseq.moe import (
    ExpertOptions,
    Experts,
    ExpertSet,
    GatedExperts,
    MoELayer,
    RouterOptions,
    SizedExperts,
    StackedExperts,
    ThresholdRouter,
)
from xmoe_fairseq.moe.experts.gated import GatedOptions

DIM, HIDDEN, NUMBER = 6, 8, 5
SIZES = (4, 4, 8, 12, 12)
Network = Callable[[StackedExperts, int, Tensor], Tensor]


def naive_ffn(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    return torch.tanh(e.fc1_weight[i] @ x + e.fc1_bias[i]) @ e.fc2_weight[i] + e.fc2_bias[i]


def naive_glu(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    gate = e.gate_weight[i] @ x
    return (gate * torch.sigmoid(gate) * (e.fc1_weight[i] @ x)) @ e.fc2_weight[i]


def naive_maxout(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    pieces = [e.in_weight[i, p] @ x + e.in_bias[i].view(len(e.in_weight[i]), -1)[p] for p in range(e.options.pieces)]
    return torch.stack(pieces).max(0).values @ e.out_weight[i]


KINDS: dict[str, tuple[type[StackedExperts], Network, Any]] = {
    "ffn": (Experts, naive_ffn, ExpertOptions()),
    "glu": (GatedExperts, naive_glu, GatedOptions()),
    "maxout": (MaxoutExperts, naive_maxout, MaxoutOptions(pieces=3)),
}


def parts_of(experts: ExpertSet) -> list[tuple[StackedExperts, int]]:
    """Each expert: where it is stacked, and its number there."""
    parts = experts.parts if isinstance(experts, SizedExperts) else [experts]
    return [(part, number) for part in parts for number in range(part.num_experts)]


def make(kind: str, sizes: tuple[int, ...] | None = None) -> ExpertSet:
    cls, _, options = KINDS[kind]
    torch.manual_seed(0)
    if sizes is not None:
        return SizedExperts(cls, sizes, DIM, activation=torch.tanh, options=options).double()
    return cls(NUMBER, DIM, HIDDEN, torch.tanh, options=options).double()


def make_layer(kind: str, sizes: tuple[int, ...] | None = None) -> MoELayer:
    layer = MoELayer(ThresholdRouter(DIM, NUMBER, RouterOptions(threshold=0.7)), make(kind, sizes)).double()
    sharpen(layer)
    return layer


def by_loops(layer: MoELayer, x: Tensor, padding: Tensor, network: Network) -> tuple[Tensor, int, int]:
    """The output, the pairs and the hidden units of all real tokens, token by token."""
    experts, rows, pairs, units = parts_of(layer.experts), [], 0, 0
    for token, hidden in enumerate(x):
        y = torch.zeros_like(hidden)
        probs = torch.softmax(layer.router.weight @ hidden, -1)
        mass = 0.0
        for i in probs.argsort(descending=True).tolist() if not padding[token] else []:
            y = y + probs[i] * network(*experts[i], hidden)
            pairs, units = pairs + 1, units + experts[i][0].hidden
            mass += float(probs[i])
            if mass >= layer.router.options.threshold:
                break
        rows.append(y)
    return torch.stack(rows), pairs, units
