"""A small checkpoint that the tests of bad inputs change."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_training import train


@pytest.fixture(scope="session")
def toy_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two updates on `toy_data`."""
    return train(toy_data, tmp_path_factory.mktemp("toy_run"), 2).save
