"""What passes in and out of layers whose arguments and return values are fixed by fairseq."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import RoutingPlan, RoutingStats, StratifiedPlan

Observer = Callable[[str, RoutingPlan | StratifiedPlan], None]


class RoutingRecorder:
    """Hands tokens to the MoE layers of a stack and collects their statistics while it records; one a stack.

    Outside of `recording` it ignores them, so the second run of a layer under activation
    checkpointing, in the backward pass, is not counted again and keeps no graph alive.
    """

    # (batch, length) ids of the tokens in the stack. They stay until the next call, for the second run of layers
    # under activation checkpointing.
    tokens: Tensor

    def __init__(self) -> None:
        self._records: list[RoutingStats] | None = None
        # Is shown each recorded plan, under the layer's name.
        self.observer: Observer | None = None

    @contextmanager
    def recording(self, tokens: Tensor, listen: bool = True) -> Iterator[list[RoutingStats]]:
        """Gives the list that fills up, in the order in which layers run, until the block ends.

        Args:
            tokens: (batch, length) ids of the tokens in the stack, for routers that go by them.
            listen: whether statistics are wanted at all.
        """
        self.tokens = tokens
        records: list[RoutingStats] = []
        self._records = records if listen else None
        try:
            yield records
        finally:
            self._records = None

    def add(self, layer: str, plan: RoutingPlan | StratifiedPlan) -> None:
        """Takes the statistics of one layer's plan, under the layer's name."""
        # The second run under activation checkpointing must do what the first did, wanted or not.
        if self._records is not None or torch.is_grad_enabled():
            stats = dataclasses.replace(plan.stats, layer=layer)
            if self._records is not None:
                self._records.append(stats)
                if self.observer is not None:
                    self.observer(layer, plan)


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Shows the plan of each MoE layer of a model to ``observer``, under the layer's name, until the block ends.

    Step-by-step decoding shows nothing. A stock model has no MoE layers to show.
    """
    stacks: list[Any] = [getattr(model, name, None) for name in ("encoder", "decoder")]
    recorders = [stack.recorder for stack in stacks if hasattr(stack, "recorder")]
    for recorder in recorders:
        recorder.observer = observer
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.observer = None
