"""Models as Python objects: copied, pickled, saved whole, quantised."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches, build, write_toy_data

MODELS = {
    "xmoe": ("--arch", "xmoe_transformer_tiny", "--activation-fn", "gelu"),
    "smoe": ("--arch", "smoe_transformer_tiny"),
    "cmr": ("--arch", "moe_transformer_tiny", "--moe-regularizer", "cmr"),
    "checkpointed": ("--arch", "xmoe_transformer_tiny", "--checkpoint-activations"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("pickling") / "bin", ("xx",), lines=5)


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
def test_copies_compute_the_same(name: str, data: Path) -> None:
    built = build(data, *MODELS[name], "--share-all-embeddings", "--encoder-embed-dim", "32")
    sample = batches(built.task)[0]
    loss, _, _ = built.criterion(built.model.train(), sample)  # after a step of training, too
    loss.backward()
    model = built.model.eval()
    expected = model(**sample["net_input"])[0]
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        assert torch.equal(made(**sample["net_input"])[0], expected)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(model(**sample["net_input"])[0], expected)  # nothing is shared


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantisation(name: str, data: Path) -> None:
    built = build(data, *MODELS[name], "--share-all-embeddings", "--encoder-embed-dim", "32", "--moe-threshold", "1")
    model, inputs = built.model.eval(), batches(built.task)[0]["net_input"]
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    with torch.inference_mode():
        exact, rough = model(**inputs)[0], small(**inputs)[0]
    assert (exact - rough).norm() < 0.1 * exact.norm()
