"""The entropy loss of routers against plain float64 code, at its bounds, and where nobody asks for it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import (
    ROUTERS,
    ConditionalMoE,
    Experts,
    MoELayer,
    Router,
    RouterOptions,
    RoutingPlan,
    StackedMoE,
    StratifiedMoE,
)
from xmoe_fairseq.moe.routing.losses import entropy_loss

KINDS = ("threshold", "topk", "gshard", "switch")
OPTIONS = RouterOptions(threshold=0.6, capacity_factor=1.0, min_capacity=1)


def make_router(kind: str, experts: int, dim: int = 6, options: RouterOptions = OPTIONS) -> Router:
    router = ROUTERS[kind](dim, experts, options)
    router.measures_entropy = True
    return router


def route(logits: Tensor, padding: Tensor | None = None, kind: str = "threshold") -> RoutingPlan:
    options = RouterOptions(top_k=min(2, logits.shape[1]))
    return make_router(kind, logits.shape[1], options=options).plan(logits, padding)


def naive(logits: Tensor, padding: Tensor) -> tuple[float, list[list[float]]]:
    """By loops in float64: the mean entropy, and its gradient by the formula -p_e (log p_e + H) / n."""
    real, total, gradient = int((~padding).sum()), 0.0, []
    for row, padded in zip(logits.double().tolist(), padding.tolist(), strict=True):
        lowered = [value - max(row) for value in row]
        log_sum = math.log(sum(math.exp(value) for value in lowered))
        logs = [value - log_sum for value in lowered]
        entropy = -sum(math.exp(log) * log for log in logs)
        total += 0 if padded else entropy
        gradient.append([0.0 if padded else -math.exp(log) * (log + entropy) / real for log in logs])
    return total / real, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_loss_and_gradient_equal_naive_loops(kind: str, scale: float) -> None:
    torch.manual_seed(0)
    logits, padding = (scale * torch.randn(40, 9)).requires_grad_(), torch.rand(40) < 0.3
    loss = make_router(kind, 9).train().plan(logits, padding).stats.entropy_loss
    loss.backward()
    expected, gradient = naive(logits.detach(), padding)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logits.grad.double(), torch.tensor(gradient).double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    logits, padding = torch.randn(7, 4, dtype=torch.double, requires_grad=True), torch.arange(7) == 2
    router = make_router(kind, 4)
    assert torch.autograd.gradcheck(lambda given: router.plan(given, padding).stats.entropy_loss, (logits,))


@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 12),
    scale=st.floats(0, 1e4),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_entropy_is_between_0_and_log_of_experts(tokens: int, experts: int, scale: float, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(tokens, experts, generator=generator)).requires_grad_()
    loss = route(logits, kind=kind).stats.entropy_loss
    loss.backward()
    assert -1e-6 <= loss.item() <= math.log(experts) + 1e-5
    assert torch.isfinite(logits.grad).all()
    # Adding a number to all logits of a token changes no probability.
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(tokens), rtol=0, atol=1e-5)


@given(tokens=st.integers(1, 20), experts=st.integers(1, 100), level=st.floats(-1e4, 1e4), kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_uniform_router_has_the_highest_entropy_and_no_gradient(
    tokens: int, experts: int, level: float, kind: str
) -> None:
    logits = torch.full((tokens, experts), level, requires_grad=True)
    loss = route(logits, kind=kind).stats.entropy_loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(experts), abs=1e-5)
    torch.testing.assert_close(logits.grad, torch.zeros(tokens, experts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [80.0, 110.0, 1e3, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_values_and_gradients(size: float, dtype: torch.dtype) -> None:
    """Probabilities of 0, for which the logarithm's gradient is infinite, and one that only float64 holds."""
    rows = [[size, -size, 0.0, 1.0], [-size, -size, -size, -size + 1], [size, size, size, size], [0.0, -size, 0.0, 0.0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    loss = route(logits).stats.entropy_loss
    loss.backward()
    expected, gradient = naive(logits.detach(), torch.zeros(4, dtype=torch.bool))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(logits.grad.double(), torch.tensor(gradient).double(), rtol=1e-4, atol=1e-7)


def test_padding_is_never_counted() -> None:
    torch.manual_seed(0)
    logits, padding = torch.randn(12, 5), torch.arange(12) % 3 == 1
    alone = route(logits[~padding]).stats.entropy_loss
    for filler in (0.0, 1e4, -1e4):
        padded = logits.masked_fill(padding.unsqueeze(-1), filler).requires_grad_()
        loss = route(padded, padding).stats.entropy_loss
        loss.backward()
        torch.testing.assert_close(loss, alone)
        assert not padded.grad[padding].any() and padded.grad[~padding].any()
    assert route(logits, torch.ones(12, dtype=torch.bool)).stats.entropy_loss.item() == 0
    assert route(logits[:0]).stats.entropy_loss.item() == 0


def test_entropy_loss_is_the_mean_per_token() -> None:
    assert entropy_loss(torch.tensor(6.0), torch.tensor(4)).item() == 1.5
    assert entropy_loss(torch.tensor(0.0), torch.tensor(0)).item() == 0


def make_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    strata = [make_router("gshard", count, options=RouterOptions()) for count in (5, 3)]
    stack = [MoELayer(make_router("threshold", 4), Experts(4, 6, 3)) for _ in range(2)]
    block = StratifiedMoE(strata, Experts(5, 6, 4), (2, 3))
    mixed = ConditionalMoE(MoELayer(make_router("topk", 4), Experts(4, 6, 3)), 6, 8)
    return {"strata": block, "stack": StackedMoE(list(stack)), "cmr": mixed}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["strata", "stack", "cmr"])
def test_several_routers_give_the_mean_of_those_with_tokens(name: str, static: bool) -> None:
    """Strata, stacked layers and CMR; the tokens of a stratum are those that its router saw."""
    layer, seen = make_layers()[name].double(), list[tuple[Tensor, Tensor]]()

    def watch(router: Any, given_: tuple[Any, ...], plan: RoutingPlan) -> None:
        padding = torch.zeros(len(given_[0]), dtype=torch.bool) if given_[1] is None else given_[1]
        seen.append((given_[0] @ router.weight.t(), padding))

    for router in [module for module in layer.modules() if isinstance(module, Router)]:
        router.options = RouterOptions(**(vars(router.options) | {"static": static}))
        router.register_forward_hook(watch)
    x = torch.randn(30, 6, dtype=torch.double)
    stats = layer(x, torch.arange(30) % 4 == 3)[1].stats
    losses = []
    for logits, padding in seen:
        probs = torch.softmax(logits[~padding], -1)
        losses.append(torch.special.entr(probs).sum(-1).mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(stats.entropy_loss, expected)
    weights = [parameter for part, parameter in layer.named_parameters() if "router" in part]
    assert len(seen) == len(stats.routers) == len(weights) and stats.entropy_loss > 0.5
    got = torch.autograd.grad(stats.entropy_loss, weights, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other)


def test_a_stratum_without_tokens_is_not_in_the_mean() -> None:
    block = make_layers()["strata"]
    with torch.no_grad():
        block.routers[0].weight.copy_(torch.tensor([[0.0]] * 2 + [[9.0]] * 3).expand(5, 6))
    block.norms[0].bias.data.fill_(1.0)  # all tokens like the last stratum best, and leave
    stats = block(torch.randn(8, 6))[1].stats
    assert [int(one.tokens) for one in stats.routers] == [8, 0]
    torch.testing.assert_close(stats.entropy_loss, stats.routers[0].entropy / 8)
    assert stats.routers[1].entropy.item() == 0


class Operations(TorchDispatchMode):
    """Lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_where_it_is_not_asked_for(kind: str) -> None:
    logits = torch.randn(10, 4, requires_grad=True)
    router = ROUTERS[kind](6, 4, RouterOptions())
    assert router.measures_entropy is False
    listed, stats = [], []
    for router.measures_entropy in (False, True):
        with Operations() as operations:
            stats.append(router.plan(logits).stats)
        listed.append(operations.names)
    assert not [name for name in listed[0] if "log_softmax" in name or "entr" in name]
    assert len(listed[0]) < len(listed[1])
    assert stats[0].entropy_loss.item() == 0 and stats[1].entropy_loss.item() > 0.5
    assert not stats[0].routers[0].entropy.requires_grad
    for name in ("balance_loss", "z_loss", "top1_prob", "expert_load"):
        assert torch.equal(getattr(stats[0], name), getattr(stats[1], name))


@pytest.mark.parametrize("kind", ["hash", "balanced"])
def test_routers_without_probabilities_have_no_such_loss(kind: str) -> None:
    router = make_router(kind, 4)
    stats = router(torch.randn(9, 6), tokens=torch.arange(9)).stats
    assert stats.routers == () and stats.entropy_loss.item() == 0


def test_the_loss_sharpens_the_router_so_that_tokens_take_fewer_experts() -> None:
    torch.manual_seed(0)
    router, x = make_router("threshold", 8, options=RouterOptions(threshold=0.7)), torch.randn(200, 6)
    optimizer, seen = torch.optim.SGD(router.parameters(), 1.0), []
    for _ in range(30):
        stats = router(x).stats
        optimizer.zero_grad()
        stats.entropy_loss.backward()
        optimizer.step()
        seen.append((stats.entropy_loss.item(), int(stats.wanted)))
    assert all(later[0] < earlier[0] for earlier, later in pairwise(seen))
    assert seen[-1][1] < 0.7 * seen[0][1]
