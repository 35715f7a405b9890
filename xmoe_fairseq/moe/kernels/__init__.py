"""Ways to compute the experts: one contract, one file each.

A new one is a function that `kernel` declares, a line in `KERNELS`, and a place in `AUTO` if it is to be taken unasked.
"""

from __future__ import annotations

from torch import Tensor

from ..routing.assignments import Assignments
from .activation import RELU
from .buffer_pool import Buffers
from .contract import Activation, ExpertWeights, Kernel, Network, StackedWeights, feed_forward, kernel
from .decode import decode
from .grouped_mm import grouped_mm
from .per_expert import per_expert
from .reference import reference
from .triton_mm import has_triton, power_of_two, triton_mm

KERNELS: dict[str, Kernel] = {
    "per_expert": per_expert,
    "decode": decode,
    "grouped_mm": grouped_mm,
    "triton": triton_mm,
    "reference": reference,
}
# In this order ``auto`` asks which one suits a call.
AUTO = (triton_mm, grouped_mm, decode, per_expert, reference)
KERNEL_NAMES = ("auto", *KERNELS)
# Names of earlier versions, which command lines and checkpoints may still have.
OLD_NAMES = {"fused": "per_expert", "few": "decode", "loop": "reference"}


def current_name(name: str) -> str:
    """Returns today's name of a kernel."""
    return OLD_NAMES.get(name, name)


def check(name: str, network: Network) -> None:
    """Refuses a kernel that does not compute a network.

    Raises:
        ValueError: it does not, or its name is unknown.
    """
    name = current_name(name)
    if name not in KERNEL_NAMES:
        raise ValueError(f"there is no kernel {name!r}: choose one of {', '.join(KERNEL_NAMES)}")
    if name != "auto" and not KERNELS[name].computes(network):
        able = ", ".join(["auto", *(other for other, one in KERNELS.items() if one.computes(network))])
        named = network.__name__.replace("_", " ")
        raise ValueError(f"the kernel {name} does not compute {named} networks; choose --moe-kernel {able}")


def choose(
    name: str, x: Tensor, assignments: Assignments, hidden: int, plain: bool = True, network: Network = feed_forward
) -> Kernel:
    """Finds a kernel by its name, or for ``auto`` the fastest for a device and dtype.

    Args:
        name: of `KERNELS`, or ``auto``.
        x: (T, d), what it will be given.
        assignments: what it will be given.
        hidden: h.
        plain: whether the activation is ReLU, without dropout.
        network: what the experts compute.

    Raises:
        ValueError: the name is unknown, or the kernel does not compute the network.
    """
    name = current_name(name)
    if name != "auto":
        check(name, network)
        return KERNELS[name]
    return next(one for one in AUTO if one.computes(network) and one.suits(x, assignments, hidden, plain))


__all__ = [
    "KERNELS",
    "KERNEL_NAMES",
    "OLD_NAMES",
    "RELU",
    "Activation",
    "Buffers",
    "ExpertWeights",
    "Kernel",
    "Network",
    "StackedWeights",
    "check",
    "choose",
    "current_name",
    "feed_forward",
    "has_triton",
    "kernel",
    "power_of_two",
]
