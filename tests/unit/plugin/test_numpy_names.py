"""Names that NumPy 2 has no more and stock fairseq uses."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import fairseq
import numpy as np
import pytest
from helpers import write_toy_data
from helpers_commands import run_warm

from xmoe_fairseq.patches.numpy_names import MODULES, OlderNumPy

FOLDER = Path(fairseq.__file__).parent
TRAIN = ("--optimizer", "adam", "--lr", "0.002", "--max-tokens", "200", "--num-workers", "0", "--cpu", "--no-save")
PLUGIN = ("--user-dir", "xmoe_fairseq")


def names_used(path: Path) -> set[str]:
    """The first names after ``np.`` in a module."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"\bnp\.([a-zA-Z_]\w*)", text)) if "import numpy as np" in text else set()


def test_every_name_of_numpy_that_fairseq_uses_is_there() -> None:
    lacking = set()
    for path in FOLDER.rglob("*.py"):
        if "examples" not in path.parts and any(not hasattr(np, name) for name in names_used(path)):
            lacking.add(".".join(path.relative_to(FOLDER.parent).with_suffix("").parts))
    assert lacking <= set(MODULES)
    for module in MODULES:
        names = names_used(FOLDER.parent / f"{module.replace('.', '/')}.py")
        assert all(hasattr(importlib.import_module(module).np, name) for name in names), module


def test_numpy_itself_stays_as_it_is() -> None:
    assert not hasattr(np, "int") and isinstance(OlderNumPy("numpy").int, type)
    with pytest.raises(AttributeError):
        _ = OlderNumPy("numpy").no_such_name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with a dictionary for each language, and the text of one language alone in ``lm``."""
    folder = write_toy_data(tmp_path_factory.mktemp("numpy") / "bin", ("xx",), lines=40)
    (folder / "lm").mkdir()
    for target in ("dict.en.txt", "dict.xx.txt", "lm/dict.txt"):
        shutil.copy(folder / "dict.txt", folder / target)
    for path in folder.glob("*.en-xx.en.*"):
        shutil.copy(path, folder / "lm" / f"{path.name.split('.')[0]}{path.suffix}")
    return folder


def test_a_language_model_is_trained_and_measured(data: Path, tmp_path: Path) -> None:
    words = ("--task", "language_modeling", "--sample-break-mode", "eos", "--tokens-per-sample", "32")
    model = ("--arch", "transformer_lm", "--decoder-embed-dim", "16", "--decoder-layers", "1")
    saved = (*TRAIN[:-1], "--save-dir", tmp_path, "--max-update", "2", "--no-epoch-checkpoints")
    run_warm("fairseq-train", data / "lm", *PLUGIN, *words, *model, *saved)
    path = ("--path", tmp_path / "checkpoint_last.pt", "--max-tokens", "200", "--cpu")
    result = run_warm("fairseq-eval-lm", data / "lm", *PLUGIN, *words[2:], *path)
    assert re.search(r"Loss \(base 2\): \d+\.\d+, Perplexity: \d", result.stdout + result.stderr)


def test_batches_in_buckets_of_lengths(data: Path) -> None:
    result = run_warm(
        *("fairseq-train", data, *PLUGIN, "--task", "translation", "--source-lang", "en", "--target-lang", "xx"),
        *("--arch", "xmoe_transformer_tiny", "--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
        *("--num-batch-buckets", "3", "--max-update", "2", *TRAIN),
    )
    assert "bucketing source lengths: [" in result.stdout and "done training" in result.stdout
