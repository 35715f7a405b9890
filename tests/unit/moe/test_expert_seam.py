"""What a new kind of experts needs: one file and one line; the kinds that are there against loops over the tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers import ROOT, TINY_ARGS, TRAIN_ARGS, batches, build
from helpers_routing import sharpen
from helpers_toy_expert import MaxoutExperts, MaxoutOptions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.analysis.tables import flops as flops_table
from xmoe_fairseq.checkpoints import shards
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import count, places
from xmoe_fairseq.models.architectures import build_on_meta
from xmoe_fairseq.models.routing_recorder import per_token
from xmoe_fairseq.models.size import least_parameters
from xmoe_fairseq.moe import (
    EXPERTS,
    ROUTERS,
    ExpertOptions,
    Experts,
    ExpertSet,
    GatedExperts,
    MoELayer,
    RouterOptions,
    SizedExperts,
    StackedExperts,
    StackedMoE,
    StratifiedMoE,
    ThresholdRouter,
    TopKRouter,
    make_experts,
)
from xmoe_fairseq.moe.experts.gated import GATES, GatedOptions
from xmoe_fairseq.moe.experts.options import STRATEGIES, hidden_sizes
from xmoe_fairseq.moe.flops import cost_of, count_parameters, expert_sites
from xmoe_fairseq.moe.kernels import KERNELS, StackedWeights, choose
from xmoe_fairseq.moe.options import declared
from xmoe_fairseq.moe.routing.assignments import Assignments

DIM, HIDDEN, NUMBER = 6, 8, 5
SIZES = (4, 4, 8, 12, 12)
Network = Callable[[StackedExperts, int, Tensor], Tensor]


def naive_ffn(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    return torch.tanh(e.fc1_weight[i] @ x + e.fc1_bias[i]) @ e.fc2_weight[i] + e.fc2_bias[i]


def naive_glu(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    gate = e.gate_weight[i] @ x
    return (gate * torch.sigmoid(gate) * (e.fc1_weight[i] @ x)) @ e.fc2_weight[i]


def naive_maxout(e: StackedExperts, i: int, x: Tensor) -> Tensor:
    pieces = [e.in_weight[i, p] @ x + e.in_bias[i].view(len(e.in_weight[i]), -1)[p] for p in range(e.options.pieces)]
    return torch.stack(pieces).max(0).values @ e.out_weight[i]


KINDS: dict[str, tuple[type[StackedExperts], Network, Any]] = {
    "ffn": (Experts, naive_ffn, ExpertOptions()),
    "glu": (GatedExperts, naive_glu, GatedOptions()),
    "maxout": (MaxoutExperts, naive_maxout, MaxoutOptions(pieces=3)),
}


def parts_of(experts: ExpertSet) -> list[tuple[StackedExperts, int]]:
    """Each expert: where it is stacked, and its number there."""
    parts = experts.parts if isinstance(experts, SizedExperts) else [experts]
    return [(part, number) for part in parts for number in range(part.num_experts)]


def make(kind: str, sizes: tuple[int, ...] | None = None) -> ExpertSet:
    cls, _, options = KINDS[kind]
    torch.manual_seed(0)
    if sizes is not None:
        return SizedExperts(cls, sizes, DIM, activation=torch.tanh, options=options).double()
    return cls(NUMBER, DIM, HIDDEN, torch.tanh, options=options).double()


def make_layer(kind: str, sizes: tuple[int, ...] | None = None) -> MoELayer:
    layer = MoELayer(ThresholdRouter(DIM, NUMBER, RouterOptions(threshold=0.7)), make(kind, sizes)).double()
    sharpen(layer)
    return layer


def by_loops(layer: MoELayer, x: Tensor, padding: Tensor, network: Network) -> tuple[Tensor, int, int]:
    """The output, the pairs and the hidden units of all real tokens, token by token."""
    experts, rows, pairs, units = parts_of(layer.experts), [], 0, 0
    for token, hidden in enumerate(x):
        y = torch.zeros_like(hidden)
        probs = torch.softmax(layer.router.weight @ hidden, -1)
        mass = 0.0
        for i in probs.argsort(descending=True).tolist() if not padding[token] else []:
            y = y + probs[i] * network(*experts[i], hidden)
            pairs, units = pairs + 1, units + experts[i][0].hidden
            mass += float(probs[i])
            if mass >= layer.router.options.threshold:
                break
        rows.append(y)
    return torch.stack(rows), pairs, units


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


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_one_size_is_the_plain_layer_bit_for_bit() -> None:
    def made(options: ExpertOptions, hidden: int = HIDDEN) -> ExpertSet:
        torch.manual_seed(0)
        return make_experts(Experts, NUMBER, DIM, hidden, options)

    plain = made(ExpertOptions())
    for other in (made(ExpertOptions(expert_sizes="-".join(["8"] * NUMBER)), 16), made(ExpertOptions(size_steps=1))):
        assert type(other) is Experts
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in other.state_dict().items())
    assert list(plain.state_dict()) == ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]


def test_an_expert_equals_two_halves_that_are_taken_together() -> None:
    torch.manual_seed(0)
    whole, halves = SizedExperts(Experts, (4, 8), DIM).double(), SizedExperts(Experts, (4, 4, 4), DIM).double()
    small, large = whole.parts
    (half,) = halves.parts
    with torch.no_grad():
        for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
            getattr(half, name)[0] = getattr(small, name)[0]
            getattr(half, name)[1:] = getattr(large, name)[0].unflatten(0, (2, 4))
        half.fc2_bias.copy_(torch.stack([small.fc2_bias[0], large.fc2_bias[0], torch.zeros(DIM)]))
    x, weight = torch.randn(4, DIM, dtype=torch.double), torch.rand(2, 4, dtype=torch.double)
    token = torch.arange(4)
    y = whole(x, Assignments(token.repeat(2), weight.flatten(), torch.tensor([4, 4])))
    again = halves(x, Assignments(token.repeat(3), torch.cat([weight, weight[1:]]).flatten(), torch.tensor([4, 4, 4])))
    torch.testing.assert_close(y, again)


@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    experts=st.integers(1, 70),
    hidden=st.integers(1, 40).map(lambda number: 8 * number),
    steps=st.integers(1, 64),
)
@settings(max_examples=300, deadline=None)
def test_strategies_keep_the_total_and_the_order(strategy: str, experts: int, hidden: int, steps: int) -> None:
    try:
        sizes = hidden_sizes(ExpertOptions(strategy, steps), experts, hidden)
    except ValueError as error:
        assert "equal groups: choose another number of experts, or size_steps" in str(error)
        return
    assert sizes is not None and len(sizes) == experts and sum(sizes) == experts * hidden
    assert list(sizes) == sorted(sizes) and all(size > 0 and size % 8 == 0 for size in sizes)
    assert len(set(sizes)) <= steps


def test_strategies_are_those_of_the_paper() -> None:
    def sizes(strategy: str, experts: int = 8, **more: int) -> tuple[int, ...] | None:
        return hidden_sizes(ExpertOptions(strategy, **more), experts, 256)

    assert sizes("arithmetic") == tuple(16 * number for number in range(9, 24, 2))
    assert sizes("hybrid") == (128,) * 4 + (256,) * 2 + (512,) * 2
    assert sizes("geometric") == (8, 16, 32, 64, 128, 256, 512, 1032)
    assert sizes("arithmetic", 16) == tuple(16 * number for number in range(9, 24, 2) for _ in range(2))
    assert len(set(sizes("arithmetic", 16, size_steps=16) or ())) == 16
    assert sizes("") is None


BAD_SIZES = {
    "hybird": "expert_sizes hybird is neither arithmetic, geometric, hybrid nor a list of sizes: write it as 64-",
    "8-8": "expert_sizes 8-8 has 2 sizes for 4 experts",
    "8-16-8-8": "is not ascending from 1 to",
    "0-8-8-8": "is not ascending from 1 to",
    "8-8-8-99999999": "is not ascending from 1 to 16777216",
    "8-8-8-" + "9" * 5000: "nor a list of sizes",
    "8--8-8": "nor a list of sizes",
    "8-8-8-\u00b2": "nor a list of sizes",
}


@pytest.mark.parametrize("given", BAD_SIZES)
def test_sizes_that_cannot_be_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match=BAD_SIZES[given]):
        hidden_sizes(ExpertOptions(given), 4, 16)


def test_sizes_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="hybrid makes sizes that are multiples of 8: 5 experts of 12 hidden units"):
        hidden_sizes(ExpertOptions("hybrid"), 5, 12)
    with pytest.raises(ValueError, match="8-16-24-32 has 4 different sizes, more than size_steps 3"):
        hidden_sizes(ExpertOptions("8-16-24-32", 3), 4, 16)
    with pytest.raises(ValueError, match="at most 65536 experts, not 16777216"):
        hidden_sizes(ExpertOptions("geometric"), 2**24, 8)
    with pytest.raises(ValueError, match=r"11 experts .* cannot be cut into up to 8 equal groups"):
        hidden_sizes(ExpertOptions("arithmetic"), 11, 256)
    with pytest.raises(ValueError, match=r"sizes \(8, 4\) of experts are not ascending"):
        SizedExperts(Experts, (8, 4), DIM)


# --- models ----------------------------------------------------------------------------------------------------------

SIZED = ("--moe-expert-sizes", "hybrid", "--moe-router", "topk", "--moe-top-k", "2")


def test_options_are_declared_by_the_kinds() -> None:
    names = declared(kind.Options for kind in EXPERTS.values())
    assert list(names) == [
        "expert_sizes",
        "size_steps",
        "glu_activation",
        "adapter_dim",
        "adapter_scale",
        "adapter_dropout",
        "mpo_bond",
        "mpo_mask",
    ]
    assert not names.keys() & declared(router.Options for router in ROUTERS.values()).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--moe-expert", "glu", "--moe-kernel", "fused"), "does not compute gated networks; .* auto, reference"),
        (("--moe-expert-sizes", "hybird"), "--moe-expert-sizes hybird is neither .*--encoder-ffn-embed-dim 256"),
        (("--moe-expert-sizes", "8-16"), "--moe-expert-sizes 8-16 has 2 sizes for 8 experts"),
        (("--moe-expert-sizes", "arithmetic", "--moe-num-experts", "11"), "or --moe-size-steps 11"),
        (("--moe-size-steps", "0"), r"--moe-size-steps 0 is out of range: it must be in \[1, 64\]"),
        ((*SIZED, "--moe-strata", "4-4", "--encoder-normalize-before", "--decoder-normalize-before"),
         "hybrid does not work with --moe-strata 4-4"),
        ((*SIZED, "--moe-expert-parallel", "4"),
         "--moe-expert-parallel 4 does not work with --moe-expert-sizes hybrid: .* there are 2 of 128 hidden units"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_on_meta("xmoe_transformer_tiny", 100, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [("--moe-expert", "glu"), SIZED, ("--moe-expert", "glu", *SIZED)], ids=" ".join)
def test_models_train_and_log_their_hidden_units(words: tuple[str, ...], toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, *words)
    optimizer, losses = torch.optim.Adam(built.model.parameters(), 0.01), []
    sample = batches(built.task)[0]
    for _ in range(6):
        loss, size, log = built.criterion(built.model, sample)
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    if "hybrid" not in words:
        assert "enc_hidden" not in log
        return
    experts = built.model.encoder.layers[1].moe.experts
    assert Counter(experts.sizes) == {64: 4, 128: 2, 256: 2}
    assert log["enc_received"] * 64 < log["enc_hidden"] < log["enc_received"] * 256
    assert {name.rpartition(".")[2] for name in built.model.state_dict() if "parts.0" in name} == set(
        experts.parts[0].names
    )


def test_analysis_counts_each_token_at_the_sizes_of_its_own_experts(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-expert-sizes", "hybrid", "--moe-threshold", "0.6")
    model = built.model.eval()
    sharpen(model)
    texts = read(built.task, model, "test", 5, 200)
    costs = [4 * 32 * size for size in (64,) * 4 + (128,) * 2 + (256,) * 2]
    spent: dict[str, list[int]] = {"encoder.2": [], "decoder.2": []}
    for batch in (batch for text in texts for batch in text):
        for layer, routing in per_token(model, batch["net_input"]).items():
            for taken in routing.taken.flatten(0, 1).tolist():
                if any(taken):  # no padding
                    spent[layer].append(sum(number * cost for number, cost in zip(taken, costs, strict=True)))
    router, everything = 2 * 32 * 8, sum(costs)
    for row in flops_table(count(model, texts, padding=1)).records():
        assert row["flops"] == pytest.approx(router + fmean(spent[row["layer"]]))
        assert row["flops_of_all_experts"] == router + everything
    assert [place.flops_by_expert for place in places(model)] == [tuple(costs)] * 2


def test_memory_is_that_of_the_kind() -> None:
    def least(*words: str) -> int:
        model: Any = build_on_meta("xmoe_transformer_tiny", 100, words)
        return least_parameters(model.cfg, 100, None)

    ffn = least()
    assert least("--moe-expert", "glu") - ffn == 2 * 8 * 128 * 128  # a third matrix in two layers
    assert least(*SIZED) == ffn
    assert least("--moe-expert-sizes", "8-8-8-8-8-8-8-8") == ffn - 2 * 2 * 8 * 128 * (128 - 8)


def test_experts_are_told_in_training_what_they_computed(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[StackedExperts, list[int]]] = []
    monkeypatch.setattr(StackedExperts, "notice", lambda self, load: seen.append((self, load.tolist())))
    built = build(toy_data, *TINY_ARGS, *SIZED, "--moe-stack", "2")
    sample = batches(built.task)[0]
    _, _, log = built.criterion.train()(built.model.train(), sample)
    assert [part.num_experts for part, _ in seen] == [4, 2, 2] * 4 == [len(load) for _, load in seen]
    assert sum(sum(load) for _, load in seen) == log["enc_received"] + log["dec_received"]
    assert sum(part.hidden * sum(load) for part, load in seen) == log["enc_hidden"] + log["dec_hidden"]
    seen.clear()
    built.criterion.eval()(built.model.eval(), sample)
    assert not seen


def test_parameters_of_any_kind_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shards.is_expert("encoder.layers.1.moe.experts.fc1_weight")
    assert shards.is_expert("decoder.layers.1.moe.layers.0.experts.parts.2.gate_weight")
    for name in ("encoder.layers.1.moe.experts.in_weight", "encoder.layers.1.fc1.weight", "moe.router.weight"):
        assert not shards.is_expert(name)
    monkeypatch.setitem(EXPERTS, "maxout", MaxoutExperts)
    assert shards.is_expert("encoder.layers.1.moe.experts.in_weight")


SCRIPT = """
import sys
from pathlib import Path
from fairseq_cli import generate, train
from xmoe_fairseq.cli import main
data, save = sys.argv[1], Path(sys.argv[2])
model = "--arch xmoe_transformer_tiny --moe-expert maxout --moe-pieces 3 --moe-expert-sizes hybrid".split()
main(["info", *model, "--vocab", "100"])
def run(command, *words):
    sys.argv = ["fairseq", data, "--user-dir", str(save.parent / "xmoe_fairseq"), *words]
    command.cli_main()
