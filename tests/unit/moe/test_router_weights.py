"""``--moe-weights`` and ``--moe-balance``: what weighs experts, and what the balance loss calls load."""

from __future__ import annotations

import pytest
import torch
from helpers import NEEDS_TRITON

from xmoe_fairseq.moe import EXPERTS, ROUTERS, ExpertOptions, MoELayer, RouterOptions, make_experts
from xmoe_fairseq.moe.routing import base

PADDING = torch.arange(30) > 25


def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(30, 6)


@NEEDS_TRITON
@pytest.mark.parametrize("kind", ["threshold", "topk"])
@pytest.mark.parametrize("capacity", [0.0, 1.0])
@pytest.mark.parametrize("balance", ["first", "chosen", "cost"])
def test_load_is_counted_before_capacity_on_both_paths(
    kind: str, capacity: float, balance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RouterOptions(0.8, 2, weights="normalized", balance=balance, capacity_factor=capacity, min_capacity=1)
    router = ROUTERS[kind](8, 6, options).train()
    router.learn_costs([1, 1, 2, 2, 4, 4])
    plans = [router.plan(logits(), PADDING)]
    monkeypatch.setattr(base, "routes_on_device", lambda *_: True)
    plans.append(router.plan(logits(), PADDING))
    free = ROUTERS[kind](8, 6, RouterOptions(0.8, 2)).plan(logits(), PADDING).stats
    expected = free.first_choices if balance == "first" else free.expert_load.double()
    if balance == "cost":
        expected = expected * torch.tensor([1, 1, 2, 2, 4, 4]) * 6 / 14
    for plan in plans:
        torch.testing.assert_close(plan.stats.routers[0].load.double(), expected.double())
        sums = torch.zeros(30).index_add(0, plan.token, plan.weight)
        torch.testing.assert_close(sums, (sums > 0).float())
    assert torch.equal(plans[0].token, plans[1].token)
    assert (plans[0].stats.received < free.received) == (capacity > 0)


def test_costs_are_those_of_the_layer_and_keep_their_precision() -> None:
    experts = make_experts(EXPERTS["ffn"], 4, 8, 16, ExpertOptions(expert_sizes="hybrid"))
    layer = MoELayer(ROUTERS["threshold"](8, 4, RouterOptions(balance="cost")), experts).half()
    assert layer.router.weight.dtype == torch.half and layer.router.costs.dtype == torch.double
    relative = torch.tensor(experts.sizes) / (sum(experts.sizes) / 4)
    torch.testing.assert_close(layer.router.costs.float(), relative)
    assert "router.costs" not in layer.state_dict()


def test_routers_that_do_not_read_the_options_stay_as_they_are() -> None:
    told = RouterOptions(weights="normalized", balance="chosen")
    for kind in ("gshard", "switch", "parts"):
        plans = [ROUTERS[kind](8, 6, options).eval().plan(logits()) for options in (RouterOptions(), told)]
        assert torch.equal(plans[0].weight, plans[1].weight)
        assert torch.equal(plans[0].stats.balance_loss, plans[1].stats.balance_loss)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k 1: the weight would always be 1"):
        ROUTERS["topk"](8, 6, RouterOptions(top_k=1, weights="normalized"))
    with pytest.raises(ValueError, match="balance 'all' is unknown: choose from first, chosen, cost"):
        ROUTERS["topk"](8, 6, RouterOptions(balance="all"))
