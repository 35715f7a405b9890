"""The criterion: what is minimised, what is logged, and that logging never waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from helpers import TINY_ARGS, Built, batches, build
from torch import Tensor

from xmoe_fairseq.moe import Router

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


SMOE_ARGS = ("--arch", "smoe_transformer_tiny", "--share-all-embeddings", "--encoder-embed-dim", "32")
STACK_ARGS = (*TINY_ARGS, "--moe-stack", "2")


@pytest.mark.parametrize("combine", ["sum", "average"])
@pytest.mark.parametrize("args", [TINY_ARGS, SMOE_ARGS, STACK_ARGS], ids=["xmoe", "smoe", "stack"])
def test_entropy_loss_is_added_as_the_other_losses_are(args: tuple[str, ...], combine: str, toy_data: Path) -> None:
    weights = (*WEIGHTS, "--moe-interval", "1", "--moe-loss-combine", combine)
    without = build(toy_data, *args, *weights)
    built = build(toy_data, *args, *weights, "--moe-entropy-loss-coeff", "0.2")
    sample = batches(built.task)[0]
    loss, size, log = built.criterion(built.model.eval(), sample)
    plain, _, plain_log = without.criterion(built.model, sample)  # the same parameters
    routing = built.model(**sample["net_input"])[1]["routing"]
    losses = {stack: torch.stack([record.entropy_loss for record in routing[stack]]) for stack in routing}
    together = torch.cat(list(losses.values()))
    assert len(together) == 4 and (together > 0.1).all()
    expected = 0.2 * size * (together.mean() if combine == "average" else together.sum())
    torch.testing.assert_close(loss - plain, expected, rtol=1e-4, atol=1e-3)
    assert log.keys() - plain_log.keys() == {"enc_entropy_loss", "dec_entropy_loss"}
    for prefix, stack in (("enc", "encoder"), ("dec", "decoder")):
        torch.testing.assert_close(log[f"{prefix}_entropy_loss"], losses[stack].sum() * size)
    for name, value in plain_log.items():  # the loss that is shown among them
        assert torch.equal(torch.as_tensor(log[name]), torch.as_tensor(value)), name
    shown = logged(built, [[log], [log]])
    assert shown["enc_entropy_loss"] == pytest.approx(losses["encoder"].sum().item(), abs=1e-4)
    assert not [name for name in logged(without, [[plain_log]]) if "entropy" in name]


@pytest.mark.parametrize("args", [TINY_ARGS, SMOE_ARGS], ids=["xmoe", "smoe"])
def test_without_a_coefficient_entropy_changes_nothing_bit_for_bit(args: tuple[str, ...], toy_data: Path) -> None:
    plain = build(toy_data, *args, *WEIGHTS)
    sample = batches(plain.task)[0]
    results = []
    for words, measures in (((), False), (("--moe-entropy-loss-coeff", "0"), False), ((), True)):
        built = build(toy_data, *args, *WEIGHTS, *words)
        routers = [module for module in built.model.modules() if isinstance(module, Router)]
        for router in routers:
            router.measures_entropy = measures
        torch.manual_seed(0)
        loss, _, log = built.criterion(built.model.train(), sample)
        loss.backward()
        assert routers and all(router.measures_entropy is measures for router in routers)
        results.append((loss, log, [parameter.grad for parameter in built.model.parameters()]))
    # By hand, in the order in which the losses are added up.
    torch.manual_seed(0)
    output = plain.model.train()(**sample["net_input"])
    expected, auxiliary = plain.criterion.compute_loss(plain.model, output, sample)[0], torch.zeros(())
    for (record,) in output[1]["routing"].values():
        weighted = 0.3 * record.balance_loss + 0.07 * record.z_loss
        auxiliary = auxiliary + weighted * sample["ntokens"]
    expected = expected + auxiliary
    expected.backward()
    wanted = [parameter.grad for parameter in plain.model.parameters()]
    for loss, log, gradients in results:
        assert torch.equal(loss, expected) and log.keys() == results[0][1].keys()
        assert not [name for name in log if "entropy" in name]
        assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))


def test_routers_of_every_model_that_is_given_measure_entropy(toy_data: Path) -> None:
    """Whatever it is wrapped in."""
    built, other = (build(toy_data, *TINY_ARGS, "--moe-entropy-loss-coeff", "0.1") for _ in range(2))
    sample = batches(built.task)[0]
    for model in (built.model, torch.nn.ModuleList([other.model])):
        routers = [module for module in model.modules() if isinstance(module, Router)]
        assert len(routers) == 2 and not any(router.measures_entropy for router in routers)
        built.criterion.parts_of(model)
        assert all(router.measures_entropy for router in routers)
    assert not list(built.criterion.parameters())  # the model's parameters are not the criterion's
    _, size, log = built.criterion(other.model.eval(), sample)
    assert log["dec_entropy_loss"] > 0.1 * size


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
    built = build(toy_data, *TINY_ARGS, "--moe-entropy-loss-coeff", "0.1")
    sample = batches(built.task)[0]
    built.criterion(built.model, sample)  # switches the routers' measuring on
    routing = built.model(**sample["net_input"])

    def refuse(*args: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    class Model:
        """Gives the output computed before: the layers themselves are not under test."""

        get_normalized_probs = staticmethod(built.model.get_normalized_probs)
        get_targets = staticmethod(built.model.get_targets)

        def modules(self) -> list[Any]:
            return []

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
