"""What one MoE layer did in one forward pass: as sums that stay on the device, and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import balance_loss, entropy_loss, z_loss


class RouterSums(NamedTuple):
    """What the auxiliary losses of one router are computed from: sums over the real tokens that it routed.

    Attributes:
        tokens: () their number.
        load: (E,) what the balance loss calls the load of an expert: tokens whose first choice it was, before capacity,
            unless the router has another measure.
        probs: (E,) probabilities, or what the router has in their place, with their gradient.
        squares: () squared log-sum-exp of the logits, with its gradient.
        entropy: () entropies of the probabilities in nats, with their gradient; 0 if the router does not measure
            them.
        own: () a loss of the router's own, its coefficient included, times ``tokens``, with its gradient; None if it
            has none.
        seen: what else `Router.notice` is told, of any shape; None if that is all.
    """

    tokens: Tensor
    load: Tensor
    probs: Tensor
    squares: Tensor
    entropy: Tensor
    own: Tensor | None = None
    seen: Tensor | None = None


class Ratio(NamedTuple):
    """How a sum is shown.

    Attributes:
        name: of the metric, without the stack.
        per: the sum that it is divided by.
        digits: after the point.
    """

    name: str
    per: str
    digits: int


def _sum(name: str = "", per: str = "tokens", digits: int = 3, **more: Any) -> Any:
    """Declares a sum over tokens; with a name, one that is logged."""
    return field(metadata={"sum": True, "ratio": Ratio(name, per, digits) if name else None}, **more)


def _per_expert() -> Any:
    """Declares a sum over tokens for each expert."""
    return field(metadata={"per_expert": True})


@dataclass(frozen=True)
class RoutingStats:
    """Sums over the real (unpadded) tokens of one call of one MoE layer.

    All are tensors on the layer's device, so that collecting them never waits for it; ratios are
    taken where they are shown. Only the losses' sums and CMR's gate carry gradients.
    A sum that is added here is merged over strata and stacked layers, added up over processes, and logged.

    Attributes:
        tokens: () real tokens routed.
        wanted: () (token, expert) assignments that the router chose.
        received: () assignments left after capacity; these are computed.
        passes: () how often a token was routed, added up: ``tokens``, or more in a stratified layer, where
            ``passes / tokens`` is the requested capacity (RC).
        first_dropped: () tokens whose first choice was dropped by capacity.
        top1_prob: () sum of the first choice's probability.
        expert_load: (E,) assignments computed by each expert.
        first_choices: (E,) tokens whose first choice the expert was, before capacity.
        routers: what the auxiliary losses are computed from; one per stratum or stacked layer, none where routers have
            no such losses.
        gate: () sum of CMR's gate over the real tokens, with its gradient; None without CMR.
        idle: () tokens that chose no expert, added up over the passes; None if the router always chooses one.
        hidden: () hidden units computed, added up over the assignments; None if all experts have one size.
        layer: which layer it was, e.g. ``encoder.1``; empty until a model names it.
    """

    tokens: Tensor = _sum()
    wanted: Tensor = _sum("experts_wanted")
    received: Tensor = _sum("experts")
    passes: Tensor = _sum("rc")
    first_dropped: Tensor = _sum("first_dropped", per="passes", digits=4)
    top1_prob: Tensor = _sum("top1_prob", per="passes")
    expert_load: Tensor = _per_expert()
    first_choices: Tensor = _per_expert()
    routers: tuple[RouterSums, ...] = ()
    gate: Tensor | None = _sum("gate", default=None)
    idle: Tensor | None = _sum("idle", per="passes", digits=4, default=None)
    hidden: Tensor | None = _sum("hidden", digits=1, default=None)
    layer: str = ""

    @cached_property
    def balance_loss(self) -> Tensor:
        """() E * sum_e f_e P_e, the balance loss of this call: the mean of the routers that received a token."""
        return self._mean([balance_loss(one.probs, one.load, one.tokens) for one in self.routers])

    @cached_property
    def z_loss(self) -> Tensor:
        """() mean squared log-sum-exp of the router's logits: the mean of the routers that received a token."""
        return self._mean([z_loss(one.squares, one.tokens) for one in self.routers])

    @cached_property
    def entropy_loss(self) -> Tensor:
        """() mean entropy of the router's probabilities: the mean of the routers that received a token.

        It is 0 if routers do not measure it.
        """
        return self._mean([entropy_loss(one.entropy, one.tokens) for one in self.routers])

    @cached_property
    def own_loss(self) -> Tensor:
        """() the routers' own losses: the mean of the routers that received a token; 0 if they have none."""
        zero = self.top1_prob.new_zeros(())
        return self._mean([zero if one.own is None else one.own / one.tokens.clamp(min=1) for one in self.routers])

    def _mean(self, losses: list[Tensor]) -> Tensor:
        if len(losses) <= 1:
            return losses[0] if losses else self.top1_prob.new_zeros(())
        entered = torch.stack([one.tokens > 0 for one in self.routers]).sum().clamp(min=1)
        return torch.stack(losses).sum() / entered


