"""What a new kind of experts needs, one file and one line, and what models of any kind do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers import ROOT, TINY_ARGS, TRAIN_ARGS, batches, build
from helpers_routing import sharpen
from helpers_toy_expert import MaxoutExperts

from xmoe_fairseq.analysis.tables import flops as flops_table
from xmoe_fairseq.checkpoints import shards
from xmoe_fairseq.errors import UserError
from xmoe_fairseq.evaluation.direction_dataset import read
from xmoe_fairseq.evaluation.routing_counts import count, places
from xmoe_fairseq.models.architectures import build_on_meta
from xmoe_fairseq.models.routing_recorder import per_token
from xmoe_fairseq.models.size import least_parameters
from xmoe_fairseq.moe import (
    EXPERTS,
    ROUTERS,
    StackedExperts,
)
from xmoe_fairseq.moe.options import declared

SIZED = ("--moe-expert-sizes", "hybrid", "--moe-router", "topk", "--moe-top-k", "2")


def test_options_are_declared_by_the_kinds() -> None:
    names = declared(kind.Options for kind in EXPERTS.values())
    assert list(names) == [
        "expert_sizes",
        "size_steps",
        "glu_activation",
        "adapter_dim",
        "adapter_scale",
        "adapter_dropout",
        "mpo_bond",
        "mpo_mask",
    ]
    assert not names.keys() & declared(router.Options for router in ROUTERS.values()).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--moe-expert", "glu", "--moe-kernel", "fused"), "does not compute gated networks; .* auto, reference"),
        (("--moe-expert-sizes", "hybird"), "--moe-expert-sizes hybird is neither .*--encoder-ffn-embed-dim 256"),
        (("--moe-expert-sizes", "8-16"), "--moe-expert-sizes 8-16 has 2 sizes for 8 experts"),
        (("--moe-expert-sizes", "arithmetic", "--moe-num-experts", "11"), "or --moe-size-steps 11"),
        (("--moe-size-steps", "0"), r"--moe-size-steps 0 is out of range: it must be in \[1, 64\]"),
        ((*SIZED, "--moe-strata", "4-4", "--encoder-normalize-before", "--decoder-normalize-before"),
         "hybrid does not work with --moe-strata 4-4"),
        ((*SIZED, "--moe-expert-parallel", "4"),
         "--moe-expert-parallel 4 does not work with --moe-expert-sizes hybrid: .* there are 2 of 128 hidden units"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_on_meta("xmoe_transformer_tiny", 100, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [("--moe-expert", "glu"), SIZED, ("--moe-expert", "glu", *SIZED)], ids=" ".join)
def test_models_train_and_log_their_hidden_units(words: tuple[str, ...], toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, *words)
    optimizer, losses = torch.optim.Adam(built.model.parameters(), 0.01), []
    sample = batches(built.task)[0]
    for _ in range(6):
        loss, size, log = built.criterion(built.model, sample)
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    if "hybrid" not in words:
        assert "enc_hidden" not in log
        return
    experts = built.model.encoder.layers[1].moe.experts
    assert Counter(experts.sizes) == {64: 4, 128: 2, 256: 2}
    assert log["enc_received"] * 64 < log["enc_hidden"] < log["enc_received"] * 256
    assert {name.rpartition(".")[2] for name in built.model.state_dict() if "parts.0" in name} == set(
        experts.parts[0].names
    )


def test_analysis_counts_each_token_at_the_sizes_of_its_own_experts(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-expert-sizes", "hybrid", "--moe-threshold", "0.6")
    model = built.model.eval()
    sharpen(model)
    texts = read(built.task, model, "test", 5, 200)
    costs = [4 * 32 * size for size in (64,) * 4 + (128,) * 2 + (256,) * 2]
    spent: dict[str, list[int]] = {"encoder.2": [], "decoder.2": []}
    for batch in (batch for text in texts for batch in text):
        for layer, routing in per_token(model, batch["net_input"]).items():
            for taken in routing.taken.flatten(0, 1).tolist():
                if any(taken):  # no padding
                    spent[layer].append(sum(number * cost for number, cost in zip(taken, costs, strict=True)))
    router, everything = 2 * 32 * 8, sum(costs)
    for row in flops_table(count(model, texts, padding=1)).records():
        assert row["flops"] == pytest.approx(router + fmean(spent[row["layer"]]))
        assert row["flops_of_all_experts"] == router + everything
    assert [place.flops_by_expert for place in places(model)] == [tuple(costs)] * 2


def test_memory_is_that_of_the_kind() -> None:
    def least(*words: str) -> int:
        model: Any = build_on_meta("xmoe_transformer_tiny", 100, words)
        return least_parameters(model.cfg, 100, None)

    ffn = least()
    assert least("--moe-expert", "glu") - ffn == 2 * 8 * 128 * 128  # a third matrix in two layers
    assert least(*SIZED) == ffn
    assert least("--moe-expert-sizes", "8-8-8-8-8-8-8-8") == ffn - 2 * 2 * 8 * 128 * (128 - 8)


def test_experts_are_told_in_training_what_they_computed(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[StackedExperts, list[int]]] = []
    monkeypatch.setattr(StackedExperts, "notice", lambda self, load: seen.append((self, load.tolist())))
    built = build(toy_data, *TINY_ARGS, *SIZED, "--moe-stack", "2")
    sample = batches(built.task)[0]
    _, _, log = built.criterion.train()(built.model.train(), sample)
    assert [part.num_experts for part, _ in seen] == [4, 2, 2] * 4 == [len(load) for _, load in seen]
    assert sum(sum(load) for _, load in seen) == log["enc_received"] + log["dec_received"]
    assert sum(part.hidden * sum(load) for part, load in seen) == log["enc_hidden"] + log["dec_hidden"]
    seen.clear()
    built.criterion.eval()(built.model.eval(), sample)
    assert not seen


def test_parameters_of_any_kind_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shards.is_expert("encoder.layers.1.moe.experts.fc1_weight")
    assert shards.is_expert("decoder.layers.1.moe.layers.0.experts.parts.2.gate_weight")
    for name in ("encoder.layers.1.moe.experts.in_weight", "encoder.layers.1.fc1.weight", "moe.router.weight"):
        assert not shards.is_expert(name)
    monkeypatch.setitem(EXPERTS, "maxout", MaxoutExperts)
    assert shards.is_expert("encoder.layers.1.moe.experts.in_weight")


SCRIPT = """
import sys
from pathlib import Path
from fairseq_cli import generate, train
from xmoe_fairseq.cli import main
data, save = sys.argv[1], Path(sys.argv[2])
model = "--arch xmoe_transformer_tiny --moe-expert maxout --moe-pieces 3 --moe-expert-sizes hybrid".split()
main(["info", *model, "--vocab", "100"])
def run(command, *words):
    sys.argv = ["fairseq", data, "--user-dir", str(save.parent / "xmoe_fairseq"), *words]
    command.cli_main()
