"""Models that ``xmoe upcycle``, ``sparsify`` and ``prune`` made are trained by processes that share experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import build, save_checkpoint
from helpers_commands import run_warm
from helpers_processes import close, train_together

from xmoe_fairseq.cli import main

SIZES = ("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--share-all-embeddings", "--dropout", "0")
DENSE = ("--arch", "moe_transformer_tiny", *SIZES, "--moe-placement", "none")
SPARSE = ("--arch", "xmoe_transformer_tiny", *SIZES, "--moe-num-experts", "8")
COPIES = ("--moe-router", "gshard", "--moe-num-experts", "4", "--moe-split-ratio", "1")
ADAPTERS = ("--moe-expert", "adapter", "--moe-num-experts", "4")
PARTS = ("--moe-router", "parts", "--moe-expert", "part", "--moe-num-experts", "2", "--moe-split-ratio", "2")
PARALLEL = ("--ddp-backend", "legacy_ddp", "--moe-expert-parallel", "2")
QUIET = ("--disable-validation", "--no-epoch-checkpoints")
# A rate at which parameters of 32 bits stay where they are.
STILL = ("--lr", "1e-12", "--lr-scheduler", "fixed", "--warmup-updates", "0")
# By kind: the model that is converted, the command, and the options of training.
KINDS = {
    "copies in shards": (DENSE, "upcycle --arch moe_transformer_tiny --shards 2", COPIES),
    "adapters": (DENSE, "upcycle --arch xmoe_transformer_tiny", ADAPTERS),
    "parts": (DENSE, "sparsify --data {data} --tokens 200 --interval 2", (*PARTS, "--moe-interval", "2")),
    "pruned": (SPARSE, "prune --data {data} --keep 0.5 --select global --least 2 --lines 5", ()),
}


@pytest.mark.parametrize(
    "kind", [name if name == "copies in shards" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_training_resuming_and_translation(kind: str, toy_data: Path, tmp_path: Path) -> None:
    old, command, options = KINDS[kind]
    save_checkpoint(build(toy_data, *old), tmp_path / "old.pt")
    name, *words = command.format(data=toy_data).split()
    given = options if name == "upcycle" else ()
    start, whole = tmp_path / "start.pt", tmp_path / "whole.pt"
    main([name, "--checkpoint", str(tmp_path / "old.pt"), *words, *given, "--out", str(start), "--quiet"])
    if "--shards" in words:
        main(["checkpoint", "consolidate", str(start), "--out", str(whole)])
    else:
        whole = start
    state = torch.load(whole, weights_only=True)
    model = ("--arch", state["cfg"]["model"]["_name"], *SIZES, *options)
    if kind == "pruned":
        layers = state["cfg"]["model"]["moe_layer_experts"]
        model = (*SPARSE, *(("--moe-layer-experts", layers) if layers else ()))
        model = (*model, "--moe-num-experts", str(state["cfg"]["model"]["moe_num_experts"]))
    common = (*model, *PARALLEL, *QUIET, "--finetune-from-model", str(start))
    first = train_together(2, toy_data, tmp_path / "run", 1, *common, *STILL)
    close(first.parameters(), state["model"])
    second = train_together(2, toy_data, tmp_path / "run", 2, *common)
    assert "(epoch 1 @ 1 updates)" in second.said
    moved = second.parameters()
    assert any(not torch.equal(moved[one], state["model"][one]) for one in moved if ".experts." in one)
    task = (toy_data, "--user-dir", "xmoe_fairseq", "--task", "multilingual_local", "--cpu")
    pair = (
        "--source-lang",
        "en",
        "--target-lang",
        "xx",
        "--max-len-b",
        "5",
        "--path",
        second.save / "checkpoint_last.pt",
    )
    said = run_warm("fairseq-generate", *task, *pair).stdout
    assert said.count("\nH-") == 20
