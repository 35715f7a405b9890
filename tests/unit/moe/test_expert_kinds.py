"""Every kind of experts against loops over the tokens: output, gradients, FLOPs, parameters, kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_expert_kinds import (
    DIM,
    HIDDEN,
    KINDS,
    NUMBER,
    SIZES,
    by_loops,
    make,
    make_layer,
    parts_of,
)
from helpers_routing import sharpen
from helpers_toy_expert import MaxoutExperts
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.moe import (
    Experts,
    GatedExperts,
    MoELayer,
    RouterOptions,
    SizedExperts,
    StackedMoE,
    StratifiedMoE,
    ThresholdRouter,
    TopKRouter,
)
from xmoe_fairseq.moe.experts.gated import GATES, GatedOptions
from xmoe_fairseq.moe.flops import cost_of, count_parameters, expert_sites
from xmoe_fairseq.moe.kernels import KERNELS, StackedWeights, choose
from xmoe_fairseq.moe.routing.assignments import Assignments


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["equal", "sized"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_loops_over_tokens_with_all_gradients(kind: str, sizes: tuple[int, ...] | None) -> None:
    layer = make_layer(kind, sizes)
    x = torch.randn(11, DIM, dtype=torch.double, requires_grad=True)
    padding = torch.arange(11) % 4 == 3
    parameters = [x, *layer.parameters()]
    y, plan = layer(x, padding)
    expected, pairs, units = by_loops(layer, x, padding, KINDS[kind][1])
    torch.testing.assert_close(y, expected)
    assert int(plan.stats.received) == pairs
    if sizes is None:
        assert plan.stats.hidden is None and int(layer.experts.hidden_units(plan.stats.expert_load)) == units
    else:
        assert int(plan.stats.hidden) == units
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["equal", "sized"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_pytorch_counts_for_the_chosen_experts(kind: str, sizes: tuple[int, ...] | None) -> None:
    layer, x = make_layer(kind, sizes), torch.randn(13, DIM, dtype=torch.double)
    with FlopCounterMode(display=False) as counter:  # which does not see the products of the kernel for decoding
        _, plan = layer(x)
    load = plan.stats.expert_load.tolist()
    router = 2 * 13 * DIM * NUMBER
    assert counter.get_total_flops() - router == cost_of(load, layer.experts.flops())
    assert counter.get_total_flops() - router == sum(
        2 * sum(p[0].numel() for p in part.parameters() if p.dim() > 2) * load[expert]
        for expert, (part, _) in enumerate(parts_of(layer.experts))
    )


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["equal", "sized"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_by_expert(kind: str, sizes: tuple[int, ...] | None) -> None:
    layer = make_layer(kind, sizes)
    own = layer.experts.own_parameters()
    assert own == tuple(sum(p[0].numel() for p in part.parameters()) for part, _ in parts_of(layer.experts))
    everything = sum(p.numel() for p in layer.parameters())
    (site,) = expert_sites(layer)
    first_two = count_parameters(layer, {site.name: [1.0, 1.0, 0.0, 0.0, 0.0]})
    assert (first_two.total, first_two.expert) == (everything, sum(own))
    assert first_two.active == everything - sum(own[2:])
    assert count_parameters(layer, {site.name: [3.0] * NUMBER}).active == everything
    assert count_parameters(layer, {site.name: 2.5}).active == round(everything - sum(own) / 2)


def test_the_cheapest_and_the_dearest_choice_differ_in_size() -> None:
    layer = MoELayer(TopKRouter(DIM, NUMBER, RouterOptions(top_k=2)), make("ffn", SIZES))
    (site,) = expert_sites(layer)
    assert (site.cheapest, site.dearest) == ([1, 1, 0, 0, 0], [0, 0, 0, 1, 1])
    assert cost_of(site.dearest, site.experts.flops()) == 3 * cost_of(site.cheapest, site.experts.flops())
    (site,) = expert_sites(MoELayer(TopKRouter(DIM, NUMBER, RouterOptions(top_k=2)), make("ffn")))
    assert site.cheapest == site.dearest == 2.0


@pytest.mark.parametrize("kind", ["glu", "maxout"])
@pytest.mark.parametrize("shape", ["strata", "stack", "autocast", "dropout"])
def test_any_kind_goes_into_any_layer(kind: str, shape: str) -> None:
    cls, _, options = KINDS[kind]
    torch.manual_seed(0)
    experts = cls(NUMBER, DIM, HIDDEN, dropout=0.5 if shape == "dropout" else 0.0, options=options)
    layer: Any = MoELayer(ThresholdRouter(DIM, NUMBER, RouterOptions(threshold=0.7)), experts)
    if shape == "strata":
        routers = [ThresholdRouter(DIM, number, RouterOptions(threshold=0.7)) for number in (5, 3)]
        layer = StratifiedMoE(routers, experts, (2, 3))
    if shape == "stack":
        layer = StackedMoE([layer, layer])
    sharpen(layer)
    x = torch.randn(12, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape == "autocast"):
        y, plan = layer(x)
    assert y.dtype == (torch.bfloat16 if shape == "autocast" else torch.float32)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    assert all((p.grad.flatten(1) != 0).any(1)[plan.stats.expert_load[:NUMBER] > 0].all() for p in experts.parameters())
    if shape == "dropout":
        assert not torch.equal(layer(x)[0], y)
        assert torch.equal(layer.eval()(x)[0], layer(x)[0])


class RescaledExperts(MaxoutExperts):
    """Maxout experts whose output is multiplied by a vector that they share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.linspace(0.5, 2, self.dim))

    @staticmethod
    def network(x: Tensor, tensors: Any, activation: Any, dropout: float) -> Tensor:
        return MaxoutExperts.network(x, tensors, activation, dropout) * tensors["scale"]

    def prepare(self, tensors: dict[str, Tensor]) -> StackedWeights:
        return super().prepare(tensors | {"scale": self.scale.expand(len(self.block), -1)})


