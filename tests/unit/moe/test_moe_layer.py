"""The MoE layer against a plain float64 loop, finite differences and counted multiplications."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.moe import ROUTERS, Experts, MoELayer, Router, RouterOptions, ThresholdRouter, TopKRouter
from xmoe_fairseq.moe.routing.assignments import Assignments

OPTIONS = [
    ("threshold", RouterOptions(threshold=0.0)),
    ("threshold", RouterOptions(threshold=0.5)),
    ("threshold", RouterOptions(threshold=0.9)),
    ("threshold", RouterOptions(threshold=1.0)),
    ("topk", RouterOptions(top_k=1)),
    ("topk", RouterOptions(top_k=3)),
]


def make_layer(
    kind: str = "threshold", options: RouterOptions | None = None, experts: int = 5, dim: int = 6, hidden: int = 4
) -> MoELayer:
    torch.manual_seed(0)
    router = ROUTERS[kind](dim, experts, options or RouterOptions())
    for weight in router.parameters():
        torch.nn.init.normal_(weight, std=1.0)  # a router with opinions: counts differ between tokens
    return MoELayer(router, Experts(experts, dim, hidden, activation=torch.tanh))


def chosen_experts(router: Router, probs: Tensor, kind: str) -> list[int]:
    """One token's experts in the order of their probability, by the papers' words."""
    ranked = sorted(range(len(probs)), key=lambda e: -float(probs[e]))
    if kind == "topk":
        return ranked[: router.options.top_k]
    taken, mass = [], 0.0
    for expert in ranked:
        if taken and mass >= router.options.threshold and router.options.threshold < 1:
            break
        taken.append(expert)
        mass += float(probs[expert])
    return taken


def naive(layer: MoELayer, kind: str, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Token by token, expert by expert, in float64: output, balance loss, pairs."""
    w, e = layer.router.weight.double(), layer.experts
    rows, firsts, probs_sum, pairs = [], torch.zeros(len(w)).double(), torch.zeros(len(w)).double(), 0
    real = 0
    for t, token in enumerate(x.double()):
        if padding is not None and padding[t]:
            rows.append(torch.zeros_like(token))
            continue
        real += 1
        probs = torch.softmax(w @ token, dim=0)
        taken = chosen_experts(layer.router, probs.detach(), kind)
        firsts[taken[0]] += 1
        probs_sum = probs_sum + probs
        pairs += len(taken)
        y = torch.zeros_like(token)
        for i in taken:
            hidden = torch.tanh(e.fc1_weight[i].double() @ token + e.fc1_bias[i].double())
            y = y + probs[i] * (e.fc2_weight[i].double().t() @ hidden + e.fc2_bias[i].double())
        rows.append(y)
    loss = len(w) * (firsts / max(real, 1) * probs_sum / max(real, 1)).sum()
    return torch.stack(rows), loss, pairs


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_equals_naive_loop_with_gradients(kind: str, options: RouterOptions) -> None:
    layer = make_layer(kind, options).double()
    x = torch.randn(17, 6, dtype=torch.double, requires_grad=True)
    padding = torch.arange(17) % 5 == 3
    y, plan = layer(x, padding)
    weights = torch.randn_like(y)
    expected, loss, pairs = naive(layer, kind, x, padding)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(plan.stats.balance_loss, loss, rtol=1e-10, atol=1e-12)
    assert int(plan.stats.received) == int(plan.stats.wanted) == len(plan.token) == pairs

    inputs = [x, *layer.parameters()]
    actual = torch.autograd.grad((y * weights).sum() + plan.stats.balance_loss, inputs)
    wanted = torch.autograd.grad((expected * weights).sum() + loss, inputs)
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    layer = make_layer("threshold", RouterOptions(threshold=0.7))
    x = torch.randn(50, 6)
    y, _ = layer(x)
    torch.testing.assert_close(y.double(), naive(layer, "threshold", x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_z_loss_is_the_mean_squared_log_sum_exp(scale: float) -> None:
    logits = (torch.randn(40, 9) * scale).requires_grad_()
    padding = torch.rand(40) < 0.3
    exact = logits.detach().double().requires_grad_()
    want = exact[~padding].logsumexp(-1).square().mean()
    got = ThresholdRouter(2, 9, RouterOptions(0.7)).plan(logits, padding).stats.z_loss
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    got.backward()
    want.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_gradients_equal_finite_differences() -> None:
    layer = make_layer("threshold", RouterOptions(threshold=0.6), experts=3, dim=3, hidden=2).double()
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, plan = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y, plan.stats.balance_loss, plan.stats.z_loss

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@given(
    tokens=st.integers(0, 30),
    experts=st.integers(1, 9),
    threshold=st.floats(0, 1),
    capacity=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    minimum=st.integers(0, 6),
    peak=st.floats(0, 20),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_plan_properties(
    tokens: int, experts: int, threshold: float, capacity: float, minimum: int, peak: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    logits[:, 0] += peak  # up to all tokens at one expert
    padding = torch.rand(tokens, generator=generator) < 0.3
    router = ThresholdRouter(2, experts, RouterOptions(threshold, 1, capacity, minimum)).train()
    plan = router.plan(logits, padding)
    expert = torch.repeat_interleave(torch.arange(experts), plan.group_sizes)
    probs = torch.softmax(logits, -1)

    assert not padding[plan.token].any()
    assert len(set(zip(plan.token.tolist(), expert.tolist(), strict=True))) == len(plan.token)  # no pair twice
    assert torch.equal(plan.weight, probs[plan.token, expert])
    assert torch.equal(plan.stats.expert_load, plan.group_sizes)
    real = int((~padding).sum())
    assert int(plan.stats.tokens) == real == int(plan.stats.first_choices.sum())
    assert int(plan.stats.received) == len(plan.token) <= int(plan.stats.wanted) <= real * experts
    if capacity == 0:
        per_token = torch.bincount(plan.token, minlength=tokens)
        assert (per_token[~padding] >= 1).all()
        mass = torch.zeros(tokens).index_add(0, plan.token, plan.weight)
        assert (mass[~padding] >= threshold - 1e-5).all()
        assert int(plan.stats.first_dropped) == 0
    else:
        limit = max(math.ceil(real / experts * capacity), minimum)
        assert int(plan.group_sizes.max()) <= limit


@pytest.mark.parametrize("top_k", [1, 3])
def test_capacity_serves_first_choices_first(top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 4, dtype=torch.double)
    router = TopKRouter(2, 4, RouterOptions(top_k=top_k, capacity_factor=0.5, min_capacity=1)).train()
    plan = router.plan(logits)
    expert = torch.repeat_interleave(torch.arange(4), plan.group_sizes)
    got = set(zip(plan.token.tolist(), expert.tolist(), strict=True))
    probs = torch.softmax(logits, -1)
    order = probs.argsort(-1, descending=True)
    for e in range(4):
        queue = [(r, -float(probs[t, e]), t) for t in range(40) for r in range(top_k) if order[t, r] == e]
        assert {t for t, other in got if other == e} == {t for _, _, t in sorted(queue)[:5]}


def test_evaluation_drops_nothing() -> None:
    layer = make_layer("topk", RouterOptions(top_k=2, capacity_factor=0.1, min_capacity=1))
    x = torch.randn(64, 6)
    assert int(layer.train()(x)[1].stats.received) < 128
    assert int(layer.eval()(x)[1].stats.received) == 128


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_multiplies_only_chosen_pairs(threshold: float) -> None:
    layer = make_layer("threshold", RouterOptions(threshold=threshold), experts=8, dim=6, hidden=4)
    x = torch.randn(100, 6)
    padding = torch.arange(100) % 4 == 0
    with FlopCounterMode(display=False) as forward:
        y, plan = layer(x, padding)
    router_flops = 2 * 100 * 6 * 8
    pair_flops = 2 * (6 * 4 + 4 * 6)
    pairs = len(plan.token)
    assert 75 <= pairs <= 600
    assert forward.get_total_flops() == router_flops + pairs * pair_flops
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # Each weight gradient, and the gradient of the experts' input, are one product more; x needs none here.
    assert backward.get_total_flops() == router_flops + pairs * (pair_flops + 2 * 4 * 6)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_output_does_not_depend_on_the_batch(kind: str) -> None:
    options = ROUTERS[kind].Options(threshold=0.8, top_k=2)
    layer = make_layer(kind, options, experts=16, dim=32, hidden=16).double().eval()
    x, tokens = torch.randn(40, 32).double(), torch.arange(40)
    together = layer(x, tokens=tokens)[0]
    alone = torch.cat([layer(row[None], tokens=token[None])[0] for row, token in zip(x, tokens, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (1, 6), (2, 3, 6)])
def test_shapes_and_emptiness(shape: tuple[int, ...]) -> None:
    layer = make_layer()
    x = torch.randn(shape, requires_grad=True)
    y, plan = layer(x, torch.zeros(shape[:-1], dtype=torch.bool))
    assert y.shape == x.shape
    (y.sum() + plan.stats.balance_loss + plan.stats.z_loss).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_only_padding_gives_zeros_and_finite_losses() -> None:
    layer = make_layer()
    y, plan = layer(torch.randn(5, 6), torch.ones(5, dtype=torch.bool))
    assert len(plan.token) == 0
    assert not y.any()
    assert plan.stats.balance_loss.item() == plan.stats.z_loss.item() == 0


def test_padding_changes_nothing_for_the_other_tokens() -> None:
    layer = make_layer()
    x = torch.randn(9, 6)
    padding = torch.tensor([False] * 6 + [True] * 3)
    y, plan = layer(x, padding)
    alone, alone_plan = layer(x[:6])
    torch.testing.assert_close(y[:6], alone)
    for name, value in vars(alone_plan.stats).items():
        if name != "layer":
            torch.testing.assert_close(getattr(plan.stats, name), value)


def test_all_tokens_to_one_expert() -> None:
    layer = make_layer("threshold", RouterOptions(threshold=0.5))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 50.0
    x = torch.rand(7, 6) + 0.1
    y, plan = layer(x)
    assert plan.group_sizes.tolist() == [0, 0, 7, 0, 0]
    y.sum().backward()
    assert layer.experts.fc1_weight.grad is not None
    assert not layer.experts.fc1_weight.grad[[0, 1, 3, 4]].any()
    assert layer.experts.fc1_weight.grad[2].any()


def test_one_expert_is_the_dense_feed_forward() -> None:
    layer = make_layer(experts=1, hidden=8)
    x = torch.randn(11, 6)
    e = layer.experts
    dense = torch.tanh(x @ e.fc1_weight[0].t() + e.fc1_bias[0]) @ e.fc2_weight[0] + e.fc2_bias[0]
    torch.testing.assert_close(layer(x)[0], dense)


def test_experts_start_different_and_scaled_as_linear_layers() -> None:
    experts = Experts(16, 64, 32)
    for parameter, fan_in in ((experts.fc1_weight, 64), (experts.fc2_weight, 32)):
        flat = parameter.detach().reshape(16, -1)
        distances = torch.cdist(flat, flat) + 1e9 * torch.eye(16)
        assert distances.min() > 1
        assert flat.abs().max() <= fan_in**-0.5
        assert abs(float(flat.std()) * math.sqrt(3 * fan_in) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(20, 6)
    y, plan = layer(x.to(dtype).float())
    half_y, half_plan = layer.to(dtype)(x.to(dtype))
    assert half_y.dtype == dtype
    assert half_plan.weight.dtype == torch.float32
    torch.testing.assert_close(half_y.float(), y, rtol=0.05, atol=0.05)
    assert abs(int(half_plan.stats.received) - int(plan.stats.received)) <= 2


@pytest.mark.parametrize("kernel", ["per_expert", "grouped_mm", "reference"])
def test_autocast_equals_half_precision_experts(kernel: str) -> None:
    """Bit for bit, beside a router in float32; parameters and their gradients stay in float32."""
    layer = make_layer(dim=8, hidden=8)
    layer.experts.kernel = kernel
    half = copy.deepcopy(layer)
    half.experts.to(torch.bfloat16)
    x = torch.randn(20, 8, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plan = layer(x)
    expected, expected_plan = half(other)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert plan.weight.dtype == torch.float32 and torch.equal(plan.weight, expected_plan.weight)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    wanted = dict(half.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, wanted[name].grad.float()) and parameter.grad.any(), name


def test_dropout_only_in_training() -> None:
    layer = make_layer()
    layer.experts.dropout.p = 0.5
    x = torch.randn(20, 6)
    assert not torch.equal(layer.train()(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("kind", "options", "experts", "message"),
    [
        ("threshold", RouterOptions(threshold=1.5), 4, r"threshold 1\.5 is outside \[0, 1\]"),
        ("threshold", RouterOptions(threshold=math.nan), 4, "threshold nan"),
        ("topk", RouterOptions(top_k=0), 4, r"top_k 0 is outside \[1, 4\]"),
        ("topk", RouterOptions(top_k=5), 4, r"top_k 5 is outside \[1, 4\]"),
        ("topk", RouterOptions(capacity_factor=-1), 4, "capacity_factor -1"),
        ("threshold", RouterOptions(), 0, "at least 1 expert, not 0"),
    ],
)
def test_bad_options(kind: str, options: RouterOptions, experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS[kind](8, experts, options)


@pytest.mark.parametrize("sizes", [[1, 1], [2, 1, 1]])
def test_group_sizes_must_fit_pairs_and_experts(sizes: list[int]) -> None:
    pairs = Assignments(torch.arange(len(sizes) - 1), torch.ones(len(sizes) - 1), torch.tensor(sizes))
    with pytest.raises(ValueError, match="do not fit"):
        Experts(2, 4, 4)(torch.randn(3, 4), pairs)
