"""Experts with a gate on their hidden units (GLU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options import option
from .options import ExpertOptions
from .stacked import Stack, StackedExperts

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class GatedOptions(ExpertOptions):
    """Options of `GatedExperts`.

    Attributes:
        glu_activation: of the gate, of `GATES`.
    """

    glu_activation: str = option(
        "swish", "glu experts: activation of the gate, whatever --activation-fn is", choices=tuple(GATES)
    )


def gated(x: Tensor, tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], dropout: float) -> Tensor:
    """Computes ``W2^T (act(Wg x) * (W1 x))`` for x: (R, d)."""
    hidden = activation(F.linear(x, tensors["gate_weight"])) * F.linear(x, tensors["fc1_weight"])
    return F.linear(F.dropout(hidden, dropout), tensors["fc2_weight"].t())


class GatedExperts(StackedExperts):
    """E gated networks ``W2_e^T (act(Wg_e x) * (W1_e x))``, without biases.

    With 2/3 of the hidden units they are as large as feed-forward networks. The arguments are those of
    `StackedExperts`, but the gate's activation is an option.

    Source: Shazeer 2020 (GLU Variants Improve Transformer, arXiv 2002.05202), eq. 6.
    """

    Options = GatedOptions
    network = staticmethod(gated)
    paper = "GLU variants: Shazeer 2020, arXiv 2002.05202"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = GATES[self.options.glu_activation]

    @classmethod
    def check_options(cls, options: GatedOptions) -> None:
        if options.glu_activation not in GATES:
            raise ValueError(f"glu_activation {options.glu_activation!r} is unknown: choose one of {', '.join(GATES)}")

    @classmethod
    def label(cls, options: GatedOptions) -> str:
        return f"{options.glu_activation}-gated experts"

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: GatedOptions) -> dict[str, Stack]:
        return {
            "gate_weight": Stack((hidden, dim), dim),
            "fc1_weight": Stack((hidden, dim), dim),
            "fc2_weight": Stack((hidden, dim), hidden),
        }
