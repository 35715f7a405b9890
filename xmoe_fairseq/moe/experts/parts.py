"""The experts that a feed-forward network was cut into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import ExpertWeights
from .stacked import Experts, Stack


class Parts(Experts):
    """Experts ``W2_e^T act(W1_e x + b1_e)`` without an output bias of their own; the layer has one (`SharedBias`)."""

    paper = "MoEfication: Zhang et al. 2022, arXiv 2110.01786"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.no_bias: Tensor
        self.register_buffer("no_bias", torch.zeros(len(self.block), self.dim), persistent=False)

    @classmethod
    def label(cls, options: Any) -> str:
        return "parts"

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: Any) -> dict[str, Stack]:
        stacks = super().tensors(dim, hidden, options)
        return {name: stack for name, stack in stacks.items() if name != "fc2_bias"}

    def prepare(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        return super().prepare({**tensors, "fc2_bias": self.no_bias.to(tensors["fc2_weight"].dtype)})
