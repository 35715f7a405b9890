"""All experts at once by Triton programs that gather, add the bias, activate and sum up where they multiply.

Nothing is written that is not needed: no gathered copy of the input, no hidden units before their activation. The
programs find on the device which rows they have, so the host never waits.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..pairs import Pairs
from .activation import RELU
from .contract import Activation, ExpertWeights
from .fused import fused
from .gradients import WeightGradients
from .grouped_mm import stays_on_the_device

# Rows, columns and depth of a tile, warps, stages of loading; programs a processor that go on from tile to tile, or
# 0 for one a tile. Measured on an H100.
_PRODUCT = (128, 128, 64, 4, 3, 2)
_GRADIENT = (128, 128, 64, 4, 3)
_ROWS = 1024


@cache
def installed() -> bool:
    """Says whether Triton is there: it comes with torch's builds for GPUs."""
    return importlib.util.find_spec("triton") is not None


def runs_on(x: Tensor) -> bool:
    """Says whether this is made for the device and dtype of ``x``."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device)[0] >= 8
        and installed()
    )


def tiled(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs all experts at once; see `ExpertKernel`. With dropout or another activation than ReLU, this is `fused`.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    if dropout or activation not in RELU:
        return fused(x, pairs, weights, activation, dropout)
    y: Tensor = _Tiled.apply(
        x,
        pairs.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        pairs.token,
        pairs.group_sizes,
        weights.gradients,
    )
    return y


class _Rows:
    """The rows of a call, as the programs need them.

    Args:
        token: (R,) int64.
        group_sizes: (E,) int64.
        tokens: T.
    """

    def __init__(self, token: Tensor, group_sizes: Tensor, tokens: int) -> None:
        from . import tiles

        experts, count = len(group_sizes), len(token)
        self.token, self.count, self.experts = token, count, experts
        self.span = _power_of_two(experts)
        self.tiles = -(-count // _PRODUCT[0]) + experts
        parts = (experts + 1, experts + 1, self.tiles, self.tiles)
        numbers = token.new_empty(sum(parts), dtype=torch.int32)
        self.starts, self.tile_starts, self.tile_expert, self.tile_row = numbers.split(parts)
        self.schedule = (self.starts, self.tile_starts, self.tile_expert, self.tile_row, experts)
        tiles.schedule[(experts + 1,)](group_sizes, *self.schedule, self.span, _PRODUCT[0])
        self.total = self.starts[experts:]
        counts = token.new_zeros(2 * tokens + 1, dtype=torch.int32)
        blocks = (-(-count // _ROWS),)
        tiles.count[blocks](token, self.total, counts, _ROWS)
        self.offsets = counts[: tokens + 1].cumsum(0, dtype=torch.int32)
        self.of_token = token.new_empty(count, dtype=torch.int32)
        tiles.list_rows[blocks](token, self.total, self.offsets, counts[tokens + 1 :], self.of_token, _ROWS)

    def multiply(
        self,
        a: Tensor,
        w: Tensor,
        *,
        transposed: bool = False,
        bias: Tensor | None = None,
        relu: bool = False,
        kept: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Gives each row of ``a`` times its expert's matrix, (R, n); see `tiles.multiply`.

        Args:
            a: (R, k).
            w: (E, k, n), or (E, n, k) where ``transposed``.
            transposed: what ``w`` is.
            bias: (E, n) to add.
            relu: whether negative values become 0.
            kept: (R, n), where it is 0 the result is.
            sums: (tiles, n), overwritten by the sum of the rows of each tile.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from . import tiles

        inner, width = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
        out = a.new_empty(self.count, width)
        rows, columns, depth, warps, stages, flat = _PRODUCT
        columns, depth = min(columns, max(_power_of_two(width), 32)), min(depth, max(_power_of_two(inner), 16))
        block = [1, columns, depth] if transposed else [1, depth, columns]
        programs = self.tiles * -(-width // columns)
        if flat:
            programs = min(programs, flat * _processors(a.device))
        tiles.multiply[(programs,)](
            TensorDescriptor.from_tensor(a, [rows, depth]),
            TensorDescriptor.from_tensor(w, block),
            bias,
            None if kept is None else TensorDescriptor.from_tensor(kept, [rows, columns // 2]),
            out, sums, *self.schedule, width, inner, transposed, bias is not None, relu, kept is not None,
            sums is not None, flat > 0, rows, columns, depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def weight_gradient(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """Writes each expert's ``a^T b``, (E, m, n); see `tiles.weight_gradient`.

        Args:
            a: (R, m).
            b: (R, n).
            out: (E, m, n).
            add: whether to add to what is there, else it is overwritten.
        """
        from . import tiles

        height, width = out.shape[1:]
        up, columns, depth, warps, stages = _GRADIENT
        up, columns = min(up, max(_power_of_two(height), 16)), min(columns, max(_power_of_two(width), 16))
        grid = (self.experts * -(-height // up) * -(-width // columns),)
        tiles.weight_gradient[grid](
            a, b, out, self.starts, height, width, add, up, columns, depth, num_warps=warps, num_stages=stages
        )

    def gather(self, x: Tensor) -> Tensor:
        """Copies each row's token from x (T, d): (R, d)."""
        from . import tiles

        out = x.new_empty(self.count, x.shape[1])
        tiles.gather[(-(-self.count // 16), -(-x.shape[1] // 256))](x, self.token, out, self.total, x.shape[1], 16, 256)
        return out

    def sums(self, width: int) -> Tensor:
        """Makes room for the sums of the rows of each tile."""
        return self.token.new_empty(self.tiles, width, dtype=torch.float32)

    def add_up(self, sums: Tensor, out: Tensor, add: bool) -> None:
        """Adds up sums (tiles, n) over the tiles of each expert, (E, n), and over what is there if ``add``."""
        from . import tiles

        width = out.shape[1]
        tiles.add_up[(self.experts, -(-width // 256))](sums, out, self.tile_starts, width, add, 256)

    def combine(self, values: Tensor, share: Tensor | None, tokens: int) -> Tensor:
        """Adds up the rows (R, d) of each token, times their share (R,): (T, d)."""
        from . import tiles

        y = values.new_empty(tokens, values.shape[1])
        columns = min(_power_of_two(values.shape[1]), 1024)
        grid = (tokens, -(-values.shape[1] // columns))
        tiles.combine[grid](
            values, share, self.offsets, self.of_token, y, values.shape[1], self.span, columns, share is not None
        )
        return y

    def spread(self, grad: Tensor, values: Tensor, share: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `combine`, (R, d) and (R,); overwrites ``sums`` (tiles, d) by those of the first."""
        from . import tiles

        outer, grad_share = torch.empty_like(values), torch.zeros_like(share)
        tiles.spread[(self.tiles,)](
            grad, self.token, values, share, outer, grad_share, sums, *self.schedule, values.shape[1], _PRODUCT[0], 64
        )
        return outer, grad_share


class _Tiled(torch.autograd.Function):
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
        group_sizes: Tensor,
        gradients: WeightGradients,
    ) -> Tensor:
        x, share = x.contiguous(), share.contiguous()
        if not len(token):
            ctx.rows = None
            ctx.save_for_backward(x, share)
            return torch.zeros_like(x)
        rows = _Rows(token, group_sizes, len(x))
        gathered = rows.gather(x)
        hidden = rows.multiply(gathered, fc1_weight, transposed=True, bias=fc1_bias, relu=True)
        values = rows.multiply(hidden, fc2_weight, bias=fc2_bias)
        ctx.save_for_backward(gathered, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden, values)
        ctx.rows, ctx.tokens, ctx.gradients = rows, len(x), gradients
        return rows.combine(values, share, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.rows is None:
            x, share = ctx.saved_tensors
            return torch.zeros_like(x), torch.zeros_like(share), *[None] * 7
        gathered, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden, values = ctx.saved_tensors
        rows: _Rows = ctx.rows
        gradients: WeightGradients = ctx.gradients
        sums = rows.sums(values.shape[1])
        outer, grad_share = rows.spread(grads[0].contiguous(), values, share, sums)
        rows.add_up(sums, *gradients.whole("fc2_bias", fc2_bias))
        _add_gradient(rows, gradients, "fc2_weight", fc2_weight, hidden, outer)
        sums = rows.sums(hidden.shape[1])
        inner = rows.multiply(outer, fc2_weight, transposed=True, kept=hidden, sums=sums)
        rows.add_up(sums, *gradients.whole("fc1_bias", fc1_bias))
        _add_gradient(rows, gradients, "fc1_weight", fc1_weight, inner, gathered)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = rows.combine(rows.multiply(inner, fc1_weight), None, ctx.tokens)
        return grad_x, grad_share, *[None] * 7


def _add_gradient(rows: _Rows, gradients: WeightGradients, name: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds each expert's ``a^T b`` to the gradient of a weight; see `_Rows.weight_gradient`."""
    if gradients.begun(name) or not stays_on_the_device(a):
        rows.weight_gradient(a, b, *gradients.whole(name, weight))
    else:
        # Faster by half, but it writes the experts without rows, too, and cannot add.
        gradients.adopt(name, F.grouped_mm(a.mT, b, offs=rows.starts[1:]))


@cache
def _processors(device: torch.device) -> int:
    # Without a GPU, Triton's interpreter runs one program after the other.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 1).bit_length()
