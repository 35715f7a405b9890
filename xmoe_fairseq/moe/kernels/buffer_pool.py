"""Large buffers that are handed out again: fresh memory costs the kernel as much time as a product."""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import torch
from torch import Tensor


class Buffers:
    """Gives uninitialised tensors in main memory, over memory that no tensor uses any more if there is some.

    A training step writes a gradient as large as all experts, though few rows went through each. Memory from the
    system comes in pages of 4 KiB, each of them a fault, and goes back when the optimizer drops the gradient. Here
    it comes in huge pages, if the system has them, and stays: as much as was in use at once, which may be
    several buffers of one name, as with strata or gradient accumulation. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[mmap.mmap]] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a tensor of ``shape`` with the dtype and device of ``like``.

        Args:
            name: what it is for; a later call with the same name gets the same memory, once it is free.
            shape: of the tensor.
            like: its dtype and device; on a GPU torch's own allocator keeps memory already.
        """
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < _LEAST:
            return like.new_empty(shape)
        kept = self._kept.setdefault(name, [])
        # Three references mean that no tensor holds it: the list, the variable and the argument of getrefcount.
        free = [memory for memory in kept if sys.getrefcount(memory) <= 3]
        fitting = [memory for memory in free if size <= len(memory) <= 2 * size]
        if fitting:
            memory = fitting[0]
        else:
            memory = _huge_pages(size + size // 8)
            # In place of one that does not fit, so that there are never more than were in use at once.
            kept[:] = [other for other in kept if not free or other is not free[0]] + [memory]
        return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, ()


# Below this torch's allocator is as fast.
_LEAST = 1 << 20


def _huge_pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
