"""What training starts from and keeps: the same for an MoE model as for the dense one of stock fairseq."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from helpers_training import MODEL, Run, assert_same, train

from xmoe_fairseq.cli import main
from xmoe_fairseq.criterions.softmax import check_softmax
from xmoe_fairseq.errors import UserError

DENSE = (
    *("--arch", "transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32", "--decoder-embed-dim", "32"),
    *("--dropout", "0.1"),
)
KINDS = {"experts": MODEL, "dense": DENSE}
QUIET = ("--disable-validation", "--no-epoch-checkpoints")
AVERAGES = ("--store-ema", "--ema-decay", "0.5", "--ema-fp32")
# A rate at which parameters of 32 bits stay where they are.
STILL = ("--lr", "1e-12", "--lr-scheduler", "fixed", "--warmup-updates", "0")
RESETS = ("--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (*KINDS[request.param], *QUIET)


@pytest.fixture(scope="module")
def base(kind: tuple[str, ...], toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training of 4 updates that keeps averages."""
    return train(toy_data, tmp_path_factory.mktemp("base"), 4, *kind, *AVERAGES)


def state(run: Run) -> dict[str, Any]:
    return torch.load(run.save / "checkpoint_last.pt", weights_only=True)


def steps(run: Run) -> set[int]:
    """How many updates the optimizer's averages are of."""
    return {moments["step"] for moments in state(run)["last_optimizer_state"]["state"].values()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name].float(), other[name].float(), atol=1e-6) for name in other)


def test_fine_tuning_takes_the_parameters_and_starts_anew(
    kind: tuple[str, ...], base: Run, toy_data: Path, tmp_path: Path
) -> None:
    from_base = ("--finetune-from-model", str(base.save / "checkpoint_last.pt"))
    tuned = train(toy_data, tmp_path, 2, *kind, *STILL, *from_base)
    assert close(tuned.parameters(), base.parameters()) and steps(tuned) == {2}
    history = state(tuned)["optimizer_history"]
    assert [one["num_updates"] for one in history] == [4, 2]
    # Started again, it goes on from its own file.
    again = train(toy_data, tmp_path, 3, *kind, *STILL, *from_base)
    assert "checkpoint_last.pt (epoch 1 @ 2 updates)" in again.said and steps(again) == {3}


def test_a_restored_file_without_its_training_is_fine_tuned(
    kind: tuple[str, ...], base: Run, toy_data: Path, tmp_path: Path
) -> None:
    file = str(base.save / "checkpoint_last.pt")
    tuned = train(toy_data, tmp_path / "tuned", 2, *kind, "--finetune-from-model", file)
    reset = train(toy_data, tmp_path / "reset", 2, *kind, "--restore-file", file, *RESETS)
    assert_same(tuned.parameters(), reset.parameters())
    first = train(toy_data, tmp_path / "data", 6, *kind, "--restore-file", file, "--reset-dataloader")
    assert steps(first) == {6} and state(first)["extra_state"]["train_iterator"]["iterations_in_epoch"] == 2
    on = train(toy_data, tmp_path / "on", 6, *kind, "--restore-file", file, "--reset-meters", "--reset-lr-scheduler")
    assert steps(on) == {6} and state(on)["extra_state"]["train_iterator"]["iterations_in_epoch"] == 6


def test_options_of_the_optimizer_can_be_replaced(
    kind: tuple[str, ...], base: Run, toy_data: Path, tmp_path: Path
) -> None:
    """Those of the command line are overruled by the file's, and those by --optimizer-overrides."""
    options = (*kind, "--restore-file", str(base.save / "checkpoint_last.pt"), "--weight-decay", "0.5")
    decayed = {}
    for name, more in {
        "file": (),
        "new": ("--optimizer-overrides", "{'weight_decay': 0.5, 'betas': (0.5, 0.6)}"),
    }.items():
        run = train(toy_data, tmp_path / name, 5, *options, *more)
        (group,) = state(run)["last_optimizer_state"]["param_groups"]
        decayed[name] = (group["weight_decay"], tuple(group["betas"]))
        moved = sum((value - base.parameters()[at]).abs().sum() for at, value in run.parameters().items())
        decayed[f"{name} moved"] = float(moved)
    assert decayed["file"] == (0, (0.9, 0.999)) and decayed["new"] == (0.5, (0.5, 0.6))
    assert decayed["file moved"] != decayed["new moved"]


