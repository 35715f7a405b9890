"""One model for all that is measured with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fairseq import checkpoint_utils
from helpers import batches, build, save_checkpoint
from helpers_routing import MODELS, sharpen

from xmoe_fairseq.checkpoints import shards
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.trained_model import TrainedModel
from xmoe_fairseq.models.routing_recorder import per_layer


@pytest.fixture
def checkpoint(toy_data: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(*args: str) -> Path:
        built = build(toy_data, *args)
        sharpen(built.model)
        return save_checkpoint(built, tmp_path / "checkpoint_last.pt")

    return make


def received(trained: TrainedModel, text: list[dict]) -> list[float]:
    return [float(stats.received) for sample in text for stats in per_layer(trained.model, sample["net_input"])]


def loaded_with(path: Path, data: Path, threshold: float) -> TrainedModel:
    """Loads a model as ``--model-overrides`` of stock fairseq does."""
    overrides = {"data": str(data), "moe_threshold": threshold}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    return TrainedModel(path, models[0].eval(), cfg, task)


@pytest.mark.parametrize("options", [MODELS["threshold"], (*MODELS["smoe"], "--moe-router", "threshold")])
def test_another_threshold_is_as_if_loaded_with_it(
    options: tuple[str, ...], checkpoint: Callable[..., Path], toy_data: Path
) -> None:
    path = checkpoint(*options)
    trained = TrainedModel.load(path, toy_data)
    text = batches(trained.task, "test")
    seen = set()
    for threshold in (0.2, 0.0, 1.0, 0.6):
        trained.set_threshold(threshold)
        loaded = loaded_with(path, toy_data, threshold)
        assert received(trained, text) == received(loaded, text)
        seen.add(tuple(received(loaded, text)))
    assert len(seen) > 2


def test_a_threshold_is_refused_where_there_is_none_or_it_is_out_of_range(
    checkpoint: Callable[..., Path], toy_data: Path
) -> None:
    trained = TrainedModel.load(checkpoint(*MODELS["threshold"]), toy_data)
    with pytest.raises(UserError, match=r"threshold 1.5 is outside \[0, 1\]"):
        trained.set_threshold(1.5)
    other = TrainedModel.load(checkpoint(*MODELS["gshard"]), toy_data)
    with pytest.raises(UserError, match="has no threshold to choose: its router is gshard"):
        other.set_threshold(0.5)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = shards.fingerprint(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(shards.hashlib, "file_digest", None)
        assert shards.fingerprint(str(path)) == first
    path.write_bytes(b"other")
    assert shards.fingerprint(str(path)) != first
