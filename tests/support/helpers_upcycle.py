"""Checks of what ``xmoe upcycle`` makes against reference values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fairseq import utils
from torch import Tensor

from xmoe_fairseq.conversion import growing
from xmoe_fairseq.moe import EXPERTS, ROUTERS, MoELayer, RouterOptions
from xmoe_fairseq.moe.experts.adapters import AdapterOptions

Golden = dict[str, np.ndarray]


def tensor(golden: Golden, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(golden[name]))


def assert_close(actual: Tensor, expected: np.ndarray) -> None:
    wanted = torch.from_numpy(np.asarray(expected)).double()
    torch.testing.assert_close(actual.detach().double(), wanted, rtol=1e-4, atol=1e-5)


def layer_of(parts: growing.Parts, router_weight: Tensor, router: str, activation: Any, **options: Any) -> MoELayer:
    """Builds the MoE layer of experts, in float64."""
    stacked = {f"experts.{name}": torch.stack(tensors) for name, tensors in parts.items()}
    experts, hidden, dim = stacked["experts.fc1_weight"].shape
    layer = MoELayer(
        ROUTERS[router](dim, experts, RouterOptions(**options)),
        EXPERTS["ffn"](experts, dim, hidden, activation, kernel="reference"),
    ).double()
    layer.load_state_dict({"router.weight": router_weight, **stacked})
    return layer.eval()


def network_of(golden: Golden) -> growing.Network:
    """Reads the dense network; `read` of test_golden transposes 3-dimensional matrices only."""
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return growing.Network(*(tensor(golden, name).double() for name in names))


def check_upcycle(golden: Golden) -> None:
    """Checks copies under three routers, and slices with their routers at all thresholds."""
    x, network = tensor(golden, "x").double(), network_of(golden)
    name, groups = str(golden["activation"]), int(golden["slices"])
    activation = utils.get_activation_fn(name)
    router = tensor(golden, "copy_router").double()
    copied = growing.copies(network, len(router))
    for kind in ("gshard", "switch"):
        assert_close(layer_of(copied, router, kind, activation)(x)[0], golden[f"y_{kind}"])
    assert_close(layer_of(copied, router, "gshard", activation)(x)[0], golden["y_dense"])
    rows = growing.router_rows(tensor(golden, "group_router").double(), groups)
    assert torch.equal(rows, tensor(golden, "router_weight").double())
    sliced = growing.slices(network, len(rows), groups, name == "relu")
    for part, tensors in sliced.items():
        assert_close(torch.stack(tensors), golden[f"expert_{part}"])
    for number, threshold in enumerate(golden["thresholds"].tolist()):
        y, _ = layer_of(copied, router, "threshold", activation, threshold=threshold)(x)
        assert_close(y, golden["y_threshold"][number])
        layer = layer_of(sliced, rows, "threshold", activation, threshold=threshold)
        # Equal probabilities must stay equal: take the logits of the file and do not multiply again.
        plan = layer.router.plan(tensor(golden, "router_logits").double())
        assert_close(layer.experts(x, plan), golden["y_sliced"][number])
        assert_close(plan.stats.received / len(x), golden["experts_sliced"][number])
    assert threshold == 1
    assert_close(layer(x)[0], golden["y_dense"])


def check_pesc(golden: Golden) -> None:
    """Checks adapters on one network: PESC's weights, whose sum is 1, with gradients, and a threshold's."""
    (experts, dim), (_, adapter, _) = golden["router_weight"].shape, golden["down_weight"].shape
    hidden, k = len(golden["fc1_bias"]), int(golden["top_k"])
    options = AdapterOptions(adapter_dim=adapter, adapter_scale=float(golden["scale"]))
    values = {f"shared.fc{n}.{part}": tensor(golden, f"fc{n}_{part}") for n in (1, 2) for part in ("weight", "bias")}
    values |= {
        "fc1_weight": tensor(golden, "down_weight"),
        "fc1_bias": torch.zeros(experts, adapter),
        "fc2_weight": tensor(golden, "up_weight").transpose(1, 2),
        "fc2_bias": torch.zeros(experts, dim),
    }
    made = EXPERTS["adapter"](experts, dim, hidden, options=options)
    made.load_state_dict(values)
    x = tensor(golden, "x").requires_grad_()

    def run(router: str, **given: Any) -> tuple[MoELayer, Tensor, Any]:
        layer = MoELayer(ROUTERS[router](dim, experts, RouterOptions(**given)), made).eval()
        with torch.no_grad():
            layer.router.weight.copy_(tensor(golden, "router_weight"))  # type: ignore[union-attr]
        return layer, *layer(x)

    assert_close(made.shared(x), golden["shared"])
    _, y, _ = run("threshold", threshold=float(golden["threshold"]))
    assert_close(y, golden["y_threshold"])
    layer, y, plan = run("gshard", second_expert="gate") if k == 2 else run("topk", top_k=k)
    if k == 2:
        taken = torch.zeros(len(x), experts)
        taken[plan.token, torch.repeat_interleave(torch.arange(experts), plan.group_sizes)] = plan.weight.detach()
        assert_close(taken, golden["gates"])
    else:  # of one expert, PESC's weight is 1 and the router's is its probability
        weights = plan.weight.detach()
        assert_close(made.shared(x) + (y - made.shared(x)) / _by_token(plan, weights), golden["y"])
        return
    assert_close(y, golden["y"])
    assert str(golden["loss_is"]) == "(y**2).sum()"
    y.square().sum().backward()
    found = {
        "x": x,
        "router_weight": layer.router.weight,
        "down_weight": made.fc1_weight,
        "fc1_weight": made.shared.fc1.weight,
        "fc2_weight": made.shared.fc2.weight,
    }
    for name, parameter in found.items():
        assert_close(parameter.grad, golden[f"grad_{name}"])  # type: ignore[arg-type]
    assert_close(made.fc2_weight.grad.transpose(1, 2), golden["grad_up_weight"])


def _by_token(plan: Any, weights: Tensor) -> Tensor:
    return torch.zeros(plan.num_tokens).index_add(0, plan.token, weights).unsqueeze(-1)
