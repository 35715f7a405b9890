"""Routing on a GPU in a few Triton programs, in place of some sixty launches; the plans are those of `make_plan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import precise
from .kernels import has_triton, power_of_two
from .places import TILE, Places
from .ranking import Limits, RankedProbs
from .routing import RoutingPlan, planned

# Probabilities that one program holds, and tokens that `choices.limit` looks at together.
_HELD, _BLOCK = 2048, 4096


def routes_on_device(device: torch.device, experts: int) -> bool:
    """Says whether float32 logits of so many experts can be routed here."""
    # Ranks are kept in 16 bits.
    return experts < 2**15 and has_triton(device)


def plan_on_device(
    x: Tensor,
    router: Tensor | None,
    limits: Limits,
    padding_mask: Tensor | None = None,
    capacity: Tensor | int | None = None,
    normalize: bool = False,
    most: int | None = None,
    most_each: int | None = None,
    measures_entropy: bool = False,
) -> RoutingPlan:
    """Routes by logits in float32; see `make_plan`.

    Args:
        x: the logits (T, E), or with ``router`` what they are made of by `precise_linear`, (T, d).
        router: (E, d), the router's weight, or None.
        limits: when a token takes no more.
        padding_mask: (T,) bool, true for padding.
        capacity: () the most tokens an expert takes, or a number; none drops nothing.
        normalize: divide a token's weights by their sum after dropping.
        most: a bound of the number of pairs; none reads their number back from the device.
        most_each: a bound of the pairs of one expert, if one is known.
        measures_entropy: as in `make_plan`.
    """
    rows, logits, probs, token, weight, sizes, ranks, counts, first, top, places = _Route.apply(
        x, router, limits, padding_mask, capacity, normalize, most
    )
    ranked = RankedProbs(logits, probs, top.unsqueeze(-1), first.unsqueeze(-1))
    received = partial(torch.ge, ranks, 0)
    return planned(
        token, weight, sizes, ranked, received, counts, padding_mask, most_each, measures_entropy, places,
        None if router is None else rows,
    )  # fmt: skip


class _Route(torch.autograd.Function):
    """From logits (T, E) the probabilities, the pairs, and what tells of them; see `choices`.

    With the router's weight, x is its input. It is handed on, so that its gradient by the experts comes here, and the
    router's is added in the product that makes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor | None,
        limits: Limits,
        padding_mask: Tensor | None,
        capacity: Tensor | int | None,
        normalize: bool,
        most: int | None,
    ) -> tuple[Any, ...]:
        from . import choices

        logits = x.contiguous() if router is None else precise.product(x, router.t())
        tokens, experts = logits.shape
        span = power_of_two(experts)
        rows = max(_HELD // span, 1)
        blocks = -(-tokens // rows)
        probs, top = torch.empty_like(logits), logits.new_empty(tokens)
        ranks = torch.empty_like(logits, dtype=torch.int16)
        first = logits.new_empty(tokens, dtype=torch.long)
        counts, ends = logits.new_empty(2, experts, blocks, dtype=torch.int32)
        total = counts.new_empty(())
        mass = max(limits.mass or 0.0, torch.finfo(torch.float32).tiny)
        choices.take[(blocks,)](
            logits, probs, padding_mask, ranks, first, top, counts, total, tokens, experts, blocks, mass, limits.number,
            padding_mask is not None, limits.mass is not None, span, rows,
        )  # fmt: skip
        choices.settle[(blocks and experts,)](
            probs, ranks, counts, ends, total, capacity, tokens, experts, blocks,
            capacity is not None, isinstance(capacity, Tensor), rows, _BLOCK, num_warps=8,
        )  # fmt: skip
        if most is None:
            most = int(total) if blocks else 0
        token, weight = first.new_empty(most), logits.new_empty(most)
        sizes = first.new_empty(experts) if blocks else first.new_zeros(experts)
        places = Places.empty(most, experts, tokens, ranks)
        rest = (tokens, experts, blocks)
        choices.pairs[(blocks and blocks + experts + -(-most // (span * rows)),)](
            probs, ranks, ends, total, token, weight, sizes, *places.tables, places.offsets, places.of_token,
            most, *rest, normalize, span, rows, TILE,
        )  # fmt: skip
        ctx.save_for_backward(probs, ranks, ends, *(() if router is None else (x, router)))
        ctx.rest = rest, (normalize, span, rows)
        handed = x.view_as(x)
        unused = (handed,) if router is None or not ctx.needs_input_grad[0] else ()
        ctx.mark_non_differentiable(token, sizes, ranks, counts, first, top, *unused)
        ctx.set_materialize_grads(False)
        return handed, logits, probs, token, weight, sizes, ranks, counts, first, top, places

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from . import choices

        probs, ranks, ends, *linear = ctx.saved_tensors
        of_rows, of_logits, of_probs, _, of_weight = (None if grad is None else grad.contiguous() for grad in grads[:5])
        numbers, options = ctx.rest
        x, router = linear or (probs, None)
        parts, held = 2 if linear else 1, options[1] * options[2]
        grad = x.new_empty(len(probs), parts * probs.shape[1])
        twice = None if router is None else router.new_empty(2 * len(router), router.shape[1])
        size = 0 if router is None else router.numel()
        choices.gradient[(numbers[2] + -(-size // held),)](
            probs, ranks, ends, of_weight, of_probs, of_logits, grad, router, twice, *numbers, size,
            of_weight is not None, of_probs is not None, of_logits is not None, parts, *options,
        )  # fmt: skip
        if router is None:
            return grad, *[None] * 6
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, twice) if of_rows is None else torch.addmm(of_rows, grad, twice)
        return grad_x, precise.weight_gradient(grad, x, router), *[None] * 5
