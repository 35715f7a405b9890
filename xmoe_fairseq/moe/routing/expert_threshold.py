"""Expert choice made causal: each expert takes the tokens above a running cut-off."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .base import LinearRouter
from .options import RouterOptions, router_option
from .plan import RoutingPlan, plan_of, real_tokens
from .state import UpdateState
from .statistics import RouterSums


@dataclass(frozen=True)
class ExpertThresholdOptions(RouterOptions):
    """Options of `ExpertThresholdRouter`.

    Attributes:
        threshold_warmup: updates in which each expert takes its best tokens of the batch.
        threshold_decay: beta, by which the mean of the cut-offs forgets in an update.
    """

    threshold_warmup: int = router_option(
        100, "expert_threshold router: updates in which each expert takes the best tokens of the batch", low=0
    )
    threshold_decay: float = router_option(
        0.99, "expert_threshold router: how much of the mean cut-off an update keeps", low=0, high=0.999999
    )


class ExpertThresholdRouter(UpdateState, LinearRouter):
    """A token takes every expert for which its score ``sigmoid(W x)``, its weight, is above a running cut-off.

    The cut-off of an expert is the score of the last of the best ``top_k / E`` of the tokens. In the first updates an
    expert takes just these (expert choice); evaluation never looks at other tokens.

    Source: Sun et al. 2026 (expert threshold), as far as its abstract says; Zhou et al. 2022 (expert choice).

    Raises:
        ValueError: an option is out of range.
    """

    Options = ExpertThresholdOptions
    uses: ClassVar[tuple[str, ...]] = ("top_k", "shift")
    paper = "expert threshold: Sun et al. 2026, arXiv 2603.11535; expert choice: Zhou et al. 2022, arXiv 2202.09368"
    dial = "shift"
    refuses: ClassVar[dict[str, str]] = {
        "moe_z_loss_coeff": "the scores have no softmax: each is a sigmoid",
        "moe_entropy_loss_coeff": "the scores have no softmax: each is a sigmoid",
    }
    options: ExpertThresholdOptions
    raw: Tensor
    threshold: Tensor
    steps: Tensor
    cuts: Tensor
    routed: Tensor
    # The number of its moves; None if the buffer knows.
    _moved: int | None = None

    def __init__(self, dim: int, num_experts: int, options: ExpertThresholdOptions) -> None:
        super().__init__(dim, num_experts, options)
        zeros, zero = torch.zeros(num_experts), torch.zeros(())
        self.register_state(raw=zeros, threshold=zeros, steps=zero, cuts=zeros, routed=zero)

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"above the experts' cut-offs, {options.top_k} on average"

    def bounds(self) -> tuple[int, int]:
        return 0, self.num_experts

    def balance_coefficient(self) -> float:
        return 0.0

    def chooses_tokens(self) -> bool:
        """Returns whether experts take their best tokens of the batch."""
        if self._moved is None:
            self._moved = int(self.steps)
        return self.training and self._moved < self.options.threshold_warmup

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        scores = logits.sigmoid()
        best = self._best(scores, padding_mask) if self.training else None
        if best is not None and self.chooses_tokens():
            order, capacity = best
            places = torch.arange(len(scores), device=scores.device).unsqueeze(-1)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, (places < capacity).expand_as(order))
        else:
            # Written so that a score that is no number reaches the output.
            chosen = ~(scores.detach() - self.options.shift <= self.threshold.to(scores.dtype))
        total = scores.detach().sum(-1, keepdim=True)
        return plan_of(
            chosen,
            scores,
            scores.detach().argmax(-1),
            padding_mask,
            partial(self._sums, chosen, scores, best),
            probs=scores.detach() / total.clamp(min=torch.finfo(total.dtype).tiny),
        )

    def _best(self, scores: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sorts the tokens for each expert: (T, E) int64, and counts how many it takes: () int64."""
        keep = real_tokens(padding_mask, scores)
        masked = scores.detach().masked_fill(~keep.unsqueeze(-1), -1.0)
        mean = keep.sum().double() * self.options.top_k / self.num_experts
        return masked.argsort(dim=0, descending=True, stable=True), mean.round().clamp(min=1).long()

    def _sums(self, chosen: Tensor, scores: Tensor, best: tuple[Tensor, Tensor] | None, keep: Tensor) -> RouterSums:
        rows, real, zero = keep.unsqueeze(-1), keep.sum(), scores.new_zeros(())
        cuts = None if best is None else self._cuts(scores, *best) * real
        return RouterSums(real, (chosen & rows).sum(0), scores.masked_fill(~rows, 0.0).sum(0), zero, zero, seen=cuts)

    @staticmethod
    def _cuts(scores: Tensor, order: Tensor, capacity: Tensor) -> Tensor:
        """Returns the score of the last token that each expert would take: (E,) float64."""
        if not len(order):
            return scores.new_zeros(scores.shape[1], dtype=torch.float64)
        last = order.index_select(0, (capacity - 1).view(1))
        return scores.detach().gather(0, last).squeeze(0).double()

    def notice(self, seen: RouterSums) -> None:
        assert seen.seen is not None
        self.cuts += seen.seen
        self.routed += seen.tokens

    def move(self) -> None:
        if not self.routed:
            return
        decay = self.options.threshold_decay
        self.steps += 1
        self.raw.mul_(decay).add_(self.cuts / self.routed * (1 - decay))
        self.threshold.copy_(self.raw / (1 - decay**self.steps))
        self.cuts.zero_()
        self.routed.zero_()
        self._moved = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._moved = None
