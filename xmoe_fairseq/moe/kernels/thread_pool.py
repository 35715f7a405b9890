"""Experts side by side on a CPU, each in a thread of its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Between products only one thread runs at a time. This bound is an estimate: it was not measured on more than 2 cores.
_MOST = 8


def parallel_for_experts(work: Callable[[int], None], sizes: Sequence[int], device: torch.device) -> None:
    """Calls ``work`` with each number whose size is not 0, on a CPU in several threads, the largest first.

    An expert has too few rows for a product that is cut among threads, and what is called around it is too small
    to be cut at all. So a thread takes an expert, and computes it by itself; if one has more to do than a
    thread's share of all, all threads compute it together. No gradients are recorded. What ``work`` raises comes back
    when no thread is at work any more.

    Args:
        work: writes to memory that calls with other numbers do not touch.
        sizes: how much there is to do for each number.
        device: where it is done; elsewhere than on a CPU the calls are made one after the other.
    """
    workers, total = _workers(device), sum(sizes)
    numbers = sorted((number for number, size in enumerate(sizes) if size), key=sizes.__getitem__, reverse=True)
    large = sum(sizes[number] * workers > total for number in numbers)
    for number in numbers[:large]:
        work(number)
    _share(work, deque(numbers[large:]), min(workers, len(numbers) - large))


def _workers(device: torch.device) -> int:
    # A mode, such as one that counts operations, sees those of its own thread only, and torch can tell a thread how
    # many to compute with only if it computes with OpenMP.
    if device.type != "cpu" or is_in_torch_dispatch_mode() or not torch.backends.openmp.is_available():
        return 1
    return min(torch.get_num_threads(), _MOST)


def _share(work: Callable[[int], None], numbers: deque[int], workers: int) -> None:
    if workers < 2:
        for number in numbers:
            work(number)
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def take() -> None:
        # OpenMP keeps this number for each thread, MKL for the process: products elsewhere in it take as few meanwhile.
        torch.set_num_threads(threads // workers)
        with torch.inference_mode(inference), torch.no_grad():
            while numbers:
                try:
                    number = numbers.popleft()
                except IndexError:  # another thread was faster
                    break
                work(number)

    others = [_pool(os.getpid(), workers - 1).submit(take) for _ in range(workers - 1)]
    try:
        take()
    finally:
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Keeps threads for later calls, in each process its own: they do not go with it where it forks."""
    return ThreadPoolExecutor(threads, f"experts-of-{process}")
