"""Options and data shared by the tests."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of reference values for tests/unit/test_golden.py",
    )


def write_toy_data(folder: Path, languages: tuple[str, ...], lines: int = 200, symbols: int = 40) -> Path:
    """Writes a binarised data folder: each language has the English symbols in reverse, shifted by its number."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    (folder / "langs.txt").write_text("".join(f"{lang}\n" for lang in ("en", *languages)))
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(symbols)))
    for split, count in (("train", lines), ("valid", 20), ("test", 20)):
        for number, language in enumerate(languages):
            english = [[rng.randrange(symbols) for _ in range(rng.randint(2, 9))] for _ in range(count)]
            foreign = [[(word + number + 1) % symbols for word in reversed(line)] for line in english]
            for lang, text in (("en", english), (language, foreign)):
                prefix = str(folder / f"{split}.en-{language}.{lang}")
                builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
                for line in text:
                    builder.add_item(torch.tensor([word + 4 for word in line] + [2]))
                builder.finalize(f"{prefix}.idx")
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of two pairs, for `--task multilingual_local`."""
    return write_toy_data(tmp_path_factory.mktemp("toy") / "bin", ("xx", "yy"))
