"""What a kernel is told: which token goes to which expert with which weight."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .places import Places


@dataclass(frozen=True)
class Assignments:
    """The chosen (token, expert) assignments of one call, sorted by expert, then by token.

    There may be more rows than assignments: those beyond the last group are unused and have weight 0.

    Attributes:
        token: (R,) int64, the row of the layer's input.
        weight: (R,) float, the assignment's share in the token's output; carries the router's gradient.
        group_sizes: (E,) int64, assignments of each expert: the first ``group_sizes[0]`` assignments are
            expert 0's, and so on. Experts without tokens have 0.
        max_per_expert: the most assignments of an expert, where that is known without looking at them.
        places: where the kernel ``triton`` computes them, if the router has found that already.
    """

    token: Tensor
    weight: Tensor
    group_sizes: Tensor
    max_per_expert: int | None = field(default=None, kw_only=True)
    places: Places | None = field(default=None, kw_only=True)
