"""How much a layer starts on a GPU, counted on any machine: what the host takes for a small batch goes by that."""

from __future__ import annotations

import pytest
import torch
from helpers import NEEDS_TRITON
from helpers_launches import Launches, functions, launches
from torch import Tensor

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions
from xmoe_fairseq.moe.routing import base, fp32_logits

pytestmark = NEEDS_TRITON
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = {
    "threshold": RouterOptions(threshold=0.5, static=True),
    "gshard": RouterOptions(capacity_factor=1.0, static=True),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the ways of bf16 on a GPU, in float32, which Triton's interpreter multiplies."""
    monkeypatch.setattr(base, "routes_on_device", lambda *_: True)
    monkeypatch.setattr(base, "has_fp32_product", lambda x, weight: True)
    monkeypatch.setattr(fp32_logits, "product", torch.mm)


FORWARD = ["aten.mm", "take", "settle", "assignments", "multiply", "multiply", "combine"]
BACKWARD = [
    *("spread", "multiply", "weight_gradients", "multiply", "combine"),
    *("gradient", "aten.addmm", "aten.mm", "aten.add"),
]


def step(kind: str, losses: bool) -> tuple[Launches, set[str]]:
    """Counts a forward and backward pass, with the balance loss and the statistics of training or without."""
    torch.manual_seed(0)
    layer = MoELayer(ROUTERS[kind](16, 4, LAYERS[kind]), Experts(4, 16, 32, kernel="triton")).to(DEVICE)
    x = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    if kind == "gshard":
        layer.router.capacity_for(len(x))  # found once on the host, and remembered
    grads = [torch.randn_like(x), torch.ones((), device=DEVICE)]
    with launches() as count:
        y, plan = layer(x)
        results: list[Tensor] = [y, plan.stats.balance_loss] if losses else [y]
        found = functions(*results)
        torch.autograd.backward(results, grads[: len(results)])
    return count, found


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_of_a_layer_starts_little(kind: str, as_on_a_gpu: None) -> None:
    count, found = step(kind, losses=False)
    assert count.names == [*FORWARD, *BACKWARD] and len(count.names) == 16
    assert found == {"_RouteBackward", "_TritonMMBackward"}
    # Without a bound of the assignments their number is read, once.
    assert count.reads == (["_local_scalar_dense"] if kind == "threshold" else [])


def test_statistics_cost_nothing_but_the_loss_itself(as_on_a_gpu: None) -> None:
    count, found = step("gshard", losses=True)
    # The balance loss of sums over tokens, and its backward pass.
    loss = ["clamp", "_to_copy", "div", "div", "mul", "sum", "mul", "mul", "mul", "div"]
    loss = [f"aten.{name}" for name in loss]
    assert count.names == [*FORWARD, *loss, *BACKWARD] and len(count.names) == 26
    assert found == {"_RouteBackward", "_TritonMMBackward"}
