"""Groups of processes that share experts: who is in them, who waits, and what is read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from helpers import MISSING_KERNELS
from helpers_distributed import World
from helpers_experts import DIM, EXCHANGES, check_equality, groups, make_input, make_layer, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from xmoe_fairseq.moe import ExpertGroup
from xmoe_fairseq.moe.expert_parallel.group import block


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
        world.run(check_equality, "threshold", [3, 0, 8, 5], 6, "dynamic")
        world.run(check_equality, "strata", [3, 0, 8, 5], 6, "fixed_capacity", 1.0)
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


@pytest.mark.skipif("grouped_mm" in MISSING_KERNELS, reason="an older torch")
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["threshold", "gshard", "strata"])
def test_the_static_exchange_reads_nothing_back_from_the_device(
    fake_world: None, monkeypatch: pytest.MonkeyPatch, kind: str, exchange: str
) -> None:
    # Fake tensors have no values: whatever asks for one fails. The bound is agreed on in main memory.
    monkeypatch.setattr(ExpertGroup, "largest", lambda group, *numbers: list(numbers))
    fails = pytest.raises(DataDependentOutputException) if exchange == "dynamic" else nullcontext()
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), fails:
        layer = make_layer(kind, 6, ExpertGroup(0, 2), exchange, 1.5, "grouped_mm", torch.float32, static=True)
        x = torch.empty(40, DIM, requires_grad=True)
        run(layer, x, 0)[1].backward()
        assert x.grad is not None
