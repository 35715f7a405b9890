"""Routers: hidden states to a plan. A new one is a subclass of `Router` and a line in ``kinds.ROUTERS``."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from .fp32_logits import fp32_linear, has_fp32_product
from .options import RouterOptions
from .plan import RoutingPlan, assign, make_plan, real_tokens
from .statistics import RouterSums
from .topk import RankedProbs, Selection, choose
from .triton_routing import plan_on_device, routes_on_device


class Router(nn.Module):
    """Decides which experts each token takes, and with which weights.

    A router is a subclass with an entry in ``kinds.ROUTERS``. What it may be told beyond `RouterOptions` it
    declares in ``Options``; what it does is in ``forward``. Three seams save it most of the work:
    `ProbabilityRouter.selection`, where experts are taken in the order of their softmax probabilities;
    `LinearRouter.plan`, for any choice by linear scores (see `plan_of`); `Router.forward` for all else.

    Args:
        dim: d.
        num_experts: E, at least 1.
        options: an instance of the class's ``Options``.

    Raises:
        ValueError: an option is out of range.
    """

    # The dataclass of the router's options.
    Options: ClassVar[type[RouterOptions]] = RouterOptions
    # The fields of `RouterOptions` that it reads; a field of its own is always read.
    uses: ClassVar[tuple[str, ...]] = ()
    # What its models are called.
    family: ClassVar[str] = "MoE"
    # The option that trades quality for computation in a trained model; None if no option does.
    dial: ClassVar[str | None] = None
    # Whether statistics have the entropy of the probabilities; a criterion that weighs it sets this.
    measures_entropy: bool = False

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"a router needs at least 1 expert, not {num_experts}")
        self.check(options, num_experts)
        self.num_experts = num_experts
        self.options = options

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        """Refuses options that do not fit together, or not the number of experts.

        Raises:
            ValueError: names the option, its value and the values that work.
        """
        if options.capacity_factor < 0 or options.min_capacity < 0:
            raise ValueError(
                f"capacity_factor {options.capacity_factor} and min_capacity {options.min_capacity} must be at least 0"
            )

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        """Says in a few words how tokens choose, such as ``top 2``."""
        return cls.__name__

    def bounds(self) -> tuple[int, int]:
        """Returns the fewest and the most experts that a token takes in evaluation."""
        return 1, self.num_experts

    def turn(self, value: float) -> None:
        """Gives the option that `dial` names another value.

        Raises:
            ValueError: the router has no such option, or the value is out of range.
        """
        if self.dial is None:
            raise ValueError(f"{type(self).__name__} has no option that trades quality for computation")
        options = replace(self.options, **{self.dial: value})  # type: ignore[arg-type]
        self.check(options, self.num_experts)
        self.options = options

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        """Routes hidden states.

        Args:
            x: (T, d).
            padding_mask: (T,) bool, true for padding.
            tokens: (T,) int64 ids of the tokens; only a router that goes by them needs them.
        """
        raise NotImplementedError

    def notice(self, seen: RouterSums) -> None:
        """Is told, in training, what the router did with the tokens of all processes in one batch.

        A router with state that moves between updates adds this up in persistent buffers, and moves the state in
        ``set_num_updates(n)``, which fairseq calls before each batch, when n has changed: checkpoints then resume
        exactly, whatever the number of batches per update.
        """

    def static(self, like: Tensor) -> bool:
        """Tells whether plans have a size known beforehand."""
        return like.device.type != "cpu" if self.options.static is None else self.options.static

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.options}"


class LinearRouter(Router):
    """A router by linear scores ``W x``, computed in float32 whatever the model's precision.

    Its subclasses say in `plan` what follows from the scores.
    """

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        return self.plan(self.logits(x), padding_mask)

    def logits(self, x: Tensor) -> Tensor:
        """Maps x: (T, d) to (T, E), in float32 at least."""
        if has_fp32_product(x, self.weight):
            return fp32_linear(x, self.weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Entering this costs as much as a small product, so decoding does without.
        precise = (
            torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
        )
        with precise:
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes by given logits: (T, E); padding_mask: (T,) bool, true for padding."""
        raise NotImplementedError


