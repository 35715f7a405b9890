"""Ways to compute the experts: one contract, one file each.

A new one is a function that `kernel` declares, a line in `KERNELS`, and a place in `AUTO` if it is to be taken unasked.
"""

from __future__ import annotations

from torch import Tensor

from ..pairs import Pairs
from .activation import RELU
from .contract import Activation, ExpertWeights, Kernel, Network, StackedWeights, feed_forward, kernel
from .few import few
from .fused import fused
from .grouped_mm import grouped_mm
from .loop import loop
from .memory import Buffers
from .tiled import has_triton, power_of_two, tiled

KERNELS: dict[str, Kernel] = {
    "fused": fused,
    "few": few,
    "grouped_mm": grouped_mm,
    "triton": tiled,
    "loop": loop,
}
# In this order ``auto`` asks which one suits a call.
AUTO = (tiled, grouped_mm, few, fused, loop)
CHOICES = ("auto", *KERNELS)


def check(name: str, network: Network) -> None:
    """Refuses a kernel that does not compute a network.

    Raises:
        ValueError: it does not, or its name is unknown.
    """
    if name not in CHOICES:
        raise ValueError(f"there is no kernel {name!r}: choose one of {', '.join(CHOICES)}")
    if name != "auto" and not KERNELS[name].computes(network):
        able = ", ".join(["auto", *(other for other, one in KERNELS.items() if one.computes(network))])
        named = network.__name__.replace("_", " ")
        raise ValueError(f"the kernel {name} does not compute {named} networks; choose --moe-kernel {able}")


def choose(
    name: str, x: Tensor, pairs: Pairs, hidden: int, plain: bool = True, network: Network = feed_forward
) -> Kernel:
    """Finds a kernel by its name, or for ``auto`` the fastest for a device and dtype.

    Args:
        name: of `KERNELS`, or ``auto``.
        x: (T, d), what it will be given.
        pairs: what it will be given.
        hidden: h.
        plain: whether the activation is ReLU, without dropout.
        network: what the experts compute.

    Raises:
        ValueError: the name is unknown, or the kernel does not compute the network.
    """
    if name != "auto":
        check(name, network)
        return KERNELS[name]
    return next(one for one in AUTO if one.computes(network) and one.suits(x, pairs, hidden, plain))


__all__ = [
    "CHOICES",
    "KERNELS",
    "RELU",
    "Activation",
    "Buffers",
    "ExpertWeights",
    "Kernel",
    "Network",
    "StackedWeights",
    "check",
    "choose",
    "feed_forward",
    "has_triton",
    "kernel",
    "power_of_two",
]
