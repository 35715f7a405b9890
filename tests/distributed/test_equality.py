"""Several processes train as one does on all of their sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_processes import close, learn, together, uneven_plan

TINY = ("--share-all-embeddings", "--encoder-embed-dim", "32", "--moe-loss-coeff", "0.3", "--moe-z-loss-coeff", "0.01")
MODELS = {
    "xmoe": ("--arch", "xmoe_transformer_tiny", *TINY, "--moe-threshold", "0.5"),
    "smoe": (
        *("--arch", "smoe_transformer_tiny", *TINY, "--moe-capacity-factor", "0", "--moe-second-expert", "gate"),
        *("--moe-regularizer", "cmr", "--moe-cmr-gate-dropout", "0", "--moe-loss-combine", "average"),
    ),
    "top-k": ("--arch", "xmoe_transformer_tiny", *TINY, "--moe-router", "topk"),
}
# Adam divides by gradients: where one is 0 but for rounding, as that of attention's key biases, it needs an epsilon.
OPTIONS = ("--adam-eps", "1e-4", "--lr", "0.01", "--clip-norm", "0.5", "--ddp-backend", "legacy_ddp")
# Processes, those that share experts, batches an update.
LAYOUTS = [(2, 1, 1), (4, 1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_processes_train_as_one(model: str, layout: tuple[int, int, int], toy_data: Path, tmp_path: Path) -> None:
    size, parallel, update_freq = layout
    plan = uneven_plan(size, 20, update_freq)
    words = (*MODELS[model], *OPTIONS)
    one = learn(toy_data, plan, words, False)
    many = together(size, tmp_path, learn, toy_data, plan, (*words, "--moe-expert-parallel", str(parallel)), True)
    for update, expected in enumerate(one["logs"]):
        for name in ("loss", "nll_loss", "gnorm", "enc_balance_loss", "dec_balance_loss", "enc_z_loss", "enc_load_cv"):
            for process in many:
                assert process["logs"][update][name] == pytest.approx(expected[name], abs=2e-3), (update, name)
    assert one["logs"][-1]["loss"] < one["logs"][0]["loss"] - 0.3
    close(many[0]["state"]["model"], one["state"]["model"])
