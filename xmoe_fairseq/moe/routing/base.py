"""What all routers are: hidden states to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fp32_logits import fp32_linear, has_fp32_product
from .options import RouterOptions
from .plan import RoutingPlan, make_plan
from .state import PreciseBuffers
from .statistics import RouterSums
from .topk import RankedProbs, Selection, choose
from .triton_routing import plan_on_device, routes_on_device


class Router(PreciseBuffers):
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
    # The paper in a line: name, authors, year, arXiv number.
    paper: ClassVar[str] = ""
    # Options of the criterion that mean nothing for it, each with the reason.
    refuses: ClassVar[Mapping[str, str]] = {}
    # Names of its tensors that do not have a row for each expert.
    kept_whole: ClassVar[tuple[str, ...]] = ()
    # Whether statistics have the entropy of the probabilities; a criterion that weighs it sets this.
    measures_entropy: bool = False

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"a router needs at least 1 expert, not {num_experts}")
        self.check(options, num_experts)
        self.num_experts = num_experts
        self.options = options
        self.costs: Tensor | None
        self.register_buffer("costs", None, persistent=False)

    def learn_costs(self, costs: Sequence[int]) -> None:
        """Receives the FLOPs of each expert for one token, (E,), if they are different; the layer calls this."""
        relative = torch.tensor(costs, dtype=torch.float64)
        self.costs = relative / relative.mean()

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
        if "top_k" in cls.uses and not 1 <= options.top_k <= num_experts:
            raise ValueError(f"top_k {options.top_k} is outside [1, {num_experts}], the number of experts")
        if not math.isfinite(options.shift):
            raise ValueError(f"shift {options.shift} is no finite number")
        for name in ("weights", "balance"):
            choices = type(options).__dataclass_fields__[name].metadata["choices"]
            if getattr(options, name) not in choices:
                raise ValueError(f"{name} {getattr(options, name)!r} is unknown: choose from {', '.join(choices)}")

    @classmethod
    def join(cls, routers: Sequence[Any]) -> None:
        """Is told of all routers of a new model, for state that they have in common."""

    @classmethod
    def after_pruning(cls, options: RouterOptions, num_experts: int) -> dict[str, Any]:
        """Returns what the options must say if some of the E experts are left out."""
        return {}

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

    def balance_coefficient(self) -> Tensor | float | None:
        """Returns the weight of the balance loss; None for the one that the criterion is given."""
        return None

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

        A router with state that moves between updates is an `UpdateState`: it adds this up here, and moves by the sums.
        """

    def static(self, like: Tensor) -> bool:
        """Returns whether plans have a size known beforehand."""
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
        return self.product(x, self.weight)

    @staticmethod
    def product(x: Tensor, weight: Tensor) -> Tensor:
        """Multiplies x: (T, d) and weight: (E, d) to (T, E), in float32 at least."""
        if has_fp32_product(x, weight):
            return fp32_linear(x, weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Entering this costs as much as a small product, so decoding does without.
        precise = (
            torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
        )
        with precise:
            return F.linear(x.to(dtype), weight.to(dtype))

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        """Routes by given logits: (T, E); padding_mask: (T,) bool, true for padding."""
        raise NotImplementedError


class ProbabilityRouter(LinearRouter):
    """A token takes experts in the order of their probabilities ``softmax(W x)`` until `selection` stop it.

    With a capacity, an expert takes so many tokens in training, and the others go without. On a GPU the plan is made by
    Triton programs, which know of `selection` and the capacity alone: a router that chooses otherwise overrides `plan`.
    """

    uses: ClassVar[tuple[str, ...]] = ("capacity_factor", "min_capacity")

    def __init__(self, dim: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__(dim, num_experts, options)
        self._capacities: dict[tuple[int, RouterOptions], int] = {}

    @property
    def normalize(self) -> bool:
        """Whether a token's weights are divided by their sum after dropping."""
        return "weights" in self.uses and self.options.weights == "normalized"

    def load(self) -> Callable[[Tensor], Tensor] | None:
        """Returns what makes the load in the balance loss from the tokens that choose each expert, (E,), before
        capacity; None if first choices are the load."""
        if "balance" not in self.uses or self.options.balance == "first":
            return None
        costs = self.costs if self.options.balance == "cost" else None
        return (lambda chosen: chosen) if costs is None else (lambda chosen: chosen * costs)

    def selection(self) -> Selection:
        """Returns when a token takes no more experts."""
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
        plain = type(self).plan is ProbabilityRouter.plan
        if has_fp32_product(x, self.weight) and plain and self._by_programs(x.device):
            return self._plan_on_device(x, self.weight, padding_mask)
        return super().forward(x, padding_mask, tokens)

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        if logits.dtype == torch.float32 and self._by_programs(logits.device):
            return self._plan_on_device(logits, None, padding_mask)
        return self._plan_of_ranks(*self.choose(logits), padding_mask)

    def _by_programs(self, device: torch.device) -> bool:
        # The programs do not count the choices that a capacity drops.
        counted = not self.limited or self.load() is None
        return self.by_limits and counted and routes_on_device(device, self.num_experts)

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
            self.load(),
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
            self.load(),
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
        """Bounds the assignments that T tokens make, without looking at them; None if they may be all."""
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
