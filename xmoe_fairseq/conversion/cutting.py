"""Takes experts out of a checkpoint: rows of stacked tensors, and of routers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..checkpoints.shards import is_expert
from .merging import merge

# The number of a stratum's router, and the parameter's name; a layer's own router has no number.
_ROUTER = re.compile(r"router(?:s\.(\d+))?\..+")


@dataclass(frozen=True)
class Site:
    """A set of experts with its routers, as it is stored.

    Attributes:
        name: path of the MoE layer in the model.
        layer: that it belongs to, such as ``encoder.2``.
        experts: E.
        sizes: of the strata; empty for a plain layer.
        kept_whole: names of tensors of its routers that have no row for each expert.
    """

    name: str
    layer: str
    experts: int
    sizes: tuple[int, ...] = ()
    kept_whole: tuple[str, ...] = ()

    def first_visible(self, router: int) -> int:
        """Returns the first expert that a router sees: that of a stratum sees its own experts and all later ones."""
        return sum(self.sizes[:router])


def cut(
    parameters: Mapping[str, Tensor], sites: Sequence[Site], kept: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Keeps some experts of each site, in their order.

    Args:
        parameters: of a model by name, or moving averages of them.
        sites: all of the model.
        kept: by site, the ids of the experts that stay, ascending.
    """
    rest = dict(parameters)
    for site in sites:
        if len(kept[site.name]) == site.experts:
            continue
        for name, tensor in parameters.items():
            inner = name.removeprefix(f"{site.name}.")
            if inner == name:
                continue
            router = _ROUTER.fullmatch(inner)
            start = site.first_visible(int(router[1] or 0)) if router else 0
            if router and inner.rpartition(".")[2] in site.kept_whole:
                continue
            # Buffers of a router over experts have as many rows as its weight.
            if (is_expert(name) or router) and tensor.dim() and len(tensor) == site.experts - start:
                rest[name] = tensor[[expert - start for expert in kept[site.name] if expert >= start]]
    return rest


def join(
    parameters: Mapping[str, Tensor],
    sites: Sequence[Site],
    groups: Mapping[str, Sequence[Sequence[int]]],
    by_unit: Sequence[str],
    loads: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Merges the groups of each site.

    Args:
        parameters: of a model by name.
        sites: all of the model, without strata.
        groups: by site, of `merging.linked`.
        by_unit: names of the tensors of experts that have a row for each hidden unit.
        loads: by site (E,), tokens that took each expert.
    """
    rest = dict(parameters)
    for site in sites:
        if len(groups[site.name]) == site.experts:
            continue
        names = {
            name: name.removeprefix(f"{site.name}.experts.")
            for name, tensor in parameters.items()
            if name.startswith((f"{site.name}.experts.", f"{site.name}.router.")) and tensor.dim()
        }
        tensors = {inner: parameters[name] for name, inner in names.items()}
        merged = merge(tensors, by_unit, groups[site.name], loads[site.name])
        rest |= {name: merged[inner] for name, inner in names.items()}
    return rest
