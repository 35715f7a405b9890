"""Router probabilities and the order of the experts of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# From so many rows on, and with so few threads, NumPy sorts rows faster than torch: on 2 cores by a factor of 3.
_ROWS, _THREADS = 256, 4


@dataclass(frozen=True)
class RankedProbs:
    """Router probabilities beside their order.

    Attributes:
        logits: (T, E).
        probs: (T, E) softmax of ``logits``.
        sorted: (T, R) the probabilities at the first R ranks, without gradient. R is E, or what is needed: 2 where
            the second choice is drawn, 1 in what is kept of a plan made on a GPU.
        order: (T, R) int64, the expert at each rank; equal probabilities keep the experts' order.
    """

    logits: Tensor
    probs: Tensor
    sorted: Tensor
    order: Tensor


@dataclass(frozen=True)
class Limits:
    """When a token, which takes its most probable experts first, takes no more.

    Attributes:
        number: it has so many experts, at least 1.
        mass: their probabilities add up to this; none sets no such limit. The first choice is always taken.
    """

    number: int
    mass: float | None = None


def within(sorted_probs: Tensor, limits: Limits) -> Tensor:
    """Says which ranks are taken: (T, E) bool, from probabilities (T, E) in descending order."""
    ranks = torch.arange(sorted_probs.shape[-1], device=sorted_probs.device)
    if limits.mass is None:
        return (ranks < limits.number).expand(sorted_probs.shape)
    # No mass is before the first choice.
    mass = max(limits.mass, torch.finfo(sorted_probs.dtype).tiny)
    mass_before = sorted_probs.cumsum(-1).sub_(sorted_probs)
    # Written so that a probability that is no number reaches the output.
    taken = (mass_before >= mass).logical_not_()
    return taken if limits.number >= sorted_probs.shape[-1] else taken.logical_and_(ranks < limits.number)


def rank(logits: Tensor) -> RankedProbs:
    """Turns logits (T, E) into probabilities and sorts them."""
    probs = torch.softmax(logits, dim=-1)
    return RankedProbs(logits, probs, *sort_rows(probs.detach()))


def sort_rows(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts probabilities (T, E) in descending order; gives the values and their places, equal ones in their order."""
    few_threads = probs.device.type == "cpu" and torch.get_num_threads() <= _THREADS
    if few_threads and probs.dtype == torch.float32 and len(probs) >= _ROWS:
        return _sort_keys(probs)
    return probs.sort(dim=-1, descending=True, stable=True)


def _sort_keys(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts whole numbers that hold a value above its place, so that nothing needs to be moved along or kept in order.

    The bits of floats that are not negative, taken for a whole number, are in the order of the floats; their
    complement is in the opposite one.
    """
    places = torch.arange(probs.shape[1])
    keys = probs.contiguous().view(torch.int32).bitwise_not().long().bitwise_left_shift_(32).bitwise_or_(places)
    keys.numpy().sort(axis=-1)
    order = keys & 0xFFFFFFFF
    return keys.bitwise_right_shift_(32).int().bitwise_not_().view(torch.float32), order
