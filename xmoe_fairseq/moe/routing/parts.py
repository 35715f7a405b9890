"""The router of a feed-forward network that was cut into experts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import ProbabilityRouter
from .plan import RoutingPlan
from .routers import ThresholdRouter


class PartsRouter(ThresholdRouter):
    """A token takes experts as with ``threshold``, each with weight 1: the parts of a network that `xmoe sparsify` cut.

    At threshold 1 the sum of the experts is the network's output. The choice has no gradient, so training changes the
    experts only.
    """

    paper = "MoEfication: Zhang et al. 2022, arXiv 2110.01786"
    uses: ClassVar[tuple[str, ...]] = ("threshold", *ProbabilityRouter.uses)

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        plan = super().plan(logits, padding_mask)
        # By the number of assignments: a probability that underflows to 0 is chosen at threshold 1 all the same.
        used = torch.arange(len(plan.token), device=logits.device) < plan.group_sizes.sum()
        return replace(plan, weight=used.to(plan.weight.dtype))
