"""Tokens travel to the processes that hold their experts, and the experts' outputs back.

A token goes once to a process, however many of its experts are there: that process adds up their weighted outputs,
as every kernel does, and one row comes back. With the tokens go, for each assignment, its weight, its row and its
expert.

How much goes where must be known before. `dynamic` asks: one exchange of counts, then exactly the rows there are.
`fixed_capacity` knows a bound from the experts' capacity: all processes send equally much, and nothing is read back
from the device.

Every process makes the same calls in the same order, forward and backward, whatever its tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..routing.assignments import Assignments
from .group import ExpertGroup

EXCHANGE_MODES = ("auto", "dynamic", "fixed_capacity")
# Names of earlier versions, which command lines and checkpoints may still have.
OLD_MODES = {"counted": "dynamic", "static": "fixed_capacity"}


class Destinations:
    """Where the assignments of one call go.

    Attributes:
        process: (R,) int64, the process of each assignment's expert; P for unused rows.
        expert: (R,) int64, the expert's number there.
        goes: (P, T) bool, whether a token goes to a process.
        place: (P + 1, T) int64, which of the rows for a process a token is, if it goes there.
        row: (R,) int64, the place of each assignment's token.
        counts: (P, 2) int64, the rows and the assignments for each process.

    Args:
        assignments: of this process's tokens with all experts.
        tokens: T.
        processes: P.
    """

    def __init__(self, assignments: Assignments, tokens: int, processes: int) -> None:
        each, more = divmod(len(assignments.group_sizes), processes)
        number = torch.arange(len(assignments.token), device=assignments.token.device)
        # Unused rows get expert E, and with it process P.
        expert = torch.searchsorted(assignments.group_sizes.cumsum(0), number, right=True)
        self.process = torch.maximum(expert // (each + 1), (expert - more) // each)
        self.expert = expert - self.process * each - self.process.clamp(max=more)
        cell = self.process * tokens + assignments.token
        goes = torch.zeros(processes + 1, tokens, dtype=torch.bool, device=number.device)
        goes.view(-1).index_fill_(0, cell, True)
        self.place = goes.cumsum(1) - 1
        self.row = self.place.view(-1).index_select(0, cell)
        self.goes = goes[:-1]
        ones = torch.ones_like(number)
        each_pairs = ones.new_zeros(processes + 1).index_add_(0, self.process, ones)
        self.counts = torch.stack([self.goes.sum(1), each_pairs[:-1]], 1)


@dataclass(frozen=True)
class Route:
    """What one call sends and receives.

    Attributes:
        group: the processes.
        token: (S,) int64, the tokens sent, by process; unused rows send any token.
        slot: (R,) int64, where each assignment is among those sent; unused rows come after the last.
        rows: rows sent to each process, and received from each.
        assignments: assignments sent to each process, and received from each; there may be more than are used.
        received: (P, 2) int64, the rows and assignments from each process, on the device.
    """

    group: ExpertGroup
    token: Tensor
    slot: Tensor
    rows: tuple[list[int], list[int]]
    assignments: tuple[list[int], list[int]]
    received: Tensor

    def dispatch(self, x: Tensor) -> Tensor:
        """Returns the rows received, (S', d), for the tokens of all processes, x: (T, d) here."""
        return self._exchange(_some(x).index_select(0, self.token), *self.rows)

    def combine(self, y: Tensor, tokens: int) -> Tensor:
        """Adds up for each token what comes back for the rows received, y: (S', d): (T, d)."""
        rows = self._exchange(y, *reversed(self.rows))
        # A sum of bf16 numbers is made in float32.
        wide = torch.promote_types(y.dtype, torch.float32)
        total = torch.zeros(max(tokens, 1), y.shape[1], dtype=wide, device=y.device)
        return total.index_add_(0, self.token, rows.to(wide))[:tokens].to(y.dtype)

    def dispatch_assignments(self, values: Tensor) -> Tensor:
        """Returns the values of the assignments received, (U', n), for (R, n) here; those of unused assignments are
        0."""
        used = sum(self.assignments[0])
        sent = values.new_zeros(used + 1, values.shape[1]).index_copy_(0, self.slot, values)
        return self._exchange(sent[:used], *self.assignments)

    def combine_assignments(self, values: Tensor) -> Tensor:
        """Returns what comes back for each assignment here, (R,), from values of those received, (U',)."""
        back = self._exchange(values, *reversed(self.assignments))
        return torch.cat([back, back.new_zeros(1)]).index_select(0, self.slot)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group.group)
        return out


def _some(x: Tensor) -> Tensor:
    """Adds a row where there is none: a process without tokens sends unused rows, too."""
    return x if len(x) else x.new_zeros(1, x.shape[1])


