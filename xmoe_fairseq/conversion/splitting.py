"""Cuts a feed-forward network ``W2 act(W1 x + b1) + b2`` into E experts of h = H / E hidden units, and fits a router.

Shapes beside those of the package ``moe``: H hidden units of the whole network, W1 (H, d), b1 (H,), W2 (d, H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor
from torch.nn import functional as F

from ..moe.routing.topk import sort_rows, within

Activation = Callable[[Tensor], Tensor]

SPLITS = ("clusters", "contiguous", "random")
SCORES = ("contribution", "activation")
# Up to so many hidden units the assignment to centres is the best one; it takes cubic time.
_EXACT = 4096
# Rounds of clustering, and of the fit, after which little changes.
_ROUNDS, _STEPS = 100, 200
# Tokens whose hidden units are in memory at a time.
_CHUNK = 4096


@dataclass(frozen=True)
class Network:
    """A dense feed-forward network.

    Attributes:
        fc1_weight: (H, d).
        fc1_bias: (H,).
        fc2_weight: (d, H).
        activation: elementwise function.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    activation: Activation

    def hidden(self, x: Tensor) -> Tensor:
        """Computes the hidden units of x: (T, d), after the activation: (T, H)."""
        return self.activation(F.linear(x, self.fc1_weight, self.fc1_bias))


def split(fc1_weight: Tensor, experts: int, how: str) -> Tensor:
    """Divides hidden units among experts.

    Args:
        fc1_weight: (H, d).
        experts: E, a divisor of H.
        how: of `SPLITS`: by clustering the rows of W1, in their order, or at random by a fixed seed.

    Returns:
        (H,) int64, the expert of each unit; every expert has H / E, and experts are numbered by their first unit.
    """
    units = len(fc1_weight)
    if how == "clusters":
        return clusters(fc1_weight, experts)
    labels = torch.arange(units) // (units // experts)
    if how == "random":
        labels = labels[torch.randperm(units, generator=torch.Generator().manual_seed(1))]
    return _by_first_unit(labels)


def clusters(fc1_weight: Tensor, experts: int) -> Tensor:
    """Groups hidden units by balanced k-means on the normalised rows of W1, without a random choice.

    Source: Zhang et al. 2022 (MoEfication), parameter clustering, with starting centres chosen one by one.

    Args:
        fc1_weight: (H, d).
        experts: E, a divisor of H.

    Returns:
        (H,) int64 as of `split`.
    """
    rows = _normalised(fc1_weight.double())
    centres, labels, best = rows[_starts(rows, experts)], torch.full((len(rows),), -1), torch.inf
    for _ in range(_ROUNDS):
        distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        found = _assigned(distances)
        total = float(distances.gather(1, found.unsqueeze(1)).sum())
        if torch.equal(found, labels) or not total < best:
            break
        labels, best = found, total
        centres = _means(rows, labels)
    return _by_first_unit(labels)


