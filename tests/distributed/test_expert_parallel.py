"""Experts split over processes compute what one process with all experts computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import World
from helpers_experts import DIM, EXCHANGES, LAYERS, check_equality, compare, groups, make_input, make_layer, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xmoe_fairseq.moe import ExpertGroup
from xmoe_fairseq.moe.expert_parallel.group import block


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.stop()


@pytest.mark.parametrize("kind", LAYERS)
def test_equals_one_process(world: World, kind: str) -> None:
    tokens = [11, 5, 8][: world.size]
    world.run(check_equality, kind, tokens)
    for exchange in EXCHANGES:
        world.run(check_equality, kind, tokens, 8, exchange, 1.0)


def check_concatenation(rank: int, kind: str) -> None:
    size = dist.get_world_size()
    ours, whole = make_layer(kind, group=groups(size)), make_layer(kind)
    inputs = [make_input(number, 6 + 3 * number) for number in range(size)]
    (y, _), (every, _) = ours(inputs[rank]), whole(torch.cat(inputs))
    torch.testing.assert_close(y, every.split([len(x) for x in inputs])[rank])
    y.square().sum().backward()
    every.square().sum().backward()
    compare(rank, ours, whole, 1e-9)


@pytest.mark.parametrize("kind", ["threshold", "topk", "gshard", "strata"])
def test_without_capacity_equals_one_process_on_the_concatenated_tokens(world: World, kind: str) -> None:
    world.run(check_concatenation, kind)


@pytest.mark.parametrize("kernel", ["fused", "grouped_mm", "loop"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_kernel(world: World, kernel: str, exchange: str) -> None:
    arguments = {"kernel": kernel, "dtype": torch.float32}
    world.run(_with_options, arguments, "threshold", [9, 0, 4][: world.size], 5, exchange, 1.0)
    world.run(_with_options, arguments, "strata", [0, 7, 4][: world.size], 5, exchange, 1.0)


def _with_options(rank: int, options: dict[str, Any], *args: Any) -> None:
    check_equality(rank, *args, **options)


ADVERSARIAL: dict[str, dict[str, Any]] = {
    "one process has no token": {"tokens": [0, 9, 4]},
    "no process has a token": {"tokens": [0, 0, 0]},
    "no token is real": {"tokens": [4, 4, 4], "padded": [True, True, True]},
    "one process has padding only": {"tokens": [4, 6, 4], "padded": [True, False, False]},
    "all tokens want the same experts": {"tokens": [9, 30, 4], "skew": 1.0},
    "no input needs a gradient": {"tokens": [4, 6, 4], "needs": [False, False, False]},
    "one input needs no gradient": {"tokens": [4, 6, 4], "needs": [False, True, True]},
    "one token": {"tokens": [0, 1, 0]},
}


@pytest.mark.parametrize("kind", ["threshold", "hash", "strata"])
@pytest.mark.parametrize("load", ADVERSARIAL)
def test_adversarial_loads_neither_hang_nor_change_results(world: World, kind: str, load: str) -> None:
    options = {name: value[: world.size] if name != "skew" else value for name, value in ADVERSARIAL[load].items()}
    for exchange in EXCHANGES:
        calls = world.run(_calls, {"kind": kind, "exchange": exchange, "capacity": 1.0, **options})
        assert calls[0] == calls[-1]
        # Hash routing has no capacity, and so no bound; strata run the experts three times.
        bounded = exchange == "fixed_capacity" and kind != "hash"
        passes = 3 if kind == "strata" else 1
        assert calls[0] == {"all_to_all_single": (6 if bounded else 7) * passes, "all_reduce": bounded * passes}


def _calls(rank: int, options: dict[str, Any]) -> dict[str, int]:
    """Checks equality, and counts the collective calls of a forward and a backward pass."""
    check_equality(rank, **options)
    layer = make_layer(
        options["kind"], group=groups(len(options["tokens"])), exchange=options["exchange"], capacity=1.0
    )
    needs = options.get("needs", [True] * 3)[rank]
    x = make_input(rank, options["tokens"][rank], options.get("skew", 0.0)).requires_grad_(needs)
    with spied() as calls:
        run(layer, x, rank, options.get("padded", [False] * 3)[rank])[1].backward()
    return {name: len(calls[name]) for name in ("all_to_all_single", "all_reduce")}


@contextmanager
def spied() -> Iterator[dict[str, list[int]]]:
    """Collects, by the name of a collective function, the bytes that each call sends to other processes."""
    calls: dict[str, list[int]] = {"all_to_all_single": [], "all_reduce": []}
    real = {name: getattr(dist, name) for name in calls}

    def all_to_all(out: Tensor, data: Tensor, received: Any = None, sent: Any = None, group: Any = None) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        sent = sent or [len(data) // size] * size
        row = data[:1].nbytes if len(data) else 0
        calls["all_to_all_single"].append(row * (sum(sent) - sent[rank]))
        real["all_to_all_single"](out, data, received, sent, group=group)

    def all_reduce(data: Tensor, *args: Any, **kwargs: Any) -> None:
        calls["all_reduce"].append(data.nbytes)
        real["all_reduce"](data, *args, **kwargs)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce  # type: ignore[assignment]
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawn_sizes(world: World, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=world.size, max_size=world.size)
    options = {
        "kind": data.draw(st.sampled_from(LAYERS)),
        "tokens": data.draw(st.lists(st.integers(0, 12), min_size=world.size, max_size=world.size)),
        "experts": data.draw(st.integers(world.size, 9)),
        "exchange": data.draw(st.sampled_from(EXCHANGES)),
        "capacity": data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "skew": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "needs": data.draw(flags),
        "padded": data.draw(flags),
        "training": data.draw(st.booleans()),
    }
    world.run(_with_options, options)


def check_autocast(rank: int, exchange: str) -> None:
    size = dist.get_world_size()
    results = []
    for group in (groups(size), None):
        layer = make_layer("threshold", group=group, exchange=exchange, capacity=2.0, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16), spied() as calls:
            x = make_input(rank, 7 + rank, dtype=torch.float32).requires_grad_()
            y = layer(x)[0]
        y.float().square().sum().backward()
        if group:
            whole_row = DIM * 2
            sent = [bytes for bytes in calls["all_to_all_single"] if bytes]
            assert any(bytes % whole_row == 0 for bytes in sent)
        results.append((y, x.grad))
    (y, grad), (want, want_grad) = results
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(grad, want_grad, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_autocast_sends_and_gives_bf16(world: World, exchange: str) -> None:
    world.run(check_autocast, exchange)


def check_modes(rank: int, exchange: str) -> None:
    """Activation checkpointing, two micro-batches, and no gradients, each with one process empty once."""
    size = dist.get_world_size()

    def micro_batches(number: int) -> list[Tensor]:
        return [make_input(number, 5 * number), make_input(10 + number, 5 * (size - 1 - number))]

    batches = micro_batches(rank)
    for kind in ("threshold", "strata"):
        plain, recomputed = (make_layer(kind, group=groups(size), exchange=exchange, capacity=1.0) for _ in range(2))
        for batch in batches:
            x, z = batch.clone().requires_grad_(), batch.clone().requires_grad_()
            y = plain(x)[0]
            y.square().sum().backward()
            again = checkpoint(lambda z, layer=recomputed: layer(z)[0], z, use_reentrant=False)
            again.square().sum().backward()
            torch.testing.assert_close(again, y)
            torch.testing.assert_close(z.grad, x.grad)
        whole = make_layer(kind, capacity=1.0)
        parts = [batch for number in range(size) for batch in micro_batches(number)]
        torch.stack([whole(part)[0].square().sum() for part in parts]).sum().backward()
        for layer in (plain, recomputed):
            compare(rank, layer, whole, 1e-9)
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(batches[0])[0], whole.eval()(batches[0])[0])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_checkpointing_accumulation_and_evaluation(world: World, exchange: str) -> None:
    world.run(check_modes, exchange)


def check_start(rank: int) -> None:
    size = dist.get_world_size()
    group, experts = groups(size), 7
    ours, whole = make_layer("topk", experts, group), make_layer("topk", experts)
    rows = group.block(experts)
    assert len(rows) == experts // size + (rank < experts % size)
    for name, parameter in ours.named_parameters():
        wanted = whole.get_parameter(name)
        if name.startswith("experts."):
            assert parameter.expert is group
            wanted = wanted[rows.start : rows.stop]
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=0)
        assert not hasattr(whole.get_parameter(name), "expert")
    assert len(whole.get_parameter("experts.fc1_weight").flatten(1).unique(dim=0)) == experts
    copied = copy.deepcopy(ours).experts
    assert copied.group is group and all(parameter.expert is group for parameter in copied.parameters())
    with pytest.raises(ValueError, match="1 experts cannot be split"):
        make_layer("threshold", 1, group)
    with pytest.raises(ValueError, match=f"groups of {size + 1} processes do not divide {size}"):
        ExpertGroup.of(size + 1)
    with pytest.raises(ValueError, match="no exchange 'none'"):
        make_layer("topk", experts, group, "none")(make_input(0, 3))


def test_processes_start_with_the_experts_of_one(world: World) -> None:
    world.run(check_start)


def check_bytes(rank: int, exchange: str) -> None:
    """A token goes once to each other process that holds experts of it, and one row comes back."""
    size = dist.get_world_size()
    layer = make_layer("threshold", 8, groups(size), exchange, 2.0, dtype=torch.float32)
    x = make_input(rank, 9, dtype=torch.float32).requires_grad_()
    with spied() as calls:
        y, plan = layer(x)
        y.sum().backward()
    expert = torch.repeat_interleave(plan.group_sizes)
    blocks = [block(8, number, size) for number in range(size)]
    elsewhere = [(expert >= b.start) & (expert < b.stop) for number, b in enumerate(blocks) if number != rank]
    rows = sum(len(plan.token[mine].unique()) for mine in elsewhere) * DIM * 4
    pairs = sum(int(mine.sum()) for mine in elsewhere)
    sent = calls["all_to_all_single"]
    if exchange == "dynamic":
        assert sent[:3] == [(size - 1) * 16, rows, pairs * 12]
        assert sent[4] == rows, "gradients of outputs go where the tokens went"
        received = torch.tensor([float(sum(sent[3:4] + sent[5:])), rows * 2 + pairs * 4])
        dist.all_reduce(received)
        assert received[0] == received[1], "what comes back is what went out, without row and expert of the pairs"
    else:
        max_per_expert = -(-9 * 2 // 8)
        widest = len(blocks[0])
        slots, rows = (size - 1) * max_per_expert * widest, (size - 1) * min(9, max_per_expert * widest) * DIM * 4
        assert sent == [rows, slots * 12, rows, rows, rows, slots * 4]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_token_goes_once_to_a_process(world: World, exchange: str) -> None:
    world.run(check_bytes, exchange)
