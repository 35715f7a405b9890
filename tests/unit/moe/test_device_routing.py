"""Routing by Triton programs, against routing by torch: interpreted without a GPU, compiled with one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import NEEDS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, StratifiedMoE
from xmoe_fairseq.moe.routing import base, fp32_logits
from xmoe_fairseq.moe.routing.plan import RoutingPlan

OPTIONS = {
    "threshold": RouterOptions(threshold=0.7),
    "threshold with capacity": RouterOptions(threshold=0.8, capacity_factor=1.0, min_capacity=1),
    "threshold of 1": RouterOptions(threshold=1.0),
    "topk with capacity": RouterOptions(top_k=1, capacity_factor=0.8, min_capacity=0),
    "gshard": RouterOptions(),
    "gshard with capacity": RouterOptions(capacity_factor=0.6, min_capacity=1),
    "switch with capacity": RouterOptions(capacity_factor=1.0),
}
pytestmark = NEEDS_TRITON
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(route: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What a function gives with the programs, and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "routes_on_device", lambda *_: True)
        ours = route()
        patch.setattr(base, "routes_on_device", lambda *_: False)
        return ours, route()


def facts(plan: RoutingPlan, logits: Tensor, padding: Tensor | None) -> list[Tensor]:
    """All that a plan says, and the gradient of a function of it."""
    used = int(plan.group_sizes.sum())
    factor = torch.linspace(-1, 1, used, device=logits.device)
    stats = plan.stats
    ((plan.weight[:used] * factor).sum() + stats.balance_loss + stats.z_loss + stats.entropy_loss).backward()
    real = slice(None) if padding is None else ~padding
    counts = (stats.tokens, stats.wanted, stats.received, stats.first_dropped, stats.top1_prob, stats.passes)
    pairs = (plan.token[:used], plan.weight[:used], plan.group_sizes, plan.first[real], plan.weight[used:])
    routing = plan.token_routing
    assert logits.grad is not None
    losses, loads = (stats.entropy_loss.detach(),), (stats.expert_load, stats.first_choices)
    return [*pairs, *counts, *losses, *loads, logits.grad, routing.taken, routing.top1_prob]


def check(name: str, logits: Tensor, padding: Tensor | None, training: bool, static: bool) -> None:
    options = RouterOptions(**(vars(OPTIONS[name]) | {"static": static}))
    router = ROUTERS[name.split()[0]](8, logits.shape[1], options).train(training)
    router.measures_entropy = True

    def route() -> list[Tensor]:
        given_logits = logits.clone().requires_grad_()
        return facts(router.plan(given_logits, padding), given_logits, padding)

    ours, expected = both(route)
    if not static:  # then there is nothing unused
        del ours[4], expected[4]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@given(
    tokens=st.integers(0, 50),
    experts=st.sampled_from([1, 2, 3, 8, 40]),
    padded=st.booleans(),
    equal=st.booleans(),
    training=st.booleans(),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_plans_are_those_of_torch(
    name: str, tokens: int, experts: int, padded: bool, equal: bool, training: bool, static: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    if equal:  # tokens like others, and experts like others
        logits[:, experts - experts // 2 :] = logits[:, : experts // 2]
        logits = logits[torch.arange(tokens) % 5]
    padding = torch.rand(tokens, generator=generator) < 0.3 if padded else None
    check(name, logits.to(DEVICE), None if padding is None else padding.to(DEVICE), training, static)


@pytest.mark.parametrize("padded", [False, True])
def test_capacity_keeps_the_right_ones_of_many(padded: bool) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(5000, 6)
    logits[:, 2] += 3
    padding = torch.rand(5000) < 0.3 if padded else None
    check("threshold with capacity", logits.to(DEVICE), None if padding is None else padding.to(DEVICE), True, True)


def test_what_is_no_number_reaches_every_expert() -> None:
    logits = torch.randn(4, 3, device=DEVICE)
    logits[1, 2] = torch.nan
    router = ROUTERS["threshold"](8, 3, RouterOptions(threshold=0.3))
    ours, expected = both(lambda: [router.plan(logits).token, router.plan(logits).weight])
    assert torch.equal(ours[0], expected[0])
    assert int(ours[1].isnan().sum()) == int(expected[1].isnan().sum()) == 3


@pytest.mark.parametrize("kind", ["threshold", "gshard", "switch"])
def test_strata_are_those_of_torch(kind: str) -> None:
    sizes = (3, 2, 2)
    options = RouterOptions(threshold=0.6, capacity_factor=1.0, min_capacity=1, static=True)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        rest = [ROUTERS[kind](16, sum(sizes[i:]), options) for i in range(len(sizes))]
        for router in rest:
            router.measures_entropy = True
        block: nn.Module = StratifiedMoE(rest, Experts(7, 16, 32, kernel="triton"), sizes).to(DEVICE)
        x = torch.randn(40, 16, device=DEVICE, requires_grad=True)
        y, plan = block(x)
        assert plan.stats.entropy_loss > 0.5
        (y.square().sum() + plan.stats.balance_loss + plan.stats.entropy_loss).backward()
        return [y.detach(), plan.passes, x.grad, *(p.grad for p in block.parameters())]

    for one, other in zip(*both(run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["threshold", "gshard with capacity", "switch with capacity"])
def test_a_layer_whose_router_multiplies_in_its_programs_function_is_that_of_torch(name: str, padded: bool) -> None:
    """The way of bf16 on a GPU, in float32: the input's gradients by the experts and by the router meet there."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 16, generator=generator).to(DEVICE)
    padding = (torch.rand(50, generator=generator) < 0.3).to(DEVICE) if padded else None

    def run(kernel: str) -> list[Tensor]:
        torch.manual_seed(0)
        router = ROUTERS[name.split()[0]](16, 5, OPTIONS[name])
        router.measures_entropy = True
        layer, given_x = MoELayer(router, Experts(5, 16, 32, kernel=kernel)).to(DEVICE), x.clone().requires_grad_()
        y, plan = layer(given_x, padding)
        stats = plan.stats
        (y.square().sum() + stats.balance_loss + stats.z_loss + stats.entropy_loss).backward()
        assert given_x.grad is not None
        return [y.detach(), given_x.grad, *(p.grad for p in layer.parameters()), stats.first_dropped, stats.top1_prob]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "routes_on_device", lambda *_: False)
        expected = run("reference")
        patch.setattr(base, "routes_on_device", lambda *_: True)
        patch.setattr(base, "has_fp32_product", lambda x, weight: True)
        patch.setattr(fp32_logits, "product", torch.mm)
        ours = run("triton")
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
