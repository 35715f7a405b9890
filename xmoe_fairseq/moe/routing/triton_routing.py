"""Routing on a GPU in a few Triton programs, in place of some sixty launches; the plans are those of `make_plan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import has_triton, power_of_two
from . import fp32_logits
from .places import TILE, Places
from .plan import RoutingPlan, token_routing
from .statistics import RouterSums, RoutingStats
from .topk import RankedProbs, Selection

# Probabilities that one program holds, and tokens that `triton_kernels.settle` looks at together.
_HELD, _BLOCK = 2048, 4096


def routes_on_device(device: torch.device, experts: int) -> bool:
    """Returns whether float32 logits of so many experts can be routed here."""
    # Ranks are kept in 16 bits.
    return experts < 2**15 and has_triton(device)


def plan_on_device(
    x: Tensor,
    router: Tensor | None,
    selection: Selection,
    padding_mask: Tensor | None = None,
    capacity: Tensor | int | None = None,
    normalize: bool = False,
    max_assignments: int | None = None,
    max_per_expert: int | None = None,
    measures_entropy: bool = False,
    load_of: Callable[[Tensor], Tensor] | None = None,
) -> RoutingPlan:
    """Routes by logits in float32; see `make_plan`.

    Args:
        x: the logits (T, E), or with ``router`` what they are made of by `fp32_linear`, (T, d).
        router: (E, d), the router's weight, or None.
        selection: when a token takes no more.
        padding_mask: (T,) bool, true for padding.
        capacity: () the most tokens an expert takes, or a number; None drops nothing.
        normalize: divide a token's weights by their sum after dropping.
        max_assignments: a bound of the number of assignments; None reads their number back from the device.
        max_per_expert: a bound of the assignments of one expert, if one is known.
        measures_entropy: as in `make_plan`.
        load_of: as in `make_plan`, from the choices after capacity.
    """
    rows, weight, probs_sum, squares, entropies, made = _Route.apply(
        x, router, selection, padding_mask, capacity, normalize, max_assignments, measures_entropy
    )
    experts, numbers = probs_sum.numel(), made.numbers
    load, received = numbers[:experts], partial(torch.ge, made.ranks, 0)
    ranked = RankedProbs(made.logits, made.probs, made.top.unsqueeze(-1), made.first.unsqueeze(-1))

    def count() -> RoutingStats:
        firsts = numbers[experts : 2 * experts]
        real, wanted, left, dropped = numbers[2 * experts :].unbind()
        return RoutingStats(
            tokens=real,
            wanted=wanted,
            received=left,
            passes=real,
            first_dropped=dropped,
            top1_prob=made.top_sum,
            expert_load=load,
            first_choices=firsts,
            routers=(RouterSums(real, firsts if load_of is None else load_of(load), probs_sum, squares, entropies),),
        )

    return RoutingPlan(
        token=made.token,
        weight=weight,
        group_sizes=load,
        first=made.first,
        num_tokens=len(x),
        count=count,
        trace=partial(token_routing, ranked, received, padding_mask),
        rows=None if router is None else rows,
        max_per_expert=max_per_expert,
        places=made.places,
    )


class _Made(NamedTuple):
    """What routing makes beside what has gradients; see `choices`.

    Attributes:
        logits: (T, E).
        probs: (T, E).
        ranks: (T, E) int16.
        first: (T,) int64.
        top: (T,) probability of the first choice.
        token: as in `Assignments`.
        numbers: (2 E + 4,) int64, as `triton_kernels.settle` writes them.
        top_sum: () sum of ``top`` over the real tokens.
        places: as in `Assignments`.
    """

    logits: Tensor
    probs: Tensor
    ranks: Tensor
    first: Tensor
    top: Tensor
    token: Tensor
    numbers: Tensor
    top_sum: Tensor
    places: Places


class _Route(torch.autograd.Function):
    """From logits (T, E) the assignments' weights, the sums of the statistics, and what tells of them; see `choices`.

    With the router's weight, x is its input. It is handed on, so that its gradient by the experts comes here, and the
    router's is added in the product that makes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor | None,
        selection: Selection,
        padding_mask: Tensor | None,
        capacity: Tensor | int | None,
        normalize: bool,
        max_assignments: int | None,
        measures_entropy: bool,
    ) -> tuple[Any, ...]:
        from . import triton_kernels

        logits = x.contiguous() if router is None else fp32_logits.product(x, router.t())
        tokens, experts = logits.shape
        span = power_of_two(experts)
        rows = max(_HELD // span, 1)
        blocks = -(-tokens // rows)
        probs, top = torch.empty_like(logits), logits.new_empty(tokens)
        ranks, log_sums = torch.empty_like(logits, dtype=torch.int16), torch.empty_like(top)
        first = logits.new_empty(tokens, dtype=torch.long)
        counts = logits.new_empty(2 * experts + 1, blocks, dtype=torch.int32)
        parts = logits.new_empty(experts + 3, blocks)
        # Without tokens no program writes them.
        make = torch.Tensor.new_empty if blocks else torch.Tensor.new_zeros
        numbers, sums = make(first, 2 * experts + 4), make(logits, experts + 3)
        mass = max(selection.top_p or 0.0, torch.finfo(torch.float32).tiny)
        padded, rest = padding_mask is not None, (tokens, experts, blocks)
        triton_kernels.take[(blocks,)](
            logits, probs, padding_mask, ranks, first, top, log_sums, counts, parts, numbers, *rest, mass,
            selection.max_experts, padded, selection.top_p is not None, measures_entropy, span, rows,
        )  # fmt: skip
        ends = counts.new_empty(experts, blocks)
        triton_kernels.settle[(blocks and experts,)](
            probs, ranks, counts, parts, ends, numbers, sums, capacity, *rest,
            capacity is not None, isinstance(capacity, Tensor), measures_entropy, rows, _BLOCK, num_warps=8,
        )  # fmt: skip
        total = numbers[2 * experts + 2]
        if max_assignments is None:
            max_assignments = int(total) if blocks else 0
        token, weight = first.new_empty(max_assignments), logits.new_empty(max_assignments)
        places = Places.empty(max_assignments, experts, tokens, ranks)
        triton_kernels.assignments[(blocks and blocks + experts + -(-max_assignments // (span * rows)),)](
            probs, ranks, ends, total, token, weight, *places.tables, places.offsets, places.of_token,
            max_assignments, *rest, normalize, span, rows, TILE,
        )  # fmt: skip
        ctx.save_for_backward(probs, ranks, ends, padding_mask, log_sums, *(() if router is None else (x, router)))
        ctx.rest = rest, (normalize, span, rows)
        handed = x.view_as(x)
        if router is None or not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(handed)
        ctx.set_materialize_grads(False)
        made = _Made(logits.detach(), probs, ranks, first, top, token, numbers, sums[experts], places)
        return handed, weight, sums[:experts], sums[experts + 1], sums[experts + 2], made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from . import triton_kernels

        probs, ranks, ends, padding_mask, log_sums, *linear = ctx.saved_tensors
        of_rows, *others = (None if grad is None else grad.contiguous() for grad in grads[:5])
        x, router = linear or (probs, None)
        numbers, options = ctx.rest
        parts, held = 2 if linear else 1, options[1] * options[2]
        grad = x.new_empty(len(probs), parts * probs.shape[1])
        twice = None if router is None else router.new_empty(2 * len(router), router.shape[1])
        size = 0 if router is None else router.numel()
        triton_kernels.gradient[(numbers[2] + -(-size // held),)](
            probs, ranks, ends, padding_mask, log_sums, *others, grad, router, twice, *numbers, size,
            padding_mask is not None, *(other is not None for other in others), parts, *options,
        )  # fmt: skip
        if twice is None or router is None:
            return grad, *[None] * 7
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, twice) if of_rows is None else torch.addmm(of_rows, grad, twice)
        return grad_x, fp32_logits.weight_gradient(grad, x, router), *[None] * 6
