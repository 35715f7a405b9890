"""A checkpoint written before the package was rearranged (commit 6a4a709) trains on and translates as it did then.

Its options have names that are old by now (``--moe-kernel fused``).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, write_toy_data
from helpers_commands import run_warm

from xmoe_fairseq.checkpoints.summary import summarize

FOLDER = ROOT / "tests" / "golden" / "before_rings"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
SIZE = (
    *("--arch", "xmoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "16"),
    *("--encoder-ffn-embed-dim", "32", "--decoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2"),
    *("--decoder-attention-heads", "2", "--encoder-layers", "2", "--decoder-layers", "2", "--moe-num-experts", "4"),
    *("--moe-split-ratio", "2", "--moe-interval", "2", "--moe-kernel", "fused"),
)
TRAIN = (
    *("--task", "multilingual_local", "--criterion", "threshold_routing_cross_entropy", "--label-smoothing", "0.1"),
    *("--lr", "0.02", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "40", "--clip-norm", "1.0"),
    *("--dropout", "0", "--max-tokens", "500", "--num-workers", "0", "--cpu", "--seed", "1", "--log-format", "json"),
    *("--log-interval", "1", "--no-epoch-checkpoints", "--disable-validation", "--max-update", "404"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("before") / "data", ("ca", "de"))


@pytest.mark.parametrize("optimizer", ["moe_adam", "adam"])
def test_it_trains_on_as_before(data: Path, tmp_path: Path, optimizer: str) -> None:
    """The next four updates have the losses, use of experts and norms of gradients of that commit."""
    shutil.copy(FOLDER / "checkpoint.pt", tmp_path / "checkpoint_last.pt")
    words = (data, "--user-dir", "xmoe_fairseq", *SIZE, *TRAIN, "--optimizer", optimizer, "--save-dir", tmp_path)
    said = run_warm("fairseq-train", *words)
    logs = [json.loads(line) for line in re.findall(r'\{"epoch".*?\}', said.stdout + said.stderr)]
    updates = [log for log in logs if "num_updates" in log and "loss" in log]
    names = EXPECTED["updates"][0]
    assert [{name: log[name] for name in names} for log in updates[:4]] == EXPECTED["updates"]


def test_it_translates_as_before(data: Path) -> None:
    words = ("--task", "multilingual_local", "--path", FOLDER / "checkpoint.pt", "--gen-subset", "test", "--beam", "2")
    words += ("--source-lang", "en", "--target-lang", "ca", "--max-len-b", "8", "--max-tokens", "500", "--cpu")
    said = run_warm("fairseq-generate", data, "--user-dir", "xmoe_fairseq", *words)
    found = re.findall(r"^D-(\d+)\t[^\t]*\t(.*)$", said.stdout, flags=re.M)
    assert [text for _, text in sorted(found, key=lambda one: int(one[0]))] == EXPECTED["translations"]


def test_it_is_described() -> None:
    about = summarize(str(FOLDER / "checkpoint.pt"))
    assert (about.arch, about.updates) == ("xmoe_transformer_tiny", 400)