def centres(fc1_weight: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean of each expert's normalised rows of W1: (E, d)."""
    return _means(_normalised(fc1_weight.double()), labels)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _means(rows: Tensor, labels: Tensor) -> Tensor:
    order = labels.argsort(stable=True)
    return rows[order].view(int(labels.max()) + 1, -1, rows.shape[1]).mean(1)


def _starts(rows: Tensor, experts: int) -> list[int]:
    """Chooses rows one by one, each the one that lowers the sum of squared distances to the nearest chosen one most."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest, chosen = torch.full((len(rows),), torch.inf, dtype=rows.dtype), []
    for _ in range(experts):
        sums = torch.cat([torch.minimum(part, nearest).sum(1) for part in distances.split(256)])
        chosen.append(int(sums.argmin()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return chosen


def _assigned(distances: Tensor) -> Tensor:
    """Assigns units to centres, equally many to each, by squared distances (H, E): (H,) int64."""
    units, experts = distances.shape
    each = units // experts
    if units <= _EXACT:
        _, places = linear_sum_assignment(distances.repeat_interleave(each, dim=1).numpy())
        return torch.from_numpy(places) // each
    labels, room = np.full(units, -1), np.full(experts, each)
    for place in distances.flatten().argsort(stable=True).tolist():
        unit, expert = divmod(place, experts)
        if labels[unit] < 0 and room[expert]:
            labels[unit] = expert
            room[expert] -= 1
    return torch.from_numpy(labels)


def _by_first_unit(labels: Tensor) -> Tensor:
    """Numbers experts in the order of their first units."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels.tolist()])


def scores(network: Network, hidden: Tensor, labels: Tensor, how: str) -> Tensor:
    """Scores experts by what they do with each token.

    Args:
        network: the dense one.
        hidden: (T, H) of the tokens.
        labels: (H,) of `split`.
        how: of `SCORES`. ``contribution``: sum over an expert's units of |a_i| times the norm of column i of W2, a
            bound of what is lost without it; ``activation``: the sum of its positive a_i (MoEfication).

    Returns:
        (T, E).
    """
    values = hidden.abs() * network.fc2_weight.norm(dim=0) if how == "contribution" else hidden.clamp(min=0)
    experts = int(labels.max()) + 1
    return values.new_zeros(len(values), experts).index_add_(1, labels, values)


def shares(network: Network, x: Tensor, labels: Tensor, how: str) -> tuple[Tensor, Tensor, float]:
    """Computes the share of each expert in what a layer does with tokens.

    Args:
        network: the dense one.
        x: (T, d), in any precision.
        labels: (H,) of `split`.
        how: as in `scores`.

    Returns:
        (T', d) and (T', E), in the network's precision: the tokens for which some expert does something, with shares
        that add up to 1; and the share of hidden units that are 0.
    """
    dtype = network.fc1_weight.dtype
    kept = [x.new_zeros(0, x.shape[1], dtype=dtype)]
    found = [x.new_zeros(0, int(labels.max()) + 1, dtype=dtype)]
    zeros = 0
    for part in x.split(_CHUNK):
        inputs = part.to(dtype)
        hidden = network.hidden(inputs)
        zeros += int((hidden == 0).sum())
        each = scores(network, hidden, labels, how)
        total = each.sum(1, keepdim=True)
        some = total.squeeze(1) > 0
        kept.append(inputs[some])
        found.append(each[some] / total[some])
    return torch.cat(kept), torch.cat(found), zeros / max(len(x) * len(labels), 1)


def fit_loss(weight: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Computes what `fit` minimises, the mean over tokens of ``-sum_e q_e log p_e`` with ``p = softmax(R x)``.

    Args:
        weight: R, (E, d).
        x: (T, d).
        target: q, (T, E), rows that add up to 1.

    Returns:
        (), and its gradient (E, d).
    """
    logs = F.log_softmax(x @ weight.t(), dim=-1)
    loss = -(target * logs).sum(1).double().mean()
    return loss, (logs.exp() - target).t() @ x / max(len(x), 1)


def fit(start: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Fits a router to the experts' shares by L-BFGS: a convex problem, so there is no learning rate and no seed.

    Args:
        start: (E, d), such as `centres`.
        x: (T, d).
        target: (T, E) of `shares`.

    Returns:
        (E, d) of the start's type, with a loss of at most the start's.
    """
    if not len(x):
        return start

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, grad = fit_loss(torch.from_numpy(flat).view(start.shape).to(x.dtype), x, target)
        return float(loss), grad.double().flatten().numpy()

    first = start.double().flatten().numpy()
    found: Any = minimize(value, first, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    better = found.x if found.fun <= value(first)[0] else first
    return torch.from_numpy(better).view(start.shape).to(start.dtype)


@dataclass(frozen=True)
class Coverage:
    """What a router keeps at a threshold, on average over tokens.

    Attributes:
        threshold: of the router's probabilities.
        coverage: share of the layer's activity that the chosen experts have.
        experts: chosen per token.
        oracle_experts: as ``experts``, chosen by the true shares with the same threshold.
    """

    threshold: float
    coverage: float
    experts: float
    oracle_experts: float


def covers(weight: Tensor, x: Tensor, target: Tensor, thresholds: tuple[float, ...]) -> Iterator[Coverage]:
    """Measures a router at thresholds.

    Args:
        weight: (E, d).
        x: (T, d).
        target: (T, E) of `shares`.
        thresholds: each in [0, 1].
    """
    ranked, order = sort_rows(torch.softmax(x @ weight.to(x.dtype).t(), dim=-1), len(weight))
    oracle, _ = sort_rows(target, len(weight))
    true = target.gather(1, order)
    for threshold in thresholds:
        mass = None if threshold == 1 else threshold
        taken = within(ranked, mass)
        yield Coverage(
            threshold=threshold,
            coverage=float((true * taken).sum(1).double().mean()),
            experts=float(taken.sum(1).double().mean()),
            oracle_experts=float(within(oracle, mass).sum(1).double().mean()),
        )
