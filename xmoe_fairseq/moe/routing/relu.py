"""ReMoE: routing by ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import LinearRouter, Router
from .options import RouterOptions, router_option
from .plan import RoutingPlan, plan_of
from .state import UpdateState
from .statistics import RouterSums

# Bounds of the coefficient, beyond which it would need as many updates to come back.
_LEAST, _MOST = 1e-30, 1e30


@dataclass(frozen=True)
class ReluOptions(RouterOptions):
    """Options of `ReluRouter`.

    Attributes:
        relu_start: coefficient of the penalty in the first update.
        relu_step: factor by which the coefficient grows or shrinks in each update.
    """

    relu_start: float = router_option(
        1e-8, "relu router: coefficient of the penalty on the weights in the first update", low=1e-30, high=1e30
    )
    relu_step: float = router_option(
        1.2, "relu router: factor by which the coefficient grows or shrinks in each update", low=1.0001, high=1000
    )


class ReluRouter(LinearRouter):
    """A token takes every expert of a positive score, weighted by that score; it may take none.

    A penalty on the weights has a coefficient that grows while tokens take more than ``top_k`` experts on average, and
    shrinks while they take fewer. All layers share it: they settle at different numbers of experts.

    Source: Wang et al. 2025 (ReMoE), sections 3 and 4.

    Raises:
        ValueError: an option is out of range.
    """

    Options = ReluOptions
    uses: ClassVar[tuple[str, ...]] = ("top_k", "shift")
    family = "ReMoE"
    paper = "ReMoE: Wang et al. 2025, arXiv 2412.14711"
    dial = "shift"
    refuses: ClassVar[dict[str, str]] = {
        "moe_z_loss_coeff": "the scores have no softmax; its own penalty keeps them small",
        "moe_entropy_loss_coeff": "the scores have no softmax; its own penalty sets the number of experts",
    }
    options: ReluOptions

    def __init__(self, dim: int, num_experts: int, options: ReluOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.penalty = Penalty(options.relu_start, options.relu_step)

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"ReLU for {options.top_k} on average"

    @classmethod
    def join(cls, routers: Sequence[Router]) -> None:
        for router in routers[1:]:
            router.penalty = routers[0].penalty

    def bounds(self) -> tuple[int, int]:
        return 0, self.num_experts

    def balance_coefficient(self) -> Tensor:
        return self.penalty.coefficient

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        scores = (logits - self.options.shift).relu()
        # Written so that a score that is no number reaches the output.
        chosen = ~(scores <= 0)
        total = scores.detach().sum(-1, keepdim=True)
        return plan_of(
            chosen,
            scores,
            logits.argmax(-1),
            padding_mask,
            partial(self._sums, chosen, scores),
            probs=scores.detach() / total.masked_fill(total == 0, 1.0),
        )

    def _sums(self, chosen: Tensor, scores: Tensor, keep: Tensor) -> RouterSums:
        """Makes the sums by which the balance loss is ReMoE's penalty ``E / (k n^2) sum_e count_e sum_t r_te``."""
        rows = keep.unsqueeze(-1)
        load, zero = (chosen & rows).sum(0), scores.new_zeros(())
        return RouterSums(
            keep.sum(),
            load.double() / self.options.top_k,
            scores.masked_fill(~rows, 0.0).sum(0),
            zero,
            zero,
            seen=load.sum(),
        )

    def notice(self, seen: RouterSums) -> None:
        assert seen.seen is not None
        self.penalty.notice(taken=seen.seen, wanted=seen.tokens * self.options.top_k)


class Penalty(UpdateState):
    """The coefficient of the penalty, one for all layers of a model."""

    coefficient: Tensor
    taken: Tensor
    wanted: Tensor

    def __init__(self, start: float, step: float) -> None:
        super().__init__()
        self.step = step
        zero = torch.zeros(())
        self.register_state(coefficient=torch.tensor(start, dtype=torch.float64), taken=zero, wanted=zero)

    def notice(self, taken: Tensor, wanted: Tensor) -> None:
        """Adds assignments of one layer in one batch, and how many are wanted: () each."""
        self.taken += taken
        self.wanted += wanted

    def move(self) -> None:
        factor = torch.where(self.taken > self.wanted, self.step, 1 / self.step)
        # Without tokens there is nothing to go by.
        self.coefficient *= torch.where(self.wanted > 0, factor, 1.0)
        self.coefficient.clamp_(_LEAST, _MOST)
        self.taken.zero_()
        self.wanted.zero_()

    def extra_repr(self) -> Any:
        return f"step={self.step}"
