"""Experts of different hidden sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.assignments import Assignments
from .stacked import ExpertSet, StackedExperts


class SizedExperts(ExpertSet):
    """E experts of one kind, of which each has a hidden size of its own: for each size a `StackedExperts`.

    Assignments are sorted by expert and experts by size, so the assignments of a size are a slice, and each token
    costs exactly the hidden units of the experts that it takes. Reads the load by size back from the device once.

    Source: Wang et al. 2025 (HMoE, arXiv 2408.10681).

    Args:
        kind: of the experts.
        sizes: (E,) the hidden size of each, ascending.
        dim: d.
        kwargs: of the kind.

    Raises:
        ValueError: the sizes are not ascending, or of a size there are fewer experts than processes.
    """

    paper = "HMoE: Wang et al. 2025, arXiv 2408.10681"
    equal = False
    size_of: Tensor  # of each expert

    def __init__(self, kind: type[StackedExperts], sizes: Sequence[int], dim: int, **kwargs: Any) -> None:
        super().__init__()
        if not sizes or list(sizes) != sorted(sizes):
            raise ValueError(f"sizes {tuple(sizes)} of experts are not ascending")
        self.num_experts, self.dim = len(sizes), dim
        counts = Counter(sizes)
        group = kwargs.get("group")
        if group and min(counts.values()) < group.size:
            size, number = min(counts.items(), key=lambda one: one[1])
            raise ValueError(
                f"there are {number} experts of {size} hidden units, which {group.size} processes cannot share: each "
                "must hold one of every size"
            )
        self.parts = nn.ModuleList(kind(count, dim, size, **kwargs) for size, count in counts.items())
        self.register_buffer("size_of", torch.tensor(sizes), persistent=False)

    def _parts(self) -> Iterator[StackedExperts]:
        for part in self.parts:
            assert isinstance(part, StackedExperts)
            yield part

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(part.sizes for part in self._parts()))

    def flops(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(part.flops() for part in self._parts()))

    def own_parameters(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(part.own_parameters() for part in self._parts()))

    def forward(self, x: Tensor, assignments: Assignments, weights: Sequence[Any] | None = None) -> Tensor:
        weights = weights or self.weights(x.device)
        loads = assignments.group_sizes.split([part.num_experts for part in self._parts()])
        rows, start, total = torch.stack([load.sum() for load in loads]).tolist(), 0, None
        for part, load, count, own in zip(self._parts(), loads, rows, weights, strict=True):
            here = slice(start, start + count)
            start += count
            y = part(
                x,
                Assignments(
                    assignments.token[here], assignments.weight[here], load, max_per_expert=assignments.max_per_expert
                ),
                own,
            )
            # A sum of bf16 numbers is made in float32.
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            total = wide if total is None else total + wide
        assert total is not None
        return total.to(y.dtype)

    def weights(self, device: torch.device) -> tuple[Any, ...]:
        return tuple(part.weights(device) for part in self._parts())

    def hidden_units(self, load: Tensor) -> Tensor:
        return (load * self.size_of).sum()

    def notice(self, load: Tensor) -> None:
        for part, own in zip(self._parts(), load.split([part.num_experts for part in self._parts()]), strict=True):
            part.notice(own)
