"""All experts at once by Triton programs that add the bias, activate and sum up where they multiply.

Hidden units are written once, after their activation. The programs find on the device which rows they have, so the
host never waits.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..pairs import Pairs
from .activation import RELU
from .contract import Activation, ExpertWeights, aligned, feed_forward, kernel
from .gradients import WeightGradients

# Rows of a tile; columns and depth, warps, stages of loading, and programs a processor of the products. Measured on an
# H100, with two experts a token of 65536 tokens.
_ROWS = 128
_PRODUCT = (128, 64, 4, 3, 2)
_GRADIENT = (128, 256, 64, 8, 3)


def has_triton(device: torch.device) -> bool:
    """Says whether the Triton programs run on a device: on GPUs of compute capability 8.0 or more, with Triton 3.4."""
    return device.type == "cuda" and _installed() and torch.cuda.get_device_capability(device)[0] >= 8


@cache
def _installed() -> bool:
    # It comes with torch's builds for GPUs, and has descriptors since 3.4.
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ModuleNotFoundError:
        return False


def _suits(x: Tensor, pairs: Pairs, hidden: int, plain: bool) -> bool:
    return plain and x.dtype in (torch.bfloat16, torch.float16) and has_triton(x.device) and aligned(x, hidden)


@kernel(feed_forward, suits=_suits)
def tiled(x: Tensor, pairs: Pairs, weights: ExpertWeights, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Runs all experts at once; see `ExpertKernel`.

    Raises:
        ValueError: Triton cannot run here, d or h is no multiple of 16 bytes, there is dropout, or another activation
            than ReLU.
    """
    _check(x, weights)
    if dropout or activation not in RELU:
        raise ValueError(
            f"the kernel triton computes ReLU without dropout, not {getattr(activation, '__name__', activation)} with "
            f"dropout {dropout}; choose --moe-kernel auto"
        )
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


