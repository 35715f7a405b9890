"""Compiles every Triton program of a layer's step for an H100, which takes no GPU, and prints their names.

python tests/support/helpers_compiled.py        without TRITON_INTERPRET, in a process of its own
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions
from xmoe_fairseq.moe.routing import base, fp32_logits


class _H100:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Takes steps of layers on the CPU, whose programs are compiled and not started."""
    compiled: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=(1, 1, 1), warmup=True, **kwargs)
        compiled.append(self.__name__)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros(len(a), b.shape[1])

    driver.set_active(_H100())
    # The package has a kernel of the module's name.
    tiled = importlib.import_module("xmoe_fairseq.moe.kernels.triton_mm")
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(tiled, "_check", lambda *_: None),
        patch.object(base, "routes_on_device", lambda *_: True),
        patch.object(base, "has_fp32_product", lambda *_: True),
        patch.object(fp32_logits, "product", product),
    ):
        for kind in ("threshold", "gshard"):
            options = RouterOptions(capacity_factor=2.0, static=True)
            layer = MoELayer(ROUTERS[kind](64, 8, options), Experts(8, 64, 128, kernel="triton")).bfloat16()
            layer.router.measures_entropy = kind == "threshold"
            x = torch.zeros(300, 64, dtype=torch.bfloat16, requires_grad=True)
            padding = torch.arange(300) > 280 if kind == "threshold" else None
            y, plan = layer(x, padding)
            stats = plan.stats
            (y.sum() + stats.balance_loss + stats.z_loss + stats.entropy_loss).backward()
    print(*sorted(set(compiled)))


if __name__ == "__main__":
    main()
