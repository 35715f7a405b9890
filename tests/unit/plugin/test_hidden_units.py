"""The share of hidden units above zero, against loops over tokens and experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build
from helpers_routing import MODELS, sharpen
from torch import Tensor
from torch.nn import functional as F

from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import count
from xmoe_fairseq.models.hidden_units import HiddenUnits, counting_hidden_units
from xmoe_fairseq.models.routing_recorder import per_token, run_forced, stack_inputs, stack_of

TINY = MODELS["threshold"]
CASES = {
    "relu": TINY,
    "gelu": (*TINY, "--activation-fn", "gelu"),
    "of two sizes": (*TINY, "--moe-expert-sizes", "64-64-64-64-192-192-192-192"),
}


def counted(model: Any, net_input: dict[str, Tensor]) -> dict[str, HiddenUnits]:
    with counting_hidden_units(model) as found:
        run_forced(model, net_input)
    return found


def by_loops(model: Any, net_input: dict[str, Tensor], activation: Any) -> dict[str, tuple[int, int]]:
    """Units and positive ones of each layer, a token and an expert at a time."""
    inputs: dict[str, Tensor] = {}
    for stack in stack_inputs(model):
        for number, layer in enumerate(getattr(model, stack).layers, 1):
            first = layer.moe if hasattr(layer, "moe") else layer.fc1
            hook = lambda _, given, name=f"{stack}.{number}": inputs.update({name: given[0].transpose(0, 1)})  # noqa: E731
            first.register_forward_pre_hook(hook)
    taken = {name: routing.taken for name, routing in per_token(model, net_input).items()}
    found = {}
    for name, x in inputs.items():
        real = net_input[stack_inputs(model)[stack_of(name)]] != 1
        layer = getattr(model, stack_of(name)).layers[int(name.partition(".")[2]) - 1]
        units = [
            activation(F.linear(row, *matrices))
            for place, row in zip(real.nonzero().tolist(), x[real], strict=True)
            for matrices in _taken(layer, taken[name][tuple(place)] if name in taken else None)
        ]
        found[name] = (sum(map(len, units)), sum(int((one > 0).sum()) for one in units))
    return found


def _taken(layer: Any, taken: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The first matrix, with its bias, of each expert that a token took, or of the dense network."""
    if taken is None:
        return [(layer.fc1.weight, layer.fc1.bias)]
    experts = getattr(layer.moe.experts, "parts", [layer.moe.experts])
    stacked = [pair for part in experts for pair in zip(part.fc1_weight, part.fc1_bias, strict=True)]
    return [stacked[number] for number in taken.nonzero().flatten().tolist()]


@pytest.mark.parametrize("name", CASES)
def test_units_are_those_of_real_tokens_in_the_experts_that_they_took(name: str, toy_data: Path) -> None:
    built = build(toy_data, *CASES[name])
    model = built.model.double().eval()
    sharpen(model)
    text = read(built.task, model, "test", 4, 500)[0]
    net_input = next(iter(text))["net_input"]
    assert (net_input["src_tokens"] == 1).any() and (net_input["prev_output_tokens"] == 1).any()
    before = {name: module.kernel for name, module in model.named_modules() if hasattr(module, "kernel")}
    found = counted(model, net_input)
    wanted = by_loops(model, net_input, F.gelu if name == "gelu" else torch.relu)
    assert {layer: (units.units, units.positive) for layer, units in found.items()} == wanted
    assert [(layer, units.experts) for layer, units in found.items()] == [
        (f"{stack}.{number}", number == 2) for stack in ("encoder", "decoder") for number in (1, 2)
    ]
    assert {name: module.kernel for name, module in model.named_modules() if hasattr(module, "kernel")} == before


def test_nothing_is_counted_afterwards_nor_changed(toy_data: Path) -> None:
    built = build(toy_data, *TINY)
    model = built.model.eval()
    texts = read(built.task, model, "test", 2, 500)
    net_input = next(iter(texts[0]))["net_input"]
    with torch.inference_mode():
        before = model(**net_input)[0]
        with counting_hidden_units(model) as found:
            torch.testing.assert_close(model(**net_input)[0], before)
        seen = {layer: units.units for layer, units in found.items()}
        assert torch.equal(model(**net_input)[0], before)
    assert {layer: units.units for layer, units in found.items()} == seen
    counts = count(model, texts, padding=1)
    assert counts.hidden.keys() == found.keys() and all(0 < units.share < 1 for units in counts.hidden.values())
