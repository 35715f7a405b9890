"""Gather, both products, activation and sum of one expert after the other, in one autograd function.

Rows that an expert has just gathered or made are still in the cache when it needs them. What need not be done
expert by expert is done once for all of them: weighting and adding up their outputs, and the gradient of the
pairs' weights, ``d y / d weight = <grad, output>``. For that the outputs are kept, beside the hidden units.

The weights' gradients do not go through autograd but into `WeightGradients`, which a call of
`ExpertWeights.of` returns to it.

An expert has too few rows for a product that is cut among threads by rows. So its hidden units are cut: each
piece is one product of a batch, whose products run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..pairs import Pairs
from .activation import activate, activated
from .contract import Activation, ExpertWeights
from .gradients import WeightGradients


def fused(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs the experts that have tokens, one after the other; see `ExpertKernel`.

    Reads the group sizes back from the device once.

    Raises:
        ValueError: the group sizes do not fit the pairs or the experts.
    """
    sizes = pairs.group_sizes.tolist()
    if sum(sizes) > len(pairs.token) or len(sizes) != len(weights.fc1_weight):
        raise ValueError(
            f"{len(sizes)} groups of {sum(sizes)} rows do not fit "
            f"{len(weights.fc1_weight)} experts and {len(pairs.token)} pairs"
        )
    mask = None
    if dropout:
        mask = F.dropout(x.new_ones(sum(sizes), weights.fc1_weight.shape[1]), dropout)
    return _Fused.apply(
        x,
        pairs.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        pairs.token,
        mask,
        sizes,
        activation,
        weights.gradients,
    )


def pieces_of(x: Tensor, hidden: int) -> int:
    """Says into how many pieces the hidden units are cut."""
    pieces = torch.get_num_threads() if x.device.type == "cpu" else 1
    return pieces if hidden % pieces == 0 else 1


def _groups(sizes: Sequence[int], *stacked: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yields each expert that has rows, with its rows of every argument; unused rows belong to none."""
    used, none = sum(sizes), [None] * len(sizes)
    parts = [none if rows is None else rows[:used].split(sizes) for rows in stacked]
    for expert, (size, *here) in enumerate(zip(sizes, *parts, strict=True)):
        if size:
            yield expert, size, *here


def _add_up(pieces: Tensor, out: Tensor) -> Tensor:
    """Adds up the first dimension of (pieces, R, d) into (R, d): by additions, since ``sum`` is slow over so few."""
    if len(pieces) == 1:
        return out.copy_(pieces[0])
    torch.add(pieces[0], pieces[1], out=out)
    for piece in pieces[2:]:
        out += piece
    return out


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        token: Tensor,
        mask: Tensor | None,
        sizes: Sequence[int],
        activation: Activation,
        gradients: WeightGradients,
    ) -> Tensor:
        experts, width, dim = fc1_weight.shape
        pieces, used = pieces_of(x, width), sum(sizes)
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut).mT, fc2_weight.view(cut)
        bias1 = fc1_bias.view(experts, pieces, 1, width // pieces)
        keep = any(ctx.needs_input_grad)
        kept = gradients.buffers.empty("hidden", (used, width), x) if keep else None
        outputs = x.new_empty(used, dim)
        for expert, size, here, output, kept_rows, mask_rows in _groups(sizes, token, outputs, kept, mask):
            shape = (pieces, size, width // pieces)
            pre = x.new_empty(shape) if kept_rows is None else kept_rows.view(shape)
            torch.bmm(x.index_select(0, here).expand(pieces, size, dim), fc1[expert], out=pre)
            hidden = activate(pre.add_(bias1[expert]), activation)
            if mask_rows is not None:
                hidden = hidden * mask_rows.view(shape)
            _add_up(torch.bmm(hidden, fc2[expert]), output).add_(fc2_bias[expert])
        shared = outputs if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, shared)
        ctx.sizes, ctx.activation, ctx.gradients, ctx.pieces = sizes, activation, gradients, pieces
        factors = share[:used].to(x.dtype).unsqueeze(-1)
        weighted = outputs.mul_(factors) if shared is None else outputs * factors
        return torch.zeros_like(x).index_add_(0, token[:used], weighted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, outputs = ctx.saved_tensors
        experts, width, dim = fc1_weight.shape
        pieces, used, (needs_x, needs_share) = ctx.pieces, sum(ctx.sizes), ctx.needs_input_grad[:2]
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut), fc2_weight.view(cut).mT
        factors = share[:used].to(x.dtype).unsqueeze(-1)
        grad_rows = x.new_empty(used, dim) if needs_x else None
        parts = (token, factors, kept, mask, grad_rows)
        for expert, size, here, factor, kept_rows, mask_rows, grad_here in _groups(ctx.sizes, *parts):
            shape = (pieces, size, width // pieces)
            dropped = None if mask_rows is None else mask_rows.view(shape)
            hidden, through = activated(kept_rows.view(shape), ctx.activation, dropped)
            outer = grad.index_select(0, here).mul_(factor)
            wide = outer.expand(pieces, size, dim)
            ctx.gradients.add_product("fc2_weight", fc2_weight, expert, hidden.mT, wide)
            ctx.gradients.add_sum("fc2_bias", fc2_bias, expert, outer)
            inner = through(torch.bmm(wide, fc2[expert]))
            rows = x.index_select(0, here).expand(pieces, size, dim)
            ctx.gradients.add_product("fc1_weight", fc1_weight, expert, inner.mT, rows)
            ctx.gradients.add_sum("fc1_bias", fc1_bias, expert, inner)
            if grad_here is not None:
                _add_up(torch.bmm(inner, fc1[expert]), grad_here)
        grad_x = None if grad_rows is None else torch.zeros_like(x).index_add_(0, token[:used], grad_rows)
        grad_share = None
        if needs_share:
            grad_share = torch.zeros_like(share)
            grad_share[:used] = torch.linalg.vecdot(grad.index_select(0, token[:used]), outputs)
        return grad_x, grad_share, *[None] * 9
