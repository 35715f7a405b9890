"""The share of hidden units above zero, in dense feed-forward networks and in experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

from torch import Tensor, nn

from ..moe import StackedExperts
from ..moe.kernels import KERNELS
from .routing_recorder import INPUTS


class HiddenUnits:
    """Counts the hidden units of one layer that were computed, and those above zero.

    Attributes:
        experts: whether they are of experts, each one by those tokens that took it.
        units: that were computed: each token's in a dense network, or those of the experts that it took.
        positive: of them, above zero after the activation; of gated experts, those whose gate is.
    """

    def __init__(self, experts: bool) -> None:
        self.experts = experts
        self.units, self.positive = 0, 0
        self._lock = Lock()  # experts run side by side

    def add(self, hidden: Tensor, real: Tensor | None = None) -> None:
        """Adds hidden units.

        Args:
            hidden: (..., h).
            real: (...) bool, false for padding, which is left out.
        """
        above = hidden > 0 if real is None else (hidden > 0)[real]
        positive = int(above.count_nonzero())
        with self._lock:
            self.units += above.numel()
            self.positive += positive

    @property
    def share(self) -> float | None:
        """Of the units, those above zero; None if none was computed."""
        return self.positive / self.units if self.units else None


@contextmanager
def counting_hidden_units(model: nn.Module) -> Iterator[dict[str, HiddenUnits]]:
    """Counts the hidden units of real tokens while the block runs.

    Experts are computed by a kernel that hands over every hidden unit, whatever ``--moe-kernel`` says. A network that
    is computed beside the experts (CMR, adapters) is not counted.

    Args:
        model: of one of this plugin's architectures, in evaluation; of a stock one nothing is counted.

    Yields:
        By layer, such as ``encoder.2``, dense ones too, in the order in which they run.
    """
    found: dict[str, HiddenUnits] = {}
    with ExitStack() as undo:
        for stack_name in INPUTS:
            stack: Any = getattr(model, stack_name, None)
            for number, layer in enumerate(stack.layers if hasattr(stack, "recorder") else (), 1):
                experts = [module for module in layer.modules() if isinstance(module, StackedExperts)]
                units = found[f"{stack_name}.{number}"] = HiddenUnits(bool(experts))
                for one in experts:
                    undo.enter_context(_watched(one, units))
                if not experts:
                    undo.callback(layer.fc2.register_forward_pre_hook(_dense(stack, units)).remove)
        yield found


@contextmanager
def _watched(experts: StackedExperts, units: HiddenUnits) -> Iterator[None]:
    """Counts what the activation of experts returns."""
    activation, kernel = experts.activation, experts.kernel

    def counted(x: Tensor) -> Tensor:
        hidden = activation(x)
        units.add(hidden)
        return hidden

    experts.activation = counted
    experts.kernel = "per_expert" if KERNELS["per_expert"].computes(experts.network) else "reference"
    try:
        yield
    finally:
        experts.activation, experts.kernel = activation, kernel


def _dense(stack: Any, units: HiddenUnits) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Counts what the second matrix of a dense network is given: (length, batch, hidden), padding included."""

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        units.add(args[0], stack.recorder.tokens.ne(stack.padding_idx).transpose(0, 1))

    return count