def test_experts_may_share_a_parameter() -> None:
    torch.manual_seed(0)
    experts = RescaledExperts(NUMBER, DIM, HIDDEN).double()
    plain = MaxoutExperts(NUMBER, DIM, HIDDEN).double()
    plain.load_state_dict({name: value for name, value in experts.state_dict().items() if name != "scale"})
    layer = MoELayer(ThresholdRouter(DIM, NUMBER, RouterOptions(threshold=0.7)), experts).double()
    x = torch.randn(9, DIM, dtype=torch.double)
    y, plan = layer(x)
    unscaled = plain(x, plan)
    torch.testing.assert_close(y, unscaled * experts.scale)
    y.sum().backward()
    torch.testing.assert_close(experts.scale.grad, unscaled.sum(0))
    assert experts.own_parameters() == plain.own_parameters()
    (site,) = expert_sites(layer)
    counted = count_parameters(layer, {site.name: 2.0})
    assert counted.expert == sum(experts.own_parameters()) + DIM
    assert counted.active == NUMBER * DIM + DIM + 2 * experts.own_parameters()[0]  # router, scale, two experts


@pytest.mark.parametrize("gate", GATES)
def test_the_gate_is_an_option(gate: str) -> None:
    options = GatedOptions(glu_activation=gate)
    experts = GatedExperts(1, DIM, HIDDEN, F.gelu, options=options)
    x = torch.randn(3, DIM)
    pairs = Assignments(torch.arange(3), torch.ones(3), torch.tensor([3]))
    hidden = GATES[gate](x @ experts.gate_weight[0].T) * (x @ experts.fc1_weight[0].T)
    torch.testing.assert_close(experts(x, pairs), hidden @ experts.fc2_weight[0])
    assert GatedExperts.label(options) == f"{gate}-gated experts"
    with pytest.raises(ValueError, match="glu_activation 'selu' is unknown: choose one of swish"):
        GatedExperts(1, DIM, HIDDEN, options=GatedOptions(glu_activation="selu"))


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_kernels_say_what_they_compute() -> None:
    one = Assignments(torch.zeros(1, dtype=torch.long), torch.ones(1), torch.tensor([1]))
    for network in (GatedExperts.network, MaxoutExperts.network):
        assert choose("auto", torch.empty(1, 8), one, 8, True, network) is KERNELS["reference"]
        assert [name for name, kernel in KERNELS.items() if kernel.computes(network)] == ["reference"]
    assert all(kernel.computes(Experts.network) for kernel in KERNELS.values())
    for make_one in (lambda: GatedExperts(2, 8, 8, kernel="per_expert"),
                     lambda: choose("decode", torch.empty(1, 8), one, 8,
                     True, GatedExperts.network)):  # fmt: skip
        with pytest.raises(ValueError, match=r"does not compute gated networks; choose --moe-kernel auto, reference$"):
            make_one()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "triton"])
def test_sized_experts_use_every_kernel(kernel: str) -> None:
    torch.manual_seed(0)
    ours, want = (SizedExperts(Experts, (8, 8, 24), 16, kernel=name) for name in (kernel, "reference"))
    want.load_state_dict(ours.state_dict())
    x, sizes = torch.randn(20, 16), (9, 0, 20)
    pairs = Assignments(
        torch.cat([torch.randperm(20)[:n].sort().values for n in sizes]), torch.rand(29), torch.tensor(sizes)
    )
    torch.testing.assert_close(ours(x, pairs), want(x, pairs))
