"""Router probabilities, the order of the experts of each token, and how many of them it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# From so many rows on, and with so few threads, NumPy sorts rows faster than torch: on 2 cores by a factor of 4, from
# which the number of threads is estimated.
_ROWS, _THREADS = 256, 8
# Numbers that are sorted at a time: they stay in the cache.
_KEYS = 2**17
# Ranks that are looked at first where a mass is to be reached; if it is not, four times as many, and so on.
_FIRST = 16


class RankedProbs(NamedTuple):
    """Router probabilities beside their order.

    Attributes:
        logits: (T, E).
        probs: (T, E) softmax of ``logits``.
        sorted: (T, R) the probabilities at the first R ranks, without gradient. R is what is needed: no token takes an
            expert of a later rank. What is kept of a plan made on a GPU has 1.
        order: (T, R) int64, the expert at each rank; equal probabilities keep the experts' order.
    """

    logits: Tensor
    probs: Tensor
    sorted: Tensor
    order: Tensor


class Selection(NamedTuple):
    """When a token, which takes its most probable experts first, takes no more.

    Attributes:
        max_experts: it has so many experts, at least 1.
        top_p: their probabilities add up to this; None sets no such limit. The first choice is always taken.
    """

    max_experts: int
    top_p: float | None = None


def choose(logits: Tensor, selection: Selection) -> tuple[RankedProbs, Tensor]:
    """Turns logits (T, E) into probabilities, and ranks them as far as experts are taken: (T, R) bool says which."""
    probs = torch.softmax(logits, dim=-1)
    most = min(selection.max_experts, probs.shape[1])
    ranks = min(most, _FIRST) if selection.top_p is not None and _has_keys(probs) else most
    while True:
        ranked = RankedProbs(logits, probs, *sort_rows(probs.detach(), ranks))
        taken = within(ranked.sorted, selection.top_p)
        if ranks == most or not taken[:, -1].any():
            return ranked, taken
        ranks = min(most, 4 * ranks)


def within(sorted_probs: Tensor, mass: float | None) -> Tensor:
    """Returns which ranks are taken until the mass is reached: (T, R) bool, from probabilities in descending order."""
    taken = torch.ones_like(sorted_probs, dtype=torch.bool)
    if mass is not None:
        # Written so that a probability that is no number reaches the output.
        torch.logical_not(sorted_probs.cumsum(-1)[:, :-1] >= mass, out=taken[:, 1:])
    return taken


def sort_rows(probs: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Finds the largest of probabilities (T, E), in descending order, equal ones in theirs.

    Args:
        probs: (T, E).
        ranks: R, how many are wanted.

    Returns:
        The values and their places, (T, R) each.
    """
    if _has_keys(probs):
        return _sort_keys(probs, ranks)
    values, places = probs.sort(dim=-1, descending=True, stable=True)
    return values[:, :ranks], places[:, :ranks]


def _has_keys(probs: Tensor) -> bool:
    few_threads = probs.device.type == "cpu" and torch.get_num_threads() <= _THREADS
    return few_threads and probs.dtype == torch.float32 and len(probs) >= _ROWS


def _sort_keys(probs: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Sorts whole numbers that hold a value above its place, so that nothing needs to be moved along or kept in order.

    The bits of floats that are not negative, taken for a whole number, are in the order of the floats; their
    complement is in the opposite one.
    """
    tokens, experts = probs.shape
    values, order = probs.new_empty(tokens, ranks), torch.empty(tokens, ranks, dtype=torch.int64)
    bits, places, step = probs.contiguous().view(torch.int32), torch.arange(experts), max(1, _KEYS // experts)
    for here, values_here, order_here in zip(bits.split(step), values.split(step), order.split(step), strict=True):
        keys = here.bitwise_not().long().bitwise_left_shift_(32).bitwise_or_(places)
        if ranks < experts:
            keys.numpy().partition(ranks - 1, axis=-1)
            keys = keys[:, :ranks].contiguous()
        keys.numpy().sort(axis=-1)
        torch.bitwise_and(keys, 0xFFFFFFFF, out=order_here)
        values_here.copy_(keys.bitwise_right_shift_(32).int().bitwise_not_().view(torch.float32))
    return values, order
