"""What layers say of each token, against loops over the tokens and the routers' probabilities."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_ARGS, batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stratified import DIM, make_block
from torch import Tensor

from xmoe_fairseq.analysis.collect import per_token
from xmoe_fairseq.models.recorder import observing
from xmoe_fairseq.moe import ROUTERS, Router

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
                torch.nn.init.normal_(weight, std=1.0)


def one_pass(router: Any, logits: list[float], token: int) -> tuple[list[int], float, float]:
    """One pass of one token by the papers' words: its experts, the first choice's probability, the entropy."""
    kind = next(name for name, made in ROUTERS.items() if type(router) is made)
    if kind == "hash":
        return [token * 2654435761 % 2**32 * router.num_experts // 2**32], 1.0, 0.0
    total = sum(math.exp(value) for value in logits)
    probs = [math.exp(value) / total for value in logits]
    ranked = sorted(range(len(probs)), key=lambda e: -probs[e])
    if kind == "balanced":
        return ranked[:1], 1 / (1 + math.exp(-logits[ranked[0]])), 0.0
    taken = ranked[: router.options.top_k]
    if kind == "threshold":
        taken = []
        while not taken or sum(probs[e] for e in taken) < router.options.threshold:
            taken.append(ranked[len(taken)])
    return taken, probs[ranked[0]], -sum(p * math.log(p) for p in probs)


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
            # A stratum sees its tokens only; a layer sees all rows.
            here = [row for row in inside if stratum[row] == number] if self.strata else list(range(len(real)))
            start = [0, *ends][number] if self.strata else number * experts // len(self.calls[layer])
            assert len(here) == len(x)
            for i, row in enumerate(here):
                if not real[row]:
                    continue
                logits = [] if hasattr(router, "num_experts") else (router.weight.detach() @ x[i]).tolist()
                chosen, probability, entropy = one_pass(router, logits, int(ids[i]))
                for expert in chosen:
                    rows[row]["taken"][start + expert] += 1
                rows[row]["passes"] += 1
                rows[row]["top1_prob"] += probability
                rows[row]["entropy"] += entropy
                stratum[row] = sum(end <= start + chosen[0] for end in ends) + 1
        return rows


def flattened(values: Tensor) -> list[Any]:
    """(batch, length, ...) in the order in which layers see tokens."""
    return values.transpose(0, 1).flatten(0, 1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_per_token_equals_loops_over_the_routers_probabilities(name: str, toy_data: Path) -> None:
    built = build(toy_data, *MODELS[name])
    model = built.model.double().eval()
    sharpen(model)
    naive = Naive(model, (2, 3, 1) if name == "smoe" else ())
    inputs = [sample["net_input"] for sample in batches(built.task)]
    net_input = next(one for one in inputs if (one["src_tokens"] == 1).any() and (one["prev_output_tokens"] == 1).any())
    seen = per_token(model, net_input)
    assert list(seen) == ["encoder.2", "decoder.2"]
    for layer, routing in seen.items():
        tokens = net_input["src_tokens" if layer == "encoder.2" else "prev_output_tokens"]
        rows = naive.rows(layer, [token != 1 for token in flattened(tokens)], routing.taken.shape[-1])
        assert flattened(routing.taken) == [row["taken"] for row in rows]
        assert flattened(routing.experts) == [sum(row["taken"]) for row in rows]
        assert flattened(routing.passes) == [row["passes"] for row in rows]
        assert flattened(routing.top1_prob) == pytest.approx([row["top1_prob"] for row in rows], rel=1e-9)
        if name in ("hash", "balanced"):
            assert routing.entropy is None
        else:
            assert flattened(routing.entropy) == pytest.approx([row["entropy"] for row in rows], rel=1e-9)
        assert len({tuple(row["taken"]) for row in rows}) > 3  # tokens differ
        assert name != "smoe" or len({row["passes"] for row in rows} - {0}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_sums_over_the_tokens_are_the_statistics(name: str, toy_data: Path) -> None:
    built = build(toy_data, *MODELS[name])
    sharpen(built.model)
    sample = batches(built.task)[1]
    seen = per_token(built.model.eval(), sample["net_input"])
    routing = built.model(**sample["net_input"])[1]["routing"]
    for stats in routing["encoder"] + routing["decoder"]:
        one = seen[stats.layer]
        assert one.taken.sum((0, 1)).tolist() == stats.expert_load.tolist()
        assert int(one.experts.sum()) == int(stats.received)
        assert int(one.passes.sum()) == int(stats.passes)
        assert float(one.top1_prob.sum()) == pytest.approx(float(stats.top1_prob), rel=1e-5)


@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from(list(ROUTERS)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_plans_of_fixed_size_say_the_same(tokens: int, seed: int, kind: str, padded: bool) -> None:
    """Plans of a fixed size, as on a GPU, route strata with all rows; the routing of each token is the same."""
    x = torch.randn(tokens, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(tokens) % 3 == 1 if padded else None
    ids = torch.arange(tokens) * 7 + seed
    block = make_block((2, 3, 2), kind).eval()
    one = block(x, padding, ids)[1].token_routing
    for router in block.routers:
        object.__setattr__(router.options, "static", True)
    other = block(x, padding, ids)[1].token_routing
    assert torch.equal(one.taken, other.taken) and torch.equal(one.passes, other.passes)
    torch.testing.assert_close(one.top1_prob, other.top1_prob)
    assert (one.entropy is None) == (other.entropy is None)
    if one.entropy is not None:
        torch.testing.assert_close(one.entropy, other.entropy)


def test_nobody_is_told_in_training_or_decoding(toy_data: Path) -> None:
    built = build(toy_data)
    net_input = batches(built.task)[0]["net_input"]
    seen: list[str] = []
    with observing(built.model, lambda layer, plan: seen.append(layer)):
        built.model.eval()
        out = built.model.encoder(net_input["src_tokens"], net_input["src_lengths"])
        built.model.decoder(net_input["prev_output_tokens"][:, :1], out, incremental_state={})
    assert seen == ["encoder.2"]
    built.model(**net_input)
    assert seen == ["encoder.2"]


def test_a_stock_model_has_no_layers_to_show(toy_data: Path) -> None:
    built = build(toy_data, "--arch", "transformer_tiny", "--share-all-embeddings")
    assert per_token(built.model.eval(), batches(built.task)[0]["net_input"]) == {}
