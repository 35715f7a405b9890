"""A kind of experts as a newcomer would add it: this file, and a line in ``moe/experts/kinds.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from xmoe_fairseq.moe.experts.options import ExpertOptions
from xmoe_fairseq.moe.experts.stacked import Stack, StackedExperts
from xmoe_fairseq.moe.options import option


@dataclass(frozen=True)
class MaxoutOptions(ExpertOptions):
    """Options of `MaxoutExperts`."""

    pieces: int = option(2, "maxout experts: linear pieces of a hidden unit", low=1, high=8)


def maxout(x: Tensor, tensors: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor], dropout: float) -> Tensor:
    """Computes ``W2^T max_p(W1_p x + b1_p)`` for x: (R, d)."""
    pieces, hidden, _ = tensors["in_weight"].shape
    values = F.linear(x, tensors["in_weight"].flatten(0, 1), tensors["in_bias"])
    active = values.unflatten(-1, (pieces, hidden)).amax(-2)
    return F.linear(F.dropout(active, dropout), tensors["out_weight"].t())


class MaxoutExperts(StackedExperts):
    """E maxout networks. Source: Goodfellow et al. 2013."""

    Options = MaxoutOptions
    network = staticmethod(maxout)

    @classmethod
    def label(cls, options: MaxoutOptions) -> str:
        return f"maxout experts ({options.pieces} pieces)"

    @classmethod
    def check_options(cls, options: MaxoutOptions) -> None:
        if options.pieces == 7:
            raise ValueError("pieces 7 is an unlucky number: choose 6 or 8")

    @classmethod
    def tensors(cls, dim: int, hidden: int, options: MaxoutOptions) -> dict[str, Stack]:
        return {
            "in_weight": Stack((options.pieces, hidden, dim), dim),
            "in_bias": Stack((options.pieces * hidden,), dim),
            "out_weight": Stack((hidden, dim), hidden),
        }
