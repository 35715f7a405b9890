"""Experts split over processes compute what one process with all experts computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from xmoe_fairseq.moe import (
    ROUTERS,
    ConditionalMoE,
    ExpertGroup,
    ExpertOutputMasking,
    Experts,
    MoELayer,
    RouterOptions,
    StackedMoE,
    StratifiedMoE,
)
from xmoe_fairseq.moe.parallel import block

DIM, HIDDEN = 8, 16
LAYERS = ("threshold", "topk", "gshard", "switch", "hash", "balanced", "strata", "strata_topk", "stack", "cmr", "eom")
EXCHANGES = ("counted", "static")


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.stop()


@cache
def groups(size: int, patience: float = 30) -> ExpertGroup:
    """Made once in a process: every process of the world must ask at the same time."""
    return ExpertGroup.of(size, timedelta(seconds=patience))


def make_layer(
    kind: str,
    experts: int = 7,
    group: ExpertGroup | None = None,
    exchange: str = "auto",
    capacity: float = 0.0,
    kernel: str = "auto",
    dtype: torch.dtype = torch.double,
    static: bool = False,
) -> nn.Module:
    """The same layer in every process, but for the experts that are elsewhere."""
    torch.manual_seed(0)
    options = RouterOptions(threshold=0.7, top_k=2, capacity_factor=capacity, min_capacity=1, static=static)

    def router(count: int = experts) -> nn.Module:
        return ROUTERS[{"strata": "threshold", "strata_topk": "topk"}.get(kind, kind)](DIM, count, options)

    def stacked() -> Experts:
        return Experts(experts, DIM, HIDDEN, torch.tanh, kernel=kernel, group=group, exchange=exchange)

    layer: nn.Module
    if kind.startswith("strata"):
        sizes = [experts - 4, 2, 2] if experts > 4 else [experts]
        layer = StratifiedMoE([router(sum(sizes[i:])) for i in range(len(sizes))], stacked(), sizes)  # type: ignore
    elif kind in ("stack", "cmr", "eom"):
        kind, wanted = "gshard", kind
        masking = ExpertOutputMasking(0.3) if wanted == "eom" else None
        layer = MoELayer(router(), stacked(), masking)  # type: ignore[arg-type]
        if wanted == "stack":
            layer = StackedMoE([layer, MoELayer(router(), stacked())])  # type: ignore[arg-type]
        if wanted == "cmr":
            layer = ConditionalMoE(layer, DIM, HIDDEN)
    else:
        layer = MoELayer(router(), stacked())  # type: ignore[arg-type]
    return layer if dtype == torch.float32 else layer.to(dtype)


def make_input(number: int, tokens: int, skew: float = 0.0, dtype: torch.dtype = torch.double) -> Tensor:
    """Tokens of one process; with skew, all alike, so that all want the same experts."""
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(tokens, DIM, generator=generator, dtype=torch.double)
    return torch.lerp(x, torch.linspace(-1, 1, DIM, dtype=torch.double).expand_as(x), skew).to(dtype)


def run(layer: nn.Module, x: Tensor, number: int, padded: bool = False) -> tuple[Tensor, Tensor]:
    """The output and a loss of it, with the random numbers of one process."""
    torch.manual_seed(number)
    mask = torch.full((len(x),), True) if padded else torch.arange(len(x)) % 5 == 4
    y = layer(x, mask, torch.arange(len(x)) * (number + 3))[0]
    target = torch.linspace(-1, 1, max(len(x), 1) * DIM, dtype=y.dtype)[: y.numel()].view_as(y)
    return y, (y - target).square().sum()


def compare(rank: int, got: nn.Module, want: nn.Module, tolerance: float) -> None:
    """Gradients here and in the layer with all experts; shared parameters are summed over the processes."""
    wanted = dict(want.named_parameters())
    for name, parameter in got.named_parameters():
        grad, all_grads = parameter.grad, wanted[name].grad
        if grad is None or all_grads is None:
            assert grad is all_grads, name
            continue
        if ".fc" in name and "experts" in name:
            rows = block(len(all_grads), rank, dist.get_world_size())
            all_grads = all_grads[rows.start : rows.stop]
        else:
            dist.all_reduce(grad)
        torch.testing.assert_close(grad, all_grads, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_equality(
    rank: int,
    kind: str,
    tokens: list[int],
    experts: int = 7,
    exchange: str = "counted",
    capacity: float = 0.0,
    skew: float = 0.0,
    needs: list[bool] | None = None,
    padded: list[bool] | None = None,
    training: bool = True,
    kernel: str = "auto",
    dtype: torch.dtype = torch.double,
) -> None:
    """The output and all gradients of this process's part, against one process that takes all parts in turn."""
    size = len(tokens)
    needs, padded = needs or [True] * size, padded or [False] * size
    arguments = {"kind": kind, "experts": experts, "capacity": capacity, "dtype": dtype}
    ours = make_layer(**arguments, group=groups(size), exchange=exchange, kernel=kernel).train(training)
    whole = make_layer(**arguments).train(training)
    inputs = [
        make_input(number, count, skew, dtype).requires_grad_(needs[number]) for number, count in enumerate(tokens)
    ]
    here = inputs[rank].detach().clone().requires_grad_(needs[rank])
    y, loss = run(ours, here, rank, padded[rank])
    loss.backward()
    outputs, losses = zip(*[run(whole, x, n, padded[n]) for n, x in enumerate(inputs)], strict=True)
    torch.stack(losses).sum().backward()
    tolerance = 1e-9 if dtype == torch.double else 1e-5
    torch.testing.assert_close(y, outputs[rank], rtol=tolerance, atol=tolerance)
    if needs[rank]:
        torch.testing.assert_close(here.grad, inputs[rank].grad, rtol=tolerance, atol=tolerance)
    compare(rank, ours, whole, tolerance)


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
        bounded = exchange == "static" and kind != "hash"
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
            assert parameter.expert
            wanted = wanted[rows.start : rows.stop]
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=0)
        assert not hasattr(whole.get_parameter(name), "expert")
    assert len(whole.get_parameter("experts.fc1_weight").flatten(1).unique(dim=0)) == experts
    assert copy.deepcopy(ours).experts.group is group
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
    if exchange == "counted":
        assert sent[:3] == [(size - 1) * 16, rows, pairs * 12]
        assert sent[4] == rows, "gradients of outputs go where the tokens went"
        received = torch.tensor([float(sum(sent[3:4] + sent[5:])), rows * 2 + pairs * 4])
        dist.all_reduce(received)
        assert received[0] == received[1], "what comes back is what went out, without row and expert of the pairs"
    else:
        most_each = -(-9 * 2 // 8)
        widest = len(blocks[0])
        slots, rows = (size - 1) * most_each * widest, (size - 1) * min(9, most_each * widest) * DIM * 4
        assert sent == [rows, slots * 12, rows, rows, rows, slots * 4]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_token_goes_once_to_a_process(world: World, exchange: str) -> None:
    world.run(check_bytes, exchange)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
def test_blocks_hold_every_expert_once(blocks: int) -> None:
    for experts in range(blocks, 20):
        parts = [block(experts, number, blocks) for number in range(blocks)]
        assert [expert for part in parts for expert in part] == list(range(experts))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def check_two_groups(rank: int) -> None:
    group = groups(2)
    assert (group.rank, group.size) == (rank % 2, 2)
    layer, whole = make_layer("threshold", 5, group), make_layer("threshold", 5)
    # The second pair of processes has other tokens, and the first must not notice.
    inputs = [make_input(number, 4 + 2 * number) for number in range(4)]
    y = layer(inputs[rank])[0]
    y.square().sum().backward()
    mates = [rank - rank % 2, rank - rank % 2 + 1]
    torch.testing.assert_close(y, whole(inputs[rank])[0])
    torch.stack([whole(inputs[mate])[0].square().sum() for mate in mates]).sum().backward()
    rows = group.block(5)
    torch.testing.assert_close(layer.experts.fc1_weight.grad, whole.experts.fc1_weight.grad[rows.start : rows.stop])


def test_two_groups_in_four_processes_do_not_mix() -> None:
    world = World(4)
    try:
        world.run(check_two_groups)
        world.run(check_equality, "threshold", [3, 0, 8, 5], 6, "counted")
        world.run(check_equality, "strata", [3, 0, 8, 5], 6, "static", 1.0)
    finally:
        world.stop()


def stay_away(rank: int, how: str) -> None:
    layer = make_layer("threshold", 4, groups(2, patience=3))
    if rank == 1:
        if how == "dies":
            os._exit(1)
        return
    layer(make_input(0, 3))


@pytest.mark.parametrize("how", ["dies", "leaves out a call"])
def test_who_waits_in_vain_gets_an_error(how: str) -> None:
    world = World(2)
    try:
        (well, error), _ = world.attempt(stay_away, how, limit=30)
        assert not well and "RuntimeError" in error, error
    finally:
        world.stop()


@pytest.fixture
def fake_world() -> Iterator[None]:
    """Two processes of which there is one: what it is sent has a shape, but no values."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["threshold", "gshard", "strata"])
def test_the_static_exchange_reads_nothing_back_from_the_device(
    fake_world: None, monkeypatch: pytest.MonkeyPatch, kind: str, exchange: str
) -> None:
    # Fake tensors have no values: whatever asks for one fails. The bound is agreed on in main memory.
    monkeypatch.setattr(ExpertGroup, "largest", lambda group, *numbers: list(numbers))
    fails = pytest.raises(DataDependentOutputException) if exchange == "counted" else nullcontext()
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), fails:
        layer = make_layer(kind, 6, ExpertGroup(0, 2), exchange, 1.5, "grouped_mm", torch.float32, static=True)
        x = torch.empty(40, DIM, requires_grad=True)
        run(layer, x, 0)[1].backward()
        assert x.grad is not None
