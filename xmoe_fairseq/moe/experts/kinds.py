"""The kinds of experts by name, and making the experts of a layer."""

from __future__ import annotations

from typing import Any

from .adapters import AdapterExperts
from .gated import GatedExperts
from .mpo import MPOExperts
from .options import hidden_sizes
from .parts import Parts
from .sized import SizedExperts
from .stacked import Experts, ExpertSet, StackedExperts

EXPERTS: dict[str, type[StackedExperts]] = {
    "ffn": Experts,
    "glu": GatedExperts,
    "adapter": AdapterExperts,
    "part": Parts,
    "mpo": MPOExperts,
}


def make_experts(
    kind: type[StackedExperts], num_experts: int, dim: int, hidden: int, options: Any, **kwargs: Any
) -> ExpertSet:
    """Makes the experts of a layer; of one size they are a plain `StackedExperts`.

    Args:
        kind: of `EXPERTS`.
        num_experts: E.
        dim: d.
        hidden: h, of each expert, or on average if the options give sizes; of the network that they share, if any.
        options: an instance of the kind's ``Options``.
        kwargs: other arguments of the kind.

    Raises:
        ValueError: see `StackedExperts` and `SizedExperts`.
    """
    sizes = hidden_sizes(options, num_experts, hidden) or (hidden,)
    if len(set(sizes)) == 1:
        return kind(num_experts, dim, sizes[0], **kwargs, options=options)
    return SizedExperts(kind, sizes, dim, **kwargs, options=options)
