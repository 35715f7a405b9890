"""Ways to compute the experts: one contract, one file each. A new one is a function and a line in `KERNELS`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs
from .activation import RELU
from .contract import Activation, ExpertKernel, ExpertWeights
from .few import few
from .fused import fused
from .grouped_mm import grouped_mm, stays_on_the_device
from .loop import loop
from .memory import Buffers
from .tiled import has_triton, power_of_two, tiled

KERNELS: dict[str, ExpertKernel] = {
    "fused": fused,
    "few": few,
    "grouped_mm": grouped_mm,
    "triton": tiled,
    "loop": loop,
}
# Up to so many rows an expert on average, `few` is faster than `fused`; measured with 64 experts of two sizes, with
# AVX2 and AVX-512.
FEW = 12
CHOICES = ("auto", *KERNELS)


def choose(name: str, x: Tensor, pairs: Pairs, hidden: int, plain: bool = True) -> ExpertKernel:
    """Finds a kernel by its name, or for ``auto`` the fastest for a device and dtype.

    Args:
        name: of `KERNELS`, or ``auto``.
        x: (T, d), what it will be given.
        pairs: what it will be given.
        hidden: h.
        plain: whether the activation is ReLU, without dropout.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in CHOICES:
        raise ValueError(f"there is no kernel {name!r}: choose one of {', '.join(CHOICES)}")
    if name != "auto":
        return KERNELS[name]
    aligned = x.shape[-1] % 8 == 0 and hidden % 8 == 0
    if aligned and plain and x.dtype in (torch.bfloat16, torch.float16) and has_triton(x.device):
        return tiled
    # Other dtypes and older GPUs read the groups back in every product; `fused` does it once a layer.
    if aligned and stays_on_the_device(x):
        return grouped_mm
    scattered = len(pairs.token) <= FEW * len(pairs.group_sizes)
    return few if scattered and not torch.is_grad_enabled() else fused


__all__ = [
    "CHOICES",
    "KERNELS",
    "RELU",
    "Activation",
    "Buffers",
    "ExpertKernel",
    "ExpertWeights",
    "choose",
    "has_triton",
    "power_of_two",
]
