"""What only a GPU can show: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, RouterOptions, StratifiedMoE
from xmoe_fairseq.moe.kernels import KERNELS, Activation, Buffers, ExpertWeights, choose
from xmoe_fairseq.moe.routing.assignments import Assignments
from xmoe_fairseq.moe.routing.fp32_logits import fp32_linear, has_fp32_product

pytestmark = pytest.mark.gpu
# What a number of each type is rounded by, relative to the largest, some times over.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


def results(kernel: str, x: Tensor, pairs: Assignments, weights: list[Tensor], activation: Activation) -> list[Tensor]:
    """The output and every gradient."""
    inputs = [part.detach().requires_grad_() for part in (x, pairs.weight, *weights)]
    given = Assignments(pairs.token, inputs[1], pairs.group_sizes)
    y = KERNELS[kernel](inputs[0], given, ExpertWeights.of(*inputs[2:], Buffers()), activation)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y))]


@pytest.mark.parametrize("sizes", [[200, 0, 1, 0, 333], [0, 0, 128, 129, 0], [0] * 5, [1, 1, 1, 1, 1]])
@pytest.mark.parametrize(
    ("kernel", "dtype", "activation"),
    [
        *[("triton", dtype, F.relu) for dtype in ROUNDING],
        ("per_expert", torch.float32, F.relu),
        # A bias that is added after rounding may turn the sign of what is near 0, and with it ReLU's gradient.
        ("per_expert", torch.bfloat16, F.gelu),
        ("grouped_mm", torch.bfloat16, F.gelu),
    ],
)
def test_kernels_equal_the_loop_in_float64(
    kernel: str, dtype: torch.dtype, activation: Activation, sizes: list[int]
) -> None:
    torch.manual_seed(0)
    token = torch.cat([torch.randperm(400)[:size].sort().values for size in sizes] + [torch.zeros(9, dtype=torch.long)])
    share = torch.rand(len(token))
    share[len(token) - 9 :] = 0
    pairs = Assignments(token.cuda(), share.cuda(), torch.tensor(sizes).cuda())
    shapes = (5, 96, 64), (5, 96), (5, 96, 64), (5, 64)
    weights = [torch.randn(shape).mul_(0.2).to("cuda", dtype) for shape in shapes]
    x = torch.randn(400, 64).to("cuda", dtype)
    exact = Assignments(pairs.token, pairs.weight.double(), pairs.group_sizes)
    expected = results("reference", x.double(), exact, [weight.double() for weight in weights], activation)
    for got, want in zip(results(kernel, x, pairs, weights, activation), expected, strict=True):
        atol = ROUNDING[dtype] * max(float(want.abs().max()), 1.0)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


def test_the_fast_kernel_is_chosen() -> None:
    pairs = Assignments(torch.zeros(1, dtype=torch.long), torch.ones(1), torch.ones(1, dtype=torch.long))
    for dtype in (torch.bfloat16, torch.float16):
        assert choose("auto", torch.empty(1, 8, dtype=dtype, device="cuda"), pairs, 8) is KERNELS["triton"]
    assert choose("auto", torch.empty(1, 8, device="cuda"), pairs, 8) is not KERNELS["triton"]


def test_router_logits_of_bf16_are_those_of_float64() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 64).bfloat16().cuda().requires_grad_() for n in (300, 24))
    assert has_fp32_product(x, weight)
    logits = fp32_linear(x, weight)
    expected = x.double() @ weight.double().t()
    # The bound for sums of 64 products in float32.
    bound = 64 * 2**-24 * (x.double().abs() @ weight.double().abs().t())
    assert bool(((logits.double() - expected).abs() <= bound).all())
    grad = torch.randn_like(logits)
    for got, want in zip(
        torch.autograd.grad(logits, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)  # the next number in bf16


def make(strata: tuple[int, ...], options: RouterOptions) -> torch.nn.Module:
    torch.manual_seed(0)
    experts = Experts(16, 64, 96)
    if strata:
        routers = [ROUTERS["gshard"](64, sum(strata[i:]), options) for i in range(len(strata))]
        return StratifiedMoE(routers, experts, strata).to("cuda", torch.bfloat16)
    return MoELayer(ROUTERS["threshold"](64, 16, options), experts).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("strata", [(), (4, 4, 4, 4)])
def test_a_graph_of_a_step_gives_what_the_step_gives(strata: tuple[int, ...]) -> None:
    layer = make(strata, RouterOptions(threshold=0.6, capacity_factor=2.0))
    x = torch.randn(500, 64, device="cuda").bfloat16().requires_grad_()

    def step() -> list[Tensor]:
        y, plan = layer(x)
        loss = y.float().square().sum() + plan.stats.balance_loss
        return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
