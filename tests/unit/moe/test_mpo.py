"""Experts that are products of tensors: what they share, what they cost, when the shared tensors are trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import batches, build
from torch import Tensor

from xmoe_fairseq.checkpoints.shards import is_expert
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models.architectures import build_on_meta
from xmoe_fairseq.moe import Experts, MoELayer, RouterOptions, ThresholdRouter
from xmoe_fairseq.moe.experts.mpo import MPOExperts, MPOOptions, decompose, factors, rebuild, shapes
from xmoe_fairseq.moe.flops import count_parameters, expert_sites

EXPERTS, DIM, HIDDEN = 4, 16, 24


def experts_of(**options: float) -> MPOExperts:
    torch.manual_seed(1)
    return MPOExperts(EXPERTS, DIM, HIDDEN, options=MPOOptions(**options))


def layer_of(experts: Experts) -> MoELayer:
    torch.manual_seed(2)
    return MoELayer(ThresholdRouter(DIM, EXPERTS, RouterOptions(threshold=0.8)), experts)


def test_sizes_are_spread_over_five_places() -> None:
    for size in (1, 2, 7, 24, 97, 512, 768, 2048, 3072, 4096):
        found = factors(size)
        assert math.prod(found) == size and found[2] == max(found), (size, found)
    assert factors(1024) == (4, 4, 4, 4, 4)
    assert factors(512) == (2, 4, 4, 4, 4)


@pytest.mark.parametrize(
    ("rows", "columns", "bonds", "auxiliary"),
    [
        ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4), (12, 192, 384, 16), 184_720),
        ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4), (16, 256, 512, 16), 328_192),
        ((4, 4, 8, 4, 4), (2, 4, 4, 4, 4), (8, 128, 256, 16), 82_240),
    ],
)
def test_numbers_of_parameters(
    rows: tuple[int, ...], columns: tuple[int, ...], bonds: tuple[int, ...], auxiliary: int
) -> None:
    """Of a matrix with full bonds: the central tensor is as large as the matrix, the others are 7.8% of it."""
    found = shapes(rows, columns)
    assert tuple(shape[3] for shape in found[:-1]) == bonds
    numbers = [math.prod(shape) for shape in found]
    assert numbers[2] == math.prod(rows) * math.prod(columns)
    assert sum(numbers) - numbers[2] == auxiliary
    assert max(max(shape[0], shape[3]) for shape in shapes(rows, columns, 10)) == 10


def test_all_experts_start_near_one_matrix() -> None:
    experts = experts_of()
    weight = experts.built()["fc1_weight"].detach()
    assert weight.shape == (EXPERTS, HIDDEN, DIM)
    spread = (weight - weight.mean(0)).std() / weight.std()
    assert 0.01 < float(spread) < 0.5
    assert float(weight.abs().mean()) == pytest.approx(0.5 / math.sqrt(DIM), rel=0.2)
    assert not torch.equal(experts.fc1_bias[0], experts.fc1_bias[1])


def test_layers_compute_the_networks_of_the_matrices() -> None:
    """Gradients of the shared tensors are sums over the experts; those of their own are of each."""
    experts = experts_of()
    plain = Experts(EXPERTS, DIM, HIDDEN)
    built = {name: tensor.detach().clone() for name, tensor in experts.built().items()}
    plain.load_state_dict(built)
    x = torch.randn(30, DIM)
    outputs: list[Tensor] = []
    for one in (experts, plain):
        y, _ = layer_of(one)(x)
        y.square().sum().backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs)
    for name in ("fc1", "fc2"):
        parts = [experts.get_parameter(f"{name}_tensor_{k}").detach() for k in (0, 1, 3, 4)]
        central = experts.get_parameter(f"{name}_central")
        upstream = plain.get_parameter(f"{name}_weight").grad
        assert upstream is not None
        total = torch.zeros_like(central)
        for expert in range(EXPERTS):
            own = central.detach().requires_grad_()
            every = [part[expert : expert + 1] for part in parts]
            (rebuild([*every[:2], own.unsqueeze(0), *every[2:]])[0] * upstream[expert]).sum().backward()
            assert own.grad is not None
            total += own.grad
        torch.testing.assert_close(central.grad, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [0.0, 0.5, 1.0])
def test_masked_updates_leave_the_shared_tensors(mask: float) -> None:
    """Bit for bit, by stochastic gradient descent; the draw follows the update, not the process."""
    experts, other = experts_of(mpo_mask=mask), experts_of(mpo_mask=mask)
    optimizer, drawn = torch.optim.SGD(experts.parameters(), 0.1), []
    layer = layer_of(experts)
    for update in range(1, 21):
        experts.set_num_updates(update)
        other.set_num_updates(update)
        before = experts.fc1_central.detach().clone(), experts.fc1_tensor_0.detach().clone()
        optimizer.zero_grad()
        layer(torch.randn(8, DIM))[0].square().sum().backward()
        optimizer.step()
        assert torch.equal(before[0], experts.fc1_central) == experts.masked == other.masked
        assert not torch.equal(before[1], experts.fc1_tensor_0)
        drawn.append(experts.masked)
    assert sum(drawn) == {0.0: 0, 1.0: 20}.get(mask, sum(drawn)) and (mask in (0.0, 1.0) or 4 <= sum(drawn) <= 16)


def test_bonds_cut_the_tensors() -> None:
    experts = experts_of(mpo_bond=3)
    assert max(parameter.shape[-1] for name, parameter in experts.named_parameters() if "tensor" in name) == 3
    matrix = torch.randn(HIDDEN, DIM)
    whole = decompose(matrix, factors(HIDDEN), factors(DIM))
    torch.testing.assert_close(rebuild([one.unsqueeze(0) for one in whole])[0], matrix, rtol=1e-5, atol=1e-5)


def test_models_of_such_experts(toy_data: Path) -> None:
    words = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")
    built = build(toy_data, *words, "--moe-expert", "mpo", "--moe-mpo-mask", "0.5")
    (sample, *_), model = batches(built.task), built.model.train()
    loss, *_ = built.criterion(model, sample)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    stacked = {name.rpartition(".")[2] for name in model.state_dict() if is_expert(name)}
    assert {"fc1_tensor_0", "fc2_tensor_4", "fc1_bias"} <= stacked and "fc1_central" not in stacked
    model.set_num_updates(1)
    masked = {module.masked for module in model.modules() if isinstance(module, MPOExperts)}
    assert len(masked) == 1


def test_parameters_and_flops() -> None:
    """A layer has one central tensor per matrix; a token costs what it costs with plain experts."""
    found = []
    for kind in ("mpo", "ffn"):
        model = build_on_meta("xmoe_transformer_tiny", 100, ("--moe-expert", kind))
        sites = expert_sites(model)
        taken = {site.name: 2.0 for site in sites}
        found.append((count_parameters(model, taken), [site.experts.flops() for site in sites]))
    (few, flops), (many, plain) = found
    assert flops == plain and few.expert < many.expert and few.total - few.expert == many.total - many.expert
    shape = shapes(factors(128), factors(128))
    numbers = [math.prod(one) for one in shape]
    own = 2 * (sum(numbers) - numbers[2]) + 128 + 128
    assert few.expert == 2 * (8 * own + 2 * numbers[2])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--moe-mpo-mask", "1.5"), "--moe-mpo-mask 1.5 is out of range"),
        (("--moe-mpo-bond", "-1"), "--moe-mpo-bond -1 is out of range"),
        (("--moe-expert-sizes", "hybrid"), "--moe-expert-sizes hybrid does not work with mpo experts"),
    ],
)
def test_refusals(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_on_meta("xmoe_transformer_tiny", 100, ("--moe-expert", "mpo", *words))
