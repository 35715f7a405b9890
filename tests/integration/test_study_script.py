"""A tiny study as a user runs it: killed on the way, it goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from helpers_prepare import arguments, write_input

from xmoe_fairseq.data_prep import prepare
from xmoe_fairseq.results.training_log import read_training

ROWS = """
train: >-
  --encoder-embed-dim 32 --share-all-embeddings --criterion threshold_routing_cross_entropy --optimizer adam --lr 0.002
  --lr-scheduler polynomial_decay --total-num-update {updates} --max-tokens 400 --max-target-positions 30
sweep: {thresholds: "0.1,0.5", lines: 2, than: gshard}
rows:
  - {name: gshard, arch: moe_transformer_tiny, why: the baseline, main: true}
  - {name: xmoe, arch: xmoe_transformer_tiny, options: --moe-num-experts 16, why: adaptive, main: true}
claims:
  - {claim: it is as good, source: nobody, system: xmoe, baseline: gshard, at: chosen, margin: 100}
"""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts the study in a group of its own, as `setsid` would."""
    words = ["-m", "xmoe_fairseq", "study", "--data", folder / "data", "--out", folder / "study", "--jobs", "2"]
    words += ["--rows", folder / "rows.yaml", "--seeds", "1", "--updates", "8", "--beam", "1", *more]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    prepare.main(arguments(write_input(tmp_path / "text"), tmp_path / "data"))
    (tmp_path / "rows.yaml").write_text(ROWS)
    study = tmp_path / "study"
    killed = start(tmp_path)
    deadline = time.monotonic() + 300
    while not (study / "gshard-1/checkpoints/checkpoint_1_2.pt").exists():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[1]
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (study / "gshard-1.json").exists()

    done = start(tmp_path)
    said = done.communicate(timeout=600)[1]
    assert done.returncode == 0, said[-3000:]
    results = json.loads((study / "results.json").read_text())
    assert [(row["name"], row["seeds"]) for row in results["rows"]] == [("gshard", [1]), ("xmoe", [1])]
    training = read_training([study / "gshard-1/train.log"])
    assert training is not None and training.restarts and training.updates == 8
    (claim,) = results["claims"]
    assert claim["verdict"] == "undecided" and 0 < claim["moe_flops"] <= 0.5
    chosen = json.loads((study / "xmoe-1.json").read_text())
    assert chosen["sweep"]["threshold"] in (0.1, 0.5) and len(chosen["chosen"]["bleu_draws"]) == 1000
    assert len(chosen["valid"]["updates"]) == len(chosen["valid"]["loss"]) == 8

    again = start(tmp_path)
    assert again.wait(120) == 0
    assert "0 of 2" not in again.communicate()[1]
