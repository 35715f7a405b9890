"""Experts in threads of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from xmoe_fairseq.moe.kernels.thread_pool import parallel_for_experts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def calls(sizes: list[int], device: torch.device = CPU) -> dict[int, tuple[int, int]]:
    """Gives for each number called the thread and the threads that its products would take."""
    seen: list[tuple[int, tuple[int, int]]] = []
    parallel_for_experts(
        lambda number: seen.append((number, (threading.get_ident(), torch.get_num_threads()))), sizes, device
    )
    assert len(dict(seen)) == len(seen)
    return dict(seen)


@given(st.lists(st.integers(0, 9), max_size=20))
def test_every_number_that_has_a_size_is_called_once(sizes: list[int]) -> None:
    assert set(calls(sizes)) == {number for number, size in enumerate(sizes) if size}
    assert torch.get_num_threads() == 4


def test_each_takes_a_thread_but_what_is_larger_than_a_share_takes_all() -> None:
    # All wait until three others have come: they can only be side by side.
    barrier = threading.Barrier(4)
    threads: dict[int, int] = {}

    def work(number: int) -> None:
        threads[number] = torch.get_num_threads()
        if number != 2:
            barrier.wait(timeout=30)

    parallel_for_experts(work, [5, 4, 40, 5, 0, 6], CPU)
    assert threads == {0: 1, 1: 1, 2: 4, 3: 1, 5: 1}
    assert calls([3, 50, 0]) == dict.fromkeys((0, 1), (threading.get_ident(), 4))


def test_elsewhere_than_on_a_cpu_one_comes_after_the_other() -> None:
    assert calls([3, 0, 3, 3], torch.device("meta")) == dict.fromkeys((0, 2, 3), (threading.get_ident(), 4))


def test_a_mode_that_watches_torch_sees_all() -> None:
    with FlopCounterMode(display=False) as counter:
        parallel_for_experts(lambda number: torch.ones(2, 3) @ torch.ones(3, 5), [1, 2, 0, 1], CPU)
    assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 5


@pytest.mark.parametrize("failing", range(4))
def test_errors_come_back_and_the_number_of_threads_is_restored(failing: int) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait(timeout=30)
        if number == failing:
            raise RuntimeError(f"expert {number}")

    with pytest.raises(RuntimeError, match=f"expert {failing}"):
        parallel_for_experts(work, [1, 1, 1, 1], CPU)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_memory_of_the_caller_can_be_written(mode: type) -> None:
    with mode():
        out = torch.zeros(8, 3)
        parallel_for_experts(lambda number: out[number].copy_(torch.full((3,), 1.0 + number)), [1] * 8, CPU)
    assert torch.equal(out, torch.arange(1.0, 9.0).unsqueeze(-1).expand(8, 3))
    assert not out.requires_grad


def _seen_in_a_fork() -> None:
    os._exit(0 if len(calls([1, 1, 1, 1])) == 4 else 1)


def test_a_forked_process_has_threads_of_its_own() -> None:
    calls([1, 1, 1, 1])
    process = multiprocessing.get_context("fork").Process(target=_seen_in_a_fork)
    process.start()
    process.join(timeout=30)
    process.kill()
    assert process.exitcode == 0