class ProbabilityRouter(LinearRouter):
    """A token takes experts in the order of their probabilities ``softmax(W x)`` until `selection` stop it.

    With a capacity, an expert takes so many tokens in training, and the others go without. On a GPU the plan is made by
    Triton programs, which know of `selection` and the capacity alone: a router that chooses otherwise overrides `plan`.
    """

    uses: ClassVar[tuple[str, ...]] = ("capacity_factor", "min_capacity")
    # Whether a token's weights are divided by their sum after dropping.
    normalize = False

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        self._capacities: dict[tuple[int, RouterOptions], int] = {}

    def selection(self) -> Selection:
        """Says when a token takes no more experts."""
        raise NotImplementedError

    @property
    def by_limits(self) -> bool:
        """Whether `selection` alone decide; else `choose` does, without Triton."""
        return True

    def choose(self, logits: Tensor) -> tuple[RankedProbs, Tensor]:
        """Ranks the experts of logits (T, E), and says which ranks are taken; see `make_plan`."""
        return choose(logits, self.selection())

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        # A subclass may plan by logits in its own way.
        plain = self.by_limits and type(self).plan is ProbabilityRouter.plan
        if has_fp32_product(x, self.weight) and plain and routes_on_device(x.device, self.num_experts):
            return self._plan_on_device(x, self.weight, padding_mask)
        return super().forward(x, padding_mask, tokens)

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        on_device = logits.dtype == torch.float32 and routes_on_device(logits.device, self.num_experts)
        if not (on_device and self.by_limits):
            return self._plan_of_ranks(*self.choose(logits), padding_mask)
        return self._plan_on_device(logits, None, padding_mask)

    def _plan_on_device(self, x: Tensor, weight: Tensor | None, padding_mask: Tensor | None) -> RoutingPlan:
        """Routes by logits (T, E), or by x (T, d) and the router's weight."""
        capacity: Tensor | int | None = None
        if self.limited:
            capacity = self.capacity_for(len(x)) if padding_mask is None else self.capacity((~padding_mask).sum())
        return plan_on_device(
            x,
            weight,
            self.selection(),
            padding_mask,
            capacity,
            self.normalize,
            *self._plan_bounds(x),
            self.measures_entropy,
        )

    def _plan_of_ranks(self, ranked: RankedProbs, chosen: Tensor, padding_mask: Tensor | None) -> RoutingPlan:
        limit = self.capacity if self.limited else None
        return make_plan(
            ranked,
            chosen,
            padding_mask,
            limit,
            self.normalize,
            *self._plan_bounds(ranked.logits),
            self.measures_entropy,
        )

    def _plan_bounds(self, logits: Tensor) -> tuple[int | None, int | None]:
        """Bounds the assignments of the plan, where its size must be known, and those of an expert."""
        tokens = len(logits)
        return self.max_assignments(tokens) if self.static(logits) else None, self.max_per_expert(tokens)

    @property
    def limited(self) -> bool:
        """Whether experts take no more than their capacity."""
        return self.training and self.options.capacity_factor > 0

    def max_assignments(self, tokens: int) -> int | None:
        """Bounds the assignments that T tokens make, without looking at them; None where they may be all."""
        max_per_expert = self.max_per_expert(tokens)
        return None if max_per_expert is None else self.num_experts * max_per_expert

    def max_per_expert(self, tokens: int) -> int | None:
        """Bounds the assignments that an expert gets of T tokens, without looking at them; None if they may be all."""
        return min(self.capacity_for(tokens), tokens) if self.limited else None

    def capacity(self, real: Tensor) -> Tensor:
        """Returns the most tokens an expert takes, from the number of real tokens: () each."""
        mean = real.double() / self.num_experts
        return (mean * self.options.capacity_factor).ceil().clamp(min=self.options.min_capacity)

    def capacity_for(self, tokens: int) -> int:
        """As `capacity`, of a number that is known; remembered, for it takes as long as some launches."""
        key = tokens, self.options
        if key not in self._capacities:
            self._capacities[key] = int(self.capacity(torch.tensor(tokens)))
        return self._capacities[key]


class ThresholdRouter(ProbabilityRouter):
    """A token takes its most probable experts until their mass reaches the threshold, at least one.

    Weights are the raw probabilities. Source: Yang et al. 2024 (XMoE), section 3.2.

    Raises:
        ValueError: the threshold is outside [0, 1].
    """

    family = "XMoE"
    dial = "threshold"
    uses: ClassVar[tuple[str, ...]] = ("threshold", *ProbabilityRouter.uses)

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        if not 0 <= options.threshold <= 1:
            raise ValueError(f"threshold {options.threshold} is outside [0, 1]")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"threshold {options.threshold:g}"

    def bounds(self) -> tuple[int, int]:
        threshold = self.options.threshold
        return (self.num_experts if threshold == 1 else 1), (1 if threshold == 0 else self.num_experts)

    def selection(self) -> Selection:
        threshold = self.options.threshold
        # Rounding of the sum must not leave an expert out.
        return Selection(self.num_experts, None if threshold == 1 else threshold)


class TopKRouter(ProbabilityRouter):
    """A token takes its k most probable experts, weighted by their raw probabilities.

    Source: Fedus et al. 2022 (Switch, k = 1); Lepikhin et al. 2021 (GShard, k = 2).

    Raises:
        ValueError: k is below 1 or above the number of experts.
    """

    uses: ClassVar[tuple[str, ...]] = ("top_k", *ProbabilityRouter.uses)

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(options, num_experts)
        if not 1 <= options.top_k <= num_experts:
            raise ValueError(f"top_k {options.top_k} is outside [1, {num_experts}], the number of experts")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return f"top {options.top_k}"

    def bounds(self) -> tuple[int, int]:
        return self.options.top_k, self.options.top_k

    def selection(self) -> Selection:
        return Selection(self.options.top_k)

    def max_assignments(self, tokens: int) -> int | None:
        by_capacity = super().max_assignments(tokens)
        wanted = tokens * self.options.top_k
        return wanted if by_capacity is None else min(wanted, by_capacity)


