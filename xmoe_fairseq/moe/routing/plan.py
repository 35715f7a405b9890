"""RoutingPlan: which token goes to which expert with which weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .assignments import Assignments
from .statistics import RouterSums, RoutingStats, TokenRouting, entropy
from .topk import RankedProbs


@dataclass(frozen=True)
class RoutingPlan(Assignments):
    """The chosen assignments of one call, and what else a router has to say.

    Attributes:
        first: (T,) int64, each token's first choice, whether or not it was dropped; arbitrary for padding.
        num_tokens: T, the rows of the layer's input, padding included.
        count: makes `stats`.
        trace: makes `token_routing`.
        rows: (T, d), the layer's input as it comes from the router, so that its gradients meet there; None if the
            experts take the input itself.
    """

    first: Tensor
    num_tokens: int
    count: Callable[[], RoutingStats]
    trace: Callable[[], TokenRouting]
    rows: Tensor | None = None

    @cached_property
    def stats(self) -> RoutingStats:
        """Sums for losses and logs, made when they are first asked for: decoding never does."""
        return self.count()

    @cached_property
    def token_routing(self) -> TokenRouting:
        """What was done with each token, made when it is first asked for: only analysis does."""
        return self.trace()


def make_plan(
    ranked: RankedProbs,
    chosen: Tensor,
    padding_mask: Tensor | None = None,
    capacity: Callable[[Tensor], Tensor] | None = None,
    normalize: bool = False,
    max_assignments: int | None = None,
    max_per_expert: int | None = None,
    measures_entropy: bool = False,
    load_of: Callable[[Tensor], Tensor] | None = None,
) -> RoutingPlan:
    """Turns the choice of ranks into a plan, and drops what exceeds the experts' capacity.

    Args:
        ranked: probabilities and their order.
        chosen: (T, R) bool; ``chosen[t, r]`` says that token t takes the expert of its rank r.
        padding_mask: (T,) bool, true for padding, which is neither routed nor counted.
        capacity: gives the most tokens an expert takes, from the number of real tokens; None drops nothing.
        normalize: divide a token's weights by their sum after dropping.
        max_assignments: a bound of the number of assignments. The plan then has that many, the unused ones last and
            with weight 0, and no number is read back from the device; None makes a plan of exactly the chosen
            assignments.
        max_per_expert: a bound of the assignments of one expert, if one is known.
        measures_entropy: add up the entropies of the tokens' probabilities, which costs a pass over (T, E).
        load_of: makes what the balance loss calls load, (E,), from the tokens that choose each expert, (E,), before
            capacity; None takes the tokens whose first choice each expert is.
    """
    tokens, num_experts = ranked.probs.shape
    if padding_mask is not None:
        chosen = chosen & ~padding_mask.unsqueeze(-1)
    # Transposed in memory, for so it is read to group tokens.
    wanted = chosen.new_zeros(num_experts, tokens).t().scatter_(1, ranked.order, chosen)
    received = wanted
    if capacity is not None:
        received = wanted & (_place_in_expert(ranked, wanted) < capacity(real_tokens(padding_mask, chosen).sum()))

    expert, token, load, used = _grouped(received, max_assignments)
    weight = ranked.probs.reshape(-1).index_select(0, token * num_experts + expert)
    if used is not None:
        weight = weight.masked_fill(~used, 0.0)
    if normalize:
        total = weight.new_zeros(tokens).index_add(0, token, weight).index_select(0, token)
        weight = weight / (total if used is None else total.masked_fill(~used, 1.0))

    def balanced() -> Tensor | None:
        return None if load_of is None else load_of(load if capacity is None else wanted.sum(0))

    return RoutingPlan(
        token=token,
        weight=weight,
        group_sizes=load,
        first=ranked.order[:, 0],
        num_tokens=tokens,
        count=partial(_statistics, ranked, chosen, received, load, balanced, padding_mask, measures_entropy),
        max_per_expert=max_per_expert,
        trace=partial(token_routing, ranked, lambda: received, padding_mask),
    )


def plan_of(
    chosen: Tensor,
    weights: Tensor,
    first: Tensor,
    padding_mask: Tensor | None = None,
    sums: Callable[[Tensor], RouterSums] | None = None,
    max_assignments: int | None = None,
    max_per_expert: int | None = None,
    probs: Tensor | None = None,
) -> RoutingPlan:
    """Makes a plan of any choice; a token may choose no expert.

    Args:
        chosen: (T, E) bool, which experts each token takes.
        weights: (T, E) shares of their outputs, with their gradient; looked at where ``chosen`` is true.
        first: (T,) int64, the expert that fits each token best, whether it takes it or not.
        padding_mask: (T,) bool, true for padding, which is neither routed nor counted.
        sums: makes what the auxiliary losses are computed from, given which tokens are real, (T,) bool; None for a
            router without such losses.
        max_assignments: as in `make_plan`.
        max_per_expert: as in `make_plan`.
        probs: (T, E) or more columns, what statistics take for probabilities; None takes ``weights`` for those of the
            first choices, and measures no entropy.
    """
    keep = real_tokens(padding_mask, weights)
    taken = chosen & keep.unsqueeze(-1)
    expert, token, load, used = _grouped(taken, max_assignments)
    weight = weights.reshape(-1).index_select(0, token * weights.shape[1] + expert)
    if used is not None:
        weight = weight.masked_fill(~used, 0.0)
    shares = (weights if probs is None else probs).detach()
    top1 = shares.gather(1, first.unsqueeze(-1)).squeeze(-1).masked_fill(~keep, 0.0)

    def count() -> RoutingStats:
        real = keep.sum()
        return RoutingStats(
            tokens=real,
            wanted=load.sum(),
            received=load.sum(),
            passes=real,
            first_dropped=torch.zeros_like(real),
            top1_prob=top1.sum(),
            expert_load=load,
            first_choices=torch.zeros_like(load).index_add_(0, first, keep.to(load.dtype)),
            routers=() if sums is None else (sums(keep),),
            idle=(keep & ~taken.any(-1)).sum(),
        )

    def trace() -> TokenRouting:
        entropies = None if probs is None else entropy(shares).masked_fill(~keep, 0.0)
        return TokenRouting(taken.long(), keep.long(), top1, entropies)

    return RoutingPlan(token, weight, load, first, len(first), count, trace, max_per_expert=max_per_expert)


def assign(
    expert: Tensor,
    weight: Tensor,
    num_experts: int,
    padding_mask: Tensor | None = None,
    max_assignments: int | None = None,
) -> RoutingPlan:
    """Makes the plan in which each real token takes the one expert it is told, without auxiliary losses.

    Args:
        expert: (T,) int64.
        weight: (T,) share of the expert's output.
        num_experts: E.
        padding_mask: (T,) bool, true for padding.
        max_assignments: as in `make_plan`.
    """
    keep = real_tokens(padding_mask, weight)
    one_hot = torch.nn.functional.one_hot(expert, num_experts).bool() & keep.unsqueeze(-1)
    _, token, load, used = _grouped(one_hot, max_assignments)

    def count() -> RoutingStats:
        real = keep.sum()
        return RoutingStats(
            tokens=real,
            wanted=real,
            received=real,
            first_dropped=torch.zeros_like(real),
            top1_prob=weight.detach().masked_fill(~keep, 0.0).sum(),
            expert_load=load,
            first_choices=load,
            passes=real,
        )

    gate_weight = weight.index_select(0, token)
    if used is not None:
        gate_weight = gate_weight.masked_fill(~used, 0.0)
    return RoutingPlan(
        token,
        gate_weight,
        load,
        expert,
        len(expert),
        count,
        trace=lambda: TokenRouting(one_hot.long(), keep.long(), weight.masked_fill(~keep, 0.0), None),
    )


def _grouped(received: Tensor, max_assignments: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Lists the assignments of a choice (T, E) by expert, then by token.

    Returns:
        Each assignment's expert and token, the assignments of each expert, and which of the list are assignments; None
        if all are.
    """
    # Row-major order of the transposed mask is sorted by expert: no sort is needed to group tokens.
    if max_assignments is None:
        expert, token = received.t().nonzero(as_tuple=True)
        return expert, token, expert.bincount(minlength=received.shape[1]), None
    load = received.sum(0)
    expert, token = torch.nonzero_static(received.t(), size=max_assignments, fill_value=0).unbind(-1)
    return expert, token, load, torch.arange(max_assignments, device=token.device) < load.sum()