def dynamic(group: ExpertGroup, to: Destinations) -> Route:
    """Makes a route of exactly the rows and assignments there are; reads the counts back from the device."""
    received = torch.empty_like(to.counts)
    dist.all_to_all_single(received, to.counts, group=group.group)
    here, there = torch.stack([to.counts, received]).transpose(1, 2).tolist()
    token = torch.nonzero_static(to.goes, size=sum(here[0]))[:, 1]
    used = sum(here[1])
    slot = torch.arange(len(to.process), device=token.device).clamp(max=used)
    return Route(group, token, slot, (here[0], there[0]), (here[1], there[1]), received)


def fixed_capacity(group: ExpertGroup, to: Destinations, max_per_expert: int, widest: int) -> Route:
    """Makes a route of equal size for all processes; they agree on it in main memory.

    Args:
        group: the processes.
        to: where the assignments go.
        max_per_expert: the most assignments of an expert.
        widest: experts of the process that has most.
    """
    processes, tokens = to.goes.shape
    most_tokens, max_per_expert = group.largest(tokens, max_per_expert)
    assignments = max_per_expert * widest
    rows = min(most_tokens, assignments)
    column = torch.where(to.goes, to.place[:-1], rows)
    numbers = torch.arange(tokens, device=column.device).expand_as(column)
    token = column.new_zeros(processes, rows + 1).scatter_(1, column, numbers)[:, :rows].reshape(-1)
    number = torch.arange(len(to.process), device=column.device)
    starts = to.counts[:, 1].cumsum(0) - to.counts[:, 1]
    first = torch.cat([starts, starts.new_zeros(1)]).index_select(0, to.process)
    slot = torch.where(to.process < processes, to.process * assignments + number - first, processes * assignments)
    received = torch.stack([torch.full_like(starts, rows), torch.full_like(starts, assignments)], 1)
    return Route(group, token, slot, ([rows] * processes,) * 2, ([assignments] * processes,) * 2, received)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, values: Tensor, route: Route
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.tokens = route, len(x)
        # One message: numbers up to 2^24 are exact in float32.
        message = torch.cat([weight.unsqueeze(-1).to(values.dtype), values], 1)
        rows, assignments = route.dispatch(x), route.dispatch_assignments(message)
        gate_weight, other = assignments[:, 0].contiguous(), assignments[:, 1:].contiguous()
        ctx.mark_non_differentiable(other)
        return rows, gate_weight, other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_share, _ = grads
        grad_x = ctx.route.combine(grad_rows, ctx.tokens)
        return None, grad_x, ctx.route.combine_assignments(grad_share), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, route: Route, tokens: int) -> Tensor:
        ctx.route = route
        return route.combine(y, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.route.dispatch(grads[0]), None, None


class AllToAllDispatcher:
    """The exchange of one call of the experts.

    Args:
        group: the processes.
        assignments: of this process's tokens with all experts.
        tokens: T.
        mode: of `EXCHANGE_MODES`; ``fixed_capacity`` if a bound is known, ``auto`` only on a GPU.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, group: ExpertGroup, assignments: Assignments, tokens: int, mode: str = "auto") -> None:
        mode = OLD_MODES.get(mode, mode)
        if mode not in EXCHANGE_MODES:
            raise ValueError(f"there is no exchange {mode!r}: choose one of {', '.join(EXCHANGE_MODES)}")
        self.here = len(group.block(len(assignments.group_sizes)))
        self.widest = -(-len(assignments.group_sizes) // group.size)
        self.assignments, self.tokens = assignments, tokens
        self.to = Destinations(assignments, tokens, group.size)
        bounded = mode == "fixed_capacity" or (mode == "auto" and assignments.token.is_cuda)
        if bounded and assignments.max_per_expert is not None:
            self.route = fixed_capacity(group, self.to, assignments.max_per_expert, self.widest)
        else:
            self.route = dynamic(group, self.to)

    def dispatch(self, x: Tensor) -> tuple[Tensor, Assignments]:
        """Returns the rows that all ranks send here, (S', d), and their assignments to the experts of this rank."""
        # The backward pass must come through here on all processes, also if no input needs a gradient.
        anchor = torch.empty(0, requires_grad=True)
        # An expert counts backwards from the end: 0 is left for assignments that are unused.
        values = torch.stack([self.to.row, self.widest - self.to.expert], 1)
        exact = torch.promote_types(self.assignments.weight.dtype, torch.float32)
        rows, gate_weight, other = _Dispatch.apply(anchor, x, self.assignments.weight, values.to(exact), self.route)
        row, expert = other.long().unbind(1)
        expert = self.widest - expert
        starts = self.route.received[:, 0].cumsum(0) - self.route.received[:, 0]
        row = row + starts.repeat_interleave(self.route.received[:, 1], output_size=len(row))
        order = expert.argsort(stable=True)
        sizes = expert.new_zeros(self.widest + 1).index_add_(0, expert, torch.ones_like(expert))
        return rows, Assignments(row.index_select(0, order), gate_weight.index_select(0, order), sizes[: self.here])

    def combine(self, y: Tensor) -> Tensor:
        """Returns the sum for each token here, (T, d), of what all processes make of its rows, y: (S', d) here."""
        return _Combine.apply(y, self.route, self.tokens)
