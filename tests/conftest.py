"""Options and data shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import MISSING_KERNELS, write_toy_data
from hypothesis import settings

# A test that waits for a busy machine has not failed.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
# Without a GPU, Triton's programs are interpreted; it looks at this when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of reference values for tests/unit/test_golden.py",
    )


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of two pairs, for `--task multilingual_local`."""
    return write_toy_data(tmp_path_factory.mktemp("toy") / "bin", ("xx", "yy"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: else one process is left with them at the end."""
    for item in items:
        # As by -m slow, which replaces the "not gpu" of pyproject.toml.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
        missing = MISSING_KERNELS & set(_words(item))
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} has no {', '.join(missing)}"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _words(item: pytest.Item) -> Iterator[str]:
    """Gives the parameters of a test that are words or lists of words."""
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        yield from (word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str))