def _check(x: Tensor, weights: ExpertWeights) -> None:
    if not (has_triton(x.device) or (_installed() and os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(
            f"the kernel triton does not run on {x.device}: it needs a GPU of compute capability 8.0 and Triton 3.4; "
            "choose --moe-kernel auto"
        )
    widths = x.shape[1], weights.fc1_weight.shape[1]
    if any(width * x.element_size() % 16 for width in widths):
        raise ValueError(
            f"the kernel triton takes rows of a multiple of 16 bytes, not of {widths[0]} and {widths[1]} numbers of "
            f"{x.element_size()} bytes; choose --moe-kernel auto"
        )


class _Places:
    """Where the pairs of a call are computed, as the programs need it; see `tiles`.

    Args:
        token: (R,) int64.
        group_sizes: (E,) int64.
        tokens: T.
    """

    def __init__(self, token: Tensor, group_sizes: Tensor, tokens: int) -> None:
        from . import tiles

        experts = len(group_sizes)
        self.token, self.tokens, self.experts = token, tokens, experts
        self.span = power_of_two(experts)
        self.tiles = -(-len(token) // _ROWS) + experts
        self.count = self.tiles * _ROWS
        parts = (experts + 1, self.tiles, self.tiles, self.tiles)
        numbers = token.new_empty(sum(parts), dtype=torch.int32)
        self.tile_starts, self.tile_expert, self.tile_row, tile_end = numbers.split(parts)
        self.schedule = (self.tile_starts, self.tile_expert, self.tile_row, tile_end, experts)
        tiles.schedule[(experts + 1,)](group_sizes, *self.schedule, self.span, _ROWS)
        counts = token.new_zeros(2 * tokens + 1, dtype=torch.int32)
        tiles.count[(self.tiles,)](token, counts, *self.schedule, _ROWS)
        self.offsets = counts[: tokens + 1].cumsum(0, dtype=torch.int32)
        self.of_token = token.new_empty(len(token), dtype=torch.int32)
        tiles.list_places[(self.tiles,)](
            token, self.offsets, counts[tokens + 1 :], self.of_token, *self.schedule, _ROWS
        )

    def gather(self, x: Tensor) -> Tensor:
        """Copies each pair's token from x (T, d) to its place: (P, d)."""
        from . import tiles

        out = x.new_empty(self.count, x.shape[1])
        columns = min(64, power_of_two(x.shape[1]))
        grid = (self.tiles, -(-x.shape[1] // columns))
        tiles.gather[grid](x, self.token, out, *self.schedule, x.shape[1], _ROWS, columns)
        return out

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
        """Gives each place of ``a`` times its expert's matrix, (P, n); see `tiles.multiply`.

        Args:
            a: (P, k).
            w: (E, k, n), or (E, n, k) where ``transposed``.
            transposed: what ``w`` is.
            bias: (E, n) to add.
            relu: whether negative values become 0.
            kept: (P, n), where it is 0 the result is.
            sums: (tiles, n), overwritten by the sum of the places of each tile.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from . import tiles

        inner, width = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
        out = a.new_empty(self.count, width)
        columns, depth, warps, stages, programs = _PRODUCT
        columns, depth = min(columns, max(power_of_two(width), 32)), min(depth, max(power_of_two(inner), 16))
        block = [1, columns, depth] if transposed else [1, depth, columns]
        programs = min(self.tiles * -(-width // columns), programs * _processors(a.device))
        tiles.multiply[(programs,)](
            TensorDescriptor.from_tensor(a, [_ROWS, depth]),
            TensorDescriptor.from_tensor(_aligned(w), block),
            bias,
            None if kept is None else TensorDescriptor.from_tensor(kept, [_ROWS, columns // 2]),
            out, sums, self.tile_starts, self.tile_expert, self.experts, width, inner,
            transposed, bias is not None, relu, kept is not None, sums is not None, True, _ROWS, columns, depth,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def weight_gradient(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """Writes each expert's ``a^T b``, (E, m, n); see `tiles.weight_gradient`.

        Args:
            a: (P, m).
            b: (P, n).
            out: (E, m, n).
            add: whether to add to what is there, else it is overwritten.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from . import tiles

        height, width = out.shape[1:]
        up, columns, depth, warps, stages = _GRADIENT
        up, columns = min(up, max(power_of_two(height), 16)), min(columns, max(power_of_two(width), 16))
        grid = (self.experts * -(-height // up) * -(-width // columns),)
        tiles.weight_gradient[grid](
            TensorDescriptor.from_tensor(a, [depth, up]),
            TensorDescriptor.from_tensor(b, [depth, columns]),
            out, self.tile_starts, height, width, add, _ROWS, up, columns, depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def combine(self, values: Tensor, share: Tensor | None) -> Tensor:
        """Adds up the places (P, d) of each token, times the pairs' share (R,): (T, d)."""
        from . import tiles

        dim = values.shape[1]
        y = values.new_empty(self.tokens, dim)
        columns = min(power_of_two(dim), 1024)
        tiles.combine[(self.tokens, -(-dim // columns))](
            values, share, self.offsets, self.of_token, self.tile_row, y, dim,
            self.span, _ROWS, columns, share is not None,
        )  # fmt: skip
        return y

    def spread(self, grad: Tensor, values: Tensor, share: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `combine`, (P, d) and (R,); overwrites ``sums`` (tiles, d) by those of the first."""
        from . import tiles

        outer, grad_share = torch.empty_like(values), torch.zeros_like(share)
        columns = min(64, power_of_two(values.shape[1]))
        tiles.spread[(self.tiles,)](
            grad, self.token, values, share, outer, grad_share, sums, *self.schedule, values.shape[1], _ROWS, columns
        )
        return outer, grad_share

    def sums(self, width: int) -> Tensor:
        """Makes room for the sums of the places of each tile."""
        return self.token.new_empty(self.tiles, width, dtype=torch.float32)

    def add_up(self, sums: Tensor, out: Tensor, add: bool) -> None:
        """Adds up sums (tiles, n) over the tiles of each expert, (E, n), and over what is there if ``add``."""
        from . import tiles

        width = out.shape[1]
        tiles.add_up[(self.experts, -(-width // 256))](sums, out, self.tile_starts, width, add, 256)


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
        x, share, token, group_sizes = (part.contiguous() for part in (x, share, token, group_sizes))
        if not len(token):
            ctx.places = None
            ctx.save_for_backward(x, share)
            return torch.zeros_like(x)
        places = _Places(token, group_sizes, len(x))
        gathered = places.gather(x)
        hidden = places.multiply(gathered, fc1_weight, transposed=True, bias=fc1_bias, relu=True)
        values = places.multiply(hidden, fc2_weight, bias=fc2_bias)
        ctx.save_for_backward(gathered, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden, values)
        ctx.places, ctx.gradients = places, gradients
        return places.combine(values, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.places is None:
            x, share = ctx.saved_tensors
            return torch.zeros_like(x), torch.zeros_like(share), *[None] * 7
        gathered, share, fc1_weight, fc1_bias, fc2_weight, fc2_bias, hidden, values = ctx.saved_tensors
        places: _Places = ctx.places
        gradients: WeightGradients = ctx.gradients
        sums = places.sums(values.shape[1])
        outer, grad_share = places.spread(grads[0].contiguous(), values, share, sums)
        places.add_up(sums, *gradients.whole("fc2_bias", fc2_bias))
        places.weight_gradient(hidden, outer, *gradients.whole("fc2_weight", fc2_weight))
        sums = places.sums(hidden.shape[1])
        inner = places.multiply(outer, fc2_weight, transposed=True, kept=hidden, sums=sums)
        places.add_up(sums, *gradients.whole("fc1_bias", fc1_bias))
        places.weight_gradient(inner, gathered, *gradients.whole("fc1_weight", fc1_weight))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = places.combine(places.multiply(inner, fc1_weight), None)
        return grad_x, grad_share, *[None] * 7


def _aligned(w: Tensor) -> Tensor:
    """Copies what does not begin at a multiple of 16 bytes, such as a part of a flat parameter, for a descriptor."""
    return w if w.data_ptr() % 16 == 0 else w.clone()


@cache
def _processors(device: torch.device) -> int:
    # Without a GPU, Triton's interpreter runs one program after the other.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def power_of_two(number: int) -> int:
    """Gives the least power of two that is not below a number, at least 2."""
    return 1 << max(number - 1, 1).bit_length()
