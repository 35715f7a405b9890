"""The optimizer's step in one pass, against stock fairseq's."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq import optim
from fairseq.optim.adam import Adam, FairseqAdam
from torch import Tensor, nn

from xmoe_fairseq.optim import moe_adam
from xmoe_fairseq.optim.moe_adam import MoEAdam, OnePassAdam
from xmoe_fairseq.patches.registry import MARK

SETTINGS = [
    {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8},
    {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1},
]


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (3,), (2, 8, 4), (1,))]


def give_gradients(some: list[nn.Parameter], step: int) -> None:
    """Parameter 1 has none in the first steps, parameter 3 in none."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(some):
        has = number != 3 and (number != 1 or step > 2)
        parameter.grad = torch.randn(parameter.shape, generator=generator) if has else None


def trained(optimizer_class: type, settings: dict, steps: int) -> tuple[list[nn.Parameter], Adam]:
    some = parameters()
    optimizer = optimizer_class(some, **settings)
    for step in range(steps):
        give_gradients(some, step)
        optimizer.step()
    return some, optimizer


@pytest.mark.parametrize("settings", SETTINGS)
def test_parameters_and_state_are_those_of_stock(settings: dict) -> None:
    ours, optimizer = trained(OnePassAdam, settings, 10)
    theirs, stock = trained(Adam, settings, 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    state, expected = optimizer.state_dict(), stock.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys() == {0, 1, 2}
    for number, values in expected["state"].items():
        assert state["state"][number]["step"] == values["step"] == (7 if number == 1 else 10)
        for average in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state["state"][number][average], values[average], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS)
def test_follows_the_formula_in_float64(settings: dict) -> None:
    ours, _ = trained(OnePassAdam, settings, 5)
    expected = [naive(parameter, number, settings) for number, parameter in enumerate(parameters())]
    torch.testing.assert_close(list(ours), expected, rtol=1e-5, atol=1e-6)


def naive(parameter: nn.Parameter, number: int, settings: dict) -> Tensor:
    value, (beta1, beta2) = parameter.detach().double(), settings["betas"]
    mean, square, count = torch.zeros_like(value), torch.zeros_like(value), 0
    for step in range(5):
        some = parameters()
        give_gradients(some, step)
        if some[number].grad is None:
            continue
        grad, count = some[number].grad.double(), count + 1
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
        value = value * (1 - settings["lr"] * settings.get("weight_decay", 0.0))
        root = (1 - beta2**count) ** 0.5
        value = value - settings["lr"] * root / (1 - beta1**count) * mean / (square.sqrt() + settings["eps"])
    return value.float()


def test_goes_on_from_the_state_of_stock_and_back() -> None:
    for first, second in ((Adam, OnePassAdam), (OnePassAdam, Adam)):
        some, before = trained(first, SETTINGS[0], 4)
        after = second(some, **SETTINGS[0])
        after.load_state_dict(before.state_dict())
        for step in range(4, 8):
            give_gradients(some, step)
            after.step()
        expected, _ = trained(Adam, SETTINGS[0], 8)
        torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_left_to_stock() -> None:
    results = []
    for optimizer_class in (OnePassAdam, Adam):
        some = [nn.Parameter(parameter.data.bfloat16()) for parameter in parameters()]
        optimizer = optimizer_class(some, **SETTINGS[0])
        for parameter in some:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        results.append(some)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_all_parameters_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(moe_adam, "adamw", lambda some, *args, **options: calls.append(len(some)))
    some = parameters()
    give_gradients(some, step=5)
    OnePassAdam(some).step()
    assert calls == [3]


def test_adam_is_stock_and_moe_adam_is_the_optimizer_of_that_name() -> None:
    for name, kind in (("moe_adam", OnePassAdam), ("adam", Adam)):
        assert type(optim.build_optimizer(Namespace(optimizer=name, **CONFIG), parameters()).optimizer) is kind
    for method in (Adam.step, FairseqAdam.multiply_grads, FairseqAdam.clip_grad_norm, FairseqAdam.zero_grad):
        assert method.__module__.startswith("fairseq.") and not hasattr(method, MARK)


CONFIG = {
    **{"lr": [1e-2], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.01},
    **{"fp16_adam_stats": False, "use_old_adam": True, "tpu": False},
}


def optimizer_of(kind: Any, some: list[nn.Parameter]) -> Any:
    return kind(Namespace(**CONFIG), some)


def steps_of_trainer(kind: Any, max_norm: float, scale: Any = 1.0) -> tuple[list[nn.Parameter], list[Tensor]]:
    some, norms = parameters(), []
    optimizer = optimizer_of(kind, some)
    for step in range(6):
        optimizer.zero_grad()
        give_gradients(some, step)
        optimizer.multiply_grads(scale)
        optimizer.multiply_grads(torch.tensor(1 / 3))
        norms.append(optimizer.clip_grad_norm(max_norm))
        if step != 2:  # one whose gradients are dropped, as after an overflow
            optimizer.step()
    return some, norms


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1 / 7])
def test_gradients_scaled_and_clipped_in_the_step_do_what_those_of_stock_do(max_norm: float, scale: float) -> None:
    ours, our_norms = steps_of_trainer(MoEAdam, max_norm, scale)
    theirs, norms = steps_of_trainer(FairseqAdam, max_norm, scale)
    torch.testing.assert_close(our_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_norms_of_other_processes_are_of_the_same_scale() -> None:
    def twice(norm: Tensor) -> Tensor:
        return 2 * norm

    results = []
    for kind in (MoEAdam, FairseqAdam):
        some = parameters()
        optimizer = optimizer_of(kind, some)
        give_gradients(some, 5)
        optimizer.multiply_grads(0.25)
        norm = optimizer.clip_grad_norm(0.3, aggregate_norm_fn=twice)
        optimizer.step()
        results.append((norm, some))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_norms_of_many_numbers_are_exact() -> None:
    torch.manual_seed(0)
    large = nn.Parameter(torch.empty(64, 256, 256))
    large.grad = torch.randn(large.shape)
    norm = optimizer_of(MoEAdam, [large]).clip_grad_norm(0.0)
    torch.testing.assert_close(norm.double(), large.grad.double().norm(), rtol=1e-5, atol=0)


def test_memory_is_not_passed_over_before_the_step() -> None:
    some = parameters()
    optimizer = optimizer_of(MoEAdam, some)
    give_gradients(some, 5)
    given = [parameter.grad.clone() for parameter in some[:3]]
    optimizer.multiply_grads(0.25)
    optimizer.clip_grad_norm(0.3)
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(some, given, strict=False))
    assert not optimizer.optimizer.state_dict()["state"]


def test_a_factor_is_never_left_out() -> None:
    weight = nn.Parameter(torch.randn(5, 7))
    optimizer = optimizer_of(MoEAdam, [weight])
    weight.grad = torch.randn(5, 7)
    optimizer.multiply_grads(0.25)
    weight.grad = torch.randn(5, 7).to_sparse()
    with pytest.raises(RuntimeError, match="scaled or clipped"):
        optimizer.step()
