"""Ways to compute the experts: one contract, one file each. A new one is a function and a line in `KERNELS`."""

from __future__ import annotations

from .contract import Activation, ExpertKernel, ExpertWeights
from .fused import fused
from .loop import loop

KERNELS: dict[str, ExpertKernel] = {"fused": fused, "loop": loop}

__all__ = ["KERNELS", "Activation", "ExpertKernel", "ExpertWeights"]
