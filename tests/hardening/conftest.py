"""Small checkpoints, and data, that the tests of bad inputs change."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_identity import prepared
from helpers_training import MODEL, train


@pytest.fixture(scope="session")
def toy_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two updates on `toy_data`."""
    return train(toy_data, tmp_path_factory.mktemp("toy_run"), 2).save


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus that was prepared, with its vocabulary."""
    return prepared(tmp_path_factory.mktemp("small"), "abcdefgh")


@pytest.fixture(scope="session")
def small_model(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training of two updates on `small_data`."""
    return train(small_data / "bin", tmp_path_factory.mktemp("small_run"), 2, *MODEL).save / "checkpoint_last.pt"
