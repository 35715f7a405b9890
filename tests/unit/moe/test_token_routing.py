"""What layers say of each token, against loops over the tokens and the routers' probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import batches, build
from helpers_routing import MODELS, Naive, flattened, sharpen
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stratified import DIM, make_block

from xmoe_fairseq.models.routing_recorder import observing, per_token
from xmoe_fairseq.moe import ROUTERS


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
