"""Gather, both products, activation and sum, some experts at a time, in one autograd function.

What an expert has just made is still in the cache when it is needed, and what need not be done expert by expert
is done for a block of them: gathering and adding up rows, weighting, and the gradient of the pairs' weights,
``d y / d weight = <grad, output>``. For that the outputs are kept, beside the hidden units.

The weights' gradients do not go through autograd but into `WeightGradients`, which a call of
`ExpertWeights.of` returns to it.

An expert has too few rows for a product that is cut among threads by rows. So its hidden units are cut: each
piece is one product of a batch, whose products run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


def _pieces_of(x: Tensor, hidden: int) -> int:
    """Says into how many pieces the hidden units are cut."""
    pieces = torch.get_num_threads() if x.device.type == "cpu" else 1
    return pieces if hidden % pieces == 0 else 1


# Rows of a block, of which there may be more where one expert has more. They should fit the cache.
_ROWS = 1024


@dataclass(frozen=True)
class _Block:
    """Experts that have rows, one after the other; unused rows belong to none.

    Attributes:
        experts: their numbers.
        sizes: rows of each.
        rows: where theirs are among all rows.
    """

    experts: list[int]
    sizes: list[int]
    rows: slice

    def split(self, *stacked: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Yields each expert, its number of rows, and its rows of every argument, which holds the block's."""
        none = [None] * len(self.sizes)
        parts = [none if rows is None else rows.split(self.sizes) for rows in stacked]
        return zip(self.experts, self.sizes, *parts, strict=True)


def _blocks(sizes: Sequence[int]) -> Iterator[_Block]:
    """Puts the experts that have rows in blocks."""
    experts: list[int] = []
    start = stop = 0
    for expert, size in enumerate(sizes):
        if experts and stop - start + size > _ROWS:
            yield _Block(experts, [sizes[e] for e in experts], slice(start, stop))
            experts, start = [], stop
        if size:
            experts.append(expert)
            stop += size
    if experts:
        yield _Block(experts, [sizes[e] for e in experts], slice(start, stop))


def _part(rows: Tensor | None, block: _Block) -> Tensor | None:
    """Gives the block's rows."""
    return None if rows is None else rows[block.rows]


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
        pieces = _pieces_of(x, width)
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2, bias2 = fc1_weight.view(cut).mT.unbind(), fc2_weight.view(cut).unbind(), fc2_bias.unbind()
        bias1 = fc1_bias.view(experts, pieces, 1, width // pieces).unbind()
        keep, used = any(ctx.needs_input_grad), sum(sizes)
        kept = gradients.buffers.empty("hidden", (used, width), x) if keep else None
        outputs = gradients.buffers.empty("outputs", (used, dim), x) if ctx.needs_input_grad[1] else None
        factors = share.to(x.dtype).unsqueeze(-1)
        y = torch.zeros_like(x)
        for block in _blocks(sizes):
            inputs = x.index_select(0, token[block.rows])
            made = torch.empty_like(inputs) if outputs is None else outputs[block.rows]
            parts = (inputs, made, _part(kept, block), _part(mask, block))
            for expert, size, rows, output, kept_rows, mask_rows in block.split(*parts):
                shape = (pieces, size, width // pieces)
                pre = x.new_empty(shape) if kept_rows is None else kept_rows.view(shape)
                torch.bmm(rows.expand(pieces, size, dim), fc1[expert], out=pre)
                hidden = activate(pre.add_(bias1[expert]), activation)
                if mask_rows is not None:
                    hidden = hidden * mask_rows.view(shape)
                _add_up(torch.bmm(hidden, fc2[expert]), output).add_(bias2[expert])
            y.index_add_(0, token[block.rows], made * factors[block.rows])
        ctx.save_for_backward(x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, outputs)
        ctx.sizes, ctx.activation, ctx.gradients, ctx.pieces = sizes, activation, gradients, pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, outputs = ctx.saved_tensors
        gradients: WeightGradients = ctx.gradients
        experts, width, dim = fc1_weight.shape
        pieces, (needs_x, needs_share) = ctx.pieces, ctx.needs_input_grad[:2]
        cut = (experts, pieces, width // pieces, dim)
        fc1, fc2 = fc1_weight.view(cut), fc2_weight.view(cut)
        grad_fc1, grad_fc2 = gradients.of("fc1_weight", fc1), gradients.of("fc2_weight", fc2)
        grad_bias1 = gradients.of("fc1_bias", fc1_bias.view(cut[:3]))
        grad_bias2 = gradients.of("fc2_bias", fc2_bias)
        to_inputs, to_hidden = fc1.unbind(), fc2.mT.unbind()
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_share = torch.zeros_like(share) if needs_share else None
        factors = share.to(x.dtype).unsqueeze(-1)
        for block in _blocks(ctx.sizes):
            here = token[block.rows]
            inputs, outer = x.index_select(0, here), grad.index_select(0, here)
            if grad_share is not None:
                grad_share[block.rows] = torch.linalg.vecdot(outer, outputs[block.rows])
            outer *= factors[block.rows]
            grad_inputs = torch.empty_like(inputs) if needs_x else None
            parts = (inputs, outer, grad_inputs, kept[block.rows], _part(mask, block))
            for expert, size, rows, outer_rows, grad_rows, kept_rows, mask_rows in block.split(*parts):
                shape, whole = (pieces, size, width // pieces), (pieces, size, dim)
                dropped = None if mask_rows is None else mask_rows.view(shape)
                hidden, through = activated(kept_rows.view(shape), ctx.activation, dropped)
                wide = outer_rows.expand(whole)
                grad_fc2.add_product(expert, hidden.mT, wide)
                grad_bias2.add_sum(expert, outer_rows)
                inner = through(torch.bmm(wide, to_hidden[expert]))
                grad_fc1.add_product(expert, inner.mT, rows.expand(whole))
                grad_bias1.add_sum(expert, inner)
                if grad_rows is not None:
                    _add_up(torch.bmm(inner, to_inputs[expert]), grad_rows)
            if grad_x is not None and grad_inputs is not None:
                grad_x.index_add_(0, here, grad_inputs)
        return grad_x, grad_share, *[None] * 9