class GShardRouter(TopKRouter):
    """A token takes its two most probable experts; their weights are divided by their sum after dropping.

    An expert takes at most ``capacity_factor * ceil(real tokens / E)`` tokens in training. Source: Lepikhin et
    al. 2021 (GShard), and Xu et al. 2023 (SMoE), which uses it in every stratum. With k = 1 it is `SwitchRouter`.
    """

    uses: ClassVar[tuple[str, ...]] = ("second_expert", *ProbabilityRouter.uses)
    normalize = True

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        # A last stratum may have one expert only.
        super().__init__(dim, num_experts, replace(options, top_k=min(2, num_experts)))

    @classmethod
    def check(cls, options: RouterOptions, num_experts: int) -> None:
        super().check(replace(options, top_k=1), num_experts)
        if options.second_expert not in ("gate", "sampling"):
            raise ValueError(f"second_expert {options.second_expert!r} is unknown: choose gate or sampling")

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "top 2 (GShard)"

    @property
    def by_limits(self) -> bool:
        draws = self.training and self.options.second_expert == "sampling" and self.options.top_k > 1
        return not draws

    def choose(self, logits: Tensor) -> tuple[RankedProbs, Tensor]:
        ranked, chosen = super().choose(logits)
        if self.by_limits:
            return ranked, chosen
        order = torch.cat([ranked.order[:, :1], _draw_second(ranked)], dim=-1)
        return RankedProbs(logits, ranked.probs, ranked.probs.detach().gather(1, order), order), chosen

    def capacity(self, real: Tensor) -> Tensor:
        mean = (real.double() / self.num_experts).ceil()
        return (mean * self.options.capacity_factor).ceil().clamp(min=self.options.min_capacity)


def _draw_second(ranked: RankedProbs) -> Tensor:
    """Draws one of the experts that are not a token's first choice, by probability: (T, 1) int64."""
    mass = ranked.probs.detach().scatter(1, ranked.order[:, :1], 0.0).cumsum(dim=-1)
    total = mass[:, -1:].contiguous()
    # Below the total even where the product is rounded up to it; the first choice adds no mass, so it is never met.
    drawn = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    second = torch.searchsorted(mass, drawn, right=True)
    # Where all the mass is the first choice's, there is nothing to draw by.
    return torch.where(total > 0, second, ranked.order[:, 1:2])


class SwitchRouter(GShardRouter):
    """A token takes its most probable expert, weighted by the raw probability. Source: Fedus et al. 2022 (Switch)."""

    uses: ClassVar[tuple[str, ...]] = ProbabilityRouter.uses
    normalize = False

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.options = replace(self.options, top_k=1)

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "top 1 (Switch)"


class HashRouter(Router):
    """The token's id alone decides its expert, with weight 1; nothing is learnt, dropped or balanced.

    Source: Roller et al. 2021 (Hash Layers), with a fixed random table.
    """

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "hash router"

    def bounds(self) -> tuple[int, int]:
        return 1, 1

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None) -> RoutingPlan:
        if tokens is None:
            raise ValueError("the hash router goes by token ids: give tokens")
        # Knuth's multiplicative hash, of 32 bits: neighbouring ids get unrelated experts.
        expert = ((tokens * 2654435761) % 2**32) * self.num_experts // 2**32
        weight = x.new_ones(x.shape[0], dtype=torch.float32)
        return assign(expert, weight, self.num_experts, padding_mask, len(x) if self.static(x) else None)


class BalancedRouter(LinearRouter):
    """In training every expert gets equally many tokens, by the assignment of the highest total score.

    A token's weight is the sigmoid of its logit. In evaluation a token takes its best expert, whatever the others
    take. There is no balance loss. Source: Lewis et al. 2021 (BASE layers); the assignment is SciPy's, on the CPU.
    """

    @classmethod
    def label(cls, options: RouterOptions) -> str:
        return "balanced router"

    def bounds(self) -> tuple[int, int]:
        return 1, 1

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        num_experts = logits.shape[1]
        expert = logits.argmax(-1)
        if self.training:
            keep = real_tokens(padding_mask, logits)
            expert = expert.masked_scatter(keep, balanced_assignment(logits.detach()[keep]))
        weight = logits.gather(1, expert.unsqueeze(-1)).squeeze(-1).sigmoid()
        return assign(expert, weight, num_experts, padding_mask, len(weight) if self.static(weight) else None)


def balanced_assignment(scores: Tensor) -> Tensor:
    """Assigns each row an expert, none more than ceil(T / E), so that the sum of scores is the highest possible.

    Args:
        scores: (T, E).

    Returns:
        (T,) int64.
    """
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    # Every expert stands as often as it has places.
    table = scores.double().cpu().repeat_interleave(places, dim=1).numpy()
    _, column = linear_sum_assignment(table, maximize=True)
    return torch.from_numpy(column).to(scores.device) // max(places, 1)
