"""Models that ``xmoe upcycle``, ``sparsify`` and ``prune`` made are trained by processes that share experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import build, save_checkpoint
from helpers_distributed import World
from helpers_processes import close, fairseq_train

from xmoe_fairseq import hub
from xmoe_fairseq.cli import main

SIZES = ("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--share-all-embeddings", "--dropout", "0")
XMOE, GSHARD = (("--arch", f"{name}_transformer_tiny", *SIZES) for name in ("xmoe", "moe"))
EIGHT = ("--moe-num-experts", "8")
COPIES = ("--moe-router", "gshard", "--moe-num-experts", "4", "--moe-split-ratio", "1")
ADAPTERS = ("--moe-expert", "adapter", "--moe-num-experts", "4")
PARTS = ("--moe-router", "parts", "--moe-expert", "part", "--moe-num-experts", "2", "--moe-split-ratio", "2")
# Of 3 experts a process holds 2 and the other 1.
PRUNED = ("--moe-num-experts", "5", "--moe-layer-experts", "encoder.2=3,decoder.2=5")
PARALLEL = ("--ddp-backend", "legacy_ddp", "--moe-expert-parallel", "2", "--disable-validation")
# A rate at which parameters of 32 bits stay where they are, and one at which they do not.
STILL, LEARNS = (("--lr-scheduler", "fixed", "--lr", rate) for rate in ("1e-12", "0.01"))
# By kind: the model that is converted, the command, and the options of the model that is trained.
KINDS = {
    "copies in shards": (
        (*GSHARD, "--moe-placement", "none"),
        ("upcycle", "--arch", "moe_transformer_tiny", *COPIES, "--shards", "2"),
        (*GSHARD, *COPIES),
    ),
    "adapters": (
        (*XMOE, "--moe-placement", "none"),
        ("upcycle", "--arch", "xmoe_transformer_tiny", *ADAPTERS),
        (*XMOE, *ADAPTERS),
    ),
    "parts": (
        (*XMOE, "--moe-placement", "none"),
        ("sparsify", "--data", "{data}", "--tokens", "200", "--interval", "2"),
        (*XMOE, *PARTS, "--moe-interval", "2"),
    ),
    "pruned": (
        (*XMOE, *EIGHT),
        ("prune", "--data", "{data}", "--keep", "0.5", "--select", "global", "--least", "2", "--lines", "5"),
        (*XMOE, *PRUNED),
    ),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(2)
    yield made
    made.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_training_resuming_and_translation(kind: str, world: World, toy_data: Path, tmp_path: Path) -> None:
    old, command, options = KINDS[kind]
    save_checkpoint(build(toy_data, *old), tmp_path / "old.pt")
    start, whole = tmp_path / "start.pt", tmp_path / "start.pt"
    words = [word.format(data=toy_data) for word in command]
    main([*words, "--checkpoint", str(tmp_path / "old.pt"), "--out", str(start), "--quiet"])
    if "--shards" in words:
        whole = tmp_path / "whole.pt"
        main(["checkpoint", "consolidate", str(start), "--out", str(whole)])
    model = torch.load(whole, weights_only=True)["model"]
    states = []
    for updates, rate in ((1, STILL), (2, LEARNS)):
        common = (*options, *PARALLEL, *rate, "--max-update", str(updates), "--finetune-from-model", str(start))
        world.run(fairseq_train, 2, toy_data, tmp_path / "run", *common)
        states.append(torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True))
    first, second = states
    close(dict(sorted(first["model"].items())), dict(sorted(model.items())))
    assert [one["optimizer_history"][-1]["num_updates"] for one in states] == [1, 2]
    experts = [name for name in model if ".experts." in name]
    assert any(not torch.equal(second["model"][name], model[name]) for name in experts)
    trained = hub.from_pretrained(str(tmp_path / "run"), "checkpoint_last.pt", str(toy_data)).eval()
    found = trained.generate([torch.tensor([5, 6, 2])], source_lang="en", target_lang="xx", max_len_b=5)
    assert found[0][0]["tokens"][-1] == 2
