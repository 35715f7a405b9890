"""Joins similar experts instead of leaving some out: the baseline that pruning is compared with.

Groups by average linkage on what experts compute (Zhang et al. 2025, arXiv 2407.09590; Chen et al. 2025, HC-SMoE, arXiv
2410.08589); hidden units are aligned first, since experts that were trained apart have them in different orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..moe import StackedExperts

# Tokens whose outputs are compared.
TOKENS = 1024


@torch.inference_mode()
def outputs(experts: StackedExperts, x: Tensor) -> Tensor:
    """Computes every expert for the same tokens, x: (n, d): (E, n, d)."""
    weights = experts.weights(x.device)
    inputs = x.to(weights.dtype)
    return torch.stack([weights.network(inputs, own, experts.activation, 0.0) for own in weights.of_each()])


def cka(y: Tensor) -> Tensor:
    """Compares experts by linear CKA of their outputs.

    Args:
        y: (E, n, d).

    Returns:
        (E, E), 1 for outputs that are equal up to rotation and scale.
    """
    centred = y - y.mean(1, keepdim=True)
    # |A^T B|^2 is the product of the (n, n) matrices A A^T and B B^T, entry by entry.
    kernels = torch.stack([one @ one.t() for one in centred]).flatten(1)
    products = kernels @ kernels.t()
    norms = products.diagonal().sqrt()
    return products / (norms.unsqueeze(1) * norms).clamp(min=torch.finfo(y.dtype).tiny)


def linked(disparity: Tensor, groups: int) -> list[list[int]]:
    """Joins the nearest groups by average linkage until so many are left.

    Args:
        disparity: (E, E), symmetric; of equal ones, the lowest numbers are joined first.
        groups: how many.

    Returns:
        Their members, groups in the order of their first ones.
    """
    members = [[expert] for expert in range(len(disparity))]
    distances = disparity.double().clone()
    distances.fill_diagonal_(torch.inf)
    while len(members) > groups:
        one, other = divmod(int(distances.argmin()), len(members))  # the first has the lower number
        sizes = len(members[one]), len(members[other])
        joined = (sizes[0] * distances[one] + sizes[1] * distances[other]) / sum(sizes)
        joined[one] = torch.inf
        distances[one], distances[:, one] = joined, joined
        keep = [number for number in range(len(members)) if number != other]
        distances = distances[keep][:, keep]
        members[one] = sorted(members[one] + members.pop(other))
    return sorted(members)


def shares_of(load: Tensor, group: Sequence[int]) -> Tensor:
    """Returns the shares of a group's members in its load; equal ones if no token took any of them."""
    own = load[list(group)].double()
    total = own.sum()
    return own / total if total > 0 else torch.full_like(own, 1 / len(own))


def alignment(units: Tensor, like: Tensor) -> Tensor:
    """Finds the order of hidden units that is most like another expert's.

    Args:
        units: (h, n) all weights of each hidden unit.
        like: (h, n) those of the other expert.

    Returns:
        (h,) int64: unit i of the other expert is nearest to unit ``result[i]``.
    """
    _, order = linear_sum_assignment((like.double() @ units.double().t()).numpy(), maximize=True)
    return torch.from_numpy(order)


def merge(
    tensors: Mapping[str, Tensor], by_unit: Sequence[str], groups: Sequence[Sequence[int]], load: Tensor
) -> dict[str, Tensor]:
    """Averages the experts of each group, weighted by their load, after aligning their hidden units.

    Args:
        tensors: by name (E, ...), the router's weight among them.
        by_unit: those that have a row for each hidden unit, (E, h, ...).
        groups: of `linked`.
        load: (E,) tokens that took each expert.

    Returns:
        By name (groups, ...).
    """
    merged: dict[str, list[Tensor]] = {name: [] for name in tensors}
    for group in groups:
        shares = shares_of(load, group)
        units = {expert: _units(tensors, by_unit, expert) for expert in group} if by_unit else {}
        first = group[int(shares.argmax())]
        orders = {expert: alignment(units[expert], units[first]) for expert in group} if by_unit else {}
        for name, tensor in tensors.items():
            parts = [tensor[expert][orders[expert]] if name in by_unit else tensor[expert] for expert in group]
            total = sum(share * part.double() for share, part in zip(shares, parts, strict=True))
            assert isinstance(total, Tensor)
            merged[name].append(total.to(tensor.dtype))
    return {name: torch.stack(parts) for name, parts in merged.items()}


def _units(tensors: Mapping[str, Tensor], by_unit: Sequence[str], expert: int) -> Tensor:
    """Returns all weights of each hidden unit of an expert: (h, n)."""
    return torch.cat([tensors[name][expert].reshape(tensors[name].shape[1], -1) for name in by_unit], dim=1)