def test_averages_begin_where_they_are_told_to(
    kind: tuple[str, ...], base: Run, toy_data: Path, tmp_path: Path
) -> None:
    file, plain = base.save / "checkpoint_last.pt", tmp_path / "plain.pt"
    without = torch.load(file, weights_only=True)
    averages = without["extra_state"].pop("ema_fp32_params")
    del without["extra_state"]["ema"]
    torch.save(without, plain)
    keeping = (*kind, *STILL, "--store-ema", "--ema-decay", "1", "--ema-fp32")

    seeded = train(toy_data, tmp_path / "seeded", 1, *keeping, "--ema-seed-model", str(file))
    assert close(state(seeded)["extra_state"]["ema"], averages)
    on = train(toy_data, tmp_path / "on", 5, *keeping, "--restore-file", str(file))
    assert close(state(on)["extra_state"]["ema"], averages)
    assert not close(averages, base.parameters())
    begun = train(toy_data, tmp_path / "begun", 5, *keeping, "--restore-file", str(plain))
    assert "plain.pt holds no moving averages; they begin with its parameters" in begun.said
    assert close(state(begun)["extra_state"]["ema"], base.parameters())

    for path, message in (
        (plain, "--ema-seed-model: checkpoint .*plain.pt holds no moving averages"),
        (tmp_path / "none.pt", "there is no checkpoint .*none.pt, which --ema-seed-model names"),
    ):
        refused = train(toy_data, tmp_path / "bad", 1, *keeping, "--ema-seed-model", str(path), check=False)
        assert refused.wait() == 1 and re.search(message, refused.said.strip().split("\n")[-1])


@pytest.mark.parametrize("precise", [(), ("--ema-fp32",)], ids=["as the parameters", "32 bits"])
def test_averages_are_of_all_parameters(
    precise: tuple[str, ...], kind: tuple[str, ...], toy_data: Path, tmp_path: Path
) -> None:
    """Also of the norm after the last layer, and they are what is translated with."""
    before = ("--encoder-normalize-before", "--decoder-normalize-before", "--save-interval-updates", "1")
    run = train(toy_data, tmp_path, 2, *kind, *before, "--store-ema", "--ema-decay", "0.75", *precise)
    first, second = (run.parameters(f"checkpoint_1_{update}.pt") for update in (1, 2))
    assert "encoder.layer_norm.weight" in first
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(run.save / "checkpoint_last.pt")], {"data": str(toy_data), "ema_weights": True}
    )
    loaded = models[0].state_dict()
    assert loaded.keys() == first.keys()
    for name, value in loaded.items():
        expected = second[name] if name.endswith("version") else 0.75 * first[name] + 0.25 * second[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_half_precision_that_saves_memory_goes_on_bit_for_bit(
    kind: tuple[str, ...], toy_data: Path, tmp_path: Path
) -> None:
    options = (*kind, "--fp16", "--memory-efficient-fp16")
    whole = train(toy_data, tmp_path / "whole", 6, *options)
    for updates in (3, 6):
        parts = train(toy_data, tmp_path / "parts", updates, *options)
    assert_same(parts.parameters(), whole.parameters())
    assert all(torch.equal(value, value.half().float()) for value in parts.parameters().values())


def test_a_development_set_can_be_trained_on(kind: tuple[str, ...], toy_data: Path, tmp_path: Path) -> None:
    """It is validated as well, and read once."""
    validates = tuple(word for word in kind if word != "--disable-validation")
    run = train(toy_data, tmp_path, 3, *validates, "--train-subset", "valid")
    assert steps(run) == {3} and state(run)["extra_state"]["val_loss"] > 0


def test_averages_of_shards_are_a_seed(toy_data: Path, tmp_path: Path) -> None:
    options = (*MODEL, *QUIET, *AVERAGES)
    base = train(toy_data, tmp_path / "base", 2, *options)
    parts = tmp_path / "parts.pt"
    main(["checkpoint", "shard", str(base.save / "checkpoint_last.pt"), "--shards", "2", "--out", str(parts)])
    seeded = train(toy_data, tmp_path / "run", 1, *options, *STILL, "--ema-decay", "1", "--ema-seed-model", str(parts))
    assert close(state(seeded)["extra_state"]["ema"], state(base)["extra_state"]["ema_fp32_params"])


@pytest.mark.parametrize("arch", ["xmoe_transformer_tiny", "transformer_tiny"])
def test_an_adaptive_softmax_needs_its_criterion(arch: str, toy_data: Path, tmp_path: Path) -> None:
    options = (
        "--arch",
        arch,
        "--encoder-embed-dim",
        "32",
        "--decoder-embed-dim",
        "32",
        "--share-all-embeddings",
        *QUIET,
    )
    adaptive = ("--adaptive-softmax-cutoff", "10,20")
    refused = train(toy_data, tmp_path / "refused", 1, *options, *adaptive, check=False)
    assert refused.wait() == 1 and not list((tmp_path / "refused").glob("*.pt"))
    line = refused.said.strip().split("\n")[-1]
    assert re.search("--adaptive-softmax-cutoff .* does not work with --criterion threshold_routing", line)


def test_a_model_that_leaves_the_adaptive_softmax_out_needs_no_criterion_of_it() -> None:
    """As fairseq's lstm_lm does, whose preset has --adaptive-softmax-cutoff."""
    cfg = Namespace(model=Namespace(adaptive_softmax_cutoff="10,20"), criterion=Namespace(_name="cross_entropy"))
    check_softmax(cfg, Namespace(decoder=Namespace(adaptive_softmax=None)))
    with pytest.raises(UserError, match="--adaptive-softmax-cutoff 10,20 does not work with --criterion cross_entropy"):
        check_softmax(cfg, Namespace(decoder=Namespace(adaptive_softmax=object())))
