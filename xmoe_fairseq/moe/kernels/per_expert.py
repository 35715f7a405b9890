"""Gather, both products, activation and weighted sum, in one autograd function.

What an expert has just made is still in the cache when it is needed. On a CPU experts run side by side; the rows that
they leave are weighted and added up afterwards, token by token. Outputs are kept, beside the hidden units, for the
gradient of the assignments' weights, ``d y / d weight = <grad, output>``.

The weights' gradients do not go through autograd but into `WeightGradients`, so that several uses of
the weights have one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..routing.assignments import Assignments
from .activation import activate, activated
from .contract import NAMES, Activation, ExpertWeights, feed_forward, kernel
from .thread_pool import parallel_for_experts
from .weight_gradients import WeightGradients


@kernel(feed_forward, suits=lambda *_: True)
def per_expert(
    x: Tensor, assignments: Assignments, weights: ExpertWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """Runs the experts that have tokens; see `ExpertKernel`.

    Reads the group sizes back from the device once.

    Raises:
        ValueError: the group sizes do not fit the assignments or the experts.
    """
    sizes = assignments.group_sizes.tolist()
    if sum(sizes) > len(assignments.token) or len(sizes) != len(weights.fc1_weight):
        raise ValueError(
            f"{len(sizes)} groups of {sum(sizes)} rows do not fit "
            f"{len(weights.fc1_weight)} experts and {len(assignments.token)} assignments"
        )
    mask = None
    if dropout:
        mask = F.dropout(x.new_ones(sum(sizes), weights.fc1_weight.shape[1]), dropout)
    return _PerExpert.apply(
        x,
        assignments.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        assignments.token,
        mask,
        sizes,
        activation,
        weights.gradients,
    )


class _Sums:
    """Adds up the rows of assignments for each token, in the order of the assignments.

    Args:
        token: (R,) int64, the token of each assignment.
        tokens: T.
    """

    def __init__(self, token: Tensor, tokens: int) -> None:
        in_order, self.assignments = token.sort(stable=True)
        self.starts = torch.searchsorted(in_order, torch.arange(tokens + 1, device=token.device))

    def __call__(self, rows: Tensor, gate_weight: Tensor | None = None) -> Tensor:
        """Gives (T, d) of rows, (R, d), each times its gate weight, (R,), if there are any."""
        factors = None if gate_weight is None else gate_weight.index_select(0, self.assignments)
        return F.embedding_bag(
            self.assignments, rows, self.starts, mode="sum", per_sample_weights=factors, include_last_offset=True
        )


def _split(sizes: Sequence[int], *stacked: Tensor | None) -> list[tuple[Any, ...]]:
    """Returns each expert's rows of every argument; the last rows may be nobody's."""
    none, used = [None] * len(sizes), sum(sizes)
    parts = [none if rows is None else rows[:used].split_with_sizes(sizes) for rows in stacked]
    return list(zip(*parts, strict=True))


class _PerExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
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
        keep, used, empty = any(ctx.needs_input_grad), sum(sizes), gradients.buffers.empty
        kept = empty("hidden", (used, fc1_weight.shape[1]), x) if keep else None
        outputs = empty("outputs", (used, x.shape[1]), x)
        fc1, fc2, bias1, bias2 = fc1_weight.mT.unbind(), fc2_weight.unbind(), fc1_bias.unbind(), fc2_bias.unbind()
        parts = _split(sizes, token, kept, mask, outputs)

        def work(expert: int) -> None:
            here, kept_rows, mask_rows, output = parts[expert]
            pre = torch.addmm(bias1[expert], x.index_select(0, here), fc1[expert], out=kept_rows)
            hidden = activate(pre, activation)
            if mask_rows is not None:
                hidden = hidden * mask_rows
            torch.addmm(bias2[expert], hidden, fc2[expert], out=output)

        parallel_for_experts(work, sizes, x.device)
        sums = _Sums(token[:used], len(x))
        ctx.save_for_backward(x, gate_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, outputs)
        ctx.sizes, ctx.activation, ctx.gradients, ctx.sums = sizes, activation, gradients, sums
        return sums(outputs, gate_weight[:used].to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, gate_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, token, mask, kept, outputs = ctx.saved_tensors
        gradients: WeightGradients = ctx.gradients
        sizes, activation, (needs_x, needs_share) = ctx.sizes, ctx.activation, ctx.needs_input_grad[:2]
        grad_fc1, grad_fc2 = gradients.of("fc1_weight", fc1_weight), gradients.of("fc2_weight", fc2_weight)
        grad_bias1, grad_bias2 = gradients.of("fc1_bias", fc1_bias), gradients.of("fc2_bias", fc2_bias)
        to_inputs, to_hidden = fc1_weight.unbind(), fc2_weight.mT.unbind()
        grad_share = torch.zeros_like(gate_weight) if needs_share else None
        grad_rows = gradients.buffers.empty("inputs", tuple(outputs.shape), x) if needs_x else None
        parts = _split(sizes, token, gate_weight.to(x.dtype).unsqueeze(-1), kept, mask, outputs, grad_share, grad_rows)

        def work(expert: int) -> None:
            here, factor, kept_rows, mask_rows, output, grad_factor, grad_inputs = parts[expert]
            inputs, outer = x.index_select(0, here), grad.index_select(0, here)
            if grad_factor is not None:
                grad_factor.copy_(torch.linalg.vecdot(outer, output))
            outer *= factor
            hidden, through = activated(kept_rows, activation, mask_rows)
            grad_fc2.add_product(expert, hidden.t(), outer)
            grad_bias2.add_sum(expert, outer)
            inner = through(torch.mm(outer, to_hidden[expert]))
            grad_fc1.add_product(expert, inner.t(), inputs)
            grad_bias1.add_sum(expert, inner)
            if grad_inputs is not None:
                torch.mm(inner, to_inputs[expert], out=grad_inputs)

        parallel_for_experts(work, sizes, x.device)
        named = dict(zip(NAMES, (fc1_weight, fc1_bias, fc2_weight, fc2_bias), strict=True))
        grad_x = None if grad_rows is None else ctx.sums(grad_rows)
        return grad_x, grad_share, *gradients.returned(named), *[None] * 5
