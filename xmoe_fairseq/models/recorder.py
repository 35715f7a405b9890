"""What passes in and out of layers whose arguments and return values are fixed by fairseq."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..moe import RoutingStats


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

    @contextmanager
    def recording(self, tokens: Tensor) -> Iterator[list[RoutingStats]]:
        """Gives the list that fills up, in the order in which layers run, until the block ends.

        Args:
            tokens: (batch, length) ids of the tokens in the stack, for routers that go by them.
        """
        self.tokens = tokens
        records: list[RoutingStats] = []
        self._records = records
        try:
            yield records
        finally:
            self._records = None

    def add(self, layer: str, stats: RoutingStats) -> None:
        """Takes one layer's statistics, under the layer's name."""
        if self._records is not None:
            self._records.append(dataclasses.replace(stats, layer=layer))
