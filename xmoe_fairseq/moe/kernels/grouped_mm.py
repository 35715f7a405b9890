"""All experts in one launch by ``torch.nn.functional.grouped_mm``, without a word from the device to the host.

Made for bf16 on GPUs from compute capability 9.0 on, where the groups' ends stay on the device; elsewhere torch
loops over the groups. Rows beyond the last group are never computed: they hold whatever was in memory, NaN
included, so they are replaced, not multiplied by zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..routing.assignments import Assignments
from .activation import activate, activated
from .contract import Activation, ExpertWeights, aligned, feed_forward, kernel

# The product wants rows of a multiple of 16 bytes: a column of ones becomes eight.
_ONES = 8


def stays_on_the_device(x: Tensor) -> bool:
    """Returns whether torch multiplies groups of ``x`` without reading their sizes back."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


# Other dtypes and older GPUs read the groups back in every product; `per_expert` does it once a layer.
@kernel(feed_forward, suits=lambda x, assignments, hidden, plain: stays_on_the_device(x) and aligned(x, hidden))
def grouped_mm(
    x: Tensor, assignments: Assignments, weights: ExpertWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """Runs all experts at once; see `ExpertKernel`.

    Raises:
        ValueError: this torch is older than ``grouped_mm``.
        RuntimeError: by torch, if d or h is no multiple of 16 bytes, or in float64.
    """
    if not hasattr(F, "grouped_mm"):
        raise ValueError(
            f"the kernel grouped_mm needs torch.nn.functional.grouped_mm, which torch {torch.__version__} does not "
            "have; choose --moe-kernel auto"
        )
    mask = None
    if dropout:
        mask = F.dropout(x.new_ones(len(assignments.token), weights.fc1_weight.shape[1]), dropout)
    return _GroupedMM.apply(
        x,
        assignments.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        assignments.token,
        assignments.group_sizes.cumsum(0).int(),
        mask,
        activation,
    )


class _GroupedMM(torch.autograd.Function):
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
        ends: Tensor,
        mask: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        expert, valid = _rows(token, ends)
        pre = F.grouped_mm(x.index_select(0, token), fc1_weight.mT, offs=ends)
        pre = (pre + fc1_bias.index_select(0, expert)).masked_fill_(~valid, 0.0)
        hidden = activate(pre, activation)
        out = F.grouped_mm(hidden if mask is None else hidden * mask, fc2_weight, offs=ends)
        out = (out + fc2_bias.index_select(0, expert)) * gate_weight.to(out.dtype).unsqueeze(-1)
        # A sum of many bf16 numbers is made in float32.
        y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        y.index_add_(0, token, out.masked_fill_(~valid, 0.0).to(y.dtype))
        ctx.save_for_backward(x, gate_weight, fc1_weight, fc2_weight, fc2_bias, token, ends, mask, pre)
        ctx.activation = activation
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, gate_weight, fc1_weight, fc2_weight, fc2_bias, token, ends, mask, pre = ctx.saved_tensors
        expert, valid = _rows(token, ends)
        hidden, through = activated(pre, ctx.activation, mask)
        outer = grad.index_select(0, token)
        inner = F.grouped_mm(outer, fc2_weight.mT, offs=ends).masked_fill_(~valid, 0.0)
        grad_share = torch.linalg.vecdot(inner.float(), hidden.float()) + torch.linalg.vecdot(
            outer.float(), fc2_bias.index_select(0, expert).float()
        )
        weight = gate_weight.to(outer.dtype).unsqueeze(-1)
        outer = outer * weight
        inner = through(inner.mul_(weight))
        ones = x.new_ones(len(token), _ONES)
        grad_fc2 = F.grouped_mm(hidden.mT, outer, offs=ends)
        grad_bias2 = F.grouped_mm(outer.mT, ones, offs=ends)[..., 0]
        grad_fc1 = F.grouped_mm(inner.mT, x.index_select(0, token), offs=ends)
        grad_bias1 = F.grouped_mm(inner.mT, ones, offs=ends)[..., 0]
        grad_x = None
        if ctx.needs_input_grad[0]:
            back = F.grouped_mm(inner, fc1_weight, offs=ends).masked_fill_(~valid, 0.0)
            wide = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            grad_x = wide.index_add_(0, token, back.to(wide.dtype)).to(x.dtype)
        grad_share = grad_share.masked_fill_(~valid.squeeze(-1), 0.0).to(gate_weight.dtype)
        return grad_x, grad_share, grad_fc1, grad_bias1, grad_fc2, grad_bias2, None, None, None, None


def _rows(token: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row's expert, (R,), and whether the row belongs to any, (R, 1)."""
    number = torch.arange(len(token), device=token.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, number, right=True)
    return expert.clamp(max=len(ends) - 1), (expert < len(ends)).unsqueeze(-1)
