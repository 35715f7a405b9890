"""How much a layer starts on a GPU, counted on any machine: what the host takes for a small batch goes by that."""

from __future__ import annotations

import pytest
import torch
from helpers_launches import Launches, functions, launches
from torch import Tensor

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, precise, routers

LAYERS = {
    "threshold": RouterOptions(threshold=0.5, static=True),
    "gshard": RouterOptions(capacity_factor=1.0, static=True),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the ways of bf16 on a GPU, in float32, which Triton's interpreter multiplies."""
    monkeypatch.setattr(routers, "routes_on_device", lambda *_: True)
    monkeypatch.setattr(routers, "is_precise", lambda x, weight: True)
    monkeypatch.setattr(precise, "product", torch.mm)


def step(kind: str, losses: bool) -> tuple[Launches, set[str]]:
    """Counts a forward and backward pass, with the losses and statistics of training or without."""
    torch.manual_seed(0)
    layer = MoELayer(ROUTERS[kind](16, 4, LAYERS[kind]), Experts(4, 16, 32, kernel="triton"))
    x = torch.randn(40, 16, requires_grad=True)
    grad = torch.randn(40, 16)
    with launches() as count:
        y, plan = layer(x)
        results: list[Tensor] = [y]
        grads: list[Tensor] = [grad]
        if losses:
            results.append(plan.stats.balance_loss)
            grads.append(torch.ones(()))
        found = functions(*results)
        torch.autograd.backward(results, grads)
    return count, found


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_of_a_layer_starts_little(kind: str, as_on_a_gpu: None) -> None:
    count, found = step(kind, losses=False)
    print(len(count.names), count.names, count.reads, found)
    count, found = step(kind, losses=True)
    print(len(count.names), count.names, count.reads, found)
