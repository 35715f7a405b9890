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

from ..routing.assignments import Assignments
from ..routing.places import TILE, Places
from .activation import RELU
from .contract import NAMES, Activation, ExpertWeights, aligned, feed_forward, kernel
from .weight_gradients import WeightGradients

# Columns and depth, warps, stages of loading, and programs a processor of the products. Measured on an H100, with two
# experts per token of 65536 tokens.
_PRODUCT = (128, 64, 4, 3, 2)
_GRADIENT = (128, 256, 64, 8, 3)


def has_triton(device: torch.device) -> bool:
    """Returns whether the Triton programs run on a device: on GPUs of compute capability 8.0 or more, with Triton
    3.4."""
    return device.type == "cuda" and _installed() and torch.cuda.get_device_capability(device)[0] >= 8


@cache
def _installed() -> bool:
    # It comes with torch's builds for GPUs, and has descriptors since 3.4.
    try:
        return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    except ModuleNotFoundError:
        return False


def _suits(x: Tensor, assignments: Assignments, hidden: int, plain: bool) -> bool:
    return plain and x.dtype in (torch.bfloat16, torch.float16) and has_triton(x.device) and aligned(x, hidden)


@kernel(feed_forward, suits=_suits)
def triton_mm(
    x: Tensor, assignments: Assignments, weights: ExpertWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
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
    y: Tensor = _TritonMM.apply(
        x,
        assignments.weight,
        weights.fc1_weight,
        weights.fc1_bias,
        weights.fc2_weight,
        weights.fc2_bias,
        assignments,
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


def find_places(token: Tensor, group_sizes: Tensor, tokens: int) -> Places:
    """Finds where assignments are computed, for a plan that does not tell.

    Args:
        token: (R,) int64.
        group_sizes: (E,) int64.
        tokens: T.
    """
    from . import triton_kernels

    experts = len(group_sizes)
    places = Places.empty(len(token), experts, tokens, token)
    schedule, count = (*places.tables, experts), len(places.tile_row)
    triton_kernels.schedule[(experts + 1,)](group_sizes, *schedule, power_of_two(experts), TILE)
    counts = token.new_zeros(2 * tokens + 1, dtype=torch.int32)
    triton_kernels.count[(count,)](token, counts, *schedule, TILE)
    torch.cumsum(counts[: tokens + 1], 0, dtype=torch.int32, out=places.offsets)
    triton_kernels.list_places[(count,)](token, places.offsets, counts[tokens + 1 :], places.of_token, *schedule, TILE)
    return places


class _Work:
    """The programs of a call, started with what they need to know of its places; see `tiles`.

    Args:
        token: (R,) int64.
        places: of these assignments.
    """

    def __init__(self, token: Tensor, places: Places) -> None:
        self.token, self.places = token, places
        self.tokens = len(places.offsets) - 1
        # E that have places, and the number of all.
        held = len(places.tile_starts) - 1
        self.experts = held + places.before
        self.tiles = len(places.tile_row)
        self.count = self.tiles * TILE
        self.schedule = (*places.tables, held)

    def multiply(
        self,
        a: Tensor,
        w: Tensor,
        *,
        gather: bool = False,
        transposed: bool = False,
        bias: Tensor | None = None,
        relu: bool = False,
        kept: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """Returns each place of ``a`` times its expert's matrix, (P, n); see `triton_kernels.multiply`.

        Args:
            a: (P, k), or if ``gather`` the tokens' rows, (T, k).
            w: (E, k, n), or (E, n, k) if ``transposed``.
            gather: what ``a`` is.
            transposed: what ``w`` is.
            bias: (E, n) to add.
            relu: whether negative values become 0.
            kept: (P, n), where it is 0 the result is.
            sums: (tiles, n), overwritten by the sum of the places of each tile.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from . import triton_kernels

        inner, width = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
        out = a.new_empty(self.count, width)
        columns, depth, warps, stages, programs = _PRODUCT
        columns, depth = min(columns, max(power_of_two(width), 32)), min(depth, max(power_of_two(inner), 16))
        block = [1, columns, depth] if transposed else [1, depth, columns]
        programs = min(self.tiles * -(-width // columns), programs * _processors(a.device))
        triton_kernels.multiply[(programs,)](
            a if gather else TensorDescriptor.from_tensor(a, [TILE, depth]),
            self.token,
            TensorDescriptor.from_tensor(_aligned(w), block),
            bias,
            None if kept is None else TensorDescriptor.from_tensor(kept, [TILE, columns // 2]),
            out, sums, *self.schedule, self.places.before, width, inner,
            gather, transposed, bias is not None, relu, kept is not None, sums is not None, not gather,
            TILE, columns, depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return out

    def weight_gradients(
        self,
        second: tuple[Tensor, Tensor, Tensor],
        first: tuple[Tensor, Tensor, Tensor],
        gradients: tuple[Tensor, Tensor, Tensor, Tensor],
        add: bool,
    ) -> None:
        """Writes the gradients of the experts' matrices and biases; see `triton_kernels.weight_gradients`.

        Args:
            second: what those of the second matrix and its bias are made of: (P, h), (P, d), and the sums (tiles, d) of
                the latter.
            first: what those of the first are made of: (P, h), the tokens' rows (T, d), and the sums (tiles, h) of the
                former.
            gradients: of the first matrix (E, h, d), its bias (E, h), the second (E, h, d), its bias (E, d).
            add: whether to add to what is there, else it is overwritten.
        """
        from triton.tools.tensor_descriptor import TensorDescriptor

        from . import triton_kernels

        weight1, bias1, weight2, bias2 = gradients
        height, width = weight1.shape[1:]
        up, columns, depth, warps, stages = _GRADIENT
        up, columns = min(up, max(power_of_two(height), 16)), min(columns, max(power_of_two(width), 16))
        hidden, outer, sums2 = second
        inner, x, sums1 = first
        grid = (2 * self.experts * -(-height // up) * -(-width // columns),)
        triton_kernels.weight_gradients[grid](
            TensorDescriptor.from_tensor(hidden, [depth, up]), TensorDescriptor.from_tensor(outer, [depth, columns]),
            sums2, weight2, bias2, TensorDescriptor.from_tensor(inner, [depth, up]), x, sums1, weight1, bias1,
            self.token, self.places.tile_starts, self.places.tile_row, self.places.tile_end, self.places.before,
            height, width, add, TILE, up, columns, depth,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def combine(self, values: Tensor, gate_weight: Tensor | None) -> Tensor:
        """Adds up the places (P, d) of each token, times the assignments' gate weights (R,): (T, d)."""
        from . import triton_kernels

        dim = values.shape[1]
        y = values.new_empty(self.tokens, dim)
        columns = min(power_of_two(dim), 1024)
        triton_kernels.combine[(self.tokens, -(-dim // columns))](
            values, gate_weight, self.places.offsets, self.places.of_token, self.places.tile_row, y, dim,
            power_of_two(self.experts), TILE, columns, gate_weight is not None,
        )  # fmt: skip
        return y

    def spread(self, grad: Tensor, values: Tensor, gate_weight: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `combine`, (P, d) and (R,); overwrites ``sums`` (tiles, d) by those of the first."""
        from . import triton_kernels

        outer, grad_share = torch.empty_like(values), torch.empty_like(gate_weight)
        columns = min(64, power_of_two(values.shape[1]))
        triton_kernels.spread[(self.tiles,)](
            grad, self.token, values, gate_weight, outer, grad_share, sums, *self.schedule,
            self.places.offsets[self.tokens :], len(gate_weight), values.shape[1], TILE, columns,
        )  # fmt: skip
        return outer, grad_share

    def sums(self, width: int) -> Tensor:
        """Makes room for the sums of the places of each tile."""
        return self.token.new_empty(self.tiles, width, dtype=torch.float32)


class _TritonMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        assignments: Assignments,
        gradients: WeightGradients,
    ) -> Tensor:
        x, gate_weight, token = (part.contiguous() for part in (x, gate_weight, assignments.token))
        weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias
        ctx.gradients = gradients
        if not len(token):
            ctx.work = None
            ctx.save_for_backward(x, gate_weight, *weights)
            return torch.zeros_like(x)
        ctx.work = work = _Work(
            token, assignments.places or find_places(token, assignments.group_sizes.contiguous(), len(x))
        )
        hidden = work.multiply(x, fc1_weight, gather=True, transposed=True, bias=fc1_bias, relu=True)
        values = work.multiply(hidden, fc2_weight, bias=fc2_bias)
        ctx.save_for_backward(x, gate_weight, *weights, hidden, values)
        return work.combine(values, gate_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work, gradients = ctx.work, ctx.gradients
        x, gate_weight, *weights = ctx.saved_tensors
        named = dict(zip(NAMES, weights[:4], strict=True))
        if work is None:
            return torch.zeros_like(x), torch.zeros_like(gate_weight), *gradients.returned(named), None, None
        fc1_weight, _, fc2_weight, _, hidden, values = weights
        sums = work.sums(values.shape[1])
        outer, grad_share = work.spread(grads[0].contiguous(), values, gate_weight, sums)
        inner_sums = work.sums(hidden.shape[1])
        inner = work.multiply(outer, fc2_weight, transposed=True, kept=hidden, sums=inner_sums)
        totals, begun = zip(*(gradients.whole(name, like) for name, like in named.items()), strict=True)
        work.weight_gradients((hidden, outer, sums), (inner, x, inner_sums), totals, begun[0])
        grad_x = work.combine(work.multiply(inner, fc1_weight), None) if ctx.needs_input_grad[0] else None
        return grad_x, grad_share, *gradients.returned(named), None, None


def _aligned(w: Tensor) -> Tensor:
    """Copies what does not begin at a multiple of 16 bytes, such as a part of a flat parameter, for a descriptor."""
    return w if w.data_ptr() % 16 == 0 else w.clone()


@cache
def _processors(device: torch.device) -> int:
    # Without a GPU, Triton's interpreter runs one program after the other.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def power_of_two(number: int) -> int:
    """Returns the least power of two that is not below a number, at least 2."""
    return 1 << max(number - 1, 1).bit_length()
