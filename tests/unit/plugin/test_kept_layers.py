"""Translating and training with some of a model's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Built, batches, build, write_toy_data

from xmoe_fairseq.errors import UserError
from xmoe_fairseq.models.config import kept_layers

TINY = ("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")
DEEP = (*TINY, "--encoder-layers", "4", "--decoder-layers", "4", "--moe-stack", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("kept") / "bin", ("xx",), lines=5)


def keep(data: Path, encoder: str, decoder: str, *more: str) -> Built:
    return build(data, *DEEP, "--encoder-layers-to-keep", encoder, "--decoder-layers-to-keep", decoder, *more)


def with_experts(stack: torch.nn.Module) -> list[bool]:
    return [hasattr(layer, "moe") for layer in stack.layers]


@pytest.mark.parametrize("names", ["1,3", "0,2", "0,1", "2", "3,0,2"])
def test_the_layers_named_are_kept_and_stay_what_they_are(names: str, data: Path) -> None:
    whole, part = build(data, *DEEP), keep(data, names, "1,2")
    part.model.load_state_dict(whole.model.state_dict(), strict=True, model_cfg=part.cfg.model)
    numbers = sorted(map(int, names.split(",")))
    assert with_experts(part.model.encoder) == [number % 2 == 1 for number in numbers]
    assert with_experts(part.model.decoder) == [True, False]
    # What is left out of the whole model by hand computes the same.
    for stack, kept in ((whole.model.encoder, numbers), (whole.model.decoder, [1, 2])):
        stack.layers = torch.nn.ModuleList([stack.layers[number] for number in kept])
    sample = batches(whole.task)[0]["net_input"]
    outputs = [built.model.eval()(**sample)[0] for built in (whole, part)]
    assert torch.equal(*outputs)


def test_what_is_trained_without_layers_is_loaded_without_them(data: Path) -> None:
    part, again = keep(data, "1,3", "0,3"), keep(data, "1,3", "0,3")
    assert part.cfg.model.encoder_layers_to_keep == "1,3"
    sample = batches(part.task)[0]
    loss, _, _ = part.criterion(part.model.train(), sample)
    loss.backward()
    again.model.load_state_dict(part.model.state_dict(), strict=True, model_cfg=again.cfg.model)
    assert again.cfg.model.encoder_layers_to_keep == "1,3"  # the next checkpoint says it, too
    with pytest.raises(UserError, match=r"--encoder-layers-to-keep 1 is of 4 layers, .* encoder has 2"):
        keep(data, "1", "0,3").model.load_state_dict(part.model.state_dict())


@pytest.mark.parametrize("names", ["4", "1,1", "one", "1,", "-1"])
def test_no_list_of_layers(names: str) -> None:
    with pytest.raises(ValueError, match="is no list of different layers from 0 to 3: write it as 1,3"):
        kept_layers(names, 4)


@pytest.mark.parametrize("drop", ["0.5", "1"])
def test_layerdrop_trains_whatever_layers_are_left(drop: str, data: Path) -> None:
    built = build(data, *DEEP, "--encoder-layerdrop", drop, "--decoder-layerdrop", drop)
    sample = batches(built.task)[0]
    logs = []
    for _ in range(4):
        loss, _, log = built.criterion(built.model.train(), sample)
        loss.backward()
        logs.append(log)
        assert torch.isfinite(loss)
    counted = {int(log[f"{stack}_tokens"]) for log in logs for stack in ("enc", "dec")}
    assert counted == {0} if drop == "1" else len(counted) > 1
    type(built.criterion).reduce_metrics(logs)
    _, extra = built.model.eval()(**sample["net_input"])
    assert {stack: len(layers) for stack, layers in extra["routing"].items()} == {"encoder": 2, "decoder": 2}
