"""The criterion: what is minimised, what is logged, and that logging never waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from helpers import TINY_ARGS, Built, batches, build
from torch import Tensor

WEIGHTS = ("--moe-loss-coeff", "0.3", "--moe-z-loss-coeff", "0.07")


def smoothed(model: Any, sample: dict[str, Any], output: Any, epsilon: float) -> tuple[Tensor, Tensor]:
    """Label-smoothed and plain negative log-likelihood in bits of Python: sums over the real target tokens."""
    log_probs = torch.log_softmax(output[0].float(), -1).reshape(-1, output[0].shape[-1])
    target = sample["target"].reshape(-1)
    keep = target != 1
    log_probs, target = log_probs[keep].double(), target[keep]
    nll = -log_probs[torch.arange(len(target)), target]
    others = -(log_probs.sum(-1) + nll)
    return ((1 - epsilon) * nll + epsilon / (log_probs.shape[1] - 1) * others).sum(), nll.sum()


def test_loss_is_cross_entropy_plus_weighted_auxiliary_losses(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, *WEIGHTS)
    sample = batches(built.task)[0]
    model = built.model.eval()
    loss, size, log = built.criterion(model, sample)
    output = model(**sample["net_input"])
    cross_entropy, nll = smoothed(model, sample, output, 0.1)
    layers = output[1]["routing"]["encoder"] + output[1]["routing"]["decoder"]
    auxiliary = sum(0.3 * stats.balance_loss + 0.07 * stats.z_loss for stats in layers)
    assert len(layers) == 2 and size == sample["ntokens"]
    torch.testing.assert_close(loss.double(), cross_entropy + auxiliary * size, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log["loss"].double(), cross_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log["nll_loss"].double(), nll, rtol=1e-5, atol=1e-5)


def test_auxiliary_gradient_reaches_only_what_routing_depends_on(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--moe-loss-coeff", "1000")
    loss, _, _ = built.criterion(built.model.eval(), batches(built.task)[0])
    loss.backward()
    gradient = built.model.encoder.layers[1].moe.router.weight.grad
    plain = build(toy_data, *TINY_ARGS, "--moe-loss-coeff", "0")
    loss, _, _ = plain.criterion(plain.model.eval(), batches(plain.task)[0])
    loss.backward()
    assert gradient.norm() > 2 * plain.model.encoder.layers[1].moe.router.weight.grad.norm()


def logged(built: Built, outputs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Logs one call of reduce_metrics after the other, as updates do, and reads what would be shown."""
    with metrics.aggregate(new_root=True) as shown:
        for update in outputs:
            type(built.criterion).reduce_metrics(update)
    return shown.get_smoothed_values()


def naive_metrics(records: list[Any]) -> dict[str, float]:
    tokens = sum(int(record.tokens) for record in records)

    def mean(name: str) -> float:
        return sum(float(getattr(record, name)) for record in records) / tokens

    cv = 0.0
    for record in records:
        load = [int(count) for count in record.first_choices]
        average = sum(load) / len(load)
        deviation = (sum((count - average) ** 2 for count in load) / len(load)) ** 0.5
        cv += deviation / average * int(record.tokens)
    return {
        "experts_wanted": mean("wanted"),
        "experts": mean("received"),
        "first_dropped": mean("first_dropped"),
        "top1_prob": mean("top1_prob"),
        "load_cv": cv / tokens,
    }


def test_metrics_are_weighted_by_tokens_over_batches_workers_and_layers(toy_data: Path) -> None:
    built = build(
        toy_data, *TINY_ARGS, "--moe-interval", "1", "--moe-capacity-factor", "1.0", "--moe-min-capacity", "1"
    )
    model = built.model.train()
    torch.manual_seed(0)
    samples = batches(built.task, max_tokens=120)
    assert len({sample["ntokens"] for sample in samples}) > 1  # batches of different weight
    records: dict[str, list[Any]] = {"enc": [], "dec": []}
    outputs = []
    for sample in samples:
        torch.manual_seed(5)
        routing = model(**sample["net_input"])[1]["routing"]
        records["enc"] += routing["encoder"]
        records["dec"] += routing["decoder"]
        torch.manual_seed(5)
        outputs.append(built.criterion(model, sample)[2])
    assert len(records["enc"]) == 2 * len(samples)
    one_worker = logged(built, [[output] for output in outputs])
    two_workers = logged(built, [outputs[i : i + 2] for i in range(0, len(outputs), 2)])
    for prefix, stack in records.items():
        for name, value in naive_metrics(stack).items():
            assert one_worker[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-3), name
            assert two_workers[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-3), name
    assert one_worker["enc_first_dropped"] > 0
    assert one_worker["enc_experts"] < one_worker["enc_experts_wanted"]
    total = sum(sample["ntokens"] for sample in samples)
    balance = [
        float(sum(record.balance_loss for record in records["enc"][2 * i : 2 * i + 2])) for i in range(len(samples))
    ]
    expected = sum(value * sample["ntokens"] for value, sample in zip(balance, samples, strict=True)) / total
    assert one_worker["enc_balance_loss"] == pytest.approx(expected, abs=1e-3)
    assert two_workers["enc_balance_loss"] == pytest.approx(expected, abs=1e-3)
    assert not [name for name in one_worker if name.startswith("_")]


def test_shown_loss_and_perplexity_exclude_the_auxiliary_losses(toy_data: Path) -> None:
    heavy, light = (build(toy_data, *TINY_ARGS, "--moe-loss-coeff", weight) for weight in ("100", "0"))
    shown = []
    for built in (heavy, light):
        output = built.criterion(built.model.eval(), batches(built.task)[0])[2]
        shown.append(logged(built, [[output]]))
    assert shown[0]["loss"] == shown[1]["loss"]
    assert shown[0]["ppl"] == shown[1]["ppl"]


def test_logging_reads_nothing_from_the_device(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(toy_data)
    sample = batches(built.task)[0]
    routing = built.model(**sample["net_input"])

    def refuse(*args: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    class Model:
        """Gives the output computed before: the layers themselves are not under test."""

        get_normalized_probs = staticmethod(built.model.get_normalized_probs)
        get_targets = staticmethod(built.model.get_targets)

        def __call__(self, **net_input: Any) -> Any:
            return routing

    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    with metrics.aggregate(new_root=True):
        type(built.criterion).reduce_metrics([built.criterion(Model(), sample)[2]])


def test_a_dense_model_is_plain_label_smoothed_cross_entropy(toy_data: Path) -> None:
    ours = build(toy_data, "--arch", "transformer_tiny")
    stock = build(toy_data, "--arch", "transformer_tiny", "--criterion", "label_smoothed_cross_entropy")
    sample = batches(ours.task)[0]
    mine, size, log = ours.criterion(ours.model.eval(), sample)
    theirs, stock_size, stock_log = stock.criterion(ours.model, sample)
    assert torch.equal(mine, theirs) and size == stock_size and log.keys() == stock_log.keys()


def test_accuracy_is_reported_on_request(toy_data: Path) -> None:
    built = build(toy_data, *TINY_ARGS, "--report-accuracy")
    output = built.criterion(built.model.eval(), batches(built.task)[0])[2]
    assert 0 <= logged(built, [[output]])["accuracy"] <= 100