run(train, *TRAIN_ARGS, *model, "--encoder-embed-dim", "32", "--share-all-embeddings", "--save-dir", str(save),
    "--max-update", "2", "--no-epoch-checkpoints")
last = save / "checkpoint_last.pt"
main(["checkpoint", "shard", str(last), "--shards", "2", "--out", str(save / "parts.pt")])
main(["checkpoint", "info", str(save / "parts.pt"), "--json"])
run(generate, "--path", str(save / "parts.pt"), "--task", "multilingual_local", "--source-lang", "en",
    "--target-lang", "xx", "--cpu", "--max-len-b", "5", "--quiet")
measured = ["--checkpoint", str(last), "--data", data]
main(["info", *model, "--encoder-embed-dim", "32", "--vocab", "47", *measured, "--json"])
"""


def test_one_file_and_one_line_make_a_new_kind(toy_data: Path, tmp_path: Path) -> None:
    """A copy of the package with the file of the toy, and its line, trains and translates with it."""
    moe = tmp_path / "xmoe_fairseq" / "moe"
    shutil.copytree(ROOT / "xmoe_fairseq", moe.parent, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "support" / "helpers_toy_expert.py", moe / "experts" / "maxout.py")
    kinds = (moe / "experts" / "kinds.py").read_text()
    kinds = kinds.replace("from .sized", "from .maxout import MaxoutExperts\nfrom .sized")
    (moe / "experts" / "kinds.py").write_text(
        kinds.replace('"ffn": Experts,', '"ffn": Experts, "maxout": MaxoutExperts,')
    )
    script = SCRIPT.replace("*TRAIN_ARGS", f"*{TRAIN_ARGS!r}")
    words = [sys.executable, "-c", script, str(toy_data), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "XMoE: 8 maxout experts (3 pieces) of hidden sizes 4 x 64, 2 x 128, 2 x 256, threshold 0.9" in result.stdout
    assert "8 of 8, from 1 to 8 possible, hidden sizes 4 x 64, 2 x 128, 2 x 256" in result.stdout
    documents = [json.loads("{" + part.partition("\n}")[0] + "}") for part in result.stdout.split("\n{")[1:]]
    checkpoint, info = documents
    assert checkpoint["experts"] == {f"{stack}.layers.1.moe.experts": 8 for stack in ("encoder", "decoder")}
    assert checkpoint["expert_parameters"] == info["parameters"]["expert"]
    per_unit = 3 * 32 + 3 + 32  # three pieces with their biases, and a row of the output
    assert info["parameters"]["expert"] == 2 * 8 * 128 * per_unit
    layer = info["layers"][0]
    assert layer["sizes"] == {"64": 4, "128": 2, "256": 2} and info["assumption"].startswith("measured")
    low, high = 2 * 2 * 64 * 4 * 32 * layer["taken"], 2 * 2 * 256 * 4 * 32 * layer["taken"]
    assert low < info["flops"]["experts"] < high
