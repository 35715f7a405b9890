"""What a new router needs: plans of any choice, tokens without experts, losses and options of its own, state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NEEDS_TRITON, TINY_ARGS, batches, build
from helpers_routing import sharpen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, StackedMoE, StratifiedMoE
from xmoe_fairseq.moe.routing import base
from xmoe_fairseq.moe.routing.base import LinearRouter, ProbabilityRouter
from xmoe_fairseq.moe.routing.options import declared, router_option
from xmoe_fairseq.moe.routing.plan import RoutingPlan, plan_of
from xmoe_fairseq.moe.routing.statistics import RouterSums, pack, unpack
from xmoe_fairseq.moe.routing.topk import Selection


@dataclass(frozen=True)
class MarginOptions(RouterOptions):
    """Options of `MarginRouter`."""

    margin: float = router_option(0.5, "margin router: an expert is taken if its score is above this", low=0, high=2)


class MarginRouter(LinearRouter):
    """Takes every expert whose score is above a margin, weighted by what is above it; counts the tokens it saw."""

    Options = MarginOptions

    def __init__(self, dim: int, num_experts: int, options: MarginOptions) -> None:
        super().__init__(dim, num_experts, options)
        self.margin = options.margin
        self.register_buffer("noticed", torch.zeros(()))

    def plan(self, logits: Tensor, padding_mask: Tensor | None = None) -> RoutingPlan:
        above = logits - self.margin

        def sums(keep: Tensor) -> RouterSums:
            chosen = (above > 0) & keep.unsqueeze(-1)
            share = above.relu().masked_fill(~keep.unsqueeze(-1), 0.0)
            return RouterSums(
                keep.sum(), chosen.sum(0), share.sum(0), share.new_zeros(()), share.new_zeros(()), 0.1 * share.sum()
            )

        return plan_of(above > 0, above, logits.argmax(-1), padding_mask, sums)

    def notice(self, seen: RouterSums) -> None:
        self.noticed += seen.tokens


class TwoThirdsRouter(ProbabilityRouter):
    """Says with `selection` alone that a token takes two thirds of its mass, two experts at most."""

    normalize = True

    def selection(self) -> Selection:
        return Selection(2, 2 / 3)


def make_layer(margin: float = 0.3, experts: int = 5) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(MarginRouter(6, experts, MarginOptions(margin=margin)), Experts(experts, 6, 4)).double()
    sharpen(layer)
    return layer


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(0, 20), margin=st.floats(0, 3), masked=st.booleans(), static=st.booleans())
def test_plans_of_any_choice_equal_a_loop(tokens: int, margin: float, masked: bool, static: bool) -> None:
    layer = make_layer(margin)
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 6, dtype=torch.double)
    padding = torch.rand(tokens) < 0.3 if masked else None
    logits = x @ layer.router.weight.T
    plan = plan_of(logits > margin, logits, logits.argmax(-1), padding, None, 5 * tokens if static else None)
    y = layer.experts(x, plan)
    idle = 0
    for token in range(tokens):
        expected = torch.zeros(6, dtype=torch.double)
        real = padding is None or not padding[token]
        taken = [e for e in range(5) if real and logits[token, e] > margin]
        for e in taken:
            own = layer.experts
            hidden = torch.relu(own.fc1_weight[e] @ x[token] + own.fc1_bias[e])
            expected += logits[token, e] * (hidden @ own.fc2_weight[e] + own.fc2_bias[e])
        idle += real and not taken
        torch.testing.assert_close(y[token], expected)
        assert plan.token_routing.taken[token].nonzero().flatten().tolist() == taken
    stats = plan.stats
    assert int(stats.idle) == idle and int(stats.received) == int(stats.expert_load.sum()) == int(stats.wanted)
    assert int(stats.tokens) == int(stats.first_choices.sum()) and int(stats.first_dropped) == 0


def test_gradients_reach_the_router_through_the_chosen_weights() -> None:
    layer = make_layer()
    x = torch.randn(7, 6, dtype=torch.double)
    weight = layer.router.weight.detach().requires_grad_()

    def output(weight: Tensor) -> Tensor:
        plan = layer.router.plan(x @ weight.T)
        return torch.cat([layer.experts(x, plan).flatten(), plan.stats.balance_loss[None], plan.stats.own_loss[None]])

    assert torch.autograd.gradcheck(output, (weight,))


@NEEDS_TRITON
def test_routers_that_only_set_limits_have_equal_plans_on_both_paths() -> None:
    router = TwoThirdsRouter(8, 6, RouterOptions(capacity_factor=1.0, min_capacity=1)).train()
    logits = 2 * torch.randn(40, 6)
    plans = []
    for programs in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "routes_on_device", lambda *_, programs=programs: programs)
            plans.append(router.plan(logits, torch.arange(40) > 35))
    ours, expected = plans
    for name in ("token", "group_sizes"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))
    torch.testing.assert_close(ours.weight, expected.weight)
    assert int(ours.stats.first_dropped) == int(expected.stats.first_dropped) > 0


def test_a_router_that_plans_by_itself_never_meets_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "routes_on_device", lambda *_: True)
    monkeypatch.setattr(base, "plan_on_device", None)
    assert int(make_layer().router(torch.randn(4, 6, dtype=torch.double)).stats.tokens) == 4


def test_statistics_of_idle_tokens_and_own_losses_are_merged_and_sent() -> None:
    def margin(experts: int) -> MarginRouter:
        return MarginRouter(6, experts, MarginOptions(margin=2.0))

    torch.manual_seed(1)
    blocks: list[Any] = [
        StratifiedMoE([margin(5), margin(3)], Experts(5, 6, 4), (2, 3)),
        StackedMoE([MoELayer(margin(4), Experts(4, 6, 4)) for _ in range(2)]),
    ]
    for block in blocks:
        sharpen(block)
        _, plan = block(torch.randn(9, 6))
        stats = plan.stats
        assert len(stats.routers) == 2 and stats.idle is not None and stats.idle > 0
        assert stats.idle <= stats.passes
        (back,) = unpack(pack([stats]), [stats])
        assert back.idle == stats.idle and back.gate is None
        torch.testing.assert_close(back.own_loss, stats.own_loss)
    mean = torch.stack([one.own / one.tokens for one in stats.routers]).mean()
    torch.testing.assert_close(stats.own_loss, mean)


def test_options_are_declared_once() -> None:
    @dataclass(frozen=True)
    class Other(RouterOptions):
        margin: float = router_option(0.7, "another margin")

    assert {"margin", "threshold"} < set(declared([RouterOptions, MarginOptions]))
    assert "static" not in declared([RouterOptions])
    with pytest.raises(ValueError, match="two routers have an option 'margin'"):
        declared([MarginOptions, Other])


def test_the_criterion_adds_own_losses_and_tells_routers_in_training_only(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-loss-coeff", "0")
    for layer in (built.model.encoder.layers[1], built.model.decoder.layers[1]):
        layer.moe.router = MarginRouter(32, 8, MarginOptions(margin=0.1))
    sharpen(built.model)
    sample = batches(built.task)[0]
    built.criterion.train()
    _, size, log = built.criterion(built.model.train(), sample)
    plain, _, _ = built.criterion.eval()(built.model.eval(), sample)
    output = built.model(**sample["net_input"])
    cross_entropy = built.criterion.compute_loss(built.model, output, sample)[0]
    own = sum(record.own_loss for records in output[1]["routing"].values() for record in records)
    torch.testing.assert_close(plain, cross_entropy + own * size)
    assert log["enc_own_loss"] > 0 and "dec_idle" in log
    for stack in ("enc", "dec"):
        layer = {"enc": built.model.encoder, "dec": built.model.decoder}[stack].layers[1]
        assert layer.moe.router.noticed == log[f"{stack}_tokens"] > 0  # once: evaluation tells nothing
