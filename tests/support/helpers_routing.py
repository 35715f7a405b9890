"""What MoE layers do with each token, by loops over the tokens and the routers' probabilities."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from helpers import TINY_ARGS
from torch import Tensor

from xmoe_fairseq.moe import ROUTERS, Router
from xmoe_fairseq.moe.routing.base import LinearRouter
from xmoe_fairseq.moe.routing.expert_threshold import ExpertThresholdRouter

MODELS = {
    **{kind: (*TINY_ARGS, "--moe-router", kind) for kind in ROUTERS},
    "cmr": (*TINY_ARGS, "--moe-regularizer", "cmr"),
    "eom": (*TINY_ARGS, "--moe-regularizer", "eom"),
    "stack": (*TINY_ARGS, "--moe-stack", "2"),
    "smoe": (
        *("--arch", "smoe_transformer", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"),
        *("--encoder-layers", "2", "--encoder-attention-heads", "2", "--share-all-embeddings"),
        *("--moe-num-experts", "6", "--moe-strata", "2-3-1"),
    ),
}


def sharpen(model: torch.nn.Module) -> None:
    """Gives routers opinions, so that tokens differ."""
    for module in model.modules():
        if isinstance(module, Router):
            for weight in module.parameters():
                # Thresholds of cosines: most are within [-1, 1].
                torch.nn.init.normal_(weight, std=1.0 if weight.dim() > 1 else 0.2)
            if isinstance(module, ExpertThresholdRouter):
                module.threshold.fill_(0.5)


def entropy_of(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p)


def scored(kind: str, router: Any, logits: list[float], x: list[float]) -> tuple[list[int], float, float]:
    """As `one_pass`, for routers whose scores are no softmax over the experts."""
    scores = [1 / (1 + math.exp(-value)) for value in logits]
    if kind == "topany":
        lengths = [math.hypot(*row) for row in router.weight.tolist()]
        cosines = [value / math.hypot(*x) / length for value, length in zip(logits, lengths, strict=True)]
        scores = [1 / (1 + math.exp(-value)) for value in cosines]
        taken = [e for e, value in enumerate(cosines) if value > float(router.thresholds[e])]
    elif kind == "relu":
        scores = [max(value, 0.0) for value in logits]
        taken = [e for e, value in enumerate(logits) if value > 0]
    elif kind == "expert_threshold":
        taken = [e for e, value in enumerate(scores) if value > 0.5]
    else:
        taken = []
    ranked = sorted(range(len(scores)), key=lambda e: -scores[e])
    if kind == "lossfree":
        taken = ranked[: router.options.top_k]
    if kind == "topany" and not taken:
        taken = ranked[:1]
    total = sum(scores) or 1.0
    return taken, scores[ranked[0]] / total, entropy_of([score / total for score in scores])


def one_pass(router: Any, logits: list[float], token: int, x: list[float]) -> tuple[list[int], float, float]:
    """One pass of one token by the papers' words: its experts, the first choice's probability, the entropy."""
    kind = next(name for name, made in ROUTERS.items() if type(router) is made)
    if kind in ("topany", "relu", "lossfree", "expert_threshold"):
        return scored(kind, router, logits, x)
    if kind == "hash":
        return [token * 2654435761 % 2**32 * router.num_experts // 2**32], 1.0, 0.0
    total = sum(math.exp(value) for value in logits)
    probs = [math.exp(value) / total for value in logits]
    ranked = sorted(range(len(probs)), key=lambda e: -probs[e])
    if kind == "balanced":
        return ranked[:1], 1 / (1 + math.exp(-logits[ranked[0]])), 0.0
    taken = ranked[: router.options.top_k]
    if kind == "null":
        taken, ranked = ([e for e in some if e < router.num_experts] for some in (taken, ranked))
    if kind in ("threshold", "parts"):
        taken = []
        while not taken or sum(probs[e] for e in taken) < router.options.threshold:
            taken.append(ranked[len(taken)])
    return taken, probs[ranked[0]], entropy_of(probs)


def weights_of(router: Any) -> Tensor:
    """The rows that scores are made of, those of null experts last."""
    rows: Tensor = torch.cat([router.weight, *([router.null_weight] if hasattr(router, "null_weight") else [])])
    return rows.detach()


class Naive:
    """Watches the routers of a model, and adds up by loops what each layer did with each token.

    Attributes:
        layers: by layer, one tally a row (``taken``, ``passes``, ``top1_prob``, ``entropy``); empty for padding.
    """

    def __init__(self, model: torch.nn.Module, strata: tuple[int, ...] = ()) -> None:
        self.strata = strata
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        for layer in [module for module in model.modules() if hasattr(module, "moe_name")]:
            for router in [module for module in layer.modules() if isinstance(module, Router)]:
                router.register_forward_hook(partial(self._hook, layer.moe_name))

    def _hook(self, name: str, router: Any, given: tuple[Any, ...], plan: Any) -> None:
        self.calls.setdefault(name, []).append((router, *given))

    def rows(self, layer: str, real: list[bool], experts: int) -> list[dict[str, Any]]:
        rows = [{"taken": [0] * experts, "passes": 0, "top1_prob": 0.0, "entropy": 0.0} for _ in real]
        inside = [row for row in range(len(real)) if real[row]]
        ends = list(accumulate(self.strata))
        stratum = dict.fromkeys(inside, 0)  # that each token enters next
        for number, (router, x, _, ids) in enumerate(self.calls[layer]):
            # A stratum sees its tokens only; a layer sees all rows, and so does the first stratum.
            alone = self.strata and number > 0
            here = [row for row in inside if stratum[row] == number] if alone else list(range(len(real)))
            start = [0, *ends][number] if self.strata else number * experts // len(self.calls[layer])
            assert len(here) == len(x)
            for i, row in enumerate(here):
                if not real[row]:
                    continue
                logits = (weights_of(router) @ x[i]).tolist() if isinstance(router, LinearRouter) else []
                chosen, probability, entropy = one_pass(router, logits, int(ids[i]), x[i].tolist())
                for expert in chosen:
                    rows[row]["taken"][start + expert] += 1
                rows[row]["passes"] += 1
                rows[row]["top1_prob"] += probability
                rows[row]["entropy"] += entropy
                if ends:
                    stratum[row] = sum(end <= start + chosen[0] for end in ends) + 1
        return rows


def flattened(values: Tensor) -> list[Any]:
    """(batch, length, ...) in the order in which layers see tokens."""
    return values.transpose(0, 1).flatten(0, 1).tolist()