run(train, *TRAIN_ARGS, *model, "--encoder-embed-dim", "32", "--share-all-embeddings", "--save-dir", str(save),
    "--max-update", "2", "--no-epoch-checkpoints")
last = save / "checkpoint_last.pt"
main(["checkpoint", "shard", str(last), "--shards", "2", "--out", str(save / "parts.pt")])
main(["checkpoint", "info", str(save / "parts.pt"), "--json"])
run(generate, "--path", str(save / "parts.pt"), "--task", "multilingual_local", "--source-lang", "en",
    "--target-lang", "xx", "--cpu", "--max-len-b", "5", "--quiet")
measured = ["--checkpoint", str(last), "--data", data]
main(["info", *model, "--encoder-embed-dim", "32", "--vocab", "47", *measured, "--json"])
"""


def test_one_file_and_one_line_make_a_new_kind(toy_data: Path, tmp_path: Path) -> None:
    """A copy of the package with the file of the toy, and its line, trains and translates with it."""
    moe = tmp_path / "xmoe_fairseq" / "moe"
    shutil.copytree(ROOT / "xmoe_fairseq", moe.parent, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "support" / "helpers_toy_expert.py", moe / "experts" / "maxout.py")
    kinds = (moe / "experts" / "kinds.py").read_text()
    kinds = kinds.replace("from .sized", "from .maxout import MaxoutExperts\nfrom .sized")
    (moe / "experts" / "kinds.py").write_text(
        kinds.replace('"ffn": Experts,', '"ffn": Experts, "maxout": MaxoutExperts,')
    )
    script = SCRIPT.replace("*TRAIN_ARGS", f"*{TRAIN_ARGS!r}")
    words = [sys.executable, "-c", script, str(toy_data), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "XMoE: 8 maxout experts (3 pieces) of hidden sizes 4 x 64, 2 x 128, 2 x 256, threshold 0.9" in result.stdout
    assert "8 of 8, from 1 to 8 possible, hidden sizes 4 x 64, 2 x 128, 2 x 256" in result.stdout
    documents = [json.loads("{" + part.partition("\n}")[0] + "}") for part in result.stdout.split("\n{")[1:]]
    checkpoint, info = documents
    assert checkpoint["experts"] == {f"{stack}.layers.1.moe.experts": 8 for stack in ("encoder", "decoder")}
    assert checkpoint["expert_parameters"] == info["parameters"]["expert"]
    per_unit = 3 * 32 + 3 + 32  # three pieces with their biases, and a row of the output
    assert info["parameters"]["expert"] == 2 * 8 * 128 * per_unit
    layer = info["layers"][0]
    assert layer["sizes"] == {"64": 4, "128": 2, "256": 2} and info["assumption"].startswith("measured")
    low, high = 2 * 2 * 64 * 4 * 32 * layer["taken"], 2 * 2 * 256 * 4 * 32 * layer["taken"]
    assert low < info["flops"]["experts"] < high
