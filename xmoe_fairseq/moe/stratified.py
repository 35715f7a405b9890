"""The stratified mixture of experts (SMoE): a token passes as many strata of experts as it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .experts.stacked import ExpertSet
from .layer import flat
from .routing.assignments import Assignments
from .routing.base import Router
from .routing.plan import RoutingPlan, real_tokens
from .routing.statistics import RoutingStats, TokenRouting, add_up, merge


@dataclass(frozen=True)
class StratifiedPlan:
    """What the strata did in one call.

    Attributes:
        plans: one a stratum, over the tokens that entered it.
        passes: (T,) int64, the strata each token was computed in (its requested capacity); 0 for padding.
        count: makes `stats`.
        trace: makes `token_routing`.
    """

    plans: list[RoutingPlan]
    passes: Tensor
    count: Callable[[], RoutingStats]
    trace: Callable[[], TokenRouting]

    @cached_property
    def stats(self) -> RoutingStats:
        """Sums over all strata, made when they are first asked for."""
        return self.count()

    @cached_property
    def token_routing(self) -> TokenRouting:
        """What all strata did with each token, made when it is first asked for."""
        return self.trace()


class StratifiedMoE(nn.Module):
    """A block of L strata of experts, its LayerNorms and residual connections included.

    A token enters stratum 1. In stratum i, ``x' = LayerNorm_i(x)`` is routed among the experts of this and all later
    strata, ``x <- x + sum_e G_e FFN_e(x')``, and the token goes on to the stratum after that of its first choice;
    after the last stratum it leaves. Only the tokens of a stratum are computed there.

    Source: Xu et al. 2023 (SMoE), section 3 and eq. 7. The authors' released code differs: from stratum 2 on its
    residual is the normalised x, and a token that leaves is normalised once more (``released``).

    Args:
        routers: one a stratum; router i over the experts of the strata i..L.
        experts: all of them, in the order of the strata.
        sizes: experts in each stratum.
        released: compute what the authors' code computes.
        regularizer: applied to the output of each stratum, such as `ExpertOutputMasking`.

    Raises:
        ValueError: routers, sizes and experts do not fit together.
    """

    def __init__(
        self,
        routers: Sequence[Router],
        experts: ExpertSet,
        sizes: Sequence[int],
        released: bool = False,
        regularizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        total, dim = experts.num_experts, experts.dim
        if len(routers) != len(sizes) or sum(sizes) != total or min(sizes) < 1:
            raise ValueError(f"strata of {list(sizes)} experts and {len(routers)} routers do not fit {total} experts")
        self.routers = nn.ModuleList(routers)
        self.experts = experts
        self.sizes = tuple(sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in sizes)
        self.exit_norm = nn.LayerNorm(dim) if released else None
        self.regularizer = regularizer or nn.Identity()
        self.stratum: Tensor  # of each expert
        self.register_buffer(
            "stratum", torch.repeat_interleave(torch.tensor(self.sizes), output_size=total), persistent=False
        )

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, StratifiedPlan]:
        """Computes what the block adds to x; the caller adds it.

        Args:
            x: (..., d), not normalised.
            padding_mask: (...) bool, true for padding; such rows are not routed and come out as zeros.
            tokens: (...) int64 ids of the tokens; only the hash router needs them.

        Returns:
            (..., d), and what the strata did over the flattened rows.
        """
        start = x.reshape(-1, x.shape[-1])
        ids = flat(tokens)
        keep = real_tokens(flat(padding_mask), start)
        # The stratum each token enters next; past the last one for padding.
        place = torch.where(keep, 0, len(self.sizes))
        passes = torch.zeros_like(place)
        state, plans, entered = start, [], []
        weights = self.experts.weights(start.device)
        static = cast(Router, self.routers[0]).static(start)
        for number, (router, norm) in enumerate(zip(self.routers, self.norms, strict=True)):
            inside = place == number
            # On a GPU all tokens are normalised and routed, those outside as padding: to list the others would
            # take a number back from the device. In the first stratum, nothing but padding is outside.
            rows = None if static or number == 0 else inside.nonzero().squeeze(-1)
            entering = state
            if rows is not None:
                entering, state = _GatherRows.apply(state, rows)
            normed = norm(entering)
            plan = router(normed, ~inside if rows is None else None, _select(ids, rows))
            taken = normed if plan.rows is None else plan.rows
            y = self._compute(taken, plan, sum(self.sizes[:number]), weights)
            plans.append(plan)
            entered.append(rows)
            residual = normed if self.exit_norm is not None and number > 0 else entering
            leaving = self.stratum[plan.first + sum(self.sizes[:number])] + 1
            passed = (residual + y).to(state.dtype)
            if rows is not None:
                state = _ScatterRows.apply(state, rows, passed)
                place = place.index_copy(0, rows, leaving)
            else:
                # What the first stratum adds to padding is 0.
                state = torch.where(inside.unsqueeze(-1), passed, state) if number else passed
                place = torch.where(inside, leaving, place)
            passes = passes + inside
        if self.exit_norm is not None:
            state = torch.where(keep.unsqueeze(-1), self.exit_norm(state), state)
        count = partial(self._statistics, plans, keep)
        trace = partial(self._token_routing, plans, entered, len(start))
        return (state - start).reshape(x.shape), StratifiedPlan(plans, passes, count, trace)

    def _compute(self, normed: Tensor, plan: RoutingPlan, hidden_experts: int, weights: Any) -> Tensor:
        """Runs the visible experts, those of earlier strata having no rows."""
        sizes = torch.cat([plan.group_sizes.new_zeros(hidden_experts), plan.group_sizes])
        places = plan.places and plan.places.after(hidden_experts)
        assignments = Assignments(plan.token, plan.weight, sizes, max_per_expert=plan.max_per_expert, places=places)
        return self.regularizer(self.experts(normed, assignments, weights))

    def _statistics(self, plans: Sequence[RoutingPlan], keep: Tensor) -> RoutingStats:
        def visible_from_the_end(loads: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(load, (sum(self.sizes) - len(load), 0)) for load in loads]).sum(0)

        return merge([plan.stats for plan in plans], visible_from_the_end, keep.sum())

    def _token_routing(
        self, plans: Sequence[RoutingPlan], entered: Sequence[Tensor | None], tokens: int
    ) -> TokenRouting:
        """Adds up the strata; entered: the rows that each plan is about, None for all."""

        def over_tokens(rows: Tensor | None, values: Tensor) -> Tensor:
            return values if rows is None else values.new_zeros(tokens, *values.shape[1:]).index_copy(0, rows, values)

        parts = [plan.token_routing.map(partial(over_tokens, rows)) for plan, rows in zip(plans, entered, strict=True)]
        total = sum(self.sizes)
        visible = [F.pad(part.taken, (total - part.taken.shape[1], 0)) for part in parts]
        return add_up(parts, torch.stack(visible).sum(0))


class _GatherRows(torch.autograd.Function):
    """Gives the rows of a state that enter a stratum, and the state itself for `_ScatterRows` of the same rows.

    Between the two, autograd would make a gradient of the state's size for each, fill it with zeros, and add them.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return state.index_select(0, rows), state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        entering, rest = grads
        return rest.index_copy(0, rows, entering), None


class _ScatterRows(torch.autograd.Function):
    """Puts what has passed a stratum in the place of the rows that entered it."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, rows: Tensor, passed: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return state.index_copy(0, rows, passed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        (rows,) = ctx.saved_tensors
        (grad,) = grads
        # At these rows it is not the state's: `_GatherRows` writes over it there.
        return grad, None, grad.index_select(0, rows)


def _select(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return values if values is None or rows is None else values.index_select(0, rows)
