"""Data that tests of several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_prepare import arguments, write_input

from xmoe_fairseq.data_prep import prepare


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, as a user would give it."""
    return write_input(tmp_path_factory.mktemp("source") / "input")


@pytest.fixture(scope="session")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is prepared from it."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.main(arguments(source, out))
    return out
