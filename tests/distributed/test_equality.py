"""Several processes train as one does on all of their sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_processes import Plan, close, learn, together, uneven_plan

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
OPTIONS = ("--adam-eps", "1e-3", "--lr", "0.01", "--clip-norm", "0.5")
# Processes, those that share experts, batches an update, back end.
LAYOUTS = [(2, 1, 1, "pytorch_ddp"), (2, 2, 2, "pytorch_ddp"), (4, 1, 2, "legacy_ddp"), (4, 2, 1, "legacy_ddp")]
SHOWN = (
    "loss",
    "nll_loss",
    "gnorm",
    "enc_experts",
    "enc_balance_loss",
    "dec_balance_loss",
    "enc_z_loss",
    "enc_load_cv",
)


def assert_same_logs(processes: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Compares what is shown, which has three digits."""
    for update, expected in enumerate(one["logs"]):
        for process in processes:
            for name in SHOWN:
                assert process["logs"][update][name] == pytest.approx(expected[name], abs=2e-3), (update, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_processes_train_as_one(model: str, layout: tuple[int, int, int, str], toy_data: Path, tmp_path: Path) -> None:
    size, parallel, update_freq, backend = layout
    plan = uneven_plan(size, 20, update_freq)
    words = (*MODELS[model], *OPTIONS)
    one = learn(toy_data, plan, words, False)
    words = (*words, "--ddp-backend", backend, "--moe-expert-parallel", str(parallel))
    many = together(size, tmp_path, learn, toy_data, plan, words, True)
    assert_same_logs(many, one)
    assert one["logs"][-1]["loss"] < one["logs"][0]["loss"] - 0.3
    close(many[0]["state"]["model"], one["state"]["model"])


def test_gradients_are_those_of_one_process(toy_data: Path, tmp_path: Path) -> None:
    """Without momentum, the parameters after one update of rate 1 show the gradient."""
    words = (*MODELS["xmoe"], "--optimizer", "sgd", "--lr", "1", "--moe-expert-parallel", "2")
    plan = uneven_plan(4, 2)[1:]
    one = learn(toy_data, plan, words, False)
    many = together(4, tmp_path, learn, toy_data, plan, (*words, "--ddp-backend", "legacy_ddp"), True)
    start = learn(toy_data, [], words, False)
    close(many[0]["state"]["model"], one["state"]["model"])
    moved = [(one["state"]["model"][name] - value).abs().max() for name, value in start["state"]["model"].items()]
    assert max(moved) > 0.1


def test_capacity_is_a_rule_for_each_process(toy_data: Path, tmp_path: Path) -> None:
    """One process that has the batches of all, one by one, drops the same tokens; the balance loss, which is of all
    processes together, is left out."""
    words = ("--arch", "xmoe_transformer_tiny", *TINY[:3], *OPTIONS, "--moe-loss-coeff", "0", "--moe-router", "topk")
    words = (*words, "--moe-capacity-factor", "1", "--moe-min-capacity", "1")
    plan = uneven_plan(4, 20)
    one_by_one: Plan = [[[part] for batch in update for part in batch if part] for update in plan]
    one = learn(toy_data, one_by_one, words, False)
    words = (*words, "--moe-expert-parallel", "2", "--ddp-backend", "legacy_ddp")
    many = together(4, tmp_path, learn, toy_data, plan, words, True)
    for update, expected in enumerate(one["logs"]):
        for name in ("loss", "gnorm", "enc_experts", "enc_first_dropped", "dec_first_dropped"):
            assert many[0]["logs"][update][name] == pytest.approx(expected[name], abs=2e-3), (update, name)
    assert one["logs"][0]["enc_first_dropped"] > 0
    close(many[0]["state"]["model"], one["state"]["model"])
