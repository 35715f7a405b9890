"""Checks of what ``xmoe sparsify`` and ``xmoe prune`` compute against reference values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fairseq import utils
from torch import Tensor

from xmoe_fairseq.conversion import importance, merging, splitting
from xmoe_fairseq.moe import EXPERTS, ROUTERS, MoELayer, RouterOptions, SharedBias

Golden = dict[str, np.ndarray]


def tensor(golden: Golden, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(golden[name]))


def assert_close(actual: Any, expected: Any) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), expected, rtol=1e-4, atol=1e-5)


def cut_layer(golden: Golden, labels: Tensor) -> SharedBias:
    """Builds the layer that a network becomes, with the router of the golden file."""
    experts, dim = golden["router_weight"].shape
    hidden = len(labels) // experts
    activation = utils.get_activation_fn(str(golden["activation"]))
    parts = EXPERTS["part"](experts, dim, hidden, activation)
    layer = SharedBias(MoELayer(ROUTERS["parts"](dim, experts, RouterOptions()), parts), dim)
    order = labels.argsort(stable=True)
    layer.load_state_dict(
        {
            "bias": tensor(golden, "fc2_bias"),
            "moe.router.weight": tensor(golden, "router_weight"),
            "moe.experts.fc1_weight": tensor(golden, "fc1_weight")[order].view(experts, hidden, dim),
            "moe.experts.fc1_bias": tensor(golden, "fc1_bias")[order].view(experts, hidden),
            "moe.experts.fc2_weight": tensor(golden, "fc2_weight").t()[order].view(experts, hidden, dim),
        }
    )
    return layer.eval()


def check_sparsify(golden: Golden) -> None:
    """Checks clusters, scores, the fit's loss with its gradient, and the layer at all thresholds.

    MoEfication's own selections (``y_topk``, ``similarity``, ``mlp_*``) are no part of the product.
    """
    x, weight = tensor(golden, "x"), tensor(golden, "fc1_weight")
    labels = splitting.clusters(weight, len(golden["router_weight"]))
    assert labels.tolist() == golden["labels"].tolist()
    found = splitting.centres(weight, labels)
    rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
    assert_close((rows - found[labels]).square().sum(), golden["objective"])
    assert_close(found, golden["centres"])
    activation = utils.get_activation_fn(str(golden["activation"]))
    network = splitting.Network(weight, tensor(golden, "fc1_bias"), tensor(golden, "fc2_weight"), activation)
    assert_close(splitting.scores(network, network.hidden(x), labels, "activation"), golden["summed"])
    assert_close(splitting.scores(network, network.hidden(x), labels, "contribution"), golden["contribution"])
    kept, target, _ = splitting.shares(network, x, labels, "contribution")
    router = tensor(golden, "router_weight")
    loss, grad = splitting.fit_loss(router, kept, target)
    assert_close(loss, golden["fit_loss"])
    assert_close(grad, golden["fit_grad"])
    layer = cut_layer(golden, labels)
    thresholds = [float(one) for one in golden["thresholds"]]
    covered = list(splitting.covers(router, kept, target, tuple(thresholds)))
    for number, threshold in enumerate(thresholds):
        layer.moe.router.turn(threshold)  # type: ignore[operator, union-attr]
        y, plan = layer(x)
        assert_close(y, golden["y"][number])
        assert_close(plan.stats.received / plan.stats.tokens, golden["experts"][number])
        assert_close(covered[number].experts, golden["experts"][number])
        assert_close(covered[number].coverage, golden["coverage"][number])
        assert_close(covered[number].oracle_experts, golden["experts_oracle"][number])
    assert thresholds[-1] == 1
    assert_close(y, golden["y_dense"])


def pruned_layer(golden: Golden, kept: list[int] | None = None, merged: str = "") -> MoELayer:
    """Builds the layer of a golden file in float64: all experts, some of them, or those that were merged."""
    weight = tensor(golden, f"{merged}gate_weight").double()
    kept = list(range(len(weight))) if kept is None else kept
    router = str(golden["router"])
    options = RouterOptions(threshold=float(golden["value"])) if router == "threshold" else RouterOptions()
    _, hidden, dim = golden["fc1_weight"].shape
    layer = MoELayer(ROUTERS[router](dim, len(kept), options), EXPERTS["ffn"](len(kept), dim, hidden)).double()
    state = {"router.weight": weight[kept]}
    for name, _ in layer.experts.named_parameters():
        state[f"experts.{name}"] = tensor(golden, f"{merged}{name}").double()[kept]
    layer.load_state_dict(state)
    return layer.eval()


def check_prune(golden: Golden) -> None:
    """Checks the statistics of one layer, what is kept, and merging."""
    x, mask = tensor(golden, "x").double(), tensor(golden, "padding_mask")
    layer = pruned_layer(golden)
    y, plan = layer(x, mask)
    assert_close(y, golden["y"])
    tally = importance.Tally(len(golden["load"]))
    tally.add(plan, int((~mask).sum()), importance.output_norms(layer.experts, x, plan))
    found = importance.Statistics.over([tally])
    for name in ("activity", "confidence", "importance", "mass", "reap", "load"):
        assert_close(getattr(found, name), golden[name])
    number = int(golden["number_kept"])
    kept = importance.highest(found.importance, number)
    assert kept == golden["kept"].tolist()
    y, plan = pruned_layer(golden, kept)(x, mask)
    assert_close(y, golden["y_kept"])
    assert_close(plan.stats.received / plan.stats.tokens, golden["experts_a_token_kept"])
    similar = merging.cka(merging.outputs(layer.experts, x[~mask]))
    assert_close(similar, golden["cka"])
    groups = merging.linked(1 - similar, number)
    assert [next(i for i, group in enumerate(groups) if e in group) for e in range(len(similar))] == golden[
        "groups"
    ].tolist()
    for group in groups:
        assert_close(merging.shares_of(found.load, group), golden["shares"][group])
    tensors = {name: parameter.detach() for name, parameter in layer.experts.named_parameters()}
    tensors["router"] = layer.router.weight.detach()
    merged = merging.merge(tensors, ("fc1_weight", "fc1_bias", "fc2_weight"), groups, found.load)
    for name, values in merged.items():
        assert_close(values, golden[f"merged_{'gate_weight' if name == 'router' else name}"])
    assert_close(pruned_layer(golden, list(range(number)), "merged_")(x, mask)[0], golden["y_merged"])


def check_selection(golden: Golden) -> None:
    """Checks the selection of experts in several layers: each by itself, all together, by direction, by language."""
    activity, confidence = tensor(golden, "activity").double(), tensor(golden, "confidence").double()
    encoders, layers = int(golden["encoder_layers"]), activity.shape[1]
    names = [f"{'encoder' if n < encoders else 'decoder'}.{n}" for n in range(layers)]
    pairs = [str(pair) for pair in golden["pairs"]]
    sources = [n for n, pair in enumerate(pairs) if pair.startswith("en-")]
    targets = [n for n, pair in enumerate(pairs) if pair.endswith("-ca")]
    budget = importance.Budget(float(golden["keep"]), int(golden["ratio"]), int(golden["least"]))
    numbers = budget.numbers(dict.fromkeys(names, activity.shape[2]))
    assert list(numbers.values()) == golden["numbers"].tolist()
    assert budget.total([activity.shape[2]] * layers) == int(golden["total"])

    def over(directions: list[int]) -> Tensor:
        return importance.importance(activity[directions].mean(0), confidence[directions].mean(0))

    by_language = torch.cat([over(sources)[:encoders], over(targets)[encoders:]])
    found = {"all": over(list(range(len(pairs)))), "pair": over([0]), "language": by_language}
    for kind, values in found.items():
        assert_close(values, golden[f"importance_{kind}"])
        kept = golden["kept_layer" if kind == "all" else f"kept_layer_{kind}"]
        for values_of_layer, wanted, number in zip(values, kept, numbers.values(), strict=True):
            assert importance.highest(values_of_layer, number) == np.flatnonzero(wanted).tolist()
    together = importance.select_global(dict(zip(names, found["all"], strict=True)), budget)
    assert list(together.values()) == [np.flatnonzero(wanted).tolist() for wanted in golden["kept_global"]]
