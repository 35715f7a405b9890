"""What routers may be told."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import declared
from ..options import option as router_option

__all__ = ["RouterOptions", "declared", "router_option"]


@dataclass(frozen=True)
class RouterOptions:
    """What a router may be told; each takes what concerns it.

    A router with options of its own has them in a subclass, which it names in ``Router.Options``.

    Attributes:
        threshold: probability mass, in [0, 1], that a token's experts must reach (threshold router).
        top_k: experts per token, at least 1 (top-k, loss-free and null routers), or their mean (ReLU and expert
            threshold).
        weights: what weighs the experts' outputs: ``raw``, the probabilities, or ``normalized``, the probabilities
            divided by their sum over a token's experts.
        balance: what the balance loss counts as an expert's load: ``first``, the tokens whose first choice it is;
            ``chosen``, all tokens that choose it; ``cost``, those times the cost of the expert beside the mean.
        shift: is subtracted from each score before it is compared, so that a larger one means fewer experts (topany,
            relu, null and expert_threshold routers).
        capacity_factor: in training, an expert takes at most this multiple of the mean load per expert
            if every token took one; 0 drops nothing. Evaluation never drops.
        min_capacity: tokens that an expert may always take, at least 0.
        second_expert: how GShard takes the second expert in training: ``gate``, the second most probable, or
            ``sampling``, at random by probability. Evaluation always takes the most probable.
        static: make plans whose size follows from the input's, where a bound is known, so that nothing is read
            back from the device; None does so on devices other than the CPU.
    """

    threshold: float = router_option(
        0.9,
        "threshold router: a token takes its most probable experts until their probability mass reaches this; "
        "0 takes one expert, 1 takes all",
        low=0,
        high=1,
        alias="--threshold",
    )
    top_k: int = router_option(
        2,
        "experts per token: of topk and lossfree routers; of null routers, null experts included; of relu and "
        "expert_threshold routers, on average",
        low=1,
        alias="--moe-k",
    )
    capacity_factor: float = router_option(
        0.0,
        "in training, an expert takes at most this multiple of (tokens / experts) tokens and drops the rest, lower "
        "choices first; 0 disables dropping; evaluation never drops",
        low=0,
        alias="--capacity-factor",
    )
    min_capacity: int = router_option(4, "least capacity of an expert, in tokens, whatever the capacity factor", low=0)
    second_expert: str = router_option(
        "gate",
        "gshard router, in training: the second expert is the second most probable (gate) or sampled by probability "
        "(sampling)",
        choices=("gate", "sampling"),
    )
    static: bool | None = None
    weights: str = router_option(
        "raw",
        "threshold and topk routers: the experts' outputs are weighted by the probabilities (raw), or by these divided "
        "by their sum over a token's experts (normalized)",
        choices=("raw", "normalized"),
    )
    balance: str = router_option(
        "first",
        "threshold and topk routers: the balance loss counts each token's first choice (first), all its choices "
        "(chosen), or these times the FLOPs of the expert, beside the mean, for experts of different sizes (cost)",
        choices=("first", "chosen", "cost"),
    )
    shift: float = router_option(
        0.0,
        "topany, relu, null and expert_threshold routers: subtracted from the scores before they are compared; larger "
        "means fewer experts, and it can be changed after training",
        low=-1000,
        high=1000,
    )