SUMS = tuple(one.name for one in fields(RoutingStats) if one.metadata.get("sum"))
# None if a layer does not have them.
OPTIONAL = tuple(one.name for one in fields(RoutingStats) if one.name in SUMS and one.default is None)
PER_EXPERT = tuple(one.name for one in fields(RoutingStats) if one.metadata.get("per_expert"))
# By the name of the sum.
RATIOS: dict[str, Ratio] = {
    one.name: one.metadata["ratio"] for one in fields(RoutingStats) if one.metadata.get("ratio")
}


def merge(parts: Sequence[RoutingStats], per_expert: Callable[[list[Tensor]], Tensor], tokens: Tensor) -> RoutingStats:
    """Makes one record of what several routers did with the same tokens.

    Args:
        parts: one record per router.
        per_expert: joins their sums for each expert.
        tokens: () how many tokens there are.
    """
    sums: dict[str, Any] = {}
    for name in (one for one in SUMS if one != "tokens"):
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        sums[name] = torch.stack(values).sum() if values else None
    sums |= {name: per_expert([getattr(part, name) for part in parts]) for name in PER_EXPERT}
    routers = tuple(router for part in parts for router in part.routers)
    return RoutingStats(**sums, tokens=tokens, routers=routers)


def pack(records: Sequence[RoutingStats]) -> Tensor:
    """Puts all sums into one vector (n,) of float64, to be added up over processes at once."""
    return torch.cat([part.reshape(-1).double() for record in records for part in _parts(record)])


def unpack(vector: Tensor, like: Sequence[RoutingStats]) -> list[RoutingStats]:
    """Returns the records that `pack` made a vector of, with the vector's values and gradients.

    Args:
        vector: (n,).
        like: what was packed, or records of the same layers.
    """
    parts = [part for record in like for part in _parts(record)]
    pieces = vector.split([part.numel() for part in parts])
    values = (piece.to(part.dtype).view_as(part) for piece, part in zip(pieces, parts, strict=True))
    return [_rebuilt(record, values) for record in like]


def _parts(record: RoutingStats) -> Iterator[Tensor]:
    for one in fields(record):
        value = getattr(record, one.name)
        if one.name == "routers":
            yield from (part for router in value for part in router if part is not None)
        elif isinstance(value, Tensor):
            yield value


def _rebuilt(record: RoutingStats, values: Iterator[Tensor]) -> RoutingStats:
    """Takes the next values for a record, in the order of `_parts`."""
    changed: dict[str, Any] = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if one.name == "routers":
            changed["routers"] = tuple(
                RouterSums._make(None if part is None else next(values) for part in router) for router in value
            )
        elif isinstance(value, Tensor):
            changed[one.name] = next(values)
    return replace(record, **changed)


@dataclass(frozen=True)
class TokenRouting:
    """What one call of one MoE layer did with each token; padding has zeros everywhere.

    Summed over the tokens, ``taken``, ``passes`` and ``top1_prob`` are `RoutingStats`' ``expert_load``, ``passes``
    and ``top1_prob``. A model gives (batch, length, ...) instead of (T, ...).

    Attributes:
        taken: (T, E) int64, how often each expert was computed for the token: more than once only where several
            strata choose it. Stacked layers have their experts one after the other.
        passes: (T,) int64, how often the token was routed: its requested capacity (RC) in a stratified layer.
        top1_prob: (T,) probability of the first choice, added up over the passes.
        entropy: (T,) entropy of the router's probabilities in nats, added up over the passes; None for routers that
            do not choose by probability (hash, balanced).
    """

    taken: Tensor
    passes: Tensor
    top1_prob: Tensor
    entropy: Tensor | None

    @property
    def experts(self) -> Tensor:
        """(T,) int64, experts computed for each token."""
        return self.taken.sum(-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenRouting:
        """Changes every tensor."""
        entropy = None if self.entropy is None else change(self.entropy)
        return TokenRouting(change(self.taken), change(self.passes), change(self.top1_prob), entropy)


def add_up(parts: Sequence[TokenRouting], taken: Tensor) -> TokenRouting:
    """Adds up what several routers did with the same tokens, but for ``taken``, which is given."""
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TokenRouting(
        taken=taken,
        passes=torch.stack([part.passes for part in parts]).sum(0),
        top1_prob=torch.stack([part.top1_prob for part in parts]).sum(0),
        entropy=torch.stack(entropies).sum(0) if entropies else None,
    )


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of distributions (..., E), an impossible choice counting 0: (...)."""
    return torch.special.entr(probs).sum(-1)