def real_tokens(padding_mask: Tensor | None, like: Tensor) -> Tensor:
    """Returns which of the rows of ``like`` are no padding: (T,) bool."""
    return ~padding_mask if padding_mask is not None else like.new_ones(like.shape[0], dtype=torch.bool)


def _place_in_expert(ranked: RankedProbs, wanted: Tensor) -> Tensor:
    """Numbers the tokens that want an expert: lower ranks first, within a rank the higher probability.

    Returns:
        (T, E) int64, the 0-based place of each token in each expert's queue.
    """
    ranks = torch.arange(ranked.order.shape[1], device=wanted.device).expand_as(ranked.order)
    rank_of_expert = torch.zeros_like(wanted, dtype=torch.long).scatter_(1, ranked.order, ranks)
    # Probabilities are at most 1, so twice the rank keeps ranks apart; float64 keeps equal ranks exact.
    key = (2.0 * rank_of_expert.double() - ranked.probs.detach().double()).masked_fill(~wanted, torch.inf)
    queue = key.argsort(dim=0, stable=True)
    places = torch.arange(wanted.shape[0], device=wanted.device).unsqueeze(-1).expand_as(queue)
    return torch.empty_like(queue).scatter(0, queue, places)


def _statistics(
    ranked: RankedProbs,
    wanted: Tensor,
    received: Tensor,
    load: Tensor,
    balanced: Callable[[], Tensor | None],
    padding_mask: Tensor | None,
    measures_entropy: bool,
) -> RoutingStats:
    keep = real_tokens(padding_mask, ranked.probs)
    real, first = keep.sum(), ranked.order[:, 0]
    first_choices = torch.zeros_like(load).index_add_(0, first, keep.to(load.dtype))
    # That is logsumexp, without a pass over all logits: log p = logit - logsumexp.
    log_sums = ranked.logits.gather(1, first.unsqueeze(-1)) - ranked.probs.gather(1, first.unsqueeze(-1)).log()
    probs, squares = ranked.probs, log_sums.squeeze(-1).square()
    top1_prob = ranked.sorted[:, 0]
    if padding_mask is not None:
        probs = probs.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        squares, top1_prob = squares.masked_fill(padding_mask, 0.0), top1_prob.masked_fill(padding_mask, 0.0)
    entropies = entropy_sum(ranked.logits, ranked.probs, padding_mask) if measures_entropy else squares.new_zeros(())
    dropped = keep & ~received.gather(1, first.unsqueeze(-1)).squeeze(-1)
    balance_load = balanced()
    return RoutingStats(
        tokens=real,
        wanted=wanted.sum(),
        received=load.sum(),
        first_dropped=dropped.sum(),
        top1_prob=top1_prob.sum(),
        expert_load=load,
        first_choices=first_choices,
        passes=real,
        routers=(
            RouterSums(
                real,
                first_choices if balance_load is None else balance_load,
                probs.sum(0),
                squares.sum(),
                entropies,
            ),
        ),
    )


def entropy_sum(logits: Tensor, probs: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Adds up the entropies, in nats, of the real tokens' probabilities: (); both are (T, E).

    ``log_softmax`` stays finite where a probability underflows to 0, and so does their product. The logarithm needs no
    gradient, because ``sum_e p_e d(log p_e) = d(sum_e p_e) = 0``.
    """
    entropies = -(probs * F.log_softmax(logits.detach(), dim=-1)).sum(-1)
    return (entropies if padding_mask is None else entropies.masked_fill(padding_mask, 0.0)).sum()


def token_routing(ranked: RankedProbs, received: Callable[[], Tensor], padding_mask: Tensor | None) -> TokenRouting:
    """Returns what was done with each token.

    Args:
        ranked: probabilities and the first choices.
        received: makes the assignments that were left, (T, E) bool.
        padding_mask: (T,) bool, true for padding.
    """
    keep = real_tokens(padding_mask, ranked.probs)
    return TokenRouting(
        taken=received().long(),
        passes=keep.long(),
        top1_prob=ranked.sorted[:, 0].masked_fill(~keep, 0.0),
        entropy=entropy(ranked.probs).masked_fill(~keep, 0.0),
    )
