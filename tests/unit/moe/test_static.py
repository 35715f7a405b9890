"""Plans of a size known beforehand: the same results, and nothing read back from the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import MISSING_KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, StratifiedMoE

# A bound is known by the number of experts per token, or by capacity.
BOUNDED = {
    "threshold": RouterOptions(threshold=0.7, capacity_factor=1.5),
    "topk": RouterOptions(top_k=2),
    "gshard": RouterOptions(capacity_factor=1.0),
    "switch": RouterOptions(),
    "hash": RouterOptions(),
}


def make_layer(kind: str, static: bool | None, kernel: str = "per_expert", strata: tuple[int, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    options = RouterOptions(**(vars(BOUNDED[kind]) | {"static": static, "min_capacity": 1}))
    count = sum(strata) or 6
    experts = Experts(count, 16, 24, kernel=kernel)
    routers = [ROUTERS[kind](16, sum(strata[i:]) or count, options) for i in range(len(strata) or 1)]
    for router in routers:
        router.measures_entropy = True
    return StratifiedMoE(routers, experts, strata) if strata else MoELayer(routers[0], experts)


def results(layer: nn.Module, x: Tensor, padding: Tensor, tokens: Tensor) -> list[Tensor]:
    """Output, losses, counts and gradients."""
    y, plan = layer(x, padding, tokens)
    stats = plan.stats
    (y.square().sum() + stats.balance_loss + stats.z_loss + stats.entropy_loss).backward()
    counts = (stats.tokens, stats.wanted, stats.received, stats.first_dropped, stats.passes, stats.expert_load)
    losses = (stats.balance_loss, stats.entropy_loss)
    return [y, *losses, *counts, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


# Strata need a learnt router, and the last one room for every expert a token.
CASES = [(kind, ()) for kind in BOUNDED] + [(kind, (2, 3, 2)) for kind in ("threshold", "topk", "gshard", "switch")]


@pytest.mark.parametrize("kernel", ["per_expert", "grouped_mm"])
@pytest.mark.parametrize(("kind", "strata"), CASES)
@given(tokens=st.integers(0, 24), padding=st.integers(1, 5), training=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_static_plans_change_nothing(
    kernel: str, kind: str, strata: tuple[int, ...], tokens: int, padding: int, training: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator)
    mask, ids = torch.arange(tokens) % 6 >= padding, torch.randint(99, (tokens,), generator=generator)
    got, want = (
        results(make_layer(kind, static, kernel, strata).train(training), x.clone().requires_grad_(), mask, ids)
        for static in (True, False)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@contextmanager
def synchronisations_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("grouped_mm" in MISSING_KERNELS, reason="an older torch")
@pytest.mark.parametrize(("kind", "strata"), CASES)
def test_nothing_is_read_back_even_without_a_device(kind: str, strata: tuple[int, ...]) -> None:
    # Fake tensors have shapes but no values: whatever asks for one fails.
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer = make_layer(kind, True, "grouped_mm", strata)
        x = torch.empty(40, 16, requires_grad=True)
        mask, ids = torch.empty(40, dtype=torch.bool), torch.empty(40, dtype=torch.long)
        outputs = results(layer, x, mask, ids)
    assert len(outputs) > 10


@pytest.mark.parametrize(("static", "kernel"), [(False, "grouped_mm"), (True, "per_expert")])
def test_what_must_be_read_back_fails_without_a_device(static: bool, kernel: str) -> None:
    with FakeTensorMode():
        layer = make_layer("topk", static, kernel)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            layer(torch.empty(40, 16))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "strata"), CASES)
def test_nothing_is_read_back_from_a_gpu(kind: str, strata: tuple[int, ...]) -> None:
    layer = make_layer(kind, None, "auto", strata).to(torch.bfloat16).to("cuda")
    x = torch.randn(400, 16, device="cuda").bfloat16().requires_grad_()
    mask, ids = torch.arange(400, device="cuda") % 6 == 0, torch.arange(400, device="cuda")
    results(layer, x, mask, ids)  # the first call loads kernels
    with synchronisations_are_errors():
        results(layer, x, mask, ids)
