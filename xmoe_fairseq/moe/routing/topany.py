"""DynMoE: each expert has a threshold of its own, and experts come and go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import LinearRouter
from .options import RouterOptions, router_option
from .plan import RoutingPlan, plan_of
from .state import UpdateState
from .statistics import RouterSums

_TINY = 1e-12


@dataclass(frozen=True)
class TopAnyOptions(RouterOptions):
    """Options of `TopAnyRouter`.

    Attributes:
        any_scale: tau, what cosines and thresholds are multiplied with before the sigmoid.
        any_start: experts active in the first update; 0 for all.
        any_adapt: updates between two adaptations of the experts; 0 for none.
        any_experts: experts per token that the thresholds begin with, about; 0 for thresholds of 0, as published.
        any_loss_coeff: weight of the diversity and simplicity losses.
    """

    any_scale: float = router_option(
        1.0, "topany router: scale of the cosines before the sigmoid, which sets the size of gradients", low=1e-6
    )
    any_start: int = router_option(0, "topany router: experts that are active at first; 0 for all", low=0)
    any_adapt: int = router_option(
        0, "topany router: updates after which unused experts go and one comes if tokens found none; 0 for never", low=0
    )
    any_experts: float = router_option(
        0.0,
        "topany router: experts per token that the thresholds begin with, about; 0 for thresholds of 0, as published, "
        "by which a token takes half of the experts",
        low=0,
    )
    any_loss_coeff: float = router_option(
        0.01, "topany router: weight of the losses for different and for short rows of its weight", low=0
    )


class TopAnyRouter(UpdateState, LinearRouter):
    """A token takes every expert whose cosine with it is above that expert's threshold, all with the same weight.

    In training a token without such an expert takes none; in evaluation it takes the one of the highest cosine. The
    gradient passes straight through the choice, to the chosen experts' scores and thresholds.

    With ``any_adapt``, experts that no token took since the last adaptation become inactive, and if tokens took none,
    one inactive expert becomes active, in the direction of these tokens.

    Source: Guo et al. 2025 (DynMoE), section 3, and its code.

    Raises:
        ValueError: an option is out of range.
    """

    Options = TopAnyOptions
    uses: ClassVar[tuple[str, ...]] = ("shift",)
    family = "DynMoE"
    paper = "DynMoE: Guo et al. 2025, arXiv 2405.14297"
    dial = "shift"
    kept_whole: ClassVar[tuple[str, ...]] = ("idle_sum",)
    refuses: ClassVar[dict[str, str]] = {
        "moe_z_loss_coeff": "the scores are cosines, which are bounded",
        "moe_entropy_loss_coeff": "every chosen expert has the same weight",
    }
    options: TopAnyOptions
    active: Tensor
    record: Tensor
    idle_sum: Tensor
    recorded: Tensor

    def __init__(self, dim: int, num_experts: int, options: TopAnyOptions) -> None:
        super().__init__(dim, num_experts, options)
        nn.init.orthogonal_(self.weight)
        wanted = options.any_experts
        start = NormalDist().inv_cdf(1 - wanted / num_experts) / math.sqrt(dim) if wanted else 0.0
        self.thresholds = nn.Parameter(torch.full((num_experts,), start))
        first = options.any_start or num_experts
        self.register_state(
            active=torch.arange(num_experts) < first,
            record=torch.zeros(num_experts),
            idle_sum=torch.zeros(dim),
            recorded=torch.zeros(()),
        )

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        assert isinstance(options, TopAnyOptions)
        if not 0 <= options.any_start <= num_experts:
            raise ValueError(f"any_start {options.any_start} is outside [0, {num_experts}], the number of experts")
        if not 0 <= options.any_experts < num_experts:
            raise ValueError(
                f"any_experts {options.any_experts:g} is outside [0, {num_experts}), the number of experts"
            )
        if not 0 < options.any_scale < math.inf:
            raise ValueError(f"any_scale {options.any_scale} must be a number above 0")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "any number by cosine"

    @classmethod
    def after_pruning(cls, options: RouterOptions, num_experts: int) -> dict[str, Any]:
        return {"any_start": 0, "any_experts": 0.0}

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        return self._plan(self.logits(x), padding_mask, x.detach() if self.training else None)

    def logits(self, x: Tensor) -> Tensor:
        """Maps x: (T, d) to cosines (T, E), in float32 at least."""
        dots = super().logits(x)
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dots.dtype).clamp(min=_TINY)
        return dots / lengths / self._lengths(dots.dtype).clamp(min=_TINY)

    def _lengths(self, dtype: torch.dtype) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=-1, dtype=dtype)

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes by given cosines: (T, E); padding_mask: (T,) bool, true for padding."""
        return self._plan(logits, padding_mask, None)

    def _plan(self, cosines: Tensor, padding_mask: Tensor | None, x: Tensor | None) -> RoutingPlan:
        active = self.active > 0.5
        thresholds = self.thresholds.to(cosines.dtype) + self.options.shift
        # Written so that a cosine that is no number reaches the output.
        chosen = ~(cosines.detach() <= thresholds.detach()) & active
        scores = (self.options.any_scale * cosines).sigmoid()
        shares = scores.detach().masked_fill(~active, 0.0)
        first = shares.argmax(-1)
        if not self.training:
            without = ~chosen.any(-1, keepdim=True)
            chosen = chosen | (without & F.one_hot(first, self.num_experts).bool())
        above = scores - (self.options.any_scale * thresholds).sigmoid()
        weights = (above - above.detach() + 1) / chosen.sum(-1, keepdim=True).clamp(min=1)
        return plan_of(
            chosen,
            weights,
            first,
            padding_mask,
            partial(self._sums, chosen, weights, x),
            probs=shares / shares.sum(-1, keepdim=True).clamp(min=_TINY),
        )

    def _sums(self, chosen: Tensor, weights: Tensor, x: Tensor | None, keep: Tensor) -> RouterSums:
        """Makes sums over the tokens that took an expert."""
        took = keep & chosen.any(-1)
        chosen = chosen & took.unsqueeze(-1)
        number, zero = took.sum(), weights.new_zeros(())
        seen = None
        if x is not None and self.options.any_adapt:
            seen = x.double().masked_fill(~(keep & ~took).unsqueeze(-1), 0.0).sum(0)
        return RouterSums(
            number,
            chosen.sum(0),
            weights.masked_fill(~chosen, 0.0).sum(0),
            zero,
            zero,
            own=self.options.any_loss_coeff * sum(self.losses()) * number if self.options.any_loss_coeff else None,
            seen=seen,
        )

    def losses(self) -> tuple[Tensor, Tensor]:
        """Computes the diversity loss, of the cosines between the active experts' rows, and the simplicity loss, the
        mean length of all rows: () each."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        lengths, active = self._lengths(dtype), self.active.to(dtype)
        rows = self.weight.to(dtype) / lengths.clamp(min=_TINY).unsqueeze(-1)
        others = rows @ rows.t() - torch.eye(len(rows), dtype=dtype, device=rows.device)
        return torch.linalg.vector_norm(others * torch.outer(active, active)), lengths.mean()

    def notice(self, seen: RouterSums) -> None:
        if self.options.any_adapt:
            assert seen.seen is not None
            self.record += seen.load
            self.idle_sum += seen.seen

    def move(self) -> None:
        self.recorded += 1
        if self.options.any_adapt and int(self.recorded) >= self.options.any_adapt:
            self.adapt()

    def adapt(self) -> None:
        """Removes the experts that no token took, and adds one if tokens took none."""
        idle = bool(self.idle_sum.any())
        if idle or bool(self.record.any()):
            self.active *= self.record > 0
            missing = (self.active < 0.5).nonzero()
            if idle and len(missing):
                expert = int(missing[0])
                self.active[expert] = 1
                self.weight[expert] = (self.idle_sum / self.idle_sum.norm()).to(self.weight.dtype)
                self.thresholds[expert] = 0
        for total in (self.record, self.idle_sum, self.recorded):
            total.zero_()
